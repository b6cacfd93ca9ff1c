//! The network below the stores: HTTP with bounds and repetition, Keystone's tokens, clouds.yaml.

pub(crate) mod bao;
pub(crate) mod clouds;
pub(crate) mod http;
pub(crate) mod keystone;
#[cfg(test)]
pub(crate) mod testing;

pub use bao::Secrets as BaoSecrets;
pub use clouds::{Cloud, CloudsError, Credentials, Named, Texts};
pub use http::{HttpError, reason_in};
pub use keystone::{AuthError, Caller, SendError, TokenOwner, Verifier};
