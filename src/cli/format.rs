//! `cryptattach format`

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{
    AnswerOption, Global, SeparationOptions,
    attach::{key_size, sector_size},
    output, words,
};
use crate::{
    base::key::{KeySize, StoreName},
    verbs::{
        error::Error,
        format::{self, Request},
    },
    volumes::header::SectorSize,
};

/// Create a new volume: seal and store a new key, then write a LUKS2 header
///
/// Prints the key's reference (STORE/KEY-ID). The device must be blank. The key is stored, read back and opened before
/// the header is written.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach format /dev/vdb
  cryptattach format /dev/vdb --store cinder --keyslot     plain cryptsetup and systemd can open it as well
  cryptattach format /dev/vdb --header /boot/data.header   only ciphertext on the device
  truncate -s 1G volume.img && cryptattach format volume.img")]
pub struct Format {
    /// The block device or file
    #[arg(value_parser = words::device())]
    device: PathBuf,
    /// The store for the key [default: default_store of the configuration, or its only store]
    #[arg(long)]
    store: Option<StoreName>,
    /// Create one keyslot with a random passphrase that is sealed with the key (see 'key passphrase')
    #[arg(long)]
    keyslot: bool,
    /// Put the header into this file instead of the device
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// Size of the volume key in bits (256 or 512)
    #[arg(long, default_value = "512", value_parser = key_size, value_name = "BITS")]
    key_size: KeySize,
    /// Encryption sector size in bytes (512, 1024, 2048 or 4096) [default: 4096 where the device's size allows]
    #[arg(long, value_parser = sector_size, value_name = "BYTES")]
    sector_size: Option<SectorSize>,
    /// Overwrite what is on the device
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    separation: SeparationOptions,
    #[command(flatten)]
    answer: AnswerOption,
}

impl Format {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.attended(&self.answer)?;
        let request = Request {
            device: &self.device,
            store: self.store.clone(),
            keyslot: self.keyslot,
            header: self.header.as_deref(),
            key_size: self.key_size,
            sector_size: self.sector_size,
            force: self.force,
            separation: self.separation.strictness(),
        };
        let formatted = format::format(&config, &request)?;
        let json = json!({
            "key": formatted.reference,
            "volume": formatted.volume.uuid(),
            // json! panics at a path that is no UTF-8, and the volume is made.
            "device": formatted.volume.device.path.display().to_string(),
            "sector_size_bytes": formatted.volume.geometry.sector_size.bytes(),
            "size_bytes": formatted.volume.geometry.size_bytes,
        });
        output::print(global.json, &json, || formatted.reference.to_string())
    }
}
