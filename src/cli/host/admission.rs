//! The administrator's verbs: `challenge`, `admit`.

use std::{collections::BTreeSet, fs, path::PathBuf, time::Duration};

use clap::{ArgGroup, Args};
use serde_json::json;

use super::{Global, names, record, withdraw};
use crate::{
    base::{hex, key::StoreName},
    cli::{output, policy},
    keys::{
        seal::Recipient,
        tpm::{Digest, PcrValues, TpmError},
    },
    unlock::{
        container::{Container, Use},
        enrol::{Administrator, Admitted, Document, EnrolAnswer, Issued, Site, Trust, Vouched},
        lockbox,
    },
    verbs::error::Error,
};

/// Check a host's bundle and make a challenge that only its TPM can answer
///
/// Needs no TPM. [tpm] in this machine's configuration sets the policy that the host's key must have: site_key,
/// counter, pcrs, latch.
#[derive(Args)]
#[command(
    group = ArgGroup::new("trust").required(true).args(["ca", "ek", "trust_first_use"]),
    group = ArgGroup::new("state").args(["pcr_values", "trust_pcr_values"]),
    after_help = "Examples:
  cryptattach host challenge compute-7.bundle --ca /etc/tpm-makers --output compute-7.challenge
  cryptattach host challenge compute-7.bundle --ek 3b1c… --pcr-values golden.json --output compute-7.challenge
      (golden.json: 'cryptattach policy show --json | jq .pcrs' on a host whose boot is known to be right)"
)]
pub struct Challenge {
    /// The host's bundle
    bundle: PathBuf,
    /// Folder with the certificates of TPM makers, one of which must have certified the endorsement key
    #[arg(long, value_name = "FOLDER")]
    ca: Option<PathBuf>,
    /// The endorsement key's fingerprint, as 'host enrol' showed it on the host's own console
    #[arg(long, value_name = "FINGERPRINT", value_parser = fingerprint)]
    ek: Option<[u8; 32]>,
    /// Trust the endorsement key without proof that it belongs to a real TPM
    #[arg(long)]
    trust_first_use: bool,
    /// The good values of PCRs (JSON: {"7": "HEX", ...}), for keys that are bound to values
    #[arg(long, value_name = "FILE")]
    pcr_values: Option<PathBuf>,
    /// Trust the boot state that the host's key is bound to, without proof that it is good
    #[arg(long)]
    trust_pcr_values: bool,
    /// Time within which the host must answer the challenge
    #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=720))]
    valid_hours: u16,
    /// New file for the challenge
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

fn fingerprint(text: &str) -> Result<Digest, String> {
    let digest = hex::decode(text).and_then(|bytes| bytes.try_into().ok());
    digest.ok_or_else(|| "64 hexadecimal digits".to_owned())
}

impl Challenge {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        if self.output.exists() {
            return Err(Error::Exists(self.output.clone()));
        }
        let site = Site::of(&config.tpm, self.values()?)?;
        let valid = Duration::from_secs(u64::from(self.valid_hours) * 60 * 60);
        let issued = Administrator::of(&config.state).challenge(&self.bundle, &self.trust(), &site, valid)?;
        issued.challenge.write(&self.output)?;
        record(&config, "host challenge", &issued.challenge.host, None);
        self.show(&issued, global.json)
    }

    fn trust(&self) -> Trust {
        match (&self.ca, self.ek) {
            (Some(folder), _) => Trust::Authorities(folder.clone()),
            (_, Some(fingerprint)) => Trust::Fingerprint(fingerprint),
            _ => Trust::FirstUse,
        }
    }

    /// Without either option no value is believed: a policy may then follow signatures only.
    fn values(&self) -> Result<Option<PcrValues>, Error> {
        let Some(path) = &self.pcr_values else {
            return Ok((!self.trust_pcr_values).then(PcrValues::default));
        };
        let json = fs::read(path).map_err(Error::io(format!("read {}", path.display())))?;
        let why = |error| TpmError::Malformed { path: path.clone(), why: format!("has no values of PCRs: {error}") };
        Ok(Some(serde_json::from_slice(&json).map_err(why)?))
    }

    fn show(&self, issued: &Issued, as_json: bool) -> Result<(), Error> {
        let fingerprint = hex::encode(&issued.endorsement_key);
        if issued.vouched == Vouched::FirstUse {
            tracing::warn!(
                "no proof that '{}' has a real TPM: trusting its endorsement key {fingerprint} on first use; compare \
                 it with the one that 'host enrol' showed on the host's own console",
                issued.challenge.host
            );
        }
        let bound = issued.policy.pcrs.pcrs();
        if self.trust_pcr_values && !bound.is_empty() {
            tracing::warn!(
                "no proof that '{}' was in a good boot state when it made its key: trusting the values of PCR {bound} \
                 in its bundle",
                issued.challenge.host
            );
        }
        let value = json!({
            "host": issued.challenge.host,
            "challenge": self.output,
            "endorsement_key": fingerprint,
            "vouched": issued.vouched,
            "policy": issued.policy,
            "expires": issued.challenge.expires,
        });
        output::print(as_json, &value, || {
            let mut lines = vec![
                format!("challenge for '{}'      {}", issued.challenge.host, self.output.display()),
                format!("  endorsement key   {fingerprint}"),
                format!("  trusted by        {}", issued.vouched),
                "  its key opens if".to_owned(),
            ];
            let signed = issued.policy.signed.iter();
            lines.extend(signed.map(|signed| format!("    the PCRs are as signed by the site's key {}", signed.key)));
            lines.extend(policy::besides_in_words(&issued.policy).iter().map(|line| format!("    {line}")));
            lines.push(format!(
                "next: bring it to the host within {} hours ('cryptattach host answer')",
                self.valid_hours
            ));
            lines
        })
    }
}

/// Admit a host that answered its challenge: create its lockbox key, and seal the stores' container keys to it
///
/// A host that was admitted before keeps its stores and gets a new lockbox key.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach host admit compute-7.answer --store cinder --store logs")]
pub struct Admit {
    /// The host's answer
    answer: PathBuf,
    /// A store whose keys the host may open; repeatable
    #[arg(long = "store", value_name = "STORE", required = true)]
    stores: Vec<StoreName>,
    /// The store for the host's lockbox key [default: the one that keeps it now, or else the first --store]
    #[arg(long, value_name = "STORE")]
    lockbox_store: Option<StoreName>,
}

impl Admit {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let administrator = Administrator::of(&config.state);
        let admission = administrator.verify(&EnrolAnswer::read(&self.answer)?)?;
        let host = admission.host().clone();
        let before = administrator.register().get(&host)?.filter(|known| known.removed.is_none());
        let stores = self.all_stores(before.as_ref());
        // All that can be refused is refused before anything is changed.
        let containers = stores.iter().map(|store| Container::open(&config, store, None, Use::Keys));
        let containers = containers.collect::<Result<Vec<_>, _>>()?;
        containers.iter().try_for_each(|container| container.hosts().map(drop))?;
        let keeper_name = self.keeper(before.as_ref());
        let keeper = Container::open(&config, &keeper_name, None, Use::Keys)?;

        let mut recipients: Vec<Box<dyn Recipient>> = keeper.escrow()?;
        recipients.push(Box::new(admission.recipient()?));
        let lockbox = lockbox::admit(keeper.host_keys()?, &host, &recipients)?;
        for container in &containers {
            container.admit_host(&host, &lockbox.recipient)?;
        }
        if let Some(moved) = before.map(|before| before.lockbox_store).filter(|before| *before != keeper_name) {
            withdraw(&config, &moved, &host)?;
        }
        let admitted = admission.admitted(&lockbox, keeper_name, stores);
        administrator.admitted(&admission, &admitted)?;
        record(&config, "host admit", &host, Some(names(&admitted.stores)));
        self.show(&admitted, global.json)
    }

    /// Those that are named, and those that the host is admitted to already: its lockbox key of before is for neither any more.
    fn all_stores(&self, before: Option<&Admitted>) -> Vec<StoreName> {
        let all = self.stores.iter().chain(before.iter().flat_map(|before| &before.stores));
        all.cloned().collect::<BTreeSet<_>>().into_iter().collect()
    }

    fn keeper(&self, before: Option<&Admitted>) -> StoreName {
        let before = before.map(|before| &before.lockbox_store);
        self.lockbox_store.as_ref().or(before).unwrap_or(&self.stores[0]).clone()
    }

    fn show(&self, admitted: &Admitted, as_json: bool) -> Result<(), Error> {
        output::print(as_json, admitted, || {
            vec![
                format!("admitted '{}'", admitted.host),
                format!("  identity key      {}", admitted.kid),
                format!("  trusted by        {}", admitted.vouched),
                format!("  lockbox key       generation {}, fingerprint {}", admitted.generation, admitted.lockbox_key),
                format!("  kept in           {}", admitted.lockbox_store),
                format!("  stores            {}", names(&admitted.stores)),
                format!("next, on the host: cryptattach lockbox open --fingerprint {}", admitted.lockbox_key),
            ]
        })
    }
}
