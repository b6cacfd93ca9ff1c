//! What a boot leaves behind: PCR 15 is extended, so that nothing that runs later in this boot can use a key of the TPM again;
//! and the lockbox stays open only for a boot that has proven what it opened.

use std::{path::PathBuf, time::Duration};

use super::{BootError, line, within};
use crate::{
    config::{Config, Latch},
    keys::{
        seal::identities,
        tpm::{self, Digest},
    },
    verbs::error::Error,
};

/// How long the end of a boot waits for the TPM: for a lockbox that is being opened, and to extend PCR 15, for which old chips
/// take half a second.
const LONGEST: Duration = Duration::from_secs(10);

/// What has become of PCR 15.
#[derive(Debug)]
pub enum PcrLatch {
    /// It is extended: the TPM has proven that it has this value.
    Done(Digest),
    /// No key of the TPM opens anything here, or the site does not want the latch.
    NotWanted,
    /// The TPM is not there, and will open its key when it comes.
    NoTpm(PathBuf),
}

/// What the end of a boot says of the latch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LatchNews {
    /// PCR 15 is extended; only the log is told.
    Latched(Digest),
    /// There is nothing to say.
    Nothing,
    /// There is no proof that it is extended, and a person should know why.
    NotLatched(String),
}

/// Extends PCR 15 by this event, if a key of the TPM may open something here.
pub fn latch(config: &Config, event: &str) -> Result<PcrLatch, Error> {
    let identity = identity(config).filter(|_| config.tpm.latch.is_wanted());
    let Some(identity) = identity else { return Ok(PcrLatch::NotWanted) };
    if let Some(device) = config.tpm.device().filter(|device| !device.exists()) {
        return Ok(PcrLatch::NoTpm(device));
    }
    Ok(PcrLatch::Done(tpm::latch(&config.tpm, &identity, event)?))
}

/// A key of this host's TPM: one that lockbox or stores use, or else the one that it has, for whoever runs later might use it.
pub fn identity(config: &Config) -> Option<PathBuf> {
    let lockbox = config.lockbox.iter().flat_map(|lockbox| &lockbox.identities);
    let stores = config.stores.values().flat_map(|store| &store.sealing.identities);
    let used = identities::first_of_tpm(lockbox.chain(stores));
    used.or_else(|| Some(config.tpm.identity.to_path_buf()).filter(|path| path.exists()))
}

/// What has become of it; no TPM that hangs is waited for.
pub fn in_time(latch: impl FnOnce() -> Result<PcrLatch, Error> + Send + 'static) -> LatchNews {
    news(within(LONGEST, latch))
}

/// What to say of the latch; `None` if the TPM did not answer in time.
fn news(latch: Option<Result<PcrLatch, Error>>) -> LatchNews {
    LatchNews::NotLatched(match latch {
        Some(Ok(PcrLatch::Done(value))) => return LatchNews::Latched(value),
        Some(Ok(PcrLatch::NotWanted)) => return LatchNews::Nothing,
        Some(Ok(PcrLatch::NoTpm(device))) => format!("there is no TPM {}", device.display()),
        Some(Err(error)) => line(&error),
        None => "the TPM does not answer".to_owned(),
    })
}

impl LatchNews {
    /// Why PCR 15 may not be extended, as an error that stops the boot where the site requires the latch.
    pub fn error(&self, wanted: Latch) -> Option<BootError> {
        let Self::NotLatched(why) = self else { return None };
        Some(BootError::NotLatched { why: why.clone(), required: wanted == Latch::Required })
    }
}

/// Why the lockbox must not stay open: then whoever's system runs next has it. `None` if it may.
pub fn why_shut(news: &LatchNews, planned: usize, unproven: &[String]) -> Option<String> {
    match news {
        LatchNews::NotLatched(_) => Some("PCR 15 is not extended".to_owned()),
        _ if planned == 0 => Some("this boot has opened no volume".to_owned()),
        _ if unproven.is_empty() => None,
        _ => Some(format!("nothing proves that this host's own volume was opened as {}", unproven.join(", "))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const VALUE: Digest = [1; 32];

    #[test]
    fn a_latch_that_fails_or_hangs_is_told() {
        assert_eq!(news(Some(Ok(PcrLatch::Done(VALUE)))), LatchNews::Latched(VALUE));
        assert_eq!(news(Some(Ok(PcrLatch::NotWanted))), LatchNews::Nothing);
        let error = Error::UnknownToCrypttab("root".to_owned());
        let failures = [
            (Some(Ok(PcrLatch::NoTpm("/dev/tpmrm0".into()))), "there is no TPM /dev/tpmrm0"),
            (Some(Err(error)), "neither /etc/crypttab nor the configuration has a volume 'root'"),
            (None, "the TPM does not answer"),
        ];
        for (latch, why) in failures {
            let news = news(latch);
            assert_eq!(news, LatchNews::NotLatched(why.to_owned()));
            let error = news.error(Latch::On).unwrap();
            assert_eq!(error.to_string(), format!("PCR 15 is not extended: {why}"));
        }
    }

    #[test]
    fn the_tpm_is_latched_whenever_one_of_its_keys_opens_something_here() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        // Nobody listens there: to ask the TPM is to fail.
        let tpm = "[tpm]\ntcti = 'swtpm:path=/nonexistent'\n";
        let store = "[stores.a]\ntype = 'directory'\npath = 'a'\nowner = 'o.pem'\nno_escrow = true\n";
        let latch = |text: &str| {
            fs::write(&path, format!("{tpm}{text}")).unwrap();
            latch(&Config::read(&path).unwrap(), "")
        };
        let lockbox = "[lockbox]\nhost = 'h'\nstore = 'a'\nidentities = ";
        assert!(matches!(latch(&format!("{store}identities = ['host.key']\n")), Ok(PcrLatch::NotWanted)));
        latch(&format!("{store}identities = ['tpm:host.key']\n")).unwrap_err();
        latch(&format!("{store}{lockbox}['tpm:host.key']\n")).unwrap_err();
        assert!(matches!(latch(&format!("{store}{lockbox}['host.key']\n")), Ok(PcrLatch::NotWanted)));
        fs::write(folder.path().join("host.tpm.pem"), "").unwrap();
        latch(&format!("identity = 'host.tpm.pem'\n{store}")).unwrap_err();
        let off = format!("latch = false\n{store}{lockbox}['tpm:host.key']\n");
        assert!(matches!(latch(&off), Ok(PcrLatch::NotWanted)));
        let away = format!("[tpm]\ntcti = 'device:/dev/none'\n{store}identities = ['tpm:host.key']\n");
        fs::write(&path, away).unwrap();
        assert!(matches!(super::latch(&Config::read(&path).unwrap(), ""), Ok(PcrLatch::NoTpm(_))));
    }

    #[test]
    fn the_lockbox_stays_open_only_for_a_boot_that_has_proven_all_that_it_opened() {
        let latched = LatchNews::Latched(VALUE);
        let root = ["root".to_owned()];
        assert_eq!(why_shut(&latched, 1, &[]), None);
        assert_eq!(why_shut(&LatchNews::Nothing, 1, &[]), None);
        assert!(why_shut(&latched, 2, &root).unwrap().ends_with("as root"));
        assert!(why_shut(&LatchNews::Nothing, 1, &root).is_some());
        assert!(why_shut(&latched, 0, &[]).unwrap().contains("no volume"));
        assert!(why_shut(&LatchNews::NotLatched(String::new()), 1, &[]).unwrap().contains("PCR 15"));
    }
}
