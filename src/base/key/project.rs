//! OpenStack projects: whose key it is.

use std::{fmt, str::FromStr};

use super::serde_as_str;

/// The id of a project, as Keystone has it: 1 to 64 printable ASCII characters without spaces.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProjectId(String);

impl ProjectId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A text that is not a project's id.
#[derive(Debug, thiserror::Error)]
#[error("it is not the id of a project")]
pub struct ParseProjectIdError;

impl FromStr for ProjectId {
    type Err = ParseProjectIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
        fits.then(|| Self(text.to_owned())).ok_or(ParseProjectIdError)
    }
}

impl fmt::Display for ProjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

serde_as_str!(ProjectId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_printable_and_short() {
        let id = "7ed2ee2ba0af4c7ba5b1f1d5a9e2c7f3";
        assert_eq!(id.parse::<ProjectId>().unwrap().to_string(), id);
        for wrong in ["", "a b", "a\n", "\u{1b}[2J", &"a".repeat(65)] {
            assert!(wrong.parse::<ProjectId>().is_err(), "{wrong:?}");
        }
    }
}
