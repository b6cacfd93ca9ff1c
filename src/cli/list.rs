//! `cryptattach list`

use clap::Args;
use serde::Serialize;

use super::{Global, output, status::Shown};
use crate::{
    base::mapping_name::MappingName,
    config::Config,
    verbs::{
        detach,
        error::Error,
        rotate::standing::{self, Standing},
    },
    volumes::backend::ThisHost,
};

/// List attached volumes, and those whose keys are being rotated
///
/// Shows all dm-crypt mappings, whichever program made them, and all userspace mappings. Then the volumes that are not
/// attached while 'key rotate' works on them or is to go on with them.
#[derive(Args)]
pub struct List {}

impl List {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let lines = lines(global.config().ok().as_ref())?;
        output::print(global.json, &lines, || match lines.is_empty() {
            true => vec!["nothing is attached".to_owned()],
            false => table(&lines),
        })
    }
}

/// All mappings, and the rotations of volumes that have none.
pub(super) fn lines(config: Option<&Config>) -> Result<Vec<Line>, Error> {
    let mut rotations: Vec<_> = config.into_iter().flat_map(standing::all).collect();
    let mut lines = Vec::new();
    for status in detach::list(&ThisHost)? {
        let rotation = rotations.iter().position(|standing| Some(standing.volume) == status.volume);
        let rotation = rotation.map(|at| rotations.remove(at).rotation.of_mapping(&status));
        lines.push(Line::Attached(Box::new(Shown { status, rotation })));
    }
    lines.extend(rotations.into_iter().map(Line::Detached));
    Ok(lines)
}

#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum Line {
    Attached(Box<Shown>),
    Detached(Standing),
}

pub(super) fn table(lines: &[Line]) -> Vec<String> {
    output::table(["NAME", "DEVICE", "SOURCE", "BACKEND", "SIZE", "STATE"], lines.iter().map(row))
}

fn row(line: &Line) -> [String; 6] {
    match line {
        Line::Attached(shown) => {
            let Shown { status, rotation } = &**shown;
            let state = match (&status.trouble, rotation) {
                (Some(_), _) => "trouble (see status)",
                (None, Some(_)) => "its key is being rotated (see status)",
                (None, None) if status.read_only => "attached, read-only",
                (None, None) => "attached",
            };
            [
                status.name.to_string(),
                status.device.display().to_string(),
                status.source.display().to_string(),
                status.backend.to_string(),
                output::size(status.size_bytes),
                state.to_owned(),
            ]
        }
        Line::Detached(Standing { name, source, rotation, .. }) => {
            let none = || "-".to_owned();
            let name = name.as_ref().map_or_else(none, MappingName::to_string);
            [name, none(), source.display().to_string(), none(), none(), rotation.to_string()]
        }
    }
}
