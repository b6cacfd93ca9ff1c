//! Sets of PCRs.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// How many PCRs a PC has (TCG PC Client Platform TPM Profile, section 4.6).
const COUNT: u8 = 24;
/// Bytes of a selection's bitmap.
pub const BITMAP_BYTES: usize = 3;

/// A set of PCRs, as in `7+11`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct PcrSet(u32);

/// That is no set of PCRs.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not a list of PCRs (0 to 23, as in 7+11)")]
pub struct ParsePcrSetError(String);

impl PcrSet {
    /// These.
    pub fn of(pcrs: &[u8]) -> Self {
        Self(pcrs.iter().filter(|&&pcr| pcr < COUNT).fold(0, |set, pcr| set | 1 << pcr))
    }

    /// In rising order.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (0..COUNT).filter(move |pcr| self.0 & 1 << pcr != 0)
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether this one is among them.
    pub fn contains(self, pcr: u8) -> bool {
        pcr < COUNT && self.0 & 1 << pcr != 0
    }

    /// All of either.
    pub fn with(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    /// Those of both.
    pub fn common(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }

    /// These, but not those.
    pub fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// The bitmap of a selection, PCR 0 in the lowest bit of the first byte.
    pub fn bitmap(self) -> [u8; BITMAP_BYTES] {
        let [a, b, c, _] = self.0.to_le_bytes();
        [a, b, c]
    }

    /// The set of a bitmap.
    pub fn of_bitmap([a, b, c]: [u8; BITMAP_BYTES]) -> Self {
        Self(u32::from_le_bytes([a, b, c, 0]))
    }
}

impl fmt::Display for PcrSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers: Vec<_> = self.iter().map(|pcr| pcr.to_string()).collect();
        f.write_str(&numbers.join("+"))
    }
}

impl FromStr for PcrSet {
    type Err = ParsePcrSetError;

    fn from_str(text: &str) -> Result<Self, ParsePcrSetError> {
        let wrong = || ParsePcrSetError(text.to_owned());
        let number = |word: &str| word.trim().parse().ok().filter(|pcr: &u8| *pcr < COUNT).ok_or_else(wrong);
        let pcrs: Vec<u8> = text.split(['+', ',']).map(number).collect::<Result<_, _>>()?;
        Ok(Self::of(&pcrs))
    }
}

impl TryFrom<Vec<u8>> for PcrSet {
    type Error = ParsePcrSetError;

    fn try_from(pcrs: Vec<u8>) -> Result<Self, ParsePcrSetError> {
        match pcrs.iter().find(|pcr| **pcr >= COUNT) {
            Some(wrong) => Err(ParsePcrSetError(wrong.to_string())),
            None => Ok(Self::of(&pcrs)),
        }
    }
}

impl From<PcrSet> for Vec<u8> {
    fn from(set: PcrSet) -> Self {
        set.iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_parsed_and_printed() {
        let set: PcrSet = "11+7".parse().unwrap();
        assert_eq!(set.to_string(), "7+11");
        assert_eq!(set, "7,11".parse().unwrap());
        assert_eq!((set.bitmap(), PcrSet::of_bitmap([0x80, 0x08, 0])), ([0x80, 0x08, 0], set));
        for wrong in ["", "24", "7+", "a", "-1"] {
            assert!(wrong.parse::<PcrSet>().is_err(), "{wrong}");
        }
    }
}
