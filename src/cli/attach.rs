//! `cryptattach attach`

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use serde_json::json;

use super::{AnswerOption, Global, SeparationOptions, output, words};
use crate::{
    base::{
        key::{KeyReference, KeySize},
        mapping_name::MappingName,
        plain_hash::PlainHash,
    },
    config::{Config, VolumeConfig},
    verbs::{
        attach::{self, Options, Request},
        error::Error,
        explain,
        rotate::standing,
    },
    volumes::{
        backend::{BackendKind, ExportKind, ThisHost},
        header::{CIPHER, PlainParameters, SectorSize},
    },
};

/// Attach a volume: fetch and open its key, then map it
///
/// Prints the path of the plaintext device. Succeeds, and says so, if the volume is already attached under the same
/// name. Changes nothing on the device.
#[derive(Args)]
#[command(group = ArgGroup::new("what").required(true).args(["device", "volume"]))]
#[command(after_help = "Examples:
  cryptattach attach /dev/vdb                     map it as luks-UUID; the LUKS2 token names the key
  cryptattach attach /dev/vdb data --read-only
  cryptattach attach /dev/vdb data --key cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de
  cryptattach attach /dev/vdb data --header /boot/data.header
  cryptattach attach --volume data                use [volumes.data] of the configuration
  cryptattach attach volume.img data --backend userspace
  nbdcopy \"$(cryptattach attach volume.img data --export nbd)\" plain.img
  cryptattach attach /dev/vdc old --plain --key-size 512 --key cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de")]
pub struct Attach {
    /// The encrypted block device or file
    #[arg(value_parser = words::device())]
    device: Option<PathBuf>,
    /// The mapping's name [default: luks-UUID]
    #[arg(value_parser = words::mapping())]
    name: Option<MappingName>,
    /// Name of a volume in the configuration ([volumes.NAME])
    #[arg(long, value_name = "NAME", conflicts_with_all = ["device", "name", "key", "header", "read_only", "allow_discards", "plain"])]
    volume: Option<MappingName>,
    /// The key (STORE/KEY-ID) [default: the one in the LUKS2 token]
    #[arg(long, value_name = "REFERENCE")]
    key: Option<KeyReference>,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// Backend that maps the volume [default: dm-crypt; userspace for a loop device or file if there is no
    /// device-mapper]
    #[arg(long, value_enum)]
    backend: Option<BackendKind>,
    /// How the userspace backend exports the plaintext [default: ublk if its driver is loaded, else fuse]
    #[arg(long, value_enum, value_name = "WAY")]
    export: Option<ExportKind>,
    /// Attach the volume read-only
    #[arg(long)]
    read_only: bool,
    /// Pass discards (TRIM) to the device; this reveals which sectors are in use
    #[arg(long)]
    allow_discards: bool,
    /// dm-crypt: decrypt without a work queue
    #[arg(long)]
    no_read_workqueue: bool,
    /// dm-crypt: encrypt without a work queue
    #[arg(long)]
    no_write_workqueue: bool,
    /// Have systemd go on with an unfinished rotation of the volume's key, once it is attached
    #[arg(long, conflicts_with = "read_only")]
    go_on: bool,
    #[command(flatten)]
    plain: Plain,
    #[command(flatten)]
    separation: SeparationOptions,
    #[command(flatten)]
    answer: AnswerOption,
}

/// How a volume without a header looks; shared with `key import`.
#[derive(Args)]
#[command(next_help_heading = "Plain dm-crypt")]
pub struct Plain {
    /// The volume is plain dm-crypt and has no header
    #[arg(long, conflicts_with = "header")]
    plain: bool,
    /// Cipher of the volume
    #[arg(long, requires = "plain", default_value = CIPHER, value_parser = [CIPHER])]
    cipher: String,
    /// Size of the volume key in bits (256 or 512)
    #[arg(long, requires = "plain", default_value = "512", value_parser = key_size, value_name = "BITS")]
    key_size: KeySize,
    /// Encryption sector size in bytes (512, 1024, 2048 or 4096)
    #[arg(long, requires = "plain", default_value = "512", value_parser = sector_size, value_name = "BYTES")]
    sector_size: SectorSize,
    /// Start of the data, in units of 512 bytes
    #[arg(long, requires = "plain", default_value_t = 0, value_name = "SECTORS")]
    offset: u64,
    /// Offset that is added to the sector number for the IV, in units of 512 bytes
    #[arg(long, requires = "plain", default_value_t = 0, value_name = "SECTORS")]
    skip: u64,
    /// Hash that derives the volume key, if the key in the store is a passphrase
    #[arg(long, requires = "plain", value_enum, default_value_t, value_name = "HASH")]
    hash: PlainHash,
}

impl Plain {
    pub fn parameters(&self) -> Option<PlainParameters> {
        self.plain.then_some(PlainParameters {
            key_size: self.key_size,
            sector_size: self.sector_size,
            offset_sectors: self.offset,
            skip_sectors: self.skip,
            hash: self.hash,
        })
    }
}

pub fn key_size(text: &str) -> Result<KeySize, String> {
    text.parse().ok().and_then(KeySize::from_bits).ok_or_else(|| "256 or 512 bits".to_owned())
}

pub fn sector_size(text: &str) -> Result<SectorSize, String> {
    text.parse().ok().and_then(SectorSize::from_bytes).ok_or_else(|| "512, 1024, 2048 or 4096 bytes".to_owned())
}

/// What is to be attached: as the words say, or as the configuration does.
struct Wanted {
    device: PathBuf,
    name: Option<MappingName>,
    key: Option<KeyReference>,
    header: Option<PathBuf>,
    read_only: bool,
    allow_discards: bool,
}

impl Attach {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let wanted = self.wanted(global);
        let device = wanted.as_ref().map_or_else(|_| self.device.clone(), |(_, wanted)| Some(wanted.device.clone()));
        let mapping = wanted.and_then(|(config, wanted)| {
            let mapping = attach::attach(&config, &ThisHost, self.request(&wanted))?;
            if self.go_on && !wanted.read_only {
                standing::go_on(&config, &wanted.device);
            }
            Ok(mapping)
        });
        explain::note("attach", device.as_deref(), self.volume.as_ref().or(self.name.as_ref()), mapping.as_ref());
        let mapping = mapping?;
        if mapping.already_active {
            let device = device.unwrap_or_default();
            output::say(format!("{} is attached already as '{}'", device.display(), mapping.name));
        }
        let json = json!({
            "name": mapping.name,
            "device": mapping.device,
            "uri": mapping.uri,
            "backend": mapping.backend,
            "already_attached": mapping.already_active,
        });
        output::print(global.json, &json, || {
            mapping.uri.clone().unwrap_or_else(|| mapping.device.display().to_string())
        })
    }

    fn wanted(&self, global: &Global) -> Result<(Config, Wanted), Error> {
        let config = global.attended(&self.answer)?;
        let wanted = match (&self.volume, &self.device) {
            (Some(name), _) => {
                let VolumeConfig { device, key, header, read_only, allow_discards, .. } = config.volume(name)?.clone();
                Wanted {
                    device: device.path().to_owned(),
                    name: Some(name.clone()),
                    key,
                    header: header.map(PathBuf::from),
                    read_only,
                    allow_discards,
                }
            }
            (None, Some(device)) => Wanted {
                device: device.clone(),
                name: self.name.clone(),
                key: self.key.clone(),
                header: self.header.clone(),
                read_only: self.read_only,
                allow_discards: self.allow_discards,
            },
            (None, None) => return Err(Error::Usage("name a device, or a volume with --volume".to_owned())),
        };
        Ok((config, wanted))
    }

    fn request<'a>(&self, wanted: &'a Wanted) -> Request<'a> {
        Request {
            device: &wanted.device,
            name: wanted.name.clone(),
            key: wanted.key.clone(),
            header: wanted.header.as_deref(),
            plain: self.plain.parameters(),
            backend: self.backend,
            options: Options {
                read_only: wanted.read_only,
                export: self.export,
                allow_discards: wanted.allow_discards,
                no_read_workqueue: self.no_read_workqueue,
                no_write_workqueue: self.no_write_workqueue,
            },
            separation: self.separation.strictness(),
            tenant: None,
            target: None,
            volume_id: None,
            fills: false,
        }
    }
}
