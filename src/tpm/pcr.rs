//! PCRs: which, and what they hold. SHA-256 bank throughout.

use std::{collections::BTreeMap, fmt, str::FromStr};

use openssl::sha::Sha256;
use serde::{Deserialize, Serialize};
use tss_esapi::tss2_esys as sys;

use super::{Digest, esys::SHA256};
use crate::hex;

/// How many PCRs a PC has (TCG PC Client Platform TPM Profile, section 4.6).
const COUNT: u8 = 24;
/// Bytes of a selection's bitmap.
const BITMAP_BYTES: usize = 3;

/// A set of PCRs, as in `7+11`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct PcrSet(u32);

/// That is no set of PCRs.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' names no PCRs (0 to 23, as in 7+11)")]
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

    pub(super) fn selection(self) -> sys::TPML_PCR_SELECTION {
        let mut list = sys::TPML_PCR_SELECTION { count: 1, ..Default::default() };
        let [a, b, c, _] = self.0.to_le_bytes();
        list.pcrSelections[0] =
            sys::TPMS_PCR_SELECTION { hash: SHA256, sizeofSelect: BITMAP_BYTES as u8, pcrSelect: [a, b, c, 0] };
        list
    }

    pub(super) fn of_selection(list: &sys::TPML_PCR_SELECTION) -> Self {
        let selections = list.pcrSelections.iter().take(list.count as usize);
        let ours = selections.filter(|selection| selection.hash == SHA256);
        ours.fold(Self(0), |set, selection| {
            let [a, b, c, _] = selection.pcrSelect;
            Self(set.0 | u32::from_le_bytes([a, b, c, 0]))
        })
    }

    /// The selection as the TPM hashes it: a marshalled TPML_PCR_SELECTION.
    pub(super) fn marshalled(self) -> Vec<u8> {
        let mut bytes = 1_u32.to_be_bytes().to_vec();
        bytes.extend(SHA256.to_be_bytes());
        bytes.push(BITMAP_BYTES as u8);
        bytes.extend(&self.0.to_le_bytes()[..BITMAP_BYTES]);
        bytes
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

/// Values of PCRs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PcrValues(BTreeMap<u8, PcrValue>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
struct PcrValue(#[serde(with = "hex")] Digest);

impl PcrValues {
    /// Of which PCRs.
    pub fn pcrs(&self) -> PcrSet {
        PcrSet::of(&self.0.keys().copied().collect::<Vec<_>>())
    }

    /// The value of one.
    pub fn get(&self, pcr: u8) -> Option<&Digest> {
        self.0.get(&pcr).map(|value| &value.0)
    }

    /// Adds or replaces one.
    pub fn insert(&mut self, pcr: u8, value: Digest) {
        self.0.insert(pcr, PcrValue(value));
    }

    /// Those of these PCRs.
    pub fn only(&self, pcrs: PcrSet) -> Self {
        Self(self.0.iter().filter(|(pcr, _)| pcrs.contains(**pcr)).map(|(pcr, value)| (*pcr, *value)).collect())
    }

    /// All, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = (u8, &Digest)> {
        self.0.iter().map(|(pcr, value)| (*pcr, &value.0))
    }

    /// The values one after another, hashed: what a policy holds.
    pub fn digest(&self) -> Digest {
        let mut hash = Sha256::new();
        self.0.values().for_each(|value| hash.update(&value.0));
        hash.finish()
    }
}

impl FromIterator<(u8, Digest)> for PcrValues {
    fn from_iter<T: IntoIterator<Item = (u8, Digest)>>(values: T) -> Self {
        Self(values.into_iter().map(|(pcr, value)| (pcr, PcrValue(value))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_parsed_printed_and_marshalled() {
        let set: PcrSet = "11+7".parse().unwrap();
        assert_eq!(set.to_string(), "7+11");
        assert_eq!(set, "7,11".parse().unwrap());
        assert_eq!(set.marshalled(), [0, 0, 0, 1, 0, 0x0B, 3, 0x80, 0x08, 0]);
        assert_eq!(PcrSet::of_selection(&set.selection()), set);
        for wrong in ["", "24", "7+", "a", "-1"] {
            assert!(wrong.parse::<PcrSet>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn values_keep_their_order_as_json() {
        let values: PcrValues = [(11, [1; 32]), (7, [2; 32])].into_iter().collect();
        let json = serde_json::to_string(&values).unwrap();
        assert!(json.starts_with("{\"7\":\"0202"), "{json}");
        assert_eq!(serde_json::from_str::<PcrValues>(&json).unwrap(), values);
    }
}
