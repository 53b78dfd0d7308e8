//! What a code object says of its kernel: the note `NT_AMDGPU_METADATA` of its ELF file, in MessagePack (LLVM's AMDGPU usage document,
//! "Code Object V3 and Above Metadata").

use dsc_ir::artifact::Resources;

/// What the metadata of one kernel says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// The symbol of its descriptor.
    pub symbol: String,
    /// Registers of a lane: vector and accumulator together, and the latter alone.
    pub vector: u32,
    /// Accumulator registers.
    pub accumulators: u32,
    /// Scalar registers.
    pub scalar: u32,
    /// Vector and scalar registers that were spilled.
    pub spills: [u32; 2],
    /// Bytes of scratch of a lane.
    pub scratch_bytes: u32,
    /// Bytes of LDS of a block.
    pub lds_bytes: u32,
    /// Bytes of arguments.
    pub kernarg_bytes: u32,
    /// Lanes of a wave.
    pub wave: u32,
}

impl Metadata {
    /// Reads the metadata of a code object with one kernel.
    ///
    /// # Errors
    /// What is missing or broken.
    pub fn read(object: &[u8]) -> Result<Metadata, String> {
        let note = note(object).ok_or("the code object has no metadata")?;
        let root = Pack { bytes: note }.value().ok_or("the code object's metadata are broken")?;
        let Some(Item::List(kernels)) = root.get("amdhsa.kernels") else {
            return Err("the metadata name no kernels".into());
        };
        let [kernel] = kernels.as_slice() else { return Err(format!("{} kernels instead of one", kernels.len())) };
        let number = |key: &str| match kernel.get(key) {
            Some(Item::Number(n)) => u32::try_from(*n).map_err(|_| format!("{key} is {n}")),
            _ => Err(format!("the metadata have no {key}")),
        };
        let symbol = match kernel.get(".symbol") {
            Some(Item::Text(text)) => text.clone(),
            _ => return Err("the metadata have no .symbol".into()),
        };
        Ok(Metadata {
            symbol,
            vector: number(".vgpr_count")?,
            accumulators: number(".agpr_count").unwrap_or(0),
            scalar: number(".sgpr_count")?,
            spills: [number(".vgpr_spill_count")?, number(".sgpr_spill_count")?],
            scratch_bytes: number(".private_segment_fixed_size")?,
            lds_bytes: number(".group_segment_fixed_size")?,
            kernarg_bytes: number(".kernarg_segment_size")?,
            wave: number(".wavefront_size")?,
        })
    }

    /// The same as an artifact keeps it; [`Resources::blocks_per_sm`] is left 0.
    pub fn resources(&self) -> Resources {
        let spilled = self.spills[0] * 4;
        Resources {
            registers: self.vector,
            accumulators: self.accumulators,
            scalar_registers: self.scalar,
            // Each is stored and loaded at least once.
            spill_bytes: [spilled, spilled],
            scalar_spills: self.spills[1],
            stack_bytes: self.scratch_bytes,
            static_shared_bytes: self.lds_bytes,
            blocks_per_sm: 0,
        }
    }
}

/// Type of the note.
const NT_AMDGPU_METADATA: u32 = 32;
/// Type of a segment of notes.
const PT_NOTE: u32 = 4;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<usize> {
    let long = u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?);
    usize::try_from(long).ok()
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?).into())
}

/// The contents of the metadata's note, by the program headers of an ELF file of 64 bits.
fn note(elf: &[u8]) -> Option<&[u8]> {
    if !elf.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let (table, size, count) = (long(elf, 32)?, half(elf, 54)?, half(elf, 56)?);
    for i in 0..count {
        let header = elf.get(table.checked_add(i.checked_mul(size)?)?..)?;
        if word(header, 0)? != PT_NOTE {
            continue;
        }
        let (offset, bytes) = (long(header, 8)?, long(header, 32)?);
        let mut notes = elf.get(offset..offset.checked_add(bytes)?)?;
        while let (Some(name), Some(length), Some(kind)) = (word(notes, 0), word(notes, 4), word(notes, 8)) {
            let (name, length) = (name as usize, length as usize);
            let start = 12usize.checked_add(name.checked_next_multiple_of(4)?)?;
            let body = notes.get(start..start.checked_add(length)?)?;
            if kind == NT_AMDGPU_METADATA && notes.get(12..12 + name)? == b"AMDGPU\0" {
                return Some(body);
            }
            notes = notes.get(start.checked_add(length.checked_next_multiple_of(4)?)?..).unwrap_or_default();
        }
    }
    None
}

/// A value of MessagePack, of the kinds that metadata have.
enum Item {
    Number(u64),
    Text(String),
    List(Vec<Item>),
    Map(Vec<(Item, Item)>),
    Other,
}

impl Item {
    fn get(&self, key: &str) -> Option<&Item> {
        let Item::Map(entries) = self else { return None };
        entries.iter().find(|(k, _)| matches!(k, Item::Text(text) if text == key)).map(|(_, v)| v)
    }
}

/// A reader of MessagePack.
struct Pack<'a> {
    bytes: &'a [u8],
}

impl Pack<'_> {
    fn take(&mut self, n: usize) -> Option<&[u8]> {
        let (head, rest) = self.bytes.split_at_checked(n)?;
        self.bytes = rest;
        Some(head)
    }

    fn number(&mut self, n: usize) -> Option<u64> {
        Some(self.take(n)?.iter().fold(0, |all, &b| all << 8 | u64::from(b)))
    }

    fn text(&mut self, n: usize) -> Option<Item> {
        Some(Item::Text(String::from_utf8_lossy(self.take(n)?).into_owned()))
    }

    fn list(&mut self, n: usize, depth: u32) -> Option<Item> {
        (0..n).map(|_| self.nested(depth)).collect::<Option<_>>().map(Item::List)
    }

    fn map(&mut self, n: usize, depth: u32) -> Option<Item> {
        (0..n).map(|_| Some((self.nested(depth)?, self.nested(depth)?))).collect::<Option<_>>().map(Item::Map)
    }

    fn value(&mut self) -> Option<Item> {
        self.nested(0)
    }

    fn nested(&mut self, depth: u32) -> Option<Item> {
        // Deeper than any metadata: no input exhausts the stack.
        const DEEPEST: u32 = 16;
        if depth > DEEPEST {
            return None;
        }
        let depth = depth + 1;
        let tag = self.number(1)?;
        match tag {
            0..=0x7f => Some(Item::Number(tag)),
            0x80..=0x8f => self.map(tag as usize & 15, depth),
            0x90..=0x9f => self.list(tag as usize & 15, depth),
            0xa0..=0xbf => self.text(tag as usize & 31),
            0xc0 | 0xc2 | 0xc3 | 0xe0..=0xff => Some(Item::Other),
            0xcc..=0xcf => self.number(1 << (tag - 0xcc)).map(Item::Number),
            0xd0..=0xd3 => self.number(1 << (tag - 0xd0)).map(|_| Item::Other),
            0xd9..=0xdb => {
                let n = self.number(1 << (tag - 0xd9))?;
                self.text(usize::try_from(n).ok()?)
            }
            0xdc | 0xdd => {
                let n = self.number(2 << (tag - 0xdc))?;
                self.list(usize::try_from(n).ok()?, depth)
            }
            0xde | 0xdf => {
                let n = self.number(2 << (tag - 0xde))?;
                self.map(usize::try_from(n).ok()?, depth)
            }
            _ => None,
        }
    }
}
