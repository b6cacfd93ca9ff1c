//! The host's verb: `join`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::Global;
use crate::{
    base::{
        hex,
        key::{HostName, SecretBytes, StoreName},
    },
    cli::{lockbox::fingerprint, output},
    config::{Config, TpmConfig},
    keys::tpm,
    unlock::enrol::{Answer, Asked, Document},
    verbs::{
        error::Error,
        join::{self, Letter, LockboxTable, Taken, Wish},
    },
};

/// Ask to be admitted, and take the answer: this host's key is in its TPM from then on
///
/// Makes the host's key in its TPM, and a request that proves how it was made. The key opens only in boot states of the
/// site's policy ([tpm] in the configuration, 'cryptattach policy show'). The administrator admits the host by the
/// request ('host admit'); 'host join ANSWER' takes the answer. Neither file contains a secret.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach host join                          writes NAME.request: bring it to the administrator
  cryptattach host join compute-7.answer         takes what the administrator's 'host admit' wrote
  cryptattach host join --store cinder           leaves the request in the store; again, once admitted: takes the answer
  cryptattach host join --replace                a new key: the TPM was cleared, or the policy is another one

Resumes if interrupted.")]
pub struct Join {
    /// The administrator's answer
    #[arg(conflicts_with_all = ["name", "pin", "replace", "output", "store"])]
    answer: Option<PathBuf>,
    /// This host's name [default: 'host' in [lockbox], or the system's host name]
    #[arg(long)]
    name: Option<HostName>,
    /// Protect the key with a PIN, which is asked for now ('pin' in [tpm] names a file with it)
    #[arg(long)]
    pin: bool,
    /// Make a new key; an existing one is kept as FILE.before (FILE.before.2, ...)
    #[arg(long)]
    replace: bool,
    /// New file for the request [default: NAME.request]
    #[arg(long, value_name = "FILE", conflicts_with = "store")]
    output: Option<PathBuf>,
    /// Leave the request in this store, and take the answer from there
    #[arg(long, value_name = "STORE")]
    store: Option<StoreName>,
    /// Take only an answer with this fingerprint of the lockbox key, which 'host admit' printed
    // One in 64 begins with a hyphen.
    #[arg(long, value_name = "FINGERPRINT", value_parser = fingerprint, allow_hyphen_values = true)]
    fingerprint: Option<String>,
}

impl Join {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        match &self.answer {
            Some(path) => self.take(&config, &Answer::read(path)?, global.json),
            None => self.ask(&config, global.json),
        }
    }

    fn ask(&self, config: &Config, as_json: bool) -> Result<(), Error> {
        let file = |host: &HostName| {
            let own = || PathBuf::from(format!("{host}.request"));
            self.store.is_none().then(|| self.output.clone().unwrap_or_else(own))
        };
        let wish =
            Wish { name: self.name.as_ref(), replace: self.replace, output: &file, pin: self.pin, new_pin: &new_pin };
        let asked = join::ask(config, &wish)?;
        if let Some(store) = &self.store
            && let Some((answer, _)) = Letter::Answer.read::<Answer>(config, store, &asked.host)?
            && answer.enrolment == asked.request.digest()
        {
            return self.take(config, &answer, as_json);
        }
        if join::has_joined(config, &asked)? {
            return has_joined(config, &asked, as_json);
        }
        let place = match (&self.store, file(&asked.host)) {
            (Some(store), _) => Letter::Request.leave(config, store, &asked.host, &asked.request)?,
            (None, file) => {
                let file = file.unwrap_or_default();
                asked.request.write(&file)?;
                file
            }
        };
        self.show(config, &asked, &place, as_json)
    }

    fn show(&self, config: &Config, asked: &Asked, place: &Path, as_json: bool) -> Result<(), Error> {
        let (keys, storage_root) = (asked.endorsement_keys()?, asked.key()?.storage_root);
        let value = json!({
            "host": asked.host,
            "joined": false,
            "request": place,
            "key": config.tpm.identity.to_path_buf(),
            "storage_root": storage_root,
            "endorsement_keys": keys.iter().map(|(fingerprint, certified)| {
                json!({"fingerprint": hex::encode(fingerprint), "certificate": certified})
            }).collect::<Vec<_>>(),
        });
        output::print(as_json, &value, || {
            let mut lines = vec![
                format!("request of '{}'      {}", asked.host, place.display()),
                format!("  key               {}", config.tpm.identity.display()),
                format!("  storage root key  {storage_root}"),
            ];
            lines.extend(keys.iter().map(|(fingerprint, certified)| {
                let certificate = if *certified { "with a certificate" } else { "without a certificate" };
                format!("  endorsement key   {} ({certificate})", hex::encode(fingerprint))
            }));
            lines.push(match &self.store {
                Some(store) => format!(
                    "next, the administrator: cryptattach host admit {}; then here: cryptattach host join --store {store}",
                    asked.host
                ),
                None => format!(
                    "next: bring the request to the administrator (cryptattach host admit {}), and the answer back here",
                    place.display()
                ),
            });
            lines
        })
    }

    fn take(&self, config: &Config, answer: &Answer, as_json: bool) -> Result<(), Error> {
        let taken = join::take(config, answer, self.fingerprint.as_deref())?;
        let mut value = serde_json::to_value(&taken).unwrap_or_default();
        value["joined"] = true.into();
        output::print(as_json, &value, || words(config, answer, &taken))
    }
}

fn words(config: &Config, answer: &Answer, taken: &Taken) -> Vec<String> {
    let mut lines = vec![
        format!("'{}' has joined", taken.host),
        format!("  key               {}", taken.key.display()),
        format!("  lockbox key       fingerprint {}, as 'host admit' printed it", taken.lockbox_key),
        format!("  kept in           {}", taken.store),
    ];
    let path = config.path.display();
    match taken.lockbox {
        LockboxTable::Configured => {}
        LockboxTable::Written => lines.push(format!("  wrote             [lockbox] in {path}")),
        LockboxTable::Differs => lines.push(format!(
            "next: [lockbox] in {path} must say host = \"{}\" and store = \"{}\"",
            taken.host, taken.store
        )),
        LockboxTable::Missing => {
            lines.push(format!("next: configure the store '{}' in {path}, and write there", taken.store));
            lines.extend(join::table(config, answer).lines().map(|line| format!("    {line}")));
        }
    }
    let before = if matches!(taken.lockbox, LockboxTable::Differs | LockboxTable::Missing) { "then" } else { "next" };
    lines.push(format!("{before}, once per boot: cryptattach lockbox open"));
    lines
}

fn has_joined(config: &Config, asked: &Asked, as_json: bool) -> Result<(), Error> {
    let key = config.tpm.identity.to_path_buf();
    output::print(as_json, &json!({"host": asked.host, "joined": true, "key": key}), || {
        vec![
            format!("'{}' has joined already", asked.host),
            format!("  key               {}", key.display()),
            "next, once per boot: cryptattach lockbox open; --replace makes a new key and a new request".to_owned(),
        ]
    })
}

/// From the file that the configuration names, or asked for twice: a slip would make a key that nobody can use.
fn new_pin(config: &TpmConfig) -> Result<SecretBytes, Error> {
    if config.pin.is_some() {
        return Ok(tpm::pin(config)?);
    }
    let (pin, again) = (tpm::ask("New PIN of this host's key: ")?, tpm::ask("Again: ")?);
    if pin == again { Ok(pin) } else { Err(Error::Usage("the two PINs differ".to_owned())) }
}
