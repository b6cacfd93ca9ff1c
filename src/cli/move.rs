//! `cryptattach key move ...`

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::{AnswerOption, SeparationOptions, bar::with_bar, key::device_of, output, words};
use crate::{
    base::key::{KeyReference, StoreName},
    config::Config,
    verbs::{error::Error, r#move},
};

/// Move a key to another store, or all keys of a store whose volumes are on this host
///
/// The key is stored there, read back and opened; then the volume's header names the new place; the old key is deleted
/// last. Volumes may be attached. Each volume and its new place are checked to be separate before anything is written.
/// SIGTERM or Ctrl-C pauses a move of all keys (exit code 83); the same command goes on, also after a crash. If a volume is
/// attached at boot, rebuild the initramfs afterwards.
#[derive(Args)]
#[command(
    group = ArgGroup::new("which").required(true).args(["key", "container"]),
    after_help = "Examples:
  cryptattach key move cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de --to vault
  cryptattach key move cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de --to vault --volume /dev/vdb
  cryptattach key move --container cinder --to vault      all its keys"
)]
pub struct Move {
    /// The key (STORE/KEY-ID)
    key: Option<KeyReference>,
    /// Move all keys of this store
    #[arg(long, value_name = "STORE")]
    container: Option<StoreName>,
    /// The store where the keys go
    #[arg(long, value_name = "STORE")]
    to: StoreName,
    /// The volume that the key opens: a device or file, or a name of [volumes.NAME] [default: the LUKS volume of that UUID,
    /// in the configuration or below /dev/disk/by-uuid]
    #[arg(long, value_name = "DEVICE|NAME", requires = "key", value_parser = words::device())]
    volume: Option<PathBuf>,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE", requires = "volume")]
    header: Option<PathBuf>,
    #[command(flatten)]
    pub(super) answer: AnswerOption,
    #[command(flatten)]
    separation: SeparationOptions,
}

impl Move {
    pub(super) fn run(&self, config: &Config, json: bool) -> Result<(), Error> {
        let request = r#move::Request { to: &self.to, separation: self.separation.strictness() };
        match (&self.key, &self.container) {
            (Some(key), _) => self.run_one(config, json, &request, key),
            (None, Some(from)) => self.run_all(config, json, &request, from),
            (None, None) => Err(Error::Usage("name a key, or a store with --container".to_owned())),
        }
    }

    fn run_one(
        &self,
        config: &Config,
        json: bool,
        request: &r#move::Request<'_>,
        key: &KeyReference,
    ) -> Result<(), Error> {
        let at = |given: &PathBuf| {
            let (device, header) = device_of(config, given);
            r#move::At { device, header: self.header.clone().or(header) }
        };
        let moved = r#move::one(config, request, key, self.volume.as_ref().map(at))?;
        output::print(json, &moved, || vec![moved.key.to_string(), format!("  deleted          {}", moved.old)])
    }

    fn run_all(
        &self,
        config: &Config,
        json: bool,
        request: &r#move::Request<'_>,
        from: &StoreName,
    ) -> Result<(), Error> {
        let report = with_bar(json, |progress| r#move::all(config, request, from, progress))?;
        let to = request.to;
        output::print(json, &report, || {
            let mut lines =
                vec![format!("keys of '{from}' to '{to}'"), format!("  moved            {}", report.moved.len())];
            lines.extend(report.left.iter().map(|(id, why)| format!("  LEFT ALONE       {id}: {why}")));
            lines.extend(report.failed.iter().map(|(id, why)| format!("  FAILED           {id}: {why}")));
            lines
        })?;
        let (from, to) = (from.clone(), to.clone());
        match (report.waiting, report.failed.len()) {
            (0, 0) => Ok(()),
            (0, failed) => Err(Error::NotAllMoved { from, to, failed }),
            (waiting, _) => Err(Error::MovePaused { from, to, waiting }),
        }
    }
}
