//! `cryptattach resize`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{Global, SeparationOptions, attach::Plain, output};
use crate::{
    base::key::KeyReference,
    verbs::{
        detach,
        error::Error,
        resize::{self, Request},
    },
    volumes::backend::ThisHost,
};

/// Grow an attached volume to the size of its device
///
/// Prints the new size in bytes. Does not grow the file system on the volume: use resize2fs or a similar program.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach resize data")]
pub struct Resize {
    /// The mapping's name, its plaintext device, or the encrypted device
    #[arg(value_name = "NAME|DEVICE")]
    mapping: String,
    /// The key (STORE/KEY-ID) [default: the one in the LUKS2 token]
    #[arg(long, value_name = "REFERENCE")]
    key: Option<KeyReference>,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    #[command(flatten)]
    plain: Plain,
    #[command(flatten)]
    separation: SeparationOptions,
}

impl Resize {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let name = detach::named(&ThisHost, &self.mapping)?;
        let request = Request {
            name: &name,
            key: self.key.clone(),
            header: self.header.as_deref(),
            plain: self.plain.parameters(),
            separation: self.separation.strictness(),
            tenant: None,
            target: None,
        };
        let size_bytes = resize::resize(&config, &ThisHost, request)?;
        output::print(global.json, &json!({"name": name, "size_bytes": size_bytes}), || size_bytes.to_string())
    }
}
