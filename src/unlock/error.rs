//! What can go wrong between a volume and its key. Each variant keeps its cause.

use std::{borrow::Cow, path::PathBuf};

use uuid::Uuid;

use super::{
    audit::AuditError,
    container::{TrustError, backup::BackupError},
    lockbox::{EntryError, LockboxError},
    loops::LoopError,
    tenant::TenantError,
};
use crate::{
    base::{
        advice::Advice,
        chain::chain,
        exit::Exit,
        key::{Consumer, ContainerKeyId, HostName, KeyReference, SecretMemoryError, StoreName},
    },
    config::{ConfigError, IdentitySpec, LeafName, Policy},
    keys::{seal::SealError, store::StoreError, tpm::TpmError},
    sys::{device::DeviceError, state::StateError},
    volumes::{
        header::VolumeError,
        separation::{InventoryError, Refusal},
    },
};

/// A volume's key cannot be opened, or must not be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The inventory of hosts.
    #[error(transparent)]
    Inventory(#[from] InventoryError),
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
        reference: KeyReference,
        #[source]
        source: SealError,
    },
    /// It is sealed to public keys, which everybody may have.
    #[error("nobody vouches for the sealed key {0}: it is not sealed under a key of its container")]
    NoAuthor(KeyReference),
    /// The store and a good entry of the lockbox have different keys under one id.
    #[error("the store gives another key {0} than the one in the lockbox")]
    AnotherKey(KeyReference),
    /// The header has another digest than the one that this host has opened.
    #[error(
        "the volume {volume} on {} has another volume key than the one that this host has opened before",
        .device.display()
    )]
    NotPinned { volume: Uuid, device: PathBuf },
    /// A container key does not open.
    #[error("the container key {id} is refused")]
    ContainerKeyRefused {
        id: ContainerKeyId,
        #[source]
        source: SealError,
    },
    /// A sealed key or container key does not open, and the lockbox, which might open it, is closed.
    #[error("{what} is refused while the lockbox of '{host}' is closed")]
    WhileClosed {
        /// "the sealed key ...", "the container key ...".
        what: String,
        host: HostName,
        #[source]
        source: Box<SealError>,
    },
    /// A container key is not to be sealed under.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The kind of store has no container keys.
    #[error("the store '{0}' keeps its keys unsealed, so it has no container keys")]
    NoContainerKeys(StoreName),
    /// The container has no container key yet, or there is no container.
    #[error("the container '{0}' has no container key")]
    NoContainerKey(StoreName),
    /// The lockbox.
    #[error(transparent)]
    Lockbox(Box<LockboxError>),
    /// The store cannot give the key now, and the lockbox's entry of it is not used.
    #[error("cannot get the key {reference} from the store, and its lockbox entry is not usable: {}", chain(&**.entry))]
    NeitherStoreNorLockbox {
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
    /// A host cannot be admitted where the policy has no place for it.
    #[error("the policy of '{container}' does not name hosts, so no host can be admitted: {policy}")]
    NoHostsInPolicy { container: StoreName, policy: Policy },
    /// An entry of the lockbox would open where the policy would not.
    #[error("the policy of '{container}' takes more than this host, which alone opens its lockbox: {policy}")]
    LockboxIsWeaker { container: StoreName, policy: Policy },
    /// A rotation could not seal all keys anew.
    #[error("could not re-seal {left} keys of '{container}'")]
    Unfinished {
        container: StoreName,
        /// How many.
        left: usize,
    },
    /// A backup of a container.
    #[error(transparent)]
    Backup(Box<BackupError>),
    /// A rehearsal of a recovery.
    #[error("a recovery of '{container}' would lose {keys} keys and {container_keys} container keys")]
    WouldBeLost { container: StoreName, keys: usize, container_keys: usize },
    /// A private key that does not belong to a public one.
    #[error("the private key {private} does not open what is sealed to {}", .public.display())]
    NoPair {
        public: PathBuf,
        private: IdentitySpec,
        #[source]
        source: Box<SealError>,
    },
    /// This host would not open what it is about to seal.
    #[error("this host would not open the next container key of '{container}'")]
    WouldLockOut {
        container: StoreName,
        #[source]
        source: Box<SealError>,
    },
    /// The sealed key and the header disagree about the volume.
    #[error("the sealed key {reference} does not fit the header of {}: {what}", .device.display())]
    Mismatch { reference: KeyReference, device: PathBuf, what: String },
    /// The header has the digest of another volume key than the sealed one.
    #[error("the sealed key {reference} no longer fits {}: its header is that of another volume key", .device.display())]
    NoLongerFits { reference: KeyReference, device: PathBuf },
    /// The header is the one that the key was sealed for, but for its UUID.
    #[error("the UUID of {} has been changed: its header says {now}; the key {reference} was sealed for {was}", .device.display())]
    UuidChanged { reference: KeyReference, device: PathBuf, was: Uuid, now: Uuid },
    /// What the store gave back is not what was stored.
    #[error("the store does not return what was stored as {0}")]
    ReadBack(KeyReference),
    /// Key and data are on the same device, or nothing proves that they are not.
    #[error(transparent)]
    NotSeparate(#[from] Refusal),
    /// A store needs itself.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// On whose behalf a hook acts.
    #[error(transparent)]
    Tenant(#[from] TenantError),
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// A secret could not be kept safely.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
    /// An override that cannot be recorded is not granted.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The header does not say where the key is, and neither did the user.
    #[error("{} does not say where its key is (it has no token of type 'cryptattach')", .0.display())]
    NoReference(PathBuf),
    /// The header says that clevis opens the volume, and nothing else.
    #[error("{} does not say where its key is; clevis opens it with {opens}", .device.display())]
    OnlyClevis { device: PathBuf, opens: String },
    /// clevis has no pin for a leaf of a policy.
    #[error("clevis cannot say the policy of '{container}', because of its leaf '{leaf}': {policy}")]
    NotForClevis { container: StoreName, leaf: LeafName, policy: Policy },
    /// The key has no passphrase with it.
    #[error("the key {0} has no passphrase: its volume was formatted without --keyslot")]
    NoPassphrase(KeyReference),
    /// The key is no volume's own.
    #[error("the key {0} is not a volume key: another program has made it")]
    NotOurs(KeyReference),
    /// A key that was used before is not used for another volume.
    #[error("the key {key} has already been used for {volume}; only an unused key can format a device")]
    KeyUsed {
        key: KeyReference,
        /// For what.
        volume: String,
    },
    /// A key that others need is not deleted.
    #[error("the key {key} is in use by: {}", consumers.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    InUse { key: KeyReference, consumers: Vec<Consumer> },
    /// A key of which nothing says whether it was used before.
    #[error("nothing proves that the key {0} has never been used; only an unused key can format a device")]
    KeyUnproven(KeyReference),
    /// Whoever has the value of a key may use it without our knowledge.
    #[error(
        "the value of the unused key {key} is not given out: it could not be noted that the key is used from then on"
    )]
    NotNoted { key: KeyReference, source: Box<Error> },
    /// A volume is not formatted with a key that can be guessed.
    #[error("the key {0} is not a symmetric key of at least 256 bits")]
    KeyTooWeak(KeyReference),
}

impl From<LockboxError> for Error {
    fn from(error: LockboxError) -> Self {
        Self::Lockbox(Box::new(error))
    }
}

impl From<BackupError> for Error {
    fn from(error: BackupError) -> Self {
        Self::Backup(Box::new(error))
    }
}

impl From<StateError> for Error {
    fn from(error: StateError) -> Self {
        Self::Trust(error.into())
    }
}

impl Advice for Error {
    fn exit(&self) -> Exit {
        match self {
            Self::NoReference(_) | Self::KeyTooWeak(_) => Exit::Usage,
            Self::OnlyClevis { .. } => Exit::NoKey,
            Self::NotNoted { source, .. } => source.exit(),
            Self::KeyUsed { .. } | Self::KeyUnproven(_) | Self::InUse { .. } => Exit::InTheWay,
            Self::Config(error) => error.exit(),
            Self::Inventory(error) => error.exit(),
            Self::Device(error) => error.exit(),
            Self::Volume(error) => error.exit(),
            Self::Store(error) => error.exit(),
            Self::Mismatch { .. } | Self::NoLongerFits { .. } | Self::UuidChanged { .. } | Self::NotPinned { .. } => {
                Exit::Header
            }
            Self::Seal(error)
            | Self::KeyRefused { source: error, .. }
            | Self::ContainerKeyRefused { source: error, .. } => error.exit(),
            Self::Tenant(error) => error.exit(),
            Self::Tpm(error) => error.exit(),
            Self::Memory(error) => error.exit(),
            Self::Trust(error) => error.exit(),
            Self::WouldBeLost { .. }
            | Self::WhileClosed { .. }
            | Self::NoPassphrase(_)
            | Self::NotOurs(_)
            | Self::NoPair { .. }
            | Self::WouldLockOut { .. }
            | Self::NoAuthor(_)
            | Self::AnotherKey(_) => Exit::KeyRefused,
            Self::NoContainerKeys(_)
            | Self::NoContainerKey(_)
            | Self::NoOwner(_)
            | Self::NoHostsInPolicy { .. }
            | Self::NotForClevis { .. }
            | Self::LockboxIsWeaker { .. } => Exit::Config,
            Self::Lockbox(error) => error.exit(),
            Self::Backup(error) => error.exit(),
            Self::NeitherStoreNorLockbox { source, .. } => source.exit(),
            Self::Unfinished { .. } => Exit::StoreUnavailable,
            Self::ReadBack(_) => Exit::NoSealedKey,
            Self::NotSeparate(refusal) => refusal.exit(),
            Self::Loop(error) => error.exit(),
            Self::Audit(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Config(error) => return error.next_step(),
            Self::Inventory(error) => return error.next_step(),
            Self::NoReference(_) => "name the key with --key STORE/KEY-ID ('cryptattach key list' shows them)".into(),
            Self::OnlyClevis { device, .. } => format!(
                "'cryptattach key import {} --token' takes it over, and clevis goes on to open it",
                device.display()
            )
            .into(),
            Self::NotForClevis { .. } => "clevis takes Tang servers and thresholds of them; what else is in an any(...) is left out".into(),
            Self::Device(error) => return error.next_step(),
            Self::Volume(error) => return error.next_step(),
            Self::NoLongerFits { device, .. } => format!(
                "if the volume was re-encrypted, keep its new key: cryptattach key import {} --key-file FILE (with a passphrase of it); otherwise restore a backup of the header",
                device.display()
            )
            .into(),
            Self::UuidChanged { device, was, .. } => {
                format!("give it its UUID back: cryptsetup luksUUID --uuid {was} {}", device.display()).into()
            }
            Self::Mismatch { .. } => {
                "do not use this volume until it is clear who changed its header; a backup of the header helps".into()
            }
            Self::Store(error) => return error.next_step(),
            Self::Seal(error)
            | Self::KeyRefused { source: error, .. }
            | Self::ContainerKeyRefused { source: error, .. } => return error.next_step(),
            Self::NoAuthor(_) | Self::AnotherKey(_) => {
                "restore this key from a replica or backup of the key store: somebody may have replaced it".into()
            }
            Self::NotPinned { volume, device } => format!(
                "if the volume was re-encrypted, keep its new key: cryptattach key import {} --key-file FILE (with a passphrase \
                 of it); if you have made it anew, remove volumes/{volume} from the state directory; otherwise restore a \
                 backup of the header, for somebody may have replaced it",
                device.display()
            )
            .into(),
            Self::WhileClosed { .. } => "'cryptattach lockbox open' opens it".into(),
            Self::NotNoted { source, .. } if source.exit() == Exit::PermissionDenied => {
                "let the user of this host write to the store: 'cryptattach container create' with --writer; whoever attaches a volume for the first time, or gets its key, has to".into()
            }
            Self::NotNoted { source, .. } => return source.next_step(),
            Self::KeyUsed { .. } => {
                "check that this is the right device: the volume's data is on another one; if the first attach was interrupted, or the volume is a copy of one that was blank then, it is still empty: make a new one".into()
            }
            Self::InUse { .. } => {
                "have each consumer removed by the program that added it; --force (\"force\": true in a hook's request) deletes the key nevertheless".into()
            }
            Self::KeyUnproven(_) => {
                "check that this is the right device and that it should be blank; if castellan's own driver makes the keys in Barbican, it leaves no such proof: set format_with_unmarked_keys = true in [hooks] of the configuration; every blank device with such a key is then formatted, even if its data is elsewhere"
                    .into()
            }
            Self::KeyTooWeak(_) => "format the volume with cryptsetup".into(),
            Self::NoOwner(_) => "name the store's owner and escrow in the configuration, or use another store".into(),
            Self::NoHostsInPolicy { container, .. } => {
                format!("'cryptattach container policy {container} \"any(hosts, ...)\"' lets hosts in").into()
            }
            Self::LockboxIsWeaker { .. } => "write weaker = true in [lockbox] if that is meant: whoever has this host while an entry \
                 is valid opens its volume without the other leaves"
                .into(),
            Self::NoContainerKey(name) => format!("'cryptattach container create {name}' makes its first one").into(),
            Self::Lockbox(error) => return error.next_step(),
            Self::Backup(error) => return error.next_step(),
            Self::NeitherStoreNorLockbox { source, .. } => return source.next_step(),
            Self::Unfinished { container, .. } => {
                format!("run 'cryptattach container rotate {container}' again").into()
            }
            Self::WouldBeLost { container, .. } => format!(
                "restore damaged keys from a replica or backup of the store; 'cryptattach container policy {container} POLICY' adds \
                 a leaf to what opens them"
            )
            .into(),
            Self::NoPair { .. } => "nothing was changed: name the private key of the new public key".into(),
            Self::WouldLockOut { container, .. } => format!(
                "nothing was changed: name what opens it in 'identities' of [stores.{container}] (for a new owner, --identity does)"
            )
            .into(),
            Self::Trust(error) => return error.next_step(),
            Self::Tenant(error) => return error.next_step(),
            Self::Tpm(error) => return error.next_step(),
            Self::NotSeparate(refusal) => return refusal.next_step(),
            Self::Loop(error) => return error.next_step(),
            Self::Memory(error) => return error.next_step(),
            Self::Audit(error) => return error.next_step(),
            Self::NoContainerKeys(_) | Self::ReadBack(_) | Self::NoPassphrase(_) | Self::NotOurs(_) => {
                return None;
            },
        })
    }
}
