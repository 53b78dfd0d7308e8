//! Kernels that take most of a step's time: none may spill, and ptxas must have nothing to say of lost speed (it serialises products
//! that it cannot follow). Without ptxas nothing is tested.

#![cfg(feature = "nvidia")]

#[path = "support/attention.rs"]
mod attention;
#[path = "support/experts.rs"]
mod experts;
#[path = "support/heads.rs"]
mod heads;
#[path = "support/linear.rs"]
mod linear;
#[path = "support/scores.rs"]
mod scores;

use attention::Attention;
use dsc_ir::DType;
use dsc_ir::schedule::Schedule;
use dsc_targets::nvidia::NvidiaTarget;
use dsc_targets::{Kernel, Target, TargetOptions};
use experts::Experts;
use heads::Heads;
use linear::Linear;
use scores::Scores;

/// Products in the tiles that the target chooses for them, on 132 multiprocessors.
fn kernels() -> Vec<Kernel> {
    let fp8 =
        |n, k, tile| Linear { dtype: DType::E4m3, n, k, tile, step: 128, out: DType::Bf16, glu: false, part: None };
    let linear = [
        // Many rows, in pairs of blocks, and fewer; few rows, and a handful, in parts.
        (fp8(7168, 16384, [128, 128]), 2),
        (fp8(32768, 1536, [128, 128]), 2),
        (fp8(7168, 16384, [256, 128]), 0),
        (fp8(24576, 1536, [256, 128]), 2),
        (fp8(2112, 7168, [192, 128]), 0),
        (fp8(24576, 1536, [192, 128]), 0),
        (fp8(4096, 7168, [64, 64]), 0),
        (fp8(4096, 7168, [32, 64]), 0),
        (fp8(7168, 2048, [16, 64]), 0),
        (Linear { part: Some(8192), out: DType::F32, ..fp8(7168, 16384, [16, 64]) }, 0),
        // SwiGLU and quantisation behind it.
        (Linear { glu: true, out: DType::E4m3, ..fp8(18432, 7168, [64, 128]) }, 0),
        (Linear { glu: true, out: DType::E4m3, ..fp8(18432, 7168, [16, 128]) }, 0),
        // The head, and the router.
        (Linear { dtype: DType::Bf16, step: 64, out: DType::F32, ..fp8(129_280, 7168, [16, 64]) }, 0),
        (Linear { dtype: DType::Bf16, step: 64, out: DType::F32, ..fp8(256, 7168, [64, 16]) }, 0),
    ];
    let experts = [[128, 128], [64, 128], [32, 64], [16, 64]].into_iter().flat_map(|tile| {
        let of = move |per_token, n, k| Experts {
            experts: 257,
            per_token,
            n,
            k,
            tile,
            parts: 4,
            apart: false,
            glu: false,
            sorted: false,
        };
        [of(9, 4096, 7168), of(0, 7168, 2048), Experts { glu: true, ..of(9, 2048, 7168) }]
    });
    let sorted = [[192, 128], [128, 128]].map(|tile| {
        let (experts, parts) = (257, 4);
        Experts { experts, per_token: 0, n: 7168, k: 2048, tile, parts, apart: false, glu: false, sorted: true }
    });
    // Experts with many rows each.
    let apart = sorted.map(|e| Experts { experts: 32, parts: 6, apart: true, ..e });
    let experts = experts.chain(sorted).chain(apart);
    let linear = linear.into_iter().enumerate().map(|(i, (l, cluster))| {
        let schedule = Schedule { cluster, ..Schedule::default() };
        Kernel { program: l.program(&format!("linear{i}_{}x{}", l.tile[0], l.tile[1])), schedule }
    });
    let experts = experts.map(|e| {
        let glu = if e.glu { "_glu" } else { "" };
        let sorted = if e.sorted { "_sorted" } else { "" };
        let apart = if e.apart { "_apart" } else { "" };
        let name = format!("experts{}_{}x{}{glu}{sorted}{apart}", e.per_token, e.tile[0], e.tile[1]);
        Kernel { program: e.program(&name), schedule: Schedule::default() }
    });
    let heads = Heads { heads: 128, n: 512, k: 128, tile: [128, 256], step: 64 };
    let heads = Kernel { program: heads.program("heads"), schedule: Schedule::default() };
    // Scores of two tokens of a sequence, by warpgroups that take stages in turns.
    let two = Scores { heads: 64, rows: 2, pages: 2560, paged: true, scaled: false, fill: false, select: None };
    let two =
        Kernel { program: two.program("scores_ranges"), schedule: Schedule { ranges: true, ..Schedule::default() } };
    linear.chain(experts).chain(attention()).chain([heads, two]).collect()
}

/// Sparse attention of decoding, with many heads (in pairs of blocks), a block's and few, and of prefill.
fn attention() -> Vec<Kernel> {
    let prefill = Attention {
        heads: 128,
        tile: 64,
        latent: 512,
        rope: 64,
        k: 2048,
        keys: 64,
        fp8: false,
        parts: None,
        searched: true,
    };
    let decode = |heads: u32, parts| Attention { heads, tile: heads.min(64), fp8: true, parts, ..prefill };
    let all = [prefill, decode(128, None), decode(128, Some(4)), decode(64, Some(8)), decode(16, Some(16))];
    let kernel = |(i, a): (usize, Attention)| Kernel {
        program: a.program(&format!("attention{i}_h{}", a.heads)),
        schedule: Schedule::default(),
    };
    all.into_iter().enumerate().map(kernel).collect()
}

#[test]
fn hot_kernels_do_not_spill() {
    let target = NvidiaTarget::named("sm_90a", &TargetOptions::default()).unwrap();
    let module = target.compile(&kernels()).unwrap();
    if module.code.is_empty() {
        eprintln!("not tested: there is no ptxas");
        return;
    }
    // Of what is said of lost speed nothing else may be: products that the assembler puts one behind the other, above all.
    let said: Vec<&String> = module.warnings.iter().filter(|w| !w.contains(" spills: ")).collect();
    assert_eq!(said, Vec::<&String>::new());
    // A block that computes all keys of 64 heads keeps addresses of four tensors beside them: some it puts aside once a tile.
    let most = |name: &str| if name.starts_with("attention") && name.ends_with("_h64") { 16 } else { 0 };
    for kernel in &module.kernels {
        let resources = kernel.gpu.as_ref().and_then(|gpu| gpu.resources).unwrap();
        let (spills, most) = (resources.spill_bytes, most(&kernel.name));
        assert!(spills.into_iter().all(|n| n <= most), "{} spills {spills:?} bytes", kernel.name);
        assert!(resources.stack_bytes <= most, "{} has a stack of {} bytes", kernel.name, resources.stack_bytes);
    }
}
