//! A leaf does not do what it is asked for.

use std::borrow::Cow;

use super::pkcs11::TokenError;
use crate::{
    base::{advice::Advice, exit::Exit},
    keys::net::http::HttpError,
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
    /// The store names a server that the configuration does not.
    #[error("no [leaves.NAME] of the configuration has tang = \"{0}\"")]
    UnknownServer(String),
    /// What a server advertises is not what may be sealed to.
    #[error("the advertisement of the leaf '{name}' {why}")]
    Advertisement { name: String, why: String },
    /// Nothing says which key is the server's.
    #[error("the leaf '{0}' has no thumbprint")]
    NoThumbprint(String),
    /// A token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// What this host remembers of it.
    #[error(transparent)]
    State(#[from] StateError),
}

impl Advice for LeafError {
    fn exit(&self) -> Exit {
        match self {
            Self::Http(error) => error.exit(),
            Self::Answer { .. } | Self::KeyGone { .. } => Exit::StoreUnavailable,
            Self::UnknownServer(_) | Self::NoThumbprint(_) => Exit::Config,
            Self::Advertisement { .. } => Exit::KeyRefused,
            Self::Token(error) => error.exit(),
            Self::State(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Http(error) => return error.next_step(),
            Self::Token(error) => return error.next_step(),
            Self::State(error) => return error.next_step(),
            Self::Answer { .. } => "check that a Tang server answers at this URL",
            Self::KeyGone { .. } => {
                "restore the server's key from its backup; where other leaves still open the container: 'cryptattach leaf pin \
                 NAME', then 'cryptattach container rotate STORE'"
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
