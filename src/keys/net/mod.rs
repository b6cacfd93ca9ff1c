//! The network below the stores: HTTP with bounds and repetition, Keystone's tokens, clouds.yaml.

pub(crate) mod clouds;
pub(crate) mod http;
pub(crate) mod keystone;

pub use clouds::CloudsError;
pub use http::{HttpError, TRYING_AGAIN};
pub use keystone::{AuthError, SendError};
