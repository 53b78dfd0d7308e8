//! Model front end: from a Hugging Face folder to the graph IR.

pub mod config;
pub mod model;
