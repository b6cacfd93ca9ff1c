//! Hosts by name, and their lockbox keys: `lockbox/HOST/GENERATION`.

use std::{fmt, str::FromStr};

use super::serde_as_str;

/// The name of a host that may be admitted.
///
/// 1 to 64 characters of `a-z`, `0-9`, `.`, `-` and `_`, beginning with a letter or digit: a DNS name in lower case fits, and
/// it is safe as a file name, an object's name and a command-line argument.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(String);

impl HostName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A text that is no host's name, or no lockbox key's id.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a host name (1 to 64 of a-z, 0-9, '.', '-', '_', starting with a letter or digit)")]
pub struct ParseHostNameError(String);

impl FromStr for HostName {
    type Err = ParseHostNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=64).contains(&text.len())
            && text.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
            && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_'));
        if fits { Ok(Self(text.to_owned())) } else { Err(ParseHostNameError(text.chars().take(80).collect())) }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

serde_as_str!(HostName);

/// The `kid` of a lockbox key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LockboxKeyId {
    pub host: HostName,
    /// Grows with each lockbox key that the host gets: the time at which the key was made, in milliseconds since 1970-01-01
    /// UTC.
    /// A counter could not go on after a removal, which leaves no record to count from.
    pub generation: u64,
}

impl FromStr for LockboxKeyId {
    type Err = ParseHostNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseHostNameError(text.chars().take(80).collect());
        let parts = text.strip_prefix("lockbox/").and_then(|rest| rest.split_once('/'));
        let (host, generation) = parts.ok_or_else(wrong)?;
        // One spelling per number.
        let number = generation.parse().ok().filter(|number: &u64| number.to_string() == generation);
        Ok(Self { host: host.parse()?, generation: number.ok_or_else(wrong)? })
    }
}

impl fmt::Display for LockboxKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lockbox/{}/{}", self.host, self.generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_as_file_names() {
        for right in ["compute-7", "a", "7", "compute-7.example.org", "a_b"] {
            assert_eq!(right.parse::<HostName>().unwrap().as_str(), right);
        }
        for wrong in ["", ".", "..", ".a", "-a", "a/b", "A", "a b", &"a".repeat(65)] {
            assert!(wrong.parse::<HostName>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_lockbox_key_has_exactly_one_spelling() {
        let id: LockboxKeyId = "lockbox/compute-7.example/1700000000".parse().unwrap();
        assert_eq!(id.to_string(), "lockbox/compute-7.example/1700000000");
        for wrong in ["lockbox/a", "lockbox/a/", "lockbox/a/01", "lockbox/a/+1", "lockbox/a/b/1", "a/1", "lockbox//1"] {
            assert!(wrong.parse::<LockboxKeyId>().is_err(), "{wrong}");
        }
    }
}
