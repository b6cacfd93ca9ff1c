//! What can go wrong in a verb. Each variant keeps its cause; its [`Advice`] stands beside it.

use std::{borrow::Cow, path::PathBuf};

use uuid::Uuid;

use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{KeyReference, StoreName},
        mapping_name::{MappingName, ParseMappingNameError},
    },
    keys::seal::SealError,
    unlock::{self, enrol::EnrolError, receipt::ReceiptError},
    verbs::{boot::BootError, encrypt::EncryptError},
    volumes::{backend::BackendError, header::backup::HeaderBackupError, separation::MalformedConnectionInfo},
};

/// A verb failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The way from the volume to its key.
    #[error(transparent)]
    Unlock(unlock::Error),
    /// The connection information of a volume.
    #[error(transparent)]
    ConnectionInfo(#[from] MalformedConnectionInfo),
    /// What a boot is to attach, or has not attached.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A device that is to be encrypted in place.
    #[error(transparent)]
    Encrypt(#[from] EncryptError),
    /// The enrolment of a host.
    #[error(transparent)]
    Enrol(Box<EnrolError>),
    /// The backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A copy of a header.
    #[error(transparent)]
    Header(#[from] HeaderBackupError),
    /// The volume has no UUID to name the mapping after.
    #[error("{} has no header to name the mapping after", .0.display())]
    NoName(PathBuf),
    /// The text is not a name.
    #[error(transparent)]
    Name(#[from] ParseMappingNameError),
    /// `format` found something.
    #[error("{} is not blank: it holds {found}", .path.display())]
    NotBlank {
        path: PathBuf,
        /// What, and where.
        found: String,
    },
    /// There is no token of clevis.
    #[error("{} has no token of clevis", .0.display())]
    NoClevis(PathBuf),
    /// A token of clevis does not open.
    #[error("the clevis token {token} of {} does not open", .device.display())]
    Clevis {
        device: PathBuf,
        /// Its number.
        token: String,
        #[source]
        source: Box<SealError>,
    },
    /// The text is not a key id.
    #[error("'{id}' is not a valid key id (store '{store}')")]
    NoSuchKey {
        store: StoreName,
        /// What was given as an id.
        id: String,
    },
    /// The key is stored, but the header could not be written or does not read back.
    #[error("the header of {} could not be completed; its key {reference} is stored", .device.display())]
    HalfFormatted {
        device: PathBuf,
        reference: KeyReference,
        #[source]
        source: Box<Error>,
    },
    /// systemd-cryptsetup asks for a volume that is not listed.
    #[error("neither /etc/crypttab nor the configuration has a volume '{0}'")]
    UnknownToCrypttab(String),
    /// A key whose volume is in use.
    #[error("the volume of the key {key} is attached as '{name}': its data is lost once that is detached")]
    Attached { key: KeyReference, name: MappingName },
    /// Nothing is attached by that name.
    #[error("nothing is attached as '{0}'")]
    NotAttached(MappingName),
    /// Nothing is attached that is on that device.
    #[error("nothing on {} is attached", .0.display())]
    NothingOn(PathBuf),
    /// The name is another volume's.
    #[error("'{name}' is the mapping of another volume than that of the key {key}")]
    OtherVolume {
        name: MappingName,
        key: KeyReference,
        #[source]
        source: Box<Error>,
    },
    /// The device is what another volume was attached as.
    #[error("{} leads to the mapping '{name}', which is another volume's plaintext", .device.display())]
    LeadsToMapping { device: PathBuf, name: MappingName },
    /// Something that exists already is in the way.
    #[error("{} exists already", .0.display())]
    Exists(PathBuf),
    /// `init` for a store that is configured.
    #[error("the configuration has a store '{0}' already")]
    StoreExists(StoreName),
    /// The audit record is not what was written, or not where its anchors say.
    #[error("the audit record is not what was written: {} found", if *.faults == 1 { "1 fault".to_owned() } else { format!("{} faults", .faults) })]
    AuditBroken { faults: u64 },
    /// Other things open the volume, and a rotation would make them useless.
    #[error("a rotation of the key of {} makes useless what others have put there: {}", .device.display(), .others.join(", "))]
    OthersOpen {
        device: PathBuf,
        /// Keyslots and tokens.
        others: Vec<String>,
    },
    /// A rotation was asked to stop.
    #[error("the rotation of the key of {} is paused: {percent} % of its data have the new key", .device.display())]
    Paused { device: PathBuf, percent: u64 },
    /// A key is not one that can be moved to another store.
    #[error("the key {key} cannot be moved: {why}")]
    NotMovable {
        key: KeyReference,
        /// In words.
        why: String,
    },
    /// The volume of a key is not at hand.
    #[error("the volume {volume}, which the key {key} opens, is not on this host: no LUKS2 header has that UUID")]
    VolumeElsewhere { key: KeyReference, volume: Uuid },
    /// Some keys would rest on their volumes' devices.
    #[error("of the volumes, {volumes} would not be apart from their keys in '{to}'; nothing was moved")]
    NotApartThere {
        to: StoreName,
        /// How many.
        volumes: usize,
        /// The first one.
        #[source]
        source: Box<Error>,
    },
    /// Some keys of a container could not be moved.
    #[error("could not move {failed} keys of '{from}' to '{to}'")]
    NotAllMoved { from: StoreName, to: StoreName, failed: usize },
    /// A move of all keys was asked to stop.
    #[error("the move of the keys of '{from}' to '{to}' is paused: {waiting} keys are still to be moved")]
    MovePaused { from: StoreName, to: StoreName, waiting: usize },
    /// A signal came before its turn.
    #[error("{} was not begun: the rotation of its container was asked to stop", .0.display())]
    Kept(PathBuf),
    /// The header names a key that is not there, and others are.
    #[error(
        "{} says that its key is {named}, which its store does not have; but there are other keys of this volume: {}",
        .device.display(), .others.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
    )]
    KeyElsewhere { device: PathBuf, named: KeyReference, others: Vec<KeyReference> },
    /// A device and a header that do not belong together.
    #[error("{} is not the header of {}: {why}", .header.display(), .device.display())]
    NotItsHeader {
        device: PathBuf,
        header: PathBuf,
        /// In words.
        why: &'static str,
    },
    /// Another command has it in hand.
    #[error("another command works on {what}")]
    AtWork {
        /// In words.
        what: String,
        /// Says which one.
        #[source]
        source: std::io::Error,
    },
    /// A rotation needs a key until its end.
    #[error("the key {key} is needed: the rotation of {} is not finished, and has data under its old and its new key", .device.display())]
    Rotating { key: KeyReference, device: PathBuf },
    /// Which of two devices is the volume, a person has to say.
    #[error("{} and {} have the same UUID: one is a copy of the other", .device.display(), .copy.display())]
    Copied { device: PathBuf, copy: PathBuf },
    /// Not each volume of a container has a new key.
    #[error("not all volumes of container '{container}' have new keys: {left} left, {failed} failed")]
    NotAllRotated { container: StoreName, left: usize, failed: usize },
    /// An old header stands on a volume whose key was being rotated.
    #[error("the header of {} is older than what the rotation of its key has reached here: part of the data, or all, has the key {new}", .device.display())]
    HeaderRestored { device: PathBuf, new: KeyReference },
    /// libcryptsetup has ended, and the header does not say that it is done.
    #[error("the re-encryption of {} ended before its end", .0.display())]
    Stopped(PathBuf),
    /// An erase was begun, and has not come to its end.
    #[error("the erase of the volume {volume} on {} is begun, and not finished", .device.display())]
    HalfErased {
        device: PathBuf,
        volume: Uuid,
        #[source]
        source: Box<Error>,
    },
    /// A key is deleted only if it opens the volume.
    #[error("nothing proves that the key {key} is that of {}, so it is not deleted", .device.display())]
    NotProven {
        device: PathBuf,
        key: KeyReference,
        #[source]
        source: Box<Error>,
    },
    /// A store gives what it has deleted.
    #[error("the store has accepted the deletion of the key {0}, and still has it")]
    StillThere(KeyReference),
    /// A header does not go.
    #[error("{} still has a LUKS header after that was wiped", .0.display())]
    StillHasHeader(PathBuf),
    /// There is another device under the path by now.
    #[error("{} has no header of the volume {volume} that could be wiped", .path.display())]
    NotTheVolume { path: PathBuf, volume: Uuid },
    /// A second device has the same header.
    #[error("{} is a copy of the volume on {}, whose erase is begun", .device.display(), .begun.display())]
    ErasingCopy { device: PathBuf, begun: PathBuf },
    /// A receipt.
    #[error(transparent)]
    Receipt(#[from] ReceiptError),
    /// `unbind` of what `bind` has not bound.
    #[error("{} was not bound by 'cryptattach bind' on this host", .0.display())]
    NotBound(PathBuf),
    /// Nothing would open the volume any more.
    #[error("{} has no keyslot for a passphrase: the key {key} is all that opens it", .device.display())]
    LastWay { device: PathBuf, key: KeyReference },
    /// The user must agree or choose first.
    #[error("{0}")]
    Usage(String),
    /// Reading or writing a file or stream.
    #[error("cannot {action}")]
    Io {
        /// What, and on which file.
        action: String,
        #[source]
        source: std::io::Error,
    },
}

impl Advice for Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Unlock(error) => error.exit(),
            Self::ConnectionInfo(error) => error.exit(),
            Self::Boot(error) => error.exit(),
            Self::Encrypt(error) => error.exit(),
            Self::Enrol(error) => error.exit(),
            Self::Backend(error) => error.exit(),
            Self::Header(error) => error.exit(),
            Self::Name(error) => error.exit(),
            Self::Clevis { source, .. } => source.exit(),
            Self::Usage(_) | Self::NoName(_) | Self::NoClevis(_) | Self::NotMovable { .. } => Exit::Usage,
            Self::NotAllMoved { .. } => Exit::StoreUnavailable,
            Self::AuditBroken { .. } => Exit::AuditBroken,
            Self::UnknownToCrypttab(_) => Exit::Config,
            Self::NoSuchKey { .. } => Exit::NoKey,
            Self::NotAttached(_) | Self::NothingOn(_) | Self::NotBound(_) | Self::VolumeElsewhere { .. } => {
                Exit::Missing
            }
            Self::Io { .. } => Exit::Io,
            Self::NotBlank { .. }
            | Self::OtherVolume { .. }
            | Self::LeadsToMapping { .. }
            | Self::OthersOpen { .. }
            | Self::Copied { .. }
            | Self::LastWay { .. }
            | Self::Exists(_)
            | Self::StoreExists(_) => Exit::InTheWay,
            Self::AtWork { .. } | Self::Rotating { .. } | Self::Attached { .. } => Exit::Busy,
            Self::Paused { .. } | Self::Kept(_) | Self::NotAllRotated { .. } | Self::MovePaused { .. } => Exit::Paused,
            Self::Stopped(_) => Exit::Io,
            Self::HeaderRestored { .. } => Exit::Header,
            Self::HalfFormatted { source, .. }
            | Self::HalfErased { source, .. }
            | Self::NotProven { source, .. }
            | Self::NotApartThere { source, .. } => source.exit(),
            Self::StillThere(_) => Exit::StoreUnavailable,
            Self::StillHasHeader(_) => Exit::Io,
            Self::NotTheVolume { .. } | Self::NotItsHeader { .. } => Exit::Header,
            Self::KeyElsewhere { .. } => Exit::NoKey,
            Self::ErasingCopy { .. } => Exit::InTheWay,
            Self::Receipt(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Unlock(error) => return error.next_step(),
            Self::ConnectionInfo(error) => return error.next_step(),
            Self::Boot(error) => return error.next_step(),
            Self::Encrypt(error) => return error.next_step(),
            Self::Enrol(error) => return error.next_step(),
            Self::Backend(error) => return error.next_step(),
            Self::Header(error) => return error.next_step(),
            Self::Name(error) => return error.next_step(),
            Self::Attached { key, name } => format!(
                "copy its data elsewhere and detach it ('cryptattach detach {name}'), or delete the key nevertheless: cryptattach key \
                 delete {key} --yes --force"
            )
            .into(),
            Self::NoName(_) => "name the mapping: cryptattach attach DEVICE NAME".into(),
            Self::NotBlank { .. } => "check that this is the right device; --force overwrites its contents".into(),
            Self::HalfFormatted { device, reference, .. } => format!(
                "nothing was on {} before; format it again with --force, and remove the unused key: cryptattach key delete {reference} --yes",
                device.display()
            )
            .into(),
            Self::HalfErased { device, source, .. } => {
                let first = source.next_step().map(|step| format!("{step}; then ")).unwrap_or_default();
                format!("{first}go on: cryptattach key erase {}", device.display()).into()
            }
            Self::NotProven { key, source, .. } => {
                let first = source.next_step().map(|step| format!("{step}; or ")).unwrap_or_default();
                format!("{first}if you know that it is: cryptattach key delete {key} --yes, then erase again").into()
            }
            Self::StillThere(_) => "try again when all of the store's replicas run; the store may lie".into(),
            Self::StillHasHeader(_) => "the device does not keep what is written: destroy it".into(),
            Self::NotTheVolume { volume, .. } => format!(
                "its erase was begun under this path: name the path that it has now ('lsblk --fs' shows the UUIDs); if it is no more, \
                 remove erase/{volume} from the state directory"
            )
            .into(),
            Self::ErasingCopy { begun, .. } => {
                format!("end that first: cryptattach key erase {}", begun.display()).into()
            }
            Self::Receipt(error) => return error.next_step(),
            Self::NoClevis(_) => "--key-file FILE takes a passphrase of the volume".into(),
            Self::Clevis { source, .. } => {
                let first = source.next_step().unwrap_or("'clevis luks list' shows it".into());
                format!("{first}; or take a passphrase of the volume: --key-file FILE").into()
            }
            Self::OthersOpen { .. } => "--drop-others rotates nevertheless; enrol them anew afterwards".into(),
            Self::Paused { device, .. } | Self::Stopped(device) => {
                format!("go on: cryptattach key rotate {}", device.display()).into()
            }
            Self::VolumeElsewhere { .. } => {
                "name its device with --volume, or move the key on the host that has the volume".into()
            }
            Self::NotApartThere { source, .. } => return source.next_step(),
            Self::NotAllMoved { from, to, .. } | Self::MovePaused { from, to, .. } => {
                format!("go on: cryptattach key move --container {from} --to {to}").into()
            }
            Self::Kept(_) => "run the same command again".into(),
            Self::KeyElsewhere { named, others, .. } => {
                let to = others.first().map_or_else(String::new, |key| key.store.to_string());
                format!(
                    "if the header is an old one, 'cryptattach key move {named} --to {to} --volume DEVICE' puts it right; keys that \
                     nothing needs are deleted by 'cryptattach key delete'"
                )
                .into()
            }
            Self::NotItsHeader { .. } => "check which header is the volume's: one file too many would be erased".into(),
            Self::AtWork { .. } => "wait until it has ended".into(),
            Self::Rotating { device, .. } => format!("end it: cryptattach key rotate {}", device.display()).into(),
            Self::Copied { .. } => "remove the copy, or give it another UUID ('cryptsetup luksUUID'): the old key may be the last one that opens it".into(),
            Self::NotAllRotated { container, .. } => {
                format!("the same command goes on with those; 'cryptattach key rotate --container {container} --anew' begins again").into()
            }
            Self::HeaderRestored { .. } => "write nothing to the volume; restore a backup of the header from after that, and keep both keys".into(),
            Self::NotBound(_) => {
                "'cryptattach key delete' deletes a key, and 'cryptsetup token remove' the token that names it".into()
            }
            Self::LastWay { .. } => {
                "leave it bound, or bring a header back that has a passphrase ('cryptattach header restore')".into()
            }
            Self::NotAttached(_) | Self::NothingOn(_) => "'cryptattach list' shows the attached volumes".into(),
            Self::OtherVolume { name, .. } | Self::LeadsToMapping { name, .. } => {
                format!("find out which volume '{name}' is ('cryptattach status {name}'), and detach it if it is a leftover").into()
            }
            Self::AuditBroken { .. } => {
                "keep the files as they are, and find out who could write to them since the last anchor that fits".into()
            }
            Self::NoSuchKey { .. }
            | Self::UnknownToCrypttab(_)
            | Self::Exists(_)
            | Self::StoreExists(_)
            | Self::Usage(_)
            | Self::NotMovable { .. }
            | Self::Io { .. } => return None,
        })
    }
}

impl<E> From<E> for Error
where
    unlock::Error: From<E>,
{
    fn from(error: E) -> Self {
        Self::Unlock(error.into())
    }
}

impl From<EnrolError> for Error {
    fn from(error: EnrolError) -> Self {
        Self::Enrol(Box::new(error))
    }
}

impl Error {
    /// A rotation of what it cannot be done for.
    pub fn detached_header() -> Self {
        Self::Usage("the key of a volume with a detached header cannot be rotated yet".to_owned())
    }

    /// What somebody has claimed, or what cannot be claimed.
    pub(super) fn claimed(what: String, source: std::io::Error) -> Self {
        match source.kind() {
            std::io::ErrorKind::TimedOut => Self::AtWork { what, source },
            _ => Self::io("use the state directory")(source),
        }
    }

    /// A closure that wraps an I/O error with what was tried.
    pub fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}
