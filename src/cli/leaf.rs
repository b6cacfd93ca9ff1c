//! `cryptattach leaf ...`

use std::{
    io::{self, BufRead, IsTerminal},
    path::PathBuf,
};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{AnswerOption, Global, output, paper::Paper};
use crate::{
    config::LeafName,
    keys::seal::leaves::{Offer, Pin as LeafPin},
    verbs::{error::Error, leaf},
};

/// Manage the leaves of policies: which servers, tokens and persons open a container
#[derive(Subcommand)]
pub enum Leaf {
    Pin(Pin),
    New(New),
}

/// Fetch the public key of a Tang or OpenBao server or of a token, and confirm it
///
/// Shows the thumbprints of a Tang server's signing keys, or that of a Transit key or a key in a token (PKCS#11), and asks.
/// Run it again after a server's keys were rotated, and then 'cryptattach container rotate'.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach leaf pin t1
  cryptattach leaf pin t1 --thumbprint GSuhFx…      as 'tang-show-keys' prints it on the server")]
pub struct Pin {
    /// The leaf ([leaves.NAME] in the configuration)
    name: LeafName,
    /// The thumbprint of the server's signing key, or of the server's or token's key, so that nobody is asked
    #[arg(long, value_name = "THUMBPRINT", allow_hyphen_values = true)]
    thumbprint: Option<String>,
}

/// Make a leaf that a person opens: a recovery key on paper, or a passphrase
///
/// A recovery key ([leaves.NAME] with recovery = "FILE") is shown once, as words and as QR code, and typed back. A
/// passphrase (passphrase = "FILE") is asked for twice. The file has no secret. An existing file is not overwritten.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach leaf new paper
  cryptattach leaf new paper --page --to-pipe | lp      a page for the safe; it is typed back from the print
  cryptattach leaf new anna --answer -                  a passphrase from standard input")]
pub struct New {
    /// The leaf ([leaves.NAME] in the configuration)
    name: LeafName,
    /// Write a recovery key to standard output although that is no terminal: for a printer
    #[arg(long)]
    to_pipe: bool,
    /// Add what a person needs who finds the page years later
    #[arg(long)]
    page: bool,
    /// Do not ask for the words of a new recovery key
    #[arg(long)]
    no_confirm: bool,
    /// File with the new passphrase; '-' is standard input
    #[arg(long, value_name = "FILE")]
    answer: Option<PathBuf>,
}

impl Leaf {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Pin(pin) => pin.run(global),
            Self::New(new) => new.run(global),
        }
    }
}

impl New {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let answer = AnswerOption { answer: self.answer.clone() }.read()?;
        let paper = Paper { to_pipe: self.to_pipe, page: self.page, no_confirm: self.no_confirm, answer };
        let file = leaf::new(&global.config()?, &self.name, &paper)?;
        let lines = vec![
            format!("leaf '{}' is made: {}", self.name, file.display()),
            "name it in a policy: cryptattach container policy STORE 'any(...)'".to_owned(),
        ];
        // What a printer gets is the recovery key alone.
        if self.to_pipe {
            output::say(lines);
            return Ok(());
        }
        output::print(global.json, &json!({"leaf": self.name.to_string(), "file": file}), || lines)
    }
}

impl Pin {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let pinned =
            leaf::pin(&config, &self.name, self.thumbprint.as_deref(), |pin, offer| confirmed(&self.name, pin, offer))?;
        let shown = json!({"leaf": self.name.to_string(), "thumbprint": pinned});
        output::print(global.json, &shown, || format!("leaf '{}' is pinned to {pinned}", self.name))
    }
}

/// Shows who vouches for a leaf's key, and has a person compare that.
pub(super) fn confirmed(name: &LeafName, pin: &dyn LeafPin, offer: &dyn Offer) -> Result<String, Error> {
    let thumbprints = offer.thumbprints();
    let [first, ..] = thumbprints else { return Err(Error::Usage("no key was offered".to_owned())) };
    let shown = thumbprints.iter().map(|thumbprint| format!("  {thumbprint}"));
    let head = format!("the key of leaf '{name}' is vouched for by:");
    output::say([head].into_iter().chain(shown).collect::<Vec<_>>());
    let compare_with = pin.compare_with();
    if !io::stdin().is_terminal() {
        return Err(Error::Usage(format!(
            "nobody can be asked whether that is right; compare it with {compare_with} and use --thumbprint {first}"
        )));
    }
    output::say(format!("Compare it with {compare_with}. Is it the same? (yes/no)"));
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).map_err(Error::io("read the answer"))?;
    match answer.trim() {
        "yes" => Ok(first.clone()),
        _ => Err(Error::Usage(format!("the leaf '{name}' was not pinned"))),
    }
}
