//! `cryptattach detach`

use clap::Args;
use serde_json::json;

use super::{Global, output};
use crate::{
    verbs::{detach, error::Error},
    volumes::backend::{Deferred, ThisHost},
};

/// Detach a volume: remove its mapping
///
/// Returns after all data is on the volume. Fails if the mapping is in use, and names its users.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach detach data
  cryptattach detach data --deferred          if it is in use, when its last user closes it")]
pub struct Detach {
    /// The mapping's name, its plaintext device, or the encrypted device
    #[arg(value_name = "NAME|DEVICE")]
    mapping: String,
    /// If the mapping is in use, remove it when its last user closes it
    #[arg(long)]
    deferred: bool,
    /// After a rotation of its key was killed: let the I/O fail that waits for it. Users of the mapping get I/O errors, and
    /// what they have not written yet is lost
    #[arg(long, conflicts_with = "deferred")]
    force: bool,
}

impl Detach {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let deferred = if self.deferred { Deferred::Yes } else { Deferred::No };
        let name = detach::named(&ThisHost, &self.mapping)?;
        if self.force {
            detach::fail_hanging(&ThisHost, &name)?;
        }
        let backend = detach::detach(&ThisHost, &name, deferred)?;
        if global.json {
            output::print(true, &json!({"name": name, "backend": backend}), String::new)?;
        }
        Ok(())
    }
}
