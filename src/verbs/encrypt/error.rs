//! What can go wrong in encrypting a device in place, and what helps.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
};

use crate::{
    base::{advice::Advice, exit::Exit, key::KeyReference},
    volumes::{
        filesystem::{Kind, Unfit},
        in_place::{Fault, ROOM_BYTES},
    },
};

/// It cannot be encrypted, or not now.
#[derive(Debug, thiserror::Error)]
pub enum EncryptError {
    /// Nothing on the device is a file system whose size is known here.
    #[error("{} cannot be encrypted in place: {}", .path.display(), in_words(.unfit))]
    Unfit { path: PathBuf, unfit: Unfit },
    /// It is a volume.
    #[error("{} is encrypted already: it has a LUKS header", .0.display())]
    Encrypted(PathBuf),
    /// The file system leaves no room for the header.
    #[error(
        "the {kind} file system on {} is too large: it has {size_bytes} bytes, and may have {most_bytes} so that the header finds room",
        .path.display()
    )]
    NoRoom { path: PathBuf, kind: Kind, size_bytes: u64, most_bytes: u64 },
    /// e2fsck or resize2fs.
    #[error("cannot shrink the file system on {}: {program} says: {words}", .path.display())]
    Shrink { path: PathBuf, program: &'static str, words: String },
    /// A signal.
    #[error("the encryption of {} is paused: {percent} % are done", .path.display())]
    Paused { path: PathBuf, percent: u64 },
    /// Neither what was there before nor what was written from there.
    #[error("the start of {} was changed at byte {at} while its first part waits at its end, encrypted under the key {key}", .path.display())]
    HalfWritten { path: PathBuf, at: u64, key: KeyReference },
    /// The engine has stopped.
    #[error("the encryption of {} does not go on", .path.display())]
    Fault {
        path: PathBuf,
        #[source]
        source: Fault,
    },
}

fn in_words(unfit: &Unfit) -> String {
    match unfit {
        Unfit::Other(None) => "no ext4, xfs or btrfs file system is on it".to_owned(),
        Unfit::Other(Some(found)) => format!("only one ext4, xfs or btrfs file system can be, and it holds {found}"),
        Unfit::Unclean(kind) => format!("its {kind} file system was not unmounted in good order"),
        Unfit::Spread(kind) => format!("its {kind} file system is on other devices, too"),
    }
}

impl EncryptError {
    /// A closure for what the engine says.
    pub fn fault(path: &Path) -> impl FnOnce(Fault) -> Self {
        let path = path.to_owned();
        move |source| Self::Fault { path, source }
    }
}

impl Advice for EncryptError {
    fn exit(&self) -> Exit {
        match self {
            Self::Unfit { unfit: Unfit::Unclean(_), .. } => Exit::Busy,
            Self::Unfit { .. } | Self::Encrypted(_) | Self::NoRoom { .. } => Exit::InTheWay,
            Self::Paused { .. } => Exit::Paused,
            Self::HalfWritten { .. } | Self::Fault { source: Fault::Changed(_) | Fault::Forged, .. } => Exit::Header,
            Self::Shrink { .. } | Self::Fault { .. } => Exit::Io,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Unfit { path, unfit: Unfit::Unclean(Kind::Ext) } => {
                format!("if no other host and no hibernated system has it mounted: e2fsck -f {}", path.display()).into()
            }
            Self::Unfit { unfit: Unfit::Unclean(_), .. } => {
                "if no other host and no hibernated system has it mounted: mount and unmount it".into()
            }
            Self::Unfit { .. } => {
                "'cryptattach format' makes a new volume on another device; copy the data there, and check them".into()
            }
            Self::Encrypted(path) => format!("'cryptattach explain {}' says more of it", path.display()).into(),
            Self::NoRoom { path, kind: Kind::Ext, most_bytes, .. } => format!(
                "shrink it: --shrink does that, or: e2fsck -f {0} && resize2fs {0} {1}K; or make the device larger by {2}",
                path.display(),
                most_bytes / 1024,
                mib()
            )
            .into(),
            Self::NoRoom { kind: Kind::Xfs, .. } => {
                format!("xfs cannot be shrunk: make the device larger by {} (lvextend, a larger partition)", mib()).into()
            }
            Self::NoRoom { kind: Kind::Btrfs, size_bytes, most_bytes, .. } => format!(
                "mount it, shrink it and unmount it: btrfs filesystem resize -{}K MOUNTPOINT; or make the device larger by {}",
                (size_bytes - most_bytes).div_ceil(1024),
                mib()
            )
            .into(),
            Self::Shrink { program: "resize2fs", .. } => {
                format!("make room in it, or make the device larger by {}; nothing is encrypted yet", mib()).into()
            }
            Self::Shrink { path, .. } => {
                format!("e2fsck -f {} says more; nothing is encrypted yet", path.display()).into()
            }
            Self::Paused { path, .. } => format!("go on: cryptattach encrypt {}", path.display()).into(),
            Self::HalfWritten { .. } => {
                "write nothing more to it, and make a copy of the whole device: the first MiB is in the last one, 'docs/encrypt.md' \
                 says how to have it back"
                    .into()
            }
            Self::Fault { source: Fault::Changed(_) | Fault::Forged, .. } => {
                "write nothing to the device: its header may be an older one, or somebody has written to it; nothing was encrypted \
                 twice"
                    .into()
            }
            Self::Fault { path, .. } => {
                format!("find out why (dmesg); then go on: cryptattach encrypt {}", path.display()).into()
            }
        })
    }
}

fn mib() -> String {
    format!("{} MiB", ROOM_BYTES >> 20)
}
