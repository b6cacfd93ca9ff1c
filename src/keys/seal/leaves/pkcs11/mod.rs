//! `pkcs11 = "pkcs11:..."`: a private key in a smart card or HSM, which opens by itself what is sealed to its public key.
//!
//! Sealing takes the public key only, so a recipient is the same as any holder's: nothing in a sealed key says where the
//! private key is. That says the configuration, module included: a store must not have this host load anything.
//!
//! A module is foreign code. It runs in a [program] of its own, which is killed in time.

mod error;
mod program;
mod tries;

use std::{
    collections::BTreeMap,
    env, io,
    io::IsTerminal,
    path::{Path, PathBuf},
    sync::{Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use base64ct::{Base64UrlUnpadded, Encoding};
use cryptattach_pkcs11::Uri;
use openssl::{bn::BigNumContext, ec::PointConversionForm, pkey::PKey};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use error::TokenError;
pub use program::Answer;
use program::{Module, Question, Wanting};
use tries::Tries;

use super::{Kind, LeafError, Offer, Pin, Takes, text};
use crate::{
    base::{
        chain::{chain, printable},
        key::{JoseHeader, JweRecipient, Location, Place, SecretBytes},
    },
    config::{ConfigError, ConfigPath, LeafConfig, LeafName, Network},
    keys::{
        net::http::Cancel,
        seal::{ContentKey, OwnerRecipient, Recipient, SealError, decode, ecdh_es, key_wrap, rsa_oaep},
        tpm,
    },
    sys::state,
};

/// What tells this kind, in the configuration.
pub(super) const MEMBER: &str = "pkcs11";
/// How long a token may take for one question.
const PATIENCE: Duration = Duration::from_secs(10);
/// Less than this is too little for a PIN.
const LEAST: Duration = Duration::from_secs(1);
/// The longest thing that is decrypted: by an RSA key of 8192 bits.
const MOST_ENCRYPTED_BYTES: usize = 1024;
/// How long a person may take at a token's keypad.
const KEYPAD_PATIENCE: Duration = Duration::from_secs(60);
/// How long other leaves have to make a person's PIN unnecessary.
const BEFORE_ASKING: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    pkcs11: String,
    module: Option<ConfigPath>,
    pin: Option<ConfigPath>,
    public: Option<ConfigPath>,
    #[serde(default)]
    places: Vec<ConfigPath>,
    #[serde(default)]
    files: Vec<ConfigPath>,
    #[serde(default)]
    environment: BTreeMap<String, String>,
}

/// One key in a token.
struct Token {
    name: LeafName,
    module: Module,
    pin: Option<ConfigPath>,
    public: Option<ConfigPath>,
    places: Vec<ConfigPath>,
    files: Vec<ConfigPath>,
    /// The file `leaves/NAME.json` of the state directory.
    remembered: PathBuf,
    state: ConfigPath,
    /// For all questions together.
    patience: Duration,
    /// What questions have taken so far. What others take meanwhile, a person who types for one, is not the token's time.
    spent: Mutex<Duration>,
    /// Its public key's thumbprint, if that is known.
    kid: OnceLock<Option<String>>,
}

pub(super) fn kind(name: &LeafName, config: &LeafConfig, network: Network) -> Result<Box<dyn Kind>, ConfigError> {
    let table: Table = config.read()?;
    let unusable = |why: &dyn std::fmt::Display| config.unusable(format!("pkcs11: {why}"));
    let uri = Uri::parse(&table.pkcs11).map_err(|why| unusable(&why))?;
    let modules = [table.module.map(PathBuf::from), uri.module_path, uri.module_name.map(|name| find_module(&name))];
    let [Some(path)] = &modules.into_iter().flatten().map(Some).collect::<Vec<_>>()[..] else {
        return Err(unusable(&"expected one module: module = \"FILE\", or 'module-path' or 'module-name' in the URI"));
    };
    if table.pin.is_some() && uri.pin_source.is_some() {
        return Err(unusable(&"expected one PIN: pin = \"FILE\", or 'pin-source' in the URI"));
    }
    let module = Module { path: path.clone(), uri: table.pkcs11, environment: table.environment };
    Ok(Box::new(Token {
        name: name.clone(),
        module,
        pin: table.pin.or(uri.pin_source.map(ConfigPath::from)),
        public: table.public,
        places: table.places,
        files: table.files,
        remembered: config.memory.clone(),
        state: config.state.clone(),
        patience: Duration::try_from_secs_f64(network.total_seconds).unwrap_or(PATIENCE),
        spent: Mutex::default(),
        kid: OnceLock::new(),
    }))
}

/// The file of a module that was named (RFC 7512 section 2.3): in the folders of the distributions, or p11-kit's own proxy.
fn find_module(name: &str) -> PathBuf {
    let libraries = format!("/usr/lib/{}-linux-gnu", env::consts::ARCH);
    let folders =
        [format!("{libraries}/pkcs11"), "/usr/lib64/pkcs11".to_owned(), "/usr/lib/pkcs11".to_owned(), libraries];
    let files = folders.iter().flat_map(|folder| {
        let folder = Path::new(folder);
        [folder.join(format!("{name}.so")), folder.join(format!("lib{name}.so"))]
    });
    let files: Vec<_> = files.collect();
    // If there is none, the loader says so of the first.
    files.iter().find(|file| file.is_file()).unwrap_or(&files[0]).clone()
}

/// What this host remembers of a token.
#[derive(Serialize, Deserialize)]
struct Remembered {
    thumbprint: String,
    /// SubjectPublicKeyInfo, base64url.
    key: String,
    /// The token says that it is a device, which keeps its keys on no disk.
    hardware: bool,
    /// The token's label.
    token: String,
}

impl Remembered {
    fn recipient(&self) -> Result<OwnerRecipient, SealError> {
        OwnerRecipient::of_public(PKey::public_key_from_der(&decode("key", &self.key)?)?)
    }
}

impl Token {
    fn remembered(&self) -> Result<Option<Remembered>, LeafError> {
        Ok(state::read(&self.remembered)?)
    }

    /// The holder of its public key, as the configuration names it or as this host has pinned it.
    fn recipient(&self) -> Result<Option<OwnerRecipient>, SealError> {
        match &self.public {
            Some(file) => OwnerRecipient::read(file).map(Some),
            None => self.remembered()?.map(|remembered| remembered.recipient()).transpose(),
        }
    }

    fn kid(&self) -> Option<&str> {
        let known = || self.recipient().ok().flatten().map(|recipient| recipient.kid().to_owned());
        self.kid.get_or_init(known).as_deref()
    }

    fn public_key(&self, why: impl Into<String>) -> TokenError {
        TokenError::PublicKey { name: self.name.to_string(), why: why.into() }
    }

    /// How long the next question may take. All of them are bounded together: a store may have the token asked often.
    fn left(&self, most: Duration) -> Duration {
        let spent = *self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        most.min(self.patience.saturating_sub(spent))
    }

    fn question(&self, question: &Question<'_>, cancel: &Cancel) -> Answer {
        let begun = Instant::now();
        let answer = self.module.ask(question, cancel);
        *self.spent.lock().unwrap_or_else(PoisonError::into_inner) += begun.elapsed();
        answer
    }

    /// Asks; and once more with the PIN, if the token wants one.
    fn ask(&self, ask: &Value, cancel: &Cancel) -> Result<SecretBytes, TokenError> {
        let question = Question { ask, pin: None, attended: false, patience: self.left(PATIENCE) };
        match self.question(&question, cancel) {
            Answer::Done(bytes) => Ok(bytes),
            Answer::NotTaken(error) | Answer::Failed(error) => Err(error),
            Answer::NeedsPin(mut wanting) => {
                wanting.label = printable(&wanting.label);
                self.ask_with_pin(ask, &wanting, cancel)
            }
        }
    }

    fn ask_with_pin(&self, ask: &Value, wanting: &Wanting, cancel: &Cancel) -> Result<SecretBytes, TokenError> {
        let token = || wanting.label.clone();
        let forgetful = |source| TokenError::Memory { token: token(), source };
        let unreadable = |source| TokenError::Pin { token: token(), source: Box::new(source) };
        let is_over = || cancel.is_cancelled() || self.left(LEAST).is_zero();
        let tries = Tries::of(&wanting.is, &self.state, &is_over).map_err(forgetful)?;
        let (tried, is_attended) = (tries.had_one(), io::stdin().is_terminal());
        let answer = match &self.pin {
            Some(file) if !tried && !wanting.is_low => {
                let (pin, patience) = (tpm::first_line(file).map_err(unreadable)?, self.left(PATIENCE));
                // A PIN that is given and not waited for would count as a wrong one.
                if patience < LEAST {
                    return Err(self.module.error("no time is left for it"));
                }
                tries.begin().map_err(forgetful)?;
                self.question(&Question { ask, pin: Some(&pin), attended: false, patience }, cancel)
            }
            _ if is_attended => self.ask_person(ask, wanting, cancel)?,
            Some(file) if tried => return Err(TokenError::Tried { token: token(), file: file.to_path_buf() }),
            Some(_) => {
                let why = "a wrong one was tried before, so that it is not tried unattended";
                return Err(TokenError::Unattended { token: token(), why });
            }
            None => return Err(TokenError::Unattended { token: token(), why: "nobody can be asked" }),
        };
        match answer {
            Answer::Done(bytes) => {
                tries.forget();
                Ok(bytes)
            }
            Answer::NotTaken(error) => Err(error),
            Answer::Failed(error) => {
                tries.forget();
                Err(error)
            }
            Answer::NeedsPin(_) => Err(TokenError::Unattended { token: token(), why: "it does not take it" }),
        }
    }

    /// One person is asked one thing at a time, and only what is still wanted.
    fn ask_person(&self, ask: &Value, wanting: &Wanting, cancel: &Cancel) -> Result<Answer, TokenError> {
        static TERMINAL: Mutex<()> = Mutex::new(());
        let _terminal = TERMINAL.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        while !cancel.is_cancelled() && begun.elapsed() < BEFORE_ASKING {
            thread::sleep(Duration::from_millis(20));
        }
        if cancel.is_cancelled() {
            return Err(TokenError::Unattended { token: wanting.label.clone(), why: "it is not needed any more" });
        }
        let Wanting { label, final_try, .. } = wanting;
        let warning = if *final_try { " (a wrong one locks it for good)" } else { "" };
        if wanting.keypad {
            tracing::warn!("type the PIN of the token '{label}'{warning} at its keypad");
            let question = Question { ask, pin: None, attended: true, patience: KEYPAD_PATIENCE };
            return Ok(self.module.ask(&question, cancel));
        }
        let question = format!("PIN of the token '{label}'{warning}: ");
        let pin = tpm::ask_until(&question, &|| cancel.is_cancelled());
        let pin = pin.map_err(|source| TokenError::Pin { token: label.clone(), source: Box::new(source) })?;
        // Typing takes its time, which is not the token's.
        Ok(self.module.ask(&Question { ask, pin: Some(&pin), attended: true, patience: PATIENCE }, cancel))
    }

    fn recover(&self, entry: &JweRecipient, header: &JoseHeader, cancel: &Cancel) -> Result<ContentKey, SealError> {
        let ask = |ask: Value| {
            let key = self.ask(&ask, cancel).map_err(LeafError::from)?;
            // All that a module could have printed is a wrong key, which opens nothing.
            let is_key = key.len() == ContentKey::BYTES;
            if is_key { Ok(key) } else { Err(LeafError::from(self.module.error("its answer is not a key"))) }
        };
        match text(header, "alg") {
            Some(rsa_oaep::ALG) => {
                let encrypted = decode("encrypted_key", &entry.encrypted_key)?;
                if encrypted.len() > MOST_ENCRYPTED_BYTES {
                    return Err(SealError::Tampered);
                }
                let key = ask(json!({"decrypt": Base64UrlUnpadded::encode_string(&encrypted)}))?;
                ContentKey::from_secret(key).ok_or(SealError::Tampered)
            }
            Some(ecdh_es::ALG) => {
                let ephemeral = ecdh_es::ephemeral_key(header)?.ec_key()?;
                let (mut context, form) = (BigNumContext::new()?, PointConversionForm::UNCOMPRESSED);
                let point = ephemeral.public_key().to_bytes(ephemeral.group(), form, &mut context)?;
                let z = ask(json!({"agree": Base64UrlUnpadded::encode_string(&point)}))?;
                key_wrap::unwrap_entry(&ecdh_es::wrapping_key(&z, header)?, entry)
            }
            _ => Err(SealError::Unsupported("it is sealed to a token with an unsupported algorithm".to_owned())),
        }
    }
}

impl Kind for Token {
    fn recipients(&self, _: &Path) -> Result<Vec<Box<dyn Recipient>>, SealError> {
        let recipient = self.recipient()?.ok_or_else(|| TokenError::NotPinned(self.name.to_string()));
        Ok(vec![Box::new(recipient.map_err(LeafError::from)?)])
    }

    fn is_for(&self, header: &JoseHeader) -> bool {
        self.kid().is_some() && text(header, "kid") == self.kid()
    }

    fn open(
        &self,
        entry: &JweRecipient,
        header: &JoseHeader,
        cancel: &Cancel,
    ) -> Option<Result<ContentKey, SealError>> {
        self.is_for(header).then(|| self.recover(entry, header, cancel))
    }

    /// The PIN is no place of its own: it is too short to keep anything from whoever has the token's files.
    fn places(&self, name: &LeafName) -> Vec<Place> {
        let what = format!("leaf {name}");
        if !self.places.is_empty() {
            return self.places.iter().map(|path| Place::path(what.clone(), &**path, true)).collect();
        }
        let token = self.remembered().ok().flatten();
        let at = match token.filter(|token| token.hardware) {
            Some(token) => Location::Chip { name: format!("the token '{}'", printable(&token.token)) },
            None => {
                let why = format!(
                    "no token has said that it is hardware ('cryptattach leaf pin {name}' asks it, 'places' of the leaf \
                     says where the keys of another one are)"
                );
                Location::Elsewhere { name: "a token".to_owned(), why }
            }
        };
        vec![Place { what, at, opens: true }]
    }

    fn takes(&self) -> Result<Takes, LeafError> {
        let (of_token, files) = self
            .files
            .iter()
            .map(|path| path.to_path_buf())
            .partition::<Vec<_>, _>(|path| self.places.iter().any(|place| path.starts_with(place)));
        let pin = self.pin.iter().map(|pin| (pin.to_path_buf(), "it is the PIN of a token"));
        let of_token = of_token.into_iter().map(|path| (path, "it has the keys of a token"));
        Ok(Takes {
            programs: vec![program::path()?],
            libraries: vec![self.module.path.clone()],
            files,
            secrets: pin.chain(of_token).collect(),
        })
    }

    fn files(&self) -> Vec<&Path> {
        let pinned = self.remembered.is_file().then_some(&*self.remembered);
        self.public.as_deref().into_iter().chain(pinned).collect()
    }

    fn pin(&self, _: &Path) -> Option<Box<dyn Pin + '_>> {
        Some(Box::new(PublicKey(self)))
    }
}

/// How this host learns a token's public key.
struct PublicKey<'a>(&'a Token);

impl Pin for PublicKey<'_> {
    fn expected(&self) -> Result<Option<String>, LeafError> {
        let recipient =
            self.0.recipient().map_err(|error| self.0.public_key(format!("cannot be read: {}", chain(&error))));
        Ok(recipient?.map(|recipient| recipient.kid().to_owned()))
    }

    fn pinned(&self) -> Option<String> {
        self.expected().ok()?
    }

    fn fetch(&self) -> Result<Box<dyn Offer + '_>, LeafError> {
        let answer = self.0.ask(&json!("public"), &Cancel::never())?;
        let answer: Value = serde_json::from_slice(answer.expose()).unwrap_or_default();
        let text = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
        let hardware = answer["hardware"].as_bool() == Some(true);
        let mut key = Remembered { thumbprint: String::new(), key: text("key"), hardware, token: text("token") };
        let recipient =
            key.recipient().map_err(|error| self.0.public_key(format!("cannot be used: {}", chain(&error))))?;
        key.thumbprint = recipient.kid().to_owned();
        Ok(Box::new(Offered { of: self.0, thumbprints: vec![key.thumbprint.clone()], key }))
    }

    fn compare_with(&self) -> String {
        "the thumbprint (RFC 7638) that was noted when the key was made".to_owned()
    }
}

/// A public key that a token offers.
struct Offered<'a> {
    of: &'a Token,
    thumbprints: Vec<String>,
    key: Remembered,
}

impl Offer for Offered<'_> {
    fn thumbprints(&self) -> &[String] {
        &self.thumbprints
    }

    fn keep(&self, thumbprint: &str) -> Result<(), LeafError> {
        if self.key.thumbprint != thumbprint {
            let why = format!("is {} in the token; expected {thumbprint}", self.key.thumbprint);
            return Err(self.of.public_key(why).into());
        }
        Ok(state::write(&self.of.remembered, &self.key)?)
    }
}
