//! The audit record: one JSON object per line for each key that was made, used or deleted, and for each override.
//!
//! It holds names, times and verdicts; no secret ever reaches it. Each record carries the hash of the one before: `chain` writes
//! it, [`verify`] checks it.

mod chain;
mod line;
pub mod verify;

use std::{
    borrow::Cow,
    io,
    path::{Path, PathBuf},
};

use serde::{Serialize, Serializer};

use crate::{
    base::{advice::Advice, chain::chain as causes, exit::Exit},
    config::Config,
    unlock::tenant::Acting,
};

pub use chain::{Chain, Head, rotated};
pub use line::MOST_BYTES;

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// What happened.
#[derive(Debug, Default, Serialize)]
pub struct Event<'a> {
    /// "format", "attach", "refused", "detach", "key delete", ...
    pub action: &'a str,
    /// The encrypted device.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "as_text")]
    pub device: Option<&'a Path>,
    /// The key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The mapping's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// What the caller of a hook calls the volume.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_id: Option<&'a str>,
    /// The separation verdict with its evidence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub separation: Option<serde_json::Value>,
    /// A refusal that the user overrode: "--allow-shared", ...
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overridden: Option<&'a str>,
    /// On whose behalf a hook did it, as Keystone says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caller: Option<&'a Acting>,
    /// The SHA-256 of the receipt's file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<String>,
    /// What the TPM's index for the audit record had before it was extended by this record's hash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tpm: Option<String>,
}

/// The record cannot be written, or not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the audit record {}", .path.display())]
pub struct AuditError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

impl Advice for AuditError {
    fn exit(&self) -> Exit {
        Exit::Io
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        None
    }
}

/// What is no UTF-8 in a path is replaced, since JSON has no other text: a record with a wrong letter is better than none.
fn as_text<S: Serializer>(path: &Option<&Path>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.unwrap_or(Path::new("")).display())
}

/// Records what was done. It is done: a record that cannot be written is a warning.
pub fn done(config: &Config, event: &Event<'_>) {
    if let Err(error) = permit(config, event) {
        tracing::warn!("'{}' is done, but is not on record: {}", event.action, causes(&error));
    }
}

/// Records what is about to be let through. What cannot be recorded is not.
pub fn permit(config: &Config, event: &Event<'_>) -> Result<(), AuditError> {
    Chain::open(config)?.append(event).map(drop)
}
