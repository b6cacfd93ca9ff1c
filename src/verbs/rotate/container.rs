//! `key rotate --container`: the volumes of a container on this host get new keys, one after the other.

use std::path::PathBuf;

use serde::Serialize;
use uuid::Uuid;

use super::{
    Containers, How,
    batch::Batch,
    found::{self, Found},
};
use crate::{
    base::{
        advice::Advice,
        chain::chain,
        exit::Exit,
        key::{KeyReference, StoreName},
        mapping_name::MappingName,
    },
    config::Config,
    sys::stop::Stop,
    verbs::error::Error,
    volumes::backend::BackendError,
};

/// Which container, and how.
pub struct Request<'a> {
    pub container: &'a StoreName,
    /// Others may know its keys: the old ones are deleted, and the most exposed volumes come first.
    pub because_leaked: bool,
    /// What an unfinished rotation has done counts no longer.
    pub anew: bool,
    pub how: How,
}

/// What has happened.
#[derive(Debug, Serialize)]
pub struct Report {
    pub container: StoreName,
    /// When the rotation was begun, in seconds since 1970-01-01 UTC.
    pub begun: u64,
    /// How many volumes an earlier run of the same rotation has done.
    pub done_before: usize,
    pub done: Vec<Done>,
    /// Volumes that are in use or not here, or that a signal has kept back.
    pub left: Vec<Undone>,
    pub failed: Vec<Undone>,
}

/// A volume with a new key.
#[derive(Debug, Serialize)]
pub struct Done {
    pub device: PathBuf,
    /// `None` if its header does not say it.
    pub volume: Option<Uuid>,
    pub key: KeyReference,
    pub old: Option<KeyReference>,
    /// Whether the old one is deleted.
    pub deleted: bool,
    /// The mapping that it was attached as all the while.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attached: Option<MappingName>,
}

/// A volume without.
#[derive(Debug, Serialize)]
pub struct Undone {
    pub device: PathBuf,
    /// `None` if its header does not say it.
    pub volume: Option<Uuid>,
    pub why: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

/// What happens.
pub enum Event<'a> {
    /// So many bytes of all volumes are done, of so many.
    Bytes(u64, u64),
    /// A volume is done, left or failed; why not, if not.
    Volume(&'static str, &'a PathBuf, Option<&'a Undone>),
}

impl Report {
    /// Whether each volume has a new key.
    pub fn is_complete(&self) -> bool {
        self.left.is_empty() && self.failed.is_empty()
    }
}

/// Rotates the keys, or goes on with what was begun. One volume's failure stops no other.
pub fn rotate(config: &Config, request: &Request<'_>, tell: &mut dyn FnMut(Event<'_>)) -> Result<Report, Error> {
    let mut batch = Batch::claim(config, request.container, request.because_leaked, request.anew)?;
    let stop = Stop::by_signals().map_err(Error::io("block signals"))?;
    let containers = Containers::of(config);
    let mut volumes = found::all(config, request.container, containers.open(request.container)?.store())?;
    volumes.retain(|found| found.is_begun || !batch.has_done(found));
    volumes.sort_by_key(|found| order(found, request.because_leaked));
    let how = How { delete_old: request.how.delete_old || request.because_leaked, ..request.how };
    let (container, begun, done_before) = (request.container.clone(), batch.begun(), batch.done());
    let mut report = Report { container, begun, done_before, done: Vec::new(), left: Vec::new(), failed: Vec::new() };
    let all = volumes.iter().map(|found| found.size_bytes).sum();
    let mut before = 0;
    for mut found in volumes {
        let mut bytes = |done, _| tell(Event::Bytes(before + done, all));
        let result = match (found.problem.take(), stop.is_asked()) {
            (Some(problem), _) => Err(problem),
            (None, true) => Err(Error::Kept(found.device.clone())),
            (None, false) => super::rotate_with(&containers, &found.device, &how, &mut bytes),
        };
        before += found.size_bytes;
        match result {
            Ok(rotated) => {
                if let Some(volume) = found.volume {
                    batch.note(volume, rotated.key.clone(), &found.device)?;
                }
                tell(Event::Volume("done", &found.device, None));
                let Found { device, volume, .. } = found;
                let super::Rotated { key, old, deleted, attached } = rotated;
                report.done.push(Done { device, volume, key, old, deleted, attached });
            }
            Err(error) => {
                let undone = undone(found, &error);
                let is_left = matches!(error.exit(), Exit::Busy | Exit::Paused | Exit::Missing);
                let (what, list) = if is_left { ("left", &mut report.left) } else { ("failed", &mut report.failed) };
                tell(Event::Volume(what, &undone.device, Some(&undone)));
                list.push(undone);
            }
        }
    }
    if report.is_complete() {
        batch.end()?;
    }
    Ok(report)
}

/// What was begun is ended first. Then the oldest key; where keys have leaked, the volumes with a passphrase before the
/// others: it opens them, too, and other programs are given it.
fn order(found: &Found, because_leaked: bool) -> (bool, bool, u64) {
    (!found.is_begun, because_leaked && !found.has_passphrase, found.created)
}

fn undone(found: Found, error: &Error) -> Undone {
    let next = match error {
        Error::Backend(BackendError::AttachedAlready { name, .. }) => {
            Some(format!("cryptattach detach {name}; then run the same command again"))
        }
        Error::Paused { .. } => Some("run the same command again".to_owned()),
        error => error.next_step().map(Into::into),
    };
    Undone { device: found.device, volume: found.volume, why: chain(error), next }
}
