//! An artifact on disk, mapped and checked.

use crate::error::Error;
use dsc_ir::artifact::{self, ArtifactError, Header};
use memmap2::Mmap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A mapped artifact whose header passed [`Header::check`].
///
/// The file must not be truncated or rewritten while it is open; replace it by renaming another one over it.
#[derive(Debug)]
pub struct Artifact {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl Artifact {
    /// Maps and checks a file. Sections are compared with their hashes when they are asked for.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Artifact`] with the path and what is wrong.
    pub fn open(path: &Path) -> Result<Artifact, Error> {
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        if !file.metadata().map_err(io)?.is_file() {
            return Err(Error::Artifact { path: path.to_path_buf(), source: ArtifactError::NotAnArtifact });
        }
        // SAFETY: the map is read-only and owned by the artifact, whose slices borrow it. That the file keeps its bytes while
        // it is mapped is asked of the caller in the docs of `Artifact`.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let header = artifact::read(&map).map_err(|source| Error::Artifact { path: path.to_path_buf(), source })?;
        Ok(Artifact { path: path.to_path_buf(), map, header })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything but the bytes of sections.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.map.len() as u64
    }

    /// The bytes of a section, compared with their hash.
    ///
    /// # Errors
    /// [`Error::Artifact`] if there is no such section, or its bytes are damaged.
    pub fn section(&self, name: &str) -> Result<&[u8], Error> {
        artifact::section(&self.map, &self.header, name)
            .map_err(|source| Error::Artifact { path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{COUNT_KERNEL, header, write_artifact};

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Artifact::open(&dir.path().join("none.dsc")), Err(Error::Io { .. })));
        assert!(matches!(Artifact::open(dir.path()), Err(Error::Artifact { .. })));
        let path = write_artifact(dir.path(), &mut header(), COUNT_KERNEL);
        let artifact = Artifact::open(&path).unwrap();
        assert_eq!(artifact.section("code").unwrap(), COUNT_KERNEL);
        assert!(artifact.section("tile").unwrap_err().to_string().contains("no section `tile`"));
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        let damaged = dir.path().join("damaged.dsc");
        std::fs::write(&damaged, &bytes).unwrap();
        let error = Artifact::open(&damaged).unwrap().section("code").unwrap_err().to_string();
        assert!(error.contains("damaged.dsc") && error.contains("section `code` is damaged"), "{error}");
        std::fs::write(&damaged, "").unwrap();
        assert!(Artifact::open(&damaged).unwrap_err().to_string().contains("not a dsc artifact"));
    }
}
