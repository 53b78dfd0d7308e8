//! What a user of dsc starts from.
//!
//! * `tiny-model/`: a small trained model in the official layout, with golden outputs.
//! * `deepseek-v3.2/`, `glm-5/`: the real configs; they compile without weights.
//! * `examples/embed.rs`: a program that embeds the runtime.
//! * `kernels.md`: the kernels by themselves: change a schedule, compile again, compare. `c/topk.c` calls one from C.
