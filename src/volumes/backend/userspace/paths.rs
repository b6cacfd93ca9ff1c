//! Where the backend keeps what outlives one command: a directory per mapping, a lock per name, a link per device.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::Flock;
use serde::{Deserialize, Serialize};

use crate::{
    base::mapping_name::MappingName,
    sys::lock,
    volumes::backend::{BackendError, once},
};

/// Directories of this backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Paths {
    /// A directory per mapping is made here, for root only.
    pub state: PathBuf,
    /// A symbolic link per mapping is made here.
    pub links: PathBuf,
}

impl Default for Paths {
    fn default() -> Self {
        Self { state: "/run/cryptattach".into(), links: "/dev/disk/by-cryptattach".into() }
    }
}

impl Paths {
    /// The mapping's directory.
    pub fn directory(&self, name: &MappingName) -> PathBuf {
        self.state.join(name.as_str())
    }

    /// The path under which users find the plaintext device.
    pub fn link(&self, name: &MappingName) -> PathBuf {
        self.links.join(name.as_str())
    }

    /// Where the FUSE file system is mounted.
    pub fn export(&self, name: &MappingName) -> PathBuf {
        self.directory(name).join("export")
    }

    /// The file that is the mapping's plaintext.
    pub fn file(&self, name: &MappingName) -> PathBuf {
        self.export(name).join(super::fuse::FILE_NAME)
    }

    /// Where NBD clients connect.
    pub fn socket(&self, name: &MappingName) -> PathBuf {
        self.directory(name).join("nbd.sock")
    }

    /// Where commands connect.
    pub fn control(&self, name: &MappingName) -> PathBuf {
        self.directory(name).join("control.sock")
    }

    /// Makes the directory for all mappings.
    pub fn create(&self) -> Result<(), BackendError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.state)
            .map_err(BackendError::failed(format!("cannot make the directory {}", self.state.display())))
    }

    /// Waits until no other command makes or removes a mapping of that name.
    ///
    /// The lock belongs to the open file: a worker that inherits it keeps it if the command dies. Lock files stay, for
    /// removing one would let two commands lock two files of one name. Their names begin with a dot, which no mapping's does.
    pub fn lock(&self, name: &MappingName, patience: Duration) -> Result<Flock<File>, BackendError> {
        let path = self.state.join(format!(".{name}.lock"));
        lock::lock(&path, patience).map_err(once::busy(name, &path))
    }

    /// Names of all mappings that have a directory.
    pub fn names(&self) -> io::Result<Vec<MappingName>> {
        let entries = match fs::read_dir(&self.state) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            // Beside the mappings' directories there is what the boot has left.
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().to_str().and_then(|name| name.parse().ok()));
            }
        }
        names.sort();
        Ok(names)
    }

    /// Makes the mapping's link, in place of a stale one. What is no link is somebody else's, and stays.
    pub fn make_link(&self, name: &MappingName, to: &Path) -> io::Result<()> {
        fs::create_dir_all(&self.links)?;
        self.remove_link(name)?;
        std::os::unix::fs::symlink(to, self.link(name))
    }

    /// Refuses a name in whose place something stands that is no link.
    pub fn require_link(&self, name: &MappingName) -> Result<(), BackendError> {
        let link = self.link(name);
        match fs::symlink_metadata(&link) {
            Ok(there) if !there.is_symlink() => {
                let by = format!("{} exists and is not a link", link.display());
                Err(BackendError::Foreign { name: name.clone(), by })
            }
            _ => Ok(()),
        }
    }

    /// Removes the mapping's link, if there is one.
    pub fn remove_link(&self, name: &MappingName) -> io::Result<()> {
        let link = self.link(name);
        match fs::symlink_metadata(&link) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Ok(there) if !there.is_symlink() => Ok(()),
            _ => fs::remove_file(link),
        }
    }

    /// Removes the mapping's directory; its name is free from one moment to the next.
    pub fn remove_directory(&self, name: &MappingName) -> io::Result<()> {
        let doomed = self.state.join(format!(".{name}.{}", std::process::id()));
        match fs::rename(self.directory(name), &doomed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.and_then(|()| fs::remove_dir_all(doomed)),
        }
    }
}
