//! Code objects: an ELF file with kernels, a descriptor of each (`NAME.kd`) and metadata.
//!
//! As LLVM's "User Guide for AMDGPU Backend" has them: kernel descriptor (code object V3 and later), metadata (V5).

use crate::decode::{self, Inst};
use crate::fault::Error;
use crate::tools;
use object::read::elf::{ElfFile64, FileHeader};
use object::{LittleEndian, Object, ObjectSection, ObjectSegment, ObjectSymbol};
use rmpv::Value;

/// What differs between the chips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chip {
    /// LLVM's name.
    pub name: &'static str,
    /// Bytes of LDS of a block at most.
    pub lds_bytes: usize,
    /// Whether fp8 is OCP's; if not, it is FNUZ.
    pub ocp: bool,
    /// Bytes of the widest load to LDS.
    pub direct_bytes: usize,
    /// The number in `e_flags`.
    machine: u32,
}

/// MI300X and relatives: CDNA 3.
pub const GFX942: Chip = Chip { name: "gfx942", lds_bytes: 64 << 10, ocp: false, direct_bytes: 4, machine: 0x4c };
/// MI350 and relatives: CDNA 4.
pub const GFX950: Chip = Chip { name: "gfx950", lds_bytes: 160 << 10, ocp: true, direct_bytes: 16, machine: 0x4f };

/// Floating-point mode, as a descriptor sets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mode {
    /// Denormals of f32 are read as zero.
    pub flush_in: bool,
    /// Denormal results of f32 are zero.
    pub flush_out: bool,
    /// Denormals of f16 and f64 are read as zero, and results are.
    pub flush_16: bool,
    /// Clamping makes zero of NaN.
    pub clamp_nan: bool,
    /// Overflow of f16 and fp8 conversions gives the largest number.
    pub saturate: bool,
    /// minNum and maxNum quiet signaling NaNs, as IEEE 754-2008 has them.
    pub ieee: bool,
}

/// A hidden argument that the loader fills in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hidden {
    /// Its `value_kind`.
    pub kind: String,
    /// Where in the kernel arguments.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

/// An argument that the caller gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name, empty if the metadata has none.
    pub name: String,
    /// Its `value_kind`.
    pub kind: String,
    /// Where in the kernel arguments.
    pub offset: usize,
    /// Bytes.
    pub size: usize,
}

/// A kernel of a code object.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Bytes of its arguments, hidden ones with them.
    pub kernarg_bytes: usize,
    /// Bytes of LDS that it needs beside what a launch adds.
    pub lds_bytes: usize,
    /// Bytes of scratch of a lane.
    pub scratch_bytes: usize,
    /// Vector registers and AGPRs that a wave has.
    pub vector_registers: (u16, u16),
    /// Largest number of threads of a block.
    pub max_threads: u32,
    /// Arguments.
    pub arguments: Vec<Argument>,
    /// Arguments that the loader fills in.
    pub hidden: Vec<Hidden>,
    /// Index of the first instruction.
    pub(crate) entry: usize,
    pub(crate) mode: Mode,
    /// Bits of the descriptor that say what is in registers at the start.
    pub(crate) properties: u16,
    pub(crate) rsrc2: u32,
    /// Words of arguments in scalar registers at the start: how many, from which.
    pub(crate) preload: (usize, usize),
}

/// A code object, decoded.
#[derive(Debug)]
pub struct CodeObject {
    /// For which chip.
    pub chip: Chip,
    /// Its kernels.
    pub kernels: Vec<Kernel>,
    pub(crate) code: Vec<Inst>,
    /// What a loader maps, from address 0.
    pub(crate) image: Vec<u8>,
}

fn bad(reason: impl Into<String>) -> Error {
    Error::Object(reason.into())
}

impl CodeObject {
    /// Reads an ELF file and disassembles it.
    ///
    /// # Errors
    /// If it is no code object for a chip that we know, if descriptor and metadata disagree, or if LLVM is missing.
    pub fn parse(elf: &[u8]) -> Result<CodeObject, Error> {
        let file: ElfFile64<'_, LittleEndian> =
            ElfFile64::parse(elf).map_err(|e| bad(format!("not a 64-bit ELF file: {e}")))?;
        let header = file.elf_header();
        if header.e_machine(LittleEndian) != object::elf::EM_AMDGPU {
            return Err(bad("not for AMD GPUs"));
        }
        // ELFOSABI_AMDGPU_HSA, code object V4 or later.
        if header.e_ident().os_abi.0 != 64 || header.e_ident().abi_version < 2 {
            return Err(bad("not for amdhsa, code object V4 or later"));
        }
        let machine = header.e_flags(LittleEndian).0 & 0xff;
        let chip = [GFX942, GFX950].into_iter().find(|c| c.machine == machine);
        let chip = chip.ok_or_else(|| bad(format!("for machine {machine:#x}, neither gfx942 nor gfx950")))?;
        let code = decode::decode(&tools::disassemble(elf, chip.name)?)?;
        let image = image(&file)?;
        let metadata = metadata(&file)?;
        let mut object = CodeObject { chip, kernels: Vec::new(), code, image };
        for entry in list(&metadata, "amdhsa.kernels") {
            let kernel = object.kernel_of(&file, entry)?;
            object.kernels.push(kernel);
        }
        Ok(object)
    }

    /// The kernel of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn kernel(&self, name: &str) -> Result<&Kernel, Error> {
        let found = self.kernels.iter().find(|k| k.name == name);
        found.ok_or_else(|| {
            let names: Vec<&str> = self.kernels.iter().map(|k| k.name.as_str()).collect();
            bad(format!("no kernel `{name}` (there are: {})", names.join(", ")))
        })
    }

    /// How many instructions were decoded, and the first that cannot be executed.
    pub fn coverage(&self) -> (usize, Vec<&str>) {
        let missing = |i: &&Inst| crate::isa::find(&i.name).is_none();
        (self.code.len(), self.code.iter().filter(missing).map(|i| i.text.as_str()).collect())
    }

    fn kernel_of(&self, file: &ElfFile64<'_, LittleEndian>, entry: &Value) -> Result<Kernel, Error> {
        let name = text(entry, ".name").ok_or_else(|| bad("a kernel without `.name`"))?.to_owned();
        let wrong = |reason: String| bad(format!("kernel {name}: {reason}"));
        let symbol = text(entry, ".symbol").ok_or_else(|| wrong("no `.symbol`".into()))?;
        let address = file.symbols().chain(file.dynamic_symbols()).find(|s| s.name() == Ok(symbol));
        let address = address.ok_or_else(|| wrong(format!("no symbol `{symbol}`")))?.address();
        let descriptor = usize::try_from(address).ok().and_then(|at| self.image.get(at..at.checked_add(64)?));
        let d = descriptor.ok_or_else(|| wrong("its descriptor is not in the file".into()))?;
        let word = |at: usize| u32::from_le_bytes([d[at], d[at + 1], d[at + 2], d[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([d[at], d[at + 1]]);
        let offset = i64::from(word(16)) | i64::from(word(20)) << 32;
        let (rsrc3, rsrc1, rsrc2, properties) = (word(44), word(48), word(52), half(56));
        let preload = (usize::from(half(58) & 0x7f), usize::from(half(58) >> 7));
        // Hardware that preloads skips the code that loads the arguments where it does not.
        let start = address.wrapping_add_signed(offset) + if preload.0 > 0 { 256 } else { 0 };
        let entry_index = self.code.binary_search_by_key(&start, |i| i.address);
        let entry_index = entry_index.map_err(|_| wrong(format!("no instruction at its entry, {start:#x}")))?;
        if properties >> 10 & 1 != 0 {
            return Err(wrong("it is for waves of 32 lanes".into()));
        }
        if rsrc1 >> 12 & 0xf != 0 {
            return Err(wrong("it rounds other than to nearest even, which is not modelled".into()));
        }
        let total = (rsrc1 as u16 & 0x3f) * 8 + 8;
        let vector = ((rsrc3 as u16 & 0x3f) * 4 + 4).min(total);
        let number = |key: &str| number(entry, key).map(|n| n as usize).ok_or_else(|| wrong(format!("no `{key}`")));
        let (lds, scratch, kernarg) = (word(0) as usize, word(4) as usize, word(8) as usize);
        for (key, have) in [
            (".group_segment_fixed_size", lds),
            (".private_segment_fixed_size", scratch),
            (".kernarg_segment_size", kernarg),
            (".wavefront_size", 64),
        ] {
            if number(key)? != have {
                return Err(wrong(format!("`{key}` is {}, its descriptor says {have}", number(key)?)));
            }
        }
        let (arguments, hidden) = arguments(entry, kernarg).map_err(wrong)?;
        Ok(Kernel {
            kernarg_bytes: kernarg,
            lds_bytes: lds,
            scratch_bytes: scratch,
            vector_registers: (vector.min(256), total - vector),
            max_threads: number(".max_flat_workgroup_size")? as u32,
            arguments,
            hidden,
            entry: entry_index,
            mode: Mode {
                flush_in: rsrc1 >> 16 & 1 == 0,
                flush_out: rsrc1 >> 17 & 1 == 0,
                flush_16: rsrc1 >> 18 & 3 != 3,
                clamp_nan: rsrc1 >> 21 & 1 != 0,
                saturate: rsrc1 >> 26 & 1 != 0,
                ieee: rsrc1 >> 23 & 1 != 0,
            },
            properties,
            rsrc2,
            preload,
            name,
        })
    }
}

/// The loaded segments, at their addresses.
fn image(file: &ElfFile64<'_, LittleEndian>) -> Result<Vec<u8>, Error> {
    let mut image = Vec::new();
    for segment in file.segments() {
        let data = segment.data().map_err(|e| bad(format!("a segment is cut off: {e}")))?;
        let at = usize::try_from(segment.address()).unwrap_or(usize::MAX);
        if at > 1 << 30 {
            return Err(bad("a segment lies beyond 1 GiB"));
        }
        if image.len() < at + data.len() {
            image.resize(at + data.len(), 0);
        }
        image[at..at + data.len()].copy_from_slice(data);
    }
    Ok(image)
}

/// The metadata note.
fn metadata(file: &ElfFile64<'_, LittleEndian>) -> Result<Value, Error> {
    let section = file.section_by_name(".note").ok_or_else(|| bad("no section `.note`"))?;
    let data = section.data().map_err(|e| bad(format!("`.note`: {e}")))?;
    let word = |at: usize| data.get(at..at + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize);
    let mut at = 0;
    while let (Some(name), Some(size), Some(kind)) = (word(at), word(at + 4), word(at + 8)) {
        let body = at + 12 + name.next_multiple_of(4);
        // NT_AMDGPU_METADATA.
        if kind == 32 {
            let mut bytes = data.get(body..body + size).ok_or_else(|| bad("the metadata is cut off"))?;
            return rmpv::decode::read_value(&mut bytes).map_err(|e| bad(format!("the metadata: {e}")));
        }
        at = body + size.next_multiple_of(4);
    }
    Err(bad("no metadata"))
}

fn field<'a>(map: &'a Value, key: &str) -> Option<&'a Value> {
    map.as_map()?.iter().find(|(k, _)| k.as_str() == Some(key)).map(|(_, v)| v)
}

fn text<'a>(map: &'a Value, key: &str) -> Option<&'a str> {
    field(map, key)?.as_str()
}

fn number(map: &Value, key: &str) -> Option<u64> {
    field(map, key)?.as_u64()
}

fn list<'a>(map: &'a Value, key: &str) -> &'a [Value] {
    field(map, key).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The arguments of a kernel, given and hidden.
fn arguments(entry: &Value, bytes: usize) -> Result<(Vec<Argument>, Vec<Hidden>), String> {
    let (mut given, mut hidden) = (Vec::new(), Vec::new());
    for arg in list(entry, ".args") {
        let kind = text(arg, ".value_kind").ok_or("an argument without `.value_kind`")?.to_owned();
        let at = |key: &str| number(arg, key).map(|n| n as usize).ok_or_else(|| format!("an argument without `{key}`"));
        let (offset, size) = (at(".offset")?, at(".size")?);
        if offset + size > bytes {
            return Err(format!("an argument at {offset} lies outside of its {bytes} bytes"));
        }
        if kind.starts_with("hidden_") {
            hidden.push(Hidden { kind, offset, size });
        } else {
            let name = text(arg, ".name").unwrap_or_default().to_owned();
            given.push(Argument { name, kind, offset, size });
        }
    }
    Ok((given, hidden))
}
