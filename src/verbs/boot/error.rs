//! What can go wrong at a boot, and with what a boot needs.

use std::{path::PathBuf, time::Duration};

use super::image::KeptOut;
use crate::{base::key::KeyReference, config::DeviceSpec};

/// A boot did not attach all its volumes.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Some are not open.
    #[error("not attached: {}", .0.join(", "))]
    Unfinished(Vec<String>),
    /// What a source needs did not come in time.
    #[error("{what} did not appear within {} s", .after.as_secs())]
    TooLate {
        /// "a route to 10.0.2.100", ...
        what: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// The lockbox did not open, for another volume of this boot either.
    #[error("the lockbox is closed: {0}")]
    LockboxClosed(String),
    /// A file system with keys cannot be mounted.
    #[error("cannot mount {device} on {}", .at.display())]
    Mount {
        /// The device.
        device: DeviceSpec,
        /// Where.
        at: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// An image cannot be read.
    #[error("cannot read the image {}", .path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// An image lacks something, or has what it should not.
    #[error("the image {} is not fit to boot this machine", .0.display())]
    Unfit(PathBuf),
    /// The initramfs lacks what opens a volume.
    #[error("a boot cannot open the volume with {key}")]
    KeptOut {
        /// The key.
        key: KeyReference,
        /// What it lacks.
        #[source]
        source: KeptOut,
    },
}
