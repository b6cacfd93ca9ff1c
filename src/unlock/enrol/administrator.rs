//! The administrator's side: from a request to an answer. No TPM is needed.
//!
//! The answer admits whoever opens it, and that is the TPM of the request: so nobody has to come back with a proof.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    Answer, EnrolError, Part, Register, Request, Statement, Trust, Vouched,
    credential::{self, Credential, SECRET_BYTES},
    endorsement::Endorsed,
    evidence::{self, refused},
    register::Admitted,
};
use crate::{
    base::{
        clock::now,
        hex,
        key::{HostName, SecretBytes, StoreName},
        pcr_set::PcrSet,
    },
    config::TpmConfig,
    keys::{
        seal::{self, OwnerRecipient},
        tpm::{
            Counter, Digest, PcrValues, Policy, Revocation, SignedPcrs, SiteKey, TpmError,
            public::{name_of, to_pkey},
        },
    },
    sys::state,
    unlock::lockbox,
};

/// How old a request may be.
const MOST_AGE: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// How far the clocks of host and administrator may differ.
const CLOCKS: Duration = Duration::from_secs(60 * 60);

/// What this site asks of the policies of its hosts' keys.
pub struct Site {
    /// The key whose signatures over boot states they follow.
    pub key: Option<SiteKey>,
    /// The counter that retires signatures.
    pub counter: Counter,
    /// The PCRs that must be bound to values, and no others; `None`: any.
    pub pcrs: Option<PcrSet>,
    /// The values that the administrator knows to be right; `None`: those that the request says.
    pub values: Option<PcrValues>,
    /// Whether PCR 15 must not have been extended.
    pub latch: bool,
}

impl Site {
    /// By the configuration of the administrator's machine.
    pub fn of(config: &TpmConfig, values: Option<PcrValues>) -> Result<Self, TpmError> {
        let key = config.site_key.as_deref().map(SiteKey::read).transpose()?;
        Ok(Self {
            key,
            counter: Counter::at(config.counter),
            pcrs: config.pcrs,
            values,
            latch: config.latch.is_wanted(),
        })
    }

    /// The policy that a host of this site should have that says this one; or how they differ.
    ///
    /// Two things are taken from the host: that it wants a PIN besides, and the counter's value, which its TPM certifies.
    pub(super) fn policy_for(&self, said: &Policy) -> Result<Policy, String> {
        let signed = match (&self.key, &said.signed) {
            (None, None) => None,
            (None, Some(said)) => {
                return Err(format!("it trusts signatures by {}, but no site_key is configured here", said.key));
            }
            (Some(key), None) => return Err(format!("it does not trust signatures by the site's key {key}")),
            (Some(key), Some(said)) if said.key != *key => {
                return Err(format!("it trusts signatures by {}, not by the site's key {key}", said.key));
            }
            (Some(key), Some(said)) => match said.revocation {
                Some(Revocation { counter, base }) if counter == self.counter => {
                    Some(SignedPcrs { key: key.clone(), revocation: Some(Revocation { counter, base }) })
                }
                Some(Revocation { counter, .. }) => {
                    return Err(format!("its counter is {counter}; the site's counter is {}", self.counter));
                }
                None => return Err("it has no counter that retires signatures".to_owned()),
            },
        };
        let bound = said.pcrs.pcrs();
        if let Some(pcrs) = self.pcrs.filter(|pcrs| *pcrs != bound) {
            return Err(format!("it binds the values of PCR {bound}; expected PCR {pcrs}"));
        }
        if said.latch != self.latch {
            let how = |latch| if latch { "with" } else { "without" };
            return Err(format!("it is {} the latch; the site's is {}", how(said.latch), how(self.latch)));
        }
        let pcrs = match &self.values {
            None => said.pcrs.clone(),
            Some(values) => values.only(bound),
        };
        for (pcr, said) in said.pcrs.iter() {
            match pcrs.get(pcr) {
                None => {
                    return Err(format!(
                        "it binds PCR {pcr} to {}, which nothing confirms (--pcr-values, --trust-pcr-values)",
                        hex::encode(said)
                    ));
                }
                Some(value) if value != said => {
                    return Err(format!(
                        "it binds PCR {pcr} to {}; expected {}",
                        hex::encode(said),
                        hex::encode(value)
                    ));
                }
                Some(_) => {}
            }
        }
        if signed.is_none() && pcrs.iter().all(|(_, value)| *value == [0; 32]) && !pcrs.pcrs().is_empty() {
            return Err(format!(
                "PCR {bound} are as after power-on: nothing was measured, and any boot state opens the key"
            ));
        }
        Ok(Policy { signed, pcrs, latch: self.latch, pin: said.pin })
    }
}

/// A host whose request is in order; whether its key is in its TPM, its TPM will show.
pub struct Candidate {
    pub host: HostName,
    pub policy: Policy,
    /// When it asked, in seconds since 1970, by its clock.
    pub asked: u64,
    /// Fingerprint of its endorsement key.
    pub endorsement_key: Digest,
    /// What that is believed for.
    pub vouched: Vouched,
    /// Who says that the endorsement key is a real TPM's, as its certificate says. Nobody has checked that.
    pub claimed: Option<String>,
    /// As the register knows the host, if it is admitted now.
    pub known: Option<Admitted>,
    enrolment: Digest,
    statement: Statement,
    endorsed: Endorsed,
}

/// What admits a host: whom its lockbox key is sealed to, and what its TPM opens to be that.
pub struct Admission {
    candidate: Candidate,
    credential: Credential,
    kid: String,
}

impl Candidate {
    /// Whether this very request has admitted the host.
    pub fn is_admitted(&self) -> bool {
        self.known.as_ref().is_some_and(|known| known.enrolment == self.enrolment)
    }

    /// A new share for the host, in a credential that only its TPM opens; and the recipient that its lockbox key is sealed to.
    pub fn admission(self) -> Result<(Admission, seal::Candidate), EnrolError> {
        let share = SecretBytes::random(SECRET_BYTES)?;
        let credential = credential::make(&self.endorsed.key, &name_of(&self.statement.attestation_key)?, &share)?;
        let identity = OwnerRecipient::of_public(to_pkey(&self.statement.identity)?)?;
        let kid = identity.kid().to_owned();
        Ok((Admission { candidate: self, credential, kid }, seal::Candidate { identity, share }))
    }
}

impl Admission {
    /// What the register is to say of the host, and what the host is to get.
    pub fn admitted(
        self,
        lockbox: &lockbox::Admission,
        lockbox_store: StoreName,
        stores: Vec<StoreName>,
    ) -> (Admitted, Answer) {
        let Self { candidate, credential, kid } = self;
        let answer = Answer {
            host: candidate.host.clone(),
            enrolment: candidate.enrolment,
            endorsement_key: candidate.endorsed.name,
            credential: credential.id_object,
            secret: credential.encrypted_seed,
            store: lockbox_store.clone(),
            generation: lockbox.generation,
            lockbox_key: lockbox.fingerprint.clone(),
        };
        let admitted = Admitted {
            host: candidate.host,
            kid,
            endorsement_key: candidate.endorsement_key,
            vouched: candidate.vouched,
            storage_root: candidate.statement.storage_root,
            policy: candidate.policy,
            enrolment: candidate.enrolment,
            before: Vec::new(),
            admitted: now(),
            generation: lockbox.generation,
            lockbox_key: lockbox.fingerprint.clone(),
            lockbox_store,
            stores,
            removed: None,
        };
        (admitted, answer)
    }
}

/// The administrator's machine.
pub struct Administrator {
    answers: PathBuf,
    register: Register,
}

impl Administrator {
    /// The one with this state directory.
    pub fn of(state: &Path) -> Self {
        Self { answers: state.join("answers"), register: Register::of(state) }
    }

    /// The hosts that are admitted.
    pub fn register(&self) -> &Register {
        &self.register
    }

    /// Checks a request, which came in this file.
    pub fn examine(&self, request: &Request, path: &Path, trust: &Trust, site: &Site) -> Result<Candidate, EnrolError> {
        let (statement, enrolment) = (request.statement(path)?, request.digest());
        check_time(&statement)?;
        evidence::check(request, &statement, site)?;
        let endorsed = trust.choose(&statement)?;
        let known = self.known(&statement.host, &endorsed.fingerprint, &enrolment)?;
        Ok(Candidate {
            host: statement.host.clone(),
            policy: statement.policy.clone(),
            asked: statement.created,
            endorsement_key: endorsed.fingerprint,
            vouched: endorsed.vouched.clone(),
            claimed: endorsed.claimed.clone(),
            known,
            enrolment,
            statement,
            endorsed,
        })
    }

    /// The host has all that it was to get: it stands in the register, and its answer can be had again.
    pub fn admitted(&self, admitted: Admitted, answer: &Answer) -> Result<Admitted, EnrolError> {
        state::write(&self.file(&answer.host), answer)?;
        let before = self.register.get(&admitted.host)?.map(Admitted::all_requests).unwrap_or_default();
        let admitted = Admitted { before, ..admitted };
        self.register.put(&admitted)?;
        Ok(admitted)
    }

    /// The answer to the request that admitted this host.
    pub fn answer(&self, admitted: &Admitted) -> Result<Answer, EnrolError> {
        let answer: Option<Answer> = state::read(&self.file(&admitted.host))?;
        let is_to_it = |answer: &Answer| answer.enrolment == admitted.enrolment;
        let used = || EnrolError::Replayed { host: admitted.host.clone(), admitted: admitted.admitted };
        answer.filter(is_to_it).ok_or_else(used)
    }

    /// The host as it is admitted now. One request admits one host once; a host's name and its TPM belong together.
    fn known(
        &self,
        host: &HostName,
        endorsement_key: &Digest,
        enrolment: &Digest,
    ) -> Result<Option<Admitted>, EnrolError> {
        let known = self.register.get(host)?;
        let is_now = |known: &Admitted| known.removed.is_none() && known.enrolment == *enrolment;
        if let Some(known) = known.as_ref().filter(|known| known.was_by(enrolment) && !is_now(known)) {
            return Err(EnrolError::Replayed { host: known.host.clone(), admitted: known.admitted });
        }
        for known in self.register.all()?.into_iter().filter(|known| known.removed.is_none()) {
            let (same_name, same_tpm) = (known.host == *host, known.endorsement_key == *endorsement_key);
            if same_name && !same_tpm {
                let (known, seen) = (hex::encode(&known.endorsement_key), hex::encode(endorsement_key));
                return Err(EnrolError::OtherTpm { host: host.clone(), known, seen });
            }
            if same_tpm && !same_name {
                return Err(EnrolError::OtherName { host: host.clone(), known: known.host });
            }
        }
        Ok(known.filter(|known| known.removed.is_none()))
    }

    fn file(&self, host: &HostName) -> PathBuf {
        self.answers.join(format!("{host}.json"))
    }
}

fn check_time(statement: &Statement) -> Result<(), EnrolError> {
    let (now, created) = (Duration::from_secs(now()), Duration::from_secs(statement.created));
    let no = |why: String| Err(refused(statement, Part::Time, why));
    match () {
        () if created > now + CLOCKS => no("it is in the future: compare the two machines' clocks".to_owned()),
        () if created + MOST_AGE < now => no(format!("it is {} days ago", (now - created).as_secs() / 86400)),
        () => Ok(()),
    }
}
