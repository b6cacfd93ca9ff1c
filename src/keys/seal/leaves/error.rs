//! A leaf does not do what it is asked for.

use std::{borrow::Cow, path::PathBuf};

use super::{person::WordsError, pkcs11::TokenError};
use crate::{
    base::{advice::Advice, exit::Exit},
    keys::net::{bao::BaoError, http::HttpError},
    sys::state::StateError,
};

/// A leaf does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum LeafError {
    /// Its server cannot be reached.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// Its server answers, but not what was asked for.
    #[error("the Tang server {url} {what}")]
    Answer {
        url: String,
        /// "answers 404 Not Found", "answers with a point on another curve", ...
        what: String,
    },
    /// The server no longer has the key.
    #[error("the Tang server {url} no longer has the key {kid}")]
    KeyGone { url: String, kid: String },
    /// clevis does not open what another pin has.
    #[error("clevis' pin '{pin}' {why}")]
    Clevis { pin: String, why: String },
    /// The store names a server that the configuration does not.
    #[error("no [leaves.NAME] of the configuration has tang = \"{0}\"")]
    UnknownServer(String),
    /// What a server advertises is not what may be sealed to.
    #[error("the advertisement of the leaf '{name}' {why}")]
    Advertisement { name: String, why: String },
    /// Nothing says which key is the server's.
    #[error("the leaf '{0}' has no thumbprint")]
    NoThumbprint(String),
    /// Its OpenBao server.
    #[error(transparent)]
    Bao(#[from] BaoError),
    /// The server has no such key.
    #[error("{url} has no transit key '{key}'")]
    NoTransitKey { key: String, url: String },
    /// Nobody has confirmed yet which public key is the leaf's.
    #[error("the leaf '{0}' has no public key")]
    NotPinned(String),
    /// What a server offers is not what may be sealed to.
    #[error("the key that the server offers for the leaf '{name}' {why}")]
    Offered { name: String, why: String },
    /// A server has another key than the one that was sealed to.
    #[error("the server's transit key '{key}' is not the one that the leaf '{name}' is sealed to ({kid})")]
    KeyReplaced { name: String, key: String, kid: String },
    /// A server holds back the version of its key that was sealed to.
    #[error(
        "the server does not decrypt with versions of '{key}' before {least}; the leaf '{name}' is sealed to {kid}"
    )]
    KeyTooOld { name: String, key: String, kid: String, least: u64 },
    /// A token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// What this host remembers of it.
    #[error(transparent)]
    State(#[from] StateError),
    /// What was typed is no recovery key.
    #[error("that is not a recovery key: {0}")]
    Words(WordsError),
    /// What was typed is none of these leaves'.
    #[error("what was typed opens none of: {0}")]
    OtherAnswer(String),
    /// Nobody was there to answer, or somebody gave up.
    #[error("nobody has answered")]
    NoAnswer,
    /// A leaf that a key does not have.
    #[error("the key is not sealed to the leaf '{0}', or not to one that a person opens")]
    NotSealedTo(String),
    /// A passphrase that is guessed too soon.
    #[error("the passphrase has {is} bytes; at least {least} are needed")]
    TooShort { is: usize, least: usize },
    /// A person's leaf that was not made yet, or is not on this host.
    #[error("the leaf's file {} does not exist", .0.display())]
    NoFile(PathBuf),
}

impl Advice for LeafError {
    fn exit(&self) -> Exit {
        match self {
            Self::Http(error) => error.exit(),
            Self::Answer { .. } | Self::KeyGone { .. } => Exit::StoreUnavailable,
            Self::UnknownServer(_)
            | Self::NoThumbprint(_)
            | Self::NoFile(_)
            | Self::NotSealedTo(_)
            | Self::NoTransitKey { .. }
            | Self::NotPinned(_) => Exit::Config,
            Self::Advertisement { .. }
            | Self::Clevis { .. }
            | Self::Words(_)
            | Self::OtherAnswer(_)
            | Self::NoAnswer
            | Self::Offered { .. }
            | Self::KeyReplaced { .. }
            | Self::KeyTooOld { .. } => Exit::KeyRefused,
            Self::TooShort { .. } => Exit::Usage,
            Self::Bao(error) => error.exit(),
            Self::Token(error) => error.exit(),
            Self::State(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Http(error) => return error.next_step(),
            Self::Token(error) => return error.next_step(),
            Self::State(error) => return error.next_step(),
            Self::Bao(error) => return error.next_step(),
            Self::NoTransitKey { .. } => {
                "check 'transit' in the leaf's section; 'bao write -f transit/keys/KEY type=rsa-3072' makes a key"
            }
            Self::NotPinned(name) => {
                let step = format!(
                    "'cryptattach leaf pin {name}' shows and asks for it; or write public = \"FILE\" in [leaves.{name}]"
                );
                return Some(step.into());
            }
            Self::Offered { .. } => "compare it with what the server's operator sees: another server may answer there",
            Self::KeyReplaced { .. } => {
                "somebody has replaced or deleted the key, or another server answers there: restore it from the server's backup; \
                 where other leaves still open the container: 'cryptattach leaf pin NAME', then 'cryptattach container rotate \
                 STORE'"
            }
            Self::KeyTooOld { key, .. } => {
                let step = format!(
                    "lower it ('bao write transit/keys/{key}/config min_decryption_version=1'), then 'cryptattach leaf pin \
                     NAME' and 'cryptattach container rotate STORE', and raise it again"
                );
                return Some(step.into());
            }
            Self::Answer { .. } => "check that a Tang server answers at this URL",
            Self::KeyGone { .. } => {
                "restore the server's key from its backup; where other leaves still open the container: 'cryptattach leaf pin \
                 NAME', then 'cryptattach container rotate STORE'"
            }
            Self::Words(_) => {
                "compare the words with the paper; four letters of each are enough, and their order counts"
            }
            Self::OtherAnswer(_) => {
                "check that it is the recovery key or passphrase of this container ('cryptattach container show' names the \
                 leaves), and the keyboard's layout"
            }
            Self::NoAnswer => "run it at a terminal, or name a file that has the answer with --answer",
            Self::NotSealedTo(_) => "'cryptattach container show' names the leaves; 'container policy' changes them",
            Self::TooShort { .. } => "take several words that nobody would say together",
            Self::NoFile(_) => "'cryptattach leaf new NAME' makes it; or copy it from the host that has it",
            Self::Clevis { .. } => {
                "try 'clevis luks unlock'; this pin is opened by clevis itself and its package of that name (clevis-tpm2, ...)"
            }
            Self::UnknownServer(_) => "add this URL to the list 'tang' of its leaf in the configuration",
            Self::NoThumbprint(name) => {
                let step = format!(
                    "'cryptattach leaf pin {name}' shows and asks for it; or write thumbprint = \"...\" in [leaves.{name}] \
                     ('tang-show-keys' on the server prints it)"
                );
                return Some(step.into());
            }
            Self::Advertisement { .. } => {
                "compare the thumbprint with what 'tang-show-keys' prints on the server: another server may answer there"
            }
        };
        Some(step.into())
    }
}
