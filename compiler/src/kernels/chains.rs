//! Independent results of a body of rows, for blocks of their own.
//!
//! A body may make several results that share nothing but what they read: a token's latent, its rope part, its index key, the query's latent. In a
//! step of few tokens a launch takes as long as what one block does, one result after the other. So each gets an axis of the grid:
//!
//! ```text
//! block = token                     block = token, chain
//!     y = ..; store y                   if chain == 0 { y = ..; store y }
//!     z = ..; store z         ──▶       if chain == 1 { z = ..; store z }
//! ```
//!
//! What a cache holds of a token counts apart: its arrays are independent. So do columns of a head's product, which nothing but the product
//! computes.

use dsc_ir::graph::{Graph, NodeId, Op, Value, ValueType};
use std::collections::BTreeSet;

/// A result of a body, or one array of a cache that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Its number among the body's outputs.
    pub output: u32,
    /// The array's number among those that its cache has.
    pub array: Option<usize>,
}

/// Results that a block makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub pieces: Vec<Piece>,
    /// Blocks that have so many columns of it each; of all of them, where it is one.
    pub blocks: u32,
}

/// The chains of a body in at most so many blocks; columns of products in tiles of `tile_n`, unless that is 0. In the order of the outputs.
pub fn chains(body: &Graph, most: u32, tile_n: u32) -> Vec<Chain> {
    let mut found: Vec<(Chain, BTreeSet<NodeId>)> = Vec::new();
    for (piece, roots) in pieces(body) {
        let mut made = BTreeSet::new();
        roots.into_iter().for_each(|root| computed(body, root, &mut made));
        let mut chain = Chain { pieces: Vec::new(), blocks: 1 };
        // It joins what it shares something with, where the first of that is.
        let mut at = found.len();
        for i in (0..found.len()).rev() {
            if !found[i].1.is_disjoint(&made) {
                let (joined, others) = found.remove(i);
                chain.pieces.splice(0..0, joined.pieces);
                made.extend(others);
                at = i;
            }
        }
        chain.pieces.push(piece);
        found.insert(at, (chain, made));
    }
    let mut chains: Vec<Chain> = found.into_iter().map(|(chain, _)| chain).collect();
    while chains.len() > most.max(1) as usize {
        let last = chains.pop().map_or(Vec::new(), |chain| chain.pieces);
        chains.last_mut().expect("at least one is left").pieces.extend(last);
    }
    for i in 0..chains.len() {
        let others = chains.iter().map(|c| c.blocks).sum::<u32>() - chains[i].blocks;
        chains[i].blocks = tiles(body, &chains[i], tile_n).filter(|&n| others + n <= most).unwrap_or(1);
    }
    chains
}

/// The parts of the outputs that may be independent, and what each is made of.
fn pieces(body: &Graph) -> Vec<(Piece, Vec<Value>)> {
    let mut pieces = Vec::new();
    for (output, &(_, value)) in body.outputs.iter().enumerate() {
        let inputs = body.inputs(value.node);
        let writes = |v: Value| body.dag[v.node].op == Op::CacheWrite;
        let output = output as u32;
        match body.ty(value) {
            ValueType::State(_) if writes(value) && !writes(inputs[0]) => {
                let arrays = inputs[2..].iter().enumerate();
                pieces.extend(arrays.map(|(i, &x)| (Piece { output, array: Some(i) }, vec![inputs[1], x])));
            }
            _ => pieces.push((Piece { output, array: None }, vec![value])),
        }
    }
    pieces
}

/// The nodes that a value makes something of: not what is read, nor views of it, nor sums of parts of which each slice is summed by itself.
fn computed(body: &Graph, value: Value, made: &mut BTreeSet<NodeId>) {
    let inputs = body.inputs(value.node);
    match body.dag[value.node].op {
        Op::Arg(_) => return,
        Op::SliceLast { .. } if body.dag[inputs[0].node].op == Op::SumPartials => return,
        Op::SliceLast { .. } | Op::Reshape => {}
        _ => {
            made.insert(value.node);
        }
    }
    inputs.into_iter().for_each(|v| computed(body, v, made));
}

/// How many blocks share the columns of a chain that is one head's product and nothing else.
fn tiles(body: &Graph, chain: &Chain, tile_n: u32) -> Option<u32> {
    let &[Piece { output, array: None }] = chain.pieces.as_slice() else { return None };
    let (_, value) = body.outputs[output as usize];
    let mut made = BTreeSet::new();
    computed(body, value, &mut made);
    let alone = matches!(body.dag[value.node].op, Op::HeadLinear { .. }) && made.len() == 1;
    let columns = body.ty(value).tensor()?.shape.last()?.constant()?;
    (alone && tile_n > 0 && columns.is_multiple_of(tile_n)).then(|| columns / tile_n)
}
