//! `cryptattach explain`

use std::path::Path;

use clap::Args;
use serde::Serialize;

use super::{Global, output};
use crate::{
    base::clock::date,
    verbs::{
        boot,
        error::Error,
        explain::{self, FOLDER, LastFailure},
        rotate::standing::{self, Standing},
    },
};

/// So many failures are told whole if no volume is named, and so many in a line each.
const WHOLE: usize = 3;
const IN_SHORT: usize = 12;

/// Explain why a volume was not attached, and what to do
///
/// Shows the failures of this boot, including those of units and hot-plug, until the volume is attached. Without a
/// name, shows those of all volumes, the latest in full, and what 'cryptattach boot' has opened and left behind. Says how far the rotations
/// of volume keys are.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach explain
  cryptattach explain data
  cryptattach explain /dev/vdb --json")]
pub struct Explain {
    /// The mapping's name, or the encrypted device
    #[arg(value_name = "NAME|DEVICE")]
    about: Option<String>,
}

impl Explain {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let failures: Vec<LastFailure> =
            explain::all(Path::new(FOLDER)).map_err(Error::io(format!("read {FOLDER}")))?;
        let config = global.config().ok();
        let rotations = config.iter().flat_map(standing::all).collect();
        let mut found = Found { failures, rotations };
        if let Some(about) = &self.about {
            found.failures.retain(explain::about(&[about]));
            found.rotations.retain(|standing| standing.is_about(about));
            // Another host may have begun it.
            if found.rotations.is_empty() {
                found.rotations.extend(config.and_then(|config| standing::of(&config, Path::new(about))));
            }
        }
        output::print(global.json, &found.told(), || {
            let lines = found.lines(self.about.as_deref());
            if self.about.is_none() { with_boot(lines) } else { lines }
        })
    }
}

/// What there is to say.
struct Found {
    failures: Vec<LastFailure>,
    rotations: Vec<Standing>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Told<'a> {
    Failure(&'a LastFailure),
    Rotation(&'a Standing),
}

impl Found {
    fn told(&self) -> Vec<Told<'_>> {
        let failures = self.failures.iter().map(Told::Failure);
        failures.chain(self.rotations.iter().map(Told::Rotation)).collect()
    }

    fn lines(&self, about: Option<&str>) -> Vec<String> {
        let whole = if about.is_some() { self.failures.len() } else { WHOLE.min(self.failures.len()) };
        let (latest, before) = self.failures.split_at(whole);
        let mut lines = texts(latest);
        lines.extend(before.iter().take(IN_SHORT).map(short));
        if before.len() > IN_SHORT {
            let more = before.len() - IN_SHORT;
            lines.push(format!("and {more} before these; 'cryptattach explain --json' has all"));
        }
        lines.extend(self.rotations.iter().map(|standing| {
            let name = standing.name.as_ref().map(|name| format!(" ('{name}')")).unwrap_or_default();
            format!("{}{name}: {}", standing.source.display(), standing.rotation)
        }));
        if lines.is_empty() {
            let of = about.map(|about| format!(" of '{about}'")).unwrap_or_default();
            lines.push(format!("no failure{of} is recorded since the last boot"));
        }
        lines
    }
}

/// How it is seen among many: a boot of a large machine may leave hundreds.
fn short(failure: &LastFailure) -> String {
    let (head, told) = (head(failure), failure.told.error());
    format!("{head}: {told}")
}

fn texts(failures: &[LastFailure]) -> Vec<String> {
    failures.iter().flat_map(text).collect()
}

/// What the initramfs has left behind comes last.
fn with_boot(mut failures: Vec<String>) -> Vec<String> {
    failures.extend(boot::left_behind());
    failures
}

fn text(failure: &LastFailure) -> Vec<String> {
    [head(failure)].into_iter().chain(failure.told.lines()).collect()
}

fn head(failure: &LastFailure) -> String {
    let LastFailure { time, action, device, name, told } = failure;
    let name = name.as_ref().map(|name| format!(" as '{name}'")).unwrap_or_default();
    let code = told.exit_code;
    let device = device.as_ref().map(|device| format!(" {}", device.display())).unwrap_or_default();
    format!("{}: {action}{device}{name}: exit code {code}", date(*time))
}
