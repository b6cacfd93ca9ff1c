//! The counter in the TPM's NV memory that retires old signatures.
//!
//! A counter, not an ordinary index: whoever removes and makes it again gets one that starts above all that there ever were
//! (TPM 2.0 Part 1, section 37.2.4.2), so it never goes down.

use std::fmt;

use serde::{Deserialize, Serialize};
use tss_esapi::constants::tss;

use super::{Name, Tpm, TpmError, error::if_there, esys::SHA256, nv};

/// AUTHREAD and AUTHWRITE stay apart: anyone reads, by the empty password; the owner raises. No dictionary attack
/// protection, for there is nothing to guess. Bits of TPMA_NV (TPM 2.0 Part 2, section 13.4).
const ATTRIBUTES: u32 = nv::OWNERS_TO_READ | COUNTER;
const COUNTER: u32 = (tss::TPM2_NT_COUNTER as u32) << 4;
const COUNTER_BYTES: u16 = 8;

/// The counter at an NV index.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counter(u32);

/// What a counter says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CounterValue(pub u64);

impl Counter {
    /// At this index.
    pub const fn at(index: u32) -> Self {
        Self(index)
    }

    /// Its NV index.
    pub fn index(self) -> u32 {
        self.0
    }

    /// Its name, once it has been written.
    pub fn name(self) -> Name {
        self.name_with(ATTRIBUTES | nv::WRITTEN)
    }

    fn name_with(self, attributes: u32) -> Name {
        let mut public_area = self.0.to_be_bytes().to_vec();
        public_area.extend(SHA256.to_be_bytes());
        public_area.extend(attributes.to_be_bytes());
        public_area.extend(0_u16.to_be_bytes()); // no policy
        public_area.extend(COUNTER_BYTES.to_be_bytes());
        Name::of(&public_area)
    }
}

impl fmt::Display for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:08x}", self.0)
    }
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Tpm {
    /// The counter's value; makes it if it is not there.
    pub fn counter_or_new(&self, counter: Counter) -> Result<CounterValue, TpmError> {
        let index = match if_there(|| self.esys().resident_at(counter.index()))? {
            None => self.esys().nv_define(counter.index(), ATTRIBUTES, COUNTER_BYTES, None)?,
            Some(index) => index,
        };
        // A counter has no value, and not yet its name, until it was raised once. Who made it may have been killed before.
        if self.esys().nv_public(&index, None)?.1 == counter.name_with(ATTRIBUTES) {
            self.esys().nv_increment(&index)?;
        }
        self.counter(counter)
    }

    /// The counter's value, if there is one.
    pub fn counter_if_there(&self, counter: Counter) -> Result<Option<CounterValue>, TpmError> {
        if_there(|| self.counter(counter))
    }

    /// The counter's value.
    pub fn counter(&self, counter: Counter) -> Result<CounterValue, TpmError> {
        let index = self.esys().resident_at(counter.index())?;
        if self.esys().nv_public(&index, None)?.1 != counter.name() {
            return Err(TpmError::Policy(format!("the NV index {counter} is not a counter of cryptattach")));
        }
        Ok(CounterValue(self.esys().nv_read_counter(&index)?))
    }

    /// Raises the counter by one, for good: signatures of the oldest epoch open nothing any more.
    pub fn raise_counter(&self, counter: Counter) -> Result<CounterValue, TpmError> {
        self.counter(counter)?;
        self.esys().nv_increment(&self.esys().resident_at(counter.index())?)?;
        self.counter(counter)
    }
}
