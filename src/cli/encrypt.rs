//! `cryptattach encrypt`

use std::path::PathBuf;

use clap::Args;

use super::{AnswerOption, Global, SeparationOptions, attach::key_size, output, rotate::with_progress, words};
use crate::{
    base::key::{KeySize, StoreName},
    verbs::{
        encrypt::{self, Request},
        error::Error,
        rotate::container::Event,
    },
    volumes::in_place,
};

/// Make a volume of a device with a file system, in place: encrypts its data
///
/// Takes ext4, xfs and btrfs, not mounted, with 18 MiB free behind them; --shrink makes that room in ext4. SIGTERM or
/// Ctrl-C pauses it (exit code 83); the same command goes on, also after a crash, and on another host. Meanwhile nothing
/// opens the device. Make a backup first: a disk that fails in the middle leaves half of each.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach encrypt /dev/vdb
  cryptattach encrypt /dev/vdb --shrink       ext4 that fills the device
  cryptattach encrypt /dev/vg/data --rate 50  leaves the disk to others: at most 50 MiB/s")]
pub struct Encrypt {
    /// The block device or file
    #[arg(value_parser = words::device())]
    device: PathBuf,
    /// The store for the key [default: default_store of the configuration, or its only store]
    #[arg(long)]
    store: Option<StoreName>,
    /// Size of the volume key in bits (256 or 512)
    #[arg(long, default_value = "512", value_parser = key_size, value_name = "BITS")]
    key_size: KeySize,
    /// Check an ext4 file system (e2fsck) and make it smaller (resize2fs) if it leaves no room for the header
    #[arg(long)]
    shrink: bool,
    /// Encrypt no more than this many MiB in a second, for those who use the same disk
    #[arg(long, value_name = "MIB/S", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    rate: Option<u64>,
    /// Encrypt this many blocks of 4 KiB between two updates of the header
    #[arg(long, value_name = "BLOCKS", default_value_t = in_place::STEP_BYTES / 4096, hide = true, value_parser = clap::value_parser!(u64).range(1..=4096))]
    step: u64,
    #[command(flatten)]
    separation: SeparationOptions,
    #[command(flatten)]
    answer: AnswerOption,
}

impl Encrypt {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.attended(&self.answer)?;
        let request = Request {
            device: &self.device,
            store: self.store.clone(),
            key_size: self.key_size,
            shrink: self.shrink,
            step_bytes: self.step * 4096,
            bytes_per_second: self.rate.map(|mib| mib << 20),
            separation: self.separation.strictness(),
        };
        let encrypted = with_progress(global.json, |tell| {
            encrypt::encrypt(&config, &request, &mut |done, all| tell(Event::Bytes(done, all)))
        })?;
        output::print(global.json, &encrypted, || {
            let device = self.device.display();
            vec![
                encrypted.key.to_string(),
                format!("  attach it        cryptattach attach {device} NAME"),
                "  grow it          once attached: resize2fs, xfs_growfs or btrfs filesystem resize".to_owned(),
                format!(
                    "  at boot          [volumes.NAME] device = \"UUID={}\"; /dev/mapper/NAME in /etc/fstab",
                    encrypted.volume
                ),
                "  old plaintext    may be left in spare blocks of a flash disk, in snapshots and in backups"
                    .to_owned(),
            ]
        })
    }
}
