//! How lanes take what other lanes have (DPP), and parts of registers (SDWA).

/// No lane.
pub const NOWHERE: u8 = 255;

/// A pattern of data-parallel primitives: from which lane each lane takes its first source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dpp {
    /// The lane that each lane reads, or [`NOWHERE`].
    pub from: [u8; 64],
    /// Lanes that row and bank masks let write.
    pub writes: u64,
    /// Lanes without a source read zero; if not, they are not written.
    pub zero: bool,
}

impl Dpp {
    /// The pattern that LLVM prints as `key:value`, and without a value where there is none.
    pub fn parse(key: &str, value: &str) -> Option<Dpp> {
        let n: i32 = if value.starts_with('[') || value.is_empty() { 0 } else { value.parse().ok()? };
        let quad: Vec<i32> = value.trim_matches(['[', ']']).split(',').filter_map(|v| v.trim().parse().ok()).collect();
        let mut from = [NOWHERE; 64];
        for (l, from) in from.iter_mut().enumerate() {
            let l = l as i32;
            let (row, at) = (l & !15, l & 15);
            let in_row = |at: i32| (0..16).contains(&at).then_some(row + at);
            let source = match key {
                "quad_perm" => Some((l & !3) + quad.get((l & 3) as usize)?),
                "row_shl" => in_row(at + n),
                "row_shr" => in_row(at - n),
                "row_ror" => in_row((at - n) & 15),
                "wave_shl" => (l + n < 64).then_some(l + n),
                "wave_rol" => Some((l + n) & 63),
                "wave_shr" => (l >= n).then_some(l - n),
                "wave_ror" => Some((l - n) & 63),
                "row_mirror" => Some(row + 15 - at),
                "row_half_mirror" => Some((l & !7) + 7 - (l & 7)),
                "row_newbcast" | "row_share" => Some(row + n),
                "row_bcast" if n == 15 => (row > 0).then_some(row - 1),
                "row_bcast" if n == 31 => (l >= 32).then_some(31),
                _ => return None,
            };
            *from = source.map_or(NOWHERE, |s| s as u8);
        }
        Some(Dpp { from, writes: !0, zero: false })
    }

    /// Only these rows of 16 lanes are written.
    pub fn mask_rows(&mut self, mask: i32) {
        self.mask(|l| mask >> (l / 16) & 1 != 0);
    }

    /// Only these banks of four lanes in each row are written.
    pub fn mask_banks(&mut self, mask: i32) {
        self.mask(|l| mask >> (l / 4 % 4) & 1 != 0);
    }

    fn mask(&mut self, keep: impl Fn(usize) -> bool) {
        for l in 0..64 {
            if !keep(l) {
                self.writes &= !(1 << l);
            }
        }
    }

    /// Lanes that have a source among the active ones.
    pub fn valid(&self, exec: u64) -> u64 {
        let mut mask = 0;
        for (l, &from) in self.from.iter().enumerate() {
            mask |= u64::from(from != NOWHERE && exec >> (from & 63) & 1 != 0) << l;
        }
        mask
    }

    /// What each lane reads; lanes without a source read zero.
    pub fn permute(&self, values: &[u32; 64], valid: u64) -> [u32; 64] {
        let mut out = [0; 64];
        for (l, out) in out.iter_mut().enumerate() {
            if valid >> l & 1 != 0 {
                *out = values[usize::from(self.from[l] & 63)];
            }
        }
        out
    }

    /// As [`permute`](Dpp::permute), of one bit a lane.
    pub fn permute_bits(&self, bits: u64, valid: u64) -> u64 {
        let mut out = !valid;
        for (l, &from) in self.from.iter().enumerate() {
            if valid >> l & 1 != 0 {
                out |= (bits >> (from & 63) & 1) << l;
            }
        }
        out
    }
}

/// A part of a register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Select {
    /// All of it.
    #[default]
    Dword,
    /// A half.
    Word(u8),
    /// A byte.
    Byte(u8),
}

impl Select {
    /// The first bit and how many.
    pub fn range(self) -> (u32, u32) {
        match self {
            Select::Dword => (0, 32),
            Select::Word(n) => (16 * u32::from(n), 16),
            Select::Byte(n) => (8 * u32::from(n), 8),
        }
    }
}

/// What becomes of the rest of a destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unused {
    /// Zero.
    #[default]
    Pad,
    /// Copies of the sign.
    Sext,
    /// What it was.
    Preserve,
}

impl std::str::FromStr for Unused {
    type Err = ();
    fn from_str(text: &str) -> Result<Unused, ()> {
        match text {
            "UNUSED_PAD" => Ok(Unused::Pad),
            "UNUSED_SEXT" => Ok(Unused::Sext),
            "UNUSED_PRESERVE" => Ok(Unused::Preserve),
            _ => Err(()),
        }
    }
}

/// Sub-dword addressing of an instruction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sdwa {
    /// Where the result goes.
    pub dst: Select,
    /// What becomes of the rest there.
    pub unused: Unused,
    /// What the sources are.
    pub src: [Select; 2],
    /// Whether they are extended by their sign.
    pub sext: [bool; 2],
}

impl Sdwa {
    /// The selected part of source `k` of one lane.
    #[inline(always)]
    pub fn extract(&self, k: usize, value: u32) -> u32 {
        let (at, bits) = self.src[k].range();
        let top = value << (32 - at - bits);
        if self.sext[k] { (top as i32 >> (32 - bits)) as u32 } else { top >> (32 - bits) }
    }

    /// The register with the result in its place.
    #[inline(always)]
    pub fn insert(&self, old: u32, value: u32) -> u32 {
        let (at, bits) = self.dst.range();
        let mask = (!0u32 >> (32 - bits)) << at;
        let placed = (value << at) & mask;
        match self.unused {
            Unused::Pad => placed,
            Unused::Preserve => placed | (old & !mask),
            Unused::Sext => ((value << (32 - bits)) as i32 >> (32 - bits) << at) as u32,
        }
    }
}
