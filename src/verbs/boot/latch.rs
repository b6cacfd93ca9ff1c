//! The latch of PCR 15: after it nothing that runs later in this boot can use a key of the TPM again.

use std::path::PathBuf;

use super::line;
use crate::{config::Config, keys::tpm::Tpm, verbs::error::Error};

/// Whether the TPM has been asked for a key.
#[derive(Default)]
pub enum TpmUse {
    /// It has not.
    #[default]
    No,
    /// It has, or is about to be.
    Yes,
    /// The latch was decided upon: a key that is asked for now would be latched by nothing.
    Over,
}

/// What has become of the latch.
#[derive(Debug)]
pub enum PcrLatch {
    /// PCR 15 is extended.
    Done,
    /// The TPM was not asked for a key, or the site does not want it.
    NotWanted,
    /// The TPM is not there, and will open its key when it comes.
    NoTpm(PathBuf),
}

/// What the end of a boot says of the latch.
#[derive(Debug, PartialEq, Eq)]
pub enum LatchNews {
    /// PCR 15 is latched; only the log is told.
    Latched,
    /// There is nothing to say.
    Nothing,
    /// It is not latched, and a person should know why.
    NotLatched(String),
}

/// What to say of the latch; `None` if the TPM did not answer in time.
pub fn news(latch: Option<Result<PcrLatch, Error>>) -> LatchNews {
    let why = match latch {
        Some(Ok(PcrLatch::Done)) => return LatchNews::Latched,
        Some(Ok(PcrLatch::NotWanted)) => return LatchNews::Nothing,
        Some(Ok(PcrLatch::NoTpm(device))) => format!("there is no TPM {}", device.display()),
        Some(Err(error)) => line(&error),
        None => "the TPM does not answer".to_owned(),
    };
    LatchNews::NotLatched(format!("PCR 15 is not latched: {why}"))
}

/// Extends PCR 15, if the site wants it.
pub fn latch(config: &Config) -> Result<PcrLatch, Error> {
    if !config.tpm.latch {
        return Ok(PcrLatch::NotWanted);
    }
    if let Some(device) = config.tpm.device().filter(|device| !device.exists()) {
        return Ok(PcrLatch::NoTpm(device));
    }
    Tpm::open(&config.tpm)?.latch()?;
    Ok(PcrLatch::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_latch_that_fails_or_hangs_is_told() {
        assert_eq!(news(Some(Ok(PcrLatch::Done))), LatchNews::Latched);
        assert_eq!(news(Some(Ok(PcrLatch::NotWanted))), LatchNews::Nothing);
        let error = Error::UnknownToCrypttab("root".to_owned());
        let failures = [
            (Some(Ok(PcrLatch::NoTpm("/dev/tpmrm0".into()))), "there is no TPM /dev/tpmrm0"),
            (Some(Err(error)), "neither /etc/crypttab nor the configuration has a volume 'root'"),
            (None, "the TPM does not answer"),
        ];
        for (latch, why) in failures {
            assert_eq!(news(latch), LatchNews::NotLatched(format!("PCR 15 is not latched: {why}")));
        }
    }
}
