//! `cryptattach container backup` and `cryptattach container restore`

use std::path::PathBuf;

use clap::Args;

use super::{AnswerOption, Global, bar::with_bar, output};
use crate::{
    base::{clock::date, key::StoreName},
    unlock::{
        self,
        container::backup::{BackupError, How, Restored},
    },
    verbs::{backup, error::Error},
    volumes::backend::ThisHost,
};

/// Write all that a container has into a new file: sealed keys, container keys, lockbox keys, consumers, its part of the
/// register of hosts
///
/// Nothing is opened but the current container key, which vouches for the file. It is text, one object a line, in order:
/// 'diff' compares two. It must not rest on a device of the volumes whose keys it has.
#[derive(Args)]
#[command(
    name = "backup",
    after_help = "Examples:
  cryptattach container backup cinder /media/usb/cinder-2026-11-27
  cryptattach container rehearse cinder --backup /media/usb/cinder-2026-11-27 --identity /media/safe/escrow.key"
)]
pub struct Backup {
    /// The store
    name: StoreName,
    /// The new file
    file: PathBuf,
    #[command(flatten)]
    answer: AnswerOption,
}

/// Write what a backup has and the container's store lacks into that store, whatever kind it is
///
/// The store has to have the name that it had. What is there is not overwritten, and neither is a key of which the store
/// has a later form. Resumes if interrupted. 'container rehearse' tells afterwards whether all opens.
#[derive(Args)]
#[command(
    name = "restore",
    after_help = "Examples:
  cryptattach container restore cinder /media/usb/cinder-2026-11-27           what was lost
  cryptattach container restore cinder /media/usb/cinder-2026-11-27 --create  all of it, into a store that is configured"
)]
pub struct Restore {
    /// The store
    name: StoreName,
    /// The backup
    file: PathBuf,
    /// Make the directory, or the container in Swift, if it does not exist
    #[arg(long)]
    create: bool,
    /// Replace what is in the store under the same name and is another object, or damaged
    #[arg(long)]
    replace: bool,
    /// Bring back what was retired or removed since: container keys, hosts, older forms of keys
    #[arg(long)]
    older: bool,
    #[command(flatten)]
    answer: AnswerOption,
}

impl Backup {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.attended(&self.answer)?;
        let done =
            with_bar(global.json, |progress| backup::back_up(&config, &ThisHost, &self.name, &self.file, progress))?;
        output::print(global.json, &done, || {
            let name = &self.name;
            let mut lines = vec![
                format!("backup of '{name}' in {}", self.file.display()),
                format!("  author           {name}/kek/{}, fingerprint {}", done.epoch, done.fingerprint),
                format!("  keys             {}", done.keys),
                format!("  container keys   {}", done.container_keys),
            ];
            if done.hosts + done.register > 0 {
                lines
                    .push(format!("  hosts            {} lockbox keys, {} in the register", done.hosts, done.register));
            }
            if done.unsealed > 0 {
                lines.push(format!("  NOT IN IT        {} keys that the store keeps unsealed", done.unsealed));
            }
            lines.extend(done.left_out.iter().map(|(what, why)| format!("  LEFT OUT         {what}: {why}")));
            lines
        })?;
        match done.left_out.len() {
            0 => Ok(()),
            left_out => Err(refused(BackupError::LeftOut { container: self.name.clone(), left_out })),
        }
    }
}

impl Restore {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.attended(&self.answer)?;
        let how = How { create: self.create, replace: self.replace, older: self.older };
        let done = with_bar(global.json, |progress| backup::restore(&config, &self.name, &self.file, how, progress))?;
        output::print(global.json, &done, || lines_of(&done))?;
        let container = self.name.clone();
        match (done.not_held.len(), done.left_alone.len()) {
            (0, 0) => Ok(()),
            (0, left_alone) => Err(refused(BackupError::Differ { container, left_alone })),
            (not_held, _) => Err(refused(BackupError::NotHeld { container, not_held })),
        }
    }
}

fn lines_of(done: &Restored) -> Vec<String> {
    let name = &done.container;
    let mut lines = vec![
        format!("restored '{name}' from a backup of {}", date(done.made)),
        format!("  author           {name}/kek/{}, fingerprint {}", done.epoch, done.fingerprint),
        format!("  written          {}", done.written),
    ];
    if done.sealed_anew > 0 {
        lines.push(format!("  of which         {} are sealed anew", done.sealed_anew));
    }
    lines.push(format!("  there already    {}", done.unchanged));
    for (told, names) in [
        ("later form there", &done.later),
        ("replaced        ", &done.replaced),
        ("BROUGHT BACK    ", &done.brought_back),
        ("LEFT ALONE      ", &done.left_alone),
    ] {
        lines.extend(names.iter().map(|name| format!("  {told} {name}")));
    }
    lines.extend(done.not_held.iter().map(|(what, why)| format!("  NOT HELD         {what}: {why}")));
    if let Some(policy) = &done.policy {
        lines.push(format!("  policy then      {policy}"));
    }
    lines
}

fn refused(error: BackupError) -> Error {
    unlock::Error::from(error).into()
}
