//! The audit record: one JSON object per line for each key that was made, used or deleted, and for each override.
//!
//! It holds names, times and verdicts; no secret ever reaches it.

use std::{
    borrow::Cow,
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Serialize, Serializer};

use crate::{
    base::{advice::Advice, chain::chain, clock, exit::Exit},
    config::Config,
    unlock::tenant::Acting,
};

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
}

/// The record cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the audit record {}", .path.display())]
pub struct AuditError {
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

#[derive(Serialize)]
struct Line<'a> {
    /// Seconds since 1970-01-01 UTC.
    time: u64,
    uid: u32,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

/// Records what was done. It is done: a record that cannot be written is a warning.
pub fn done(config: &Config, event: &Event<'_>) {
    if let Err(error) = append(&config.audit.file, event) {
        tracing::warn!("'{}' is done, but is not on record: {}", event.action, chain(&error));
    }
}

/// Records what is about to be let through. What cannot be recorded is not.
pub fn permit(config: &Config, event: &Event<'_>) -> Result<(), AuditError> {
    append(&config.audit.file, event)
}

/// Appends an event, in one write(2) so that lines of several writers do not mix.
fn append(file: &Path, event: &Event<'_>) -> Result<(), AuditError> {
    let write = || {
        if let Some(folder) = file.parent() {
            fs::create_dir_all(folder)?;
        }
        let time = clock::now();
        let mut line = serde_json::to_vec(&Line { time, uid: nix::unistd::getuid().as_raw(), event })?;
        line.push(b'\n');
        OpenOptions::new().append(true).create(true).mode(0o600).open(file)?.write_all(&line)
    };
    write().map_err(|source| AuditError { path: file.to_owned(), source })
}
