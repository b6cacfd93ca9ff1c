//! `cryptattach key erase`

use std::{
    io::{self, BufRead, IsTerminal, Read},
    path::PathBuf,
};

use clap::Args;

use super::{AnswerOption, SeparationOptions, key::device_of, output, words};
use crate::{
    config::Config,
    verbs::{
        erase::{self, Doomed, Request},
        error::Error,
    },
};

/// Erase a volume for ever: deletes its key in the store, then wipes its header and keyslots
///
/// Afterwards nobody reads its data again, who has not kept a copy of the key: a backup of the store for one. The signed
/// receipt says what was done and verified, and what nobody can promise. After a crash the same command goes on.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach key erase /dev/vdb
  cryptattach key erase data --yes --receipt data-erased.json     the volume 'data' of the configuration
  cryptattach receipt verify data-erased.json")]
pub struct Erase {
    /// The encrypted block device or file, or a name of [volumes.NAME]
    #[arg(value_name = "DEVICE|NAME", value_parser = words::device())]
    device: PathBuf,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// Confirm it, where nobody can be asked
    #[arg(long)]
    yes: bool,
    /// The file of the receipt [default: one in the state directory]
    #[arg(long, value_name = "FILE")]
    receipt: Option<PathBuf>,
    #[command(flatten)]
    pub(super) answer: AnswerOption,
    #[command(flatten)]
    separation: SeparationOptions,
}

impl Erase {
    pub(super) fn run(&self, config: &Config, json: bool) -> Result<(), Error> {
        let (device, header) = device_of(config, &self.device);
        let request = Request {
            device: &device,
            header: self.header.as_deref().or(header.as_deref()),
            receipt: self.receipt.as_deref(),
            separation: self.separation.strictness(),
            confirm: &|doomed| self.confirm(doomed),
        };
        let erased = erase::erase(config, &request)?;
        output::print(json, &erased, || {
            let mut lines = vec![format!("erased the volume {} on {}", erased.receipt.volume, device.display())];
            lines.extend(
                erased.receipt.keys.iter().map(|key| format!("  key      {}: {}", key.key, key.answer.words())),
            );
            lines.extend(erased.receipt.kept.iter().map(|key| {
                format!("  kept     {key}, which may open copies of it (cryptattach key delete {key} --yes)")
            }));
            lines.push(format!("  receipt  {}", erased.file.display()));
            lines.push(format!("  signer   {}", erased.signer));
            lines
        })
    }

    /// As `cryptsetup erase` asks.
    fn confirm(&self, doomed: &Doomed<'_>) -> Result<(), Error> {
        if self.yes {
            return Ok(());
        }
        let device = doomed.device.display();
        let keys: Vec<_> = doomed.keys.iter().map(ToString::to_string).collect();
        if !io::stdin().is_terminal() {
            let keys = keys.join(" and ");
            let volume = doomed.volume;
            return Err(Error::Usage(format!(
                "erasing {device} deletes {keys} and makes the volume {volume} unreadable for ever; confirm with --yes"
            )));
        }
        output::say(vec![
            "WARNING!".to_owned(),
            "========".to_owned(),
            format!("This makes all data of the volume {} on {device} unreadable for ever:", doomed.volume),
            format!("{} is deleted in its store, and the header is wiped.", keys.join(" and ")),
            String::new(),
            "Are you sure? (Type 'yes' in capital letters):".to_owned(),
        ]);
        let mut answer = String::new();
        let read = io::stdin().lock().take(64).read_line(&mut answer);
        read.map_err(Error::io("read the answer"))?;
        match answer.trim_end() {
            "YES" => Ok(()),
            _ => Err(Error::Usage(format!("{device} was not erased: nothing is changed"))),
        }
    }
}
