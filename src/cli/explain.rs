//! `cryptattach explain`

use std::path::Path;

use clap::Args;

use super::{Global, output};
use crate::{
    base::clock::date,
    verbs::{
        boot,
        error::Error,
        explain::{self, FOLDER, LastFailure},
    },
};

/// Explain why a volume was not attached, and what to do
///
/// Shows the failures of this boot, including those of units and hot-plug, until the volume is attached. Without a
/// name, shows those of all volumes, and what 'cryptattach boot' has opened and left behind.
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
        let mut failures: Vec<LastFailure> =
            explain::all(Path::new(FOLDER)).map_err(Error::io(format!("read {FOLDER}")))?;
        if let Some(about) = &self.about {
            failures.retain(explain::about(&[about]));
        }
        output::print(global.json, &failures, || match (&failures[..], &self.about) {
            ([], Some(about)) => vec![format!("no failure of '{about}' is recorded since the last boot")],
            ([], None) => with_boot(vec!["no failure is recorded since the last boot".to_owned()]),
            (failures, None) => with_boot(texts(failures)),
            (failures, Some(_)) => texts(failures),
        })
    }
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
    let LastFailure { time, action, device, name, told } = failure;
    let name = name.as_ref().map(|name| format!(" as '{name}'")).unwrap_or_default();
    let code = told.exit_code;
    let device = device.as_ref().map(|device| format!(" {}", device.display())).unwrap_or_default();
    let head = format!("{}: {action}{device}{name}: exit code {code}", date(*time));
    [head].into_iter().chain(told.lines()).collect()
}
