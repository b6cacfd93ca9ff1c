//! `cryptattach receipt ...`

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Global, output};
use crate::{
    base::{clock::date, hex},
    unlock::receipt::{self as receipts, Desk},
    verbs::error::Error,
};

/// Read the receipts of 'key erase', and know who has signed them
#[derive(Subcommand)]
pub enum Receipt {
    Verify(Verify),
    Key(Key),
}

/// Check a receipt's signature, and say in words what it says
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach receipt verify data-erased.json
  cryptattach receipt verify data-erased.json --signer THUMBPRINT     of another host")]
pub struct Verify {
    /// The receipt
    file: PathBuf,
    /// The thumbprint of the key that has to have signed it ('receipt key' of that host) [default: this host's]
    #[arg(long, value_name = "THUMBPRINT", allow_hyphen_values = true)]
    signer: Option<String>,
}

/// Print the public key that this host signs receipts with, as JWK, and its thumbprint
#[derive(Args)]
pub struct Key {}

impl Receipt {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Verify(verify) => verify.run(global),
            Self::Key(_) => {
                let (jwk, thumbprint) = Desk::of(&global.config()?).public()?;
                output::print(global.json, &json!({"jwk": jwk, "thumbprint": thumbprint}), || {
                    vec![jwk.to_string(), format!("thumbprint {thumbprint}")]
                })
            }
        }
    }
}

impl Verify {
    fn run(&self, global: &Global) -> Result<(), Error> {
        // Who names the signer needs no configuration.
        let own = || Desk::of(&global.config()?).signer().map_err(Error::from);
        let signer = self.signer.clone().map_or_else(own, |signer| Ok(Some(signer)))?;
        let receipt = receipts::verify(&self.file, signer.as_deref())?;
        output::print(global.json, &json!({"signer": signer, "receipt": receipt}), || {
            lines(&receipt, &signer.unwrap_or_default())
        })
    }
}

fn lines(receipt: &receipts::Receipt, signer: &str) -> Vec<String> {
    let receipts::HeaderWas { sequence, sha256, at, bytes, wiped_bytes, .. } = &receipt.header;
    let mut lines = vec![
        format!("signed by {signer}; it says:"),
        format!(
            "the host {} erased the volume {} on {}, from {} to {}",
            receipt.host,
            receipt.volume,
            receipt.device,
            date(receipt.begun),
            date(receipt.ended)
        ),
    ];
    lines.extend(receipt.detached_header.iter().map(|path| format!("  its header was detached: {path}")));
    lines.push(format!(
        "  the header had the sequence number {sequence} and SHA-256 {} ({bytes} bytes at byte {at}); {wiped_bytes} bytes are wiped",
        hex::encode(sha256)
    ));
    for key in &receipt.keys {
        lines.push(format!("  the key {} ({}): {}", key.key, key.store, key.answer.words()));
        lines.extend(key.places.iter().map(|place| format!("    rested in  {place}")));
        lines.extend(key.lockbox_entry.map(|had| match had {
            true => "    removed from the lockbox of that host".to_owned(),
            false => "    not in the lockbox of that host".to_owned(),
        }));
    }
    lines.extend(receipt.kept.iter().map(|key| format!("  still there: {key}, which may open copies of the volume")));
    lines.extend(receipt.verified.iter().map(|what| format!("  verified: {what}")));
    lines.extend(receipt.not_promised.iter().map(|what| format!("  not promised: {what}")));
    lines
}
