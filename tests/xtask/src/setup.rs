//! What the suite needs beyond Rust: looked for, and if it is missing named with the reason and installed, or told how to.

use crate::{Outcome, root, run};
use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What LLVM and MLIR 22 and the bindings to them are built with, by Debian's names.
const LLVM_PACKAGES: [&str; 11] = [
    "llvm-22-dev",
    "libmlir-22-dev",
    "mlir-22-tools",
    "lld-22",
    "clang-22",
    "libclang-22-dev",
    "libpolly-22-dev",
    "libz3-dev",
    "libzstd-dev",
    "zlib1g-dev",
    "libxml2-dev",
];
/// Where these packages put them; `.cargo/config.toml` has it too.
const LLVM: &str = "/usr/lib/llvm-22";

/// Installs a Debian package for a program that is missing, or says how to.
pub fn need(program: &str, package: &str, why: &str) -> Outcome {
    if on_path(program) {
        return Ok(());
    }
    eprintln!("xtask: {program} is missing; it is needed {why}");
    install(program, &[package])
}

/// LLVM and MLIR 22, from Debian's packages or where `LLVM_SYS_221_PREFIX` says.
pub fn need_llvm() -> Outcome {
    let prefix = env::var_os("LLVM_SYS_221_PREFIX").map_or_else(|| PathBuf::from(LLVM), PathBuf::from);
    let parts = ["bin/llvm-config", "include/mlir-c/IR.h", "lib/libMLIRCAPIIR.a", "lib/libclang.so", "bin/ld.lld"];
    let missing: Vec<&str> = parts.into_iter().filter(|part| !prefix.join(part).exists()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!(
        "xtask: {} has no {}; LLVM, MLIR and lld 22 are needed to compile for GPUs (about 1.5 GB)",
        prefix.display(),
        missing.join(", ")
    );
    install("LLVM and MLIR 22", &LLVM_PACKAGES)
}

/// A ptxas for the tests, if it takes saying where: the environment's, one that dsc finds by itself, or NVIDIA's wheel in `.cache`. Without any,
/// the tests of machine code skip themselves.
pub fn ptxas() -> Option<String> {
    let by_itself = on_path("ptxas") || Path::new("/usr/local/cuda/bin/ptxas").exists();
    let named = ["DSC_PTXAS", "CUDA_HOME", "CUDA_PATH"].iter().any(|v| env::var_os(v).is_some());
    if by_itself || named {
        return None;
    }
    let folder = root().join(".cache/ptxas");
    let program = folder.join("nvidia/cu13/bin/ptxas");
    if !program.exists() {
        eprintln!("xtask: ptxas is missing; it is needed to test machine code for NVIDIA GPUs (a wheel of 50 MB)");
        let target = folder.to_string_lossy().into_owned();
        let wheel = "nvidia-cuda-nvcc>=13,<14";
        let pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", &target, wheel];
        if let Err(reason) = run("python3", &pip) {
            eprintln!("xtask: {reason}; going on without: these tests skip themselves");
            return None;
        }
    }
    program.exists().then(|| program.to_string_lossy().into_owned())
}

fn on_path(program: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Installs where that needs no question (as root on Debian), or says what to do.
fn install(what: &str, packages: &[&str]) -> Outcome {
    let root_user = Command::new("id").arg("-u").output().is_ok_and(|o| o.stdout.trim_ascii() == b"0");
    if !root_user || !Path::new("/usr/bin/apt-get").exists() {
        let packages = packages.join(" ");
        return Err(format!("install {what} (Debian: apt-get install {packages}) and run this again"));
    }
    run("apt-get", &["update"])?;
    let mut args = vec!["install", "-y", "--no-install-recommends"];
    args.extend(packages);
    run("apt-get", &args)
}
