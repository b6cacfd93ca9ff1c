//! Files that appear whole or not at all, and that survive a power cut.
//!
//! A file is written under another name, flushed, and then takes its own name; the folder is flushed before a call returns
//! (fsync(2)). Writers of a folder take turns, by a lock file in it; readers need no lock, for a file is whole at all times.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    path::{Path, PathBuf},
};

use nix::{fcntl::Flock, libc};
use tempfile::NamedTempFile;

use super::lock;

/// The file that is being written; a kill leaves it, and the next writer removes it. Writers take turns, so one name will do,
/// and nobody has to read the whole folder to find it.
const UNFINISHED: &str = ".unfinished";

/// Only those who may write to the folder may open it, so that a mere reader cannot keep writers waiting.
const LOCK: &str = ".lock";

/// A folder that nobody else writes to while this is held.
pub struct Folder {
    path: PathBuf,
    folder: File,
    _lock: Flock<File>,
}

impl Folder {
    /// Waits for other writers, with an end, and removes what a killed one left.
    pub fn lock(path: &Path) -> io::Result<Self> {
        let folder = File::open(path)?;
        let lock = lock::lock(&path.join(LOCK), lock::PATIENCE)?;
        match fs::remove_file(path.join(UNFINISHED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(Self { path: path.to_owned(), folder, _lock: lock }),
        }
    }

    /// Makes the folder (mode 0700, with its parents) unless it is there, and locks it.
    pub fn make(path: &Path) -> io::Result<Self> {
        if !path.is_dir() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
            File::open(folder_of(path))?.sync_all()?;
        }
        Self::lock(path)
    }

    /// Writes a new file; `AlreadyExists` if there is one of that name.
    pub fn create(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.written(bytes)?.persist_noclobber(self.path.join(name)).map_err(|refused| refused.error)?;
        self.folder.sync_all()
    }

    /// Writes a file, in place of the one of that name.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.written(bytes)?.persist(self.path.join(name)).map_err(|refused| refused.error)?;
        self.folder.sync_all()
    }

    /// The same, with mode and owner of the one of that name, which others may have to read.
    pub fn replace_content(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        persist_as(self.written(bytes)?, &self.path.join(name))?;
        self.folder.sync_all()
    }

    /// Removes a file.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))?;
        self.folder.sync_all()
    }

    /// The bytes in a flushed file that has no final name yet.
    fn written(&self, bytes: &[u8]) -> io::Result<NamedTempFile> {
        fill(tempfile::Builder::new().prefix(UNFINISHED).rand_bytes(0).tempfile_in(&self.path)?, bytes)
    }
}

/// A file that is not trusted: nothing but a file is read, since a pipe would keep us waiting for ever, and no more than one byte
/// beyond what fits, so that the reader sees that it is too long.
pub fn read_bounded(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Writes a file in a folder that is not ours to lock, in place of the one of that name. Its owner alone may read it.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    replace_as(path, bytes, Permissions::from_mode(0o600))
}

/// Likewise, with this mode.
pub fn replace_as(path: &Path, bytes: &[u8], mode: Permissions) -> io::Result<()> {
    let written = written(path, bytes)?;
    written.as_file().set_permissions(mode)?;
    written.persist(path).map_err(|refused| refused.error)?;
    File::open(folder_of(path))?.sync_all()
}

/// Likewise, with mode and owner of the one of that name.
pub fn replace_content(path: &Path, bytes: &[u8]) -> io::Result<()> {
    persist_as(written(path, bytes)?, path)?;
    File::open(folder_of(path))?.sync_all()
}

/// In place of the file at this path, with its mode and owner.
fn persist_as(written: NamedTempFile, path: &Path) -> io::Result<()> {
    let before = fs::metadata(path)?;
    fchown(written.as_file(), Some(before.uid()), Some(before.gid()))?;
    // After its owner: that takes away some bits.
    written.as_file().set_permissions(before.permissions())?;
    written.as_file().sync_all()?;
    written.persist(path).map(drop).map_err(|refused| refused.error)
}

/// Likewise a new one, which its owner alone can read; `AlreadyExists` if there is one of that name.
pub fn create(path: &Path, bytes: &[u8]) -> io::Result<()> {
    written(path, bytes)?.persist_noclobber(path).map_err(|refused| refused.error)?;
    File::open(folder_of(path))?.sync_all()
}

/// The bytes in a flushed file beside it that has no final name yet, nor the name of anybody else's.
fn written(path: &Path, bytes: &[u8]) -> io::Result<NamedTempFile> {
    fill(tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(folder_of(path))?, bytes)
}

fn fill(mut file: NamedTempFile, bytes: &[u8]) -> io::Result<NamedTempFile> {
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    Ok(file)
}

/// The folder that a path is in; the current one for a bare name.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    }
}

/// The names of a folder's files that end so, without that end and in order; none if there is no such folder.
pub fn stems(path: &Path, end: &str) -> io::Result<Vec<String>> {
    let mut stems = Vec::new();
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(stems),
        entries => entries?,
    };
    for entry in entries {
        let name = entry?.file_name();
        match name.to_str().and_then(|name| name.strip_suffix(end)) {
            Some(stem) if !stem.starts_with('.') => stems.push(stem.to_owned()),
            _ => {}
        }
    }
    stems.sort_unstable();
    Ok(stems)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_whose_content_is_replaced_keeps_mode_and_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "one").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        // Whoever may not give files away keeps its own.
        let is_root = std::os::unix::fs::chown(&path, Some(1), Some(2)).is_ok();
        let folder = Folder::lock(folder.path()).unwrap();
        folder.replace_content("a", b"two").unwrap();
        let after = fs::metadata(&path).unwrap();
        assert_eq!((fs::read(&path).unwrap(), after.mode() & 0o7777), (b"two".to_vec(), 0o640));
        assert!(!is_root || (after.uid(), after.gid()) == (1, 2));
        assert!(folder.replace_content("b", b"new").is_err(), "there is nothing to replace");
    }

    #[test]
    fn a_killed_writer_leaves_no_file_and_its_remains_go() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er");
        let first = Folder::make(&path).unwrap();
        first.create("a.jwe", b"one").unwrap();
        drop(first);
        fs::write(path.join(UNFINISHED), b"{\"protected\":\"ey").unwrap();
        assert_eq!(stems(&path, ".jwe").unwrap(), ["a"]);

        let second = Folder::lock(&path).unwrap();
        assert!(!path.join(UNFINISHED).exists(), "the remains are gone");
        assert_eq!(second.create("a.jwe", b"two").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(path.join("a.jwe")).unwrap(), b"one");
        second.replace("a.jwe", b"two").unwrap();
        assert_eq!(fs::read(path.join("a.jwe")).unwrap(), b"two");
        second.remove("a.jwe").unwrap();
        assert!(stems(&path, ".jwe").unwrap().is_empty());
        assert!(stems(&path.join("none"), ".jwe").unwrap().is_empty());
    }
}
