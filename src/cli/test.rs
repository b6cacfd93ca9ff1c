//! `cryptattach test`

use std::{env, io, os::unix::process::CommandExt, path::PathBuf, process::Command};

use clap::Args;

use super::{AnswerOption, Global, SeparationOptions, attach::Plain, failure, output, words};
use crate::{
    base::key::KeyReference,
    config::Config,
    verbs::{
        error::Error,
        test::{self, Passed, Request},
    },
};

/// Test whether a volume would unlock, from which store, and how long that takes, without changing anything
///
/// Runs every step of attach except the mapping; safe while the volume is attached. With --as-boot, it uses only what a
/// boot has: not this session's environment, home and credentials. It then tries each key that [boot] lists for the
/// device. It also reports which file systems must be mounted before, and what the initramfs lacks.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach test /dev/vdb
  cryptattach test /dev/vdb --as-boot
  cryptattach test /dev/vdb --json")]
pub struct Test {
    /// The encrypted block device or file
    #[arg(value_parser = words::device())]
    device: PathBuf,
    /// The key (STORE/KEY-ID) [default: the one in the LUKS2 token]
    #[arg(long, value_name = "REFERENCE")]
    key: Option<KeyReference>,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// Use only what a boot has: no environment, no credentials, and the default configuration unless --config names
    /// one
    #[arg(long)]
    as_boot: bool,
    #[command(flatten)]
    plain: Plain,
    #[command(flatten)]
    separation: SeparationOptions,
    #[command(flatten)]
    answer: AnswerOption,
}

impl Test {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        // One variable is this program's own, for libtss2.
        if self.as_boot && env::vars_os().any(|(name, _)| name != "TSS2_LOG") {
            return Err(Error::io("run this program without an environment")(without_environment()));
        }
        let mut config = if self.as_boot { global.of_boot() } else { Ok(global.config()?) }?;
        config.attendant = self.answer.attendant()?;
        let keys = if self.as_boot && self.key.is_none() { test::boot_keys(&config, &self.device) } else { None };
        match keys.unwrap_or_default().as_slice() {
            [] => self.try_key(global, &config, self.key.clone()),
            keys => self.try_all(global, &config, keys),
        }
    }

    fn try_key(&self, global: &Global, config: &Config, key: Option<KeyReference>) -> Result<(), Error> {
        let request = Request {
            device: &self.device,
            key,
            header: self.header.as_deref(),
            plain: self.plain.parameters(),
            separation: self.separation.strictness(),
            as_boot: self.as_boot,
        };
        let passed = test::try_out(config, request)?;
        output::print(global.json, &passed, || self.text(&passed))
    }

    /// A boot asks for all of them at once, and one is enough.
    fn try_all(&self, global: &Global, config: &Config, keys: &[KeyReference]) -> Result<(), Error> {
        let mut passed = false;
        for (number, key) in keys.iter().enumerate() {
            if !global.json && keys.len() > 1 {
                output::say(format!("with {key}, one of {} keys:", keys.len()));
            }
            match self.try_key(global, config, Some(key.clone())) {
                Ok(()) => passed = true,
                // With the last one it is clear whether all have failed.
                Err(error) if number + 1 == keys.len() && !passed => return Err(error),
                Err(error) => failure::print(&error, global.json),
            }
        }
        Ok(())
    }

    fn text(&self, passed: &Passed) -> Vec<String> {
        let Passed { key, source, steps, policy, outdated, seconds } = passed;
        let mut lines = vec![format!("{} would unlock in {seconds:.2} s: {key} from {source}", self.device.display())];
        lines.extend(steps.iter().map(|step| {
            let milliseconds = step.seconds * 1000.0;
            format!("  {:<12} {milliseconds:>7.1} ms  {}", step.step, step.found)
        }));
        if let Some(policy) = policy {
            lines.push("  policy".to_owned());
            lines.extend(policy.lines().into_iter().map(|line| format!("    {line}")));
        }
        lines.extend(outdated.iter().map(|leaf| {
            let store = &key.store;
            format!(
                "  note: the server of leaf '{leaf}' has new keys; before the old ones are deleted there: cryptattach leaf pin \
                 {leaf}, then cryptattach container rotate {store}"
            )
        }));
        lines
    }
}

/// Becomes the same command with an empty environment; returns only if that fails.
fn without_environment() -> io::Error {
    Command::new("/proc/self/exe").args(env::args_os().skip(1)).env_clear().exec()
}
