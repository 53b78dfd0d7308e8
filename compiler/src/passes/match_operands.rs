//! Gives the operands of every product one storage type, on targets that multiply such types only fast.
//!
//! ```text
//! before                                             after (target with fp8 matrix units, deployed)
//! c = cache_latent s, pages : bf16 [S, C, L]         c = cache_latent s, pages : quant[1x128] [S, C, L]
//! y = linear c, w : quant[128x128]                   y = linear c, w
//! o = mha_attention[..] ..                           o = mha_attention[.., narrow=true] ..
//! o = mqa_attention[..] ..                           o = mqa_attention[.., narrow=true] ..
//! ```
//!
//! Legal: the codes of a cached latent are the quantised form of what they stand for (quantising to powers of two twice is
//! quantising once), so the product is the one that any other quantised activation gets. Probabilities in bf16 are what deployments
//! multiply with; their sum stays in f32. Both are choices of `deployed` numerics: `exact` is left alone.
//!
//! Effect: all matrix products are e4m3 x e4m3 or bf16 x bf16, which matrix units do, and never f32.

use super::Cx;
use dsc_ir::artifact::Numerics;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, Quant, StateFormat, TensorType, Value, ValueType};

/// See the top of the file. Returns the number of nodes changed.
pub fn match_operands(graph: &mut Graph, cx: &Cx) -> usize {
    if !cx.target_fp8 || cx.numerics != Numerics::Deployed {
        return 0;
    }
    let mut changed = 0;
    for node in graph.order() {
        if feeds_codes(graph, node) {
            let codes = Elem::Quant(Quant { block: [1, StateFormat::GROUP], pow2: true });
            let old = graph.tensor(Value { node, output: 0 }).clone();
            graph.dag[node].outputs[0] = ValueType::Tensor(TensorType { elem: codes, ..old });
            changed += 1;
        }
        if let Op::MhaAttention { narrow, .. } | Op::MqaAttention { narrow, .. } = &mut graph.dag[node].op {
            *narrow = true;
            changed += 1;
        }
    }
    changed
}

/// Whether all that reads an expanded latent, cached in fp8, multiplies it with e4m3 weights of the same blocks.
fn feeds_codes(graph: &Graph, node: NodeId) -> bool {
    if graph.dag[node].op != Op::CacheLatent {
        return false;
    }
    let latent = Value { node, output: 0 };
    let users = graph.users(latent);
    let multiplies = |&(user, input): &(NodeId, u32)| {
        let weight = graph.inputs(user).get(1).map(|&w| graph.ty(w));
        let same = matches!(weight, Some(ValueType::Tensor(TensorType { elem: Elem::Quant(q), .. })) if q.block[1] == StateFormat::GROUP);
        input == 0 && graph.dag[user].op == Op::Linear && same
    };
    let fp8 = matches!(graph.ty(graph.inputs(node)[0]), ValueType::State(StateFormat::LatentFp8 { .. }));
    let plain = matches!(graph.tensor(latent).elem, Elem::Plain(_));
    fp8 && plain && !users.is_empty() && users.iter().all(multiplies) && !graph.is_output(latent)
}
