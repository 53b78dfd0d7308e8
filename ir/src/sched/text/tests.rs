use super::*;
use crate::tile::text::tests::random_program;
use crate::tile::{self, Program, Region};
use expect_test::{Expect, expect};
use proptest::prelude::*;

/// The example of the documentation.
const EXAMPLE: &str = "scheduled scale grid(T/1) threads 64
    read %x: view<[T, 64] bf16>
    write %y: view<[T, 64] f32>
    buffer b0 = x: bf16 1x64, offset 0, bytes 256, pitch 128, swizzle 0, copies 2
    buffer b1 = sums: f32 1x1, offset 256, bytes 4, pitch 4, swizzle 0, copies 1
    channel c0 = rows: stages 2, slots [b0]
{
    %2 = block_id 0 : i32 @uniform
    %5 = for %3 = 0 to 4 step 1 iter(%4 = %2: i32 @uniform) {
        yield %4
    }
    barrier
}
role producer warps 0..1 registers 24 elected {
    acquire c0
    copy c0.0, %x[%2, 0] : tile<1x64xbf16>
    commit c0
}
role consumer warps 1..2 {
    wait c0
    %6 = take c0.0 : tile<1x64xbf16> @slot(c0, 0)
    %7 = map(%6) { a -> t0 = cast<f32> a; t0 } : tile<1x64xf32> @lazy
    %8 = reduce sum %7 axis 1 : tile<1x1xf32> @shared(b1) scratch b1
    %9 = full 0.0 : tile<16x16xf32> @frag(mma16x8, 2x1)
    %10 = full true : bool @uniform
    %11 = if %10 : tile<1x64xf32> @lazy {
        yield %7
    } else {
        yield %7
    }
    store %y[%2, 0], %7
    release c0 lag 1
}
";

#[test]
fn prints_what_it_parses() {
    let kernels = parse(EXAMPLE).unwrap();
    assert_eq!(kernels.len(), 1);
    assert_eq!(kernels[0].to_string(), EXAMPLE);
    assert_eq!(canonical(&kernels[0]), kernels[0]);
    let twice = format!("{EXAMPLE}\n{EXAMPLE}");
    assert_eq!(parse(&twice).unwrap(), [kernels[0].clone(), kernels[0].clone()]);
}

fn check_error(from: &str, to: &str, expected: Expect) {
    assert!(EXAMPLE.contains(from), "{from}");
    expected.assert_eq(&parse(&EXAMPLE.replacen(from, to, 1)).unwrap_err().to_string());
}

#[test]
fn errors_have_a_place_and_a_reason() {
    check_error("@lazy", "", expect!["23:5: expected `@`"]);
    check_error("@lazy", "@nowhere", expect!["23:5: expected `(`"]);
    check_error("mma16x8", "mma8", expect!["24:47: no atom mma8"]);
    check_error("wait c0", "wait b0", expect!["20:12: expected a channel, such as c0, not b0"]);
    check_error("bytes 256", "bytes 128", expect!["4:82: x rows, pitch and copies make 256 bytes, not 128"]);
    check_error("buffer b1", "buffer b2", expect!["5:14: b2 should be b1: the table is in order"]);
    check_error("tile<1x64xbf16>\n", "tile<1x64xf32>\n", expect!["16:42: a copy of f32 from view<[T, 64] bf16>"]);
    check_error("elected", "chosen", expect!["14:39: expected `{`"]);
    check_error("lag 1", "lag", expect!["33:1: expected an integer in range"]);
}

/// A tile program as a kernel whose places, roles and synchronisation bytes choose, without sense.
fn schedule(program: &Program, bytes: &[u8]) -> Scheduled {
    let mut next = bytes.iter().copied().chain(std::iter::repeat(0));
    let buffer = |i: u32| Buffer {
        name: format!("b{i}"),
        dtype: DType::F32,
        shape: [i, 16],
        pitch: 64,
        swizzle: i % 2 * 64,
        copies: 1 + i,
        offset: i * 1024,
        outside: i % 3 == 1,
    };
    let mut place = |ty: &Type| match (ty, next.next().unwrap_or(0)) {
        (Type::View(_), _) => Place::View,
        (_, n @ 0..50) => Place::Shared(BufferId(n.into())),
        (_, n @ 50..100) => Place::Slot(ChannelId(n.into()), 1),
        (_, n @ 100..200) => {
            Place::Fragment(Fragment { atom: ATOMS[n as usize % ATOMS.len()].0, warps: [n.into(), u32::from(n) % 3] })
        }
        (_, 200..228) => Place::Lazy,
        (_, 228..236) => Place::Held,
        _ => Place::Uniform,
    };
    let mut kernel = Scheduled {
        name: program.name.clone(),
        grid: program.grid.clone(),
        persistent: bytes.first().filter(|&&n| n > 100).map(|&n| n.into()),
        cluster: bytes.first().filter(|&&n| n > 140).map(|&n| Cluster { axis: u32::from(n) % 2, blocks: n.into() }),
        team: bytes.first().map_or(1, |&n| u32::from(n) % 3 + 1),
        folded: bytes.len() % 5 > 2,
        alternate: bytes.len().is_multiple_of(2),
        dies: bytes.len() as u32 % 3 + 1,
        params: program.params.clone(),
        types: program.types.clone(),
        places: program.types.iter().map(&mut place).collect(),
        threads: bytes.len() as u32,
        buffers: (0..bytes.len() as u32 % 4).map(buffer).collect(),
        channels: vec![Channel {
            name: "ring".into(),
            stages: 3,
            turns: bytes.len() as u32 % 2 + 1,
            slots: vec![BufferId(0), BufferId(1)],
        }],
        common: Block::default(),
        roles: Vec::new(),
    };
    let body = block(&program.body, &mut kernel, &mut bytes.iter().copied());
    match bytes.first() {
        Some(&n) if n > 128 => {
            let role = |name: &str, body| Role {
                name: name.into(),
                warps: [0, n.into()],
                registers: (n % 2 == 0).then_some(40),
                elected: n % 3 == 0,
                body,
            };
            kernel.roles = vec![role("first", body), role("second", Block::default())];
        }
        _ => kernel.common = body,
    }
    kernel
}

fn block(region: &Region, kernel: &mut Scheduled, bytes: &mut dyn Iterator<Item = u8>) -> Block {
    let mut out = Block { args: region.args.clone(), insts: Vec::new(), yields: region.yields.clone() };
    for inst in &region.insts {
        let plain = |op| Inst { results: Vec::new(), op, scratch: None };
        let channel = ChannelId(bytes.next().unwrap_or(0).into());
        out.insts.extend(match bytes.next() {
            Some(0..12) => Some(plain(Op::Barrier)),
            Some(12..14) => Some(plain(Op::Meet)),
            Some(n @ 14..16) => {
                let part = |p: &tile::Param| Op::Part { lo: p.value, hi: p.value, end: n > 14 };
                kernel.params.first().map(|p| plain(part(p)))
            }
            Some(n @ 16..20) => {
                let put = |p: &tile::Param| Op::Put { buffer: BufferId(n.into()), value: p.value };
                kernel.params.first().map(|p| plain(put(p)))
            }
            Some(slot @ 20..40) => {
                let fill = |p: &tile::Param| Op::Fill { channel, slot: slot.into(), value: p.value, shared: slot > 30 };
                kernel.params.first().map(|p| plain(fill(p)))
            }
            Some(40..80) => Some(plain(Op::Acquire(channel))),
            Some(80..120) => Some(plain(Op::Commit(channel))),
            Some(120..160) => Some(plain(Op::Wait(channel))),
            Some(lag @ 160..200) => Some(plain(Op::Release { channel, lag: lag.into() })),
            Some(slot @ 200..) => kernel.params.first().map(|p| {
                let at = [1, -1].map(tile::Index::Const).to_vec();
                plain(Op::Copy {
                    channel,
                    slot: slot.into(),
                    view: p.value,
                    rows: (slot > 230).then_some(p.value),
                    index: at,
                    shape: vec![8, 4],
                    shared: slot > 220,
                })
            }),
            None => None,
        });
        let op = match &inst.op {
            tile::Op::For { lo, hi, step, init, body } => {
                // As the text has it: counters are uniform, results lie where carried values do.
                let body = block(body, kernel, bytes);
                kernel.places[body.args[0].0 as usize] = Place::Uniform;
                for (arg, result) in body.args[1..].iter().zip(&inst.results) {
                    kernel.places[result.0 as usize] = kernel.places[arg.0 as usize].clone();
                }
                Op::For { lo: *lo, hi: *hi, step: *step, init: init.clone(), body }
            }
            tile::Op::If { cond, then, otherwise } => {
                Op::If { cond: *cond, then: block(then, kernel, bytes), otherwise: block(otherwise, kernel, bytes) }
            }
            op => Op::Tile(op.clone()),
        };
        let scratch = bytes.next().filter(|&n| n > 200).map(|n| BufferId(n.into()));
        out.insts.push(Inst { results: inst.results.clone(), op, scratch });
    }
    out
}

fn random_kernel() -> impl Strategy<Value = Scheduled> {
    (random_program(), proptest::collection::vec(any::<u8>(), 0..200))
        .prop_map(|(program, bytes)| schedule(&program, &bytes))
}

proptest! {
    #[test]
    fn printing_and_parsing_are_inverse(kernel in random_kernel()) {
        let text = kernel.to_string();
        prop_assert_eq!(parse(&text), Ok(vec![canonical(&kernel)]), "{}", text);
        prop_assert_eq!(canonical(&canonical(&kernel)), canonical(&kernel));
    }

    /// Whatever the text, nothing panics, and what parses prints.
    #[test]
    fn damaged_text_is_survived(at in any::<u16>(), to in any::<u16>(), len in 0..9usize) {
        let mut text: Vec<char> = EXAMPLE.chars().collect();
        let (at, to) = (usize::from(at) % text.len(), usize::from(to) % text.len());
        let piece: Vec<char> = text[to..(to + len).min(text.len())].to_vec();
        text.splice(at..(at + len / 2).min(text.len()), piece);
        for kernel in parse(&text.into_iter().collect::<String>()).unwrap_or_default() {
            let _ = kernel.to_string();
        }
    }
}
