//! `cryptattach man`: the man pages, from the same definitions as the help texts.

use std::path::PathBuf;

use clap::{Args, CommandFactory};

use super::Cli;
use crate::verbs::error::Error;

/// Write the man pages into a directory
#[derive(Args)]
pub struct Man {
    /// The directory
    directory: PathBuf,
}

impl Man {
    pub(super) fn run(&self) -> Result<(), Error> {
        let action = format!("write man pages to {}", self.directory.display());
        clap_mangen::generate_to(Cli::command(), &self.directory).map_err(Error::io(action))
    }
}
