//! What can go wrong in a verb. Each variant keeps its cause; [`crate::cli`] adds the next step and the exit code.

use std::{error::Error as StdError, path::PathBuf};

use crate::{
    audit::AuditError,
    backend::{BackendError, MappingName, ParseMappingNameError},
    boot::BootError,
    config::ConfigError,
    container::TrustError,
    device::DeviceError,
    enrol::EnrolError,
    key::{ContainerKeyId, HostName, KeyReference, SecretMemoryError, StoreName},
    lockbox::{EntryError, LockboxError},
    seal::SealError,
    separation::{InventoryError, MalformedConnectionInfo, Refusal},
    store::StoreError,
    tpm::TpmError,
    volume::VolumeError,
};

/// A verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The inventory of hosts.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
    /// The connection information of a volume.
    #[error(transparent)]
    ConnectionInfo(#[from] MalformedConnectionInfo),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The header, or the key that does not fit it.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The key store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Sealing a key.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A sealed key does not open, or is not for this volume.
    #[error("the sealed key {reference} is refused")]
    KeyRefused {
        /// The key.
        reference: KeyReference,
        /// Why.
        #[source]
        source: SealError,
    },
    /// A container key does not open.
    #[error("the container key {id} is refused")]
    ContainerKeyRefused {
        /// The container key.
        id: ContainerKeyId,
        /// Why.
        #[source]
        source: SealError,
    },
    /// A sealed key or container key does not open, and the lockbox, which might open it, is closed.
    #[error("{what} is refused while the lockbox of '{host}' is closed")]
    WhileClosed {
        /// "the sealed key ...", "the container key ...".
        what: String,
        /// This host.
        host: HostName,
        /// Why.
        #[source]
        source: SealError,
    },
    /// A container key is not to be sealed under.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The kind of store has no container keys.
    #[error("the store '{0}' has no container keys: only a directory and a Swift container can have them")]
    NoContainerKeys(StoreName),
    /// The container has no container key yet, or there is no container.
    #[error("the container '{0}' has no container key")]
    NoContainerKey(StoreName),
    /// The lockbox.
    #[error(transparent)]
    Lockbox(#[from] LockboxError),
    /// The store cannot give the key now, and the lockbox's entry of it is not used.
    #[error("the key {reference} cannot be had from the store, and the lockbox's entry of it is not used: {}", chain(&**.entry))]
    NeitherStoreNorLockbox {
        /// The key.
        reference: KeyReference,
        /// Why the entry is not used.
        entry: Box<EntryError>,
        /// Why the store cannot.
        #[source]
        source: Box<StoreError>,
    },
    /// There is nobody to seal to.
    #[error("the store '{0}' has no owner to seal a key to")]
    NoOwner(StoreName),
    /// A rotation could not seal all keys anew.
    #[error("{left} keys of '{container}' could not be sealed anew")]
    Unfinished {
        /// The container.
        container: StoreName,
        /// How many.
        left: usize,
    },
    /// The sealed key and the header disagree about the volume.
    #[error("the sealed key {reference} does not fit the header of {}: {what}", .device.display())]
    Mismatch {
        /// The key.
        reference: KeyReference,
        /// The device.
        device: PathBuf,
        /// What differs.
        what: String,
    },
    /// What the store gave back is not what was stored.
    #[error("the store gave back another volume key than was stored as {0}")]
    ReadBack(KeyReference),
    /// Key and data are on the same device, or nothing proves that they are not.
    #[error(transparent)]
    NotSeparate(#[from] Refusal),
    /// What a boot is to attach, or has not attached.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The enrolment of a host.
    #[error(transparent)]
    Enrol(Box<EnrolError>),
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A secret could not be kept safely.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
    /// An override that cannot be recorded is not granted.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The header does not say where the key is, and neither did the user.
    #[error("{} does not say where its key is (it has no token of type 'cryptattach')", .0.display())]
    NoReference(PathBuf),
    /// The volume has no UUID to name the mapping after.
    #[error("{} has no header to name the mapping after", .0.display())]
    NoName(PathBuf),
    /// That is no name.
    #[error(transparent)]
    Name(#[from] ParseMappingNameError),
    /// `format` found something.
    #[error("{} is not blank: it holds {found}", .path.display())]
    NotBlank {
        /// The device or header file.
        path: PathBuf,
        /// What libblkid found.
        found: String,
    },
    /// That is no id that any key has.
    #[error("there is no key '{id}' in '{store}': that is no id of a key")]
    NoSuchKey {
        /// The store.
        store: StoreName,
        /// What was given as an id.
        id: String,
    },
    /// A key that was used before is not used for another volume.
    #[error("the key {key} has been used already, for {volume}; a device is formatted with an unused key only")]
    KeyUsed {
        /// The key.
        key: KeyReference,
        /// For what.
        volume: String,
    },
    /// A key of which nothing says whether it was used before.
    #[error("nothing proves that the key {0} has never been used, and a device is formatted with an unused key only")]
    KeyUnproven(KeyReference),
    /// The key is stored, but the header could not be written or does not read back.
    #[error("the header of {} could not be completed; its key {reference} is stored", .device.display())]
    HalfFormatted {
        /// The device.
        device: PathBuf,
        /// The key.
        reference: KeyReference,
        /// Why.
        #[source]
        source: Box<Error>,
    },
    /// The key has no passphrase with it.
    #[error("the key {0} has no passphrase: its volume was formatted without --keyslot")]
    NoPassphrase(KeyReference),
    /// systemd-cryptsetup asks for a volume that is not listed.
    #[error("neither /etc/crypttab nor the configuration has a volume '{0}'")]
    UnknownToCrypttab(String),
    /// Nothing is attached by that name.
    #[error("nothing is attached as '{0}'")]
    NotAttached(MappingName),
    /// Something that exists already is in the way.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// `init` for a store that is configured.
    #[error("the configuration has a store '{0}' already")]
    StoreExists(StoreName),
    /// The user must agree or choose first.
    #[error("{0}")]
    Usage(String),
    /// Reading or writing a file or stream.
    #[error("cannot {action}")]
    Io {
        /// What, and on which file.
        action: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl From<EnrolError> for Error {
    fn from(error: EnrolError) -> Self {
        Self::Enrol(Box::new(error))
    }
}

impl Error {
    /// A closure that wraps an I/O error with what was tried.
    pub fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}

/// Somebody else's words, without what moves a terminal's cursor.
pub fn printable(text: &str) -> String {
    text.replace(char::is_control, "\u{fffd}")
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn StdError + 'static)) -> String {
    causes(error).map(message).collect::<Vec<_>>().join(": ")
}

/// What an error says, its causes apart. It may quote a store, a disk or another host: each of its lines is [`printable`].
pub fn message(error: &(dyn StdError + 'static)) -> String {
    error.to_string().split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// The error itself, its cause, that one's cause, ...
pub fn causes<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error| {
        let error: &'a (dyn StdError + 'static) = *error;
        error.source()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// serde_json repeats the member's name as it is; a store, or another host's document, chooses it.
    #[test]
    fn what_an_error_quotes_moves_no_cursor() {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Nothing {}
        let error = serde_json::from_str::<Nothing>(r#"{"\u001b[2J": 1}"#).unwrap_err();
        assert!(error.to_string().contains('\u{1b}'));
        assert!(chain(&error).contains("unknown field `\u{fffd}[2J`"), "{}", chain(&error));
        assert_eq!(message(&std::io::Error::other("two\nlines\u{9b}")), "two\nlines\u{fffd}");
    }
}
