//! What systemd, udev and shells ask for; no verbs for people.

use std::{
    env,
    path::{Path, PathBuf},
};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Global, output};
use crate::{
    config::{Config, ConfigError},
    keys::store,
    verbs::{
        error::Error,
        generator,
        hotplug::{self, Appeared},
    },
};

/// Write shell completions into a directory: cryptattach.bash, _cryptattach (zsh), cryptattach.fish
#[derive(Args)]
pub struct Completions {
    /// The directory
    directory: PathBuf,
}

impl Completions {
    pub(super) fn run(&self) -> Result<(), Error> {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let action = format!("write completions to {}", self.directory.display());
            clap_complete::generate_to(shell, &mut Cli::command(), "cryptattach", &self.directory)
                .map_err(Error::io(action))?;
        }
        Ok(())
    }
}

/// Generate systemd units for [volumes] of the configuration
#[derive(Args)]
pub struct Generator {
    /// The directory for units
    normal: PathBuf,
    /// Not used
    early: Option<PathBuf>,
    /// Not used
    late: Option<PathBuf>,
}

impl Generator {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let Some(config) = outline(global)? else { return Ok(()) };
        let action = format!("write units to {}", self.normal.display());
        generator::generate(&config, &self.normal).map_err(Error::io(action))
    }
}

/// Print the udev properties that describe a device
#[derive(Args)]
pub struct Probe {
    /// The device's node
    device: PathBuf,
    /// The device is a mapping: describe the volume below it
    #[arg(long)]
    mapping: bool,
}

impl Probe {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let below = || hotplug::below(&self.device).map_err(Error::io(format!("look below {}", self.device.display())));
        let device = if self.mapping { below()? } else { Some(self.device.clone()) };
        let Some(device) = device else { return Ok(()) };
        // A configuration that cannot be read must not hide what the device is.
        let config = outline(global).unwrap_or_else(|error| {
            tracing::warn!("{}", crate::base::chain::chain(&error));
            None
        });
        let links: Vec<PathBuf> =
            env::var("DEVLINKS").unwrap_or_default().split_whitespace().map(PathBuf::from).collect();
        let appeared = hotplug::appeared(config.as_ref(), &device, if self.mapping { &[] } else { &links })?;
        let Appeared { key, unit } = appeared;
        let ours = (key.is_some() || unit.is_some()).then(|| "ID_CRYPTATTACH=1".to_owned());
        let key = key.map(|key| format!("ID_CRYPTATTACH_KEY={key}"));
        let unit = unit.filter(|_| !self.mapping).map(|unit| format!("ID_CRYPTATTACH_UNIT={unit}"));
        let lines: Vec<String> = [ours, key, unit].into_iter().flatten().collect();
        if lines.is_empty() { Ok(()) } else { output::print(false, &(), || lines) }
    }
}

/// The configuration, if there is one.
fn outline(global: &Global) -> Result<Option<Config>, Error> {
    match Config::outline(Path::new(&global.config)) {
        Ok(config) => {
            store::check(&config)?;
            Ok(Some(config))
        }
        Err(ConfigError::Missing(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
