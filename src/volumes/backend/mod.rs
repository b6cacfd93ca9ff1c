//! Backends: what turns a volume and its key into a plaintext device.

use std::{borrow::Cow, fmt, path::PathBuf};

use uuid::Uuid;

use self::{dm_crypt::DmCrypt, once::Occupied, userspace::Userspace};
use crate::{
    base::{advice::Advice, exit::Exit, mapping_name::MappingName},
    sys::device::{Device, DeviceError, in_use},
    volumes::{
        Unlocked,
        header::{Volume, VolumeError},
    },
};

pub mod dm_crypt;
#[cfg(test)]
pub mod memory;
pub mod once;
pub mod online;
pub mod userspace;

/// Makes and removes mappings.
pub trait Backend {
    /// The mapping of that name, if it is this volume's and as asked for; refused if it is something else, or if there is none
    /// but the volume's store is mapped under another name.
    fn active(&self, volume: &Volume, options: &Activate) -> Result<Option<Mapping>, BackendError>;
    /// Makes the volume's plaintext available as a device, under a name that [`Backend::active`] found free; and only if the
    /// volume's path still leads to the device whose header was read.
    fn activate(&self, unlocked: &Unlocked, options: &Activate) -> Result<Mapping, BackendError>;
    /// Makes a mapping as large as its device has become; its new size in bytes. It never shrinks.
    fn resize(&self, name: &MappingName, unlocked: &Unlocked) -> Result<u64, BackendError>;
    /// Removes a mapping; all its data is on the volume before this returns.
    fn deactivate(&self, name: &MappingName, deferred: Deferred) -> Result<(), BackendError>;
    /// Has the I/O fail that waits for a rotation of the key which was killed; nothing is done if none does.
    fn fail_hanging(&self, _name: &MappingName) -> Result<(), BackendError> {
        Ok(())
    }
    /// What is known of the mapping of that name; `None` if this backend has none.
    fn status(&self, name: &MappingName) -> Result<Option<MappingStatus>, BackendError>;
    /// The plaintext device's path, as [`Backend::status`] has it: who uses it is not looked for, which takes much longer.
    fn device(&self, name: &MappingName) -> Result<Option<PathBuf>, BackendError>;
    /// The names of all this backend's mappings.
    fn list(&self) -> Result<Vec<MappingName>, BackendError>;
    /// What all this backend's mappings stand on.
    fn occupied(&self) -> Result<Vec<Occupied>, BackendError>;
}

/// The backends that verbs use: this host's, or a test's.
pub trait Backends {
    /// The backend that is asked for, or the best for the device.
    fn choose(&self, asked: Option<BackendKind>, device: &Device) -> Result<Box<dyn Backend>, BackendError>;
    /// The backend of that kind.
    fn of(&self, kind: BackendKind) -> Result<Box<dyn Backend>, BackendError>;
    /// All backends that can have mappings here.
    fn available(&self) -> Vec<(BackendKind, Box<dyn Backend>)>;
}

/// The backends of this host.
#[derive(Clone, Copy, Debug)]
pub struct ThisHost;

impl Backends for ThisHost {
    /// Without a device-mapper only a loop device or a file is mapped in userspace unasked: for those it is a way to try
    /// everything out. For a real disk it is a choice that someone should make.
    fn choose(&self, asked: Option<BackendKind>, device: &Device) -> Result<Box<dyn Backend>, BackendError> {
        let unavailable = match (asked, DmCrypt::open()) {
            (Some(BackendKind::Userspace), _) => return Ok(Box::new(Userspace::default())),
            (_, Ok(dm_crypt)) => return Ok(Box::new(dm_crypt)),
            (Some(BackendKind::DmCrypt), Err(unavailable)) => return Err(unavailable),
            (None, Err(unavailable)) => unavailable,
        };
        if !device.is_loop_or_file() {
            return Err(unavailable);
        }
        tracing::warn!("{unavailable}; mapping {} in userspace", device.path.display());
        Ok(Box::new(Userspace::default()))
    }

    fn of(&self, kind: BackendKind) -> Result<Box<dyn Backend>, BackendError> {
        Ok(match kind {
            BackendKind::DmCrypt => Box::new(DmCrypt::open()?),
            BackendKind::Userspace => Box::new(Userspace::default()),
        })
    }

    fn available(&self) -> Vec<(BackendKind, Box<dyn Backend>)> {
        let dm_crypt = self.of(BackendKind::DmCrypt).ok().map(|backend| (BackendKind::DmCrypt, backend));
        let userspace = (BackendKind::Userspace, Box::new(Userspace::default()) as Box<dyn Backend>);
        dm_crypt.into_iter().chain([userspace]).collect()
    }
}

/// Refuses a device if this host has a mapping of its store, whatever name that device has.
pub fn require_free(device: &Device) -> Result<(), BackendError> {
    let backends = ThisHost.available();
    once::require_free(&backends.iter().map(|(_, backend)| &**backend).collect::<Vec<_>>(), device, None)
}

/// The mapping below which the volume on a device gets a new key; `None` if the device is free. Refused where it takes a free
/// one.
pub fn online(device: &Device, volume: Uuid) -> Result<Option<MappingName>, BackendError> {
    let backends = ThisHost.available();
    let names = once::occupants(&backends.iter().map(|(_, backend)| &**backend).collect::<Vec<_>>(), device)?;
    let Some(name) = names.first() else { return Ok(None) };
    let in_the_way = || BackendError::AttachedAlready { device: device.path.clone(), name: name.clone() };
    let dm_crypt = DmCrypt::open().map_err(|_| in_the_way())?;
    if names.len() > 1 || dm_crypt.find_ours(name)?.is_none() {
        return Err(in_the_way());
    }
    dm_crypt.check_online(device, name, volume)?;
    Ok(Some(name.clone()))
}

/// Which backend made a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BackendKind {
    /// The kernel's dm-crypt.
    DmCrypt,
    /// AES-XTS in a worker process.
    Userspace,
}

/// How the userspace backend exports the plaintext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ExportKind {
    /// A loop device over a FUSE file: on every Linux.
    #[default]
    Fuse,
    /// A ublk device: the fastest; Linux 6.4 with ublk_drv.
    Ublk,
    /// A Unix socket that speaks NBD: for qemu, nbdcopy, nbd-client.
    Nbd,
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DmCrypt => "dm-crypt",
            Self::Userspace => "userspace",
        })
    }
}

impl fmt::Display for ExportKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fuse => "fuse",
            Self::Ublk => "ublk",
            Self::Nbd => "nbd",
        })
    }
}

/// How to attach.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Activate {
    pub name: MappingName,
    /// No writes.
    pub read_only: bool,
    /// How the userspace backend exports it; the best block device that there is unless given.
    pub export: Option<ExportKind>,
    /// Pass discards (TRIM) to the device; they show which sectors are in use.
    pub allow_discards: bool,
    /// dm-crypt: encrypt reads without a work queue (kernel 5.9+).
    pub no_read_workqueue: bool,
    /// dm-crypt: encrypt writes without a work queue (kernel 5.9+).
    pub no_write_workqueue: bool,
}

/// Whether a busy mapping is removed later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deferred {
    /// A busy mapping is an error.
    No,
    /// A busy mapping is removed when its last user closes it.
    Yes,
}

/// An active plaintext device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub name: MappingName,
    /// The plaintext device's path, for users: `/dev/mapper/NAME` or `/dev/disk/by-cryptattach/NAME`, or the NBD socket's.
    pub device: PathBuf,
    /// What NBD clients are to be given; `None` if it is a block device.
    pub uri: Option<String>,
    /// What made it.
    pub backend: BackendKind,
    /// It was there before this call.
    pub already_active: bool,
}

/// What is known of an active mapping.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MappingStatus {
    pub name: MappingName,
    /// What made it.
    pub backend: BackendKind,
    /// The plaintext device's (or socket's) path.
    pub device: PathBuf,
    /// How the userspace backend exports it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export: Option<ExportKind>,
    /// The encrypted device (or file) below.
    pub source: PathBuf,
    /// UUID of the volume; plain dm-crypt has none.
    pub volume: Option<Uuid>,
    /// Cipher, in dm-crypt's notation.
    pub cipher: String,
    /// Size of the volume key in bits.
    pub key_size_bits: u32,
    /// Encryption sector size in bytes.
    pub sector_size_bytes: u32,
    /// Size of the plaintext device in bytes.
    pub size_bytes: u64,
    /// No writes.
    pub read_only: bool,
    /// A fault that the user should know: the worker has died, the removal is pending, ...
    pub trouble: Option<String>,
    /// Who has the plaintext device open.
    pub holders: Vec<String>,
}

/// A mapping could not be made, removed or read.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The encrypted device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// There is nothing here to make mappings with.
    #[error("{0}")]
    Unavailable(String),
    /// Another device is attached under that name.
    #[error("the name '{name}' is taken: {by}")]
    Foreign {
        name: MappingName,
        /// What has it.
        by: String,
    },
    /// What the device stands for is attached under another name, perhaps by another device name.
    #[error("{} is attached already, as '{name}'", .device.display())]
    AttachedAlready { device: PathBuf, name: MappingName },
    /// Its key is rotated offline only.
    #[error("the key of {} cannot be rotated while it is attached as '{name}': {why}", .device.display())]
    NotOnline {
        device: PathBuf,
        name: MappingName,
        /// In words.
        why: String,
    },
    /// A process re-encrypts it.
    #[error("the key of '{0}' is being rotated now")]
    BeingRotated(MappingName),
    /// A process that re-encrypted it was killed.
    #[error("a rotation of the key of '{name}' was killed, and has left its devices below it{}", if *.hangs { "; whoever reads or writes what it was rewriting waits" } else { "" })]
    LeftOver {
        name: MappingName,
        /// I/O waits for ever.
        hangs: bool,
    },
    /// There is no mapping of that name.
    #[error("nothing is attached as '{0}'")]
    NotActive(MappingName),
    /// The mapping is in use.
    #[error("'{name}' is in use{}", in_use(.holders))]
    Busy {
        name: MappingName,
        /// Who uses it, in words.
        holders: Vec<String>,
    },
    /// The key does not belong to the volume, or this cannot be checked.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// A program of another version has written down what it has attached.
    #[error("{} is of version {version}; this program reads version {ours}", .path.display())]
    OtherVersion { path: PathBuf, version: u32, ours: u32 },
    /// A step failed; `action` says which ("cannot ...").
    #[error("{action}")]
    Failed {
        /// "cannot ..." and on what.
        action: String,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Advice for BackendError {
    fn exit(&self) -> Exit {
        match self {
            Self::Device(error) => error.exit(),
            Self::Volume(error) => error.exit(),
            Self::NotActive(_) => Exit::Missing,
            Self::Foreign { .. } => Exit::InTheWay,
            Self::Busy { .. }
            | Self::AttachedAlready { .. }
            | Self::NotOnline { .. }
            | Self::BeingRotated(_)
            | Self::LeftOver { .. } => Exit::Busy,
            Self::Unavailable(_) | Self::OtherVersion { .. } | Self::Failed { .. } => Exit::System,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Device(error) => return error.next_step(),
            Self::Volume(error) => return error.next_step(),
            Self::Busy { name, .. } => format!("end that use, or run: cryptattach detach {name} --deferred").into(),
            Self::AttachedAlready { name, .. } => {
                format!("use that mapping ('cryptattach status {name}' shows it), or detach it first").into()
            }
            Self::NotOnline { name, device, .. } => {
                format!("detach it, then rotate: cryptattach detach {name} && cryptattach key rotate {}", device.display()).into()
            }
            Self::BeingRotated(_) => "wait until it has ended, or pause it with SIGTERM".into(),
            Self::LeftOver { name, hangs: true } => format!(
                "unmount what is on it, if that does not wait, too; then run: cryptattach detach {name}. If that is refused, \
                 'cryptattach detach {name} --force' gives its users I/O errors, and what they have not written yet is lost"
            )
            .into(),
            Self::LeftOver { name, hangs: false } => {
                format!("unmount what is on it, then run: cryptattach detach {name}").into()
            }
            Self::Foreign { .. } => "choose another name".into(),
            Self::Unavailable(_) => "--backend userspace maps the volume without device-mapper".into(),
            Self::NotActive(_) => "'cryptattach list' shows the attached volumes".into(),
            Self::OtherVersion { .. } => {
                "another version of cryptattach has attached that volume: detach it with that one, or restart the machine".into()
            }
            Self::Failed { .. } => return None,
        })
    }
}

impl BackendError {
    /// A closure that wraps an error as [`BackendError::Failed`].
    pub fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
        action: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::Failed { action, source: source.into() }
    }
}
