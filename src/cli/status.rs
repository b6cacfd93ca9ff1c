//! `cryptattach status`

use clap::Args;

use super::{Global, output};
use crate::{
    base::mapping_name::MappingName,
    verbs::{detach, error::Error},
    volumes::backend::{MappingStatus, ThisHost},
};

/// Show the state of an attached volume
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach status data
  cryptattach status data --json")]
pub struct Status {
    /// The mapping's name
    name: MappingName,
}

impl Status {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let status = detach::status(&ThisHost, &self.name)?;
        output::print(global.json, &status, || text(&status))
    }
}

fn text(status: &MappingStatus) -> Vec<String> {
    let volume = status.volume.map_or_else(|| "plain dm-crypt, no header".to_owned(), |uuid| format!("LUKS {uuid}"));
    let mut lines = vec![
        status.name.to_string(),
        format!("  device       {}", status.device.display()),
        format!("  source       {}", status.source.display()),
        format!("  volume       {volume}"),
        format!("  backend      {}", status.backend),
        format!(
            "  cipher       {}, {} bit key, {} byte sectors",
            status.cipher, status.key_size_bits, status.sector_size_bytes
        ),
        format!("  size         {} ({} bytes)", output::size(status.size_bytes), status.size_bytes),
        format!("  mode         {}", if status.read_only { "read-only" } else { "read and write" }),
    ];
    lines.extend(status.holders.iter().map(|holder| format!("  in use       {holder}")));
    lines.extend(status.trouble.iter().map(|trouble| format!("  trouble      {trouble}")));
    lines
}
