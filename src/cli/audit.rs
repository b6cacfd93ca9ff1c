//! `cryptattach audit ...`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Global, output};
use crate::{
    base::{clock::date, hex},
    unlock::audit::verify::{Remark, Verdict},
    verbs::{
        audit::{self, Places},
        error::Error,
    },
};

/// Verify the audit record, and anchor it where others keep it
#[derive(Subcommand)]
pub enum Audit {
    Verify(Verify),
    Anchor(Anchor),
}

/// Check that no record was cut off, changed, taken out or moved since it was written
///
/// Without FILE it reads this host's record and the files that logrotate has made of it. They are compared with what the
/// state directory, the journal and the TPM have.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach audit verify
  cryptattach audit verify --anchor /mnt/elsewhere/anchors
  cryptattach audit verify old.jsonl.2 old.jsonl.1 old.jsonl     of another host, oldest first")]
pub struct Verify {
    /// Files of one record, oldest first [default: this host's]
    files: Vec<PathBuf>,
    /// A file with lines that 'audit anchor --json' has printed
    #[arg(long = "anchor", value_name = "FILE")]
    anchors: Vec<PathBuf>,
}

/// Print the number and hash of the latest record, for others to keep
///
/// Whoever becomes root can write the record anew, but not what another machine or the TPM has of it.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach audit anchor --to journal --to tpm
  cryptattach audit anchor --json | ssh elsewhere 'cat >>anchors'")]
pub struct Anchor {
    /// Also write it there
    #[arg(long, value_enum, value_name = "PLACE")]
    to: Vec<To>,
    /// File with the TPM's owner password, if one is set; needed the first time only
    #[arg(long, value_name = "FILE")]
    owner_password: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum To {
    /// The systemd journal
    Journal,
    /// An NV index of the TPM, which can be extended but not set
    Tpm,
}

impl Audit {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Verify(verify) => verify.run(global),
            Self::Anchor(anchor) => anchor.run(global),
        }
    }
}

impl Anchor {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let is_to = |place| self.to.contains(&place);
        let owner_password = self.owner_password.as_deref();
        let places = Places { journal: is_to(To::Journal), tpm: is_to(To::Tpm), owner_password };
        let anchored = audit::anchor(&global.config()?, &places)?;
        output::print(global.json, &anchored, || {
            let head = anchored.head;
            format!("record {} of {}: {}", head.seq, anchored.host, hex::encode(&head.hash))
        })
    }
}

impl Verify {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let verdict = audit::verify(&global.config()?, &self.files, &self.anchors)?;
        output::print(global.json, &verdict, || lines(&verdict))?;
        match verdict.faults() {
            0 => Ok(()),
            faults => Err(Error::AuditBroken { faults }),
        }
    }
}

fn lines(verdict: &Verdict) -> Vec<String> {
    let place = |remark: &Remark| format!("{}:{}: {}", remark.file, remark.line, remark.what);
    let mut lines: Vec<_> = verdict.faults.iter().chain(&verdict.torn).map(place).collect();
    if verdict.more_faults > 0 {
        lines.push(format!("and {} more faults", verdict.more_faults));
    }
    lines.push(match verdict.first.zip(verdict.last) {
        Some((first, last)) => format!(
            "{}: records {first} to {} ({} lines), the last of {}",
            if verdict.faults() == 0 { "unbroken" } else { "broken" },
            last.seq,
            verdict.records,
            date(last.time)
        ),
        None => "no records".to_owned(),
    });
    lines.extend(
        verdict.fit.iter().map(|anchor| format!("  fits the anchor in {}: record {}", anchor.kept_in, anchor.seq)),
    );
    lines.extend(verdict.not_compared.iter().map(|what| format!("  not compared: {what}")));
    lines
}
