//! Layouts: which element each register of each lane holds, as linear maps over GF(2).
//!
//! A [`Layout`] takes a vector of input bits, such as those of a register number, a lane and a warp, to a vector of output
//! bits, such as those of a row and a column or of a byte address. It is linear: the image of a number is the exclusive or of
//! the images of its bits, so the map is its matrix, one column (the `images`) for each input bit. Tensor-core fragments, power-of-two strides
//! and XOR swizzles are all of this kind, and what a compiler asks about them is linear algebra:
//!
//! * converting between layouts is solving equations ([`conversion`]): if lanes and warps map to themselves, registers move
//!   and nothing else; if warps do, shuffles are enough; otherwise the data goes through shared memory;
//! * how many elements one instruction may move is a run of unit vectors ([`vector_width`]);
//! * bank conflicts are a difference of two ranks ([`bank_conflicts`]).
//!
//! **Notation.** Bits are packed with the first dim lowest: of `[register: 2, lane: 5]`, bit 2 is the lowest bit of the lane.
//! **Invariants.** Inputs and outputs have at most 64 bits each; images have no bits beyond the outputs'. Sizes that are no
//! power of two are no layouts: tile them, as 576 = 9 x 64 is.
//! **Cost.** Everything is at most bits^2 word operations.

use std::fmt;

/// A named group of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dim {
    /// Such as `register`, `lane`, `warp`; `row`, `col`, `byte`.
    pub name: &'static str,
    /// Its size is 2 to the power of `bits`.
    pub bits: u32,
}

/// Shorthand for a [`Dim`].
pub const fn dim(name: &'static str, bits: u32) -> Dim {
    Dim { name, bits }
}

/// Why a layout could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// More than 64 bits on one side.
    #[error("a layout has at most 64 bits on each side, not {0}")]
    TooManyBits(u64),
    /// The images do not fit the dims.
    #[error("the images do not fit the dims")]
    Shape,
    /// A size or a stride that is no power of two, or bits that overlap.
    #[error("{0} is not linear: sizes and strides are powers of two, and strides do not overlap")]
    NotLinear(String),
    /// Composition of layouts that do not meet.
    #[error("the outputs of one layout are not the inputs of the next")]
    Mismatch,
}

/// A linear map from named input bits to named output bits.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    ins: Vec<Dim>,
    outs: Vec<Dim>,
    images: Vec<u64>,
}

fn total(dims: &[Dim]) -> Result<u32, LayoutError> {
    let bits: u64 = dims.iter().map(|d| u64::from(d.bits)).sum();
    u32::try_from(bits).ok().filter(|&n| n <= 64).ok_or(LayoutError::TooManyBits(bits))
}

/// The lowest `bits` bits.
fn mask(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// Position of the named dim's lowest bit, and its bits.
fn place(dims: &[Dim], name: &str) -> Option<(u32, u32)> {
    let i = dims.iter().position(|d| d.name == name)?;
    Some((dims[..i].iter().map(|d| d.bits).sum(), dims[i].bits))
}

/// The number's bits shared out to the dims.
fn split(dims: &[Dim], mut x: u64) -> Vec<u64> {
    dims.iter()
        .map(|d| {
            let part = x & mask(d.bits);
            x = x.checked_shr(d.bits).unwrap_or(0);
            part
        })
        .collect()
}

/// A set of vectors in echelon form, each with the combination of inputs it is the image of.
struct Echelon(Vec<(u64, u64)>);

impl Echelon {
    fn of(images: impl IntoIterator<Item = u64>) -> Echelon {
        let mut e = Echelon(Vec::new());
        for (i, image) in images.into_iter().enumerate().take(64) {
            let (rest, combination) = e.reduce(image);
            if rest != 0 {
                e.0.push((rest, combination ^ (1 << i)));
            }
        }
        e
    }

    /// `x` less the vectors that lower it; the rest is 0 exactly if `x` is in the span, and then the combination gives `x`.
    fn reduce(&self, mut x: u64) -> (u64, u64) {
        let mut combination = 0;
        for &(v, c) in &self.0 {
            if x & (1 << v.ilog2()) != 0 {
                x ^= v;
                combination ^= c;
            }
        }
        (x, combination)
    }

    fn rank(&self) -> u32 {
        self.0.len() as u32
    }
}

impl Layout {
    /// The map with those images, one for each input bit.
    pub fn new(ins: &[Dim], outs: &[Dim], images: Vec<u64>) -> Result<Layout, LayoutError> {
        let (n, m) = (total(ins)?, total(outs)?);
        if images.len() != n as usize || images.iter().any(|&i| i & !mask(m) != 0) {
            return Err(LayoutError::Shape);
        }
        Ok(Layout { ins: ins.to_vec(), outs: outs.to_vec(), images })
    }

    /// Every bit to itself; `ins` and `outs` may share the bits out differently.
    pub fn identity(ins: &[Dim], outs: &[Dim]) -> Result<Layout, LayoutError> {
        Layout::new(ins, outs, (0..total(ins)?).map(|b| 1 << b).collect())
    }

    /// `Σ i_d * strides_d` as one output dim: the address of an element of an array. Strides are powers of two (0 broadcasts).
    pub fn from_strides(ins: &[Dim], out: Dim, strides: &[u64]) -> Result<Layout, LayoutError> {
        total(ins)?;
        let (mut images, mut taken) = (Vec::new(), 0u64);
        for (d, &stride) in ins.iter().zip(strides) {
            let reach = u128::from(stride) << d.bits;
            let span = u128::from(mask(d.bits)) * u128::from(stride);
            let overlaps = span & u128::from(taken) != 0;
            if (stride != 0 && !stride.is_power_of_two()) || reach > 1 << 64 || overlaps {
                return Err(LayoutError::NotLinear(format!("{} with stride {stride}", d.name)));
            }
            taken |= span as u64;
            images.extend((0..d.bits).map(|b| stride << b));
        }
        Layout::new(ins, &[out], images)
    }

    /// The swizzle of byte addresses that xors bits `[from, from + bits)` into bits `[to, to + bits)`.
    pub fn xor_swizzle(address: Dim, bits: u32, to: u32, from: u32) -> Result<Layout, LayoutError> {
        let end = u64::from(to.max(from)) + u64::from(bits);
        if end > u64::from(total(&[address])?) || to.abs_diff(from) < bits {
            return Err(LayoutError::NotLinear(format!("a swizzle of bits {from} into {to}, {bits} wide")));
        }
        let mut swizzle = Layout::identity(&[address], &[address])?;
        for b in 0..bits {
            swizzle.images[(from + b) as usize] |= 1 << (to + b);
        }
        Ok(swizzle)
    }

    /// The 128-byte swizzle of shared memory: the 16-byte chunk of a 128-byte row is xored with the row's number modulo 8.
    pub fn swizzle_128b(address: Dim) -> Result<Layout, LayoutError> {
        Layout::xor_swizzle(address, 3, 4, 7)
    }

    /// Where wgmma m64nNk* leaves its f32 result, for `n` a power of two in 8..=256: register `4j + 2h + e` of lane `l` of
    /// warp `w` is row `16w + 8h + l/4`, column `8j + 2(l mod 4) + e`. (PTX ISA, "wgmma.mma_async", register fragments of D.)
    pub fn wgmma_accumulator(n: u32) -> Result<Layout, LayoutError> {
        if !n.is_power_of_two() || !(8..=256).contains(&n) {
            return Err(LayoutError::NotLinear(format!("wgmma with n = {n}")));
        }
        let (row, col) = (|b: u32| 1u64 << b, |b: u32| 1u64 << (6 + b));
        let bits = n.ilog2();
        let mut images = vec![col(0), row(3)];
        images.extend((3..bits).map(col));
        images.extend([col(1), col(2), row(0), row(1), row(2), row(4), row(5)]);
        let ins = [dim("register", bits - 1), dim("lane", 5), dim("warp", 2)];
        Layout::new(&ins, &[dim("row", 6), dim("col", bits)], images)
    }

    /// Where a 16x16 MFMA leaves its f32 result: register `r` of lane `l` is row `4(l/16) + r`, column `l mod 16`.
    pub fn mfma_16x16_accumulator() -> Layout {
        let (row, col) = (|b: u32| 1u64 << b, |b: u32| 1u64 << (4 + b));
        let images = vec![row(0), row(1), col(0), col(1), col(2), col(3), row(2), row(3)];
        Layout { ins: vec![dim("register", 2), dim("lane", 6)], outs: vec![dim("row", 4), dim("col", 4)], images }
    }

    /// Input dims, lowest bits first.
    pub fn ins(&self) -> &[Dim] {
        &self.ins
    }

    /// Output dims, lowest bits first.
    pub fn outs(&self) -> &[Dim] {
        &self.outs
    }

    /// The image of each input bit.
    pub fn images(&self) -> &[u64] {
        &self.images
    }

    /// The image of packed input bits.
    pub fn apply(&self, x: u64) -> u64 {
        let chosen = self.images.iter().enumerate().filter(|(b, _)| x >> b & 1 == 1);
        chosen.fold(0, |sum, (_, image)| sum ^ image)
    }

    /// The image of one number for each input dim, as one number for each output dim. Missing inputs are 0, excess bits dropped.
    pub fn at(&self, inputs: &[u64]) -> Vec<u64> {
        let (mut x, mut shift) = (0, 0);
        for (d, &input) in self.ins.iter().zip(inputs) {
            x |= (input & mask(d.bits)).checked_shl(shift).unwrap_or(0);
            shift += d.bits;
        }
        split(&self.outs, self.apply(x))
    }

    /// First this map, then that one.
    pub fn then(&self, next: &Layout) -> Result<Layout, LayoutError> {
        if self.outs != next.ins {
            return Err(LayoutError::Mismatch);
        }
        let images = self.images.iter().map(|&i| next.apply(i)).collect();
        Ok(Layout { ins: self.ins.clone(), outs: next.outs.clone(), images })
    }

    /// The dimension of the image.
    pub fn rank(&self) -> u32 {
        Echelon::of(self.images.iter().copied()).rank()
    }

    /// Whether no two inputs have one image: no element is held twice.
    pub fn is_injective(&self) -> bool {
        self.rank() as usize == self.images.len()
    }

    /// Whether every output is an image: no element is missing.
    pub fn is_surjective(&self) -> bool {
        total(&self.outs) == Ok(self.rank())
    }

    /// The inverse of a bijective map.
    pub fn invert(&self) -> Option<Layout> {
        if !self.is_injective() || !self.is_surjective() {
            return None;
        }
        let identity = Layout::identity(&self.outs, &self.outs).ok()?;
        conversion(&identity, self)
    }
}

/// From where `a` holds an element to where `b` does: the map `c` with `c.then(b) == a`. None if the outputs differ or `b`
/// lacks an element of `a`. Where `b` holds an element several times, one place is chosen.
pub fn conversion(a: &Layout, b: &Layout) -> Option<Layout> {
    if a.outs != b.outs {
        return None;
    }
    let echelon = Echelon::of(b.images.iter().copied());
    let solve = |&image: &u64| Some(echelon.reduce(image)).filter(|r| r.0 == 0).map(|r| r.1);
    let images = a.images.iter().map(solve).collect::<Option<_>>()?;
    Some(Layout { ins: a.ins.clone(), outs: b.ins.clone(), images })
}

/// How many neighbours along `axis` each lane holds in consecutive registers, starting at a multiple of that number.
pub fn vector_width(layout: &Layout, axis: &str) -> u64 {
    let (Some((reg, regs)), Some((low, bits))) = (place(&layout.ins, "register"), place(&layout.outs, axis)) else {
        return 1;
    };
    let fits = |v: u32| {
        let window = mask(v).checked_shl(low).unwrap_or(0);
        layout.images.iter().enumerate().all(|(i, &image)| match (i as u32).checked_sub(reg) {
            Some(b) if b < v => image == 1 << (low + b),
            _ => image & window == 0,
        })
    };
    (0..=regs.min(bits)).rev().find(|&v| fits(v)).map_or(1, |v| 1u64.checked_shl(v).unwrap_or(1))
}

/// How many times longer than necessary a warp's access to shared memory takes, with 32 banks of 4 bytes: 1 is without
/// conflicts. `layout` maps `lane` (and anything else) to `byte`, where each lane accesses `vector_bytes` (4, 8 or 16) bytes;
/// wide accesses are served for 16 or 8 lanes at a time. None without these dims or for other widths.
pub fn bank_conflicts(layout: &Layout, vector_bytes: u32) -> Option<u32> {
    let ((first, lanes), (low, bits)) = (place(&layout.ins, "lane")?, place(&layout.outs, "byte")?);
    let wide = [4, 8, 16].iter().position(|&n| n == vector_bytes)? as u32;
    let at_once = lanes.min(5u32.saturating_sub(wide));
    let lane_words =
        (first..first + at_once).map(|b| layout.images[b as usize].checked_shr(low).unwrap_or(0) & mask(bits));
    let words: Vec<u64> = lane_words.map(|byte| byte >> 2).chain((0..wide).map(|b| 1 << b)).collect();
    let rank = |mask: u64| Echelon::of(words.iter().map(|w| w & mask)).rank();
    1u32.checked_shl(rank(u64::MAX) - rank(31))
}

/// One line an input dim, with the image of each of its bits: `lane: col 2, col 4, row 1, row 2, row 4`.
impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut images = self.images.iter();
        for d in &self.ins {
            let bits: Vec<String> = images
                .by_ref()
                .take(d.bits as usize)
                .map(|&image| {
                    let parts = self.outs.iter().zip(split(&self.outs, image)).filter(|(_, n)| *n != 0);
                    let parts: Vec<String> = parts.map(|(d, n)| format!("{} {n}", d.name)).collect();
                    if parts.is_empty() { "0".into() } else { parts.join(" + ") }
                })
                .collect();
            writeln!(f, "{}: {}", d.name, bits.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use proptest::prelude::*;

    #[test]
    fn wgmma_fragment_is_the_one_of_the_manual() {
        for n in [8u64, 64, 256] {
            let layout = Layout::wgmma_accumulator(n as u32).unwrap();
            for (r, l, w) in (0..n / 2).flat_map(|r| (0..32).flat_map(move |l| (0..4).map(move |w| (r, l, w)))) {
                let (j, half, e) = (r / 4, r / 2 % 2, r % 2);
                assert_eq!(layout.at(&[r, l, w]), [16 * w + 8 * half + l / 4, 8 * j + 2 * (l % 4) + e]);
            }
            assert!(layout.is_injective() && layout.is_surjective());
        }
        assert!(Layout::wgmma_accumulator(96).is_err());
        expect![[r#"
            register: col 1, row 8, col 8
            lane: col 2, col 4, row 1, row 2, row 4
            warp: row 16, row 32
        "#]]
        .assert_eq(&Layout::wgmma_accumulator(16).unwrap().to_string());
    }

    #[test]
    fn mfma_fragment() {
        let layout = Layout::mfma_16x16_accumulator();
        for (r, l) in (0..4).flat_map(|r| (0..64).map(move |l| (r, l))) {
            assert_eq!(layout.at(&[r, l]), [4 * (l / 16) + r, l % 16]);
        }
        assert_eq!((vector_width(&layout, "row"), vector_width(&layout, "col")), (4, 1));
    }

    #[test]
    fn accumulator_to_rows_needs_shuffles_only() {
        let acc = Layout::wgmma_accumulator(8).unwrap();
        assert_eq!(vector_width(&acc, "col"), 2);
        let ins = [dim("register", 2), dim("lane", 5), dim("warp", 2)];
        let row_major = Layout::new(&ins, acc.outs(), [6, 7, 8, 0, 1, 2, 3, 4, 5].map(|b| 1 << b).to_vec()).unwrap();
        assert_eq!(vector_width(&row_major, "col"), 4);
        let moves = conversion(&acc, &row_major).unwrap();
        assert_eq!(moves.then(&row_major).unwrap(), acc);
        expect![[r#"
            register: register 1, lane 16
            lane: register 2, lane 1, lane 2, lane 4, lane 8
            warp: warp 1, warp 2
        "#]]
        .assert_eq(&moves.to_string());
    }

    #[test]
    fn bank_conflicts_and_the_swizzle_that_removes_them() {
        let byte = dim("byte", 12);
        let conflicts = |lane: Dim, stride, width| {
            let plain = Layout::from_strides(&[lane], byte, &[stride]).unwrap();
            let swizzled = plain.then(&Layout::swizzle_128b(byte).unwrap()).unwrap();
            (bank_conflicts(&plain, width).unwrap(), bank_conflicts(&swizzled, width).unwrap())
        };
        assert_eq!(conflicts(dim("lane", 5), 4, 4), (1, 1));
        assert_eq!(conflicts(dim("lane", 5), 8, 4), (2, 2));
        assert_eq!(conflicts(dim("lane", 5), 128, 4), (32, 4));
        assert_eq!(conflicts(dim("lane", 5), 128, 16), (8, 1));
        assert_eq!(conflicts(dim("lane", 5), 16, 16), (1, 1));
    }

    #[test]
    fn what_is_not_linear_is_refused() {
        let (x, byte) = (dim("x", 3), dim("byte", 6));
        assert!(Layout::from_strides(&[x], byte, &[3]).is_err());
        assert!(Layout::from_strides(&[x, dim("y", 2)], byte, &[4, 8]).is_err());
        assert!(Layout::from_strides(&[x], byte, &[1 << 63]).is_err());
        assert!(Layout::xor_swizzle(byte, 3, 4, 5).is_err());
        assert!(Layout::identity(&[dim("x", 65)], &[byte]).is_err());
        let broadcast = Layout::from_strides(&[x, dim("y", 2)], byte, &[1, 0]).unwrap();
        assert!(!broadcast.is_injective() && broadcast.invert().is_none());
    }

    fn layout(n: u32, m: u32) -> impl Strategy<Value = Layout> {
        let (x, y) = (dim("x", n), dim("y", m));
        proptest::collection::vec(0..1u64 << m, n as usize)
            .prop_map(move |images| Layout::new(&[x], &[y], images).unwrap())
    }

    fn renamed(layout: Layout, from: &'static str, to: &'static str) -> Layout {
        Layout { ins: vec![dim(from, layout.ins[0].bits)], outs: vec![dim(to, layout.outs[0].bits)], ..layout }
    }

    proptest! {
        #[test]
        fn composition_is_associative(a in layout(7, 5), b in layout(5, 9), c in layout(9, 6), x in 0..128u64) {
            let (a, b, c) = (renamed(a, "x", "p"), renamed(b, "p", "q"), renamed(c, "q", "y"));
            let left = a.then(&b).unwrap().then(&c).unwrap();
            prop_assert_eq!(&left, &a.then(&b.then(&c).unwrap()).unwrap());
            prop_assert_eq!(left.apply(x), c.apply(b.apply(a.apply(x))));
        }

        #[test]
        fn maps_are_linear(a in layout(8, 8), x in 0..256u64, y in 0..256u64) {
            prop_assert_eq!(a.apply(x ^ y), a.apply(x) ^ a.apply(y));
        }

        #[test]
        fn inverses_exist_exactly_for_bijections(a in layout(4, 4)) {
            let distinct: std::collections::HashSet<u64> = (0..16).map(|x| a.apply(x)).collect();
            prop_assert_eq!(distinct.len(), 1 << a.rank());
            match a.invert() {
                Some(inverse) => {
                    prop_assert!((0..16).all(|x| inverse.apply(a.apply(x)) == x && a.apply(inverse.apply(x)) == x));
                }
                None => prop_assert!(distinct.len() < 16),
            }
        }

        #[test]
        fn conversions_convert(a in layout(5, 4), b in layout(6, 4)) {
            let reachable: std::collections::HashSet<u64> = (0..64).map(|x| b.apply(x)).collect();
            match conversion(&a, &b) {
                Some(c) => prop_assert!((0..32).all(|x| b.apply(c.apply(x)) == a.apply(x))),
                None => prop_assert!((0..32).any(|x| !reachable.contains(&a.apply(x)))),
            }
        }

        #[test]
        fn vector_widths_hold(a in layout(4, 4)) {
            let a = renamed(a, "register", "col");
            let width = vector_width(&a, "col");
            for r in 0..16 {
                let first = r / width * width;
                prop_assert_eq!(a.apply(r), a.apply(first) + r - first);
                prop_assert_eq!(a.apply(first) % width, 0);
            }
        }

        #[test]
        fn bank_conflicts_match_counting(a in layout(5, 10)) {
            let a = renamed(a, "lane", "byte");
            let words: std::collections::HashSet<u64> = (0..32).map(|l| a.apply(l) >> 2).collect();
            let most = (0..32).map(|bank| words.iter().filter(|w| *w % 32 == bank).count()).max().unwrap();
            prop_assert_eq!(bank_conflicts(&a, 4).unwrap() as usize, most);
        }
    }
}
