//! What the scheduler knows of a program before it places anything: uses, fragments, the instruction of each product, operands.

use super::isa::Isa;
use super::schedule::{matrix, squeezed};
use dsc_ir::sched::Atom;
use dsc_ir::tile::{self, Program, Region, TileType, ValueId};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// How the instructions of a region refer to one another.
pub struct Analysis {
    /// The op that defines each value (none for parameters and arguments).
    pub defs: HashMap<ValueId, tile::Op>,
    /// For each value: uses, and whether all are in the region that defines it.
    pub uses: HashMap<ValueId, Uses>,
    /// Values that come from matrix products by elementwise steps.
    pub fragments: BTreeSet<ValueId>,
    /// Values that are operands of products, with the padding they need.
    pub operands: HashMap<ValueId, Operand>,
    /// The instruction of all products but those of `atoms`.
    pub atom: Atom,
    /// Fragments of another instruction.
    pub atoms: HashMap<ValueId, Atom>,
    /// What is one number for each row of a fragment, with that fragment: what its rows are reduced to, and arithmetic on that. Rows and columns
    /// of all these fragments are the same.
    pub lines: HashMap<ValueId, ValueId>,
}

/// Who reads a value.
#[derive(Clone, Copy, Default)]
pub struct Uses {
    /// How many do.
    pub count: u32,
    /// Whether some are in another region than defines it.
    pub elsewhere: bool,
    /// Elements of the largest result that reads it.
    pub reach: usize,
}

/// Multiples that rows and columns of an operand are padded to, with zeros.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// Of rows.
    pub rows: u32,
    /// Of columns.
    pub cols: u32,
}

impl Analysis {
    /// Looks at a program.
    pub fn of(program: &Program, arch: &dyn Isa) -> Analysis {
        let mut a = Analysis {
            defs: HashMap::new(),
            uses: HashMap::new(),
            fragments: BTreeSet::new(),
            operands: HashMap::new(),
            atom: Atom::Fma,
            atoms: HashMap::new(),
            lines: HashMap::new(),
        };
        let mut home = HashMap::new();
        let mut regions = 0;
        a.collect(program, &program.body, &mut regions, &mut home);
        let mut every = Vec::new();
        each(&program.body, &mut |inst| every.push(inst));
        let mut atoms = every.iter().filter_map(|i| atom(program, arch, &i.op));
        if let Some(first) = atoms.next() {
            // One for all products, as values pass between them in registers.
            a.atom = if atoms.all(|atom| atom == first) { first } else { Atom::Fma };
        }
        a.find_fragments(program, &every);
        if a.atom != Atom::Fma {
            a.find_atoms(program, arch, &every);
            if arch.keeps_lines() {
                a.find_lines(program, &every);
            }
        }
        for inst in &every {
            if let tile::Op::Dot { a: left, b: right, trans_b, .. } = &inst.op {
                let step = match (a.atom, program.tile(*left).map(|t| t.dtype)) {
                    (Atom::Fma, _) | (_, None) => 1,
                    (_, Some(dtype)) => arch.matrix_step(dtype),
                };
                a.operand(program, *left, Operand { rows: 1, cols: step });
                let right_pads =
                    if *trans_b { Operand { rows: 1, cols: step } } else { Operand { rows: step, cols: 16 } };
                a.operand(program, *right, right_pads);
            }
        }
        a
    }

    fn collect(&mut self, program: &Program, region: &Region, regions: &mut u32, home: &mut HashMap<ValueId, u32>) {
        let here = *regions;
        *regions += 1;
        home.extend(region.args.iter().map(|&v| (v, here)));
        let used = |uses: &mut HashMap<ValueId, Uses>, home: &HashMap<ValueId, u32>, v: ValueId, reach: usize| {
            let u = uses.entry(v).or_default();
            u.count += 1;
            u.elsewhere |= home.get(&v) != Some(&here);
            u.reach = u.reach.max(reach);
        };
        for inst in &region.insts {
            let reach = inst.results.iter().filter_map(|&r| program.tile(r)).map(TileType::elements).max().unwrap_or(0);
            for v in tile::operands(&inst.op) {
                used(&mut self.uses, home, v, reach);
            }
            match &inst.op {
                tile::Op::For { body, .. } => self.collect(program, body, regions, home),
                tile::Op::If { then, otherwise, .. } => {
                    self.collect(program, then, regions, home);
                    self.collect(program, otherwise, regions, home);
                }
                op => {
                    self.defs.extend(inst.results.iter().map(|&r| (r, op.clone())));
                }
            }
            home.extend(inst.results.iter().map(|&r| (r, here)));
        }
        for &v in &region.yields {
            used(&mut self.uses, home, v, 0);
        }
    }

    /// Fixpoint: results of products, maps of the same shape over them, and what loops and branches carry of them.
    fn find_fragments(&mut self, program: &Program, every: &[&tile::Inst]) {
        let shape = |v: ValueId| program.tile(v).map(|t| squeezed(&t.shape));
        loop {
            let before = self.fragments.len();
            for inst in every {
                match &inst.op {
                    tile::Op::Dot { .. } => self.fragments.extend(&inst.results),
                    tile::Op::Map { inputs, .. } => {
                        let result = inst.results[0];
                        let wide = program.tile(result).is_some_and(|t| t.elements() > 1);
                        if wide && inputs.iter().any(|&i| self.fragments.contains(&i) && shape(i) == shape(result)) {
                            self.fragments.insert(result);
                        }
                    }
                    tile::Op::Reshape { x, .. }
                        if self.fragments.contains(x) && keeps_matrix(program, *x, inst.results[0]) =>
                    {
                        self.fragments.insert(inst.results[0]);
                    }
                    tile::Op::For { init, body, .. } => {
                        for (i, &arg) in body.args[1..].iter().enumerate() {
                            let group = [init[i], body.yields[i], arg, inst.results[i]];
                            let product = self.fragments.contains(&group[1]);
                            if product && program.tile(arg).is_some_and(|t| t.shape.len() == 2 && t.elements() > 1) {
                                self.fragments.extend([arg, inst.results[i]]);
                            }
                        }
                    }
                    tile::Op::If { then, otherwise, .. } => {
                        for (i, &result) in inst.results.iter().enumerate() {
                            if self.fragments.contains(&then.yields[i]) && self.fragments.contains(&otherwise.yields[i])
                            {
                                self.fragments.insert(result);
                            }
                        }
                    }
                    _ => {}
                }
            }
            if self.fragments.len() == before {
                return;
            }
        }
    }

    /// Fragments between which values pass in registers have one layout: the better one, if it does for all products among them.
    fn find_atoms(&mut self, program: &Program, arch: &dyn Isa, every: &[&tile::Inst]) {
        let mut groups = Groups::default();
        let elements = |v: ValueId| program.tile(v).map(TileType::elements);
        for inst in every {
            let joined: Vec<Vec<ValueId>> = match &inst.op {
                tile::Op::Dot { acc, .. } => vec![inst.results.iter().chain(acc).copied().collect()],
                tile::Op::Map { inputs, .. } => {
                    let r = inst.results[0];
                    let same = inputs.iter().copied().filter(|&i| elements(i) == elements(r));
                    vec![same.chain([r]).collect()]
                }
                tile::Op::Reshape { x, .. } => vec![vec![*x, inst.results[0]]],
                tile::Op::For { init, body, .. } => {
                    (0..init.len()).map(|i| vec![init[i], body.yields[i], body.args[i + 1], inst.results[i]]).collect()
                }
                tile::Op::If { then, otherwise, .. } => inst
                    .results
                    .iter()
                    .enumerate()
                    .map(|(i, &r)| vec![then.yields[i], otherwise.yields[i], r])
                    .collect(),
                _ => Vec::new(),
            };
            for group in joined {
                let fragments: Vec<ValueId> = group.into_iter().filter(|v| self.fragments.contains(v)).collect();
                fragments.windows(2).for_each(|pair| groups.join(pair[0], pair[1]));
            }
        }
        let mut better: BTreeMap<ValueId, Option<Atom>> = BTreeMap::new();
        for inst in every {
            let tile::Op::Dot { a, trans_b, .. } = &inst.op else { continue };
            let r = inst.results[0];
            let atom = match (program.tile(*a), program.tile(r)) {
                (Some(a), Some(r)) if !trans_b => arch.columns_atom(a.dtype, matrix(&r.shape)[1]),
                _ => None,
            };
            better.entry(groups.root(r)).and_modify(|b| *b = b.filter(|b| Some(*b) == atom)).or_insert(atom);
        }
        for &v in &self.fragments {
            if let Some(Some(atom)) = better.get(&groups.root(v)) {
                self.atoms.insert(v, *atom);
            }
        }
    }

    /// Fixpoint, as of fragments. None where fragments of several forms are reduced, or a product has one column itself.
    fn find_lines(&mut self, program: &Program, every: &[&tile::Inst]) {
        let shape = |v: ValueId| program.tile(v).map_or(&[][..], |t| &t.shape);
        let column = |v: ValueId| matches!(shape(v), [rows, 1] if *rows > 1);
        loop {
            let before = self.lines.len();
            for inst in every {
                match &inst.op {
                    tile::Op::Reduce { x, axis: 1, .. }
                        if self.fragments.contains(x) && shape(*x).len() == 2 && column(inst.results[0]) =>
                    {
                        self.lines.insert(inst.results[0], *x);
                    }
                    tile::Op::Map { inputs, .. } if column(inst.results[0]) => {
                        if let Some(of) = inputs.iter().find_map(|i| self.lines.get(i)).copied() {
                            self.lines.entry(inst.results[0]).or_insert(of);
                        }
                    }
                    tile::Op::For { body, .. } => {
                        for (i, &arg) in body.args[1..].iter().enumerate() {
                            if let Some(of) = self.lines.get(&body.yields[i]).copied() {
                                self.lines.entry(arg).or_insert(of);
                                self.lines.entry(inst.results[i]).or_insert(of);
                            }
                        }
                    }
                    _ => {}
                }
            }
            if self.lines.len() == before {
                break;
            }
        }
        let mut forms = self.lines.values().map(|&v| (shape(v), self.atoms.get(&v)));
        let first = forms.next();
        let differ = forms.any(|form| Some(form) != first);
        if differ
            || has_column_products(
                every.iter().map(|i| (&i.op, shape(i.results.first().copied().unwrap_or(ValueId(0))))),
            )
        {
            self.lines.clear();
        }
    }

    /// Notes that a value is read as a matrix operand: the value itself, or what it is a view of with the same rows.
    fn operand(&mut self, program: &Program, v: ValueId, pads: Operand) {
        let mut root = v;
        while let Some(tile::Op::Reshape { x, .. }) = self.defs.get(&root) {
            if program.tile(*x).and_then(|t| t.shape.last()) != program.tile(root).and_then(|t| t.shape.last()) {
                break;
            }
            root = *x;
        }
        for v in [root, v] {
            let o = self.operands.entry(v).or_insert(Operand { rows: 1, cols: 1 });
            *o = Operand { rows: o.rows.max(pads.rows), cols: o.cols.max(pads.cols) };
        }
    }
}

/// Whether a product has one column: ops with the shapes of their results.
pub fn has_column_products<'a>(mut ops: impl Iterator<Item = (&'a tile::Op, &'a [u32])>) -> bool {
    ops.any(|(op, shape)| matches!(op, tile::Op::Dot { .. }) && matrix(shape)[1] == 1)
}

/// Values in groups that have something in common.
#[derive(Default)]
struct Groups {
    parents: HashMap<ValueId, ValueId>,
}

impl Groups {
    fn root(&self, mut v: ValueId) -> ValueId {
        while let Some(&parent) = self.parents.get(&v) {
            v = parent;
        }
        v
    }

    fn join(&mut self, a: ValueId, b: ValueId) {
        let (a, b) = (self.root(a), self.root(b));
        if a != b {
            self.parents.insert(b, a);
        }
    }
}

/// The instruction of a product; none for other ops.
fn atom(program: &Program, arch: &dyn Isa, op: &tile::Op) -> Option<Atom> {
    let tile::Op::Dot { a, b, trans_b, .. } = op else { return None };
    let atom = match [a, b].map(|&v| program.tile(v).map(|t| t.dtype)) {
        [Some(a), Some(b)] if a == b => arch.matrix_atom(a, *trans_b),
        _ => None,
    };
    Some(atom.unwrap_or(Atom::Fma))
}

/// Visits every instruction of a region, those of loops and branches inside included.
pub fn each<'a>(region: &'a Region, visit: &mut dyn FnMut(&'a tile::Inst)) {
    for inst in &region.insts {
        visit(inst);
        match &inst.op {
            tile::Op::For { body, .. } => each(body, visit),
            tile::Op::If { then, otherwise, .. } => {
                each(then, visit);
                each(otherwise, visit);
            }
            _ => {}
        }
    }
}

/// Whether a reshape of a fragment leaves its rows and columns what they are.
fn keeps_matrix(program: &Program, from: ValueId, to: ValueId) -> bool {
    match (program.tile(from), program.tile(to)) {
        (Some(a), Some(b)) => matrix(&a.shape) == matrix(&b.shape),
        _ => false,
    }
}
