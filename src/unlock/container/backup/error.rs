//! What can be wrong with a backup.

use std::{borrow::Cow, io, path::PathBuf};

use uuid::Uuid;

use super::file::MalformedBackup;
use crate::{
    base::{
        advice::Advice,
        chain::chain,
        exit::Exit,
        key::{ContainerKeyId, StoreName},
    },
    unlock::enrol::EnrolError,
    volumes::separation::Refusal,
};

/// A backup cannot be made, read or restored.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error("cannot {action} the backup {}", .path.display())]
    File {
        /// "read", "write".
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} is not a backup of a container", .path.display())]
    Malformed {
        path: PathBuf,
        #[source]
        source: MalformedBackup,
    },
    #[error("the container '{container}' is too large for a backup")]
    TooLarge {
        container: StoreName,
        #[source]
        source: MalformedBackup,
    },
    /// A name is a name in sealed keys, too.
    #[error("{} is a backup of the container '{is}', not of '{asked}'", .path.display())]
    OtherContainer { path: PathBuf, is: StoreName, asked: StoreName },
    #[error("{} is not what the holder of {author} has written", .path.display())]
    Forged { path: PathBuf, author: ContainerKeyId },
    #[error("the backup would rest on a device whose keys it has: the volume {volume} is on {}: {}", .device.display(), chain(&**refusal))]
    Beside { volume: Uuid, device: PathBuf, refusal: Box<Refusal> },
    #[error("the container key of '{0}' has changed while the backup was made")]
    Meanwhile(StoreName),
    #[error("{left_out} objects of '{container}' could not be read, and are not in the backup")]
    LeftOut { container: StoreName, left_out: usize },
    #[error(
        "{} is older than the container '{}'; its author's container key has the fingerprint {fingerprint}. It would bring back: {}",
        .path.display(), .author.container, .brings.join("; ")
    )]
    Older { path: PathBuf, author: ContainerKeyId, fingerprint: String, brings: Vec<String> },
    #[error("{left_alone} objects of '{container}' are not those of the backup, and were left alone")]
    Differ { container: StoreName, left_alone: usize },
    #[error("the store of '{container}' does not hold {not_held} objects of the backup")]
    NotHeld { container: StoreName, not_held: usize },
    #[error("the store gives back something else than the {0} that was restored")]
    ReadBack(String),
    #[error(transparent)]
    Register(Box<EnrolError>),
}

impl From<EnrolError> for BackupError {
    fn from(error: EnrolError) -> Self {
        Self::Register(Box::new(error))
    }
}

impl Advice for BackupError {
    fn exit(&self) -> Exit {
        match self {
            Self::File { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => Exit::InTheWay,
            Self::File { .. } => Exit::Io,
            Self::Malformed { .. } | Self::LeftOut { .. } | Self::ReadBack(_) => Exit::NoSealedKey,
            Self::OtherContainer { .. } | Self::Forged { .. } | Self::Older { .. } => Exit::KeyRefused,
            Self::Beside { .. } => Exit::NotSeparate,
            Self::TooLarge { .. } | Self::Meanwhile(_) | Self::NotHeld { .. } => Exit::StoreUnavailable,
            Self::Differ { .. } => Exit::InTheWay,
            Self::Register(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::File { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                "a backup never overwrites a file: name a new one"
            }
            Self::Malformed { .. } | Self::Forged { .. } => {
                "take another copy of the backup: this one was cut, damaged or changed"
            }
            Self::TooLarge { .. } => "copy the store itself",
            Self::OtherContainer { is, .. } => {
                return Some(
                    format!("sealed keys are bound to their container's name: configure a store '{is}', and restore into that")
                        .into(),
                );
            }
            Self::Beside { .. } => "write the backup to another device, which is kept apart from the volumes",
            Self::Meanwhile(_) => "run the command again once the rotation has ended",
            Self::LeftOut { .. } | Self::ReadBack(_) => {
                "restore these from a replica or an earlier backup of the store"
            }
            Self::Older { .. } => {
                "take a later backup; if there is none, --older restores this one. A host that was removed since could have made \
                 it: compare the fingerprint with what was noted then"
            }
            Self::Differ { .. } => {
                "compare them with 'cryptattach key show'; --replace puts those of the backup in their place"
            }
            Self::NotHeld { .. } => "restore into a store of another kind, under the same name",
            Self::Register(error) => return error.next_step(),
            Self::File { .. } => return None,
        };
        Some(step.into())
    }
}
