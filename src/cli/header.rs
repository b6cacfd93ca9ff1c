//! `cryptattach header ...`

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{AnswerOption, Global, SeparationOptions, output, words};
use crate::{
    base::key::KeyReference,
    verbs::{error::Error, header},
};

/// Back up the headers of LUKS2 volumes, and restore them
#[derive(Subcommand)]
pub enum Header {
    Backup(Backup),
    Restore(Restore),
}

/// Write a LUKS2 volume's header into a new file, in the form of 'cryptsetup luksHeaderBackup'
///
/// A header holds no key, unless the volume was formatted with --keyslot. Make a new backup after each 'key rotate': one
/// from before is void.
#[derive(Args)]
#[command(name = "backup", after_help = "Example:\n  cryptattach header backup /dev/vdb /media/usb/vdb.header")]
pub struct Backup {
    /// The volume's device
    #[arg(value_parser = words::device())]
    device: PathBuf,
    /// The new file
    file: PathBuf,
}

/// Put a header back on a LUKS2 volume that is detached
///
/// The backup has to be of this volume and of its present key, and the key in the store has to open it, before anything
/// is written. Then the volume would unlock. Resumes if interrupted.
#[derive(Args)]
#[command(
    name = "restore",
    after_help = "Examples:\n  cryptattach header restore /dev/vdb /media/usb/vdb.header
  cryptattach header restore /dev/vdb vdb.header --key vault/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"
)]
pub struct Restore {
    /// The volume's device
    #[arg(value_parser = words::device())]
    device: PathBuf,
    /// The backup
    file: PathBuf,
    /// Also if that changes keyslots and tokens back to what they were: old passphrases open the volume again
    #[arg(long)]
    older: bool,
    /// Also on a device that does not say any more that it is the volume: all of its header is lost
    #[arg(long)]
    lost: bool,
    /// Where the volume's key is now, if the backup is from before 'key move': the restored header names it
    #[arg(long, value_name = "REFERENCE")]
    key: Option<KeyReference>,
    #[command(flatten)]
    separation: SeparationOptions,
    #[command(flatten)]
    answer: AnswerOption,
}

impl Header {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Backup(backup) => backup.run(global),
            Self::Restore(restore) => restore.run(global),
        }
    }
}

impl Backup {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let saved = header::back_up(&global.config()?, &self.device, &self.file)?;
        output::print(global.json, &saved, || {
            let mut lines = vec![format!("header of the volume {} in {}", saved.volume, self.file.display())];
            lines.extend(saved.key.as_ref().map(|key| format!("  key              {key}")));
            lines.push(format!("  size             {}", output::size(saved.bytes as u64)));
            lines
        })
    }
}

impl Restore {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.attended(&self.answer)?;
        let Self { device, file, older, lost, key, separation, .. } = self;
        let (key, separation) = (key.as_ref(), separation.strictness());
        let request = header::Request { device, file, older: *older, lost: *lost, key, separation };
        let restored = header::restore(&config, &request)?;
        output::print(global.json, &restored, || {
            let done = if restored.written { "restored" } else { "the same: nothing was written" };
            let mut lines = vec![format!("header of the volume {}: {done}", restored.volume)];
            lines.push(format!("  opened by        {}", restored.key));
            lines.extend(restored.changed.iter().map(|change| format!("  CHANGED          {change}")));
            lines
        })
    }
}
