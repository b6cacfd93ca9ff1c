//! `cryptattach resize`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{Global, attach::Plain, output};
use crate::{
    base::{key::KeyReference, mapping_name::MappingName},
    verbs::{
        error::Error,
        resize::{self, Request},
    },
};

/// Make an attached volume as large as its device has become
///
/// Prints the new size in bytes. What is on the volume stays as large as it is; resize2fs and the like do that.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach resize data")]
pub struct Resize {
    /// The mapping's name
    name: MappingName,
    /// Where the key is (STORE/KEY-ID) [default: as the LUKS2 token says]
    #[arg(long, value_name = "REFERENCE")]
    key: Option<KeyReference>,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    #[command(flatten)]
    plain: Plain,
}

impl Resize {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let request = Request {
            name: &self.name,
            key: self.key.clone(),
            header: self.header.as_deref(),
            plain: self.plain.parameters(),
            caller: None,
        };
        let size_bytes = resize::resize(&config, request)?;
        output::print(global.json, &json!({"name": self.name, "size_bytes": size_bytes}), || size_bytes.to_string())
    }
}
