//! Places: where the bytes of a key, or of something that opens it, rest.

use std::path::PathBuf;

/// A path on this host at which key material rests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// What rests there, in words for the user: "sealed key", "owner's private key", "configuration", ...
    pub what: String,
    /// The file, directory or block device.
    pub path: PathBuf,
    /// It helps to open the volume: a sealed key, a private key, a credential. What only says where those are (the
    /// configuration) does not, but it should not be taken with the volume either.
    pub opens: bool,
}
