//! Stores f32 matrices as bf16 where that loses nothing.
//!
//! ```text
//! before                              after (a checkpoint whose matrices are all bf16-exact)
//! w = weight 7 : f32 [N, K]           w = weight 7 : bf16 [N, K]
//! ```
//!
//! Legal: [`Cx::bf16_weights`] says that every matrix of the checkpoint is stored in bf16, or in e4m3 with power-of-two block scales:
//! either way each element has at most 8 significant bits, so bf16 holds it exactly. The driver looks at the weights themselves
//! (configs promise `ue8m0` scales that files do not keep); the runtime refuses other weights for an `exact` artifact.
//!
//! Effect: half the bytes of every matrix-vector product, which is what decoding at small batches is bound by.

use super::Cx;
use dsc_ir::DType;
use dsc_ir::artifact::WeightSource;
use dsc_ir::graph::{Elem, Graph, NodeId, Op, ValueType};

/// See the top of the file. Returns the number of weights narrowed.
pub fn narrow_weights(graph: &mut Graph, cx: &Cx) -> usize {
    if !cx.bf16_weights {
        return 0;
    }
    let mut narrowed = 0;
    for weight in &mut graph.weights {
        let matrix = weight.ty.shape.len() >= 2 && matches!(weight.source, WeightSource::Tensors(_));
        if matrix && weight.ty.elem == Elem::Plain(DType::F32) {
            weight.ty.elem = Elem::Plain(DType::Bf16);
            narrowed += 1;
        }
    }
    let nodes: Vec<NodeId> = graph.dag.node_indices().collect();
    for node in nodes {
        if let Op::Weight(i) = graph.dag[node].op {
            graph.dag[node].outputs[0] = ValueType::Tensor(graph.weights[i as usize].ty.clone());
        }
    }
    narrowed
}
