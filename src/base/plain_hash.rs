//! What cryptsetup hashes the passphrase of a plain volume with.

/// How cryptsetup makes the key of a plain volume out of a passphrase from standard input, unless it is told otherwise.
///
/// os-brick tells it nothing, so it is whatever the host's cryptsetup was built with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PlainHash {
    /// cryptsetup before 2.7.
    #[default]
    Ripemd160,
    /// cryptsetup 2.7 and later.
    Sha256,
}
