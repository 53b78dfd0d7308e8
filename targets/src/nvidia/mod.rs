//! The NVIDIA targets: tile programs to PTX, and to cubins where there is a ptxas.

pub mod arch;
