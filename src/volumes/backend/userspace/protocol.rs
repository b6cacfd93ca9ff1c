//! What the command tells the worker and what it answers, over a socket pair that only the two of them have.
//!
//! A message is a length (32 bits, little-endian) and JSON. The volume key follows the request as raw bytes, so that it
//! goes from secret memory to secret memory and never through a parser.

use std::{
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{paths::Paths, state::Process};
use crate::{
    base::mapping_name::MappingName,
    sys::device::{DeviceError, Identity},
    volumes::{
        backend::{BackendError, ExportKind},
        header::{Geometry, Midway, SectorSize},
    },
};

/// The longest message; paths are the longest thing in one.
const MAX_MESSAGE_BYTES: u32 = 64 * 1024;

/// What a worker is started for.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Request {
    /// Make a mapping and serve it. The volume key follows.
    Attach(Attach),
    /// Remove a mapping unless it is in use. A worker that is told to end starts this in a process of its own, see
    /// `super::worker`.
    Detach {
        name: MappingName,
        /// Where its state is.
        paths: Paths,
        /// The one that asks. The name may be another mapping's by the time that this is done.
        worker: Process,
    },
}

/// A mapping to be made.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    pub name: MappingName,
    /// Where its state goes.
    pub paths: Paths,
    /// The encrypted device or file, an absolute path.
    pub device: PathBuf,
    /// Which device that path led to when its header was read.
    pub identity: Identity,
    /// UUID of the volume's header.
    pub volume: Option<Uuid>,
    /// How users are to reach it.
    pub export: ExportKind,
    /// No writes.
    pub read_only: bool,
    /// Discards reach the device.
    pub allow_discards: bool,
    /// Size of the volume key.
    pub key_size_bits: u32,
    /// Encryption sector size.
    pub sector_size_bytes: u32,
    /// Where the data begins.
    pub data_offset_bytes: u64,
    /// Length of the data.
    pub size_bytes: u64,
    /// Added to the sector number for the tweak, in units of 512 bytes.
    pub iv_offset_sectors: u64,
    /// Where the data begins that has another key, which follows the first one and is as long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub midway: Option<Midway>,
}

impl Attach {
    /// The geometry, if there is such a sector size.
    pub fn geometry(&self) -> Option<Geometry> {
        Some(Geometry {
            sector_size: SectorSize::from_bytes(self.sector_size_bytes)?,
            data_offset_bytes: self.data_offset_bytes,
            size_bytes: self.size_bytes,
            iv_offset_sectors: self.iv_offset_sectors,
        })
    }
}

/// What the worker says to an [`Attach`]: `Ready` or `Failed`; before that, if it exports a file, `Mounted`, and is told the
/// [`crate::sys::loop_device::LoopDevice`] that the command has made of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum WorkerReply {
    /// The file is there; a loop device is to be made of it.
    Mounted {
        /// Block size for the loop device.
        block_size_bytes: u32,
    },
    /// The mapping is there.
    Ready,
    /// It is not.
    Failed {
        /// "cannot ..." and on what.
        action: String,
        cause: Cause,
    },
}

/// Why an attach failed: what a caller may act on keeps its type, the rest is text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Cause {
    /// [`DeviceError::Missing`]
    DeviceMissing,
    /// [`DeviceError::ReadOnly`]
    DeviceReadOnly,
    /// [`DeviceError::Busy`]
    DeviceBusy {
        /// Who has it.
        holders: Vec<String>,
    },
    /// Error texts, from the outermost to its innermost cause.
    Other(Vec<String>),
}

impl WorkerReply {
    /// Describes an error to the process that asked.
    pub fn failure(error: BackendError) -> Self {
        let (action, cause) = match error {
            BackendError::Device(DeviceError::Missing(_)) => (String::new(), Cause::DeviceMissing),
            BackendError::Device(DeviceError::ReadOnly(_)) => (String::new(), Cause::DeviceReadOnly),
            BackendError::Device(DeviceError::Busy { holders, .. }) => (String::new(), Cause::DeviceBusy { holders }),
            BackendError::Failed { action, source } => (action, Cause::Other(messages(&*source))),
            error => (error.to_string(), Cause::Other(Vec::new())),
        };
        Self::Failed { action, cause }
    }

    /// The error again, or nothing if all went well.
    pub fn into_result(self, device: &Path) -> Result<(), BackendError> {
        let path = device.to_owned();
        let (action, cause) = match self {
            Self::Mounted { .. } | Self::Ready => return Ok(()),
            Self::Failed { action, cause } => (action, cause),
        };
        Err(match cause {
            Cause::DeviceMissing => DeviceError::Missing(path).into(),
            Cause::DeviceReadOnly => DeviceError::ReadOnly(path).into(),
            Cause::DeviceBusy { holders } => DeviceError::Busy { path, holders }.into(),
            Cause::Other(messages) => match Told::from_messages(messages) {
                Some(told) => BackendError::failed(action)(told),
                None => BackendError::Unavailable(action),
            },
        })
    }
}

/// An error of the other process, with its causes.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct Told {
    message: String,
    source: Option<Box<Told>>,
}

impl Told {
    fn from_messages(messages: Vec<String>) -> Option<Self> {
        messages.into_iter().rfold(None, |source, message| Some(Self { message, source: source.map(Box::new) }))
    }
}

fn messages(error: &(dyn std::error::Error + 'static)) -> Vec<String> {
    std::iter::successors(Some(error), |error| error.source()).map(ToString::to_string).collect()
}

/// Sends one message.
pub fn send(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let length = u32::try_from(json.len()).ok().filter(|length| *length <= MAX_MESSAGE_BYTES);
    let length = length.ok_or_else(|| io::Error::other("the message is too long"))?;
    to.write_all(&length.to_le_bytes())?;
    to.write_all(&json)
}

/// Receives one message; reads not one byte more, because the key may follow.
pub fn receive<M: DeserializeOwned>(mut from: impl Read) -> io::Result<M> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length);
    if length > MAX_MESSAGE_BYTES {
        return Err(io::Error::other("the message is too long"));
    }
    let mut json = vec![0; length as usize];
    from.read_exact(&mut json)?;
    Ok(serde_json::from_slice(&json)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(error: BackendError) -> BackendError {
        let mut wire = Vec::new();
        send(&mut wire, &WorkerReply::failure(error)).unwrap();
        let answer: WorkerReply = receive(&wire[..]).unwrap();
        answer.into_result(Path::new("/dev/vdb")).unwrap_err()
    }

    #[test]
    fn errors_keep_their_causes() {
        let cause = DeviceError::Io { action: "open", path: "/dev/vdb".into(), source: io::Error::other("it burns") };
        let error = told(BackendError::failed("cannot attach 'data'")(cause));
        assert_eq!(messages(&error), ["cannot attach 'data'", "cannot open /dev/vdb", "it burns"]);
    }

    #[test]
    fn busy_devices_keep_their_type() {
        let busy = DeviceError::Busy { path: "/dev/vdb".into(), holders: vec!["the mapping 'data'".into()] };
        let BackendError::Device(told) = told(busy.into()) else { panic!("another variant") };
        assert_eq!(told.to_string(), "/dev/vdb is in use: the mapping 'data'");
    }

    #[test]
    fn refuses_long_messages() {
        assert!(receive::<WorkerReply>(&[0xff; 8][..]).is_err());
        assert!(send(io::sink(), &"x".repeat(1 << 17)).is_err());
    }
}
