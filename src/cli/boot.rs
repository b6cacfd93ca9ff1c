//! `cryptattach boot`

use std::path::PathBuf;

use clap::Args;

use super::{Global, output};
use crate::{
    config::crypttab,
    verbs::{
        boot::{self, BootError, Reports, image},
        error::Error,
        failure,
    },
};

/// Attach the volumes of this boot (the initramfs calls it)
///
/// Asks all key sources at once. If they take longer than a few seconds, it also asks for a passphrase. Volumes that
/// are not attached in time are left to the distribution. The record is in /run/cryptattach/boot.json and boot.log, and
/// in the journal.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach boot
  cryptattach boot --needs-network && configure_networking
  cryptattach boot --image-parts          list what a hook must copy: program PATH, file PATH, module NAME;
                                          'network' if something must configure that")]
pub struct Boot {
    /// Only report whether this boot may need a store on the network: exit code 0 (yes) or 1 (no)
    #[arg(long, group = "only")]
    needs_network: bool,
    /// Only print the parts that an initramfs for this machine needs, one per line
    #[arg(long, group = "only")]
    image_parts: bool,
    /// Only do the last steps of a boot that was killed: extend PCR 15, so that the TPM opens no more keys until the next
    /// power-on, and close the lockbox. Does nothing after a boot that has done them
    #[arg(long, group = "only")]
    finish: bool,
    /// With --finish: where the root file system is mounted. Unless it is on a volume that this boot has proven to be this
    /// host's own, closes the lockbox and detaches what the boot attached
    #[arg(long, value_name = "DIR", requires = "finish")]
    root: Option<PathBuf>,
    /// The crypttab to read [default: that of the initramfs, or /etc/crypttab]
    #[arg(long, value_name = "FILE")]
    crypttab: Option<PathBuf>,
}

impl Boot {
    /// Whether this is a boot, and not a question about one.
    pub(super) fn is_boot(&self) -> bool {
        !(self.needs_network || self.image_parts || self.finish)
    }

    pub(super) fn run(&self, global: &Global, reports: Reports) -> Result<u8, Error> {
        let config = global.of_boot()?;
        let read = |path: &PathBuf| crypttab::text(path).map_err(Error::io(format!("read {}", path.display())));
        let crypttab = self.crypttab.as_ref().map(read).transpose();
        if crypttab.is_err() && self.is_boot() {
            boot::finish(&config, None)?;
        }
        let crypttab = crypttab?;
        let crypttab = crypttab.as_deref();
        if self.needs_network {
            return Ok(u8::from(!image::needs_network(&config, crypttab)?));
        }
        if self.image_parts {
            let image = image::image(&config, crypttab)?;
            for kept_out in &image.kept_out {
                tracing::warn!("{kept_out}");
            }
            let lines = || image.parts.iter().map(ToString::to_string).collect::<Vec<_>>();
            return output::print(false, &(), lines).map(|()| 0);
        }
        let booted = if self.finish {
            boot::finish(&config, self.root.as_deref())
        } else {
            boot::boot(config, crypttab, reports)
        };
        match booted {
            // It has been told.
            Err(error @ Error::Boot(BootError::Unfinished(_) | BootError::NotLatched { .. })) => {
                Ok(failure::exit(&error).into())
            }
            booted => booted.map(|()| 0),
        }
    }
}
