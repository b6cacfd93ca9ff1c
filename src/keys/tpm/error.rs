//! What can go wrong with a TPM.

use std::{borrow::Cow, fmt, path::PathBuf, time::Duration};

use openssl::error::ErrorStack;

use super::{Name, mismatch::Explanation};
use crate::base::{advice::Advice, exit::Exit, key::SecretMemoryError};

/// A response code of the TPM or of libtss2 (TPM 2.0 Part 2, section 6.6).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Code(pub u32);

impl Code {
    const FORMAT_ONE: u32 = 0x080;

    /// The code without the layer that it comes from, and without the number of the parameter or session.
    fn base(self) -> Option<u32> {
        // Codes of the TPM itself, or of a resource manager that speaks for it.
        let from_tpm = matches!(self.0 >> 16, 0 | 11 | 12);
        let code = self.0 & 0xFFF;
        from_tpm.then_some(if code & Self::FORMAT_ONE != 0 { code & 0x0BF } else { code })
    }

    fn is(self, codes: &[u32]) -> bool {
        self.base().is_some_and(|base| codes.contains(&base))
    }

    /// Retry, yielded, testing, NV rate.
    pub fn is_busy(self) -> bool {
        self.is(&[0x922, 0x908, 0x90A, 0x920])
    }

    /// The policy does not hold: PolicyFail, Policy, PcrChanged, PcrChanged's format-zero form, Value of PolicyOR.
    pub fn is_policy(self) -> bool {
        self.is(&[0x09D, 0x126, 0x128])
    }

    /// A wrong authorization value: AuthFail, BadAuth.
    pub fn is_auth(self) -> bool {
        self.is(&[0x08E, 0x0A2])
    }

    /// Dictionary attack protection.
    pub fn is_lockout(self) -> bool {
        self.is(&[0x921])
    }

    /// There is nothing at this handle.
    pub fn is_no_handle(self) -> bool {
        self.is(&[0x08B])
    }

    /// A parameter is of no use: Value.
    pub fn is_value(self) -> bool {
        self.is(&[0x084])
    }

    /// A key that is not this parent's: Integrity.
    pub fn is_integrity(self) -> bool {
        self.is(&[0x09F])
    }

    /// An NV index that was never written: NvUninitialized.
    pub fn is_unwritten(self) -> bool {
        self.is(&[0x14A])
    }

    /// An NV index of this number is there already: NvDefined.
    pub fn is_defined(self) -> bool {
        self.is(&[0x14C])
    }

    /// There is no room for another NV index, or for one of this size: NvSpace, Size.
    pub fn is_no_space(self) -> bool {
        self.is(&[0x14B, 0x095])
    }

    /// An NV index that is locked: NvLocked.
    pub fn is_locked(self) -> bool {
        self.is(&[0x148])
    }

    /// A signature is not valid: Signature.
    pub fn is_signature(self) -> bool {
        self.is(&[0x09B])
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:X}", self.0)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match (self.0 >> 16, self.base()) {
            (_, Some(0x09D)) => "a policy check failed",
            (_, Some(0x126)) => "the policy's condition does not hold",
            (_, Some(0x128)) => "a PCR changed meanwhile",
            (_, Some(0x08E | 0x0A2)) => "the authorization is wrong",
            (_, Some(0x921)) => "it is locked after too many wrong authorizations",
            (_, Some(0x922 | 0x908 | 0x90A | 0x920)) => "it is busy",
            (_, Some(0x08B)) => "there is nothing at this handle",
            (_, Some(0x084)) => "a value is out of range",
            (_, Some(0x09F)) => "the key was not made by this TPM, or was damaged",
            (_, Some(0x09B)) => "the signature is not valid",
            (_, Some(0x0A6)) => "it does not have the curve",
            (_, Some(0x902..=0x905)) => "it has no room for another object or session",
            (_, Some(0x100)) => "it has not been started",
            (_, Some(0x101)) => "it is in failure mode",
            (_, Some(0x148)) => "the NV index is locked",
            (_, Some(0x14A)) => "the NV index has not been written",
            (_, Some(0x14B)) => "it has no room for another NV index",
            (_, Some(0x14C)) => "there is such an NV index already",
            (_, Some(_)) => "it says no",
            (6..=9, None) => "libtss2 refuses, or its answer is not authentic",
            (10, None) => "no connection",
            (_, None) => "libtss2 refuses",
        };
        write!(f, "{words} (0x{:03X})", self.0)
    }
}

/// The TPM, or what is stored with its help, cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TpmError {
    /// There is no TPM.
    #[error("cannot use a TPM at '{tcti}'")]
    Missing {
        /// The TCTI, as in `device:/dev/tpmrm0`.
        tcti: String,
        /// The system's reason, or libtss2's code.
        #[source]
        source: std::io::Error,
    },
    /// A command was refused.
    #[error("the TPM refuses {command}: {code}")]
    Refused {
        /// The command, without TPM2_.
        command: &'static str,
        code: Code,
    },
    /// No answer came.
    #[error("the TPM has not answered {command} within {} seconds", .after.as_secs())]
    TimedOut {
        command: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// It was busy all the time.
    #[error("the TPM is busy: it did not take {command}")]
    Busy { command: &'static str },
    /// An answer does not make sense.
    #[error("the TPM's answer to {command} is malformed")]
    Answer { command: &'static str },
    /// A value that does not fit into the TPM's structures.
    #[error("a value is too long for the TPM")]
    TooLong,
    /// A structure that the TPM does not have.
    #[error("not a structure of a TPM: {0}")]
    Structure(String),
    /// This host has no key.
    #[error("this host has no key in its TPM: {} does not exist", .0.display())]
    NotEnrolled(PathBuf),
    /// The storage root key is not that of the enrolment.
    #[error("this TPM did not make the key, or was cleared: its storage root key is {seen}; expected {expected}")]
    OtherTpm { expected: Name, seen: Name },
    /// There is no storage root key where ours was.
    #[error("the TPM has no storage root key at 0x81000001: it did not make the key, or was cleared")]
    NoStorageRoot,
    /// The storage root key is of no use to us.
    #[error("the object at 0x81000001 is not a storage root key: {0}")]
    BadStorageRoot(&'static str),
    /// The policy does not hold in this boot state.
    #[error("the TPM does not open the key in this boot state")]
    NotThisState(#[source] Box<Explanation>),
    /// PCR 15 was to be extended, and the TPM says that it was not.
    #[error("the TPM says that PCR 15 still has the value of the power-on")]
    NotExtended,
    /// Too many wrong PINs.
    #[error("the TPM is locked after {failed} wrong PINs; it forgives one every {recovery_seconds} seconds")]
    LockedOut {
        /// The counter of failed tries.
        failed: u32,
        /// Seconds per forgiven try.
        recovery_seconds: u32,
    },
    /// The PIN is wrong.
    #[error("the PIN is wrong; {left} more tries until the TPM locks itself")]
    WrongPin {
        /// Tries left.
        left: u32,
    },
    /// The key needs a PIN, and none is given.
    #[error("the key needs a PIN")]
    NoPin,
    /// A file cannot be read or written.
    #[error("cannot {action} {}", .path.display())]
    File {
        /// "read" or "write".
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{} {why}", .path.display())]
    Malformed {
        path: PathBuf,
        /// "is no TSS2 PRIVATE KEY", ...
        why: String,
    },
    /// A policy that cannot be.
    #[error("the policy cannot be used: {0}")]
    Policy(String),
    /// libcrypto failed.
    #[error("libcrypto failed")]
    Crypto(#[from] ErrorStack),
    /// No memory for a secret.
    #[error(transparent)]
    Memory(#[from] SecretMemoryError),
}

impl From<tss_esapi::Error> for TpmError {
    fn from(error: tss_esapi::Error) -> Self {
        Self::Structure(error.to_string())
    }
}

/// `None` if there is nothing at the handle that is asked for.
pub(super) fn if_there<T>(look: impl FnOnce() -> Result<T, TpmError>) -> Result<Option<T>, TpmError> {
    match look() {
        Err(error) if error.code().is_some_and(Code::is_no_handle) => Ok(None),
        found => found.map(Some),
    }
}

impl Advice for TpmError {
    fn exit(&self) -> Exit {
        match self {
            Self::Malformed { .. } | Self::File { .. } | Self::NotEnrolled(_) | Self::Policy(_) => Exit::Config,
            Self::Crypto(_) => Exit::System,
            Self::Memory(error) => error.exit(),
            Self::Missing { .. }
            | Self::Refused { .. }
            | Self::TimedOut { .. }
            | Self::Busy { .. }
            | Self::Answer { .. }
            | Self::TooLong
            | Self::Structure(_)
            | Self::OtherTpm { .. }
            | Self::NoStorageRoot
            | Self::BadStorageRoot(_)
            | Self::NotThisState(_)
            | Self::NotExtended
            | Self::LockedOut { .. }
            | Self::WrongPin { .. }
            | Self::NoPin => Exit::Tpm,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::Missing { .. } => {
                "check that the machine has a TPM 2.0 and that it is enabled in the firmware's settings; 'tcti' in [tpm] says where it is"
            }
            Self::BadStorageRoot(_) => {
                "find out which program put it there (tpm2_readpublic -c 0x81000001); tpm2_evictcontrol removes it"
            }
            Self::OtherTpm { .. } | Self::NoStorageRoot => {
                "'cryptattach host join --replace' asks to be admitted again; until then the owner's or the escrow's key opens its volumes"
            }
            Self::NotThisState(explanation) if explanation.is_latch() => {
                "power the machine off and on: the key opens once per boot; until then the owner's or the escrow's key opens"
            }
            Self::NotThisState(_) => {
                "'cryptattach policy show' shows the policy; boot a trusted state, or have the site sign this one \
                 ('cryptattach policy sign'); until then the owner's or the escrow's key opens"
            }
            Self::LockedOut { .. } => {
                "wait, or clear the lock-out with the TPM's lockout authorization (tpm2_dictionarylockout -c)"
            }
            Self::NoPin => "name a file with the PIN as 'pin' in [tpm], or run the command on a terminal",
            Self::Busy { .. } | Self::TimedOut { .. } => {
                "check whether another program uses the TPM; if this persists, power the machine off and on"
            }
            Self::NotEnrolled(_) => "'cryptattach host join' makes one; 'identity' in [tpm] says where it is",
            Self::File { .. } | Self::Malformed { .. } => "check the command line, and [tpm] in the configuration",
            Self::Refused { .. }
            | Self::Answer { .. }
            | Self::TooLong
            | Self::Structure(_)
            | Self::NotExtended
            | Self::WrongPin { .. }
            | Self::Policy(_)
            | Self::Crypto(_) => return None,
            Self::Memory(error) => return error.next_step(),
        };
        Some(step.into())
    }
}

impl TpmError {
    /// The code, if a command was refused.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}
