//! PTX to machine code, by NVIDIA's assembler, where there is one.
//!
//! ptxas is a program of the CUDA toolkit (and of a wheel on PyPI) that we may call but not ship. Without it the artifact holds PTX
//! only, which the driver compiles when the model is loaded.

use super::arch::Arch;
use dsc_ir::artifact::Resources;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Names a ptxas; `none` refuses to use any.
pub const VARIABLE: &str = "DSC_PTXAS";
/// How to get one.
pub const REMEDY: &str =
    "install the CUDA toolkit or `pip install nvidia-cuda-nvcc`, or say where it is with --ptxas PATH or DSC_PTXAS";

/// A ptxas that assembles for one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ptxas {
    path: PathBuf,
    arch: &'static Arch,
}

/// Machine code of one PTX module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cubin {
    /// An ELF file that the driver loads.
    pub bytes: Vec<u8>,
    /// What its one kernel takes; [`Resources::blocks_per_sm`] is left 0.
    pub resources: Resources,
    /// Warnings, and what ptxas says of lost performance: one line each.
    pub remarks: Vec<String>,
}

impl Ptxas {
    /// The one that `choice` or else `DSC_PTXAS` names; else the first that knows `arch`: in `CUDA_HOME`, `CUDA_PATH`, `PATH`, where the toolkit
    /// goes, in Python's packages. None if there is none, or if the name is `none`.
    ///
    /// # Errors
    /// What is wrong with the one that was named.
    pub fn find(choice: Option<&Path>, arch: &'static Arch) -> Result<Option<Ptxas>, String> {
        let variable = env::var_os(VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from);
        if let Some(path) = choice.map(Path::to_owned).or(variable) {
            if path == Path::new("none") {
                return Ok(None);
            }
            return Ptxas { path, arch }.probe().map(Some);
        }
        Ok(candidates().into_iter().filter(|p| p.is_file()).find_map(|path| Ptxas { path, arch }.probe().ok()))
    }

    /// Checks that it starts and knows the architecture and our PTX.
    fn probe(self) -> Result<Ptxas, String> {
        let (major, minor) = (self.arch.ptx / 10, self.arch.ptx % 10);
        let ptx = format!(
            ".version {major}.{minor}\n.target {}\n.address_size 64\n.visible .entry k() {{ ret; }}\n",
            self.arch.name
        );
        match self.assemble(&ptx) {
            Ok(_) => Ok(self),
            Err(reason) => Err(format!(
                "{} does not assemble for {}: {reason}; {REMEDY}, or leave it to the driver with --ptxas none",
                self.path.display(),
                self.arch.name
            )),
        }
    }

    /// Assembles one module with one kernel. Where nothing says how many blocks a multiprocessor shall hold, ptxas has a number in mind, and may spill
    /// for it: then it is asked again, for one, which is taken if it spills less than half as much.
    ///
    /// # Errors
    /// What ptxas said.
    pub fn assemble(&self, ptx: &str) -> Result<Cubin, String> {
        let first = self.run(ptx)?;
        let spills = |cubin: &Cubin| cubin.resources.spill_bytes.iter().copied().map(u64::from).sum::<u64>();
        if spills(&first) == 0 {
            return Ok(first);
        }
        let less = |second: &Cubin| 2 * spills(second) < spills(&first);
        let second = for_one_block(ptx).and_then(|ptx| self.run(&ptx).ok()).filter(less);
        Ok(second.unwrap_or(first))
    }

    fn run(&self, ptx: &str) -> Result<Cubin, String> {
        let io = |what: &str, e: std::io::Error| format!("{what}: {e}");
        // Files have the same names each time, in a folder of their own, so that no path can reach the output.
        let folder = tempfile::tempdir().map_err(|e| io("no temporary folder", e))?;
        fs::write(folder.path().join("kernel.ptx"), ptx).map_err(|e| io("cannot write a temporary file", e))?;
        let output = Command::new(&self.path)
            .args(["-arch", self.arch.name, "-O3", "-v", "kernel.ptx", "-o", "kernel.cubin"])
            .current_dir(folder.path())
            .output()
            .map_err(|e| io(&format!("{} did not start", self.path.display()), e))?;
        if !output.status.success() {
            return Err(failure(&output, ptx));
        }
        let report = messages(&output);
        let bytes = fs::read(folder.path().join("kernel.cubin")).map_err(|e| io("ptxas left no file", e))?;
        Ok(Cubin { bytes, resources: resources(&report)?, remarks: remarks(&report) })
    }
}

/// The same kernel with room for one block a multiprocessor at least; none if it says itself how many.
fn for_one_block(ptx: &str) -> Option<String> {
    let at = ptx.find(".reqntid").filter(|_| !ptx.contains(".minnctapersm"))?;
    Some(format!("{}.minnctapersm 1\n{}", &ptx[..at], &ptx[at..]))
}

/// Both streams: ptxas has used either.
fn messages(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The errors, each with the line of PTX that it is about.
fn failure(output: &Output, ptx: &str) -> String {
    const SHOWN: usize = 5;
    let report = messages(output);
    let lines = report.lines().filter(|l| !l.trim().is_empty() && !l.contains("info    :"));
    let texts: Vec<String> = lines.take(SHOWN).map(|line| with_source(line, ptx)).collect();
    if texts.is_empty() { format!("ptxas ended with {}", output.status) } else { texts.join("\n") }
}

/// "ptxas kernel.ptx, line 40; error : ..." and line 40.
fn with_source(message: &str, ptx: &str) -> String {
    let Some(rest) = message.strip_prefix("ptxas kernel.ptx, ") else { return message.to_owned() };
    let number = rest.strip_prefix("line ").and_then(|r| r.split(';').next()?.trim().parse::<usize>().ok());
    let source = number.and_then(|n| ptx.lines().nth(n.checked_sub(1)?));
    source.map_or_else(|| format!("ptxas: {rest}"), |source| format!("ptxas: {rest}\n    {}", source.trim()))
}

/// What `-v` prints of the kernel.
fn resources(report: &str) -> Result<Resources, String> {
    // "Used 168 registers, used 1 barriers, 128 bytes smem": the number before the words.
    let before = |words: &str| {
        let number =
            report.split(words).next().filter(|head| head.len() < report.len())?.split_whitespace().next_back()?;
        number.trim_start_matches(',').parse::<u32>().ok()
    };
    let registers = before(" registers").ok_or_else(|| format!("ptxas did not say how many registers: {report}"))?;
    Ok(Resources {
        registers,
        spill_bytes: [before(" bytes spill stores").unwrap_or(0), before(" bytes spill loads").unwrap_or(0)],
        stack_bytes: before(" bytes stack frame").unwrap_or(0),
        static_shared_bytes: before(" bytes smem").unwrap_or(0),
        ..Resources::default()
    })
}

/// Warnings, and messages with a number such as C7510 (wgmma serialised), without their head.
fn remarks(report: &str) -> Vec<String> {
    let coded = |l: &str| l.split_once("(C").is_some_and(|(_, code)| code.starts_with(|c: char| c.is_ascii_digit()));
    let worth = |l: &&str| l.starts_with("ptxas warning") || coded(l) || l.contains("Potential Performance Loss");
    let text = |l: &str| l.split_once(" : ").map_or(l, |(_, text)| text).trim().to_owned();
    let mut remarks: Vec<String> = report.lines().filter(worth).map(text).collect();
    remarks.dedup();
    remarks
}

/// Where a ptxas may be, the likelier first.
fn candidates() -> Vec<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let mut found: Vec<PathBuf> = homes.map(|home| Path::new(&home).join("bin/ptxas")).collect();
    let path: Vec<PathBuf> = env::var_os("PATH").map_or_else(Vec::new, |p| env::split_paths(&p).collect());
    found.extend(path.iter().map(|dir| dir.join("ptxas")));
    found.push("/usr/local/cuda/bin/ptxas".into());
    let mut prefixes: Vec<PathBuf> = env::var_os("VIRTUAL_ENV").map(PathBuf::from).into_iter().collect();
    prefixes.extend(
        path.iter().filter(|dir| dir.join("python3").exists()).filter_map(|dir| dir.parent()).map(Path::to_owned),
    );
    prefixes.extend(env::var_os("HOME").map(|home| Path::new(&home).join(".local")));
    prefixes.dedup();
    found.extend(prefixes.iter().flat_map(|prefix| in_python(prefix)));
    found
}

/// What NVIDIA's wheels have put below `prefix`, the newest CUDA first.
fn in_python(prefix: &Path) -> Vec<PathBuf> {
    let listed = |dir: PathBuf| {
        let mut entries: Vec<PathBuf> = fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect();
        entries.sort();
        entries.reverse();
        entries
    };
    let named = |path: &PathBuf, start: &str| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start));
    let pythons = listed(prefix.join("lib")).into_iter().filter(|p| named(p, "python3"));
    let packages = pythons.flat_map(|p| [p.join("site-packages"), p.join("dist-packages")]);
    let wheels = packages.flat_map(|p| listed(p.join("nvidia"))).filter(|p| named(p, "cu"));
    wheels.map(|p| p.join("bin/ptxas")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
        ill formed pipeline stage in the function 'k'\n\
        ptxas info    : 0 bytes gmem\n\
        ptxas info    : Compiling entry function 'k' for 'sm_90a'\n\
        ptxas info    : Function properties for k\n    \
        432 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads\n\
        ptxas info    : Used 168 registers, used 1 barriers, 128 bytes smem, 464 bytes cmem[0]\n";

    #[test]
    fn a_report_is_read() {
        let expected = Resources {
            registers: 168,
            spill_bytes: [20, 24],
            stack_bytes: 432,
            static_shared_bytes: 128,
            ..Resources::default()
        };
        assert_eq!(resources(REPORT), Ok(expected));
        let remarks = remarks(REPORT);
        assert_eq!(remarks.len(), 1);
        assert!(remarks[0].starts_with("(C7510) Potential Performance Loss"), "{remarks:?}");
        assert!(resources("nothing").is_err());
    }

    #[test]
    fn a_kernel_that_says_how_many_blocks_is_left_alone() {
        let kernel = ".visible .entry k()\n.reqntid 256, 1, 1\n{ ret; }\n";
        let one = for_one_block(kernel).expect("it does not say");
        assert_eq!(one, ".visible .entry k()\n.minnctapersm 1\n.reqntid 256, 1, 1\n{ ret; }\n");
        assert_eq!(for_one_block(&one), None);
    }

    #[test]
    fn a_ptxas_that_was_named_must_work() {
        let arch = Arch::named("sm_90a").unwrap();
        assert_eq!(Ptxas::find(Some(Path::new("none")), arch), Ok(None));
        let error = Ptxas::find(Some(Path::new("/does/not/exist")), arch).unwrap_err();
        assert!(error.contains("/does/not/exist") && error.contains("--ptxas"), "{error}");
    }
}
