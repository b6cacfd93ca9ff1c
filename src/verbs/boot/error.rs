//! What can go wrong at a boot, and with what a boot needs.

use std::{borrow::Cow, io, path::PathBuf, sync::Arc, time::Duration};

use super::image::KeptOut;
use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{KeyReference, StoreName},
    },
    config::DeviceSpec,
    verbs::error::Error,
};

/// A boot did not attach all its volumes.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Some are not open.
    #[error("not attached: {}", .0.join(", "))]
    Unfinished(Vec<String>),
    /// What a source needs did not come in time.
    #[error("{what} did not appear within {:.0} s", .after.as_secs_f32())]
    TooLate {
        /// "a route to 10.0.2.100", ...
        what: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The TPM does not prove that it opens no more keys in this boot.
    #[error("PCR 15 is not extended: {why}")]
    NotLatched {
        why: String,
        /// `latch = "required"`: the boot must not go on.
        required: bool,
    },
    /// A store that is to be shut at the end of a boot is not proven to be.
    #[error("whoever runs next in this boot can still read the store '{store}': {why}")]
    StoreOpen { store: StoreName, why: String },
    /// The lockbox was open and is closed, so that the system that comes next does not have it.
    #[error("the lockbox was closed: {0}")]
    LockboxShut(String),
    /// The lockbox did not open, for any volume of this boot.
    #[error(transparent)]
    LockboxClosed(Arc<Error>),
    /// The one place where a boot looks has no configuration.
    #[error("a boot has no configuration: {} does not exist", .0.display())]
    NoConfiguration(PathBuf),
    /// A file system with keys cannot be mounted.
    #[error("cannot mount {device} on {}", .at.display())]
    Mount {
        device: DeviceSpec,
        at: PathBuf,
        #[source]
        source: io::Error,
    },
    /// An image cannot be read.
    #[error("cannot read the image {}", .path.display())]
    Image {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// An image lacks something, or has what it should not.
    #[error("the image {} is not fit to boot this machine", .0.display())]
    Unfit(PathBuf),
    /// The initramfs lacks what opens a volume.
    #[error("a boot cannot open the volume with {key}")]
    KeptOut {
        key: KeyReference,
        /// What it lacks.
        #[source]
        source: KeptOut,
    },
}

impl Advice for BootError {
    fn exit(&self) -> Exit {
        match self {
            Self::Unfinished(_) => Exit::BootUnfinished,
            Self::TooLate { .. } => Exit::StoreUnavailable,
            Self::NotLatched { required: true, .. } => Exit::BootUnlatched,
            Self::NotLatched { required: false, .. } | Self::StoreOpen { .. } => Exit::Tpm,
            Self::LockboxShut(_) => Exit::KeyRefused,
            Self::LockboxClosed(error) => error.exit(),
            Self::Image { source, .. } if source.kind() == io::ErrorKind::Unsupported => Exit::System,
            Self::Mount { .. } | Self::Image { .. } => Exit::Io,
            Self::NoConfiguration(_) | Self::Unfit(_) | Self::KeptOut { .. } => Exit::Config,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Unfinished(_) => "/run/cryptattach/boot.log says why",
            Self::TooLate { .. } => {
                "check that it is plugged in, that its server runs, and that the initramfs has its driver ('cryptattach doctor --image')"
            }
            Self::NotLatched { required: true, .. } => {
                "the machine powers off; power it on again. If this persists, find out what sits between it and its TPM. Without a working \
                 TPM the volumes open by a passphrase in a rescue system only"
            }
            Self::NotLatched { required: false, .. } | Self::StoreOpen { .. } => {
                "power the machine off and on; if this persists, find out what sits between this machine and its TPM"
            }
            Self::LockboxShut(_) => {
                "if this system is not the one that you expect, do not trust it; else power the machine off and on: the lockbox opens in a \
                 boot that opens all its volumes by their keys"
            }
            Self::LockboxClosed(error) => return error.next_step(),
            Self::Mount { .. } => "check the device's file system, and its type in [[boot.mounts]]",
            Self::Unfit(_) => "change the configuration or rebuild the image (update-initramfs -u, dracut -f)",
            Self::KeptOut { .. } => {
                "let the boot find it on another disk ([[boot.mounts]]), have the TPM open the lockbox, or see 'What is in the initramfs' \
                 in docs/boot.md"
            }
            Self::Image { source, .. } if source.kind() == io::ErrorKind::Unsupported => {
                "install the one that makes this machine's images: initramfs-tools, dracut or mkinitcpio"
            }
            Self::Image { source, .. } if source.kind() == io::ErrorKind::NotFound => return None,
            Self::Image { .. } => "check that it is an initramfs; rebuild it (update-initramfs -u, dracut -f)",
            Self::NoConfiguration(_) => {
                "a boot heeds neither --config nor CRYPTATTACH_CONFIG: write the configuration there ('cryptattach init', or a copy of \
                 yours)"
            }
        };
        Some(step.into())
    }
}
