//! `cryptattach separation`

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use clap::Args;

use super::{Global, key::read_secret, output, words};
use crate::{
    base::key::{KeyId, KeyReference},
    config::SeparationPolicy,
    keys::seal::For,
    sys::device::Device,
    unlock::container::{Container, Use, ViaLockbox},
    verbs::error::Error,
    volumes::{
        header::{self, VolumeError},
        separation::{self, Inventory, Surroundings, Target},
    },
};

/// Show where a volume and its key are stored, and whether they are separate
///
/// The exit code is 0 if attach would continue, and 72 if it would refuse.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach separation /dev/vdb
  cryptattach separation /dev/vdb --json
  cryptattach separation /dev/sdc --connection-info connection_info.json
  cryptattach separation /dev/vdb --key cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de")]
pub struct Separation {
    /// The encrypted block device or file
    #[arg(value_parser = words::device())]
    device: PathBuf,
    /// The key [default: the one in the LUKS2 token; a device without a token is checked against the default store]
    #[arg(long, value_name = "REFERENCE")]
    key: Option<KeyReference>,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// OpenStack's connection_info of the volume (JSON), which names its server; '-' is standard input
    #[arg(long, value_name = "FILE")]
    connection_info: Option<PathBuf>,
    /// What to do if nothing proves that key and data are separate [default: as configured]
    #[arg(long = "separation", value_name = "POLICY")]
    policy: Option<SeparationPolicy>,
}

impl Separation {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let inventory = Inventory::of(&config.separation)?;
        let target = self.connection_info.as_deref().map(read_target).transpose()?;
        Device::look(&self.device)?;
        let in_token = || match header::probe(&self.device, self.header.as_deref()) {
            Ok(volume) => Ok(volume.reference().cloned()),
            // The question is a fair one before format, too.
            Err(VolumeError::NoHeader { .. }) => Ok(None),
            Err(error) => Err(error),
        };
        let reference = match &self.key {
            Some(reference) => Some(reference.clone()),
            None => in_token()?,
        };
        let store_name = config.store_or_default(reference.as_ref().map(|reference| &reference.store))?;
        let container = Container::open(&config, &store_name, None, Use::Unlock)?;
        // Without a key yet: where a new one would rest.
        let key = reference.map_or_else(KeyId::random, |reference| reference.key);
        let places = ViaLockbox::look(Arc::new(container), key, For::Any, &|_| Ok(())).places()?;
        let level = config.separation.level;
        let surroundings = Surroundings { target: target.as_ref(), inventory: &inventory, level };
        let report = separation::check(&self.device, self.header.as_deref(), &places, &surroundings);
        output::print(global.json, &report, || report.to_string().lines().map(str::to_owned).collect::<Vec<_>>())?;
        Ok(report.judge(self.policy.unwrap_or(config.separation.policy))?)
    }
}

/// It may also have passwords.
fn read_target(path: &Path) -> Result<Target, Error> {
    Ok(Target::parse(read_secret("the connection information", path)?.expose())?)
}
