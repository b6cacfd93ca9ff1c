//! `cryptattach leaf ...`

use std::io::{self, BufRead, IsTerminal};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Global, output};
use crate::{
    config::LeafName,
    verbs::{error::Error, leaf},
};

/// Manage the leaves of policies: which Tang servers may open a container
#[derive(Subcommand)]
pub enum Leaf {
    Pin(Pin),
}

/// Fetch a Tang server's keys and confirm that they are the server's
///
/// Shows the thumbprints of the server's signing keys and asks. Run it again after the server's keys were rotated, and
/// then 'cryptattach container rotate'.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach leaf pin t1
  cryptattach leaf pin t1 --thumbprint GSuhFx…      as 'tang-show-keys' prints it on the server")]
pub struct Pin {
    /// The leaf ([leaves.NAME] in the configuration)
    name: LeafName,
    /// The thumbprint of the server's signing key, so that nobody is asked
    #[arg(long, value_name = "THUMBPRINT")]
    thumbprint: Option<String>,
}

impl Leaf {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Pin(pin) => pin.run(global),
        }
    }
}

impl Pin {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let pinned =
            leaf::pin(&config, &self.name, |advertisement, expected| match self.thumbprint.as_deref().or(expected) {
                Some(thumbprint) => Ok(thumbprint.to_owned()),
                None => self.ask(&advertisement.signers),
            })?;
        let shown = json!({"leaf": self.name.to_string(), "thumbprint": pinned});
        output::print(global.json, &shown, || format!("leaf '{}' is pinned to {pinned}", self.name))
    }

    fn ask(&self, signers: &[String]) -> Result<String, Error> {
        let [first, ..] = signers else { return Err(Error::Usage("the server has no signing key".to_owned())) };
        let shown = signers.iter().map(|signer| format!("  {signer}"));
        output::say(
            [format!("the server of leaf '{}' signs with:", self.name)].into_iter().chain(shown).collect::<Vec<_>>(),
        );
        if !io::stdin().is_terminal() {
            return Err(Error::Usage(format!(
                "nobody can be asked whether that is right; compare it with 'tang-show-keys' on the server and use \
                 --thumbprint {first}"
            )));
        }
        output::say("Compare it with what 'tang-show-keys' prints on the server. Is it the same? (yes/no)".to_owned());
        let mut answer = String::new();
        io::stdin().lock().read_line(&mut answer).map_err(Error::io("read the answer"))?;
        match answer.trim() {
            "yes" => Ok(first.clone()),
            _ => Err(Error::Usage(format!("the leaf '{}' was not pinned", self.name))),
        }
    }
}
