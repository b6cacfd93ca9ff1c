//! `cryptattach policy`

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args, Subcommand};
use serde::Deserialize;
use serde_json::json;

use super::{Global, output};
use crate::{
    base::{hex, pcr_set::PcrSet},
    config::TpmConfig,
    keys::tpm::{
        self, BootChain, Digest, Exposure, IdentityFile, PcrSignature, PcrSignatures, PcrValues, Policy as TpmPolicy,
        SiteSigner, Tpm, TpmError, exposures,
    },
    verbs::error::Error,
};

/// Manage the boot states in which this host's TPM opens its keys
#[derive(Subcommand)]
pub enum Policy {
    Show(Show),
    Test(Test),
    Sign(Sign),
    RevokeOld(RevokeOld),
    Latch(Latch),
}

impl Policy {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Show(show) => show.run(global),
            Self::Test(test) => test.run(global),
            Self::Sign(sign) => sign.run(global),
            Self::RevokeOld(revoke) => revoke.run(global),
            Self::Latch(latch) => latch.run(global),
        }
    }
}

/// Which key.
#[derive(Args)]
struct IdentityOption {
    /// The file of this host's key [default: 'identity' in [tpm]]
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
}

impl IdentityOption {
    fn path<'a>(&'a self, config: &'a TpmConfig) -> &'a Path {
        self.identity.as_deref().unwrap_or(&config.identity)
    }
}

/// Show what booted this machine, what the key is bound to, whether it opens now, and what its policy does not cover
///
/// Without a key, shows the policy that a new key would get here.
#[derive(Args)]
pub struct Show {
    #[command(flatten)]
    identity: IdentityOption,
}

impl Show {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?.tpm;
        let tpm = Tpm::open(&config)?;
        let path = self.identity.path(&config);
        let file = if path.exists() { Some(IdentityFile::read(path)?) } else { None };
        let policy = match &file {
            Some(file) => file.policy.clone(),
            None => tpm.policy_preview(&config, config.pin.is_some())?,
        };
        let signatures = PcrSignatures::read(&config.signatures)?;
        let chain = tpm.boot_chain()?;
        let signed = signed_pcrs(&policy, &signatures)?;
        // Before the first signature: as if the site signed what is worth it.
        let proposed = policy.signed.is_some() && signed.is_empty();
        // An attacker chooses the signature, so what counts is bound by all of them.
        let by_all = signed.iter().copied().reduce(PcrSet::common);
        let bound = policy.pcrs.pcrs().with(if proposed { chain.worth_binding() } else { by_all.unwrap_or_default() });
        let why_not = match &file {
            None => None,
            Some(file) => match tpm.satisfiable(&file.policy, &signatures) {
                Ok(_) => None,
                Err(TpmError::NotThisState(why)) => Some(why),
                Err(error) => return Err(error.into()),
            },
        };
        let shown = Shown {
            path,
            enrolled: file.is_some(),
            chain,
            secure_boot: tpm.event_log().secure_boot(),
            values: tpm.boot_values()?,
            exposures: exposures(bound, chain, tpm.event_log().secure_boot(), policy.latch),
            signed,
            policy,
        };
        let json = json!({
            "identity": shown.path,
            "enrolled": shown.enrolled,
            "boot_chain": shown.chain,
            "secure_boot": shown.secure_boot,
            "policy": shown.policy,
            "digest": hex::encode(&shown.policy.digest()?),
            "signed_pcrs": shown.signed,
            "opens_now": shown.enrolled.then_some(why_not.is_none()),
            "why_not": why_not,
            "pcrs": shown.values,
            "unnoticed": shown.exposures,
        });
        output::print(global.json, &json, || shown.text(why_not.as_ref().map(ToString::to_string)))
    }
}

struct Shown<'a> {
    path: &'a Path,
    enrolled: bool,
    chain: BootChain,
    secure_boot: Option<bool>,
    policy: TpmPolicy,
    signed: BTreeSet<PcrSet>,
    values: PcrValues,
    exposures: Vec<Exposure>,
}

impl Shown<'_> {
    fn text(&self, why_not: Option<String>) -> Vec<String> {
        let secure_boot = match self.secure_boot {
            Some(true) => "on",
            Some(false) => "off",
            None => "not known (there is no event log)",
        };
        let key = match self.enrolled {
            true => self.path.display().to_string(),
            false => format!("none yet ({}); a new one would get this policy", self.path.display()),
        };
        let mut lines = vec![
            format!("booted by     {}", self.chain),
            format!("Secure Boot   {secure_boot}"),
            format!("key           {key}"),
            "opens if all of this holds:".to_owned(),
        ];
        lines.extend(self.policy_in_words().into_iter().map(|line| format!("  {line}")));
        lines.extend(self.enrolled.then(|| match why_not {
            None => "now           it opens".to_owned(),
            Some(why) => format!("now           it does not open: {why}"),
        }));
        lines.push("not covered by the policy (an attacker with physical access could change or use it):".to_owned());
        lines.extend(self.exposures.iter().map(|exposure| format!("  {exposure}")));
        lines.push("PCRs (SHA-256):".to_owned());
        lines.extend(self.values.iter().map(|(pcr, value)| format!("  {pcr:2} {}", hex::encode(value))));
        lines
    }

    fn policy_in_words(&self) -> Vec<String> {
        let (policy, mut lines) = (&self.policy, Vec::new());
        if let Some(signed) = &policy.signed {
            let sets: Vec<_> = self.signed.iter().map(|pcrs| format!("PCR {pcrs}")).collect();
            lines.push(match sets.is_empty() {
                false => format!("{} as signed by the site's key {}", sets.join(" or "), signed.key),
                true => format!(
                    "PCRs as signed by the site's key {}; there is no signature yet: PCR {} would suffice",
                    signed.key,
                    self.chain.worth_binding().without(policy.pcrs.pcrs())
                ),
            });
        }
        lines.extend(besides_in_words(policy));
        lines
    }
}

/// What must hold besides a signature.
pub(super) fn besides_in_words(policy: &TpmPolicy) -> Vec<String> {
    let revocation = policy.signed.as_ref().and_then(|signed| signed.revocation);
    let mut lines: Vec<_> = revocation
        .map(|revocation| {
            format!("the signature's epoch has not been retired (counter {} in the TPM)", revocation.counter)
        })
        .into_iter()
        .collect();
    lines.extend(policy.pcrs.iter().map(|(pcr, value)| format!("PCR {pcr} = {}", hex::encode(value))));
    lines.extend(policy.latch.then(|| "PCR 15 has not been extended in this boot".to_owned()));
    lines.extend(policy.pin.then(|| "the PIN is given".to_owned()));
    lines
}

/// The sets of PCRs that the site's signatures are over.
fn signed_pcrs(policy: &TpmPolicy, signatures: &PcrSignatures) -> Result<BTreeSet<PcrSet>, TpmError> {
    let Some(signed) = &policy.signed else { return Ok(BTreeSet::new()) };
    let fingerprint = signed.key.fingerprint()?;
    let ours = signatures.signatures.iter().filter(|signature| signature.fingerprint == fingerprint);
    Ok(ours.map(|signature| signature.pcrs).collect())
}

/// Check whether the key would open in the present boot state, without opening it or touching the latch
///
/// Asks the TPM itself, in a session like that of a real opening. Does not try a PIN.
#[derive(Args)]
pub struct Test {
    #[command(flatten)]
    identity: IdentityOption,
}

impl Test {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?.tpm;
        let file = IdentityFile::read(self.identity.path(&config))?;
        let tpm = Tpm::open(&config)?;
        let identity = tpm.identity(&file)?;
        identity.test(&tpm.satisfiable(&file.policy, &PcrSignatures::read(&config.signatures)?)?)?;
        output::print(global.json, &json!({"opens": true}), || "this boot state opens the key".to_owned())
    }
}

/// Sign boot states with the site's key, away from the hosts
///
/// Prints a tpm2-pcr-signature.json in the form of systemd-measure. systemd can also read those of epoch 0.
#[derive(Args)]
#[command(
    group = ArgGroup::new("state").required(true).args(["current", "values", "measured"]),
    after_help = "Examples:
  cryptattach policy sign --private-key site.key --current 4+7+8+9 > tpm2-pcr-signature.json
  cryptattach policy show --json | jq .pcrs > values.json     # on the host
  cryptattach policy sign --private-key site.key --values values.json --pcrs 4+7+8+9
  /lib/systemd/systemd-measure calculate --linux=vmlinuz --initrd=initrd.img --json=short > measured.json
  cryptattach policy sign --private-key site.key --measured measured.json --epoch 1"
)]
pub struct Sign {
    /// The site's private key (PEM): RSA or P-256
    #[arg(long, value_name = "FILE")]
    private_key: PathBuf,
    /// Sign the present values of these PCRs of this machine (as in 7+11)
    #[arg(long, value_name = "PCRS")]
    current: Option<PcrSet>,
    /// Sign the values of PCRs in this file (JSON: {"7": "HEX", ...})
    #[arg(long, value_name = "FILE")]
    values: Option<PathBuf>,
    /// Sign only these PCRs of the values
    #[arg(long, value_name = "PCRS", requires = "values")]
    pcrs: Option<PcrSet>,
    /// Sign the output of systemd-measure: calculated (calculate --json), or signed with another key or for another
    /// epoch
    #[arg(long, value_name = "FILE")]
    measured: Option<PathBuf>,
    /// The epoch: 0 to 7; 'policy revoke-old' on a host retires its oldest
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..crate::keys::tpm::EPOCHS as u64))]
    epoch: u64,
    /// File with signatures to print first
    #[arg(long, value_name = "FILE")]
    append_to: Option<PathBuf>,
}

/// `systemd-measure calculate --json`, or a signature file.
#[derive(Deserialize)]
struct Measured {
    sha256: Vec<MeasuredState>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum MeasuredState {
    Signed(PcrSignature),
    Calculated {
        pcr: u8,
        #[serde(with = "hex")]
        hash: Digest,
    },
}

impl Sign {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let signer = SiteSigner::read(&self.private_key)?;
        let mut signatures = match &self.append_to {
            Some(path) => PcrSignatures::read(std::slice::from_ref(path))?.signatures,
            None => Vec::new(),
        };
        signatures.extend(self.sign(&signer, global)?);
        let json = PcrSignatures::to_json(signatures).map_err(std::io::Error::from);
        let json = json.map_err(Error::io("write the signatures"))?;
        output::print(false, &(), || json.lines().map(str::to_owned).collect::<Vec<_>>())
    }

    fn sign(&self, signer: &SiteSigner, global: &Global) -> Result<Vec<PcrSignature>, Error> {
        if let Some(pcrs) = self.current {
            let values = Tpm::open(&global.config()?.tpm)?.pcr_values(pcrs)?;
            return Ok(vec![signer.sign(&values, self.epoch)?]);
        }
        if let Some(path) = &self.values {
            let mut values: PcrValues = read_json(path)?;
            if let Some(pcrs) = self.pcrs {
                values = values.only(pcrs);
                if values.pcrs() != pcrs {
                    let missing = pcrs.without(values.pcrs());
                    return Err(Error::Usage(format!("{} has no value of PCR {missing}", path.display())));
                }
            }
            if values.pcrs().is_empty() {
                return Err(Error::Usage(format!("{} has no values", path.display())));
            }
            return Ok(vec![signer.sign(&values, self.epoch)?]);
        }
        let measured = self.measured.as_deref().map(read_json::<Measured>).transpose()?;
        let states = measured.into_iter().flat_map(|measured| measured.sha256);
        let sign = |state| match state {
            MeasuredState::Calculated { pcr, hash } => {
                PcrSet::try_from(vec![pcr]).map_err(|error| Error::Usage(error.to_string()))?;
                Ok(signer.sign(&[(pcr, hash)].into_iter().collect(), self.epoch)?)
            }
            MeasuredState::Signed(signed) => Ok(signer.sign_policy(signed.pcrs, &signed.policy, self.epoch)?),
        };
        states.map(sign).collect()
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let json = fs::read(path).map_err(Error::io(format!("read {}", path.display())))?;
    let why =
        |error| TpmError::Malformed { path: path.to_owned(), why: format!("does not have the expected form: {error}") };
    Ok(serde_json::from_slice(&json).map_err(why)?)
}

/// Retire the signatures of the oldest epoch permanently
///
/// Use it for boot states that must no longer be trusted, such as a vulnerable kernel. Sign the good states in the next
/// epoch, bring the signatures to the hosts, and run this on each. Refuses if the present boot state has no signature
/// of a later epoch.
#[derive(Args)]
pub struct RevokeOld {
    #[command(flatten)]
    identity: IdentityOption,
}

impl RevokeOld {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?.tpm;
        let file = IdentityFile::read(self.identity.path(&config))?;
        let tpm = Tpm::open(&config)?;
        let oldest = tpm.retire_oldest_epoch(&file, &PcrSignatures::read(&config.signatures)?)?;
        output::print(global.json, &json!({"oldest_epoch": oldest}), || {
            format!("signatures before epoch {oldest} no longer open any key on this host")
        })
    }
}

/// Extend PCR 15, so that the TPM does not open the key until the next power-on
///
/// Run it as the last unit of the boot, on hosts that open volumes with their key and without a lockbox.
#[derive(Args)]
pub struct Latch {}

impl Latch {
    fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?.tpm;
        tpm::latch(&config, &config.identity, tpm::KEYS_WERE_OPENED)?;
        output::print(global.json, &json!({"latched": true}), || {
            "PCR 15 is extended: the key opens again after the next power-on".to_owned()
        })
    }
}
