//! The host's verbs: `enrol`, `answer`.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use super::{Global, record};
use crate::{
    base::{
        hex,
        key::{HostName, SecretBytes},
    },
    cli::output,
    config::{Config, TpmConfig},
    keys::tpm::{self, Tpm},
    sys::durable::{Folder, folder_of},
    unlock::enrol::{self, Challenge, Document, Enrolled},
    verbs::error::Error,
};

/// Create this host's identity key in its TPM, and a bundle that proves how it was made
///
/// The key opens only in boot states of the site's policy ([tpm] in the configuration, 'cryptattach policy show'). The
/// bundle contains no secret. Bring it to the administrator ('host challenge').
#[derive(Args)]
pub struct Enrol {
    /// This host's name [default: 'host' in [lockbox], or the system's host name]
    #[arg(long)]
    name: Option<HostName>,
    /// Protect the key with a PIN, which is asked for now ('pin' in [tpm] names a file with it)
    #[arg(long)]
    pin: bool,
    /// Replace an existing key; the old one is kept as FILE.before (FILE.before.2, ...)
    #[arg(long)]
    replace: bool,
    /// New file for the bundle
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

impl Enrol {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let host = self.name(&config)?;
        let key_file = &config.tpm.identity;
        self.check_free(key_file)?;
        let tpm = Tpm::open(&config.tpm)?;
        let with_pin = self.pin || config.tpm.pin.is_some();
        let policy = tpm.policy_here(&config.tpm, with_pin)?;
        let pin = with_pin.then(|| new_pin(&config.tpm)).transpose()?;
        let enrolled = enrol::enrol(&tpm, &host, &policy, pin.as_ref())?;
        // First what is likely to fail: no challenge to this bundle is answered before the other two are written.
        enrolled.bundle.write(&self.output)?;
        write_key(key_file, enrolled.file.to_pem()?.as_bytes())?;
        enrolled.keep(&config.state)?;
        record(&config, "host enrol", &host, None);
        self.show(&host, key_file, &enrolled, global.json)
    }

    fn name(&self, config: &Config) -> Result<HostName, Error> {
        let configured = self.name.clone().or_else(|| config.lockbox.as_ref().map(|lockbox| lockbox.host.clone()));
        if let Some(name) = configured {
            return Ok(name);
        }
        let system = nix::sys::utsname::uname().map_err(io::Error::from).map_err(Error::io("ask for the host name"))?;
        let name = system.nodename().to_string_lossy().to_lowercase();
        name.parse().map_err(|error| Error::Usage(format!("name this host with --name: {error}")))
    }

    /// What is in the way is said before a key is made.
    fn check_free(&self, key_file: &Path) -> Result<(), Error> {
        let in_the_way =
            [key_file].into_iter().filter(|_| !self.replace).chain([&*self.output]).find(|path| path.exists());
        in_the_way.map_or(Ok(()), |path| Err(Error::Exists(path.to_owned())))
    }

    fn show(&self, host: &HostName, key_file: &Path, enrolled: &Enrolled, as_json: bool) -> Result<(), Error> {
        let keys = || enrolled.endorsement_keys.iter();
        let value = json!({
            "host": host,
            "bundle": self.output,
            "key": key_file,
            "storage_root": enrolled.file.storage_root,
            "endorsement_keys": keys().map(|(fingerprint, certified)| {
                json!({"fingerprint": hex::encode(fingerprint), "certificate": certified})
            }).collect::<Vec<_>>(),
        });
        output::print(as_json, &value, || {
            let mut lines = vec![
                format!("bundle of '{host}'      {}", self.output.display()),
                format!("  key               {}", key_file.display()),
                format!("  storage root key  {}", enrolled.file.storage_root),
            ];
            lines.extend(keys().map(|(fingerprint, certified)| {
                let certificate = if *certified { "with a certificate" } else { "without a certificate" };
                format!("  endorsement key   {} ({certificate})", hex::encode(fingerprint))
            }));
            lines.push("next: bring it to the administrator ('cryptattach host challenge')".to_owned());
            lines
        })
    }
}

/// From the file that the configuration names, or asked for twice: a slip would make a key that nobody can use.
fn new_pin(config: &TpmConfig) -> Result<SecretBytes, Error> {
    if config.pin.is_some() {
        return Ok(tpm::pin(config)?);
    }
    let (pin, again) = (tpm::ask("New PIN of this host's key: ")?, tpm::ask("Again: ")?);
    if pin == again { Ok(pin) } else { Err(Error::Usage("the two PINs differ".to_owned())) }
}

/// Writes the key's file, for this user alone; one that is there is kept beside it, with those that were before: which of them
/// the administrator has admitted, and so opens this host's lockbox key, is not known here.
fn write_key(path: &Path, pem: &[u8]) -> Result<(), Error> {
    let write = || {
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
        let folder = Folder::make(folder_of(path))?;
        match fs::read(path) {
            Ok(before) => keep_before(&folder, name, &before)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        folder.replace(name, pem)
    };
    write().map_err(Error::io(format!("write {}", path.display())))
}

/// As FILE.before or, if that is taken, FILE.before.2 and so on.
fn keep_before(folder: &Folder, name: &str, pem: &[u8]) -> io::Result<()> {
    let names = (2..).map(|number| format!("{name}.before.{number}"));
    for before in [format!("{name}.before")].into_iter().chain(names) {
        match folder.create(&before, pem) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created,
        }
    }
    Ok(())
}

/// Answer the administrator's challenge with this host's TPM
#[derive(Args)]
#[command(name = "answer")]
pub struct AnswerVerb {
    /// The challenge
    challenge: PathBuf,
    /// New file for the answer
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

impl AnswerVerb {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let challenge = Challenge::read(&self.challenge)?;
        let answer = enrol::answer(&Tpm::open(&config.tpm)?, &challenge, &config.state)?;
        answer.write(&self.output)?;
        output::print(global.json, &json!({"host": answer.host, "answer": self.output}), || {
            vec![
                format!("answer of '{}'      {}", answer.host, self.output.display()),
                "next: bring it to the administrator ('cryptattach host admit')".to_owned(),
            ]
        })
    }
}
