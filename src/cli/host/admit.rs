//! The administrator's verb: `admit`.

use std::{
    fs,
    io::{self, BufRead, IsTerminal, Read},
    path::{Path, PathBuf},
};

use clap::{ArgGroup, Args};

use super::Global;
use crate::{
    base::{
        clock::date,
        hex,
        key::{HostName, StoreName},
    },
    cli::{output, policy},
    config::Config,
    keys::tpm::{Digest, PcrValues, TpmError},
    unlock::enrol::{Administrator, Admitted, Answer, Candidate, Document, EnrolError, Request, Site, Trust, Vouched},
    verbs::{
        admit::{self, Wish, names},
        error::Error,
        join::Letter,
    },
};

/// Admit a host by its request: make its lockbox key, seal the stores' container keys to it, and write the answer
///
/// Only the TPM of the request opens the answer. Needs no TPM here. [tpm] in this machine's configuration sets the policy
/// that the host's key must have: site_key, counter, pcrs, latch. A host that was admitted before keeps its stores and
/// gets a new lockbox key.
#[derive(Args)]
#[command(
    group = ArgGroup::new("trust").args(["ca", "ek", "trust_first_use"]),
    group = ArgGroup::new("state").args(["pcr_values", "trust_pcr_values"]),
    after_help = "Examples:
  cryptattach host admit compute-7.request                       shows who asks, and asks you
  cryptattach host admit compute-7                               the request that 'host join --store' left in the store
  cryptattach host admit compute-7.request --ca /etc/tpm-makers --store cinder --store logs
  cryptattach host admit compute-7.request --ek 3b1c… --pcr-values golden.json --output compute-7.answer
      (golden.json: 'cryptattach policy show --json | jq .pcrs' on a host whose boot is known to be right)

The same request again writes the same answer again. Resumes if interrupted."
)]
pub struct Admit {
    /// The host's request, or the name of a host that left its request in a store
    #[arg(value_name = "REQUEST|NAME")]
    request: PathBuf,
    /// A store whose keys the host may open; repeatable [default: the default store]
    #[arg(long = "store", value_name = "STORE")]
    stores: Vec<StoreName>,
    /// The store for the host's lockbox key [default: the one that keeps it now, or else the first --store]
    #[arg(long, value_name = "STORE")]
    lockbox_store: Option<StoreName>,
    /// New file for the answer [default: NAME.answer, or the store that the request was left in]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Folder with the certificates of TPM makers, one of which must have certified the endorsement key
    #[arg(long, value_name = "FOLDER")]
    ca: Option<PathBuf>,
    /// The endorsement key's fingerprint, as 'host join' showed it on the host's own console
    #[arg(long, value_name = "FINGERPRINT", value_parser = fingerprint)]
    ek: Option<Digest>,
    /// Trust the endorsement key without proof that it belongs to a real TPM
    #[arg(long)]
    trust_first_use: bool,
    /// The good values of PCRs (JSON: {"7": "HEX", ...}), for keys that are bound to values
    #[arg(long, value_name = "FILE")]
    pcr_values: Option<PathBuf>,
    /// Trust the boot state that the host's key is bound to, without proof that it is good
    #[arg(long)]
    trust_pcr_values: bool,
    /// Replace the lockbox key of a host that is admitted already
    #[arg(long)]
    replace: bool,
}

fn fingerprint(text: &str) -> Result<Digest, String> {
    let digest = hex::decode(text).and_then(|bytes| bytes.try_into().ok());
    digest.ok_or_else(|| "64 hexadecimal digits".to_owned())
}

/// A request, and where it was.
struct Found {
    request: Request,
    path: PathBuf,
    /// The store that it was left in.
    store: Option<StoreName>,
}

impl Admit {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let config = global.config()?;
        let stores = match self.stores.as_slice() {
            [] => vec![config.store_or_default(None)?],
            stores => stores.to_vec(),
        };
        let wish = Wish { stores: &stores, lockbox_store: self.lockbox_store.as_ref(), replace: self.replace };
        let found = self.find(&config, &stores)?;
        let mut candidate = self.examine(&config, &found)?;
        let file = self.file(&found, &candidate);
        if let Some(file) = file.as_deref().filter(|file| !candidate.is_admitted() && file.symlink_metadata().is_ok()) {
            return Err(Error::Exists(file.to_owned()));
        }
        admit::may_admit(&candidate, &wish)?;
        self.warn(&candidate);
        self.confirm(&mut candidate)?;
        let was_admitted = candidate.is_admitted();
        let (admitted, answer) = admit::admit(&config, candidate, &wish)?;
        let place = match (file, &found.store) {
            (None, Some(store)) => Letter::Answer.leave(&config, store, &admitted.host, &answer)?,
            (file, _) => {
                let file = file.unwrap_or_else(|| PathBuf::from(format!("{}.answer", admitted.host)));
                answer.write(&file)?;
                file
            }
        };
        self.show(&admitted, &answer, &place, (was_admitted, found.store), global.json)
    }

    /// A file, or else what a host of that name has left in a store.
    fn find(&self, config: &Config, stores: &[StoreName]) -> Result<Found, Error> {
        let path = self.request.clone();
        let host = path.to_str().and_then(|text| text.parse::<HostName>().ok()).filter(|_| !path.exists());
        let Some(host) = host else {
            return Ok(Found { request: Request::read(&path)?, path, store: None });
        };
        let stores: Vec<_> = self.lockbox_store.iter().chain(stores).cloned().collect();
        let left = admit::left(config, &stores, &host)?;
        let (request, store) = left.ok_or_else(|| EnrolError::NoRequest { name: host.clone(), at: names(&stores) })?;
        let path = PathBuf::from(format!("{store}/{}", Letter::Request.name(&host)));
        let asks = request.statement(&path)?.host;
        if asks != host {
            let why = format!("it is the request of '{asks}'");
            return Err(EnrolError::Document { path, expected: Request::TYPE, why }.into());
        }
        Ok(Found { request, path, store: Some(store) })
    }

    fn file(&self, found: &Found, candidate: &Candidate) -> Option<PathBuf> {
        let own = || found.store.is_none().then(|| PathBuf::from(format!("{}.answer", candidate.host)));
        self.output.clone().or_else(own)
    }

    fn examine(&self, config: &Config, found: &Found) -> Result<Candidate, Error> {
        let trust = match (&self.ca, self.ek, self.trust_first_use) {
            (Some(folder), ..) => Trust::Authorities(folder.clone()),
            (_, Some(fingerprint), _) => Trust::Fingerprint(fingerprint),
            (.., true) => Trust::FirstUse,
            // The person at the terminal compares it.
            _ if io::stdin().is_terminal() => Trust::FirstUse,
            _ => {
                return Err(Error::Usage(
                    "nobody can be asked whether the host's TPM is the right one: say it with --ca FOLDER, \
                     --ek FINGERPRINT or --trust-first-use"
                        .to_owned(),
                ));
            }
        };
        let site = Site::of(&config.tpm, self.values()?)?;
        Ok(Administrator::of(&config.state).examine(&found.request, &found.path, &trust, &site)?)
    }

    /// Without either option a person may believe them; where nobody can be asked, no value is believed, and a policy may follow
    /// signatures only.
    fn values(&self) -> Result<Option<PcrValues>, Error> {
        let Some(path) = &self.pcr_values else {
            let believed = self.trust_pcr_values || io::stdin().is_terminal();
            return Ok((!believed).then(PcrValues::default));
        };
        let json = fs::read(path).map_err(Error::io(format!("read {}", path.display())))?;
        let why = |error| TpmError::Malformed { path: path.clone(), why: format!("has no values of PCRs: {error}") };
        Ok(Some(serde_json::from_slice(&json).map_err(why)?))
    }

    fn warn(&self, candidate: &Candidate) {
        let host = &candidate.host;
        if self.trust_first_use {
            tracing::warn!(
                "no proof that '{host}' has a real TPM: trusting its endorsement key {} on first use; compare it with \
                 the one that 'host join' showed on the host's own console",
                hex::encode(&candidate.endorsement_key)
            );
        }
        let bound = candidate.policy.pcrs.pcrs();
        if self.trust_pcr_values && !bound.is_empty() {
            tracing::warn!(
                "no proof that '{host}' was in a good boot state when it made its key: trusting the values of PCR {bound} \
                 in its request"
            );
        }
    }

    /// Asks for what no option says.
    fn confirm(&self, candidate: &mut Candidate) -> Result<(), Error> {
        let is_key_proven = self.ca.is_some() || self.ek.is_some() || self.trust_first_use;
        let are_values_proven =
            self.pcr_values.is_some() || self.trust_pcr_values || candidate.policy.pcrs.pcrs().is_empty();
        if candidate.is_admitted() || (is_key_proven && are_values_proven) {
            return Ok(());
        }
        let mut lines = asks(candidate);
        if !is_key_proven {
            lines.push(
                "Compare the endorsement key with the one that 'host join' showed on the host's own console.".into(),
            );
        }
        if !are_values_proven {
            lines.push(
                "Nothing but the host itself says that these values are a good boot state's (--pcr-values).".into(),
            );
        }
        lines.push("Admit this host? (yes/no): ".to_owned());
        output::say(lines);
        let mut answer = String::new();
        let read = io::stdin().lock().take(64).read_line(&mut answer);
        read.map_err(Error::io("read the answer"))?;
        if !matches!(answer.trim(), "yes" | "YES" | "y") {
            return Err(Error::Usage(format!("'{}' was not admitted: nothing is changed", candidate.host)));
        }
        if !is_key_proven {
            candidate.vouched = Vouched::Fingerprint;
        }
        Ok(())
    }

    fn show(
        &self,
        admitted: &Admitted,
        answer: &Answer,
        place: &Path,
        (again, store): (bool, Option<StoreName>),
        as_json: bool,
    ) -> Result<(), Error> {
        let mut value = serde_json::to_value(admitted).unwrap_or_default();
        value["answer"] = place.to_string_lossy().into();
        output::print(as_json, &value, || {
            let already = if again { " already, by this request" } else { "" };
            let mut lines = vec![
                format!("admitted '{}'{already}", admitted.host),
                format!("  identity key      {}", admitted.kid),
                format!("  endorsement key   {}", hex::encode(&admitted.endorsement_key)),
                format!("  trusted by        {}", admitted.vouched),
            ];
            lines.extend(opens_if(&admitted.policy));
            lines.extend([
                format!("  lockbox key       generation {}, fingerprint {}", admitted.generation, answer.lockbox_key),
                format!("  kept in           {}", admitted.lockbox_store),
                format!("  stores            {}", names(&admitted.stores)),
                format!("  answer            {}", place.display()),
            ]);
            lines.push(match store.filter(|_| self.output.is_none()) {
                Some(store) => format!("next, on the host: cryptattach host join --store {store}"),
                None => format!("next: bring the answer to the host (cryptattach host join {})", place.display()),
            });
            lines
        })
    }
}

/// Who asks.
fn asks(candidate: &Candidate) -> Vec<String> {
    let certificate = match (&candidate.vouched, &candidate.claimed) {
        (Vouched::Certificate { .. }, _) => candidate.vouched.to_string(),
        (_, Some(claimed)) => format!("{claimed}, which nobody has checked (--ca)"),
        (_, None) => "no certificate".to_owned(),
    };
    let mut lines = vec![
        format!("'{}' asks to be admitted", candidate.host),
        format!("  since             {}", date(candidate.asked)),
        format!("  TPM               {certificate}"),
        format!("  endorsement key   {}", hex::encode(&candidate.endorsement_key)),
    ];
    lines.extend(opens_if(&candidate.policy));
    let known = candidate.known.as_ref();
    lines.extend(
        known.map(|known| {
            format!("  admitted          on {}: its lockbox key of now is replaced", date(known.admitted))
        }),
    );
    lines
}

fn opens_if(policy: &crate::keys::tpm::Policy) -> Vec<String> {
    let signed = policy.signed.iter();
    let signed = signed.map(|signed| format!("the PCRs are as signed by the site's key {}", signed.key));
    let all = signed.chain(policy::besides_in_words(policy));
    all.enumerate().map(|(at, line)| format!("  {:17} {line}", if at == 0 { "its key opens if" } else { "" })).collect()
}
