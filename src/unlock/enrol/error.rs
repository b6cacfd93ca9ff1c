//! What can be wrong with an enrolment.

use std::{borrow::Cow, fmt, io, path::PathBuf};

use openssl::error::ErrorStack;

use super::credential::CredentialError;
use crate::{
    base::{
        advice::Advice,
        clock::date,
        exit::Exit,
        key::{HostName, SecretMemoryError},
    },
    keys::{seal::SealError, tpm::TpmError},
    sys::state::StateError,
};

/// A part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The endorsement key, or its certificate.
    EndorsementKey,
    /// The attestation key.
    AttestationKey,
    /// The identity key.
    IdentityKey,
    /// The attestation key's word for the identity key.
    Creation,
    /// The attestation key's word for the counter.
    Counter,
    /// The policy.
    Policy,
    /// The time of the enrolment.
    Time,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::EndorsementKey => "endorsement key",
            Self::AttestationKey => "attestation key",
            Self::IdentityKey => "identity key",
            Self::Creation => "certification of the identity key",
            Self::Counter => "certification of the counter",
            Self::Policy => "policy",
            Self::Time => "time of the enrolment",
        })
    }
}

/// An enrolment does not go on.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// A file cannot be read or written.
    #[error("cannot {action} {}", .path.display())]
    File {
        /// "read", "write", "remove".
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A file is not the document that it should be.
    #[error("{} is not a valid {expected}: {why}", .path.display())]
    Document {
        path: PathBuf,
        /// "enrolment request" or "enrolment answer".
        expected: &'static str,
        /// What it is instead, or where it is damaged.
        why: String,
    },
    /// Something in a request is not what is asked of a host.
    #[error("the {part} in the request of '{host}' is refused: {why}")]
    Refused {
        /// The host, as the request calls it.
        host: HostName,
        /// Which part.
        part: Part,
        why: String,
    },
    /// The folder with the makers' certificates is of no use.
    #[error("the folder {} has no certificate authority: {why}", .path.display())]
    Authorities { path: PathBuf, why: String },
    /// A request has been used already.
    #[error("the request of '{host}' has already been used: it admitted the host on {}", date(*.admitted))]
    Replayed {
        host: HostName,
        /// When, in seconds since 1970.
        admitted: u64,
    },
    /// The host is known with another TPM.
    #[error("'{host}' is known with another TPM: its endorsement key was {known}; the request has {seen}")]
    OtherTpm {
        host: HostName,
        /// Fingerprint of the key that it was admitted with.
        known: String,
        /// Fingerprint of the request's.
        seen: String,
    },
    /// The TPM is known with another host.
    #[error("the TPM in the request of '{host}' is that of '{known}', which is admitted")]
    OtherName { host: HostName, known: HostName },
    /// The host is admitted, by another request.
    #[error("'{host}' was admitted on {}, by another request: this one would replace its lockbox key", date(*.admitted))]
    Admitted {
        host: HostName,
        /// When, in seconds since 1970.
        admitted: u64,
    },
    /// This host has not asked.
    #[error("this host has not asked to join: {} does not exist", .0.display())]
    NotEnrolled(PathBuf),
    /// An answer is for somebody else.
    #[error("the answer is for {0}")]
    NotForThisHost(String),
    /// The TPM does not open the answer.
    #[error("the TPM does not open the answer: it was made for another TPM, or was changed")]
    NotForThisTpm(#[source] TpmError),
    /// No host of this name has left a request.
    #[error("there is neither a file '{name}' nor a request of a host '{name}' in {at}")]
    NoRequest {
        name: HostName,
        /// The stores that were asked.
        at: String,
    },
    /// No such host is admitted.
    #[error("the host '{0}' is not admitted")]
    NotAdmitted(HostName),
    /// This machine's memory of enrolments cannot be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// The identity key cannot be sealed to.
    #[error(transparent)]
    Seal(Box<SealError>),
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// libcrypto failed.
    #[error("libcrypto failed")]
    Crypto(#[from] ErrorStack),
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

impl Advice for EnrolError {
    fn exit(&self) -> Exit {
        match self {
            Self::Tpm(error) => error.exit(),
            Self::File { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => Exit::InTheWay,
            Self::File { .. } => Exit::Io,
            Self::State(error) => error.exit(),
            Self::Authorities { .. } => Exit::Config,
            Self::Admitted { .. } => Exit::InTheWay,
            Self::NotEnrolled(_) | Self::NotAdmitted(_) | Self::NoRequest { .. } => Exit::Missing,
            Self::Crypto(_) => Exit::System,
            Self::Memory(error) => error.exit(),
            Self::Document { .. }
            | Self::Refused { .. }
            | Self::Replayed { .. }
            | Self::OtherTpm { .. }
            | Self::OtherName { .. }
            | Self::NotForThisHost(_)
            | Self::NotForThisTpm(_)
            | Self::Seal(_) => Exit::ProofRefused,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        Some(match self {
            Self::Document { .. } => "fetch the file again from where it was made".into(),
            Self::Refused { part: Part::EndorsementKey, .. } => {
                "check the folder of the makers' certificates (--ca); or compare the endorsement key's fingerprint with the one that 'host join' shows on the host's own console, and name it with --ek".into()
            }
            Self::Refused { part: Part::Policy | Part::Counter, .. } => {
                "if the host can be trusted, compare [tpm] here and on the host ('cryptattach policy show'), then run 'cryptattach host join --replace' there".into()
            }
            Self::Refused { .. } => {
                "do not admit this host before it is clear who made the request; 'cryptattach host join --replace' makes a new one".into()
            }
            Self::Authorities { .. } => {
                "put the certificates (PEM or DER) of the makers of your TPMs there".into()
            }
            Self::Replayed { .. } => "run 'cryptattach host join --replace' on the host for a new one".into(),
            Self::OtherTpm { host, .. } | Self::OtherName { known: host, .. } => {
                format!("if that is right, first remove the old host: cryptattach host remove {host}").into()
            }
            Self::Admitted { .. } => {
                "ask on the host's own console whether it has asked to join again; if it has, add --replace: until it has taken the answer, it opens no more after its next boot".into()
            }
            Self::NotForThisTpm(_) | Self::NotForThisHost(_) => {
                "check which host each file belongs to; 'cryptattach host join' writes this host's request again, and 'cryptattach host admit' the answer to it".into()
            }
            Self::NotEnrolled(_) => "run 'cryptattach host join' first".into(),
            Self::NoRequest { .. } => "on the host, 'cryptattach host join --store STORE' leaves its request there; or bring its file".into(),
            Self::NotAdmitted(_) => "'cryptattach host list' shows the admitted hosts".into(),
            Self::Tpm(error) => return error.next_step(),
            Self::State(error) => return error.next_step(),
            Self::Seal(error) => return error.next_step(),
            Self::File { .. } | Self::Crypto(_) => return None,
            Self::Memory(error) => return error.next_step(),
        })
    }
}

impl From<CredentialError> for EnrolError {
    fn from(error: CredentialError) -> Self {
        match error {
            CredentialError::Crypto(error) => Self::Crypto(error),
            CredentialError::Memory(error) => Self::Memory(error),
        }
    }
}

impl From<SealError> for EnrolError {
    fn from(error: SealError) -> Self {
        Self::Seal(Box::new(error))
    }
}
