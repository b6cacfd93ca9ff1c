//! OpenBao does not do what it is asked for.

use std::{borrow::Cow, path::PathBuf};

use reqwest::StatusCode;

use crate::{
    base::{advice::Advice, exit::Exit, key::SecretMemoryError},
    config::ConfigError,
    keys::net::{clouds::CloudsError, http::HttpError},
};

/// OpenBao does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum BaoError {
    /// There is no answer.
    #[error(transparent)]
    Http(Box<HttpError>),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file of `[servers.NAME]` cannot be used.
    #[error("a file of [servers.{server}] cannot be used")]
    File {
        server: String,
        #[source]
        source: Box<CloudsError>,
    },
    /// It does not let this host in.
    #[error("{url} refuses the log-in: {said}")]
    LogIn { url: String, server: String, said: String },
    /// The SecretID is out of its wrapping already.
    #[error("the wrapped SecretID in {} has been used before, or has expired", .path.display())]
    Unwrapped { server: String, path: PathBuf },
    /// Something else is in the wrapping.
    #[error("what is wrapped in {} is not a SecretID: it was made by '{made_by}'", .path.display())]
    NotASecretId { server: String, path: PathBuf, made_by: String },
    /// The token may not do that.
    #[error("{url} does not let this host do that")]
    Denied { url: String, server: String },
    /// It is sealed, or not ready.
    #[error("{url} cannot work now{said}")]
    Sealed {
        url: String,
        /// What it says, after a colon.
        said: String,
    },
    /// It is not the one that works.
    #[error("{url} is a standby and sends its clients to another server ({status})")]
    Standby { url: String, status: StatusCode },
    /// It has too much to do.
    #[error("{url} asks to come back later")]
    Busy { url: String },
    /// A key is deleted, but not for ever.
    #[error("the key {id} in {at} was deleted, but its version {version} can be brought back")]
    Deleted { id: String, at: String, version: u64 },
    /// It answers, but not what was asked for.
    #[error("{url} {what}")]
    Answer {
        url: String,
        /// "answers 500 Internal Server Error: ...", "gives no token", ...
        what: String,
    },
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

impl From<HttpError> for BaoError {
    fn from(error: HttpError) -> Self {
        Self::Http(Box::new(error))
    }
}

impl Advice for BaoError {
    fn exit(&self) -> Exit {
        match self {
            Self::Http(error) => error.exit(),
            Self::Config(error) => error.exit(),
            Self::File { .. } => Exit::Config,
            Self::LogIn { .. } | Self::Denied { .. } => Exit::PermissionDenied,
            Self::Unwrapped { .. } | Self::NotASecretId { .. } => Exit::ProofRefused,
            Self::Sealed { .. } | Self::Standby { .. } | Self::Busy { .. } | Self::Answer { .. } => {
                Exit::StoreUnavailable
            }
            Self::Deleted { .. } => Exit::NoKey,
            Self::Memory(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Http(error) if error.is_certificate() => {
                "check the server's certificate, this host's clock, and 'ca' in [servers.NAME]"
            }
            Self::Http(error) => return error.next_step(),
            Self::Config(error) => return error.next_step(),
            Self::Memory(error) => return error.next_step(),
            Self::File { .. } => "check 'ca' and the log-in's files in [servers.NAME]",
            Self::LogIn { .. } => {
                "check the log-in in [servers.NAME]: a SecretID or token may have expired, be used up, or be for other addresses"
            }
            Self::Unwrapped { .. } | Self::NotASecretId { .. } => {
                "if nobody of yours has used it, somebody else has it: destroy the role's SecretIDs, find out who, make a new one"
            }
            Self::Denied { .. } => {
                "check the policy of the host's role, the path and the namespace, and that the token has not expired: the server \
                 answers the same to all of these"
            }
            Self::Sealed { .. } => "unseal it ('bao operator unseal'); -v shows every try",
            Self::Standby { .. } => "list all servers of the service in 'bao' of [servers.NAME]",
            Self::Busy { .. } => "check its rate limits (quotas)",
            Self::Deleted { at, id, version } => {
                let (mount, path) = at.split_once('/').unwrap_or((at, ""));
                return Some(
                    format!(
                        "'bao kv undelete -mount={mount} -versions={version} {path}/{id}' brings it back; 'cryptattach key \
                         delete' removes it for ever"
                    )
                    .into(),
                );
            }
            Self::Answer { .. } => "the server's own log says more; -v shows every request",
        };
        Some(step.into())
    }
}
