//! The receipt of an erase: its place, which has to be there before anything goes, and what it says in the end.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{
    Erased, Job,
    journal::{Journal, Key},
};
use crate::{
    base::{clock::now, hex},
    sys::{durable, state},
    unlock::{
        audit::{self, Event},
        receipt::{self, Desk, Receipt},
    },
    verbs::error::Error,
};

impl Job<'_> {
    /// The file that is asked for. What is there is not written over.
    pub(super) fn receipt(&self) -> Result<Option<PathBuf>, Error> {
        let Some(path) = self.request.receipt else { return Ok(None) };
        let path = std::path::absolute(path).map_err(Error::io("find the current directory"))?;
        require_folder(&path)?;
        let is_begun = state::read::<Journal>(&self.journal)?.is_some_and(|begun| begun.receipt == path);
        // A command that was killed has written it.
        if path.exists() && !is_begun { Err(Error::Exists(path)) } else { Ok(Some(path)) }
    }

    /// The one in the state directory, whose folder is made when it is needed.
    pub(super) fn is_default(&self, receipt: &Path) -> bool {
        receipt.starts_with(&*self.config.state)
    }

    pub(super) fn finish(&self, journal: Journal, header: String) -> Result<Erased, Error> {
        let mut verified: Vec<_> = journal
            .keys
            .iter()
            .map(|key| format!("the store '{}' was asked again, and does not have the key {}", key.key.store, key.key))
            .collect();
        verified.push(header);
        let host = nix::sys::utsname::uname().map_err(|errno| Error::io("ask for this host's name")(errno.into()))?;
        let text = |path: &Path| path.display().to_string();
        let receipt = Receipt {
            kind: receipt::Kind::Erase,
            host: host.nodename().to_string_lossy().into_owned(),
            begun: journal.begun,
            ended: now(),
            device: text(&journal.device),
            detached_header: journal.detached.as_deref().map(text),
            volume: journal.volume,
            header: journal.header.clone(),
            keys: journal.keys.iter().map(Key::was).collect(),
            kept: journal.kept.clone(),
            verified,
            not_promised: receipt::NOT_PROMISED.map(str::to_owned).to_vec(),
        };
        let desk = Desk::of(self.config);
        let signer = desk.public()?.1;
        let Some(digest) = desk.write(&receipt, &journal.receipt)? else { return Err(Error::Exists(journal.receipt)) };
        let event = self.event("key erase", &journal);
        audit::done(self.config, &Event { receipt: Some(hex::encode(&digest)), ..event });
        state::remove(&self.journal)?;
        Ok(Erased { file: journal.receipt, signer, receipt })
    }
}

pub(super) fn require_folder(receipt: &Path) -> Result<(), Error> {
    match durable::folder_of(receipt).is_dir() {
        true => Ok(()),
        false => Err(Error::io("find the folder of the receipt")(io::ErrorKind::NotFound.into())),
    }
}
