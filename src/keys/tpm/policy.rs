//! In which state a key may be used: written down, and computed in software as the TPM computes it (TPM 2.0 Part 3, section
//! 23), so that an administrator can compute it from the written form.

use openssl::sha::Sha256;
use serde::{Deserialize, Serialize};

use super::{Digest, Name, PcrValues, SiteKey, TpmError, counter::Counter, pcr};
use crate::base::pcr_set::PcrSet;

/// How many epochs of signatures a key knows: `TPM2_PolicyOR` takes eight branches.
pub const EPOCHS: u64 = 8;
/// The PCR that is extended once a host has its keys; the TCG leaves 8 to 15 to the operating system, systemd uses 15 for
/// system identity.
pub const LATCH: u8 = 15;

const POLICY_NV: u32 = 0x149;
const POLICY_AUTHORIZE: u32 = 0x16A;
const POLICY_AUTH_VALUE: u32 = 0x16B;
const POLICY_OR: u32 = 0x171;
const POLICY_PCR: u32 = 0x17F;
/// `TPM_EO_UNSIGNED_LE`
const UNSIGNED_LE: u16 = 9;

/// A policy. All that it says must hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// PCRs that must have the values of some signature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signed: Option<SignedPcrs>,
    /// PCRs that must have these values.
    #[serde(default, skip_serializing_if = "is_empty")]
    pub pcrs: PcrValues,
    /// PCR 15 must not have been extended in this boot.
    #[serde(default)]
    pub latch: bool,
    /// The key's PIN must be given.
    #[serde(default)]
    pub pin: bool,
}

/// PCRs that have values which the site has signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedPcrs {
    pub key: SiteKey,
    /// What retires old signatures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revocation: Option<Revocation>,
}

/// A counter in the TPM that retires old signatures: one of epoch `i` counts as long as the counter is not above `base + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revocation {
    pub counter: Counter,
    /// Its value when the host's first key for this site's key was made.
    pub base: u64,
}

fn is_empty(values: &PcrValues) -> bool {
    values.pcrs().is_empty()
}

impl Policy {
    /// Refuses a policy that would hold in any state.
    pub fn check(&self) -> Result<(), TpmError> {
        if self.signed.is_none() && self.pcrs.pcrs().is_empty() {
            return Err(TpmError::Policy("it does not name a PCR: the key would open in any boot state".to_owned()));
        }
        if self.latch && self.pcrs.pcrs().contains(LATCH) {
            return Err(TpmError::Policy(format!("PCR {LATCH} cannot be both latch and literal")));
        }
        Ok(())
    }

    /// The policy's digest, the key's authPolicy.
    pub fn digest(&self) -> Result<Digest, TpmError> {
        let mut digest = match &self.signed {
            None => Running::new(),
            Some(signed) => match signed.branches()?.as_slice() {
                [one] => Running(*one),
                branches => Running::new().or(branches),
            },
        };
        if !self.pcrs.pcrs().is_empty() {
            digest = digest.pcr(self.pcrs.pcrs(), &self.pcrs.digest());
        }
        if self.latch {
            digest = digest.pcr(PcrSet::of(&[LATCH]), &unextended().digest());
        }
        if self.pin {
            digest = digest.auth_value();
        }
        Ok(digest.0)
    }
}

impl SignedPcrs {
    /// The digests that stand for the epochs, one if there is no revocation.
    pub fn branches(&self) -> Result<Vec<Digest>, TpmError> {
        let name = self.key.name()?;
        Ok(match &self.revocation {
            None => vec![Running::authorized(&name, &[]).0],
            Some(revocation) => (0..EPOCHS)
                .map(|epoch| {
                    let most = revocation.base.saturating_add(epoch);
                    Running::authorized(&name, policy_ref(epoch).as_bytes()).counter(&revocation.counter.name(), most).0
                })
                .collect(),
        })
    }
}

/// What a signature of an epoch carries besides the PCR policy. Nothing in epoch 0: those are systemd's signatures.
pub fn policy_ref(epoch: u64) -> String {
    if epoch == 0 { String::new() } else { format!("cryptattach epoch {epoch}") }
}

/// What a site signs: the policy digest of these PCR values.
pub fn pcr_policy(values: &PcrValues) -> Digest {
    Running::new().pcr(values.pcrs(), &values.digest()).0
}

/// What the signature is over: SHA-256 of approved policy and policyRef (TPM 2.0 Part 3, section 23.16, aHash).
pub fn approved_message(approved: &Digest, epoch: u64) -> Vec<u8> {
    [&approved[..], policy_ref(epoch).as_bytes()].concat()
}

/// The latch PCR as it is after power-on.
pub fn unextended() -> PcrValues {
    [(LATCH, [0; 32])].into_iter().collect()
}

/// A policy digest on its way.
struct Running(Digest);

impl Running {
    fn new() -> Self {
        Self([0; 32])
    }

    fn extend(self, parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        hash.update(&self.0);
        parts.iter().for_each(|part| hash.update(part));
        Self(hash.finish())
    }

    fn pcr(self, pcrs: PcrSet, values: &Digest) -> Self {
        self.extend(&[&POLICY_PCR.to_be_bytes(), &pcr::marshalled(pcrs), values])
    }

    fn authorized(key: &Name, policy_ref: &[u8]) -> Self {
        Self::new().extend(&[&POLICY_AUTHORIZE.to_be_bytes(), key.as_bytes()]).extend(&[policy_ref])
    }

    fn counter(self, name: &Name, most: u64) -> Self {
        let mut arguments = Sha256::new();
        arguments.update(&most.to_be_bytes());
        arguments.update(&0_u16.to_be_bytes());
        arguments.update(&UNSIGNED_LE.to_be_bytes());
        self.extend(&[&POLICY_NV.to_be_bytes(), &arguments.finish(), name.as_bytes()])
    }

    fn or(self, branches: &[Digest]) -> Self {
        Self::new().extend(&[&POLICY_OR.to_be_bytes(), &branches.concat()])
    }

    fn auth_value(self) -> Self {
        self.extend(&[&POLICY_AUTH_VALUE.to_be_bytes()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::hex;

    /// systemd-measure 252 on one set of files: `calculate` gave the PCR's value, `sign` the policy.
    #[test]
    fn pcr_policy_as_systemd_measure_computes_it() {
        let digest = |text: &str| Digest::try_from(hex::decode(text).unwrap()).unwrap();
        let pcr_11 = digest("4a6bb2d6efc45facd2a09fe8e7fb4ba2e432ffd1e1d1a14d0d1ea3cfe4e48409");
        let values = [(11, pcr_11)].into_iter().collect();
        let expected = digest("861a7e57d37a04973ca9b36388588988104f7a30c02307324af90d15d9f756bb");
        assert_eq!(pcr_policy(&values), expected);
        let literal = Policy { signed: None, pcrs: values, latch: false, pin: false };
        assert_eq!(literal.digest().unwrap(), expected);
    }

    #[test]
    fn a_policy_that_always_holds_is_refused() {
        let always = Policy { signed: None, pcrs: PcrValues::default(), latch: true, pin: true };
        assert!(always.check().is_err());
        let twice = Policy { signed: None, pcrs: unextended(), latch: true, pin: false };
        assert!(twice.check().is_err());
    }

    #[test]
    fn every_part_counts() {
        let values: PcrValues = [(7, [1; 32])].into_iter().collect();
        let plain = Policy { signed: None, pcrs: values, latch: false, pin: false };
        let others = [
            Policy { latch: true, ..plain.clone() },
            Policy { pin: true, ..plain.clone() },
            Policy { latch: true, pin: true, ..plain.clone() },
            Policy { pcrs: [(7, [2; 32])].into_iter().collect(), ..plain.clone() },
            Policy { pcrs: [(8, [1; 32])].into_iter().collect(), ..plain.clone() },
        ];
        let mut digests: Vec<_> = others.iter().chain([&plain]).map(|policy| policy.digest().unwrap()).collect();
        digests.sort_unstable();
        digests.dedup();
        assert_eq!(digests.len(), 6);
    }
}
