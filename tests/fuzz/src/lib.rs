//! What fuzz targets share.

use dsc_ir::SymValues;
use dsc_ir::tile::interp::block_count;
use dsc_ir::tile::{Index, Op, Program, Region, Type};

/// The texts of an input. Seeds are file tests, whose harness has the lines that start with `;`.
pub fn texts(input: &str) -> Vec<String> {
    let lines: Vec<&str> = input.split('\n').collect();
    lines.split(|line| line.starts_with(';')).map(|lines| lines.join("\n")).collect()
}

/// What a program may cost to be run; see [`cost`].
pub const MAX_COST: u64 = 1 << 16;

/// An upper bound of the elements written; saturates where a loop's bound comes from data.
pub fn cost(program: &Program, syms: &SymValues) -> u64 {
    let blocks = block_count(program, syms).unwrap_or(u64::MAX);
    blocks.saturating_mul(region_cost(program, &program.body, syms).saturating_add(1))
}

fn region_cost(program: &Program, region: &Region, syms: &SymValues) -> u64 {
    let mut known = Vec::new();
    let mut total = 1u64;
    for inst in &region.insts {
        if let (Op::Sym(sym), Some(&v)) = (&inst.op, inst.results.first()) {
            known.push((v, i64::from(syms.get(*sym))));
        }
        let bound = |i: &Index| match i {
            Index::Const(c) => Some(*c),
            Index::Value(v) => known.iter().find(|(k, _)| k == v).map(|(_, n)| *n),
        };
        let inner = match &inst.op {
            Op::For { lo, hi, step, body, .. } => match (bound(lo), bound(hi)) {
                (Some(lo), Some(hi)) => {
                    let rounds = (hi.saturating_sub(lo).max(0) as u64).div_ceil(u64::from((*step).max(1)));
                    rounds.saturating_mul(region_cost(program, body, syms))
                }
                _ => u64::MAX,
            },
            Op::If { then, otherwise, .. } => {
                region_cost(program, then, syms).max(region_cost(program, otherwise, syms))
            }
            Op::Dot { a, b, .. } => elements(program.ty(*a)).saturating_mul(elements(program.ty(*b))),
            Op::Map { body, .. } => {
                let width: u64 = inst.results.iter().map(|&v| elements(program.ty(v))).sum();
                width.saturating_mul(body.insts.len() as u64)
            }
            Op::Store { value, .. } | Op::Scatter { value, .. } => elements(program.ty(*value)),
            _ => 0,
        };
        let made = inst.results.iter().fold(0u64, |n, &v| n.saturating_add(elements(program.ty(v))));
        total = total.saturating_add(inner).saturating_add(made);
    }
    total
}

fn elements(ty: &Type) -> u64 {
    match ty {
        Type::Tile(t) => t.shape.iter().map(|&n| u64::from(n)).product(),
        Type::View(_) => 0,
        Type::Topk { rows, k } => u64::from(*rows) * u64::from(*k),
    }
}
