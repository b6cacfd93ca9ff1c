//! `cryptattach detach`

use clap::Args;
use serde_json::json;

use super::{Global, output};
use crate::{
    base::mapping_name::MappingName,
    verbs::{detach, error::Error},
    volumes::backend::Deferred,
};

/// Detach a volume: remove its mapping
///
/// All data is on the volume before this returns. A mapping that is in use is an error that says who uses it.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach detach data
  cryptattach detach data --deferred          if it is in use, as soon as it no longer is")]
pub struct Detach {
    /// The mapping's name
    name: MappingName,
    /// If it is in use, remove it when its last user closes it
    #[arg(long)]
    deferred: bool,
}

impl Detach {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let deferred = if self.deferred { Deferred::Yes } else { Deferred::No };
        let backend = detach::detach(&self.name, deferred)?;
        if global.json {
            output::print(true, &json!({"name": self.name, "backend": backend}), String::new)?;
        }
        Ok(())
    }
}
