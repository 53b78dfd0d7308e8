//! Kernels of a few instructions around which everything is the same.

#![allow(dead_code, reason = "each test file uses what it needs")]

use dsc_cdna::{Cause, CodeObject, Error, Launch, Memory, Options, tools};

/// A kernel: a body that finds its lane's byte offset (4 × thread) in v1, its thread number in v0, the input's address in s[4:5],
/// the output's in s[6:7]; and what the launch gives it.
pub struct Snippet<'a> {
    pub chip: &'a str,
    pub body: &'a str,
    /// The input.
    pub input: Vec<u32>,
    /// Words of output.
    pub output: usize,
    pub threads: u32,
    pub blocks: u32,
    pub lds: usize,
    pub scratch: usize,
    pub seed: u64,
}

impl<'a> Snippet<'a> {
    pub fn new(chip: &'a str, body: &'a str) -> Snippet<'a> {
        Snippet { chip, body, input: vec![0; 64], output: 64, threads: 64, blocks: 1, lds: 0, scratch: 0, seed: 0 }
    }

    pub fn input(mut self, input: impl IntoIterator<Item = u32>) -> Self {
        self.input = input.into_iter().collect();
        self
    }

    pub fn floats(self, input: impl IntoIterator<Item = f32>) -> Self {
        self.input(input.into_iter().map(f32::to_bits))
    }

    pub fn output(mut self, words: usize) -> Self {
        self.output = words;
        self
    }

    pub fn waves(mut self, waves: u32) -> Self {
        self.threads = 64 * waves;
        self.output = self.threads as usize;
        self
    }

    pub fn lds(mut self, bytes: usize) -> Self {
        self.lds = bytes;
        self
    }

    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    fn source(&self) -> String {
        let Snippet { chip, body, lds, scratch, .. } = self;
        format!(
            "
.amdgcn_target \"amdgcn-amd-amdhsa--{chip}\"
.text
.globl k
.p2align 8
.type k,@function
k:
  s_load_dwordx4 s[4:7], s[0:1], 0x0
  v_lshlrev_b32 v1, 2, v0
  s_waitcnt lgkmcnt(0)
{body}
  s_endpgm
.rodata
.p2align 6
.amdhsa_kernel k
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_kernarg_size 16
  .amdhsa_next_free_vgpr 160
  .amdhsa_accum_offset 128
  .amdhsa_next_free_sgpr 40
  .amdhsa_group_segment_fixed_size {lds}
  .amdhsa_private_segment_fixed_size {scratch}
  .amdhsa_enable_private_segment {}
.end_amdhsa_kernel
.amdgpu_metadata
---
amdhsa.version: [1, 2]
amdhsa.kernels:
  - .name: k
    .symbol: k.kd
    .kernarg_segment_size: 16
    .kernarg_segment_align: 8
    .group_segment_fixed_size: {lds}
    .private_segment_fixed_size: {scratch}
    .wavefront_size: 64
    .sgpr_count: 40
    .vgpr_count: 160
    .max_flat_workgroup_size: 1024
    .args:
      - {{.offset: 0, .size: 8, .value_kind: global_buffer, .address_space: global}}
      - {{.offset: 8, .size: 8, .value_kind: global_buffer, .address_space: global}}
...
.end_amdgpu_metadata
",
            u8::from(*scratch > 0)
        )
    }

    /// Runs it and returns its output.
    pub fn run(&self) -> Result<Vec<u32>, Error> {
        let object = CodeObject::parse(&tools::assemble(&self.source(), self.chip)?)?;
        let mut memory = Memory::new();
        let bytes: Vec<u8> = self.input.iter().flat_map(|w| w.to_le_bytes()).collect();
        let input = memory.alloc_read_only(&bytes);
        let output = memory.alloc(&vec![0; 4 * self.output]);
        let arguments = [input.to_le_bytes(), output.to_le_bytes()].concat();
        let launch = Launch {
            kernel: "k",
            grid: [self.blocks, 1, 1],
            block: [self.threads, 1, 1],
            dynamic_lds: 0,
            arguments: &arguments,
        };
        object.launch(&launch, &mut memory, Options { seed: self.seed, ..Options::default() })?;
        Ok(memory.read(output).chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect())
    }

    /// Runs it; it must end well.
    pub fn words(&self) -> Vec<u32> {
        self.run().unwrap_or_else(|e| panic!("{e}"))
    }

    /// As [`words`](Snippet::words), as f32.
    pub fn reals(&self) -> Vec<f32> {
        self.words().into_iter().map(f32::from_bits).collect()
    }

    /// Runs it; it must fault.
    pub fn cause(&self) -> Cause {
        match self.run() {
            Err(Error::Fault(fault)) => fault.cause,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("it did not fault"),
        }
    }
}

/// Loads the lane's word of input to v2, runs the body, and stores v3.
pub fn lanes(chip: &str, body: &str, input: impl IntoIterator<Item = u32>) -> Vec<u32> {
    let body =
        format!("global_load_dword v2, v1, s[4:5]\n s_waitcnt vmcnt(0)\n {body}\n global_store_dword v1, v3, s[6:7]");
    Snippet::new(chip, &body).input(input).words()
}

/// As [`lanes`], of f32.
pub fn reals(chip: &str, body: &str, input: impl IntoIterator<Item = f32>) -> Vec<f32> {
    lanes(chip, body, input.into_iter().map(f32::to_bits)).into_iter().map(f32::from_bits).collect()
}
