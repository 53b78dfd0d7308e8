//! LLVM's programs: the disassembler that decodes, and the assembler, compiler and linker that make code objects for tests.

use crate::fault::Error;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Folder of LLVM's programs, where they are not found otherwise.
pub const VARIABLE: &str = "DSC_LLVM_BIN";
const REMEDY: &str = "install LLVM 22 with clang and lld, or say with DSC_LLVM_BIN in which folder its programs are";

/// The folder with programs of LLVM 22 or later.
///
/// # Errors
/// If there is none.
pub fn folder() -> Result<&'static Path, Error> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || {
        let mut folders: Vec<PathBuf> = env::var_os(VARIABLE).into_iter().map(PathBuf::from).collect();
        folders.push("/usr/lib/llvm-22/bin".into());
        folders.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
        folders.into_iter().find(|f| version(&f.join("llvm-objdump")).is_some_and(|v| v >= 22))
    };
    FOUND.get_or_init(find).as_deref().ok_or_else(|| Error::Tool(format!("no llvm-objdump of LLVM 22: {REMEDY}")))
}

/// The major version that a program of LLVM says it has.
fn version(program: &Path) -> Option<u32> {
    if !program.is_file() {
        return None;
    }
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let after = text.split("LLVM version ").nth(1)?;
    after.split('.').next()?.trim().parse().ok()
}

/// Runs one of LLVM's programs and returns what it printed.
fn call(program: &str, args: &[&str], dir: &Path) -> Result<String, Error> {
    let path = folder()?.join(program);
    let output = Command::new(&path).args(args).current_dir(dir).output();
    let output = output.map_err(|e| Error::Tool(format!("{} did not start: {e}; {REMEDY}", path.display())))?;
    if !output.status.success() {
        return Err(Error::Tool(format!("{program}: {}", String::from_utf8_lossy(&output.stderr))));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn temporary() -> Result<tempfile::TempDir, Error> {
    tempfile::tempdir().map_err(|e| Error::Tool(format!("no temporary folder: {e}")))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    fs::write(path, bytes).map_err(|e| Error::Tool(format!("cannot write {}: {e}", path.display())))
}

/// Disassembles the code of a code object: lines of text, address and encoding.
///
/// # Errors
/// What the disassembler said.
pub fn disassemble(elf: &[u8], chip: &str) -> Result<String, Error> {
    let dir = temporary()?;
    write(&dir.path().join("code.o"), elf)?;
    let chip = format!("--mcpu={chip}");
    call("llvm-objdump", &["-d", "--triple=amdgcn-amd-amdhsa", &chip, "code.o"], dir.path())
}

/// Makes a code object of assembly.
///
/// # Errors
/// What the assembler or the linker said.
pub fn assemble(source: &str, chip: &str) -> Result<Vec<u8>, Error> {
    clang(source, "code.s", &[], chip)
}

/// Makes a code object of OpenCL C without a library.
///
/// # Errors
/// What the compiler or the linker said.
pub fn compile(source: &str, chip: &str) -> Result<Vec<u8>, Error> {
    clang(source, "code.cl", &["-cl-std=CL2.0", "-O2", "-nogpulib"], chip)
}

fn clang(source: &str, name: &str, args: &[&str], chip: &str) -> Result<Vec<u8>, Error> {
    let dir = temporary()?;
    write(&dir.path().join(name), source.as_bytes())?;
    let chip = format!("-mcpu={chip}");
    let all = [&["-target", "amdgcn-amd-amdhsa", &chip, name, "-o", "code.co"], args].concat();
    call("clang", &all, dir.path())?;
    fs::read(dir.path().join("code.co")).map_err(|e| Error::Tool(format!("the linker left no file: {e}")))
}
