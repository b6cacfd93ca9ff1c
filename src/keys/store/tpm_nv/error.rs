//! What can go wrong with keys in a TPM.

use std::{borrow::Cow, path::PathBuf};

use crate::{
    base::{advice::Advice, exit::Exit},
    keys::{store::StoreError, tpm::TpmError},
};

/// The TPM's NV memory cannot be read, or not be changed.
#[derive(Debug, thiserror::Error)]
pub enum NvError {
    /// A key is longer than an index.
    #[error("the key takes {bytes} bytes; an index of this TPM has at most {most}")]
    TooLong { bytes: usize, most: usize },
    /// It is full, but for what is kept for replacing keys.
    #[error(
        "the TPM's NV memory has no room for {bytes} bytes more: keys take {taken} bytes in {indices} of {most} indices{}",
        if *.kept { ", and room for replacing the largest key stays free" } else { "" }
    )]
    Full {
        bytes: usize,
        /// What all indices of our range take.
        taken: usize,
        indices: usize,
        /// Indices of our range.
        most: usize,
        /// Room is kept for replacing a key.
        kept: bool,
    },
    /// Nobody reads it any more in this boot.
    #[error("the keys in the TPM's NV memory are locked until the next reset: a boot has locked them at its end")]
    ReadLocked,
    /// Another program of this host changes it, and does not come to an end.
    #[error("another program of this host changes the keys in the TPM; it holds {}", .lock.display())]
    Busy { lock: PathBuf },
    /// The TPM lets only its owner write.
    #[error("the owner's password of this TPM is {}", if *.given { "wrong" } else { "needed to write to it" })]
    OwnerPassword {
        /// Whether one is configured.
        given: bool,
    },
    /// The TPM.
    #[error(transparent)]
    Tpm(#[from] TpmError),
}

impl From<TpmError> for StoreError {
    fn from(error: TpmError) -> Self {
        Self::Nv(error.into())
    }
}

impl Advice for NvError {
    fn exit(&self) -> Exit {
        match self {
            Self::TooLong { .. } | Self::Full { .. } | Self::ReadLocked | Self::Busy { .. } => Exit::StoreUnavailable,
            Self::OwnerPassword { .. } => Exit::PermissionDenied,
            Self::Tpm(error) => error.exit(),
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::TooLong { .. } => {
                "seal the container key to fewer recipients, or keep the keys in another kind of store"
            }
            Self::Full { .. } => {
                "delete keys that no volume needs ('cryptattach key list', 'cryptattach key delete'), or keep some in another store"
            }
            Self::ReadLocked => {
                "to change keys, set read_lock = false in the store's section, rebuild the initramfs, and reboot"
            }
            Self::Busy { .. } => "run the command again when that program has ended ('fuser' shows it)",
            Self::OwnerPassword { .. } => {
                "name a file with the password as 'owner_password' in the store's section; reading needs none"
            }
            Self::Tpm(error) => return error.next_step(),
        };
        Some(step.into())
    }
}
