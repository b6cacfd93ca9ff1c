//! Why a boot state does not open a key, in words.

use std::fmt;

use serde::Serialize;

use super::{Code, Counter, Digest, Event, PcrValues, policy::LATCH};
use crate::base::{hex, pcr_set::PcrSet};

/// Why not: all reasons that were found.
#[derive(Debug, Serialize)]
pub struct Explanation {
    /// At least one.
    pub findings: Vec<Finding>,
}

/// One reason.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case", tag = "finding")]
pub enum Finding {
    /// A PCR has another value than the policy wants, or than a signature is for.
    Pcr {
        pcr: u8,
        /// What it should be.
        #[serde(with = "hex")]
        expected: Digest,
        /// What it is.
        #[serde(with = "hex")]
        seen: Digest,
        /// What was measured into it last.
        events: Vec<Event>,
    },
    /// No signature is for the present values.
    NoSignature {
        key: String,
        /// How many signatures of that key there are.
        signatures: usize,
        files: Vec<std::path::PathBuf>,
        /// The present values of the PCRs that they are for.
        present: PcrValues,
        /// What was measured into these last.
        events: Vec<Event>,
    },
    /// The state is signed, but in an epoch that is over.
    Retired {
        epoch: u64,
        /// The oldest epoch whose signatures count.
        oldest: u64,
    },
    /// The counter that retires signatures is gone.
    NoCounter {
        /// Its NV index.
        counter: Counter,
    },
    /// PCR 15 has been extended.
    Latched,
    /// The TPM says so.
    Refused { command: &'static str, code: u32 },
}

impl Explanation {
    /// The PCRs that differ, if it is known which.
    pub fn pcrs(&self) -> PcrSet {
        let pcrs: Vec<u8> = self
            .findings
            .iter()
            .filter_map(|finding| match finding {
                Finding::Pcr { pcr, .. } => Some(*pcr),
                _ => None,
            })
            .collect();
        PcrSet::of(&pcrs)
    }

    /// Whether the state is right but for the latch.
    pub fn is_latch(&self) -> bool {
        matches!(self.findings[..], [Finding::Latched])
    }
}

impl std::error::Error for Explanation {}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, finding) in self.findings.iter().enumerate() {
            if index > 0 {
                f.write_str("; and ")?;
            }
            fmt::Display::fmt(finding, f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pcr { pcr, expected, seen, events } => {
                write!(f, "PCR {pcr} is {}; expected {}", hex::encode(seen), hex::encode(expected))?;
                write_events(f, events)
            }
            Self::NoSignature { key, signatures: 0, files, .. } => {
                write!(f, "there is no signature by the site's key {key}")?;
                match files.as_slice() {
                    [] => write!(f, " (there is no signature file)"),
                    files => {
                        let files: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
                        write!(f, " in {}", files.join(", "))
                    }
                }
            }
            Self::NoSignature { key, signatures, present, events, .. } => {
                write!(f, "none of the {signatures} signatures by the site's key {key} is for ")?;
                for (index, (pcr, value)) in present.iter().enumerate() {
                    write!(f, "{}PCR {pcr} = {}", if index > 0 { ", " } else { "" }, hex::encode(value))?;
                }
                write_events(f, events)
            }
            Self::Retired { epoch, oldest } => {
                write!(f, "this boot state is signed in epoch {epoch} only; at least epoch {oldest} is needed")
            }
            Self::NoCounter { counter } => write!(f, "the counter {counter} was removed from the TPM"),
            Self::Latched => write!(
                f,
                "PCR {LATCH} has been extended: the keys were already opened in this boot, or another program measured \
                 into it first (systemd-pcrmachine.service)"
            ),
            Self::Refused { command, code } => write!(f, "{command}: {}", Code(*code)),
        }
    }
}

fn write_events(f: &mut fmt::Formatter<'_>, events: &[Event]) -> fmt::Result {
    let events: Vec<_> = events.iter().map(ToString::to_string).collect();
    if events.is_empty() { Ok(()) } else { write!(f, " (measured last: {})", events.join("; ")) }
}
