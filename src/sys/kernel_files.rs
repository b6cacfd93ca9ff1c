//! What the kernel offers by path. Without one of these, other errors would blame what is whole.

use std::path::Path;

/// A path of the kernel's that this program needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelFile {
    Proc,
    Sys,
    /// libcryptsetup does nothing without it.
    Random,
    Fuse,
    LoopControl,
    MapperControl,
}

/// It is not there.
#[derive(Debug, thiserror::Error)]
#[error("{} is missing", .0.path())]
pub struct MissingKernelFile(KernelFile);

impl KernelFile {
    /// Says which one is missing.
    pub fn require(self) -> Result<(), MissingKernelFile> {
        if self.is_there_below(Path::new("/")) { Ok(()) } else { Err(MissingKernelFile(self)) }
    }

    fn is_there_below(self, root: &Path) -> bool {
        // An empty directory is there also when nothing is mounted on it.
        let sample = match self {
            Self::Proc => "proc/self/fd",
            Self::Sys => "sys/block",
            _ => self.path().trim_start_matches('/'),
        };
        root.join(sample).exists()
    }

    fn path(self) -> &'static str {
        match self {
            Self::Proc => "/proc",
            Self::Sys => "/sys",
            Self::Random => "/dev/urandom",
            Self::Fuse => "/dev/fuse",
            Self::LoopControl => "/dev/loop-control",
            Self::MapperControl => "/dev/mapper/control",
        }
    }
}

impl MissingKernelFile {
    /// How it comes back.
    pub fn next_step(&self) -> &'static str {
        match self.0 {
            KernelFile::Proc => "mount it: mount -t proc proc /proc",
            KernelFile::Sys => "mount it: mount -t sysfs sysfs /sys",
            KernelFile::Random => "mount /dev: mount -t devtmpfs devtmpfs /dev",
            KernelFile::Fuse => "load the module: modprobe fuse; in a container, pass the node in",
            KernelFile::LoopControl => "load the module: modprobe loop; in a container, pass the node in",
            KernelFile::MapperControl => "load the module: modprobe dm_mod; 'dmsetup mknodes' makes the node",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_directory_is_not_a_mounted_one() {
        let root = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(root.path().join("proc")).expect("made");
        assert!(!KernelFile::Proc.is_there_below(root.path()));
        std::fs::create_dir_all(root.path().join("proc/self/fd")).expect("made");
        assert!(KernelFile::Proc.is_there_below(root.path()));
        assert!(KernelFile::Proc.require().is_ok() && KernelFile::Sys.require().is_ok());
        assert_eq!(MissingKernelFile(KernelFile::Proc).to_string(), "/proc is missing");
    }
}
