//! `cryptattach status`

use clap::Args;
use serde::Serialize;

use super::{Global, output};
use crate::{
    base::mapping_name::MappingName,
    verbs::{
        detach,
        error::Error,
        rotate::standing::{self, Rotation, Standing},
    },
    volumes::backend::{MappingStatus, ThisHost},
};

/// Show the state of an attached volume, or how far the rotation of its key is
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
        let config = global.config().ok();
        let status = match detach::status(&ThisHost, &self.name) {
            Ok(status) => status,
            Err(error @ Error::NotAttached(_)) => {
                let mut standings = config.iter().flat_map(standing::all);
                let standing = standings.find(|standing| standing.name.as_ref() == Some(&self.name));
                let standing = standing.ok_or(error)?;
                return output::print(global.json, &standing, || detached(&standing));
            }
            Err(error) => return Err(error),
        };
        let standing = config.and_then(|config| standing::of(&config, &status.source));
        let rotation = standing.map(|standing| standing.rotation.of_mapping(&status));
        let shown = Shown { status, rotation };
        output::print(global.json, &shown, || {
            let mut lines = text(&shown.status);
            lines.extend(shown.rotation.iter().map(|rotation| format!("  rotation     {rotation}")));
            lines
        })
    }
}

/// A mapping, and where the rotation of its volume's key stands.
#[derive(Serialize)]
pub struct Shown {
    #[serde(flatten)]
    pub status: MappingStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotation: Option<Rotation>,
}

fn detached(standing: &Standing) -> Vec<String> {
    vec![
        standing.name.as_ref().map_or_else(String::new, ToString::to_string) + "  (not attached)",
        format!("  source       {}", standing.source.display()),
        format!("  volume       LUKS {}", standing.volume),
        format!("  rotation     {}", standing.rotation),
    ]
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
