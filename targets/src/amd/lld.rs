//! Objects to code objects, by LLVM's linker.
//!
//! A code object is a shared library of one kernel; LLVM makes a relocatable object, and only its linker turns one into the other. It comes with
//! LLVM (Debian: `lld-22`) and with ROCm.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Names an `ld.lld`.
pub const VARIABLE: &str = "DSC_LLD";
/// How to get one.
pub const REMEDY: &str =
    "install lld (Debian: apt-get install lld-22), or say where ld.lld is with --lld PATH or DSC_LLD";

/// A linker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lld {
    path: PathBuf,
}

impl Lld {
    /// The one that `choice` or else `DSC_LLD` names; else the first of `PATH`, Debian's folders of LLVM, and ROCm's.
    ///
    /// # Errors
    /// That there is none, or that the one named does not start.
    pub fn find(choice: Option<&Path>) -> Result<Lld, String> {
        let variable = env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(path) = choice.map(Path::to_owned).or(variable) {
            return Lld { path }.probe();
        }
        let found = candidates().into_iter().filter(|p| p.is_file()).find_map(|path| Lld { path }.probe().ok());
        found.ok_or_else(|| format!("there is no ld.lld, which links code objects; {REMEDY}"))
    }

    fn probe(self) -> Result<Lld, String> {
        let output = Command::new(&self.path).arg("--version").output();
        match output {
            Ok(output) if output.status.success() && String::from_utf8_lossy(&output.stdout).contains("LLD") => {
                Ok(self)
            }
            Ok(_) => Err(format!("{} is not ld.lld; {REMEDY}", self.path.display())),
            Err(e) => Err(format!("{} did not start: {e}; {REMEDY}", self.path.display())),
        }
    }

    /// Links one object.
    ///
    /// # Errors
    /// What the linker said.
    pub fn link(&self, object: &[u8]) -> Result<Vec<u8>, String> {
        let io = |what: &str, e: std::io::Error| format!("{what}: {e}");
        // Files have the same names each time, in a folder of their own, so that no path can reach the output.
        let folder = tempfile::tempdir().map_err(|e| io("no temporary folder", e))?;
        fs::write(folder.path().join("kernel.o"), object).map_err(|e| io("cannot write a temporary file", e))?;
        let output = Command::new(&self.path)
            .args(["-shared", "--no-undefined", "kernel.o", "-o", "kernel.hsaco"])
            .current_dir(folder.path())
            .output()
            .map_err(|e| io(&format!("{} did not start", self.path.display()), e))?;
        if !output.status.success() {
            return Err(format!("ld.lld: {}", String::from_utf8_lossy(&output.stderr).trim()));
        }
        fs::read(folder.path().join("kernel.hsaco")).map_err(|e| io("ld.lld left no file", e))
    }
}

/// Where an `ld.lld` may be.
fn candidates() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    folders.extend((20..=23).rev().map(|version| PathBuf::from(format!("/usr/lib/llvm-{version}/bin"))));
    folders.push("/opt/rocm/llvm/bin".into());
    folders.into_iter().map(|folder| folder.join("ld.lld")).collect()
}
