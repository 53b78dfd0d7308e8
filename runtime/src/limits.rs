//! How fast a device can be at best: what benches compare with.

use dsc_ir::DType;
use dsc_ir::work::Cost;

/// Rates that no kernel exceeds.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Limits {
    /// Bytes a second, from the memory that the working set fits in.
    pub bytes_per_s: f64,
    /// FLOP a second of matrix products by operand type; a type that is not listed has the rate of the first.
    pub flop_per_s: Vec<(DType, f64)>,
    /// Where the numbers come from.
    pub source: String,
}

impl Limits {
    /// Seconds that this work takes at least: the slower of moving and multiplying.
    pub fn seconds(&self, cost: &Cost) -> f64 {
        let rate = |dtype: &DType| {
            let known = self.flop_per_s.iter().find(|(d, _)| d == dtype).or(self.flop_per_s.first());
            known.map_or(f64::INFINITY, |(_, rate)| *rate)
        };
        let multiplying: f64 = cost.flop.iter().map(|(dtype, flop)| flop / rate(dtype)).sum();
        multiplying.max(cost.bytes / self.bytes_per_s)
    }

    /// Known limits of a GPU, by a part of the name its driver gives; the dense rates of the data sheet.
    pub fn of_gpu(name: &str) -> Option<Limits> {
        // Name, GB/s, TFLOP/s of f32 (outside the matrix units), bf16 and e4m3.
        const KNOWN: [(&str, f64, f64, f64, f64); 4] = [
            ("H200", 4800.0, 67.0, 989.0, 1979.0),
            ("H100 NVL", 3938.0, 60.0, 835.0, 1671.0),
            ("H100 PCIe", 2039.0, 51.0, 756.0, 1513.0),
            ("H100", 3352.0, 67.0, 989.0, 1979.0),
        ];
        let (part, bytes, f32s, bf16, e4m3) = KNOWN.into_iter().find(|(part, ..)| name.contains(part))?;
        Some(Limits {
            bytes_per_s: bytes * 1e9,
            flop_per_s: vec![(DType::F32, f32s * 1e12), (DType::Bf16, bf16 * 1e12), (DType::E4m3, e4m3 * 1e12)],
            source: format!("data sheet of {part}"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_moving_and_multiplying_counts() {
        let limits = Limits::of_gpu("NVIDIA H200").unwrap();
        let cost = |bytes, flop| Cost { bytes, flop: [(DType::Bf16, flop)].into() };
        assert_eq!(limits.seconds(&cost(4.8e12, 0.0)), 1.0);
        assert_eq!(limits.seconds(&cost(4.8e12, 2.0 * 989e12)), 2.0);
        assert!(Limits::of_gpu("GeForce 256").is_none());
        let cpu = Limits { flop_per_s: vec![(DType::F32, 1e9)], ..limits };
        assert_eq!(cpu.seconds(&cost(0.0, 3e9)), 3.0);
    }
}
