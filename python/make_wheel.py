#!/usr/bin/env python3
"""Makes the wheel of dsc_kernels from a built libdsc and a compiled library: a zip of files, with nothing left to build.

    make_wheel.py --lib target/release/libdsc.so --kernels dsa.dsc --version 0.1.0 --out DIR
"""
import argparse
import base64
import hashlib
import os
import zipfile

METADATA = """Metadata-Version: 2.1
Name: dsc-kernels
Version: {version}
Summary: Sparse-attention kernels compiled ahead of time by dsc, on torch tensors
License: Apache-2.0
Requires-Python: >=3.9
"""
WHEEL = """Wheel-Version: 1.0
Generator: dsc
Root-Is-Purelib: false
Tag: {tag}
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("lib", "kernels", "version", "out"):
        parser.add_argument("--" + name, required=True)
    parser.add_argument("--tag", default="py3-none-linux_x86_64")
    a = parser.parse_args()
    here = os.path.dirname(os.path.abspath(__file__))
    info = f"dsc_kernels-{a.version}.dist-info"
    files = {}
    for name, path in (("__init__.py", os.path.join(here, "dsc_kernels", "__init__.py")), ("libdsc.so", a.lib),
                       ("dsa.dsc", a.kernels)):
        with open(path, "rb") as f:
            files["dsc_kernels/" + name] = f.read()
    files[f"{info}/METADATA"] = METADATA.format(version=a.version).encode()
    files[f"{info}/WHEEL"] = WHEEL.format(tag=a.tag).encode()
    record = []
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(data)}\n")
    files[f"{info}/RECORD"] = ("".join(record) + f"{info}/RECORD,,\n").encode()
    os.makedirs(a.out, exist_ok=True)
    path = os.path.join(a.out, f"dsc_kernels-{a.version}-{a.tag}.whl")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))    # no time: the same input, the same bytes
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            z.writestr(entry, data)
    print(path)


if __name__ == "__main__":
    main()
