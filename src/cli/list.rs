//! `cryptattach list`

use clap::Args;
use serde::Serialize;

use super::{Global, output, status::Shown};
use crate::{
    base::{chain::printable, mapping_name::MappingName},
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
        let mappings = detach::list(&ThisHost)?;
        let mut rotations: Vec<_> = global.config().iter().flat_map(standing::all).collect();
        let mut lines = Vec::new();
        for status in mappings {
            let rotation = rotations.iter().position(|standing| Some(standing.volume) == status.volume);
            let rotation = rotation.map(|at| rotations.remove(at).rotation.of_mapping(&status));
            lines.push(Line::Attached(Box::new(Shown { status, rotation })));
        }
        lines.extend(rotations.into_iter().map(Line::Detached));
        if lines.is_empty() && !global.json {
            return Ok(());
        }
        output::print(global.json, &lines, || lines.iter().map(text).collect::<Vec<_>>())
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum Line {
    Attached(Box<Shown>),
    Detached(Standing),
}

fn text(line: &Line) -> String {
    match line {
        Line::Attached(shown) => {
            let Shown { status, rotation } = &**shown;
            let mark = match (&status.trouble, rotation) {
                (Some(_), _) => " (trouble, see status)",
                (None, Some(_)) => " (its key is being rotated, see status)",
                (None, None) => "",
            };
            format!(
                "{}\t{}\t{}\t{}\t{}{mark}",
                status.name,
                status.device.display(),
                printable(&status.source.display().to_string()),
                status.backend,
                output::size(status.size_bytes),
            )
        }
        Line::Detached(Standing { name, source, rotation, .. }) => {
            let name = name.as_ref().map_or("-", MappingName::as_str);
            format!("{name}\t-\t{}\t-\t{rotation}", printable(&source.display().to_string()))
        }
    }
}
