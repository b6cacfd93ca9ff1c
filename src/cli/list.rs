//! `cryptattach list`

use clap::Args;

use super::{Global, output};
use crate::{
    base::chain::printable,
    verbs::{detach, error::Error},
    volumes::backend::ThisHost,
};

/// List attached volumes
///
/// Shows all dm-crypt mappings, whichever program made them, and all userspace mappings.
#[derive(Args)]
pub struct List {}

impl List {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let mappings = detach::list(&ThisHost)?;
        if mappings.is_empty() && !global.json {
            return Ok(());
        }
        output::print(global.json, &mappings, || {
            let lines = mappings.iter().map(|mapping| {
                let mark = if mapping.trouble.is_some() { " (trouble, see status)" } else { "" };
                format!(
                    "{}\t{}\t{}\t{}\t{}{mark}",
                    mapping.name,
                    mapping.device.display(),
                    printable(&mapping.source.display().to_string()),
                    mapping.backend,
                    output::size(mapping.size_bytes),
                )
            });
            lines.collect::<Vec<_>>()
        })
    }
}
