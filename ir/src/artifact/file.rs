//! The bytes of a file around its header.

use super::{ALIGN, FORMAT_VERSION, Header, MAGIC, Section};
use serde::Deserialize;

/// Largest header that is read, in bytes.
pub const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Bytes before the header.
const PREFIX: usize = 56;

/// Why bytes are no artifact that this dsc can use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArtifactError {
    /// The first bytes are not [`MAGIC`].
    #[error("it is not a dsc artifact; give a file that `dsc compile` wrote")]
    NotAnArtifact,
    /// Another format version.
    #[error(
        "it has format version {found}, written by {writer}; this dsc reads version {FORMAT_VERSION}: {remedy}",
        writer = .compiler.as_deref().unwrap_or("another dsc"),
        remedy = if *.found > FORMAT_VERSION { "update dsc, or compile the model again with this one" } else { "compile the model again" }
    )]
    Version {
        /// The file's version.
        found: u32,
        /// Which compiler wrote it, if the header says so.
        compiler: Option<String>,
    },
    /// The file ends early.
    #[error("it is cut off: {have} bytes of at least {need}; copy or compile it again")]
    Truncated {
        /// Bytes it should have.
        need: u64,
        /// Bytes it has.
        have: u64,
    },
    /// The header is not what was written.
    #[error("its header is damaged ({0}); copy or compile it again")]
    HeaderDamaged(String),
    /// A section is not what was written.
    #[error("its section `{0}` is damaged (the bytes do not have their hash); copy or compile it again")]
    SectionDamaged(String),
    /// A section is wanted that is not there.
    #[error("it has no section `{0}`; compile the model again")]
    NoSection(String),
    /// The header breaks the schema: a fault of the compiler that wrote it.
    #[error("it is intact but invalid, which is a bug of the dsc that wrote it:\n  {}", .0.join("\n  "))]
    Invalid(Vec<String>),
}

/// The bytes of an artifact. Puts the offsets, sizes and hashes of `sections` in the header.
pub fn write(header: &mut Header, sections: &[(&str, &[u8])]) -> Vec<u8> {
    let entry = |(name, bytes): &(&str, &[u8])| Section {
        name: name.to_string(),
        offset: 0,
        bytes: bytes.len() as u64,
        hash: blake3::hash(bytes).to_hex().to_string(),
    };
    header.sections = sections.iter().map(entry).collect();
    // Offsets are part of the header and follow from its length: more digits may push them on, never back.
    let json = loop {
        let json = serde_json::to_vec(header).expect("strings, numbers and lists are JSON");
        let mut at = (PREFIX + json.len()) as u64;
        let mut settled = true;
        for section in &mut header.sections {
            at = at.next_multiple_of(ALIGN);
            settled &= section.offset == at;
            section.offset = at;
            at += section.bytes;
        }
        if settled {
            break json;
        }
    };
    let mut file = Vec::new();
    file.extend(MAGIC);
    file.extend(FORMAT_VERSION.to_le_bytes());
    file.extend([0; 4]);
    file.extend((json.len() as u64).to_le_bytes());
    file.extend(blake3::hash(&json).as_bytes());
    file.extend(json);
    for (section, (_, bytes)) in header.sections.iter().zip(sections) {
        file.resize(section.offset as usize, 0);
        file.extend(*bytes);
    }
    file
}

/// Reads and checks all but the contents of sections (see [`section`]).
pub fn read(file: &[u8]) -> Result<Header, ArtifactError> {
    let damaged = |what: &str| Err(ArtifactError::HeaderDamaged(what.to_string()));
    if !file.starts_with(&MAGIC[..file.len().min(8)]) || file.is_empty() {
        return Err(ArtifactError::NotAnArtifact);
    }
    if file.len() < PREFIX {
        return Err(ArtifactError::Truncated { need: PREFIX as u64, have: file.len() as u64 });
    }
    let version = u32::from_le_bytes([file[8], file[9], file[10], file[11]]);
    let length = u64::from_le_bytes([16, 17, 18, 19, 20, 21, 22, 23].map(|i| file[i]));
    if length > MAX_HEADER_BYTES {
        return damaged("its length is beyond reason");
    }
    let end = PREFIX as u64 + length;
    let json = file.get(PREFIX..end as usize).ok_or(ArtifactError::Truncated { need: end, have: file.len() as u64 })?;
    let intact = blake3::hash(json).as_bytes() == &file[24..PREFIX];
    if version != FORMAT_VERSION {
        #[derive(Deserialize)]
        struct Writer {
            compiler: String,
        }
        let writer = serde_json::from_slice::<Writer>(json).ok().filter(|_| intact);
        return Err(ArtifactError::Version { found: version, compiler: writer.map(|w| w.compiler) });
    }
    if !intact {
        return damaged("it does not have its hash");
    }
    if file[12..16] != [0; 4] {
        return damaged("reserved bytes are set");
    }
    let header: Header =
        serde_json::from_slice(json).map_err(|e| ArtifactError::Invalid(vec![format!("header: {e}")]))?;
    header.check().map_err(ArtifactError::Invalid)?;
    check_layout(file, end, &header.sections)?;
    Ok(header)
}

/// Sections follow the header and one another, with zeros between, up to the end of the file.
fn check_layout(file: &[u8], header_end: u64, sections: &[Section]) -> Result<(), ArtifactError> {
    let mut at = header_end;
    for s in sections {
        if s.offset != at.next_multiple_of(ALIGN) {
            return Err(ArtifactError::Invalid(vec![format!(
                "section {}: starts at {}, not behind what is before it",
                s.name, s.offset
            )]));
        }
        let gap = (at, s.offset);
        at = s.offset + s.bytes;
        if file.len() as u64 >= gap.1 && file[gap.0 as usize..gap.1 as usize].iter().any(|&b| b != 0) {
            return Err(ArtifactError::HeaderDamaged(format!("bytes before section {} are set", s.name)));
        }
    }
    let have = file.len() as u64;
    match have.cmp(&at) {
        std::cmp::Ordering::Less => Err(ArtifactError::Truncated { need: at, have }),
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => Err(ArtifactError::HeaderDamaged(format!("{} bytes follow its end", have - at))),
    }
}

/// The bytes of a section, once they have been compared with their hash. `header` is what [`read`] gave for `file`.
pub fn section<'a>(file: &'a [u8], header: &Header, name: &str) -> Result<&'a [u8], ArtifactError> {
    let section = header.section(name).ok_or_else(|| ArtifactError::NoSection(name.to_string()))?;
    let end = section.offset.saturating_add(section.bytes);
    let bytes = file
        .get(section.offset as usize..end as usize)
        .ok_or(ArtifactError::Truncated { need: end, have: file.len() as u64 })?;
    if blake3::hash(bytes).to_hex().as_str() != section.hash {
        return Err(ArtifactError::SectionDamaged(name.to_string()));
    }
    Ok(bytes)
}
