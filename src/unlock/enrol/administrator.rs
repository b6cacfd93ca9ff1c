//! The administrator's side: from a bundle to a challenge, from an answer to an admission. No TPM is needed.
//!
//! What is kept of a challenge is the digest of the only right answer: not even who reads the administrator's files can answer in
//! a host's place.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use openssl::{
    memcmp,
    pkey::{PKey, Public},
    sha::sha256,
};
use serde::{Deserialize, Serialize};

use super::{
    Bundle, Challenge, Document, EnrolAnswer, EnrolError, Part, Register, Statement, Trust, Vouched,
    credential::{self, SECRET_BYTES, answer_mac},
    document::sized,
    endorsement::Endorsed,
    evidence::{self, refused},
    register::{Admitted, remove},
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
        seal::OwnerRecipient,
        tpm::{
            Counter, Digest, Name, PcrValues, Policy, Revocation, SignedPcrs, SiteKey, TpmError,
            public::{name_of, to_pkey},
        },
    },
    sys::{durable, state},
    unlock::lockbox,
};

/// How old a bundle may be.
const MOST_AGE: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// How far the clocks of host and administrator may differ.
const CLOCKS: Duration = Duration::from_secs(60 * 60);
const END: &str = ".json";

/// What this site asks of the policies of its hosts' keys.
pub struct Site {
    /// The key whose signatures over boot states they follow.
    pub key: Option<SiteKey>,
    /// The counter that retires signatures.
    pub counter: Counter,
    /// The PCRs that must be bound to values, and no others; `None`: any.
    pub pcrs: Option<PcrSet>,
    /// The values that the administrator knows to be right; `None`: those that the bundle says.
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

/// A challenge, and what the administrator should see before it is sent.
pub struct Issued {
    /// The challenge, for the host.
    pub challenge: Challenge,
    pub policy: Policy,
    /// Fingerprint of its endorsement key.
    pub endorsement_key: Digest,
    /// What that is believed for.
    pub vouched: Vouched,
}

/// What is kept of a challenge until it is answered.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pending {
    host: HostName,
    #[serde(with = "hex")]
    enrolment: Digest,
    #[serde(with = "sized")]
    identity: tss_esapi::structures::Public,
    storage_root: Name,
    policy: Policy,
    #[serde(with = "hex")]
    endorsement_key: Digest,
    vouched: Vouched,
    expires: u64,
    /// SHA-256 of the right answer's MAC.
    #[serde(with = "hex")]
    answer: Digest,
}

/// A host that has proved itself: whom to seal to.
pub struct Admission {
    id: Digest,
    pending: Pending,
    key: PKey<Public>,
    kid: String,
}

impl Admission {
    /// The host.
    pub fn host(&self) -> &HostName {
        &self.pending.host
    }

    /// Its identity key: whom its lockbox key is sealed to.
    pub fn recipient(&self) -> Result<OwnerRecipient, EnrolError> {
        Ok(OwnerRecipient::of_public(self.key.clone())?)
    }

    /// What the register is to say of it.
    pub fn admitted(&self, lockbox: &lockbox::Admission, lockbox_store: StoreName, stores: Vec<StoreName>) -> Admitted {
        Admitted {
            host: self.pending.host.clone(),
            kid: self.kid.clone(),
            endorsement_key: self.pending.endorsement_key,
            vouched: self.pending.vouched.clone(),
            storage_root: self.pending.storage_root,
            policy: self.pending.policy.clone(),
            enrolment: self.pending.enrolment,
            before: Vec::new(),
            admitted: now(),
            generation: lockbox.generation,
            lockbox_key: lockbox.fingerprint.clone(),
            lockbox_store,
            stores,
            removed: None,
        }
    }
}

/// The administrator's machine.
pub struct Administrator {
    challenges: PathBuf,
    register: Register,
}

impl Administrator {
    /// The one with this state directory.
    pub fn of(state: &Path) -> Self {
        Self { challenges: state.join("challenges"), register: Register::of(state) }
    }

    /// The hosts that are admitted.
    pub fn register(&self) -> &Register {
        &self.register
    }

    /// Checks a bundle and makes a challenge that only the TPM in it can answer.
    pub fn challenge(&self, path: &Path, trust: &Trust, site: &Site, valid: Duration) -> Result<Issued, EnrolError> {
        let bundle: Bundle = Bundle::read(path)?;
        let statement = bundle.statement(path)?;
        check_time(&statement)?;
        evidence::check(&bundle, &statement, site)?;
        let endorsed = trust.choose(&statement)?;
        self.check_known(&statement.host, &endorsed.fingerprint, &bundle.digest())?;
        self.forget_expired()?;
        self.issue(statement, bundle.digest(), endorsed, valid)
    }

    fn issue(
        &self,
        statement: Statement,
        enrolment: Digest,
        endorsed: Endorsed,
        valid: Duration,
    ) -> Result<Issued, EnrolError> {
        let secret = SecretBytes::random(SECRET_BYTES)?;
        let credential = credential::make(&endorsed.key, &name_of(&statement.attestation_key)?, &secret)?;
        let mut id = [0; 32];
        openssl::rand::rand_bytes(&mut id)?;
        let challenge = Challenge {
            id,
            host: statement.host.clone(),
            enrolment,
            endorsement_key: endorsed.name,
            credential: credential.id_object,
            secret: credential.encrypted_seed,
            expires: now() + valid.as_secs(),
        };
        let pending = Pending {
            host: statement.host,
            enrolment,
            identity: statement.identity,
            storage_root: statement.storage_root,
            policy: statement.policy,
            endorsement_key: endorsed.fingerprint,
            vouched: endorsed.vouched,
            expires: challenge.expires,
            answer: sha256(&answer_mac(&secret, &id, &enrolment, &challenge.host)?),
        };
        state::write(&self.file(&id), &pending)?;
        let Pending { policy, endorsement_key, vouched, .. } = pending;
        Ok(Issued { challenge, policy, endorsement_key, vouched })
    }

    /// Checks an answer. The challenge stays open until [`Administrator::admitted`] says that the host has what it should.
    pub fn verify(&self, answer: &EnrolAnswer) -> Result<Admission, EnrolError> {
        let id = answer.challenge;
        let pending: Option<Pending> = state::read(&self.file(&id))?;
        let pending = pending.ok_or_else(|| EnrolError::NoChallenge(hex::encode(&id)))?;
        let host = pending.host.clone();
        if pending.expires < now() {
            remove(&self.file(&id))?;
            return Err(EnrolError::Expired { host, ago_seconds: now() - pending.expires });
        }
        if (&answer.host, &answer.enrolment) != (&pending.host, &pending.enrolment) {
            let words =
                |host: &HostName, digest: &Digest| format!("'{host}', enrolment {}", &hex::encode(digest)[..16]);
            return Err(EnrolError::OtherAnswer {
                answered: words(&answer.host, &answer.enrolment),
                challenged: words(&pending.host, &pending.enrolment),
            });
        }
        if !memcmp::eq(&sha256(&answer.mac), &pending.answer) {
            return Err(EnrolError::WrongAnswer(host));
        }
        // Of the challenges that were open at once, for one bundle or one name, only one is good for an admission.
        self.check_known(&host, &pending.endorsement_key, &pending.enrolment)?;
        let key = to_pkey(&pending.identity)?;
        let kid = OwnerRecipient::of_public(key.clone())?.kid().to_owned();
        Ok(Admission { id, pending, key, kid })
    }

    /// The host has all that it was to get: it stands in the register, and its challenge is closed.
    pub fn admitted(&self, admission: &Admission, admitted: &Admitted) -> Result<(), EnrolError> {
        let before = self.register.get(&admitted.host)?.map(Admitted::all_bundles).unwrap_or_default();
        self.register.put(&Admitted { before, ..admitted.clone() })?;
        remove(&self.file(&admission.id))
    }

    /// One bundle admits one host once; a host's name and its TPM belong together.
    fn check_known(&self, host: &HostName, endorsement_key: &Digest, enrolment: &Digest) -> Result<(), EnrolError> {
        if let Some(known) = self.register.get(host)?.filter(|known| known.was_by(enrolment)) {
            return Err(EnrolError::Replayed { host: known.host, admitted: known.admitted });
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
        Ok(())
    }

    fn forget_expired(&self) -> Result<(), EnrolError> {
        let failed = |source| EnrolError::File { action: "read", path: self.challenges.clone(), source };
        for name in durable::stems(&self.challenges, END).map_err(failed)? {
            let path = self.challenges.join(format!("{name}{END}"));
            if state::read::<Pending>(&path)?.is_some_and(|pending| pending.expires < now()) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn file(&self, id: &Digest) -> PathBuf {
        self.challenges.join(format!("{}{END}", hex::encode(id)))
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
