//! `cryptattach doctor`

use std::path::PathBuf;

use clap::Args;

use super::{Global, output};
use crate::verbs::{
    boot::{BootError, doctor},
    error::Error,
};

/// Check an initramfs: is everything in it that this machine's configuration needs, and nothing that should not be
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach doctor --image /boot/initrd.img-$(uname -r)")]
pub struct Doctor {
    /// The image; of initramfs-tools, dracut or another maker
    #[arg(long, value_name = "INITRD")]
    image: PathBuf,
}

impl Doctor {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let findings = doctor::examine(&global.config()?, &self.image)?;
        output::print(global.json, &findings, || {
            findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
        })?;
        if findings.iter().all(doctor::Finding::is_well) {
            Ok(())
        } else {
            Err(BootError::Unfit(self.image.clone()).into())
        }
    }
}
