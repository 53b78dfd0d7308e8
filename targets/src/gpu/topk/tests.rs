//! The emitters' text on the emulator against a plain sort.

use super::super::mlir::Fn;
use super::*;
use crate::nvidia::arch::ARCHS;
use crate::nvidia::lower::emulate::Machine;

/// Where a test kernel's buffers lie in shared memory.
struct Layout {
    values: u32,
    numbers: u32,
    state: u32,
    scratch: u32,
    bytes: u32,
}

impl Layout {
    fn new(s: &State, n: u32, threads: u32) -> Layout {
        let values = (s.rows * n * 4).next_multiple_of(16);
        let numbers = values + (s.rows * s.k * 4).next_multiple_of(16);
        let state = numbers + (s.rows * s.k * 4).next_multiple_of(16);
        let scratch = state + s.bytes();
        Layout { values, numbers, state, scratch, bytes: scratch + s.scratch_bytes(threads) }
    }
}

/// Copies columns from `base` of the first argument, f32 `[rows, total]`, to f32 `[rows, n]` at byte 0; −inf beyond the end.
fn fetch(t: &mut Threads, [rows, total, n]: [u32; 3], base: Val) {
    each(t, rows * n, |t, i| {
        let (row, j) = (t.f.div(i, n), t.f.rem(i, n));
        let column = t.f.add(base, j);
        let inside = t.f.cmp("slt", column, i32(total.into()));
        let value = t.when_value(inside, f32(f32::NEG_INFINITY), |t| {
            let start = t.f.mul(row, i32(total.into()));
            let element = t.f.add(start, column);
            let byte = t.f.mul(element, i32(4));
            let at = t.f.offset(Val::Arg(0, Ty::Global), byte);
            t.f.load(at, Ty::F32, 1)[0]
        });
        let at = word(t, i32(0), i);
        t.store_shared(at, &[value]);
    });
    t.barrier();
}

/// Copies the results to the second and third argument.
fn give(t: &mut Threads, n: u32, l: &Layout) {
    each(t, n, |t, i| {
        for (from, to) in [(l.values, 1), (l.numbers, 2)] {
            let at = word(t, i32(from.into()), i);
            let word = load(t, at, Ty::I32);
            let byte = t.f.mul(i, i32(4));
            let to = t.f.offset(Val::Arg(to, Ty::Global), byte);
            t.f.store(to, &[word]);
        }
    });
    t.f.raw("llvm.return");
}

/// A kernel that pushes all columns, `n` at a time.
fn stream(s: &State, total: u32, n: u32, threads: u32) -> (String, u32) {
    let l = Layout::new(s, n, threads);
    let mut t = Threads::new(Fn::default(), &ARCHS[0], threads);
    init(&mut t, s, l.state);
    t.for_loop((i32(0), i32(total.into()), i32(n.into())), &[], |t, base, _| {
        fetch(t, [s.rows, total, n], base);
        push(t, s, l.state, l.scratch, 0, n, base);
        Vec::new()
    });
    take(&mut t, s, l.state, l.scratch, l.values, l.numbers);
    give(&mut t, s.rows * s.k, &l);
    (t.f.text().to_owned(), l.bytes)
}

/// Values' bits and numbers, `[rows, k]`.
type Selection = (Vec<u32>, Vec<i32>);

fn expected(x: &[f32], rows: usize, k: usize) -> Selection {
    let (mut values, mut numbers) = (Vec::new(), Vec::new());
    for (r, row) in x.chunks(x.len() / rows).enumerate() {
        let mut best: Vec<usize> = (0..row.len()).filter(|&i| row[i] > f32::NEG_INFINITY).collect();
        best.sort_by(|&a, &b| row[b].partial_cmp(&row[a]).unwrap().then(a.cmp(&b)));
        best.truncate(k);
        best.sort();
        values.extend(best.iter().map(|&i| row[i].to_bits()));
        numbers.extend(best.iter().map(|&i| i as i32));
        values.resize((r + 1) * k, f32::NEG_INFINITY.to_bits());
        numbers.resize((r + 1) * k, -1);
    }
    (values, numbers)
}

fn run((text, shared): &(String, u32), x: &[f32], n: usize, threads: u32, seed: u64) -> (Selection, Machine) {
    let mut m = Machine { shared: vec![0xcb; *shared as usize], seed, ..Machine::default() };
    m.global = x.iter().flat_map(|v| v.to_le_bytes()).collect();
    let input = m.global.len();
    m.global.resize(input + n * 8, 0);
    m.args = vec![0, input as u64, (input + n * 4) as u64];
    m.run(text, threads).unwrap_or_else(|e| panic!("{e}"));
    let words: Vec<u32> = m.global[input..].chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    let numbers = words[n..].iter().map(|&w| w as i32).collect();
    ((words[..n].to_vec(), numbers), m)
}

/// Rows of `n` values that are hard in different ways.
fn inputs(n: usize) -> Vec<(&'static str, Vec<f32>)> {
    let mut state = 7u32;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    let mut make = |name, f: &mut dyn FnMut(usize, u32) -> f32| (name, (0..n).map(|i| f(i, random())).collect());
    vec![
        make("any bits", &mut |_, r| f32::from_bits(r)),
        make("all equal", &mut |_, _| 1.5),
        make("last bits", &mut |_, r| f32::from_bits(0x3f80_0000 | r & 7)),
        make("ascending", &mut |i, _| i as f32 - 100.0),
        make("descending", &mut |i, _| -(i as f32)),
        make("few values", &mut |_, r| (r % 5) as f32),
        make("zeros", &mut |_, r| if r & 1 == 0 { 0.0 } else { -0.0 }),
        make("around zero", &mut |_, r| [0.0, -0.0, 1e-45, -1e-45][r as usize % 4]),
        make("nothing", &mut |_, r| if r & 1 == 0 { f32::NAN } else { f32::NEG_INFINITY }),
        make("infinities", &mut |_, r| {
            [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN][r as usize % 5]
        }),
        make("some", &mut |i, r| if i % 37 == 0 { (r % 100) as f32 } else { f32::NAN }),
        make("scores", &mut |_, r| (r % 65536) as f32 / 65536.0 - 0.5),
    ]
}

fn check_stream(s: State, total: u32, n: u32, threads: u32) {
    let kernel = stream(&s, total, n, threads);
    for (seed, (name, x)) in inputs((s.rows * total) as usize).into_iter().enumerate() {
        let (got, _) = run(&kernel, &x, (s.rows * s.k) as usize, threads, seed as u64);
        let want = expected(&x, s.rows as usize, s.k as usize);
        assert!(got == want, "{name}: {s:?}, {total} columns by {n}, {threads} threads:\n{got:?}\n{want:?}");
    }
}

#[test]
fn streams_select_as_a_sort_does() {
    // Rows, k, columns, columns a push, threads: one chunk and many, ragged ends, more units than a batch, more rows than warps.
    for [rows, k, total, n, threads] in [
        [1, 1, 1, 1, 32],
        [1, 3, 41, 4, 32],
        [2, 5, 100, 33, 64],
        [1, 64, 900, 64, 128],
        [3, 40, 700, 100, 128],
        [9, 7, 300, 96, 64],
        [1, 100, 3000, 1500, 128],
        [40, 2, 64, 40, 128],
        [1, 600, 4000, 512, 256],
    ] {
        check_stream(State { rows, k, most: n, once: false }, total, n, threads);
    }
}

#[test]
fn short_rows_select_as_a_sort_does() {
    for [rows, n, k, threads] in [
        [1, 1, 1, 32],
        [8, 32, 2, 128],
        [1, 256, 8, 128],
        [1, 8, 4, 32],
        [5, 37, 32, 64],
        [2, 1000, 8, 64],
        [1, 1024, 32, 32],
    ] {
        let s = State { rows, k, most: n, once: true };
        assert!(s.at_once());
        check_stream(s, n, n, threads);
    }
}

#[test]
fn a_push_takes_few_barriers() {
    let s = State { rows: 1, k: 600, most: 512, once: false };
    let barriers = |pushes: u32, rising: bool| {
        let n = 512 * pushes;
        let x: Vec<f32> = (0..n).map(|i| if rising { i as f32 } else { -(i as f32) }).collect();
        let (got, m) = run(&stream(&s, n, 512, 256), &x, 600, 256, 1);
        assert_eq!(got, expected(&x, 1, 600));
        m.barriers
    };
    // One barrier a push is the test's own. Nothing wins once the row has been cut.
    assert_eq!(barriers(20, false) - barriers(10, false), 10 * (1 + 1));
    // The row has room for two pushes of winners. Then each of them needs a cut: two barriers, at most four passes, one sweep.
    assert!(barriers(2, true) <= 1 + 2 * (1 + 3) + 7 + 1);
    assert!(barriers(20, true) - barriers(10, true) <= 10 * (1 + 3 + 7));
}
