//! A token does not do what it is asked for.

use std::{borrow::Cow, io, path::PathBuf};

use crate::{
    base::{advice::Advice, exit::Exit},
    keys::tpm::TpmError,
};

/// A token does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The program that loads modules is not here.
    #[error("the program cryptattach-pkcs11 is not installed")]
    NoProgram,
    /// It cannot be run, or its module ends it.
    #[error("cannot ask the module {}", .module.display())]
    Program {
        module: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It says why it has no answer.
    #[error("{text}")]
    Refused { text: String, next: String, exit: Exit },
    /// The PIN is wrong, or may be: it is not tried again unattended.
    #[error("the token '{token}' was given the PIN in {} in this boot, and did not take it", .file.display())]
    Tried { token: String, file: PathBuf },
    /// A person has to type the PIN.
    #[error("the token '{token}' wants its PIN, and {why}")]
    Unattended { token: String, why: &'static str },
    /// The PIN's file, or the terminal.
    #[error("cannot read the PIN of the token '{token}'")]
    Pin {
        token: String,
        #[source]
        source: Box<TpmError>,
    },
    /// That the PIN is tried cannot be remembered.
    #[error("cannot remember that the PIN of the token '{token}' is tried")]
    Memory {
        token: String,
        #[source]
        source: io::Error,
    },
    /// Nothing says which key is the token's.
    #[error("the public key of the leaf '{0}' is not known")]
    NotPinned(String),
    /// The public key cannot be used, or is another one than was expected.
    #[error("the public key of the leaf '{name}' {why}")]
    PublicKey { name: String, why: String },
}

impl Advice for TokenError {
    fn exit(&self) -> Exit {
        match self {
            Self::NoProgram | Self::NotPinned(_) => Exit::Config,
            Self::Program { .. } => Exit::StoreUnavailable,
            Self::Refused { exit, .. } => *exit,
            Self::Tried { .. } | Self::Unattended { .. } | Self::Pin { .. } => Exit::PermissionDenied,
            Self::Memory { .. } => Exit::Io,
            Self::PublicKey { .. } => Exit::KeyRefused,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::NoProgram => "install the package cryptattach-pkcs11; if a boot needs it, rebuild the initramfs then",
            Self::Program { .. } => "check the token with 'pkcs11-tool --module MODULE --list-slots'",
            Self::Refused { next, .. } if next.is_empty() => return None,
            Self::Refused { next, .. } => return Some(next.clone().into()),
            Self::Tried { .. } => {
                "correct the file, and type the PIN once at a terminal ('cryptattach test DEVICE'): a token locks itself \
                 after a few wrong PINs"
            }
            Self::Unattended { .. } => {
                "run the command at a terminal, or name a file with the PIN as 'pin' of the leaf"
            }
            Self::Pin { .. } => "check 'pin' of the leaf; a PIN has at most 32 bytes",
            Self::Memory { .. } => "check /run/cryptattach; until then, type the PIN at a terminal",
            Self::NotPinned(name) => {
                return Some(
                    format!("'cryptattach leaf pin {name}' shows it and asks; or write public = \"FILE\"").into(),
                );
            }
            Self::PublicKey { .. } => "compare it with the public key that was noted when the key was made",
        };
        Some(step.into())
    }
}
