//! What the lanes of a warp do together, by the fragment layouts of the PTX ISA.

use half::{bf16, f16};

/// A value for each lane.
pub type Lanes = [u64; 32];

/// Element types of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// 16x8x16.
    Bf16,
    /// 16x8x16.
    F16,
    /// 16x8x32.
    E4m3,
}

impl Product {
    fn k(self) -> usize {
        if self == Product::E4m3 { 32 } else { 16 }
    }

    /// Elements of a register.
    fn packed(self) -> usize {
        if self == Product::E4m3 { 4 } else { 2 }
    }

    fn element(self, register: u64, i: usize) -> f32 {
        match self {
            Product::Bf16 => bf16::from_bits((register >> (16 * i)) as u16).to_f32(),
            Product::F16 => f16::from_bits((register >> (16 * i)) as u16).to_f32(),
            Product::E4m3 => dsc_ir::dtype::e4m3_to_f32((register >> (8 * i)) as u8),
        }
    }

    /// `c + a · b`, 16x8, summed in f32. Registers: `c` four, `a` four, `b` two, each with its lanes.
    pub fn multiply(self, c: [&Lanes; 4], a: [&Lanes; 4], b: [&Lanes; 2]) -> [Lanes; 4] {
        let (k, packed) = (self.k(), self.packed());
        let mut left = vec![0f32; 16 * k];
        let mut right = vec![0f32; 8 * k];
        for lane in 0..32 {
            let (group, within) = (lane / 4, lane % 4);
            for (r, register) in a.iter().enumerate() {
                // Registers 1 and 3 are eight rows below, 2 and 3 half of k further.
                let (row, first) = (group + 8 * (r % 2), within * packed + k / 2 * (r / 2));
                (0..packed).for_each(|i| left[row * k + first + i] = self.element(register[lane], i));
            }
            for (r, register) in b.iter().enumerate() {
                let first = within * packed + k / 2 * r;
                (0..packed).for_each(|i| right[group * k + first + i] = self.element(register[lane], i));
            }
        }
        let mut out = [[0; 32]; 4];
        for lane in 0..32 {
            for r in 0..4 {
                let (row, col) = (lane / 4 + 8 * (r / 2), lane % 4 * 2 + r % 2);
                let products = left[row * k..][..k].iter().zip(&right[col * k..][..k]);
                let sum: f32 = products.map(|(x, y)| x * y).sum();
                out[r][lane] = (f32::from_bits(c[r][lane] as u32) + sum).to_bits().into();
            }
        }
        out
    }
}

/// Four 8x8 matrices of 16-bit elements: `rows[8 j + i]` is row `i` of matrix `j`. What register `j` of each lane gets.
pub fn load_matrices(rows: &[[u8; 16]; 32], transposed: bool) -> [Lanes; 4] {
    let element = |row: &[u8; 16], i: usize| u64::from(u16::from_le_bytes([row[2 * i], row[2 * i + 1]]));
    let mut out = [[0; 32]; 4];
    for (j, register) in out.iter_mut().enumerate() {
        for (lane, word) in register.iter_mut().enumerate() {
            let (slow, fast) = (lane / 4, lane % 4 * 2);
            let one = |e: usize| {
                let (row, col) = if transposed { (fast + e, slow) } else { (slow, fast + e) };
                element(&rows[8 * j + row], col)
            };
            *word = one(0) | one(1) << 16;
        }
    }
    out
}

/// Exchanges and combinations of 32-bit values, by their name in the dialect: `shfl bfly`, `redux umax`, ...; `by` is the second
/// operand of a shuffle.
pub fn exchange(how: &str, v: &Lanes, by: &Lanes) -> Option<Lanes> {
    let all = |x: u64| Some([x; 32]);
    let from: fn(usize, u64) -> usize = match how {
        "ballot" => return all(v.iter().enumerate().map(|(i, v)| (v & 1) << i).sum()),
        "redux add" => return all(v.iter().sum::<u64>() & 0xffff_ffff),
        "redux umax" => return all(v.iter().copied().max()?),
        "redux umin" => return all(v.iter().copied().min()?),
        "shfl up has" => return Some(std::array::from_fn(|i| u64::from(i >= by[i] as usize))),
        "shfl bfly" => |i, by| i ^ (by as usize & 31),
        "shfl up" => |i, by| i.checked_sub(by as usize).unwrap_or(i),
        "shfl idx" => |_, by| by as usize & 31,
        _ => return None,
    };
    Some(std::array::from_fn(|i| v[from(i, by[i])]))
}
