//! What an error means for the user: its exit code, and the next step. Each error says so beside its variants.

use std::{borrow::Cow, error::Error as StdError, io};

use super::{chain::causes, exit::Exit, key::SecretMemoryError, mapping_name::ParseMappingNameError};

/// What an error means for the user.
pub trait Advice {
    /// The exit code of a command that fails with it.
    fn exit(&self) -> Exit;

    /// What the user can do about it.
    fn next_step(&self) -> Option<Cow<'static, str>>;
}

/// Whether the system has denied permission, as any of the causes.
pub fn is_permission_denied(error: &(dyn StdError + 'static)) -> bool {
    causes(error).any(|cause| {
        let io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        io == Some(io::ErrorKind::PermissionDenied)
    })
}

impl Advice for SecretMemoryError {
    fn exit(&self) -> Exit {
        Exit::System
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        None
    }
}

impl Advice for ParseMappingNameError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        None
    }
}
