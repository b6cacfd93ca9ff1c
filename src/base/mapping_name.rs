//! Names of mappings.

use std::{fmt, str::FromStr};

/// The name of a mapping: 1 to 127 characters of `A-Z a-z 0-9 # + - . : = @ _`, not starting with `-` or `.`.
///
/// That is udev's set of characters that device-mapper does not mangle, without `/`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MappingName(String);

/// A text that is no mapping name.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a mapping name (1 to 127 of A-Z a-z 0-9 # + - . : = @ _, not starting with '-' or '.')")]
pub struct ParseMappingNameError(String);

impl MappingName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MappingName {
    type Err = ParseMappingNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // 127: DM_NAME_LEN is 128 with its NUL (linux/dm-ioctl.h).
        let fits = (1..=127).contains(&text.len())
            && !text.starts_with(['-', '.'])
            && text != "control"
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&b));
        if fits { Ok(Self(text.to_owned())) } else { Err(ParseMappingNameError(text.to_owned())) }
    }
}

impl fmt::Display for MappingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

crate::base::key::serde_as_str!(MappingName);
