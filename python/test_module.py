"""Calls operations of a small library for the CPU (its path is the argument): without torch by name on `Array`s, and, where torch is
installed, by methods on tensors. The reference is written out here."""

import array
import struct
import sys

import dsc_kernels
from dsc_kernels import Array

lib = dsc_kernels.open(sys.argv[1], threads=1)
K = lib.facts["topk"]


def floats(values):
    return array.array("f", values).tobytes()


def ints(values):
    return array.array("i", values).tobytes()


def refused(call, status, *words):
    try:
        call()
    except dsc_kernels.DscError as e:
        assert e.status == status and all(w in str(e) for w in words), (e.status, str(e))
    else:
        raise AssertionError("nothing was refused")


rows, columns = 2, 40
scores = [[(i * 7 + r) % 19 - 9.0 for i in range(columns)] for r in range(rows)]
logits = Array((rows, columns), "float32", floats(x for row in scores for x in row))
ends = Array((rows,), "int32", ints([columns, 3]))
out = lib.topk_decode(logits, ends)
found = struct.unpack(f"{rows * K}i", out.tobytes())
for r, end in enumerate((columns, 3)):
    best = sorted(sorted(range(end), key=lambda i: (-scores[r][i], i))[:K])
    assert list(found[r * K:r * K + K]) == best + [-1] * (K - len(best)), (r, found, best)

refused(lambda: lib.launch("topk_decode", [logits, ends]), 5, "2 arguments", "selected")
refused(lambda: lib.launch("sort", [logits]), 4, "no operation sort")
refused(lambda: lib.launch("topk_decode", [logits, Array((3,), "int32"), out]), 6, "T = 2")
refused(lambda: dsc_kernels.open("no-such-file.dsc"), 2, "no-such-file.dsc")

# One key selected: attention gives its latent, and the logarithm of one exponential, which is its score.
f = lib.facts
H, L, R = f["heads"], f["latent"], f["rope"]
one, two = b"\x80\x3f", b"\x00\x40"                                     # bfloat16
q = Array((1, H, L + R), "bfloat16", one * (H * (L + R)))
row = b"\x38" * L + floats([2.0] * (L // 128)) + two * R                # e4m3 ones with scale 2, rope keys of 2
row += bytes(-len(row) % 16)
cache = Array((1, 64 * len(row)), "uint8", row * 64)
selected = Array((1, K), "int32", ints([-1] * (K - 1) + [5]))
o, lse = Array((1, H, L), "bfloat16"), Array((1, H), "float32")
lib.launch("mla_decode", [q, cache, selected, o, lse])
assert o.tobytes() == two * (H * L)
wanted = 2.0 * (L + R) * f["scale"]
assert all(abs(x - wanted) < 1e-4 * wanted for x in struct.unpack(f"{H}f", lse.tobytes()))
selected = Array((1, K), "int32", ints([-1] * K))
lib.launch("mla_decode", [q, cache, selected, o, lse])
assert o.tobytes() == bytes(2 * H * L) and set(struct.unpack(f"{H}f", lse.tobytes())) == {float("inf")}

try:
    import torch
except ImportError:
    print("LEFT OUT: torch is not installed, so methods on its tensors were not called")
else:
    x = torch.randn(3, 100)
    got = lib.topk_decode(x, torch.full((3,), 100, dtype=torch.int32))
    assert torch.equal(got.long(), x.topk(K).indices.sort(-1).values)
lib.close()
print("all right")
