//! Places: where the bytes of a key, or of something that opens it, rest.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

/// Where key material rests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// What rests there, in words for the user: "sealed key", "owner's private key", "configuration", ...
    pub what: String,
    pub at: Location,
    /// It helps to open the volume: a sealed key, a private key, a credential. What only says where those are (the
    /// configuration) does not, but it should not be taken with the volume either.
    pub opens: bool,
}

/// Where something rests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Location {
    /// In a file, directory or block device of this host.
    Path(PathBuf),
    /// On a device of an object store.
    Replica(Replica),
    /// In a chip of this machine that is no disk and is behind none.
    Chip {
        /// The chip, in words: "the TPM (IFX)".
        name: String,
    },
    /// On a server, which is asked for it.
    Server {
        /// IP address or name, without port and brackets.
        host: String,
        port: u16,
    },
    /// In parts: whoever has this many of them has the whole.
    Threshold { least: usize, of: Vec<Place> },
    /// Where nothing can be followed: a service's database.
    Elsewhere {
        /// The service, in words: "Barbican's database".
        name: String,
        /// Why it cannot be followed.
        why: String,
    },
}

/// One copy of an object, or of the row that lists it, in an object store like Swift.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// What it is a copy of.
    pub ring: Ring,
    /// IP address or name of the server, without port and brackets.
    pub host: String,
    pub port: u16,
    /// The ring's name of the device: "sdb1".
    pub device: String,
}

/// The rings of Swift: each spreads one kind of thing over the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ring {
    /// Accounts, with the names of their containers.
    Account,
    /// Containers, with the names of their objects.
    Container,
    /// Objects.
    Object,
}

impl Place {
    /// A place on this host.
    pub fn path(what: impl Into<String>, path: impl Into<PathBuf>, opens: bool) -> Self {
        Self { what: what.into(), at: Location::Path(path.into()), opens }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            Location::Path(path) => write!(f, "{} {}", self.what, path.display()),
            Location::Replica(replica) => replica.fmt(f),
            Location::Server { .. } => write!(f, "{} on {}", self.what, self.at),
            Location::Threshold { .. } => f.write_str(&self.what),
            Location::Chip { name } | Location::Elsewhere { name, .. } => write!(f, "{} in {name}", self.what),
        }
    }
}

impl fmt::Display for Location {
    /// A path, a URL, or the name of what is elsewhere.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Replica(Replica { host, port, device, .. }) if host.contains(':') => {
                write!(f, "swift://[{host}]:{port}/{device}")
            }
            Self::Replica(Replica { host, port, device, .. }) => write!(f, "swift://{host}:{port}/{device}"),
            Self::Server { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Server { host, port } => write!(f, "{host}:{port}"),
            Self::Threshold { least, of } => write!(f, "{least} of {} places", of.len()),
            Self::Chip { name } | Self::Elsewhere { name, .. } => f.write_str(name),
        }
    }
}

impl fmt::Display for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the {}'s replica on {} device {}", self.ring, self.host, self.device)
    }
}

impl fmt::Display for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Account => "account",
            Self::Container => "container",
            Self::Object => "object",
        })
    }
}

/// Whether a device of that name is one directory below where a server has its devices, and nothing else.
pub(crate) fn is_device_name(name: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b'?' | b'#' | b'%' | b'"' | b'\\');
    !matches!(name, "" | "." | "..") && name.len() <= 255 && name.bytes().all(fits)
}
