use super::*;
use crate::Sym;
use crate::sched::{Block, Budget, Buffer, BufferId, parse, verify};
use crate::tile::text::tests::random_program;
use crate::tile::{MapArg, MapFn};
use proptest::prelude::*;

/// `y = a · bᵀ`, 16 rows a block: a producer, and a role for either half of the columns. Eight rounds; stages are given back
/// one round late.
const GEMM: &str = "scheduled gemm grid(T/16) threads 96
    read %a: view<[T, C] f32>
    read %b: view<[16, C] f32>
    write %y: view<[T, 16] f32>
    buffer b0 = a: f32 16x8, offset 0, bytes 1024, pitch 32, swizzle 32, copies 2
    buffer b1 = b: f32 16x8, offset 1024, bytes 1280, pitch 40, swizzle 0, copies 2
    buffer b2 = left: f32 16x8, offset 2304, bytes 512, pitch 32, swizzle 0, copies 1
    buffer b3 = right: f32 16x8, offset 2816, bytes 512, pitch 32, swizzle 0, copies 1
    channel c0 = tiles: stages 2, slots [b0, b1]
{ }
role producer warps 0..1 elected {
    %p = block_id 0 : i32 @uniform
    %prow = map(%p) { a -> t0 = mul a, 16; t0 } : i32 @lazy
    for %i = 0 to 64 step 8 {
        acquire c0
        copy c0.0, %a[%prow, %i] : tile<16x8xf32>
        copy c0.1, %b[0, %i] : tile<16x8xf32>
        commit c0
    }
}
";

/// When a consumer gives stages back: after the first product, before and after those of the loop, at the end.
const LATE: [&str; 4] = ["", "", "release c0 lag 1", "release c0 lag 0"];
/// A stage is free before it was read.
const EARLY: [&str; 4] = ["release c0 lag 0", "release c0 lag 0", "", ""];

/// Half of the columns, from `first`; values are named after `role`.
fn consumer(role: &str, warps: &str, first: u32, buffer: u32, releases: [&str; 4]) -> String {
    let [after_first, before, after, end] = releases;
    let tile = "tile<16x8xf32> @frag(mma16x8, 1x1)";
    let take = |n: u32| {
        format!(
            "wait c0
            %{role}a{n} = take c0.0 : tile<16x8xf32> @slot(c0, 0)
            %{role}b{n} = take c0.1 : tile<16x8xf32> @slot(c0, 1)
            %{role}half{n} = slice %{role}b{n} [{first}, 0] : tile<8x8xf32> @lazy"
        )
    };
    let (first_take, next_take) = (take(0), take(1));
    format!(
        "role {role} warps {warps} {{
            %{role}p = block_id 0 : i32 @uniform
            %{role}row = map(%{role}p) {{ a -> t0 = mul a, 16; t0 }} : i32 @uniform
            {first_take}
            %{role}dot0 = dot_t %{role}a0, %{role}half0 : {tile}
            {after_first}
            %{role}sum = for %{role}i = 8 to 64 step 8 iter(%{role}acc = %{role}dot0: {tile}) {{
                {next_take}
                {before}
                %{role}dot1 = dot_t %{role}a1, %{role}half1 acc %{role}acc : {tile}
                {after}
                yield %{role}dot1
            }}
            {end}
            %{role}out = map(%{role}sum) {{ a -> a }} : tile<16x8xf32> @shared(b{buffer})
            barrier
            store %y[%{role}row, {first}], %{role}out
            barrier
        }}\n"
    )
}

fn gemm_with(left: [&str; 4]) -> String {
    format!("{GEMM}{}{}", consumer("left", "1..2", 0, 2, left), consumer("right", "2..3", 8, 3, LATE))
}

fn gemm() -> String {
    gemm_with(LATE)
}

fn one(text: &str) -> Scheduled {
    parse(text).unwrap_or_else(|e| panic!("{e}\n{text}")).remove(0)
}

fn bindings(n: usize) -> Vec<Binding> {
    (0..n).map(|buffer| Binding { buffer, offset: 0 }).collect()
}

/// For each of many seeds, whether the kernel gives the right product; or why it does not end.
fn products(text: &str, [t, c]: [u32; 2]) -> Vec<Result<bool, String>> {
    let kernel = one(text);
    let value = |i: u32| (i.wrapping_mul(2_654_435_761) >> 28) as f32 / 8.0 - 1.0;
    let matrix = |n: u32, salt: u32| (0..n).map(|i| value(i + salt)).collect::<Vec<f32>>();
    let (a, b) = (matrix(t * c, 7), matrix(16 * c, 1000));
    let dot = |row: &[f32], column: &[f32]| row.iter().zip(column).map(|(x, y)| x * y).sum::<f32>();
    let rows = a.chunks(c.max(1) as usize);
    let want: Vec<f32> =
        rows.flat_map(|row| b.chunks(c.max(1) as usize).map(|column| dot(row, column)).collect::<Vec<_>>()).collect();
    let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let syms = SymValues::default().with(Sym::T, t).with(Sym::C, c);
    let product = |seed: u64| {
        let mut buffers = [bytes(&a), bytes(&b), vec![0xff; (t * 64) as usize]];
        let options = Options { seed, check_races: true };
        let result = run(&kernel, &syms, &mut buffers, &bindings(3), options);
        result.map(|()| buffers[2] == bytes(&want)).map_err(|e| e.to_string())
    };
    (0..24).map(product).collect()
}

const SIZES: [[u32; 2]; 4] = [[16, 8], [16, 24], [40, 21], [100, 17]];

fn diagnostics(text: &str) -> Vec<String> {
    verify(&one(text), &Budget::UNLIMITED).iter().map(|d| d.to_string()).collect()
}

/// `text`, one of whose lines was changed, is refused by the verifier, and shown wrong or faulty by some seed.
fn check_broken(text: &str, said: &str, shown: Option<&str>) {
    let found = diagnostics(text);
    assert!(found.iter().any(|d| d.contains(said)), "{found:?}");
    let results: Vec<_> = SIZES.into_iter().flat_map(|size| products(text, size)).collect();
    let wrong = |r: &Result<bool, String>| match (r, shown) {
        (Err(e), Some(shown)) => e.contains(shown),
        (Ok(right), None) => !right,
        _ => false,
    };
    assert!(results.iter().any(wrong), "{results:?}");
}

#[test]
fn a_product_by_three_roles() {
    assert_eq!(diagnostics(&gemm()), [""; 0]);
    for size in SIZES {
        let results = products(&gemm(), size);
        assert!(results.iter().all(|r| *r == Ok(true)), "{size:?}: {results:?}");
    }
}

#[test]
fn a_product_by_persistent_blocks() {
    let text = gemm().replace("grid(T/16)", "grid(T/16) persistent 8");
    assert_eq!(diagnostics(&text), [""; 0]);
    let results = products(&text, [130, 21]);
    assert!(results.iter().all(|r| *r == Ok(true)), "{results:?}");
    // What the next tile writes, other threads may still read.
    let open = text.replace("store %y[%leftrow, 0], %leftout\n            barrier", "store %y[%leftrow, 0], %leftout");
    check_broken(&open, "writes b2, read by other threads", Some("a barrier is missing"));
}

#[test]
fn a_missing_barrier_shows() {
    let text = gemm().replacen("@shared(b2)\n            barrier", "@shared(b2)", 1);
    check_broken(&text, "reads b2, written by other threads", None);
}

#[test]
fn a_stage_released_too_early_shows() {
    check_broken(&gemm_with(EARLY), "after its stage of c0 was released", None);
}

#[test]
fn hanging_kernels_end() {
    let kept = "deadlock: producer waits for a free stage of c0";
    check_broken(&gemm_with([""; 4]), "no stage is given back", Some(kept));
    let more = gemm().replacen("for %lefti = 8", "for %lefti = 0", 1);
    check_broken(&more, "no stage is committed", Some("left waits for a full stage of c0"));
    let order = "is the next in order";
    check_broken(&gemm_with(["", "", "release c0 lag 0", ""]), order, Some(order));
    let never = "releases with a lag of 1 after 1 waits";
    check_broken(&gemm_with(["release c0 lag 1", "", "", ""]), never, Some(never));
}

#[test]
fn overlapping_buffers_show() {
    let over = gemm().replacen("offset 2816", "offset 2560", 1);
    check_broken(&over, "overlap, and roles run at once", None);
    let ring = gemm().replacen("offset 1024", "offset 512", 1);
    check_broken(&ring, "overlap, and roles run at once", None);
}

/// The plainest schedule there is: everything but single elements in shared memory of its own, a barrier around every instruction. Bytes say
/// which elementwise values are lazy.
struct Plain<'a> {
    kernel: Scheduled,
    lazy: &'a [u8],
}

impl Plain<'_> {
    fn of(program: &Program, lazy: &[u8]) -> Scheduled {
        let kernel = Scheduled {
            name: program.name.clone(),
            grid: program.grid.clone(),
            persistent: None,
            cluster: None,
            team: 1,
            folded: false,
            alternate: false,
            dies: 1,
            params: program.params.clone(),
            types: program.types.clone(),
            places: vec![Place::View; program.types.len()],
            threads: 64,
            buffers: Vec::new(),
            channels: Vec::new(),
            common: Block::default(),
            roles: Vec::new(),
        };
        let mut plain = Plain { kernel, lazy };
        plain.kernel.common = plain.region(&program.body);
        plain.kernel
    }

    fn place(&mut self, v: ValueId) -> Place {
        let (dtype, [rows, columns]) = match &self.kernel.types[v.0 as usize] {
            Type::Tile(t) if t.elements() == 1 => return Place::Uniform,
            Type::Tile(t) => (t.dtype, rows_and_columns(&t.shape)),
            _ => (crate::DType::I32, [1, 1]),
        };
        // Odd pitches and swizzles: they must not matter.
        let swizzle = [0, 32, 64, 128][self.kernel.buffers.len() % 4];
        let pitch = (columns * dtype.bytes()) as u32 + 4 * (swizzle == 0) as u32;
        let pitch = pitch.next_multiple_of(if swizzle == 0 { 4 } else { swizzle });
        let offset = self.kernel.buffers.last().map_or(0, |b| b.offset + b.bytes());
        let (name, shape) = (format!("v{}", v.0), [rows, columns].map(|n| n as u32));
        self.kernel.buffers.push(Buffer { name, dtype, shape, pitch, swizzle, copies: 1, offset, outside: false });
        Place::Shared(BufferId(self.kernel.buffers.len() as u32 - 1))
    }

    fn give(&mut self, v: ValueId) {
        self.kernel.places[v.0 as usize] = self.place(v);
    }

    fn region(&mut self, region: &Region) -> Block {
        let barrier = || Inst { results: Vec::new(), op: Op::Barrier, scratch: None };
        let mut block = Block { args: region.args.clone(), insts: vec![barrier()], yields: Vec::new() };
        for inst in &region.insts {
            let op = match &inst.op {
                tile::Op::For { lo, hi, step, init, body } => {
                    body.args.iter().for_each(|&v| self.give(v));
                    for (&arg, &result) in body.args[1..].iter().zip(&inst.results) {
                        self.kernel.places[result.0 as usize] = self.kernel.places[arg.0 as usize].clone();
                    }
                    Op::For { lo: *lo, hi: *hi, step: *step, init: init.clone(), body: self.region(body) }
                }
                tile::Op::If { cond, then, otherwise } => {
                    inst.results.iter().for_each(|&v| self.give(v));
                    Op::If { cond: *cond, then: self.region(then), otherwise: self.region(otherwise) }
                }
                op => {
                    inst.results.iter().for_each(|&v| self.give(v));
                    let elementwise = matches!(
                        op,
                        tile::Op::Map { .. }
                            | tile::Op::Slice { .. }
                            | tile::Op::Permute { .. }
                            | tile::Op::Concat { .. }
                    );
                    let (&first, rest) = self.lazy.split_first().unwrap_or((&0, &[]));
                    self.lazy = rest;
                    if elementwise && first > 128 {
                        self.kernel.places[inst.results[0].0 as usize] = Place::Lazy;
                    }
                    Op::Tile(op.clone())
                }
            };
            block.insts.extend([Inst { results: inst.results.clone(), op, scratch: None }, barrier()]);
        }
        // What is yielded is copied first: it may be what it goes to, or computed from that.
        block.yields = region.yields.iter().map(|&v| self.copied(v, &mut block.insts)).collect();
        block.insts.push(barrier());
        block
    }

    fn copied(&mut self, v: ValueId, insts: &mut Vec<Inst>) -> ValueId {
        if !matches!(self.kernel.types[v.0 as usize], Type::Tile(_)) {
            return v;
        }
        let copy = ValueId(self.kernel.types.len() as u32);
        self.kernel.types.push(self.kernel.types[v.0 as usize].clone());
        let place = self.place(copy);
        self.kernel.places.push(place);
        let op = tile::Op::Map { inputs: vec![v], body: MapFn { insts: Vec::new(), result: MapArg::Input(0) } };
        insts.push(Inst { results: vec![copy], op: Op::Tile(op), scratch: None });
        copy
    }
}

proptest! {
    #[test]
    fn a_schedule_does_not_change_results(
        program in random_program(),
        lazy in proptest::collection::vec(any::<u8>(), 0..64),
        seed in any::<u64>(),
    ) {
        let kernel = Plain::of(&program, &lazy);
        let problems: Vec<String> = verify(&kernel, &Budget::UNLIMITED).iter().map(|d| d.to_string()).collect();
        prop_assert_eq!(problems, Vec::<String>::new(), "{}", kernel);
        let syms = SymValues([3; 6]);
        let fresh = || (0..5).map(|i| (0..1024u32).map(|b| (b * 7 + i) as u8).collect()).collect::<Vec<Vec<u8>>>();
        let (mut want, mut got) = (fresh(), fresh());
        interp::run(&program, &syms, &mut want, &bindings(5)).unwrap();
        let ran = run(&kernel, &syms, &mut got, &bindings(5), Options { seed, check_races: false });
        prop_assert!(ran.is_ok(), "{:?}\n{}", ran, kernel);
        prop_assert!(want == got, "{}", kernel);
    }
}

/// A role doubles rows and hands them on; the other adds one and stores. Rows are two panels of 32 bytes.
const HANDED: &str = "scheduled handed grid(T/8) threads 64
    read %x: view<[T, 16] f32>
    write %y: view<[T, 16] f32>
    buffer b0 = rows: f32 8x16, offset 0, bytes 1024, pitch 32, swizzle 32, copies 2
    channel c0 = rows: stages 2, slots [b0]
{ }
role first warps 0..1 {
    %p = block_id 0 : i32 @uniform
    %prow = map(%p) { a -> t0 = mul a, 8; t0 } : i32 @uniform
    for %i = 0 to 3 step 1 {
        %x0 = load %x[%prow, 0] : tile<8x16xf32> @lazy
        %x1 = map(%x0) { a -> t0 = add a, a; t0 } : tile<8x16xf32> @lazy
        acquire c0
        fill c0.0, %x1
        commit c0
    }
}
role second warps 1..2 {
    %q = block_id 0 : i32 @uniform
    %qrow = map(%q) { a -> t0 = mul a, 8; t0 } : i32 @uniform
    for %j = 0 to 3 step 1 {
        wait c0
        %v = take c0.0 : tile<8x16xf32> @slot(c0, 0)
        %w = map(%v) { a -> t0 = add a, 1.0; t0 } : tile<8x16xf32> @lazy
        store %y[%qrow, 0], %w
        release c0 lag 0
    }
}
";

#[test]
fn tiles_are_handed_from_role_to_role() {
    let kernel = one(HANDED);
    assert_eq!(verify(&kernel, &Budget::UNLIMITED), vec![]);
    assert_eq!(parse(&kernel.to_string()), Ok(vec![crate::sched::canonical(&kernel)]));
    let x: Vec<f32> = (0..11 * 16).map(|i| i as f32).collect();
    let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let want: Vec<f32> = x.iter().map(|x| 2.0 * x + 1.0).collect();
    for seed in 0..16 {
        let mut buffers = [bytes(&x), vec![0xff; x.len() * 4]];
        let options = Options { seed, check_races: false };
        run(&kernel, &SymValues::default().with(Sym::T, 11), &mut buffers, &bindings(2), options).expect("runs");
        assert_eq!(buffers[1], bytes(&want), "seed {seed}");
    }
}

#[test]
fn a_stage_is_filled_whole() {
    let without = one(&HANDED.replacen("        fill c0.0, %x1\n", "", 1));
    let said = verify(&without, &Budget::UNLIMITED);
    assert!(said.iter().any(|d| d.message.contains("slot 0 is not filled")), "{said:?}");
    let early = one(&HANDED.replacen("        acquire c0\n", "", 1));
    let said = verify(&early, &Budget::UNLIMITED);
    assert!(said.iter().any(|d| d.message.contains("did not acquire")), "{said:?}");
}

/// Two blocks that run one tile: each puts twice the input's half that its number makes of it, and stores the sum of both in its own columns.
const TEAM: &str = "scheduled k grid(1/1) persistent 1 team 2 threads 128
    read %x: view<[64, 16] f32> write %y: view<[64, 16] f32>
    buffer b0 = part: f32 64x16, offset 0, bytes 4096, pitch 64, swizzle 0, copies 1
    { }
    role a warps 0..4 {
        %n = number : i32 @uniform
        %at = map(%n) { a -> t0 = mul a, 8; t0 } : i32 @uniform
        %in = load %x[0, 0] : tile<64x16xf32> @lazy
        %own = map(%in, %n) { a, b -> t0 = cast<f32> b; t1 = add a, t0; t1 } : tile<64x16xf32> @lazy
        put b0, %own
        meet
        %mine = get b0 after 0 own : tile<64x8xf32> @frag(wgmma, 1x1)
        %other = get b0 after 1 own : tile<64x8xf32> @frag(wgmma, 1x1)
        %sum = map(%mine, %other) { a, b -> t0 = add a, b; t0 } : tile<64x8xf32> @lazy
        store %y[0, %at], %sum
        meet
    }";

#[test]
fn blocks_of_a_team_exchange_what_they_put() {
    let x: Vec<f32> = (0..64 * 16).map(|i| i as f32 / 8.0).collect();
    let bytes = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let want = bytes(&x.iter().map(|x| 2.0 * x + 1.0).collect::<Vec<_>>());
    let right = |text: &str| -> Vec<bool> {
        let kernel = one(text);
        let run_once = |seed: u64| {
            let mut buffers = [bytes(&x), vec![0xff; 64 * 16 * 4]];
            let options = Options { seed, check_races: false };
            run(&kernel, &SymValues::default(), &mut buffers, &bindings(2), options).is_ok() && buffers[1] == want
        };
        (0..8).map(run_once).collect()
    };
    assert_eq!(diagnostics(TEAM), [] as [String; 0]);
    assert_eq!(right(TEAM), [true; 8]);
    // The same through memory, which no buffer of the block meets.
    let apart = TEAM.replace("copies 1", "copies 1 outside");
    assert_eq!(diagnostics(&apart), [] as [String; 0]);
    assert_eq!(right(&apart), [true; 8]);
    let early = apart.replacen("meet", "", 1);
    assert!(diagnostics(&early).iter().any(|d| d.contains("no meeting is between")), "{:?}", diagnostics(&early));
    assert!(right(&early).contains(&false));
    // What another has not put yet is read.
    let early = TEAM.replacen("meet", "", 1);
    assert!(diagnostics(&early).iter().any(|d| d.contains("no meeting is between")), "{:?}", diagnostics(&early));
    assert!(right(&early).contains(&false));
    // A block may go on, or end, while another still reads what it has put.
    let at = TEAM.rfind("meet").expect("it meets");
    let late = format!("{}{}", &TEAM[..at], &TEAM[at + 4..]);
    assert!(diagnostics(&late).iter().any(|d| d.contains("last of all")), "{:?}", diagnostics(&late));
    // Pieces and blocks that there are not.
    let wrong = |from: &str, to: &str, said: &str| {
        let found = diagnostics(&TEAM.replacen(from, to, 1));
        assert!(found.iter().any(|d| d.contains(said)), "{found:?}");
    };
    wrong("after 1", "after 2", "a team has no such block");
    wrong("team 2 ", "", "a block without others");
    wrong("put b0, %own", "put b0, %n", "as large as its buffer");
}
