//! The loops of a routine: rows, vectors along them, reductions, and what moves with them.

use super::*;

impl Gen<'_> {
    pub(super) fn emit(&mut self) -> Option<()> {
        for r in SAVED {
            self.a.push(r);
        }
        if !self.spec.n.is_multiple_of(LANES) {
            self.a.mov_imm(RAX, (1 << (self.spec.n % LANES)) - 1);
            self.a.kmovw(K_TAIL, RAX);
        }
        let mut next = POINTERS.iter();
        for (i, access) in self.spec.accesses.iter().enumerate() {
            match access.kind {
                Kind::Row(_) | Kind::Repeated(_) => {
                    let r = *next.next()?;
                    self.a.load64(r, at(ARGS, i as i32 * 8));
                    self.pointers[i] = Some(r);
                }
                Kind::Splat => {
                    let r = self.reg()?;
                    self.a.v(Width::Z, PBROADCASTD, r, 0, at(ARGS, i as i32 * 8));
                    self.pinned[i] = Some(r);
                }
                Kind::Coordinate(_) => self.pinned[i] = Some(self.reg()?),
                Kind::Constant(_) => {}
            }
        }
        // What a row repeats, if it does not change within the row.
        let per_row: Vec<usize> = (0..self.spec.accesses.len())
            .filter(|&i| {
                let a = &self.spec.accesses[i];
                matches!(a.kind, Kind::Repeated(_)) && a.middle == Step::Const(0) && i > 0
            })
            .collect();
        for &i in &per_row {
            self.pinned[i] = Some(self.reg()?);
        }
        let top = (self.spec.rows > 1).then(|| {
            self.a.mov_imm(ROWS, self.spec.rows);
            self.a.here_aligned()
        });
        for &i in &per_row {
            let (r, p) = (self.pinned[i]?, self.pointers[i]?);
            self.a.v(Width::Z, BROADCASTSS, r, 0, at(p, 0));
        }
        match self.spec.form {
            Form::Map => self.map_row()?,
            Form::ReduceInner(kind) => self.reduce_row(kind)?,
            Form::ReduceMiddle(kind, count) => self.reduce_columns(kind, count)?,
        }
        if let Some(top) = top {
            for i in 0..self.spec.accesses.len() {
                self.step_access(i, self.spec.accesses[i].row);
            }
            self.a.dec(ROWS);
            self.a.jump_if(NOT_ZERO, top);
        }
        self.a.vzeroupper();
        for r in SAVED.into_iter().rev() {
            self.a.pop(r);
        }
        self.a.ret();
        Some(())
    }

    /// Moves an access along an axis that is not `i`. A coordinate's base is kept in its argument.
    fn step_access(&mut self, i: usize, step: Step) {
        match (self.pointers[i], step) {
            (_, Step::Const(0)) => {}
            (Some(p), Step::Const(c)) => self.a.add_imm(p, c as i32),
            (Some(p), Step::Arg(word)) => self.a.add_mem(p, self.word(word as usize)),
            (None, Step::Const(c)) if matches!(self.spec.accesses[i].kind, Kind::Coordinate(_)) => {
                self.a.add_mem32_imm(self.word(i), c as i32);
            }
            (None, _) => {}
        }
    }

    /// Sets coordinates to the first vector of the row.
    fn start_coordinates(&mut self) -> Option<()> {
        for i in 0..self.spec.accesses.len() {
            if let Kind::Coordinate(step) = self.spec.accesses[i].kind {
                let r = self.pinned[i]?;
                self.a.v(Width::Z, PBROADCASTD, r, 0, self.word(i));
                if step != 0 {
                    let label = self.constants_of((0..i64::from(LANES)).map(|lane| (step * lane) as u32).collect());
                    let t = self.reg()?;
                    self.a.v_const(Width::Z, MOVUPS_LOAD, t, label);
                    self.z(PADDD, r, r, t);
                    self.give(t);
                }
            }
        }
        Some(())
    }

    fn advance_coordinates(&mut self) -> Option<()> {
        for i in 0..self.spec.accesses.len() {
            if let Kind::Coordinate(step) = self.spec.accesses[i].kind
                && step != 0
            {
                let r = self.pinned[i]?;
                self.zc(PADDD, r, r, (step * i64::from(LANES)) as u32);
            }
        }
        Some(())
    }

    /// Runs `body` for each whole vector of a row and then for the partial one.
    fn along(&mut self, body: &mut dyn FnMut(&mut Self) -> Option<()>) -> Option<()> {
        let whole = self.spec.n / LANES * LANES;
        self.start_coordinates()?;
        self.a.mov_imm(INDEX, 0);
        if whole > 0 {
            let top = (whole > LANES).then(|| self.a.here_aligned());
            body(self)?;
            self.advance_coordinates()?;
            self.a.add_imm(INDEX, LANES as i32);
            if let Some(top) = top {
                self.a.cmp_imm(INDEX, whole as i32);
                self.a.jump_if(BELOW, top);
            }
        }
        if whole != self.spec.n {
            self.tail = true;
            body(self)?;
            self.tail = false;
        }
        Some(())
    }

    fn map_row(&mut self) -> Option<()> {
        self.along(&mut |g| {
            let r = g.value()?;
            g.store_vector(r)?;
            g.give(r);
            Some(())
        })
    }

    /// The element at `INDEX` of a contiguous access.
    pub(super) fn element(&self, i: usize, bytes: i64) -> Option<Mem> {
        Some(Mem { base: self.pointers[i]?, index: Some((INDEX, bytes as u8)), disp: 0 })
    }

    fn store_vector(&mut self, r: u8) -> Option<()> {
        let dtype = self.spec.accesses[0].dtype;
        let bytes = crate::cpu::tile::element_bytes(dtype);
        let m = self.element(0, bytes)?;
        let op = match bytes {
            4 => MOVUPS_STORE,
            2 => PMOVDW,
            _ => PMOVDB,
        };
        let mask = if self.tail { K_TAIL } else { 0 };
        self.a.z_merging(op, r, 0, m, mask);
        Some(())
    }

    fn combine(&mut self, kind: ReduceKind, acc: u8, x: u8) {
        let float = self.spec.accesses[0].dtype == DType::F32;
        let mask = if self.tail { K_TAIL } else { 0 };
        let op = match (kind, float) {
            (ReduceKind::Sum, true) => ADDPS,
            (ReduceKind::Sum, false) => PADDD,
            (ReduceKind::Max, true) => MAXPS,
            (ReduceKind::Max, false) => PMAXSD,
        };
        // `maxps` gives its second operand if either is NaN: the accumulator stays clean, and NaN is noted beside it.
        self.a.z_merging(op, acc, x, acc, mask);
        if kind == ReduceKind::Max && float {
            self.a.z_compare(CMPPS, K_TEMP, x, x, 3);
            // Lanes beyond the row are zero when they come from loads; others could only be NaN if an operand is.
            if self.tail {
                self.a.kandw(K_TEMP, K_TAIL);
            }
            self.a.korw(K_NAN, K_TEMP);
        }
    }

    fn identity(&mut self, kind: ReduceKind, r: u8) {
        match (kind, self.spec.accesses[0].dtype) {
            (ReduceKind::Sum, _) => self.a.zero(r),
            (ReduceKind::Max, DType::F32) => self.splat_constant(r, f32::NEG_INFINITY.to_bits()),
            (ReduceKind::Max, _) => self.splat_constant(r, i32::MIN as u32),
        }
        if kind == ReduceKind::Max {
            self.a.kclear(K_NAN);
        }
    }

    /// One number a row. Two accumulators take vectors by turns through a swap, which costs nothing: registers are renamed.
    fn reduce_row(&mut self, kind: ReduceKind) -> Option<()> {
        let (acc, other, spare) = (self.reg()?, self.reg()?, self.reg()?);
        self.identity(kind, acc);
        self.identity(kind, other);
        self.along(&mut |g| {
            let r = g.value()?;
            g.mov(spare, acc);
            g.mov(acc, other);
            g.mov(other, spare);
            g.combine(kind, acc, r);
            g.give(r);
            Some(())
        })?;
        let float = self.spec.accesses[0].dtype == DType::F32;
        let op = match (kind, float) {
            (ReduceKind::Sum, true) => ADDPS,
            (ReduceKind::Sum, false) => PADDD,
            (ReduceKind::Max, true) => MAXPS,
            (ReduceKind::Max, false) => PMAXSD,
        };
        self.z(op, acc, acc, other);
        self.a.vi(Width::Z, EXTRACTF64X4, acc, 0, spare, 1);
        self.a.v(Width::Y, op, acc, acc, spare);
        self.a.vi(Width::Y, EXTRACTF128, acc, 0, spare, 1);
        self.a.v(Width::X, op, acc, acc, spare);
        for shuffle in [0x4e, 0xb1] {
            self.a.vi(Width::X, PSHUFD, spare, 0, acc, shuffle);
            self.a.v(Width::X, op, acc, acc, spare);
        }
        if kind == ReduceKind::Max && float {
            self.nan_if_noted(acc);
        }
        let p = self.pointers[0]?;
        self.a.v(Width::X, MOVSS_STORE, acc, 0, at(p, 0));
        for r in [acc, other, spare] {
            self.give(r);
        }
        Some(())
    }

    /// All lanes NaN if any lane was.
    fn nan_if_noted(&mut self, acc: u8) {
        let skip = self.a.label();
        self.a.kmovw_out(RAX, K_NAN);
        self.a.test32(RAX);
        self.a.jump_if(ZERO, skip);
        self.splat_constant(acc, f32::NAN.to_bits());
        self.a.bind(skip);
    }

    /// A vector a row, over `count` steps of the middle axis.
    fn reduce_columns(&mut self, kind: ReduceKind, count: u32) -> Option<()> {
        let acc = self.reg()?;
        let coordinates =
            self.spec.accesses.iter().any(|a| matches!(a.kind, Kind::Coordinate(_)) && a.middle != Step::Const(0));
        if coordinates {
            return None;
        }
        self.along(&mut |g| {
            g.identity(kind, acc);
            g.a.mov_imm(MIDDLE, count);
            let top = g.a.here_aligned();
            let r = g.value()?;
            // The store is masked; here all lanes may take part.
            let tail = std::mem::replace(&mut g.tail, false);
            g.combine(kind, acc, r);
            g.tail = tail;
            g.give(r);
            for i in 1..g.spec.accesses.len() {
                g.step_access(i, g.spec.accesses[i].middle);
            }
            g.a.dec(MIDDLE);
            g.a.jump_if(NOT_ZERO, top);
            for i in 1..g.spec.accesses.len() {
                g.step_back(i, count)?;
            }
            if kind == ReduceKind::Max && g.spec.accesses[0].dtype == DType::F32 {
                let label = g.constant(f32::NAN.to_bits());
                g.a.kmovk(K_TEMP, K_NAN);
                g.a.v_masked_splat_const_load(acc, label, K_TEMP);
            }
            g.store_vector(acc)?;
            Some(())
        })?;
        self.give(acc);
        Some(())
    }

    /// Undoes `count` steps of the middle axis.
    fn step_back(&mut self, i: usize, count: u32) -> Option<()> {
        match (self.pointers[i], self.spec.accesses[i].middle) {
            (Some(p), Step::Const(c)) if c != 0 => {
                self.a.add_imm(p, i32::try_from(-c * i64::from(count)).ok()?);
            }
            (Some(p), Step::Arg(word)) => {
                self.a.load64(R15, self.word(word as usize));
                self.a.imul_imm(R15, R15, count as i32);
                self.a.sub(p, R15);
            }
            _ => {}
        }
        Some(())
    }
}
