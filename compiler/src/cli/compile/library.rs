//! The options of `dsc compile --kernels`.

use crate::cli::Failure;
use crate::library::{self, Options};
use dsc_ir::graph::PAGE_TOKENS;
use dsc_targets::TargetOptions;

/// Dims have the defaults of DeepSeek-V3.2 on one rank.
#[derive(clap::Args)]
#[command(next_help_heading = "Kernel libraries")]
pub struct LibraryArgs {
    /// Compile a library of kernels that other programs call, instead of a model
    #[arg(long, value_enum, value_name = "KIND")]
    kernels: Option<Kind>,
    /// Heads of attention
    #[arg(long, value_name = "N", requires = "kernels")]
    heads: Option<u32>,
    /// Heads of the indexer
    #[arg(long, value_name = "N", requires = "kernels")]
    index_heads: Option<u32>,
    /// Elements of an index key
    #[arg(long, value_name = "N", requires = "kernels")]
    index_dim: Option<u32>,
    /// Elements of the latent
    #[arg(long, value_name = "N", requires = "kernels")]
    latent_dim: Option<u32>,
    /// Elements of the rope key
    #[arg(long, value_name = "N", requires = "kernels")]
    rope_dim: Option<u32>,
    /// Keys that are selected
    #[arg(long, value_name = "N", requires = "kernels")]
    top_k: Option<u32>,
    /// Multiplies the scores of attention [default: DeepSeek-V3.2's, 0.13523378]
    #[arg(long, value_name = "X", requires = "kernels")]
    scale: Option<f32>,
    /// The latent cache that decoding reads
    #[arg(long, value_enum, default_value = "fp8", requires = "kernels")]
    kv: Cache,
    /// Query tokens of a sequence that decoding takes
    #[arg(long, value_delimiter = ',', value_name = "LIST", requires = "kernels")]
    queries: Option<Vec<u32>>,
    /// Tokens of a cache page
    #[arg(long, default_value_t = PAGE_TOKENS, value_name = "N", requires = "kernels")]
    page_size: u32,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Kind {
    /// DeepSeek sparse attention: indexer logits, top-k, MLA over a selection, and the chains of them
    Dsa,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Cache {
    /// 656 bytes a token at 512 + 64: e4m3, a f32 scale for each 128, the rope key in bf16
    Fp8,
    /// bf16
    Bf16,
}

impl LibraryArgs {
    /// What the library is called.
    pub fn name(&self) -> &'static str {
        "dsa"
    }

    /// What to compile.
    pub fn options(&self, args: &super::Args, codegen: TargetOptions) -> Result<Options, Failure> {
        if self.page_size != PAGE_TOKENS {
            return Err(Failure::new(format!("--page-size {}: pages hold {PAGE_TOKENS} tokens", self.page_size))
                .help("a page of more tokens is several pages of 64; list those in the page table"));
        }
        let mut facts = library::v32();
        let dims = [
            (&mut facts.heads, self.heads),
            (&mut facts.index_heads, self.index_heads),
            (&mut facts.index_dim, self.index_dim),
            (&mut facts.latent, self.latent_dim),
            (&mut facts.rope, self.rope_dim),
            (&mut facts.topk, self.top_k),
            (&mut facts.max_context, args.max_context),
        ];
        for (dim, wanted) in dims {
            *dim = wanted.unwrap_or(*dim);
        }
        facts.scale = self.scale.unwrap_or(facts.scale);
        facts.fp8_cache = self.kv == Cache::Fp8;
        facts.queries = self.queries.clone().unwrap_or(facts.queries);
        Ok(Options { target: args.target.clone(), codegen, facts, schedules: args.rules()? })
    }
}
