//! Hopper's own instructions: asynchronous copies by descriptor, barriers in shared memory, and matrix products of warpgroups.
//!
//! Addresses in shared memory are i32. Everything that touches memory another thread or engine sees is a volatile block of
//! assembly with a memory clobber, so that its order is the order written here.

use crate::nvidia::lower::mlir::{Fn, Ty, Val, f32, i32, i64};
use dsc_ir::DType;

fn effect(f: &mut Fn, text: &str, constraints: &str, args: &[Val]) {
    f.asm(text, constraints, args, &[], true, true);
}

/// A barrier that is passed when `count` threads have arrived and the bytes they announced have come.
pub fn barrier_init(f: &mut Fn, at: Val, count: u32) {
    effect(f, &format!("mbarrier.init.shared::cta.b64 [$0], {count};"), "r", &[at]);
}

/// Makes initialised barriers visible to the copy engine.
pub fn barrier_init_fence(f: &mut Fn) {
    effect(f, "fence.mbarrier_init.release.cluster;", "", &[]);
}

/// Waits until the phase of that parity is over. Labels are local to the braces.
pub fn barrier_wait(f: &mut Fn, at: Val, parity: Val) {
    let text = "{\n.reg .pred p;\nW:\nmbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1;\n@p bra D;\nbra W;\nD:\n}";
    effect(f, text, "r,r", &[at, parity]);
}

/// Arrives and announces bytes that copies will bring.
pub fn barrier_expect(f: &mut Fn, at: Val, bytes: u32) {
    effect(f, &format!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {bytes};"), "r", &[at]);
}

/// Arrives, and announces bytes that others will write where `c` holds.
pub fn barrier_arrive_expecting(f: &mut Fn, at: Val, c: Val, bytes: u32) {
    let c = f.cast("zext", c, Ty::I32);
    let text = format!(
        "{{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {bytes};\n@!p mbarrier.arrive.shared::cta.b64 _, [$0];\n}}"
    );
    effect(f, &text, "r,r", &[at, c]);
}

/// The same of any number of bytes, that others may have written before.
pub fn barrier_expect_some(f: &mut Fn, at: Val, bytes: Val) {
    effect(f, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;", "r,r", &[at, bytes]);
}

/// Arrives at a barrier of any block of the cluster, and announces bytes that this one sends; nothing else that it wrote is visible by that.
pub fn barrier_arrive_sending(f: &mut Fn, at: Val, bytes: Val) {
    let text = "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [$0], $1;";
    effect(f, text, "r,r", &[at, bytes]);
}

/// Writes words, one, two or four, to shared memory of any block of the cluster, whose barrier, of the same block, gets their bytes. No fence is needed on either side.
pub fn send_words(f: &mut Fn, at: Val, barrier: Val, words: &[Val]) {
    let list: Vec<String> = (0..words.len()).map(|i| format!("${}", i + 2)).collect();
    let (vector, list) = match words.len() {
        1 => (String::new(), list.concat()),
        n => (format!(".v{n}"), format!("{{{}}}", list.join(", "))),
    };
    let text = format!("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{vector}.b32 [$0], {list}, [$1];");
    let args: Vec<Val> = [at, barrier].into_iter().chain(words.iter().copied()).collect();
    effect(f, &text, &format!("r,r{}", ",r".repeat(words.len())), &args);
}

/// Bytes from an address in this block's shared memory to the same place in that of block `rank` of the cluster; `at` is any.
pub fn to_block(f: &mut Fn, at: Val, rank: Val) -> Val {
    let there = address_in(f, at, rank);
    f.sub(there, at)
}

/// Copies bytes of this block's shared memory to another's; its barrier gets them.
pub fn copy_to_block(f: &mut Fn, to: Val, from: Val, bytes: u32, barrier: Val) {
    let text =
        format!("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [$0], [$1], {bytes}, [$2];");
    effect(f, &text, "r,r,r", &[to, from, barrier]);
}

/// Arrives where `c` (i32) is not zero.
pub fn barrier_arrive_if(f: &mut Fn, at: Val, c: Val) {
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [$0];\n}";
    effect(f, text, "r,r", &[at, c]);
}

/// Arrives at the same barrier of block `rank` of the cluster where `c` (i32) is not zero.
pub fn barrier_arrive_at_if(f: &mut Fn, at: Val, rank: Val, c: Val) {
    let text = "{\n.reg .pred p;\n.reg .b32 a;\nsetp.ne.b32 p, $2, 0;\n@p mapa.shared::cluster.u32 a, $0, $1;\n@p mbarrier.arrive.shared::cluster.b64 _, [a];\n}";
    effect(f, text, "r,r,r", &[at, rank, c]);
}

/// All threads of all blocks of the cluster wait for one another, wherever they are in the code.
pub fn cluster_barrier(f: &mut Fn) {
    effect(f, "barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;", "", &[]);
}

/// Whether this is the one lane of its warp that is chosen; the whole warp must run it.
pub fn elect(f: &mut Fn) -> Val {
    let text = "{\n.reg .pred p;\n.reg .b32 l;\nelect.sync l|p, 0xffffffff;\nselp.b32 $0, 1, 0, p;\n}";
    let one = f.asm(text, "=r", &[], &[Ty::I32], false, true)[0];
    f.cmp("ne", one, i32(0))
}

/// The warp's number as the hardware's uniform registers can hold it.
pub fn uniform(f: &mut Fn, v: Val) -> Val {
    f.asm("shfl.sync.idx.b32 $0, $1, 0, 0x1f, 0xffffffff;", "=r,r", &[v], &[Ty::I32], false, true)[0]
}

/// What a lane of the warp has.
pub fn from_lane(f: &mut Fn, v: Val, lane: Val) -> Val {
    let class = if v.ty() == Ty::F32 { "f" } else { "r" };
    let text = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;";
    f.asm(text, &format!("={class},{class},r"), &[v, lane], &[v.ty()], false, true)[0]
}

/// The lane's own address, as it has exchanged it with itself.
pub fn own_address(f: &mut Fn, at: Val, lane: Val) -> Val {
    let half = |x: char| format!("shfl.sync.idx.b32 {x}, {x}, $2, 0x1f, 0xffffffff;\n");
    let text =
        format!("{{\n.reg .b32 l, h;\nmov.b64 {{l, h}}, $1;\n{}{}mov.b64 $0, {{l, h}};\n}}", half('l'), half('h'));
    f.asm(&text, "=l,l,r", &[at, lane], &[at.ty()], false, true)[0]
}

/// Gives registers back (`dec`) or takes them (`inc`); first instruction of a warpgroup's code.
pub fn set_registers(f: &mut Fn, kind: &str, count: u32) {
    effect(f, &format!("setmaxnreg.{kind}.sync.aligned.u32 {count};"), "", &[]);
}

/// Has the copy engine fetch a map, of which it wants copies soon.
pub fn fetch_map(f: &mut Fn, map: Val) {
    effect(f, "prefetch.tensormap [$0];", "l", &[map]);
}

/// Copies a box of a tensor to shared memory; the barrier gets its bytes. `coordinates` innermost first. With `blocks`, to the same place
/// and barrier of so many blocks of the cluster.
pub fn copy_box(f: &mut Fn, to: Val, map: Val, barrier: Val, coordinates: &[Val], blocks: Option<u32>) {
    let list: Vec<String> = (0..coordinates.len()).map(|i| format!("${}", i + 3)).collect();
    let text = format!(
        "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes{} [$0], [$1, {{{}}}], [$2]{};",
        coordinates.len(),
        if blocks.is_some() { ".multicast::cluster" } else { "" },
        list.join(", "),
        if blocks.is_some() { format!(", ${}", coordinates.len() + 3) } else { String::new() },
    );
    let mut constraints = format!("r,l,r{}", ",r".repeat(coordinates.len()));
    let mut args: Vec<Val> = [to, map, barrier].into_iter().chain(coordinates.iter().copied()).collect();
    if let Some(blocks) = blocks {
        constraints.push_str(",h");
        args.push(Val::Int((1 << blocks) - 1, Ty::I16));
    }
    effect(f, &text, &constraints, &args);
}

/// Copies a box of shared memory to a tensor, in a group of this thread's. `coordinates` innermost first.
pub fn store_box(f: &mut Fn, map: Val, from: Val, coordinates: &[Val]) {
    let list: Vec<String> = (0..coordinates.len()).map(|i| format!("${}", i + 2)).collect();
    let (rank, list) = (coordinates.len(), list.join(", "));
    let text = format!("cp.async.bulk.tensor.{rank}d.global.shared::cta.bulk_group [$0, {{{list}}}], [$1];");
    let args: Vec<Val> = [map, from].into_iter().chain(coordinates.iter().copied()).collect();
    effect(f, &text, &format!("l,r{}", ",r".repeat(rank)), &args);
}

/// Ends a group of [`store_box`].
pub fn stores_commit(f: &mut Fn) {
    effect(f, "cp.async.bulk.commit_group;", "", &[]);
}

/// Waits until what this thread's stores read, but those of the last `but` groups, may be overwritten.
pub fn stores_wait(f: &mut Fn, but: u32) {
    effect(f, &format!("cp.async.bulk.wait_group.read {but};"), "", &[]);
}

/// Orders this thread's accesses to shared memory before those of the copy engine and of [`wgmma`].
pub fn fence_async(f: &mut Fn) {
    effect(f, "fence.proxy.async.shared::cta;", "", &[]);
}

/// Unit of addresses in descriptors.
pub const DESCRIPTOR_UNIT: u32 = 16;

/// Where an operand starts, as the low half of its descriptor has it, to which units of addresses can be added: `leading` bytes from one
/// 128-byte panel to the next where the operand's rows run across `k`.
pub fn descriptor_start(f: &mut Fn, at: Val, leading: u32) -> Val {
    let low = f.bin("lshr", at, i32(4));
    let low = f.bin("and", low, i32(0x3fff));
    f.bin("or", low, i32(i64::from(leading / DESCRIPTOR_UNIT) << 16))
}

/// Descriptor of an operand of [`wgmma`] with that low half, in the 128-byte swizzle: `stride` bytes from eight rows to the next eight.
pub fn descriptor(f: &mut Fn, low: Val, stride: u32) -> Val {
    let low = f.cast("zext", low, Ty::I64);
    f.bin("or", low, i64((1 << 62) | (i64::from(stride / DESCRIPTOR_UNIT) << 32)))
}

/// Before the first [`wgmma`] of a group: registers are as written.
pub fn wgmma_fence(f: &mut Fn) {
    effect(f, "wgmma.fence.sync.aligned;", "", &[]);
}

/// Ends a group.
pub fn wgmma_commit(f: &mut Fn) {
    effect(f, "wgmma.commit_group.sync.aligned;", "", &[]);
}

/// Waits until at most `n` groups are in flight.
pub fn wgmma_wait(f: &mut Fn, n: usize) {
    effect(f, &format!("wgmma.wait_group.sync.aligned {n};"), "", &[]);
}

/// What a product is added to.
#[derive(Clone, Copy)]
pub enum Onto<'a> {
    /// These values.
    Sum(&'a [Val]),
    /// Nothing.
    Zero,
    /// Nothing, but it is made in the registers of these values, which are used no more. The assembler takes a product that is added to nothing out
    /// of the order of what uses those registers, if it is free to choose others, and then runs out of them.
    Over(&'a [Val]),
}

/// The left operand of a product.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// A descriptor.
    Shared(Val),
    /// Four words of registers: 16-bit elements as a product's results lie, 16 of `k`.
    Registers(&'a [Val]),
}

/// One matrix product of a warpgroup, in flight: `d = a · bᵀ`, plus what it is added to. 64 x `n` results of 32 bytes of `k`.
/// `across`: rows of `a`, of `b` run across `k` (16-bit types only; not of registers).
pub fn wgmma(f: &mut Fn, dtype: DType, n: u32, onto: Onto<'_>, (a, b): (Left<'_>, Val), across: [bool; 2]) -> Vec<Val> {
    let count = n as usize / 2;
    let (left, classes) = match a {
        Left::Shared(a) => (vec![a], "l".to_owned()),
        Left::Registers(words) => (words.to_vec(), vec!["r"; words.len()].join(",")),
    };
    let turned = match a {
        Left::Shared(_) => format!(", {}, {}", u32::from(across[0]), u32::from(across[1])),
        Left::Registers(_) => format!(", {}", u32::from(across[1])),
    };
    let (k, ty, tail) = match dtype {
        DType::E4m3 => (32, "e4m3", String::new()),
        DType::F16 => (16, "f16", turned),
        _ => (16, "bf16", turned),
    };
    let d: Vec<String> = (0..count).map(|i| format!("${i}")).collect();
    let first = 2 * count;
    let behind = first + left.len();
    let (keep, values) = match onto {
        Onto::Sum(values) => (1, values.to_vec()),
        Onto::Zero => (0, vec![f32(0.0); count]),
        Onto::Over(values) => (0, values.to_vec()),
    };
    let from = match a {
        Left::Shared(_) => format!("${first}"),
        Left::Registers(_) => {
            let words: Vec<String> = (first..behind).map(|i| format!("${i}")).collect();
            format!("{{{}}}", words.join(", "))
        }
    };
    let text = format!(
        "{{\n.reg .pred p;\nsetp.ne.b32 p, {keep}, 0;\nwgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{ty}.{ty} {{{}}}, {from}, ${behind}, p, 1, 1{tail};\n}}",
        d.join(", ")
    );
    let tied: Vec<String> = (0..count).map(|i| i.to_string()).collect();
    let constraints = format!("{},{},{classes},l", vec!["=f"; count].join(","), tied.join(","));
    let args: Vec<Val> = values.into_iter().chain(left).chain([b]).collect();
    f.asm(&text, &constraints, &args, &vec![Ty::F32; count], true, true)
}

/// The same values, which nothing that made them may follow and no use may precede.
pub fn pin(f: &mut Fn, values: &[Val]) -> Vec<Val> {
    let tied: Vec<String> = (0..values.len()).map(|i| i.to_string()).collect();
    let constraints = format!("{},{}", vec!["=f"; values.len()].join(","), tied.join(","));
    f.asm("", &constraints, values, &vec![Ty::F32; values.len()], true, true)
}

/// The same word, of whose origin the assembler knows nothing.
pub fn pin_word(f: &mut Fn, word: Val) -> Val {
    f.asm("", "=r,0", &[word], &[Ty::I32], true, true)[0]
}

/// Values times the factors of these numbers, where some factor of the warp's is not 1.
pub fn multiply_unless_one(f: &mut Fn, values: &[Val], factors: &[Val], of: &[usize]) -> Vec<Val> {
    let n = values.len();
    let factor = |i: usize| format!("${}", 2 * n + i);
    let mut text = String::from("{\n.reg .pred p, q;\n");
    text += &format!("setp.neu.f32 p, {}, 0f3f800000;\n", factor(0));
    for i in 1..factors.len() {
        text += &format!("setp.neu.f32 q, {}, 0f3f800000;\nor.pred p, p, q;\n", factor(i));
    }
    text += "vote.sync.any.pred p, p, 0xffffffff;\n@!p bra DONE;\n";
    for (i, &number) in of.iter().enumerate() {
        text += &format!("mul.f32 ${i}, ${i}, {};\n", factor(number));
    }
    text += "DONE:\n}";
    let tied: Vec<String> = (0..n).map(|i| i.to_string()).collect();
    let constraints = format!("{},{}{}", vec!["=f"; n].join(","), tied.join(","), ",f".repeat(factors.len()));
    let args: Vec<Val> = values.iter().chain(factors).copied().collect();
    f.asm(&text, &constraints, &args, &vec![Ty::F32; n], false, true)
}

/// Writes four 8x8 matrices of 16-bit elements, which the warp has as products leave them, to rows whose addresses the lanes give.
pub fn store_matrix(f: &mut Fn, at: Val, words: &[Val], transposed: bool) {
    let (n, trans) = (words.len(), if transposed { ".trans" } else { "" });
    let list: Vec<String> = (1..=n).map(|i| format!("${i}")).collect();
    let text = format!("stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [$0], {{{}}};", list.join(", "));
    let args: Vec<Val> = [at].into_iter().chain(words.iter().copied()).collect();
    effect(f, &text, &format!("r{}", ",r".repeat(n)), &args);
}

/// The threads of a warp go on together. Where one of them has driven the copy engine, the assembler may leave it by itself in all code that
/// follows, and the warp would run that twice.
pub fn warp_waits(f: &mut Fn) {
    effect(f, "bar.warp.sync 0xffffffff;", "", &[]);
}

/// Stops for about as long.
pub fn sleep(f: &mut Fn, nanoseconds: u32) {
    effect(f, &format!("nanosleep.u32 {nanoseconds};"), "", &[]);
}

/// The threads of named barrier `id`, so many, wait for one another.
pub fn barrier_of(f: &mut Fn, id: Val, threads: u32) {
    effect(f, &format!("bar.sync $0, {threads};"), "r", &[id]);
}

/// All lanes of the warp wait for one another; shared memory written before is visible after.
pub fn warp_barrier(f: &mut Fn) {
    effect(f, "bar.warp.sync 0xffffffff;", "", &[]);
}

/// Four words of shared memory.
pub fn load_shared_words(f: &mut Fn, at: Val) -> Vec<Val> {
    f.asm("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,r", &[at], &[Ty::I32; 4], true, true)
}

/// Writes four words to shared memory.
pub fn store_shared_words(f: &mut Fn, at: Val, words: &[Val]) {
    let args: Vec<Val> = [at].into_iter().chain(words.iter().copied()).collect();
    effect(f, "st.shared.v4.b32 [$0], {$1, $2, $3, $4};", "r,r,r,r,r", &args);
}

/// An f32 of shared memory.
pub fn load_shared_f32(f: &mut Fn, at: Val) -> Val {
    f.asm("ld.shared.f32 $0, [$1];", "=f,r", &[at], &[Ty::F32], true, true)[0]
}

/// The same as [`barrier_of`]; whether a word is not zero in any of them.
pub fn group_barrier_any(f: &mut Fn, id: Val, threads: u32, word: Val) -> Val {
    let text = format!(
        "{{\n.reg .pred p, q;\nsetp.ne.b32 p, $2, 0;\nbar.red.or.pred q, $1, {threads}, p;\nselp.b32 $0, 1, 0, q;\n}}"
    );
    let any = f.asm(&text, "=r,r,r", &[id, word], &[Ty::I32], true, true)[0];
    f.cmp("ne", any, i32(0))
}

/// A word of shared memory.
pub fn load_shared_word(f: &mut Fn, at: Val) -> Val {
    f.asm("ld.shared.b32 $0, [$1];", "=r,r", &[at], &[Ty::I32], true, true)[0]
}

/// Writes a word to shared memory.
pub fn store_shared_word(f: &mut Fn, at: Val, v: Val) {
    effect(f, "st.shared.b32 [$0], $1;", "r,r", &[at, v]);
}

/// `sum` and how many of the values are at least `least`. One instruction compares and one adds: predicates that the assembler keeps for later take it two more each.
pub fn count_least(f: &mut Fn, sum: Val, values: &[Val], least: Val) -> Val {
    let mut text = String::from("{\n.reg .pred p;\nmov.b32 $0, $1;\n");
    for i in 3..3 + values.len() {
        text += &format!("setp.ge.f32 p, ${i}, $2;\n@p add.s32 $0, $0, 1;\n");
    }
    let args: Vec<Val> = [sum, least].into_iter().chain(values.iter().copied()).collect();
    let constraints = format!("=&r,r,f{}", ",f".repeat(values.len()));
    f.asm(&(text + "}"), &constraints, &args, &[Ty::I32], false, true)[0]
}

/// Writes those of a vector's values that are at least `least`, each with its column, one after another to shared memory, of any block of the cluster if `cluster`:
/// the address behind them. The first value is `column`'s.
pub fn list_least(f: &mut Fn, at: Val, values: &[Val], least: Val, column: Val, cluster: bool) -> Val {
    let place = if cluster { "shared::cluster" } else { "shared" };
    let mut text = String::from("{\n.reg .pred p;\n.reg .b32 c;\nmov.b32 $0, $1;\n");
    for i in 0..values.len() {
        let v = 4 + i;
        text += &format!(
            "add.s32 c, $3, {i};\nsetp.ge.f32 p, ${v}, $2;\n@p st.{place}.v2.b32 [$0], {{${v}, c}};\n@p add.s32 $0, $0, 8;\n"
        );
    }
    let args: Vec<Val> = [at, least, column].into_iter().chain(values.iter().copied()).collect();
    let constraints = format!("=&r,r,f,r{}", ",f".repeat(values.len()));
    f.asm(&(text + "}"), &constraints, &args, &[Ty::I32], true, true)[0]
}

/// Writes a word to shared memory where `c` holds.
pub fn store_shared_word_if(f: &mut Fn, c: Val, at: Val, v: Val) {
    let c = f.cast("zext", c, Ty::I32);
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $0, 0;\n@p st.shared.b32 [$1], $2;\n}";
    effect(f, text, "r,r,r", &[c, at, v]);
}

/// The address that an address of shared memory has in block `rank` of the cluster, as that memory is seen from all its blocks.
pub fn address_in(f: &mut Fn, at: Val, rank: Val) -> Val {
    f.asm("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", &[at, rank], &[Ty::I32], false, false)[0]
}

/// Writes a word at such an address.
pub fn store_cluster_word(f: &mut Fn, at: Val, v: Val) {
    effect(f, "st.shared::cluster.b32 [$0], $1;", "r,r", &[at, v]);
}

/// An f32 of shared memory, of any block of the cluster.
pub fn load_cluster_f32(f: &mut Fn, at: Val) -> Val {
    f.asm("ld.shared::cluster.f32 $0, [$1];", "=f,r", &[at], &[Ty::F32], true, true)[0]
}

/// Four f32 of shared memory, of any block of the cluster.
pub fn load_cluster_floats(f: &mut Fn, at: Val) -> Vec<Val> {
    f.asm("ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r", &[at], &[Ty::F32; 4], true, true)
}

/// Writes four f32 to shared memory.
pub fn store_shared_floats(f: &mut Fn, at: Val, v: &[Val]) {
    let args: Vec<Val> = [at].into_iter().chain(v.iter().copied()).collect();
    effect(f, "st.shared.v4.f32 [$0], {$1, $2, $3, $4};", "r,f,f,f,f", &args);
}

/// Writes an f32 to memory where `c` holds.
pub fn store_f32_if(f: &mut Fn, c: Val, at: Val, v: Val) {
    let c = f.cast("zext", c, Ty::I32);
    effect(f, "{\n.reg .pred p;\nsetp.ne.b32 p, $0, 0;\n@p st.global.f32 [$1], $2;\n}", "r,l,f", &[c, at, v]);
}

/// Four f32 of memory that other blocks have written: not what the first cache may still have.
pub fn load_others_floats(f: &mut Fn, at: Val) -> Vec<Val> {
    f.asm("ld.relaxed.gpu.global.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", &[at], &[Ty::F32; 4], true, true)
}

/// Two words of such memory.
pub fn load_others_pair(f: &mut Fn, at: Val) -> Vec<Val> {
    f.asm("ld.relaxed.gpu.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", &[at], &[Ty::I32; 2], true, true)
}

/// An f32 of such memory.
pub fn load_others_f32(f: &mut Fn, at: Val) -> Val {
    f.asm("ld.relaxed.gpu.global.f32 $0, [$1];", "=f,l", &[at], &[Ty::F32], true, true)[0]
}

/// Adds `step` to the counter of a team, and waits until others have turned its first bit over.
pub fn meet_through(f: &mut Fn, counter: Val, step: Val) {
    let text = "{\n.reg .pred p;\n.reg .b32 o, n;\natom.acq_rel.gpu.global.add.u32 o, [$0], $1;\nadd.s32 n, o, $1;\nW:\nxor.b32 n, n, o;\n\
                setp.lt.s32 p, n, 0;\n@p bra D;\nld.acquire.gpu.global.u32 n, [$0];\nbra W;\nD:\n}";
    effect(f, text, "l,r", &[counter, step]);
}

/// First half of a [`cluster_barrier`] that whole warps come to; shared memory written before is visible after the second.
pub fn cluster_arrive(f: &mut Fn) {
    effect(f, "barrier.cluster.arrive.release.aligned;", "", &[]);
}

/// The same of barriers that this thread has initialised, and nothing else.
pub fn cluster_arrive_relaxed(f: &mut Fn) {
    effect(f, "barrier.cluster.arrive.relaxed.aligned;", "", &[]);
}

/// Second half.
pub fn cluster_wait(f: &mut Fn) {
    effect(f, "barrier.cluster.wait.acquire.aligned;", "", &[]);
}

/// Adds one to a word of shared memory. (Where some lanes should not, the assembler would branch around it.)
pub fn shared_count(f: &mut Fn, at: Val) {
    effect(f, "red.shared.add.u32 [$0], 1;", "r", &[at]);
}

/// Makes a word of shared memory, of any block of the cluster if `cluster`, at least `v` where `c` holds.
pub fn shared_most_if(f: &mut Fn, c: Val, at: Val, v: Val, cluster: bool) {
    let c = f.cast("zext", c, Ty::I32);
    let place = if cluster { "shared::cluster" } else { "shared" };
    let text = format!("{{\n.reg .pred p;\nsetp.ne.b32 p, $0, 0;\n@p red.{place}.max.u32 [$1], $2;\n}}");
    effect(f, &text, "r,r,r", &[c, at, v]);
}

/// `sum + v` where `c` holds, and `sum` elsewhere, by one instruction.
pub fn add_if(f: &mut Fn, c: Val, sum: Val, v: Val) -> Val {
    let c = f.cast("zext", c, Ty::I32);
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $3, 0;\nmov.b32 $0, $1;\n@p add.s32 $0, $0, $2;\n}";
    f.asm(text, "=&r,r,r,r", &[sum, v, c], &[Ty::I32], false, false)[0]
}

/// The larger of two floats; of a NaN and another, the other.
pub fn larger(f: &mut Fn, a: Val, b: Val) -> Val {
    f.asm("max.f32 $0, $1, $2;", "=f,f,f", &[a, b], &[Ty::F32], false, false)[0]
}

/// Sets bits of a word of shared memory.
pub fn shared_or(f: &mut Fn, at: Val, bits: Val) {
    effect(f, "red.shared.or.b32 [$0], $1;", "r,r", &[at, bits]);
}

/// Sets bits of a word of shared memory where `c` holds.
pub fn shared_or_if(f: &mut Fn, c: Val, at: Val, bits: Val) {
    let c = f.cast("zext", c, Ty::I32);
    effect(f, "{\n.reg .pred p;\nsetp.ne.b32 p, $0, 0;\n@p red.shared.or.b32 [$1], $2;\n}", "r,r,r", &[c, at, bits]);
}

/// Two words of memory that this block writes, or zeros where `c` does not hold.
pub fn load_pair_if(f: &mut Fn, c: Val, at: Val) -> [Val; 2] {
    let c = f.cast("zext", c, Ty::I32);
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $3, 0;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\n@p ld.global.v2.b32 {$0, $1}, [$2];\n}";
    let v = f.asm(text, "=&r,=&r,l,r", &[at, c], &[Ty::I32; 2], true, true);
    [v[0], v[1]]
}

/// Writes an f32 to shared memory where `c` holds.
pub fn store_shared_f32_if(f: &mut Fn, c: Val, at: Val, v: Val) {
    let c = f.cast("zext", c, Ty::I32);
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $0, 0;\n@p st.shared.f32 [$1], $2;\n}";
    effect(f, text, "r,r,f", &[c, at, v]);
}

/// Two f32 as e4m3 in 16 bits; the first is the low half.
pub fn pack_e4m3(f: &mut Fn, low: Val, high: Val) -> Val {
    let text = "cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;";
    f.asm(text, "=h,f,f", &[high, low], &[Ty::I16], false, false)[0]
}

/// An f32 of memory that no one writes meanwhile, or zero where `c` does not hold.
pub fn load_f32_if(f: &mut Fn, c: Val, at: Val) -> Val {
    let c = f.cast("zext", c, Ty::I32);
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0;\n@p ld.global.nc.b32 $0, [$1];\n}";
    f.asm(text, "=&f,l,r", &[at, c], &[Ty::F32], false, true)[0]
}

/// The same of memory that a wait may order: the assembler leaves it between the waits where it is written.
pub fn load_f32_here_if(f: &mut Fn, c: Val, at: Val) -> Val {
    let c = f.cast("zext", c, Ty::I32);
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0;\n@p ld.global.b32 $0, [$1];\n}";
    f.asm(text, "=&f,l,r", &[at, c], &[Ty::F32], true, true)[0]
}

/// Four neighbouring f32 of memory that no one writes meanwhile, at a multiple of 16 bytes, or −inf where `c` does not hold. `again`: they are read here even if
/// they have been read before, and have no registers in between.
pub fn load_four_if(f: &mut Fn, c: Val, at: Val, again: bool) -> Vec<Val> {
    let c = f.cast("zext", c, Ty::I32);
    let none: String = (0..4).map(|i| format!("mov.b32 ${i}, 0xff800000;\n")).collect();
    let text =
        format!("{{\n.reg .pred p;\nsetp.ne.b32 p, $5, 0;\n{none}@p ld.global.nc.v4.b32 {{$0, $1, $2, $3}}, [$4];\n}}");
    f.asm(&text, "=&f,=&f,=&f,=&f,l,r", &[at, c], &[Ty::F32; 4], again, true)
}

/// The same without a question.
pub fn load_four(f: &mut Fn, at: Val, again: bool) -> Vec<Val> {
    f.asm("ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", &[at], &[Ty::F32; 4], again, true)
}

/// The value of that lane of the running lane's quad.
pub fn from_quad(f: &mut Fn, v: Val, lane: Val) -> Val {
    f.asm("shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff;", "=f,f,r", &[v, lane], &[Ty::F32], false, true)[0]
}

/// Two words of memory that no one writes meanwhile, or zeros where `c` does not hold. Stays where it is written: in front of waits.
pub fn load_words_if(f: &mut Fn, c: Val, at: Val) -> Vec<Val> {
    let c = f.cast("zext", c, Ty::I32);
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $3, 0;\nmov.b32 $0, 0;\nmov.b32 $1, 0;\n@p ld.global.nc.L2::256B.v2.b32 {$0, $1}, [$2];\n}";
    f.asm(text, "=&r,=&r,l,r", &[at, c], &[Ty::I32; 2], true, true)
}

/// The two e4m3 of the low or high half of a word as f32.
pub fn widen_e4m3(f: &mut Fn, word: Val, high: bool) -> [Val; 2] {
    let half = if high { "h" } else { "l" };
    let text = format!(
        "{{\n.reg .b16 l, h, x, y;\n.reg .b32 w;\nmov.b32 {{l, h}}, $2;\ncvt.rn.f16x2.e4m3x2 w, {half};\nmov.b32 {{x, y}}, w;\ncvt.f32.f16 $0, x;\ncvt.f32.f16 $1, y;\n}}"
    );
    let both = f.asm(&text, "=f,=f,r", &[word], &[Ty::F32; 2], false, false);
    [both[0], both[1]]
}

/// An i32 of memory that no one writes meanwhile, or zero where `c` does not hold.
pub fn load_i32_if(f: &mut Fn, c: Val, at: Val) -> Val {
    let c = f.cast("zext", c, Ty::I32);
    let text = "{\n.reg .pred p;\nsetp.ne.b32 p, $2, 0;\nmov.b32 $0, 0;\n@p ld.global.nc.b32 $0, [$1];\n}";
    f.asm(text, "=&r,l,r", &[at, c], &[Ty::I32], false, true)[0]
}

/// Copies 16 bytes from global to shared memory without waiting, where `wanted` holds; zeros where `inside` does not. L2 may bring the `line` bytes
/// around them, 128 or 256.
pub fn copy_piece(f: &mut Fn, to: Val, from: Val, (inside, wanted): (Val, Val), line: u32) {
    let size = f.select(inside, i32(16), i32(0));
    let wanted = f.cast("zext", wanted, Ty::I32);
    let text = format!(
        "{{\n.reg .pred p;\nsetp.ne.b32 p, $3, 0;\n@p cp.async.cg.shared.global.L2::{line}B [$0], [$1], 16, $2;\n}}"
    );
    effect(f, &text, "r,l,r,r", &[to, from, size, wanted]);
}

/// Arrives once this thread's copies up to here are complete.
pub fn copies_arrive(f: &mut Fn, at: Val) {
    effect(f, "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", "r", &[at]);
}

/// Arrives.
pub fn barrier_arrive(f: &mut Fn, at: Val) {
    effect(f, "mbarrier.arrive.shared::cta.b64 _, [$0];", "r", &[at]);
}
