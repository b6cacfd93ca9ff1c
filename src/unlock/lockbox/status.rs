//! What is known of the lockbox, and what a thief would have of it, in plain words.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Lockbox, LockboxError, entries::check_time};
use crate::{
    base::{
        chain::chain,
        clock::now,
        key::{HostName, KeyReference, StoreName},
    },
    config::Config,
    keys::seal::{EntryContext, For, identities},
    sys::kernel_keyring::KeyringKind,
};

/// What is known of the lockbox.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The name under which this host is admitted.
    pub host: HostName,
    /// The store that keeps the lockbox key.
    pub store: StoreName,
    /// Whether it is open.
    pub open: bool,
    pub generation: Option<u64>,
    pub fingerprint: Option<String>,
    /// Where the open key is kept.
    pub kept: Option<KeyringKind>,
    /// Where the entries are.
    pub path: PathBuf,
    /// The copy of the sealed lockbox key on this host, if there is one.
    pub copy: Option<PathBuf>,
    pub entries: Vec<EntryStatus>,
    /// What someone who steals this server has.
    pub stolen: Vec<String>,
}

/// What is known of an entry.
#[derive(Debug, Serialize)]
pub struct EntryStatus {
    pub key: KeyReference,
    /// Whether it is used.
    pub state: State,
    /// Why it is not used, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// Seconds since it was added.
    pub age_seconds: Option<u64>,
    /// Seconds until it expires; 0 if it has.
    pub expires_in_seconds: Option<u64>,
}

/// Whether an entry is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It is.
    Valid,
    /// The lockbox is closed; this is what the entry claims.
    Closed,
    /// It is not.
    Unusable,
}

impl Lockbox {
    /// What is known of it; nothing is changed, and no store is asked.
    pub fn status(&self, config: &Config) -> Result<Status, LockboxError> {
        let kept = self.kept();
        let copy = Some(self.config.offline_copy(&self.state)).filter(|path| path.exists());
        let entries: Vec<_> = self.list()?.into_iter().map(|key| self.entry_status(key)).collect();
        Ok(Status {
            host: self.config.host.clone(),
            store: self.config.store.clone(),
            open: kept.is_some(),
            generation: kept.map(|(key, _)| key.id().generation),
            fingerprint: kept.map(|(key, _)| key.fingerprint().to_owned()),
            kept: kept.map(|(_, kept)| *kept),
            path: self.config.path.to_path_buf(),
            stolen: self.stolen(config, copy.as_deref(), entries.len()),
            copy,
            entries,
        })
    }

    fn entry_status(&self, key: KeyReference) -> EntryStatus {
        let claimed = self.read(&key).ok().flatten().and_then(|sealed| EntryContext::claimed(&sealed).ok());
        let (state, why) = match (self.key(), self.entry(&key, For::Any)) {
            (Some(_), Ok(_)) => (State::Valid, None),
            (_, Err(error)) => (State::Unusable, Some(chain(&error))),
            (None, Ok(_)) => match claimed.as_ref().map(|context| check_time(context, now())) {
                Some(Ok(())) => (State::Closed, None),
                Some(Err(error)) => (State::Unusable, Some(error.to_string())),
                None => (State::Unusable, Some("it is damaged".to_owned())),
            },
        };
        EntryStatus {
            key,
            state,
            why,
            age_seconds: claimed.as_ref().map(|context| now().saturating_sub(context.added)),
            expires_in_seconds: claimed.as_ref().map(|context| context.expires.saturating_sub(now())),
        }
    }

    fn stolen(&self, config: &Config, copy: Option<&Path>, entries: usize) -> Vec<String> {
        let mut lines = Vec::new();
        let store = &self.config.store;
        let secret = self.identities(config).iter().filter(|spec| identities::kind(spec).is_secret());
        let files = identities::files(secret);
        let opener = match &files[..] {
            [] => "this server's TPM, in a boot state that its policy trusts".to_owned(),
            files => {
                let names: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
                format!("the private key {} on its disk", names.join(", "))
            }
        };
        if self.key().is_some() {
            lines.push(
                "running: everything until it is switched off, because the kernel has the open lockbox key".to_owned(),
            );
        }
        match copy {
            Some(copy) => lines.push(format!(
                "switched off: the sealed lockbox key is on its disk ({}), so whoever can use {opener} opens the lockbox and \
                 all {entries} entries without the network; removing the host does not delete that copy",
                copy.display()
            )),
            None => lines.push(format!(
                "switched off: nothing without the network, because the sealed lockbox key is in the store '{store}'; on the \
                 network, until the host is removed, whoever can use {opener} opens the lockbox"
            )),
        }
        if entries > 0 {
            lines.push(
                "expired entries: only this program refuses them; the lockbox key opens them as long as they are on \
                 the disk"
                    .to_owned(),
            );
        }
        lines
    }
}
