//! `cryptattach key ...`

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args, Subcommand};
use nix::sys::socket::{UnixAddr, getpeername};
use serde_json::{Value, json};

use super::{
    AnswerOption, Global, SeparationOptions, attach::Plain, erase::Erase, r#move::Move, output, rotate::Rotate, words,
};
use crate::{
    base::{
        chain::chain,
        clock::date,
        key::{KeyReference, SecretBytes, StoreName},
        mapping_name::MappingName,
    },
    config::{Config, DeviceSpec, VolumeConfig, crypttab},
    keys::store::{self, Released, Stored},
    unlock::{
        self,
        case::no_reference,
        container::{Container, OpenedBy, Opener, Use},
    },
    verbs::{
        clevis::{self, Exported},
        detach,
        error::Error,
        explain,
        import::{self, Request},
        keys, passphrase,
    },
    volumes::{backend::ThisHost, header},
};

const PASSPHRASE: &str = "the passphrase";

/// Manage the keys in a store
#[derive(Subcommand)]
pub enum Key {
    List(List),
    Show(Show),
    Delete(Delete),
    Import(Import),
    Export(Export),
    Passphrase(Passphrase),
    Rotate(Rotate),
    Move(Move),
    Erase(Erase),
    #[command(hide = true)]
    Serve(Serve),
}

/// List the keys of a store
#[derive(Args)]
pub struct List {
    /// The store [default: default_store of the configuration, or its only store]
    #[arg(long)]
    store: Option<StoreName>,
}

/// Show where a key is, its volume and age, and by name who opens it, without opening it
///
/// Says of each opener since when at least, and by which proof a host was admitted. All of that is what the store says:
/// 'container rehearse' and 'test' prove it.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach key show /dev/vdb
  cryptattach key show data                   a mapping, or a volume of the configuration
  cryptattach key show cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de")]
pub struct Show {
    /// The key (STORE/KEY-ID), or the volume whose header names it
    #[arg(value_name = "KEY|DEVICE|NAME")]
    about: String,
}

/// Delete a key permanently: nobody can read its volume's data again
#[derive(Args)]
pub struct Delete {
    /// The key (STORE/KEY-ID)
    key: KeyReference,
    /// Confirm the deletion
    #[arg(long)]
    yes: bool,
    /// Delete it although its volume is attached here, a rotation needs it, or it has consumers (services that have said that
    /// they need it)
    #[arg(long, requires = "yes")]
    force: bool,
}

/// Import the key of a volume that another program made; only --token changes the volume
///
/// Prints the key's reference (STORE/KEY-ID), for attach --key. Without --key-file, the terminal asks for a passphrase,
/// or a LUKS2 token of clevis has it: its Tang servers are asked, and clevis itself opens its other pins. clevis goes on
/// to open the volume.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach key import /dev/vdb --key-file passphrase.txt
  printf %s \"$PASSPHRASE\" | cryptattach key import /dev/vdb --key-file -
  cryptattach key import /dev/vda3 --token --key-file passphrase.txt     for the root of an installed system
  cryptattach key import /dev/vdb --token                                what clevis opens
  cryptattach key import /dev/vdb --print-policy                         how clevis opens it, as our configuration
  cryptattach key import /dev/vdc --plain --key-size 256 --key-file volume.key")]
pub struct Import {
    /// The encrypted block device or file
    #[arg(value_parser = words::device())]
    device: PathBuf,
    /// File with a keyslot's passphrase, with or without a newline at its end (LUKS), or with the volume key (plain); '-' is
    /// standard input [default: what the volume's clevis token has, else what the terminal is told]
    #[arg(long, value_name = "FILE", required_if_eq("plain", "true"))]
    key_file: Option<PathBuf>,
    /// Import nothing; open the clevis token, and print its policy as lines of our configuration
    #[arg(long, conflicts_with_all = ["key_file", "token", "plain"])]
    print_policy: bool,
    /// The store for the key [default: default_store of the configuration, or its only store]
    #[arg(long)]
    store: Option<StoreName>,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    /// LUKS2: write the key's reference into the header, so that attach and boot find it
    #[arg(long, conflicts_with = "plain")]
    token: bool,
    #[command(flatten)]
    plain: Plain,
    #[command(flatten)]
    separation: SeparationOptions,
    #[command(flatten)]
    answer: AnswerOption,
}

/// Let clevis open a volume, too, as the policy of its container says
///
/// Adds a keyslot and a LUKS2 token of clevis to the header; 'clevis luks unbind' removes them. clevis can say the
/// policy's Tang servers and thresholds of them. Other leaves of an any(...) are left out.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach key export /dev/vdb --clevis
  cryptattach key export /dev/vdb --clevis --key-file passphrase.txt     if its key is in no store")]
pub struct Export {
    /// The encrypted block device or file
    #[arg(value_parser = words::device())]
    device: PathBuf,
    /// A token for clevis
    #[arg(long, required = true)]
    clevis: bool,
    /// File with a keyslot's passphrase, with or without a newline at its end; '-' is standard input [default: the volume's key
    /// is used]
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// With --key-file: the store whose policy counts [default: default_store of the configuration, or its only store]
    #[arg(long, requires = "key_file")]
    store: Option<StoreName>,
    /// The key (STORE/KEY-ID) [default: the one in the LUKS2 token]
    #[arg(long, value_name = "REFERENCE", conflicts_with = "key_file")]
    key: Option<KeyReference>,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE")]
    header: Option<PathBuf>,
    #[command(flatten)]
    separation: SeparationOptions,
}

/// Write the passphrase of a volume formatted with --keyslot to a pipe or file
///
/// Writes 64 hexadecimal digits without a newline, as cryptsetup's --key-file=- expects. With --for, the volume's
/// header is checked first. The passphrase is then written only if the key was made for this volume, and key and data
/// are separate.
#[derive(Args)]
#[command(group = ArgGroup::new("what").required(true).multiple(true).args(["key", "device"]))]
#[command(after_help = "Examples:
  cryptattach key passphrase --for /dev/vdb | cryptsetup open --key-file=- /dev/vdb data
  cryptattach key passphrase cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de >/run/passphrase")]
pub struct Passphrase {
    /// The key (STORE/KEY-ID) [default with --for: the one in the LUKS2 token]
    key: Option<KeyReference>,
    /// The volume that the passphrase opens
    #[arg(long = "for", value_name = "DEVICE", value_parser = words::device())]
    device: Option<PathBuf>,
    /// The passphrase that the volume's clevis token has; no key of ours is used
    #[arg(long, requires = "device", conflicts_with = "key")]
    clevis: bool,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE", requires = "device")]
    header: Option<PathBuf>,
    #[command(flatten)]
    answer: AnswerOption,
}

/// Answer systemd-cryptsetup on a socket (standard input) with the passphrase of the volume that it opens
#[derive(Args)]
pub struct Serve {}

impl Key {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = match self {
            Self::Passphrase(passphrase) => global.attended(&passphrase.answer)?,
            Self::Import(import) => global.attended(&import.answer)?,
            Self::Rotate(rotate) => global.attended(&rotate.answer)?,
            Self::Move(moving) => global.attended(&moving.answer)?,
            Self::Erase(erase) => global.attended(&erase.answer)?,
            Self::List(_) | Self::Show(_) | Self::Delete(_) | Self::Export(_) | Self::Serve(_) => global.config()?,
        };
        match self {
            Self::List(list) => list.run(&config, global.json),
            Self::Show(show) => show.run(&config, global.json),
            Self::Delete(delete) => delete.run(&config, global.json),
            Self::Import(import) => import.run(&config, global.json),
            Self::Export(export) => export.run(&config, global.json),
            Self::Passphrase(passphrase) => passphrase.run(&config),
            Self::Rotate(rotate) => rotate.run(&config, global.json),
            Self::Move(moving) => moving.run(&config, global.json),
            Self::Erase(erase) => erase.run(&config, global.json),
            Self::Serve(serve) => serve.run(&config),
        }
    }
}

impl List {
    fn run(&self, config: &Config, json: bool) -> Result<(), Error> {
        let name = config.store_or_default(self.store.as_ref())?;
        let keys = Container::open(config, &name, None, Use::Keys)?.store().list()?;
        let references: Vec<_> =
            keys.into_iter().map(|key| KeyReference { store: name.clone(), key }.to_string()).collect();
        if references.is_empty() && !json {
            return Ok(());
        }
        output::print(json, &references, || references.clone())
    }
}

impl Show {
    fn run(&self, config: &Config, json: bool) -> Result<(), Error> {
        let key = &self.key(config)?;
        let container = Container::open(config, &key.store, None, Use::Keys)?;
        let place = store::kind(config.store(&key.store)?)?.describe();
        let sealed = match container.store().get(&key.key)? {
            Stored::Sealed(sealed) => sealed,
            Stored::Released(released) => return show_released(key, &place, &released, json),
        };
        let context = sealed
            .claimed_context()
            .map_err(|source| unlock::Error::KeyRefused { reference: key.clone(), source: source.into() })?;
        let recipients: Vec<Value> = sealed
            .recipients
            .iter()
            .map(|recipient| json!({"alg": recipient.header.get("alg"), "kid": recipient.header.get("kid")}))
            .collect();
        // A key that nobody vouches for, or whose container key is gone, is shown all the same.
        let by = container.opened_by_key(&key.key, &sealed);
        let opened_by = by.as_ref().ok();
        let value = json!({
            "key": key, "place": place, "claims": context, "recipients": recipients, "opened_by": opened_by,
        });
        output::print(json, &value, || {
            let volume = context.volume.map_or_else(|| "plain dm-crypt".to_owned(), |uuid| format!("LUKS {uuid}"));
            let mut lines = vec![
                key.to_string(),
                format!("  store        {place}"),
                format!("  volume       {volume}"),
                format!("  container    {}", context.container),
                format!("  created      {}", date(context.created)),
                format!("  generation   {}", context.generation),
            ];
            lines.extend(context.project.iter().map(|project| format!("  project      {project}")));
            let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
            let recipients = recipients.iter();
            lines.extend(recipients.map(|r| format!("  sealed to    {} ({})", text(&r["kid"]), text(&r["alg"]))));
            match &by {
                Ok(by) => lines.extend(openers(by)),
                Err(error) => lines.push(format!("  opened by    not known: {}", chain(error))),
            }
            lines
        })
    }

    /// The key itself, or that of a volume: by its device, its name in the configuration, or its mapping.
    fn key(&self, config: &Config) -> Result<KeyReference, Error> {
        if let Ok(key) = self.about.parse() {
            return Ok(key);
        }
        let given = DeviceSpec::path_of(&self.about).unwrap_or_else(|_| PathBuf::from(&self.about));
        let (device, header) = match device_of(config, &given) {
            (device, header) if device != given || device.exists() => (device, header),
            _ => (detach::status(&ThisHost, &detach::named(&ThisHost, &self.about)?)?.source, None),
        };
        let volume = header::probe(&device, header.as_deref())?;
        volume.reference().cloned().ok_or_else(|| no_reference(&volume).into())
    }
}

/// Who opens what is sealed under a container key, as a table.
pub(super) fn openers(by: &OpenedBy) -> Vec<String> {
    fn rows(openers: &[Opener], depth: usize, rows_of: &mut Vec<[String; 5]>) {
        for Opener { name, kid, alg, since, proof, of } in openers {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let since = since.map(date).unwrap_or_default();
            rows_of.push([format!("{}{name}", "  ".repeat(depth)), since, text(kid), text(alg), text(proof)]);
            rows(of, depth + 1, rows_of);
        }
    }
    let mut all = Vec::new();
    rows(&by.openers, 0, &mut all);
    let table = output::table(["NAME", "SINCE (AT LEAST)", "KEY ID", "ALGORITHM", "PROOF"], all);
    let mut lines =
        vec![format!("whoever opens the container key {} (by its own word: nothing was opened)", by.container_key)];
    lines.extend(table.into_iter().map(|line| format!("  {line}")));
    lines
}

fn show_released(key: &KeyReference, place: &str, released: &Released, json: bool) -> Result<(), Error> {
    let Released { object, used_for } = released;
    let value = json!({"key": key, "place": place, "unsealed": object.facts, "used_for": used_for});
    output::print(json, &value, || {
        let facts = &object.facts;
        let mut lines = vec![
            key.to_string(),
            format!("  store        {place}"),
            "  NOT sealed   the store itself can read it".to_owned(),
            format!("  type         {}", facts.kind),
        ];
        lines.extend(facts.name.iter().map(|name| format!("  name         {name}")));
        lines.extend(facts.created.map(|created| format!("  created      {}", date(created))));
        lines.extend(used_for.iter().map(|volume| format!("  used for     {volume}")));
        lines
    })
}

impl Delete {
    fn run(&self, config: &Config, json: bool) -> Result<(), Error> {
        let container = Container::open(config, &self.key.store, None, Use::Keys)?;
        if !self.yes {
            container.store().get(&self.key.key)?;
            return Err(Error::Usage(format!(
                "deleting {} makes its volume unreadable for ever; confirm with --yes",
                self.key
            )));
        }
        if !self.force {
            keys::require_detached(&ThisHost, &container, &self.key)?;
        }
        keys::delete(config, &container, &self.key, self.force)?;
        output::print(json, &json!({"key": self.key, "deleted": true}), || {
            format!("deleted the key {}: nobody can read its volume's data again", self.key)
        })
    }
}

impl Import {
    fn run(&self, config: &Config, json: bool) -> Result<(), Error> {
        if self.print_policy {
            return self.print_policy(config, json);
        }
        let request = Request {
            device: &self.device,
            store: self.store.clone(),
            header: self.header.as_deref(),
            plain: self.plain.parameters(),
            secret: self.key_file.as_ref().map(|file| read_secret("the key file", file)).transpose()?,
            token: self.token,
            separation: self.separation.strictness(),
            announce: &|_| Ok(()),
        };
        let reference = import::import(config, request)?;
        output::print(json, &json!({"key": reference}), || reference.to_string())
    }
}

impl Import {
    fn print_policy(&self, config: &Config, json: bool) -> Result<(), Error> {
        let proposal = clevis::proposal(config, &self.device, self.header.as_deref())?;
        let store = config.store_or_default(self.store.as_ref());
        let store = store.as_ref().map_or("STORE", StoreName::as_str);
        output::print(json, &proposal, || {
            let mut lines = proposal.leaves.clone();
            if !lines.is_empty() {
                lines.push("# compare each thumbprint with what 'tang-show-keys' prints on its server".to_owned());
            }
            lines.push(format!("# then: cryptattach container policy {store} '{}'", proposal.opens));
            lines
        })
    }
}

impl Export {
    fn run(&self, config: &Config, json: bool) -> Result<(), Error> {
        let secret = self.key_file.as_ref().map(|file| read_secret("the key file", file)).transpose()?;
        let request = clevis::Export {
            device: &self.device,
            header: self.header.as_deref(),
            key: self.key.clone(),
            secret: secret.map(|secret| (secret, self.store.clone())),
            separation: self.separation.strictness(),
        };
        let exported = clevis::export(config, request)?;
        if !exported.without.is_empty() {
            let without: Vec<_> = exported.without.iter().map(ToString::to_string).collect();
            output::say(format!("left out, for clevis has no pin for it: {}", without.join(", ")));
        }
        output::print(json, &exported, || {
            let Exported { keyslot, opens, .. } = &exported;
            format!("clevis opens the keyslot {keyslot} of {} with {opens}", self.device.display())
        })
    }
}

impl Passphrase {
    fn run(&self, config: &Config) -> Result<(), Error> {
        let out = io::stdout().lock();
        if out.is_terminal() {
            return Err(Error::Usage("a passphrase is not written to a terminal; use a pipe".to_owned()));
        }
        let passphrase = match (&self.device, &self.key) {
            (Some(device), _) if self.clevis => clevis::passphrase(config, device, self.header.as_deref())?,
            (Some(device), key) => released(config, device, self.header.as_deref(), key.clone(), None)?,
            (None, Some(key)) => passphrase::of_key(config, key)?,
            (None, None) => return Err(Error::Usage("name a key, or a volume with --for".to_owned())),
        };
        write(&out, &passphrase, PASSPHRASE)
    }
}

/// A path, or the device of a volume that the configuration names; and the path of its detached header.
pub(super) fn device_of(config: &Config, given: &Path) -> (PathBuf, Option<PathBuf>) {
    let name = given.to_str().filter(|_| !given.exists()).and_then(|name| name.parse::<MappingName>().ok());
    match name.and_then(|name| config.volume(&name).ok()) {
        Some(volume) => (volume.device.path().to_owned(), volume.header.as_deref().map(Path::to_owned)),
        None => (given.to_owned(), None),
    }
}

impl Serve {
    fn run(&self, config: &Config) -> Result<(), Error> {
        let connection = io::stdin();
        let name = asking_volume(&connection)?;
        let passphrase = match name.parse::<MappingName>().ok().and_then(|name| config.volume(&name).ok()) {
            Some(VolumeConfig { device, header, key, .. }) => {
                released(config, device.path(), header.as_deref(), key.clone(), name.parse().ok())?
            }
            None => {
                let entries = crypttab::read(Path::new(crypttab::PATH)).map_err(Error::io("read /etc/crypttab"))?;
                let entry = entries.into_iter().find(|entry| entry.name == name);
                let entry = entry.ok_or_else(|| Error::UnknownToCrypttab(name.clone()))?;
                released(config, entry.device.path(), entry.header(), None, name.parse().ok())?
            }
        };
        write(&connection, &passphrase, PASSPHRASE)
    }
}

/// The volume that systemd-cryptsetup wants to open: it binds its end to `@RANDOM/cryptsetup/VOLUME` (crypttab(5), "AF_UNIX
/// key files").
fn asking_volume(connection: &impl AsFd) -> Result<String, Error> {
    let peer = getpeername::<UnixAddr>(connection.as_fd().as_raw_fd());
    let peer = peer.map_err(|errno| Error::io("find out who asks on standard input")(errno.into()))?;
    let name = peer.as_abstract().and_then(|name| std::str::from_utf8(name).ok());
    match name.map(|name| name.splitn(3, '/').collect::<Vec<_>>()).as_deref() {
        Some([_, "cryptsetup", volume]) => Ok((*volume).to_owned()),
        _ => Err(Error::Usage(
            "only systemd-cryptsetup gets an answer: the other end of the socket does not name a volume".to_owned(),
        )),
    }
}

/// The passphrase for a volume, after all that attach checks.
fn released(
    config: &Config,
    device: &Path,
    header: Option<&Path>,
    key: Option<KeyReference>,
    name: Option<MappingName>,
) -> Result<SecretBytes, Error> {
    let passphrase = passphrase::release(config, passphrase::Request { device, header, key });
    explain::note("release the passphrase of", Some(device), name.as_ref(), passphrase.as_ref());
    passphrase
}

/// Past any buffer, which would keep a copy.
pub fn write(out: &impl AsFd, secret: &SecretBytes, what: &str) -> Result<(), Error> {
    let action = || format!("write {what}");
    let mut out = File::from(nix::unistd::dup(out).map_err(|e| Error::io(action())(e.into()))?);
    out.write_all(secret.expose()).map_err(Error::io(action()))
}

/// The bytes of a file, at most 8 MiB as cryptsetup allows, straight into secret memory; `what` it is, in words.
pub fn read_secret(what: &str, path: &Path) -> Result<SecretBytes, Error> {
    const MOST: usize = 8 << 20;
    let action = || format!("read {what} {}", path.display());
    let mut file = if path == Path::new("-") {
        File::from(nix::unistd::dup(io::stdin()).map_err(|e| Error::io(action())(e.into()))?)
    } else {
        File::open(path).map_err(Error::io(action()))?
    };
    let (mut secret, mut len) = (SecretBytes::zeroed(4096)?, 0);
    loop {
        match file.read(&mut secret.expose_mut()[len..]).map_err(Error::io(action()))? {
            0 if len < secret.len() => break,
            read => len += read,
        }
        if len == secret.len() {
            if len >= MOST {
                return Err(Error::Usage(format!("{what} {} has more than {MOST} bytes", path.display())));
            }
            let mut larger = SecretBytes::zeroed(len * 2)?;
            larger.expose_mut()[..len].copy_from_slice(secret.expose());
            secret = larger;
        }
    }
    secret.truncate(len);
    Ok(secret)
}
