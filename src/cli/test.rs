//! `cryptattach test`

use std::path::PathBuf;

use clap::Args;

use super::{Global, SeparationOptions, attach::Plain, output};
use crate::{
    error::Error,
    key::KeyReference,
    trial::{self, Passed, Request},
};

/// Try out whether a volume would unlock, from where, and how long that takes; nothing is changed
///
/// It goes the way of attach up to the volume key, without mapping the volume: it may be attached meanwhile.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach test /dev/vdb
  cryptattach test /dev/vdb --json")]
pub struct Test {
    /// The encrypted block device or file
    device: PathBuf,
    /// Where the key is (STORE/KEY-ID) [default: as the LUKS2 token says]
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

impl Test {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let request = Request {
            device: &self.device,
            key: self.key.clone(),
            header: self.header.as_deref(),
            plain: self.plain.parameters(),
            separation: self.separation.strictness(),
        };
        let passed = trial::try_out(&config, request)?;
        output::print(global.json, &passed, || self.text(&passed))
    }

    fn text(&self, passed: &Passed) -> String {
        let Passed { key, source, steps, seconds } = passed;
        let mut lines = vec![format!("{} would unlock in {seconds:.2} s: {key} from {source}", self.device.display())];
        lines.extend(steps.iter().map(|step| {
            let milliseconds = step.seconds * 1000.0;
            format!("  {:<12} {milliseconds:>7.1} ms  {}", step.step, step.found)
        }));
        lines.join("\n")
    }
}
