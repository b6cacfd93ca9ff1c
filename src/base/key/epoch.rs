//! Container keys by number: `CONTAINER/kek/EPOCH`.

use std::{fmt, num::NonZeroU32, str::FromStr};

use super::{StoreName, serde_as_str};

/// The number of a container key, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(NonZeroU32);

impl Epoch {
    /// The first.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The one after this.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The one before this; `None` before the first.
    pub fn before(self) -> Option<Self> {
        NonZeroU32::new(self.0.get() - 1).map(Self)
    }
}

/// A text that is no epoch, or no container key's id.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a container key's id")]
pub struct ParseEpochError(String);

impl FromStr for Epoch {
    type Err = ParseEpochError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // One spelling per number: it is an object's name.
        let number = text.parse().ok().filter(|number: &NonZeroU32| number.to_string() == text);
        number.map(Self).ok_or_else(|| ParseEpochError(text.to_owned()))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

serde_as_str!(Epoch);

/// The `kid` of a container key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerKeyId {
    pub container: StoreName,
    pub epoch: Epoch,
}

impl FromStr for ContainerKeyId {
    type Err = ParseEpochError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once("/kek/");
        let id = parts.and_then(|(container, epoch)| {
            Some(Self { container: container.parse().ok()?, epoch: epoch.parse().ok()? })
        });
        id.ok_or_else(|| ParseEpochError(text.to_owned()))
    }
}

impl fmt::Display for ContainerKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/kek/{}", self.container, self.epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_exactly_one_spelling() {
        let id: ContainerKeyId = "cinder/kek/12".parse().unwrap();
        assert_eq!((id.to_string().as_str(), id.epoch.next().to_string().as_str()), ("cinder/kek/12", "13"));
        for wrong in
            ["cinder/kek/0", "cinder/kek/01", "cinder/kek/+1", "cinder/kek/", "Cinder/kek/1", "kek/1", "x/kek/1/2"]
        {
            assert!(wrong.parse::<ContainerKeyId>().is_err(), "{wrong}");
        }
    }
}
