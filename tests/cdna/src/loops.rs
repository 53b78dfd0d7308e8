//! What the loops of kernels issue, from LLVM's assembly: no model of time, but enough to hold code to what it is meant to be.
//!
//! A loop is counted without those inside it. What it issues is put in cycles as if nothing overlapped: a matrix instruction takes what its
//! FLOP take at the rate of its kind on the chip, any other 4 cycles.

/// What one loop issues.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loop {
    /// Matrix instructions, and all.
    pub matrix: [usize; 2],
    /// Issue cycles of these.
    pub cycles: [f64; 2],
    /// Accesses of LDS of 16 bytes, and all.
    pub local: [usize; 2],
    /// The same of global memory.
    pub global: [usize; 2],
    /// Loads from global memory that go to LDS without registers, which are among those.
    pub copies: usize,
    /// Accesses of scratch.
    pub scratch: usize,
    /// Waits for global memory until nothing is outstanding, and all.
    pub waits: [usize; 2],
    /// Barriers of the block.
    pub barriers: usize,
}

/// The loops of a kernel that have matrix instructions.
pub fn loops(text: &str) -> Vec<Loop> {
    let lines: Vec<&str> = text.lines().collect();
    let per_cycle = if text.lines().take(8).any(|l| l.contains("gfx950")) { 1024.0 } else { 512.0 };
    // Where each loop begins, and its last branch back.
    let mut ends: Vec<[usize; 2]> = Vec::new();
    for (last, line) in lines.iter().enumerate() {
        let mut words = line.split_whitespace();
        let (Some(op), Some(target)) = (words.next(), words.next()) else { continue };
        if !op.starts_with("s_branch") && !op.starts_with("s_cbranch") {
            continue;
        }
        let label = |l: &&str| l.strip_prefix(target).is_some_and(|rest| rest.starts_with(':'));
        if let Some(first) = lines[..last].iter().position(label) {
            ends.retain(|e| e[0] != first);
            ends.push([first, last]);
        }
    }
    ends.sort_unstable();
    let mut found = Vec::new();
    for &[first, last] in &ends {
        let inner = |at: usize| ends.iter().any(|&[f, e]| f > first && e <= last && (f..=e).contains(&at));
        let mut l = Loop::default();
        for line in (first..=last).filter(|&at| !inner(at)).map(|at| lines[at]) {
            l.add(line, per_cycle);
        }
        if l.matrix[0] > 0 {
            found.push(l);
        }
    }
    found
}

impl Loop {
    /// Counts a line of assembly; `per_cycle` is FLOP of bf16 a cycle and SIMD.
    fn add(&mut self, line: &str, per_cycle: f64) {
        // Lines of inline assembly begin where they begin.
        let label = line.split_whitespace().next().is_some_and(|word| word.ends_with(':'));
        let Some(op) = line.split_whitespace().next().filter(|op| !label && is_op(op)) else {
            return;
        };
        let matrix = matrix_cycles(op, per_cycle);
        let cycles = matrix.unwrap_or(4.0);
        let count = |of: &mut [usize; 2], hit: bool| {
            of[0] += usize::from(hit);
            of[1] += 1;
        };
        count(&mut self.matrix, matrix.is_some());
        self.cycles[0] += matrix.unwrap_or(0.0);
        self.cycles[1] += cycles;
        let wide = op.ends_with("b128") || op.ends_with("x4");
        match op {
            _ if op.starts_with("ds_read") || op.starts_with("ds_write") => count(&mut self.local, wide),
            _ if op.starts_with("global_load") || op.starts_with("global_store") || op.starts_with("buffer_load") => {
                count(&mut self.global, wide);
                self.copies += usize::from(line.split_whitespace().any(|word| word == "lds"));
            }
            "s_barrier" => self.barriers += 1,
            _ if op.starts_with("scratch_") => self.scratch += 1,
            "s_waitcnt" if line.contains("vmcnt(") => count(&mut self.waits, line.contains("vmcnt(0)")),
            _ => {}
        }
    }
}

/// Whether a word is an instruction: not a directive, label or comment.
fn is_op(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase()) && word.contains('_')
}

/// Issue cycles of a matrix instruction, of a name such as `v_mfma_f32_16x16x32_fp8_fp8`; none for others.
fn matrix_cycles(op: &str, per_cycle: f64) -> Option<f64> {
    let rest = op.strip_prefix("v_mfma_")?;
    let rest = rest.strip_prefix("scale_").unwrap_or(rest).strip_prefix("f32_")?;
    let (sizes, types) = rest.split_once('_')?;
    let product: f64 = sizes.split('x').map(|n| n.parse::<f64>().ok()).product::<Option<f64>>()?;
    // CDNA 4 doubled the rates of bf16 and of the products of 128; those of 32 e4m3 take what they took.
    let rate = match types {
        "f8f6f4" => 2.0 * per_cycle,
        _ if types.contains("fp8") => 1024.0,
        _ => per_cycle,
    };
    Some(2.0 * product / rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
\t.amdgcn_target \"amdgcn-amd-amdhsa--gfx950\"
kernel:
.LBB0_1:                                ; %outer
\tglobal_load_dwordx4 v[0:3], v[4:5], off
\tscratch_store_dword off, v0, s32
.LBB0_2:
\tds_read_b128 v[0:3], v9
\tds_read_u16 v4, v9
\ts_waitcnt vmcnt(3) lgkmcnt(0)
\tv_mfma_f32_16x16x32_fp8_fp8 v[0:3], v[4:5], v[6:7], v[0:3]
\ts_waitcnt vmcnt(0)
\tv_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]
\ts_cbranch_scc1 .LBB0_2
\ts_waitcnt lgkmcnt(0)
\ts_cbranch_scc1 .LBB0_1
\tv_mfma_f32_16x16x32_bf16 v[0:3], v[4:7], v[8:11], v[0:3]
\ts_endpgm
";

    #[test]
    fn loops_are_counted_without_those_inside() {
        let found = loops(TEXT);
        let expected = Loop { matrix: [2, 7], cycles: [32.0, 52.0], local: [1, 2], waits: [1, 2], ..Loop::default() };
        assert_eq!(found, [expected]);
    }

    #[test]
    fn names_that_say_nothing_are_no_products() {
        assert_eq!(matrix_cycles("v_mfma_f32_32x32x8_bf16", 512.0), Some(32.0));
        assert_eq!(matrix_cycles("v_mfma_scale_f32_16x16x128_f8f6f4", 1024.0), Some(32.0));
        assert_eq!(matrix_cycles("v_mfma_f64_x", 512.0), None);
        assert_eq!(matrix_cycles("v_fma_f32", 512.0), None);
    }
}
