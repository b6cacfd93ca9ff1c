//! What client and worker say to each other: one JSON line each way. Over the set-up socket the raw key follows the
//! request, and goes from one process's secret memory straight into the other's.

use std::{
    io::{self, Read, Write},
    path::PathBuf,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    backend::{BackendError, MappingName},
    device::DeviceError,
};

/// The longest line; a request is some hundred bytes.
const MOST_LINE_BYTES: u64 = 64 * 1024;

/// What to map.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Request {
    pub name: MappingName,
    pub device: PathBuf,
    pub volume: Option<Uuid>,
    pub key_size_bits: u32,
    pub sector_size_bytes: u32,
    pub data_offset_bytes: u64,
    pub size_bytes: u64,
    pub iv_offset_sectors: u64,
    pub read_only: bool,
}

/// A word to a worker that serves.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Take the mapping down, unless it is in use.
    Detach,
    /// Take it down when it is no longer in use.
    DetachDeferred,
}

/// A worker's answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is done, and all data is on the volume.
    Done,
    /// It will be done when the last user closes the mapping.
    Later,
    /// The mapping is in use.
    InUse(Vec<String>),
    /// The encrypted device is in use.
    DeviceInUse(Vec<String>),
    /// The encrypted device is gone.
    DeviceMissing,
    /// It failed: "cannot ...", why.
    Failed(String, String),
}

impl Answer {
    /// Of a failed step.
    pub fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |error| Self::Failed(action, error.to_string())
    }

    /// As the client reports it.
    pub fn into_result(self, name: &MappingName, device: &std::path::Path) -> Result<(), BackendError> {
        Err(match self {
            Self::Done | Self::Later => return Ok(()),
            Self::InUse(holders) => BackendError::Busy { name: name.clone(), holders },
            Self::DeviceInUse(holders) => DeviceError::Busy { path: device.to_owned(), holders }.into(),
            Self::DeviceMissing => DeviceError::Missing(device.to_owned()).into(),
            Self::Failed(action, why) => BackendError::Failed { action, source: why.into() },
        })
    }
}

/// Sends one line.
pub fn send(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Receives one line and not a byte more: what follows it may be the key, which no buffer shall keep.
pub fn receive<T: DeserializeOwned>(from: impl Read) -> io::Result<T> {
    let mut line = Vec::new();
    for byte in from.take(MOST_LINE_BYTES).bytes() {
        match byte? {
            b'\n' => return Ok(serde_json::from_slice(&line)?),
            byte => line.push(byte),
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}
