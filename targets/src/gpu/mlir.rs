//! Text of one kernel in MLIR's llvm dialect and a vendor's.
//!
//! [`Fn`] writes one function: SSA names, basic blocks with arguments, and arithmetic that folds constants, so that what is known at
//! compile time (register numbers, strides, offsets in shared memory) costs no instruction and little text. What
//! a chip has and the dialects do not is its [`super::isa::Isa`]'s business.

use super::known::Known;
use std::collections::HashSet;
use std::fmt::Write;

/// Type of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ty {
    /// Truth value.
    I1,
    /// Byte: e4m3.
    I8,
    /// Two bytes: bf16 and f16 as their bits.
    I16,
    /// Integer, or packed smaller elements.
    I32,
    /// Byte offset, or address.
    I64,
    /// Float.
    F32,
    /// Four floats in registers beside each other.
    Quad,
    /// Address in global memory.
    Global,
    /// Address in shared memory.
    Shared,
    /// Address of no stated memory: a kernel's parameter passed by value.
    Generic,
    /// Address of memory that stays as it is, which such a parameter may be in too.
    Constant,
}

impl Ty {
    /// As MLIR writes it.
    pub fn name(self) -> &'static str {
        match self {
            Ty::I1 => "i1",
            Ty::I8 => "i8",
            Ty::I16 => "i16",
            Ty::I32 => "i32",
            Ty::I64 => "i64",
            Ty::F32 => "f32",
            Ty::Quad => "vector<4xf32>",
            Ty::Global => "!llvm.ptr<1>",
            Ty::Shared => "!llvm.ptr<3>",
            Ty::Generic => "!llvm.ptr",
            Ty::Constant => "!llvm.ptr<4>",
        }
    }

    /// Bytes in memory.
    pub fn bytes(self) -> u32 {
        match self {
            Ty::I1 | Ty::I8 => 1,
            Ty::I16 => 2,
            Ty::I32 | Ty::F32 => 4,
            Ty::I64 | Ty::Global | Ty::Shared | Ty::Generic | Ty::Constant => 8,
            Ty::Quad => 16,
        }
    }
}

/// A value: an SSA name or a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Val {
    /// SSA name `%vN`.
    Reg(u32, Ty),
    /// Integer constant.
    Int(i64, Ty),
    /// f32 constant, as its bits.
    Float(u32),
    /// Argument `%N` of the function.
    Arg(u32, Ty),
}

impl Val {
    /// Its type.
    pub fn ty(self) -> Ty {
        match self {
            Val::Reg(_, ty) | Val::Int(_, ty) | Val::Arg(_, ty) => ty,
            Val::Float(_) => Ty::F32,
        }
    }

    /// The integer, if it is a constant one.
    pub fn int(self) -> Option<i64> {
        match self {
            Val::Int(n, _) => Some(n),
            _ => None,
        }
    }
}

/// An i32 constant.
pub fn i32(n: i64) -> Val {
    Val::Int(n, Ty::I32)
}

/// An i64 constant.
pub fn i64(n: i64) -> Val {
    Val::Int(n, Ty::I64)
}

/// An f32 constant.
pub fn f32(x: f32) -> Val {
    Val::Float(x.to_bits())
}

/// A basic block's label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(u32);

/// A loop that is open.
pub struct Loop {
    /// The counter, then what is carried, in the body.
    pub args: Vec<Val>,
    /// The same after the loop.
    pub done: Vec<Val>,
    hi: Val,
    head: Label,
    after: Label,
}

/// A function under construction.
#[derive(Default)]
pub struct Fn {
    values: u32,
    labels: u32,
    text: String,
    /// Whether loads of global memory are of what nobody writes meanwhile.
    pub constant: bool,
    tame: HashSet<u32>,
    /// Whether loops ask at the end of a round whether there is another one, as some compilers take loops best.
    pub asks_last: bool,
    /// What is known of integers, if tests are to be folded by it.
    pub known: Option<Known>,
}

impl Fn {
    /// The body written so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn fresh(&mut self, ty: Ty) -> Val {
        self.values += 1;
        Val::Reg(self.values, ty)
    }

    /// Writes a line.
    pub fn raw(&mut self, line: &str) {
        self.text.push_str("    ");
        self.text.push_str(line);
        self.text.push('\n');
    }

    /// The name of a value; constants are written out first.
    pub fn name(&mut self, v: Val) -> String {
        match v {
            Val::Reg(n, _) => format!("%v{n}"),
            Val::Arg(n, _) => format!("%{n}"),
            Val::Int(n, ty) => {
                let Val::Reg(r, _) = self.fresh(ty) else { unreachable!() };
                let ty = ty.name();
                let n = if ty == "i1" { (n != 0).to_string() } else { n.to_string() };
                let suffix = if ty == "i1" { String::new() } else { format!(" : {ty}") };
                self.raw(&format!("%v{r} = llvm.mlir.constant({n}{suffix}) : {ty}"));
                format!("%v{r}")
            }
            Val::Float(bits) => {
                let Val::Reg(r, _) = self.fresh(Ty::F32) else { unreachable!() };
                self.raw(&format!("%v{r} = llvm.mlir.constant(0x{bits:08X} : f32) : f32"));
                format!("%v{r}")
            }
        }
    }

    /// An operation with one result, as text behind the `=`.
    pub fn op(&mut self, text: &str, ty: Ty) -> Val {
        let v = self.fresh(ty);
        let Val::Reg(n, _) = v else { unreachable!() };
        self.raw(&format!("%v{n} = {text}"));
        v
    }

    fn binary(&mut self, op: &str, a: Val, b: Val) -> Val {
        let ty = a.ty();
        debug_assert_eq!(ty, b.ty(), "{op}");
        let (a, b) = (self.name(a), self.name(b));
        self.op(&format!("llvm.{op} {a}, {b} : {}", ty.name()), ty)
    }

    /// Notes that `0 <= v < n`.
    pub fn set_below(&mut self, v: Val, n: i64) {
        self.learn(|k| k.set_below(v, n));
    }

    /// Notes something of integers, if that is asked for.
    pub fn learn(&mut self, what: impl FnOnce(&mut Known)) {
        if let Some(known) = &mut self.known {
            what(known);
        }
    }

    /// `a + b` of integers.
    pub fn add(&mut self, a: Val, b: Val) -> Val {
        match (a, b) {
            (Val::Int(x, ty), Val::Int(y, _)) => Val::Int(wrap(x + y, ty), ty),
            (Val::Int(0, _), v) | (v, Val::Int(0, _)) => v,
            _ => {
                let v = self.binary("add", a, b);
                self.learn(|k| k.sum(v, a, b));
                v
            }
        }
    }

    /// `a - b` of integers.
    pub fn sub(&mut self, a: Val, b: Val) -> Val {
        match (a, b) {
            (Val::Int(x, ty), Val::Int(y, _)) => Val::Int(wrap(x - y, ty), ty),
            (v, Val::Int(0, _)) => v,
            _ => self.binary("sub", a, b),
        }
    }

    /// `a * b` of integers.
    pub fn mul(&mut self, a: Val, b: Val) -> Val {
        match (a, b) {
            (Val::Int(x, ty), Val::Int(y, _)) => Val::Int(wrap(x.wrapping_mul(y), ty), ty),
            (Val::Int(0, ty), _) | (_, Val::Int(0, ty)) => Val::Int(0, ty),
            (Val::Int(1, _), v) | (v, Val::Int(1, _)) => v,
            (Val::Int(n, ty), v) | (v, Val::Int(n, ty)) => {
                let product = match n {
                    1.. if n & (n - 1) == 0 => self.binary("shl", v, Val::Int(n.trailing_zeros().into(), ty)),
                    _ => self.binary("mul", a, b),
                };
                self.learn(|k| k.product(product, v, n));
                product
            }
            _ => self.binary("mul", a, b),
        }
    }

    /// A number's quotient and rest by `n`, if they are known without a division.
    fn split(&mut self, a: Val, n: u32) -> Option<(Val, Val)> {
        let (terms, rest) = self.known.as_ref()?.split(a, n.into())?;
        let quotient = terms.into_iter().fold(Val::Int(0, a.ty()), |all, (v, factor)| {
            let term = self.mul(v, Val::Int(factor, a.ty()));
            self.add(all, term)
        });
        Some((quotient, rest))
    }

    /// `a / n` of a number known not to be negative.
    pub fn div(&mut self, a: Val, n: u32) -> Val {
        let ty = a.ty();
        match a {
            Val::Int(x, _) => return Val::Int(x / i64::from(n), ty),
            _ if n == 1 => return a,
            _ => {}
        }
        if let Some((quotient, _)) = self.split(a, n) {
            return quotient;
        }
        let v = match n.is_power_of_two() {
            true => self.binary("lshr", a, Val::Int(n.trailing_zeros().into(), ty)),
            false => self.binary("udiv", a, Val::Int(n.into(), ty)),
        };
        self.learn(|k| k.quotient(v, a, n.into()));
        v
    }

    /// `a mod n` of a number known not to be negative.
    pub fn rem(&mut self, a: Val, n: u32) -> Val {
        let ty = a.ty();
        match a {
            Val::Int(x, _) => return Val::Int(x % i64::from(n), ty),
            _ if n == 1 => return Val::Int(0, ty),
            _ => {}
        }
        if let Some((_, rest)) = self.split(a, n) {
            return rest;
        }
        let v = match n.is_power_of_two() {
            true => self.binary("and", a, Val::Int(i64::from(n) - 1, ty)),
            false => self.binary("urem", a, Val::Int(n.into(), ty)),
        };
        self.set_below(v, n.into());
        v
    }

    /// Integer operation by its name in the dialect (`and`, `or`, `xor`, `shl`, `lshr`, `sdiv`, `srem`), or float (`fadd`, ..).
    pub fn bin(&mut self, op: &str, a: Val, b: Val) -> Val {
        match (op, a, b) {
            ("and", Val::Int(x, ty), Val::Int(y, _)) => Val::Int(x & y, ty),
            ("and", Val::Int(0, ty), _) | ("and", _, Val::Int(0, ty)) => Val::Int(0, ty),
            ("and", Val::Int(1, Ty::I1), v) | ("and", v, Val::Int(1, Ty::I1)) => v,
            ("or" | "xor", Val::Int(0, _), v) | ("or" | "xor" | "shl" | "lshr", v, Val::Int(0, _)) => v,
            ("shl", Val::Int(x, ty), Val::Int(y, _)) => Val::Int(wrap(x << y, ty), ty),
            _ => {
                let v = self.binary(op, a, b);
                self.learn(|k| match (op, b.int()) {
                    ("and", Some(mask)) => k.set_below(v, mask + 1),
                    ("lshr", Some(by)) => k.quotient(v, a, 1 << by),
                    _ => {}
                });
                v
            }
        }
    }

    /// Notes that a float, if it is NaN, has no bits set in its lower half: rounding it to bf16 as a number leaves NaN. Sums and products of such
    /// ([`super::arith`]) are so too, as hardware gives one of the operands or its own NaN.
    pub fn set_tame(&mut self, v: Val) {
        if let Val::Reg(n, _) = v {
            self.tame.insert(n);
        }
    }

    /// Whether that is known of a float.
    pub fn is_tame(&self, v: Val) -> bool {
        match v {
            Val::Reg(n, _) => self.tame.contains(&n),
            Val::Float(bits) => bits & 0xffff == 0 || !f32::from_bits(bits).is_nan(),
            _ => false,
        }
    }

    /// Compares integers: `eq`, `ne`, `slt`, `sle`, `sgt`, `sge`, `ult`, `uge`.
    pub fn cmp(&mut self, how: &str, a: Val, b: Val) -> Val {
        if let (Val::Int(x, _), Val::Int(y, _)) = (a, b) {
            let holds = match how {
                "eq" => x == y,
                "ne" => x != y,
                "slt" | "ult" => x < y,
                "sle" | "ule" => x <= y,
                "sgt" | "ugt" => x > y,
                _ => x >= y,
            };
            return Val::Int(holds.into(), Ty::I1);
        }
        if let Some(holds) = self.known.as_ref().and_then(|k| k.test(how, a, b)) {
            return Val::Int(holds.into(), Ty::I1);
        }
        let ty = a.ty().name();
        let names = [self.name(a), self.name(b)];
        let v = self.op(&format!("llvm.icmp \"{how}\" {}, {} : {ty}", names[0], names[1]), Ty::I1);
        self.learn(|k| k.compared(v, how, a, b));
        v
    }

    /// Compares floats: `olt`, `ole`, `oeq`, `ogt`, `une`.
    pub fn fcmp(&mut self, how: &str, a: Val, b: Val) -> Val {
        let (a, b) = (self.name(a), self.name(b));
        self.op(&format!("llvm.fcmp \"{how}\" {a}, {b} : f32"), Ty::I1)
    }

    /// `c ? a : b`.
    pub fn select(&mut self, c: Val, a: Val, b: Val) -> Val {
        match c {
            Val::Int(0, _) => b,
            Val::Int(..) => a,
            _ if a == b => a,
            _ => {
                let ty = a.ty();
                let names = [c, a, b].map(|v| self.name(v)).join(", ");
                let v = self.op(&format!("llvm.select {names} : i1, {}", ty.name()), ty);
                self.learn(|k| k.choice(v, c, a, b));
                v
            }
        }
    }

    /// Conversion by its name in the dialect: `zext`, `sext`, `trunc`, `bitcast`, `sitofp`, `ptrtoint`, `inttoptr`.
    pub fn cast(&mut self, op: &str, a: Val, to: Ty) -> Val {
        match (op, a) {
            ("zext" | "sext" | "trunc", Val::Int(n, _)) => Val::Int(wrap(n, to), to),
            ("bitcast", Val::Float(bits)) if to == Ty::I32 => Val::Int(i64::from(bits as i32), Ty::I32),
            ("bitcast", Val::Int(n, Ty::I32)) if to == Ty::F32 => Val::Float(n as u32),
            _ => {
                let (from, name) = (a.ty().name(), self.name(a));
                let v = self.op(&format!("llvm.{op} {name} : {from} to {}", to.name()), to);
                if matches!(op, "zext" | "sext") {
                    self.learn(|k| k.same(v, a));
                }
                v
            }
        }
    }

    /// Calls an intrinsic of the llvm dialect on operands of one type: `fma`, `minimum`, `maximum`, `sqrt`, `fabs`.
    pub fn intrinsic(&mut self, name: &str, args: &[Val]) -> Val {
        let ty = args[0].ty();
        let types = vec![ty.name(); args.len()].join(", ");
        let args: Vec<String> = args.iter().map(|&a| self.name(a)).collect();
        self.op(&format!("llvm.intr.{name}({}) : ({types}) -> {}", args.join(", "), ty.name()), ty)
    }

    /// Inline assembly. `constraints` names outputs (`=r`), inputs, as LLVM does; `memory` adds the clobber; `effects` keeps it in
    /// place and alive.
    pub fn asm(
        &mut self,
        text: &str,
        constraints: &str,
        args: &[Val],
        outs: &[Ty],
        memory: bool,
        effects: bool,
    ) -> Vec<Val> {
        let comma = if constraints.is_empty() { "" } else { "," };
        let constraints = if memory { format!("{constraints}{comma}~{{memory}}") } else { constraints.to_owned() };
        let types: Vec<&str> = args.iter().map(|a| a.ty().name()).collect();
        let names: Vec<String> = args.iter().map(|&a| self.name(a)).collect();
        let result = match outs {
            [] => "!llvm.void".to_owned(),
            [one] => one.name().to_owned(),
            many => format!("!llvm.struct<({})>", many.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ")),
        };
        let text = text.replace('\n', "\\0A");
        let effects = if effects { "has_side_effects " } else { "" };
        let line = format!(
            "llvm.inline_asm {effects}asm_dialect = att \"{text}\", \"{constraints}\" {} : ({}) -> {result}",
            names.join(", "),
            types.join(", ")
        );
        match outs {
            [] => {
                self.raw(&line);
                Vec::new()
            }
            [one] => vec![self.op(&line, *one)],
            many => {
                // The struct has no type of ours; only its fields are used.
                let Val::Reg(n, _) = self.op(&line, Ty::I64) else { unreachable!() };
                let field = |(i, &ty): (usize, &Ty)| self.op(&format!("llvm.extractvalue %v{n}[{i}] : {result}"), ty);
                many.iter().enumerate().map(field).collect()
            }
        }
    }

    /// `base + bytes`, of an address.
    pub fn offset(&mut self, base: Val, bytes: Val) -> Val {
        if bytes.int() == Some(0) {
            return base;
        }
        let (pointer, index) = (base.ty(), bytes.ty().name());
        let base = self.name(base);
        let ty = pointer.name();
        let text = match bytes.int() {
            Some(n) => format!("llvm.getelementptr {base}[{n}] : ({ty}) -> {ty}, i8"),
            None => {
                let bytes = self.name(bytes);
                format!("llvm.getelementptr {base}[{bytes}] : ({ty}, {index}) -> {ty}, i8")
            }
        };
        self.op(&text, pointer)
    }

    /// Loads `n` neighbours of a type, aligned to all of them.
    pub fn load(&mut self, at: Val, ty: Ty, n: u32) -> Vec<Val> {
        let constant = if self.constant && at.ty() == Ty::Global { "invariant " } else { "" };
        let (pointer, at) = (at.ty().name(), self.name(at));
        let align = ty.bytes() * n;
        if n == 1 {
            return vec![self.op(
                &format!("llvm.load {at} {constant}{{alignment = {align} : i64}} : {pointer} -> {}", ty.name()),
                ty,
            )];
        }
        let vector = format!("vector<{n}x{}>", ty.name());
        let Val::Reg(v, _) =
            self.op(&format!("llvm.load {at} {constant}{{alignment = {align} : i64}} : {pointer} -> {vector}"), ty)
        else {
            unreachable!()
        };
        (0..n)
            .map(|i| {
                let i = self.name(i32(i.into()));
                self.op(&format!("llvm.extractelement %v{v}[{i} : i32] : {vector}"), ty)
            })
            .collect()
    }

    /// Stores neighbours, aligned to all of them.
    pub fn store(&mut self, at: Val, values: &[Val]) {
        let pointer = at.ty().name();
        let at = self.name(at);
        let ty = values[0].ty();
        let align = ty.bytes() * values.len() as u32;
        if let [one] = values {
            let v = self.name(*one);
            return self.raw(&format!("llvm.store {v}, {at} {{alignment = {align} : i64}} : {}, {pointer}", ty.name()));
        }
        let vector = format!("vector<{}x{}>", values.len(), ty.name());
        let mut built = self.op(&format!("llvm.mlir.undef : {vector}"), ty);
        for (i, &v) in values.iter().enumerate() {
            let (v, i, whole) = (self.name(v), self.name(i32(i as i64)), self.name(built));
            built = self.op(&format!("llvm.insertelement {v}, {whole}[{i} : i32] : {vector}"), ty);
        }
        let v = self.name(built);
        self.raw(&format!("llvm.store {v}, {at} {{alignment = {align} : i64}} : {vector}, {pointer}"));
    }

    /// A new label.
    pub fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels)
    }

    /// Starts a block with arguments of these types.
    pub fn start(&mut self, label: Label, args: &[Ty]) -> Vec<Val> {
        let values: Vec<Val> = args.iter().map(|&t| self.fresh(t)).collect();
        self.begin(label, &values);
        values
    }

    /// Starts a block with arguments of these names.
    fn begin(&mut self, label: Label, values: &[Val]) {
        let list: Vec<String> = values.iter().map(|&v| format!("{}: {}", self.name(v), v.ty().name())).collect();
        let list = if list.is_empty() { String::new() } else { format!("({})", list.join(", ")) };
        let _ = writeln!(self.text, "  ^bb{}{list}:", label.0);
    }

    fn target(&mut self, label: Label, args: &[Val]) -> String {
        if args.is_empty() {
            return format!("^bb{}", label.0);
        }
        let types: Vec<&str> = args.iter().map(|a| a.ty().name()).collect();
        let names: Vec<String> = args.iter().map(|&a| self.name(a)).collect();
        format!("^bb{}({} : {})", label.0, names.join(", "), types.join(", "))
    }

    /// Opens a loop that runs while its counter, from `lo`, is below `hi` (i32, signed): what is written next is its body.
    pub fn open_loop(&mut self, lo: Val, hi: Val, carried: &[Val]) -> Loop {
        let (head, inside, after) = (self.label(), self.label(), self.label());
        let mut args = vec![lo];
        args.extend_from_slice(carried);
        let types: Vec<Ty> = args.iter().map(|a| a.ty()).collect();
        if self.asks_last {
            let more = self.cmp("slt", lo, hi);
            self.cond_br(more, (head, &args), (after, &args));
            let args = self.start(head, &types);
            let done = types.iter().map(|&t| self.fresh(t)).collect();
            return Loop { args, done, hi, head, after };
        }
        self.br(head, &args);
        let args = self.start(head, &types);
        let more = self.cmp("slt", args[0], hi);
        self.cond_br(more, (inside, &[]), (after, &[]));
        self.start(inside, &[]);
        Loop { done: args.clone(), args, hi, head, after }
    }

    /// Notes that a loop's counter is below `inside` in its body and below `after` behind it. Where both are one value, it is known to be below the
    /// larger alone.
    pub fn bound_counter(&mut self, l: &Loop, inside: i64, after: i64) {
        let inside = if l.args[0] == l.done[0] { inside.max(after) } else { inside };
        self.set_below(l.args[0], inside);
        self.set_below(l.done[0], after);
    }

    /// Ends a loop's body: the counter grows by `step`, `next` is carried on. [`Loop::done`] is what the last round left.
    pub fn close_loop(&mut self, l: &Loop, step: Val, next: &[Val]) {
        let mut args = vec![self.add(l.args[0], step)];
        args.extend_from_slice(next);
        if self.asks_last {
            let more = self.cmp("slt", args[0], l.hi);
            self.cond_br(more, (l.head, &args), (l.after, &args));
            return self.begin(l.after, &l.done);
        }
        self.br(l.head, &args);
        self.start(l.after, &[]);
    }

    /// Floats by fours, each four one value.
    pub fn quads(&mut self, values: &[Val]) -> Vec<Val> {
        let one = |four: &[Val]| {
            let mut built = self.op(&format!("llvm.mlir.undef : {}", Ty::Quad.name()), Ty::Quad);
            for (i, &v) in four.iter().enumerate() {
                let (v, i, before) = (self.name(v), self.name(i32(i as i64)), self.name(built));
                built =
                    self.op(&format!("llvm.insertelement {v}, {before}[{i} : i32] : {}", Ty::Quad.name()), Ty::Quad);
            }
            built
        };
        values.chunks(4).map(one).collect()
    }

    /// The floats of fours.
    pub fn of_quads(&mut self, quads: &[Val]) -> Vec<Val> {
        let one = |&quad: &Val| {
            let quad = self.name(quad);
            [0, 1, 2, 3].map(|i| {
                let i = self.name(i32(i));
                self.op(&format!("llvm.extractelement {quad}[{i} : i32] : {}", Ty::Quad.name()), Ty::F32)
            })
        };
        quads.iter().flat_map(one).collect()
    }

    /// Opens a branch taken where `c` holds: what is written next is inside, up to [`Fn::close_if`] of the label.
    pub fn open_if(&mut self, c: Val) -> Label {
        let (inside, after) = (self.label(), self.label());
        self.cond_br(c, (inside, &[]), (after, &[]));
        self.start(inside, &[]);
        after
    }

    /// Ends a branch.
    pub fn close_if(&mut self, after: Label) {
        self.br(after, &[]);
        self.start(after, &[]);
    }

    /// Goes to a block.
    pub fn br(&mut self, label: Label, args: &[Val]) {
        let target = self.target(label, args);
        self.raw(&format!("llvm.br {target}"));
    }

    /// Goes to one of two blocks.
    pub fn cond_br(&mut self, c: Val, then: (Label, &[Val]), otherwise: (Label, &[Val])) {
        let c = self.name(c);
        let (a, b) = (self.target(then.0, then.1), self.target(otherwise.0, otherwise.1));
        self.raw(&format!("llvm.cond_br {c}, {a}, {b}"));
    }
}

fn wrap(n: i64, ty: Ty) -> i64 {
    match ty {
        Ty::I1 => n & 1,
        Ty::I8 => n as i8 as i64,
        Ty::I16 => n as i16 as i64,
        Ty::I32 => n as i32 as i64,
        _ => n,
    }
}
