//! `cryptattach init`

use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args};
use serde_json::json;

use super::{Global, output};
use crate::{
    base::key::StoreName,
    config::{ConfigError, IdentitySpec},
    keys::{
        seal::{self, OwnerKey, identities},
        store::Directory,
    },
    sys::durable::folder_of,
    verbs::error::Error,
};

/// Set up a key store on this host: its directory, its owner's key pair, its configuration
///
/// Every key is sealed to the owner and to an escrow recipient. The escrow's private key stays offline; it opens the
/// volumes if the owner's key is lost. An existing configuration gets the new store.
#[derive(Args)]
#[command(
    group = ArgGroup::new("recovery").required(true).args(["escrow", "no_escrow"]),
    after_help = "Examples:
  openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out /media/usb/escrow.key
  openssl pkey -in /media/usb/escrow.key -pubout -out /media/usb/escrow.pem
  cryptattach init --store cinder --path /mnt/keys/cinder --escrow /media/usb/escrow.pem"
)]
pub struct Init {
    /// Name of the store, and of the container that its keys are bound to
    #[arg(long)]
    store: StoreName,
    /// The directory for the sealed keys, on another device than the volumes
    #[arg(long, value_name = "DIR")]
    path: PathBuf,
    /// Public key or X.509 certificate (PEM) for recovery; it is copied beside the configuration
    #[arg(long, value_name = "FILE")]
    escrow: Option<PathBuf>,
    /// Use no escrow: if the owner's key is lost, all data is lost
    #[arg(long)]
    no_escrow: bool,
    /// The owner's public key or certificate (PEM) [default: a new P-256 key pair beside the configuration]
    #[arg(long, value_name = "FILE")]
    owner: Option<PathBuf>,
    /// The owner's private key on this host: FILE in PEM, or tpm:FILE
    #[arg(long, value_name = "FILE", requires = "owner")]
    identity: Option<IdentitySpec>,
}

impl Init {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match global.config() {
            Ok(config) if config.stores.contains_key(&self.store) => {
                return Err(Error::StoreExists(self.store.clone()));
            }
            Ok(_) | Err(ConfigError::Missing(_)) => {}
            Err(error) => return Err(error.into()),
        }
        if self.no_escrow {
            tracing::warn!(
                "store '{}' has no escrow: if the owner's private key is lost, every volume of this store is lost",
                self.store
            );
        }
        let folder = folder_of(&global.config);
        fs::create_dir_all(folder).map_err(Error::io(format!("make {}", folder.display())))?;
        let (owner, identity) = match &self.owner {
            Some(owner) => (absolute(owner)?, self.identity.as_ref().map(found).transpose()?),
            None => {
                let (owner, identity) =
                    self.make_owner(&folder.canonicalize().map_err(Error::io("find the folder"))?)?;
                (owner, Some(IdentitySpec::from(identity)))
            }
        };
        // All that sealing will need is read once now, so that a wrong file shows here and not at the first format.
        seal::recipients([&owner].into_iter().chain(&self.escrow))?;
        let escrow = self.escrow.as_deref().map(|escrow| self.copy_escrow(escrow, folder)).transpose()?;
        Directory::make(&self.path)?;
        let store = absolute(&self.path)?;
        append(&global.config, &self.section(&store, &owner, escrow.as_deref(), identity.as_ref()))?;
        global.config()?;

        let json = json!({"store": self.store, "path": store, "owner": owner, "identity": identity.as_ref().map(ToString::to_string), "escrow": escrow});
        output::print(global.json, &json, || {
            let mut lines = vec![
                format!("store '{}' in {}", self.store, store.display()),
                format!("  sealed to the owner   {}", owner.display()),
                match &escrow {
                    Some(escrow) => format!("  and to the escrow     {}", escrow.display()),
                    None => "  NOT sealed to any escrow".to_owned(),
                },
            ];
            lines.extend(identity.iter().map(|key| format!("  opened by             {key}")));
            lines.push(format!("  configured in         {}", global.config.display()));
            lines.join("\n")
        })
    }

    /// A copy beside the configuration: the original may be on the stick that goes into the safe.
    fn copy_escrow(&self, original: &Path, folder: &Path) -> Result<PathBuf, Error> {
        let pem = fs::read(original).map_err(Error::io(format!("read {}", original.display())))?;
        let copy = folder.join(format!("{}.escrow.pem", self.store));
        write_new(&copy, 0o644, &pem)?;
        absolute(&copy)
    }

    fn make_owner(&self, folder: &Path) -> Result<(PathBuf, PathBuf), Error> {
        let private = folder.join(format!("{}.owner.key", self.store));
        let public = folder.join(format!("{}.owner.pem", self.store));
        let key = OwnerKey::generate()?;
        write_new(&private, 0o600, key.private_pem()?.expose())?;
        write_new(&public, 0o644, &key.public_pem()?)?;
        Ok((public, private))
    }

    fn section(&self, store: &Path, owner: &Path, escrow: Option<&Path>, identity: Option<&IdentitySpec>) -> String {
        let text = |path: &Path| toml::Value::String(path.to_string_lossy().into_owned()).to_string();
        let escrow = match escrow {
            Some(escrow) => format!("escrow = {}", text(escrow)),
            None => "no_escrow = true".to_owned(),
        };
        let identities = identity.map(quoted).unwrap_or_default();
        format!(
            "\n[stores.{}]\ntype = \"directory\"\npath = {}\nowner = {}\n{escrow}\nidentities = [{identities}]\n",
            self.store,
            text(store),
            text(owner),
        )
    }
}

/// An identity whose file is there and is of its kind, with its whole path.
pub fn found(identity: &IdentitySpec) -> Result<IdentitySpec, Error> {
    identities::kind(identity).check()?;
    Ok(IdentitySpec::of(&identity.scheme, absolute(&identity.path)?))
}

/// An identity as the configuration writes it.
pub fn quoted(identity: &IdentitySpec) -> String {
    toml::Value::String(identity.to_string()).to_string()
}

fn absolute(path: &Path) -> Result<PathBuf, Error> {
    path.canonicalize().map_err(Error::io(format!("find {}", path.display())))
}

fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> Result<(), Error> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => Error::Exists(path.to_owned()),
            _ => Error::io(format!("create {}", path.display()))(error),
        })?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(format!("write {}", path.display())))
}

pub fn append(config: &Path, section: &str) -> Result<(), Error> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(config)
        .and_then(|mut file| file.write_all(section.as_bytes()).and_then(|()| file.sync_all()))
        .map_err(Error::io(format!("write {}", config.display())))
}
