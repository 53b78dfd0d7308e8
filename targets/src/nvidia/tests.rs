//! From MLIR written by hand to code: what lies behind the lowering.

use super::*;
use crate::nvidia::arch::ARCHS;
use dsc_ir::artifact::GpuKernel;

/// `y[i] = x[i] + 1` for `i < T`, by 128 threads, with the parameters that every kernel has.
const ADD_ONE: &str = r#"
module {
  llvm.func @add_one(%x: !llvm.ptr<1>, %y: !llvm.ptr<1>, %syms: !llvm.ptr<1>)
      attributes {nvvm.kernel, nvvm.reqntid = array<i32: 128, 1, 1>} {
    %tid = nvvm.read.ptx.sreg.tid.x : i32
    %block = nvvm.read.ptx.sreg.ctaid.x : i32
    %threads = llvm.mlir.constant(128 : i32) : i32
    %one = llvm.mlir.constant(1.0 : f32) : f32
    %base = llvm.mul %block, %threads : i32
    %i = llvm.add %base, %tid : i32
    %tokens = llvm.load %syms : !llvm.ptr<1> -> i32
    %inside = llvm.icmp "slt" %i, %tokens : i32
    llvm.cond_br %inside, ^work, ^end
  ^work:
    %from = llvm.getelementptr %x[%i] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, f32
    %to = llvm.getelementptr %y[%i] : (!llvm.ptr<1>, i32) -> !llvm.ptr<1>, f32
    %v = llvm.load %from : !llvm.ptr<1> -> f32
    %w = llvm.fadd %v, %one : f32
    llvm.store %w, %to : f32, !llvm.ptr<1>
    llvm.br ^end
  ^end:
    llvm.return
  }
}
"#;

fn target(arch: &str, levels: &[Level], ptxas: Option<&str>) -> NvidiaTarget {
    let options = TargetOptions { levels: levels.to_vec(), ptxas: ptxas.map(Into::into), lld: None };
    NvidiaTarget::named(arch, &options).unwrap()
}

fn lowered(mlir: &str) -> Lowered {
    let gpu = GpuKernel { threads: 128, cluster: 1, ..GpuKernel::default() };
    Lowered { mlir: mlir.to_owned(), gpu, sched: "by hand".to_owned() }
}

fn compile(target: &NvidiaTarget, kernels: &[(&str, &str)]) -> Result<Module, TargetError> {
    let kernels: Vec<(&str, Lowered)> = kernels.iter().map(|(name, mlir)| (*name, lowered(mlir))).collect();
    let assembled = in_parallel(&kernels, |(name, lowered)| target.assembly(name, lowered.clone()));
    let assembled = assembled.into_iter().collect::<Result<Vec<_>, _>>()?;
    let names: Vec<&str> = kernels.iter().map(|(name, _)| *name).collect();
    target.link(&names, &assembled)
}

#[test]
fn every_architecture_gets_its_ptx() {
    for arch in ARCHS {
        let module = compile(&target(arch.name, &[], Some("none")), &[("add_one", ADD_ONE)]).unwrap();
        let ptx = String::from_utf8(module.portable.unwrap()).unwrap();
        for part in [&format!(".target {}", arch.name), ".visible .entry add_one", "add.rn.f32", ".reqntid 128"] {
            assert!(ptx.contains(part), "{} has no `{part}`:\n{ptx}", arch.name);
        }
        let version = format!(".version {}.{}", arch.ptx / 10, arch.ptx % 10);
        assert!(ptx.contains(&version), "{}: {ptx}", arch.name);
        let kernel = &module.kernels[0];
        let gpu = kernel.gpu.as_ref().unwrap();
        assert_eq!((kernel.code_bytes, gpu.asm, gpu.resources), (0, [0, ptx.len() as u64], None));
        assert!(module.warnings[0].contains("--ptxas PATH"), "{:?}", module.warnings);
    }
}

#[test]
fn ptxas_makes_cubins_and_says_what_they_take() {
    for arch in ARCHS {
        if Ptxas::find(None, arch).unwrap().is_none() {
            eprintln!("not tested for {}: there is no ptxas", arch.name);
            continue;
        }
        let target = target(arch.name, &[], None);
        let module = compile(&target, &[("a", ADD_ONE), ("b", ADD_ONE)]).unwrap();
        let [a, b] = &module.kernels[..] else { panic!("two kernels") };
        let code = &module.code[a.entry as usize..(a.entry + a.code_bytes) as usize];
        assert!(code.starts_with(b"\x7fELF"));
        // The same PTX is the same machine code, once.
        assert_eq!((a.entry, a.code_bytes), (b.entry, b.code_bytes));
        assert_eq!(module.code.len() as u64, a.code_bytes);
        let resources = a.gpu.as_ref().unwrap().resources.unwrap();
        assert!((4..=32).contains(&resources.registers), "{resources:?}");
        assert_eq!((resources.spill_bytes, resources.stack_bytes, resources.static_shared_bytes), ([0, 0], 0, 0));
        assert_eq!(resources.blocks_per_sm, arch.warps_per_sm / 4);
        assert_eq!(module.warnings, Vec::<String>::new());
        assert_eq!(compile(&target, &[("a", ADD_ONE), ("b", ADD_ONE)]).unwrap(), module, "the same bytes again");
    }
}

#[test]
fn levels_are_kept_if_asked_for() {
    let all = target("sm_90a", &[Level::Sched, Level::Mlir, Level::Llvm, Level::Asm], Some("none"));
    let module = compile(&all, &[("add_one", ADD_ONE)]).unwrap();
    let starts: Vec<(Level, bool)> = module
        .listings
        .iter()
        .map(|l| {
            let part = match l.level {
                Level::Sched => "by hand",
                Level::Mlir => "nvvm.kernel",
                Level::Llvm => "define ptx_kernel void @add_one(",
                Level::Asm => ".visible .entry add_one(",
            };
            (l.level, l.text.contains(part))
        })
        .collect();
    assert_eq!(starts, [Level::Sched, Level::Mlir, Level::Llvm, Level::Asm].map(|l| (l, true)));
    let none = compile(&target("sm_90a", &[], Some("none")), &[("add_one", ADD_ONE)]).unwrap();
    assert_eq!(none.listings, []);
}

#[test]
fn llvm_can_optimise() {
    let arch = Arch::named("sm_90a").unwrap();
    // Two loads of one address, nothing between: the optimiser keeps one.
    let twice = ADD_ONE.replace(
        "%w = llvm.fadd %v, %one : f32",
        "%u = llvm.load %from : !llvm.ptr<1> -> f32\n    %w = llvm.fadd %v, %u : f32",
    );
    let options = llvm::Options { passes: "default<O2>", llvm_ir: true, ..llvm::Options::default() };
    let features = arch.llvm_features();
    let chip = llvm::Chip { triple: "nvptx64-nvidia-cuda", cpu: arch.name, features: &features };
    let text = llvm::generate("k", &twice, chip, options).unwrap().llvm_ir.unwrap();
    assert_eq!(text.matches("load float").count(), 1, "{text}");
}

fn error(mlir: &str) -> String {
    compile(&target("sm_90a", &[], Some("none")), &[("bad", mlir)]).unwrap_err().to_string()
}

#[test]
fn errors_of_mlir_say_where() {
    let changes = [
        ("llvm.fadd %v, %one : f32", "llvm.fadd %v, %none : f32"),
        ("llvm.icmp \"slt\" %i, %tokens : i32", "llvm.icmp \"slt\" %i, %one : i32"),
        ("nvvm.read.ptx.sreg.tid.x", "nvvm.read.ptx.sreg.tid.w"),
    ];
    for (good, bad) in changes {
        let text = error(&ADD_ONE.replace(good, bad));
        let (line, source) = ADD_ONE.lines().enumerate().find(|(_, l)| l.contains(good)).unwrap();
        assert!(text.starts_with("kernel bad: code generation failed: MLIR: "), "{text}");
        assert!(text.contains(&format!("(line {}, column ", line + 1)), "{text}");
        assert!(text.contains(source.replace(good, bad).trim()), "{text}");
    }
}

#[test]
fn errors_of_ptxas_name_the_kernel() {
    if Ptxas::find(None, Arch::named("sm_90a").unwrap()).unwrap().is_none() {
        eprintln!("not tested: there is no ptxas");
        return;
    }
    let target = target("sm_90a", &[], None);
    let assembly =
        r#"llvm.inline_asm has_side_effects asm_dialect = att "no.such.instruction;", "" : () -> !llvm.void"#;
    let bad = ADD_ONE.replace("    llvm.return", &format!("    {assembly}\n    llvm.return"));
    let error = compile(&target, &[("add_one", ADD_ONE), ("bad", &bad)]).unwrap_err().to_string();
    assert!(
        error.starts_with("kernel bad: code generation failed: ") && error.contains("\n    no.such.instruction;"),
        "{error}"
    );

    let mut too_big = lowered(ADD_ONE);
    too_big.gpu.shared_bytes = 228 * 1024;
    let assembly = target.assembly("big", too_big).unwrap();
    let error = target.link(&["big"], &[assembly]).unwrap_err().to_string();
    assert!(error.contains("kernel big") && error.contains("232448"), "{error}");
}
