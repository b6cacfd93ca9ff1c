//! `cryptattach leaf ...`

use std::io::{self, BufRead, IsTerminal};

use clap::{Args, Subcommand};
use serde_json::json;

use super::{Global, output};
use crate::{
    config::LeafName,
    keys::seal::leaves::Pin as LeafPin,
    verbs::{error::Error, leaf},
};

/// Manage the leaves of policies: which Tang servers and tokens may open a container
#[derive(Subcommand)]
pub enum Leaf {
    Pin(Pin),
}

/// Fetch the public key of a Tang server or a token and confirm it
///
/// Shows the thumbprints of the server's signing keys, or of the key in the token (PKCS#11), and asks. Run it again after
/// a server's keys were rotated, and then 'cryptattach container rotate'.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach leaf pin t1
  cryptattach leaf pin t1 --thumbprint GSuhFx…      as 'tang-show-keys' prints it on the server")]
pub struct Pin {
    /// The leaf ([leaves.NAME] in the configuration)
    name: LeafName,
    /// The thumbprint of the server's signing key or of the token's key, so that nobody is asked
    #[arg(long, value_name = "THUMBPRINT", allow_hyphen_values = true)]
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
        let pinned = leaf::pin(&config, &self.name, self.thumbprint.as_deref(), |pin, offer| {
            self.ask(pin, offer.thumbprints())
        })?;
        let shown = json!({"leaf": self.name.to_string(), "thumbprint": pinned});
        output::print(global.json, &shown, || format!("leaf '{}' is pinned to {pinned}", self.name))
    }

    fn ask(&self, pin: &dyn LeafPin, thumbprints: &[String]) -> Result<String, Error> {
        let [first, ..] = thumbprints else { return Err(Error::Usage("no key was offered".to_owned())) };
        let shown = thumbprints.iter().map(|thumbprint| format!("  {thumbprint}"));
        let head = format!("the key of leaf '{}' is vouched for by:", self.name);
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
            _ => Err(Error::Usage(format!("the leaf '{}' was not pinned", self.name))),
        }
    }
}
