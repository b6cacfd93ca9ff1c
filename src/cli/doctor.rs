//! `cryptattach doctor`

use std::path::PathBuf;

use clap::Args;

use super::{Global, output};
use crate::{
    config::crypttab,
    verbs::{
        boot::{BootError, doctor},
        error::Error,
    },
};

/// Check that an initramfs has all that this machine's configuration needs, and nothing that it must not have
///
/// Compares the output of 'boot --image-parts' with that of lsinitramfs, lsinitrd or lsinitcpio: paths and sizes, not contents.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach doctor --image /boot/initrd.img-$(uname -r)")]
pub struct Doctor {
    /// The image, made by initramfs-tools, dracut or another program
    #[arg(long, value_name = "INITRD")]
    image: PathBuf,
    /// The image's crypttab [default: /etc/crypttab]
    #[arg(long, value_name = "FILE")]
    crypttab: Option<PathBuf>,
}

impl Doctor {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let read = |path: &PathBuf| crypttab::text(path).map_err(Error::io(format!("read {}", path.display())));
        let crypttab = self.crypttab.as_ref().map(read).transpose()?;
        let findings = doctor::examine(&global.config()?, &self.image, crypttab.as_deref())?;
        output::print(global.json, &findings, || findings.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        if findings.iter().all(doctor::Finding::is_well) {
            Ok(())
        } else {
            Err(BootError::Unfit(self.image.clone()).into())
        }
    }
}
