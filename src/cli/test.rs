//! `cryptattach test`

use std::{env, io, os::unix::process::CommandExt, path::PathBuf, process::Command};

use clap::Args;

use super::{Global, SeparationOptions, attach::Plain, output};
use crate::{
    error::Error,
    key::KeyReference,
    trial::{self, Passed, Request},
};

/// Try out whether a volume would unlock, from where, and how long that takes; nothing is changed
///
/// It goes the way of attach up to the volume key, without mapping the volume: it may be attached meanwhile. With --as-boot
/// it knows only what a boot knows: nothing of this session's environment, home and credentials; and it tells what has to be
/// mounted before.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach test /dev/vdb
  cryptattach test /dev/vdb --as-boot
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
    /// With what a boot has: no environment, so the default configuration unless --config names one, and no credentials
    #[arg(long)]
    as_boot: bool,
    #[command(flatten)]
    plain: Plain,
    #[command(flatten)]
    separation: SeparationOptions,
}

impl Test {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        // One variable is this program's own, for libtss2.
        if self.as_boot && env::vars_os().any(|(name, _)| name != "TSS2_LOG") {
            return Err(Error::io("run this program without an environment")(without_environment()));
        }
        let config = global.config()?;
        let request = Request {
            device: &self.device,
            key: self.key.clone(),
            header: self.header.as_deref(),
            plain: self.plain.parameters(),
            separation: self.separation.strictness(),
            as_boot: self.as_boot,
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

/// Becomes the same command with an empty environment; returns only if that fails.
fn without_environment() -> io::Error {
    Command::new("/proc/self/exe").args(env::args_os().skip(1)).env_clear().exec()
}
