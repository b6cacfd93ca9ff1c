//! Who opens a container, by name and since when: what its sealed container keys say of themselves. Nothing is opened for that, and so
//! nothing proven; it is for seeing.

use std::{collections::BTreeMap, path::Path};

use serde::Serialize;

use super::Container;
use crate::{
    base::key::{Epoch, HostName, KeyId, SealedKey},
    config::LeafName,
    keys::seal::{ContainerKey, Identities, SealedTo},
    unlock::{Error, enrol::Register},
};

/// Who opens what is sealed under a container key.
#[derive(Debug, Serialize)]
pub struct OpenedBy {
    /// "cinder/kek/2"
    pub container_key: String,
    pub openers: Vec<Opener>,
}

/// Somebody who opens it; or a threshold of such.
#[derive(Debug, Serialize)]
pub struct Opener {
    /// "owner", "escrow", "host compute-7", a leaf's name, "2 of 3".
    pub name: String,
    /// The id of their key.
    pub kid: Option<String>,
    pub alg: Option<String>,
    /// Since when at least, in seconds since 1970: older container keys may be deleted.
    pub since: Option<u64>,
    /// What it was let in by, in words: a file, a host's proof.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub of: Vec<Opener>,
}

/// What the container keys of a store say.
struct History {
    /// Whose key ids these are.
    hosts: BTreeMap<String, HostName>,
    /// Of each container key, from the one in question back: when it was sealed, and to which key ids.
    sealed: Vec<(u64, Vec<String>)>,
}

impl Container {
    /// Who opens the keys that are sealed under the current container key; `None` if there is none.
    pub fn opened_by(&self) -> Result<Option<OpenedBy>, Error> {
        let Some(current) = self.container_keys()?.current()? else { return Ok(None) };
        self.opened_by_epoch(current.epoch).map(Some)
    }

    /// Who opens a key.
    pub fn opened_by_key(&self, id: &KeyId, sealed: &SealedKey) -> Result<OpenedBy, Error> {
        self.opened_by_epoch(self.sealed_under(id, sealed)?)
    }

    fn opened_by_epoch(&self, epoch: Epoch) -> Result<OpenedBy, Error> {
        let keys = self.container_keys()?;
        // The names of keys, and nothing that opens one.
        let (leaves, names) = self.all_names()?;
        let identities = Identities::default().with_leaves(leaves, names);
        let refused = |epoch| move |source| Error::ContainerKeyRefused { id: self.key_id(epoch), source };
        let mut history = History { hosts: BTreeMap::new(), sealed: Vec::new() };
        let mut whom = None;
        let mut epochs: Vec<_> = keys.epochs()?.into_iter().filter(|other| *other < epoch).collect();
        epochs.push(epoch);
        for epoch in epochs.into_iter().rev() {
            let sealed = keys.get(epoch)?;
            let (created, hosts) = ContainerKey::claims(&sealed).map_err(refused(epoch))?;
            let to = identities.whom(&sealed).map_err(refused(epoch))?;
            history.hosts.extend(hosts);
            history.sealed.push((created, to.iter().flat_map(kids).collect()));
            whom.get_or_insert(to);
        }
        let openers = whom.into_iter().flatten().map(|one| self.opener(one, &history)).collect();
        Ok(OpenedBy { container_key: self.key_id(epoch).to_string(), openers })
    }

    fn opener(&self, one: SealedTo, history: &History) -> Opener {
        let SealedTo { name, kid, alg, of } = one;
        let host = kid.as_ref().and_then(|kid| history.hosts.get(kid));
        let admitted = host.and_then(|host| Register::of(&self.state).get(host).ok().flatten());
        let file = |path: &Path| path.display().to_string();
        let proof = match (&admitted, name.as_str()) {
            (Some(admitted), _) => Some(admitted.vouched.to_string()),
            (None, LeafName::OWNER) => self.sealing.owner.as_deref().map(file),
            (None, LeafName::ESCROW) => self.sealing.escrow.as_deref().map(file),
            (None, _) => None,
        };
        let since = kid.as_ref().and_then(|kid| history.since(kid));
        Opener {
            name: host.map_or(name, |host| format!("host {host}")),
            since: admitted.map(|admitted| admitted.admitted).or(since),
            proof,
            kid,
            alg,
            of: of.into_iter().map(|one| self.opener(one, history)).collect(),
        }
    }
}

impl History {
    /// Container keys before one that lacks it say nothing: it was let in again.
    fn since(&self, kid: &String) -> Option<u64> {
        self.sealed.iter().take_while(|(_, kids)| kids.contains(kid)).last().map(|(created, _)| *created)
    }
}

fn kids(one: &SealedTo) -> Vec<String> {
    one.kid.iter().cloned().chain(one.of.iter().flat_map(kids)).collect()
}
