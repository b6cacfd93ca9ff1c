//! Satisfying a policy: first it is looked whether it can be, so that a failure has an explanation; then the TPM is convinced.

use super::{
    Digest, Explanation, Finding, Handle, IdentityFile, PcrSignature, PcrSignatures, PcrValues, Policy, Revocation,
    SignedPcrs, Tpm, TpmError,
    policy::{EPOCHS, LATCH, pcr_policy, policy_ref, unextended},
};
use crate::base::pcr_set::PcrSet;

/// How many of the last events of a PCR an explanation shows.
const EVENTS_SHOWN: usize = 3;

/// A policy that holds in the present state, with what shows it.
pub struct Satisfiable<'a> {
    policy: &'a Policy,
    signature: Option<(&'a SignedPcrs, PcrSignature)>,
}

impl Satisfiable<'_> {
    pub(super) fn policy(&self) -> &Policy {
        self.policy
    }
}

impl Tpm {
    /// Whether the policy holds now; else why not. Reads PCRs and counter, changes nothing.
    pub fn satisfiable<'a>(&self, policy: &'a Policy, signatures: &PcrSignatures) -> Result<Satisfiable<'a>, TpmError> {
        let mut findings = self.differing(&policy.pcrs)?;
        if policy.latch && self.is_latched()? {
            findings.push(Finding::Latched);
        }
        let mut signature = None;
        if let Some(signed) = &policy.signed {
            match self.signature_for_now(signed, signatures, 0)? {
                Ok(found) => signature = Some((signed, found)),
                Err(more) => findings.extend(more),
            }
        }
        if !findings.is_empty() {
            return Err(TpmError::NotThisState(Box::new(Explanation { findings })));
        }
        Ok(Satisfiable { policy, signature })
    }

    /// Convinces the TPM in this session.
    pub(super) fn satisfy(&self, session: &Handle<'_>, now: &Satisfiable<'_>) -> Result<(), TpmError> {
        let esys = self.esys();
        let satisfy = || {
            if let Some((signed, signature)) = &now.signature {
                self.satisfy_signed(session, signed, signature)?;
            }
            let pcrs = &now.policy.pcrs;
            if !pcrs.pcrs().is_empty() {
                esys.policy_pcr(session, pcrs.pcrs(), Some(&pcrs.digest()))?;
            }
            if now.policy.latch {
                esys.policy_pcr(session, PcrSet::of(&[LATCH]), Some(&unextended().digest()))?;
            }
            if now.policy.pin {
                esys.policy_auth_value(session)?;
            }
            Ok(())
        };
        satisfy().map_err(not_this_state)
    }

    fn satisfy_signed(
        &self,
        session: &Handle<'_>,
        signed: &SignedPcrs,
        signature: &PcrSignature,
    ) -> Result<(), TpmError> {
        let esys = self.esys();
        esys.policy_pcr(session, signature.pcrs, None)?;
        {
            let key = esys.load_external(&signed.key.public()?)?;
            let ticket = esys.verify_signature(&key, &signature.digest(), &signature.for_tpm(&signed.key)?)?;
            let reference = policy_ref(signature.epoch);
            let name = signed.key.name()?;
            esys.policy_authorize(session, &signature.policy, reference.as_bytes(), &name, &ticket)?;
        }
        if let Some(revocation) = &signed.revocation {
            let counter = esys.resident_at(revocation.counter.index())?;
            esys.policy_counter(session, &counter, revocation.base.saturating_add(signature.epoch))?;
            esys.policy_or(session, &signed.branches()?)?;
        }
        Ok(())
    }

    /// Raises the counter by one, so that signatures of the oldest epoch open nothing any more, for good. Returns the oldest
    /// epoch that counts from now on.
    ///
    /// First the TPM must take, in a real session, a signature of a later epoch for the present boot state: a host must not
    /// lock itself out.
    pub fn retire_oldest_epoch(&self, file: &IdentityFile, signatures: &PcrSignatures) -> Result<u64, TpmError> {
        let signed = file.policy.signed.as_ref();
        let Some((signed, revocation)) = signed.and_then(|signed| Some((signed, signed.revocation?))) else {
            return Err(TpmError::Policy(
                "the key's policy has no counter, so its signatures cannot be retired".to_owned(),
            ));
        };
        let oldest = self.counter(revocation.counter)?.0.saturating_sub(revocation.base);
        if oldest + 1 >= EPOCHS {
            return Err(TpmError::Policy(format!(
                "the key has {EPOCHS} epochs, and this is the last: make another site key, and enrol the host anew"
            )));
        }
        let later = match self.signature_for_now(signed, signatures, oldest + 1)? {
            Ok(later) => later,
            Err(findings) => return Err(TpmError::NotThisState(Box::new(Explanation { findings }))),
        };
        let part = Policy { signed: Some(signed.clone()), pcrs: PcrValues::default(), latch: false, pin: false };
        self.identity(file)?.test(&Satisfiable { policy: &part, signature: Some((signed, later)) })?;
        let raised = self.raise_counter(revocation.counter)?;
        Ok(raised.0.saturating_sub(revocation.base))
    }

    /// A signature by the site's key for the present state, of an epoch that counts and is not below `least`; or why there is
    /// none.
    fn signature_for_now(
        &self,
        signed: &SignedPcrs,
        signatures: &PcrSignatures,
        least: u64,
    ) -> Result<Result<PcrSignature, Vec<Finding>>, TpmError> {
        let fingerprint = signed.key.fingerprint()?;
        let ours: Vec<_> = signatures.signatures.iter().filter(|entry| entry.fingerprint == fingerprint).collect();
        let pcrs = ours.iter().fold(PcrSet::default(), |all, entry| all.with(entry.pcrs));
        let present = if pcrs.is_empty() { Default::default() } else { self.pcr_values(pcrs)? };
        let policy_now = |pcrs: PcrSet| pcr_policy(&present.only(pcrs));
        let oldest = match &signed.revocation {
            Some(Revocation { counter, base }) => match self.counter_if_there(*counter)? {
                Some(value) => value.0.saturating_sub(*base),
                None => return Ok(Err(vec![Finding::NoCounter { counter: *counter }])),
            },
            None => 0,
        }
        .max(least);
        let mut retired = None;
        for entry in &ours {
            let fits = !entry.pcrs.is_empty() && entry.policy == policy_now(entry.pcrs) && entry.is_by(&signed.key)?;
            // Without a counter in the policy there are no epochs in it either.
            let known = entry.epoch < if signed.revocation.is_some() { EPOCHS } else { 1 };
            match fits && known {
                true if entry.epoch >= oldest => return Ok(Ok((*entry).clone())),
                true => retired = retired.max(Some(entry.epoch)),
                false => {}
            }
        }
        if let Some(epoch) = retired {
            return Ok(Err(vec![Finding::Retired { epoch, oldest }]));
        }
        // Where signers have said the values, it can be said what differs from the state that is the closest.
        let said = ours.iter().filter_map(|entry| entry.values.as_ref());
        let closest =
            said.min_by_key(|values| values.iter().filter(|(pcr, value)| present.get(*pcr) != Some(*value)).count());
        if let Some(values) = closest {
            let differing = self.differing(values)?;
            if !differing.is_empty() {
                return Ok(Err(differing));
            }
        }
        let events = pcrs.iter().flat_map(|pcr| self.event_log().last(pcr, EVENTS_SHOWN)).collect();
        let (key, files) = (signed.key.to_string(), signatures.files.clone());
        Ok(Err(vec![Finding::NoSignature { key, signatures: ours.len(), files, present, events }]))
    }

    /// The PCRs that have other values than expected.
    fn differing(&self, expected: &PcrValues) -> Result<Vec<Finding>, TpmError> {
        if expected.pcrs().is_empty() {
            return Ok(Vec::new());
        }
        let present = self.pcr_values(expected.pcrs())?;
        let pairs = expected.iter().zip(present.iter()).filter(|(expected, seen)| expected != seen);
        let finding = |((pcr, expected), (_, seen)): ((u8, &Digest), (u8, &Digest))| Finding::Pcr {
            pcr,
            expected: *expected,
            seen: *seen,
            events: self.event_log().last(pcr, EVENTS_SHOWN),
        };
        Ok(pairs.map(finding).collect())
    }
}

/// A refusal on account of the policy, as such: a PCR may have changed since it was looked at.
pub(super) fn not_this_state(error: TpmError) -> TpmError {
    match error {
        TpmError::Refused { command, code }
            if code.is_policy() || (code.is_value() && command.starts_with("Policy")) || code.is_signature() =>
        {
            let findings = vec![Finding::Refused { command, code: code.0 }];
            TpmError::NotThisState(Box::new(Explanation { findings }))
        }
        other => other,
    }
}
