//! Opening what clevis has made.

use std::{borrow::Cow, time::Duration};

use super::{Binding, Pin, Tang, content, ecdh_es, parts, sss, tang};
use crate::{
    base::key::SecretBytes,
    config::Network,
    keys::{
        net::http::Cancel,
        seal::{
            ContentKey, LeafError, Said, SealError, Told, decode,
            tree::{self, Job},
        },
    },
    sys::programs,
};

/// What opens bindings on this host.
pub struct Means<'a> {
    /// Limits on waiting, for servers and for clevis.
    pub network: Network,
    /// How clevis reaches the TPM.
    pub tcti: &'a str,
}

impl Binding {
    /// The secret; or what each part said.
    pub fn open(&self, means: &Means<'_>) -> Result<SecretBytes, SealError> {
        let (secret, told) = self.content(means, &Cancel::never());
        secret.map_err(|error| if told.of.is_empty() { error } else { SealError::PolicyNotMet(Box::new(told)) })
    }

    fn content(&self, means: &Means<'_>, cancel: &Cancel) -> (Result<SecretBytes, SealError>, Told) {
        let mut told = Told { part: self.to_string(), said: Said::NotNeeded, of: Vec::new() };
        let secret = match &self.pin {
            Pin::Tang(tang) => self.by_server(tang, means, cancel),
            Pin::Foreign(pin) => self.by_clevis(pin, means, cancel),
            Pin::Threshold { least, modulus, of } => {
                told.part = format!("{least} of {}", of.len());
                let job = |share| Box::new(move |cancel: &Cancel| Self::content(share, means, cancel)) as Job<'_, _>;
                let (shares, said) = tree::race(of.iter().map(job).collect(), *least, cancel);
                told.of = said;
                match shares.len() < *least {
                    true => Err(SealError::TooFewShares { had: shares.len(), least: *least }),
                    false => sss::combine_over(modulus, &shares).and_then(|key| self.decrypt(key)),
                }
            }
        };
        told.said = match &secret {
            Ok(_) => Said::Opened,
            Err(_) if cancel.is_cancelled() => Said::NotNeeded,
            Err(error) => Said::failed(error),
        };
        (secret, told)
    }

    fn by_server(&self, tang: &Tang, means: &Means<'_>, cancel: &Cancel) -> Result<SecretBytes, SealError> {
        let Tang { url, header, key, .. } = tang;
        let kid = header.get("kid").and_then(|kid| kid.as_str());
        let party = tang::Party::new(kid, Some(key), header.get("epk"))?;
        let z = party.shared(url, means.network, cancel)?;
        self.decrypt(ecdh_es::content_key(&z, header)?).map_err(|error| tang::does_not_open(url, error))
    }

    fn decrypt(&self, key: SecretBytes) -> Result<SecretBytes, SealError> {
        let key = ContentKey::from_secret(key).ok_or(SealError::Tampered)?;
        let [protected, _, iv, ciphertext, tag] = parts(&self.jwe)?;
        content::Sealed {
            iv: decode("iv", iv)?,
            ciphertext: decode("ciphertext", ciphertext)?,
            tag: decode("tag", tag)?,
        }
        .open(&key, protected.as_bytes())
    }

    /// Has clevis open it: a program per pin, which is not ours.
    fn by_clevis(&self, pin: &str, means: &Means<'_>, cancel: &Cancel) -> Result<SecretBytes, SealError> {
        let failed = |why: Cow<'static, str>| LeafError::Clevis { pin: pin.to_owned(), why: why.into_owned() }.into();
        let mut command = programs::bare("clevis");
        command.arg("decrypt").env("TPM2TOOLS_TCTI", means.tcti);
        let patience = Duration::try_from_secs_f64(means.network.total_seconds).unwrap_or(Duration::MAX);
        let wanted = || !cancel.is_cancelled();
        match programs::secret_of(&mut command, self.jwe.as_bytes(), patience, &wanted) {
            Ok(Ok(secret)) => Ok(secret),
            Ok(Err(said)) if said.is_empty() => Err(failed("does not open it".into())),
            Ok(Err(said)) => Err(failed(format!("does not open it: {said}").into())),
            Err(error) => Err(failed(format!("cannot be asked: {error}").into())),
        }
    }
}
