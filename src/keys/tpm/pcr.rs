//! What PCRs hold, and sets of them as the TPM takes them. SHA-256 bank throughout.

use std::collections::BTreeMap;

use openssl::sha::Sha256;
use serde::{Deserialize, Serialize};
use tss_esapi::tss2_esys as sys;

use super::{Digest, esys::SHA256};
use crate::base::{
    hex,
    pcr_set::{BITMAP_BYTES, ParsePcrSetError, PcrSet},
};

/// A set as the TPM takes it.
pub(super) fn selection(set: PcrSet) -> sys::TPML_PCR_SELECTION {
    let mut list = sys::TPML_PCR_SELECTION { count: 1, ..Default::default() };
    let [a, b, c] = set.bitmap();
    list.pcrSelections[0] =
        sys::TPMS_PCR_SELECTION { hash: SHA256, sizeofSelect: BITMAP_BYTES as u8, pcrSelect: [a, b, c, 0] };
    list
}

/// The set that the TPM answers with.
pub(super) fn of_selection(list: &sys::TPML_PCR_SELECTION) -> PcrSet {
    let selections = list.pcrSelections.iter().take(list.count as usize);
    let ours = selections.filter(|selection| selection.hash == SHA256);
    ours.fold(PcrSet::default(), |set, selection| {
        let [a, b, c, _] = selection.pcrSelect;
        set.with(PcrSet::of_bitmap([a, b, c]))
    })
}

/// The selection as the TPM hashes it: a marshalled TPML_PCR_SELECTION.
pub(super) fn marshalled(set: PcrSet) -> Vec<u8> {
    let mut bytes = 1_u32.to_be_bytes().to_vec();
    bytes.extend(SHA256.to_be_bytes());
    bytes.push(BITMAP_BYTES as u8);
    bytes.extend(set.bitmap());
    bytes
}

/// Values of PCRs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<u8, PcrValue>", into = "BTreeMap<u8, PcrValue>")]
pub struct PcrValues(BTreeMap<u8, PcrValue>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PcrValue(#[serde(with = "hex")] Digest);

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

impl TryFrom<BTreeMap<u8, PcrValue>> for PcrValues {
    type Error = ParsePcrSetError;

    /// A value of a PCR that does not exist would go into the digest, but not into the selection.
    fn try_from(values: BTreeMap<u8, PcrValue>) -> Result<Self, ParsePcrSetError> {
        PcrSet::try_from(values.keys().copied().collect::<Vec<_>>()).map(|_| Self(values))
    }
}

impl From<PcrValues> for BTreeMap<u8, PcrValue> {
    fn from(values: PcrValues) -> Self {
        values.0
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
    fn sets_are_marshalled() {
        let set = PcrSet::of(&[7, 11]);
        assert_eq!(marshalled(set), [0, 0, 0, 1, 0, 0x0B, 3, 0x80, 0x08, 0]);
        assert_eq!(of_selection(&selection(set)), set);
    }

    #[test]
    fn values_keep_their_order_as_json() {
        let values: PcrValues = [(11, [1; 32]), (7, [2; 32])].into_iter().collect();
        let json = serde_json::to_string(&values).unwrap();
        assert!(json.starts_with("{\"7\":\"0202"), "{json}");
        assert_eq!(serde_json::from_str::<PcrValues>(&json).unwrap(), values);
        let error = serde_json::from_str::<PcrValues>(&json.replace("\"7\"", "\"24\"")).unwrap_err().to_string();
        assert!(error.contains("0 to 23"), "{error}");
    }
}
