//! The verifier of tile programs: every rule of the IR that the Rust types do not hold.
//!
//! All breaches are collected, each with the kernel and the instruction where it was found, so that one run shows them all.
//! A program without diagnostics satisfies:
//!
//! * names of kernel and parameters are C identifiers, parameters' names unique; the grid has 1 to 3 axes with tiles of at
//!   least 1; `block_id` names one of them;
//! * parameters are views of stored types with a stride for every dim; nothing else is a view;
//! * types are within the limits of [`super::infer`]; ids are in range and defined exactly once; a use follows its
//!   definition in the same or an enclosing region; results have the inferred types;
//! * a loop's arguments are the i32 counter and the types carried in, and its yields those types; both arms of a branch
//!   yield the results' types; the body has neither arguments nor yields; regions nest at most [`MAX_DEPTH`] deep;
//! * loads read readable parameters, stores write writable ones, and no constant index puts an access outside its view whole;
//! * a top-k state is used at most once, and not inside a loop around which it was made.
//!
//! **Cost.** Linear in instructions and types. Recursion is bounded by [`MAX_DEPTH`], so that no input overflows the stack.

use super::infer::{MAX_ELEMENTS, MAX_RANK, infer};
use super::{Access, Index, Inst, Op, Param, Program, Region, TileType, Type, ValueId, ViewType};
use crate::dtype::DType;
use std::collections::HashSet;
use std::fmt;

/// Deepest nesting of regions.
pub const MAX_DEPTH: usize = 64;

/// One thing that is wrong with a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnostic {
    /// Where: `kernel name`, `kernel name, %param` or `kernel name, inst %12` (the first result; `inst #3` is the third
    /// instruction that has none). Numbers are the program's own: those of its text only if it is canonical.
    pub location: String,
    /// What.
    pub message: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.location, self.message)
    }
}

/// Everything that is wrong with a program; nothing for one that every executor accepts.
pub fn verify(program: &Program) -> Vec<Diagnostic> {
    let n = program.types.len();
    let mut v = Verifier {
        program,
        diagnostics: Vec::new(),
        location: format!("kernel {}", program.name),
        sound: program.types.iter().map(|t| check_type(t).is_ok()).collect(),
        defined: vec![false; n],
        visible: vec![false; n],
        spent: vec![false; n],
        depth_made: vec![0; n],
        loops: 0,
        effects: 0,
    };
    v.header();
    for (i, ty) in program.types.iter().enumerate() {
        if let Err(e) = check_type(ty) {
            v.report(format!("type of %{i}: {e}"));
        }
    }
    if !program.body.args.is_empty() || !program.body.yields.is_empty() {
        v.report("the body has no arguments and yields nothing");
    }
    v.region(&program.body, 1);
    v.diagnostics
}

/// Limits that hold for a type by itself.
fn check_type(ty: &Type) -> Result<(), String> {
    match ty {
        Type::Tile(t) => {
            let elements = t.shape.iter().fold(1u64, |n, &d| n.saturating_mul(d.into()));
            if t.shape.len() > MAX_RANK || elements == 0 || elements > MAX_ELEMENTS {
                return Err(format!("{t} has more than {MAX_RANK} axes, or not 1 to {MAX_ELEMENTS} elements"));
            }
        }
        Type::View(t) => check_view(t)?,
        Type::Topk { rows, k } => {
            if !(1..=MAX_ELEMENTS).contains(&(u64::from(*rows) * u64::from(*k))) {
                return Err(format!("top-k of {rows} rows and {k} members"));
            }
        }
    }
    Ok(())
}

fn check_view(t: &ViewType) -> Result<(), String> {
    if t.dtype == DType::Bool {
        return Err("truth values are not stored in memory".into());
    }
    if t.shape.len() > MAX_RANK || t.strides.len() != t.shape.len() {
        return Err(format!("{} dims (at most {MAX_RANK}) and {} strides", t.shape.len(), t.strides.len()));
    }
    // `ViewType::dense` can give a stride one symbol only.
    let symbols = |from: usize| t.shape[from..].iter().filter(|e| e.sym.is_some()).count();
    let lost = |d: usize| t.shape[d].constant() != Some(1) && symbols(d + 1) > 1;
    if (0..t.shape.len()).any(lost) && t.strides == ViewType::dense(t.dtype, &t.shape).strides {
        return Err(format!("{t}: a dense stride would be a product of two symbols"));
    }
    Ok(())
}

/// Whether `name` can stand in C, PTX and LLVM unquoted.
pub(crate) fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

struct Verifier<'a> {
    program: &'a Program,
    diagnostics: Vec<Diagnostic>,
    location: String,
    /// Types that passed `check_type`: only these are given to `infer`.
    sound: Vec<bool>,
    defined: Vec<bool>,
    visible: Vec<bool>,
    /// Top-k states that have been used.
    spent: Vec<bool>,
    /// Loops around each value's definition.
    depth_made: Vec<usize>,
    loops: usize,
    /// Instructions without results so far, for locations.
    effects: usize,
}

impl<'a> Verifier<'a> {
    fn report(&mut self, message: impl Into<String>) {
        self.diagnostics.push(Diagnostic { location: self.location.clone(), message: message.into() });
    }

    fn at(&mut self, place: &str) {
        self.location = format!("kernel {}{place}", self.program.name);
    }

    fn header(&mut self) {
        let program = self.program;
        if !is_identifier(&program.name) {
            self.report("a kernel's name is a C identifier");
        }
        if !(1..=3).contains(&program.grid.len()) {
            self.report(format!("a grid has 1 to 3 axes, not {}", program.grid.len()));
        }
        if program.grid.iter().any(|g| g.tile == 0) {
            self.report("a block takes at least 1 of a grid axis");
        }
        let mut names = HashSet::new();
        for param in &program.params {
            self.at(&format!(", %{}", param.name));
            if !is_identifier(&param.name) {
                self.report("a parameter's name is a C identifier");
            }
            if !names.insert(&param.name) {
                self.report("two parameters have this name");
            }
            match self.ty(param.value) {
                Some(Type::View(_)) | None => {}
                Some(other) => self.report(format!("a parameter is a view, not {other}")),
            }
            self.define(param.value);
        }
        self.at("");
    }

    fn ty(&self, v: ValueId) -> Option<&'a Type> {
        self.program.types.get(v.0 as usize)
    }

    fn define(&mut self, v: ValueId) {
        let i = v.0 as usize;
        if i >= self.defined.len() {
            return self.report(format!("%{i} has no type"));
        }
        if std::mem::replace(&mut self.defined[i], true) {
            self.report(format!("%{i} is defined twice"));
        }
        self.visible[i] = true;
        self.depth_made[i] = self.loops;
    }

    /// Checks one use; whether the value is visible and its type sound.
    fn used(&mut self, v: ValueId) -> bool {
        let i = v.0 as usize;
        if !self.visible.get(i).copied().unwrap_or(false) {
            self.report(format!("%{i} is used but not defined here"));
            return false;
        }
        if matches!(self.ty(v), Some(Type::Topk { .. })) {
            if std::mem::replace(&mut self.spent[i], true) {
                self.report(format!("top-k state %{i} is used twice"));
            }
            if self.depth_made[i] != self.loops {
                self.report(format!("top-k state %{i} is used inside a loop that does not carry it"));
            }
        }
        self.sound[i]
    }

    fn region(&mut self, region: &Region, depth: usize) {
        if depth > MAX_DEPTH {
            return self.report(format!("regions are nested more than {MAX_DEPTH} deep"));
        }
        let mut mine = region.args.clone();
        region.args.iter().for_each(|&v| self.define(v));
        for inst in &region.insts {
            self.inst(inst, depth);
            mine.extend(&inst.results);
        }
        region.yields.iter().for_each(|&v| {
            self.used(v);
            self.no_view(v);
        });
        for v in mine {
            if let Some(visible) = self.visible.get_mut(v.0 as usize) {
                *visible = false;
            }
        }
    }

    fn inst(&mut self, inst: &Inst, depth: usize) {
        let place = match inst.results.first() {
            Some(v) => format!(", inst %{}", v.0),
            None => {
                self.effects += 1;
                format!(", inst #{}", self.effects)
            }
        };
        self.at(&place);
        let mut sound = true;
        for v in operands(&inst.op) {
            sound &= self.used(v);
        }
        match &inst.op {
            Op::For { init, body, .. } => {
                self.carried(init, body);
                self.loops += 1;
                self.region(body, depth + 1);
                self.loops -= 1;
            }
            Op::If { then, otherwise, .. } => sound &= self.arms(then, otherwise, depth),
            _ => {}
        }
        self.at(&place);
        if sound {
            self.types(inst);
            self.memory(&inst.op);
        }
        inst.results.iter().for_each(|&v| self.define(v));
        self.at("");
    }

    /// Both arms start from the same top-k states; what either uses is used.
    fn arms(&mut self, then: &Region, otherwise: &Region, depth: usize) -> bool {
        let before = self.spent.clone();
        self.region(then, depth + 1);
        let after_then = std::mem::replace(&mut self.spent, before);
        self.region(otherwise, depth + 1);
        self.spent.iter_mut().zip(after_then).for_each(|(spent, then)| *spent |= then);
        if self.types_of(&then.yields) != self.types_of(&otherwise.yields) {
            self.report("the arms of a branch yield different types");
        }
        let sound = |v: &ValueId| self.sound.get(v.0 as usize).copied().unwrap_or(false);
        then.yields.iter().all(sound)
    }

    fn types_of(&self, vs: &[ValueId]) -> Vec<Option<&'a Type>> {
        vs.iter().map(|&v| self.ty(v)).collect()
    }

    fn carried(&mut self, init: &[ValueId], body: &Region) {
        let counter = Type::Tile(TileType::scalar(DType::I32));
        let mut expected = vec![Some(&counter)];
        expected.extend(self.types_of(init));
        if self.types_of(&body.args) != expected {
            self.report("a loop's arguments are an i32 counter and the carried values' types");
        }
        if self.types_of(&body.yields) != expected[1..] {
            self.report("a loop yields the carried values' types");
        }
        init.iter().for_each(|&v| self.no_view(v));
    }

    fn no_view(&mut self, v: ValueId) {
        if matches!(self.ty(v), Some(Type::View(_))) {
            self.report(format!("view %{} is no value to carry or yield", v.0));
        }
    }

    /// Results against `infer`; operands are visible and sound.
    fn types(&mut self, inst: &Inst) {
        let types = &self.program.types;
        let inferred = match infer(&inst.op, &|v| &types[v.0 as usize]) {
            Ok(inferred) => inferred,
            Err(e) => return self.report(e),
        };
        if inferred.len() != inst.results.len() {
            return self.report(format!("{} results, but the operation has {}", inst.results.len(), inferred.len()));
        }
        for (&v, want) in inst.results.iter().zip(&inferred) {
            if let Some(have) = self.ty(v).filter(|&have| have != want) {
                self.report(format!("%{} is declared {have}, but is {want}", v.0));
            }
        }
        if let Op::BlockId { axis } = inst.op
            && axis as usize >= self.program.grid.len()
        {
            self.report(format!("the grid has no axis {axis}"));
        }
        if let Op::For { lo, hi, .. } = &inst.op {
            let wide = |i: &Index| matches!(i, Index::Const(c) if i32::try_from(*c).is_err());
            if wide(lo) || wide(hi) {
                self.report("a loop's bounds are i32");
            }
        }
    }

    fn memory(&mut self, op: &Op) {
        let (view, index, shape, leading, write) = match op {
            Op::Load { view, index, shape } => (*view, index, shape.clone(), 0, false),
            Op::Gather { view, index, shape, .. } => (*view, index, shape.clone(), 1, false),
            Op::Store { view, index, value } => (*view, index, self.shape(*value), 0, true),
            Op::Scatter { view, index, value, .. } => (*view, index, self.shape(*value), 1, true),
            _ => return,
        };
        let Some(Param { name, access, .. }) = self.program.params.iter().find(|p| p.value == view) else {
            return self.report(format!("%{} is no parameter", view.0));
        };
        let allowed = if write { access.writes() } else { *access != Access::Write };
        if !allowed {
            let (verb, be) = if write { ("written", "read") } else { ("read", "written") };
            self.report(format!("%{name} is only to be {be}, but is {verb}"));
        }
        let Some(Type::View(ty)) = self.ty(view) else { return };
        for (i, index) in index.iter().enumerate() {
            let d = i + leading;
            let (Index::Const(start), Some(extent), Some(&size)) = (index, ty.shape.get(d), shape.get(d)) else {
                continue;
            };
            let end = extent.constant().map_or(i64::MAX, i64::from);
            if start.saturating_add(size.into()) <= 0 || *start >= end {
                self.report(format!("index {start} of dim {d} is outside %{name}, {ty}"));
            }
        }
    }

    fn shape(&self, v: ValueId) -> Vec<u32> {
        self.program.types.get(v.0 as usize).map_or(Vec::new(), |t| match t {
            Type::Tile(t) => t.shape.clone(),
            _ => Vec::new(),
        })
    }
}

/// The values an operation uses itself, in the order of its text; not those used in its regions.
pub fn operands(op: &Op) -> Vec<ValueId> {
    let mut op = op.clone_shallow();
    let mut out = Vec::new();
    for_each_operand(&mut op, &mut |v| out.push(*v));
    out
}

/// Calls `f` on every value an operation uses itself, in the order of its text; not those used in its regions.
pub fn for_each_operand(op: &mut Op, f: &mut dyn FnMut(&mut ValueId)) {
    fn indices(index: &mut [Index], f: &mut dyn FnMut(&mut ValueId)) {
        for i in index {
            if let Index::Value(v) = i {
                f(v);
            }
        }
    }
    match op {
        Op::BlockId { .. } | Op::Sym(_) | Op::Full { .. } | Op::Iota { .. } | Op::TopkInit { .. } => {}
        Op::Load { view, index, .. } => {
            f(view);
            indices(index, f);
        }
        Op::Store { view, index, value } => {
            f(view);
            indices(index, f);
            f(value);
        }
        Op::Gather { view, rows, index, .. } => {
            f(view);
            f(rows);
            indices(index, f);
        }
        Op::Scatter { view, rows, index, value } => {
            f(view);
            f(rows);
            indices(index, f);
            f(value);
        }
        Op::Map { inputs: xs, .. } | Op::Concat { xs, .. } => xs.iter_mut().for_each(f),
        Op::Reduce { x, .. } | Op::Scan { x, .. } => f(x),
        Op::Reshape { x, .. } | Op::Permute { x, .. } | Op::Slice { x, .. } => f(x),
        Op::Dot { a, b, acc, .. } => {
            f(a);
            f(b);
            acc.iter_mut().for_each(f);
        }
        Op::TopkPush { state, values, base } => {
            f(state);
            f(values);
            f(base);
        }
        Op::TopkTake { state } => f(state),
        Op::For { lo, hi, init, .. } => {
            indices(std::slice::from_mut(lo), f);
            indices(std::slice::from_mut(hi), f);
            init.iter_mut().for_each(f);
        }
        Op::If { cond, .. } => f(cond),
    }
}

impl Op {
    /// A copy without its regions' contents.
    fn clone_shallow(&self) -> Op {
        match self {
            Op::For { lo, hi, step, init, .. } => {
                Op::For { lo: *lo, hi: *hi, step: *step, init: init.clone(), body: Region::default() }
            }
            Op::If { cond, .. } => Op::If { cond: *cond, then: Region::default(), otherwise: Region::default() },
            op => op.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tile::parse;
    use expect_test::{Expect, expect};

    /// Verifies a kernel with a readable %x, a writable %y and a grid of one axis.
    fn check(body: &str, expected: Expect) {
        let header = "kernel k grid(T/1) read %x: view<[T, 64] f32> write %y: view<[T, 64] f32>";
        check_kernels(&format!("{header} {{\n{body}\n}}"), expected);
    }

    fn check_kernels(text: &str, expected: Expect) {
        let programs = parse(text).unwrap();
        let lines: Vec<String> = programs.iter().flat_map(verify).map(|d| d.to_string()).collect();
        expected.assert_eq(&lines.join("\n"));
    }

    #[test]
    fn a_correct_kernel_has_no_diagnostics() {
        check("%2 = load %x[0, 0] : tile<1x64xf32>\nstore %y[0, -1], %2", expect![[""]]);
    }

    #[test]
    fn headers() {
        check_kernels("kernel k grid() { }", expect!["kernel k: a grid has 1 to 3 axes, not 0"]);
        check_kernels(
            "kernel k grid(1/1, 1/0, 1/1, 1/1) { }",
            expect![[r#"
            kernel k: a grid has 1 to 3 axes, not 4
            kernel k: a block takes at least 1 of a grid axis"#]],
        );
        check_kernels(
            "kernel k grid(1/1) read %1: f32 read %b: view<[4] bool> { }",
            expect![[r#"
            kernel k, %1: a parameter's name is a C identifier
            kernel k, %1: a parameter is a view, not f32
            kernel k: type of %1: truth values are not stored in memory"#]],
        );
        check_kernels(
            "kernel k grid(1/1) read %a: view<[4, 4] f32, strides [4]> { }",
            expect!["kernel k: type of %0: 2 dims (at most 6) and 1 strides"],
        );
        check_kernels(
            "kernel k grid(1/1) read %a: view<[4, T, S] f32> { }",
            expect!["kernel k: type of %0: view<[4, T, S] f32>: a dense stride would be a product of two symbols"],
        );
        let mut program = parse("kernel k grid(1/1) read %a: view<[4] f32> { }").unwrap().remove(0);
        program.name = "a-b".into();
        program.params.push(program.params[0].clone());
        expect![[r#"
            kernel a-b: a kernel's name is a C identifier
            kernel a-b, %a: two parameters have this name
            kernel a-b, %a: %0 is defined twice
        "#]]
        .assert_eq(&verify(&program).iter().map(|d| format!("{d}\n")).collect::<String>());
    }

    #[test]
    fn result_types() {
        check(
            "%2 = load %x[0, 0] : tile<1x64xbf16>",
            expect!["kernel k, inst %2: %2 is declared tile<1x64xbf16>, but is tile<1x64xf32>"],
        );
        check(
            "%2 = load %x[0] : tile<1x64xf32>",
            expect!["kernel k, inst %2: view<[T, 64] f32> is accessed with 1 indices for a tile of rank 2"],
        );
        check("%2 = block_id 1 : i32", expect!["kernel k, inst %2: the grid has no axis 1"]);
        check(
            "%2 = full 1.0 : tile<0xf32>",
            expect![[r#"
            kernel k: type of %2: tile<0xf32> has more than 6 axes, or not 1 to 67108864 elements
            kernel k, inst %2: tile<0xf32>: a tile has rank 0 to 6 and 1 to 67108864 elements"#]],
        );
        check(
            "%2 = full 1 : tile<4xf32>\n%3 = reduce sum %2 axis 1 : tile<1xf32>",
            expect![[r#"
            kernel k, inst %2: %2 is declared tile<4xf32>, but is tile<4xi32>
            kernel k, inst %3: [4] has no axis 1"#]],
        );
        check(
            "%2 = full 1.0 : tile<4xf32>\n%3 = map(%2) { a -> t0 = add a, 1; t0 } : tile<4xf32>",
            expect!["kernel k, inst %3: Add does not take [F32, I32]"],
        );
        check(
            "%2 = full 1 : i32\n%3 = map(%2) { a -> t0 = div a, a; t0 } : i32",
            expect!["kernel k, inst %3: an i32 divisor is a positive constant"],
        );
    }

    #[test]
    fn scopes() {
        check(
            "for %2 = 0 to 4 step 1 {\n%3 = full 1.0 : f32\n}\n%4 = map(%3) { a -> a } : f32",
            expect!["kernel k, inst %4: %3 is used but not defined here"],
        );
        let mut program =
            parse("kernel k grid(1/1) { %0 = sym T : i32 %1 = map(%0) { a -> a } : i32 }").unwrap().remove(0);
        program.body.insts.swap(0, 1);
        program.body.insts.push(program.body.insts[0].clone());
        program.body.yields.push(ValueId(7));
        expect![[r#"
            kernel k: the body has no arguments and yields nothing
            kernel k, inst %1: %0 is used but not defined here
            kernel k, inst %1: %1 is defined twice
            kernel k: %7 is used but not defined here
        "#]]
        .assert_eq(&verify(&program).iter().map(|d| format!("{d}\n")).collect::<String>());
    }

    #[test]
    fn regions() {
        check(
            "%2 = full 1.0 : f32\n%4 = for %3 = 0 to 8 step 0 iter(%5 = %2: i32) { yield %5 }",
            expect![[r#"
            kernel k, inst %5: a loop's arguments are an i32 counter and the carried values' types
            kernel k, inst %5: a loop yields the carried values' types
            kernel k, inst %5: a loop's step is positive"#]],
        );
        check(
            "%2 = full 1.0 : f32\n%4 = for %3 = 0 to 8 step 1 iter(%5 = %2: f32) { yield %3 }",
            expect!["kernel k, inst %5: a loop yields the carried values' types"],
        );
        check(
            "%2 = full true : bool\n%3 = full 1 : i32\n%4 = if %2 : i32 { yield %3 } else { yield %2 }",
            expect!["kernel k, inst %4: the arms of a branch yield different types"],
        );
        check("%2 = full 1 : i32\nif %2 { }", expect!["kernel k, inst #1: expected a scalar bool, found i32"]);
        check("for %2 = 0 to 9999999999 step 1 { }", expect!["kernel k, inst #1: a loop's bounds are i32"]);
        check(
            "%3 = for %2 = 0 to 9 step 1 iter(%4 = %x: view<[T, 64] f32>) { yield %4 }",
            expect![[r#"
            kernel k, inst %4: view %0 is no value to carry or yield
            kernel k, inst %4: view %3 is no value to carry or yield"#]],
        );
    }

    #[test]
    fn memory() {
        check(
            "%2 = load %y[0, 0] : tile<1x64xf32>\nstore %x[0, 0], %2",
            expect![[r#"
            kernel k, inst %2: %y is only to be written, but is read
            kernel k, inst #1: %x is only to be read, but is written"#]],
        );
        check(
            "%2 = load %x[0, 64] : tile<1x64xf32>\n%3 = load %x[-1, 0] : tile<1x64xf32>",
            expect![[r#"
            kernel k, inst %2: index 64 of dim 1 is outside %x, view<[T, 64] f32>
            kernel k, inst %3: index -1 of dim 0 is outside %x, view<[T, 64] f32>"#]],
        );
        check(
            "%2 = full 1 : tile<1x64xi32>\nstore %y[0, 0], %2",
            expect!["kernel k, inst #1: tile<1x64xi32> stored to view<[T, 64] f32>"],
        );
    }

    #[test]
    fn topk_states_are_linear() {
        let open = "%2 = full 1.0 : tile<1x4xf32>\n%3 = full 0 : i32\n%4 = topk_init : topk<1x2>\n";
        let push = "= topk_push %4, %2, %3 : topk<1x2>\n";
        check(&format!("{open}%5 {push}%6 {push}"), expect!["kernel k, inst %6: top-k state %4 is used twice"]);
        check(
            &format!("{open}for %7 = 0 to 4 step 1 {{ %5 {push} }}"),
            expect!["kernel k, inst %6: top-k state %4 is used inside a loop that does not carry it"],
        );
        check(&format!("{open}%7 = full true : bool\nif %7 {{ %5 {push} }} else {{ %6 {push} }}"), expect![[""]]);
    }

    #[test]
    fn nesting_is_bounded() {
        let mut program = parse("kernel k grid(1/1) { %0 = full true : bool }").unwrap().remove(0);
        let mut nested = Region::default();
        for _ in 0..MAX_DEPTH {
            let op = Op::If { cond: ValueId(0), then: nested, otherwise: Region::default() };
            nested = Region { insts: vec![Inst { results: Vec::new(), op }], ..Region::default() };
        }
        program.body.insts.extend(nested.insts);
        let diagnostics = verify(&program);
        let nested = |d: &Diagnostic| d.message.contains("nested");
        assert!(!diagnostics.is_empty() && diagnostics.iter().all(nested), "{diagnostics:?}");
    }
}
