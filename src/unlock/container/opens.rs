//! What may open a container: its policy, as recipients of the container key, as what is asked to open it, and as places.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use super::Container;
use crate::{
    base::{
        hex,
        key::{Location, Place},
    },
    config::{Config, ConfigError, IdentitySpec, LeafName, Network, Policy, Sealing, StoreConfig},
    keys::{
        seal::{
            self, ContainerKey, Identities, Identity, Node, Recipient, SealError, Shape, Threshold, Told,
            clevis::Whom,
            identities,
            leaves::{self, Kind, Takes},
        },
        store::Server,
    },
    unlock::{Error, lockbox::Lockbox},
};

/// The leaves of a store's policy that are not built in.
pub(super) type Leaves = Vec<(LeafName, Box<dyn Kind>)>;

fn leaves_of(sealing: &Sealing, network: Network) -> Result<Leaves, ConfigError> {
    let leaf = |(name, config)| Ok((LeafName::clone(name), leaves::kind(name, config, network)?));
    sealing.leaves.iter().map(leaf).collect()
}

/// Leaves that the policy does not name, but a former one may have. Of those that cannot be used nothing is said.
fn other_leaves(sealing: &Sealing, network: Network) -> impl Iterator<Item = (LeafName, Box<dyn Kind>)> {
    let leaf = move |(name, config): (&LeafName, _)| Some((name.clone(), leaves::kind(name, config, network).ok()?));
    sealing.other_leaves.iter().filter_map(leaf)
}

/// Whom a leaf of a policy stands for, as far as the configuration and the state directory say: not the hosts that are admitted.
fn recipients_of_leaf(
    sealing: &Sealing,
    leaves: &Leaves,
    name: &LeafName,
    state: &Path,
) -> Result<Vec<Box<dyn Recipient>>, SealError> {
    match name.as_str() {
        LeafName::OWNER => seal::recipients(&sealing.owner),
        LeafName::ESCROW => seal::recipients(&sealing.escrow),
        LeafName::HOSTS => seal::recipients(&sealing.hosts),
        _ => leaves.iter().find(|(leaf, _)| leaf == name).map_or(Ok(Vec::new()), |(_, leaf)| leaf.recipients(state)),
    }
}

/// The servers that may have to be asked before a container opens: none if what this host has opens it without them.
/// `is_host`: the host is admitted, and its lockbox is open.
pub fn servers_to_open(config: &Config, store: &StoreConfig, is_host: bool) -> Result<Vec<Server>, Error> {
    let StoreConfig { sealing, network, .. } = store;
    let leaves = leaves_of(sealing, *network)?;
    let servers: Vec<_> = leaves.iter().flat_map(|(_, leaf)| leaf.servers()).collect();
    if servers.is_empty() {
        return Ok(servers);
    }
    // A public key that is not here says nothing, so the servers are waited for.
    let is_met = is_met(config, sealing, &leaves, &sealing.identities, is_host, false);
    Ok(if is_met { Vec::new() } else { servers })
}

/// Whether servers and identities that need no TPM may open the container, so that a TPM that does not come is no reason not to try.
pub fn may_open_without_tpm(config: &Config, store: &StoreConfig, is_host: bool) -> Result<bool, Error> {
    let StoreConfig { sealing, network, .. } = store;
    let leaves = leaves_of(sealing, *network)?;
    let without_tpm = |spec: &&IdentitySpec| !identities::need_tpm([*spec]);
    let specs: Vec<_> = sealing.identities.iter().filter(without_tpm).cloned().collect();
    Ok(sealing.has_policy() && is_met(config, sealing, &leaves, &specs, is_host, true))
}

/// Whether the policy is met by what these identities open, if servers give their shares, or if none does.
fn is_met(
    config: &Config,
    sealing: &Sealing,
    leaves: &Leaves,
    identities: &[IdentitySpec],
    is_host: bool,
    servers_give: bool,
) -> bool {
    // What cannot be read opens nothing.
    let identities = Identities::read(identities, &sealing.tpm).unwrap_or_default();
    sealing.policy.is_met_by(&|name| {
        if name.as_str() == LeafName::HOSTS && is_host {
            return true;
        }
        // What it would take to ask is what is judged.
        if leaves.iter().any(|(leaf, kind)| leaf == name && !kind.servers().is_empty()) {
            return servers_give;
        }
        recipients_of_leaf(sealing, leaves, name, &config.state)
            .is_ok_and(|of| of.iter().any(|recipient| identities.has(&recipient.shape())))
    })
}

/// Whether a person may have to be asked before a container opens.
pub fn asks_people(store: &StoreConfig) -> Result<bool, Error> {
    let leaves = leaves_of(&store.sealing, store.network)?;
    Ok(leaves.iter().any(|(_, leaf)| leaf.person().is_some()))
}

/// The files of public keys that tell what of a policy this host opens by itself, for an initramfs. Without them a boot would
/// wait for servers that it does not need.
pub fn public_keys(store: &StoreConfig) -> Result<Vec<PathBuf>, Error> {
    let Sealing { owner, hosts, .. } = &store.sealing;
    if !store.sealing.has_policy() {
        return Ok(Vec::new());
    }
    let leaves = leaves_of(&store.sealing, store.network)?;
    let of_leaves = leaves.iter().flat_map(|(_, leaf)| leaf.files()).map(Path::to_owned);
    Ok(owner.iter().chain(hosts).map(|file| file.to_path_buf()).chain(of_leaves).collect())
}

/// The files with which leaves of the policy log in, and whether that and a way to the servers are enough to open the
/// container.
pub fn logins(store: &StoreConfig) -> Result<(Vec<PathBuf>, bool), Error> {
    let leaves = leaves_of(&store.sealing, store.network)?;
    let files = leaves.iter().filter_map(|(_, leaf)| leaf.login()).map(Path::to_owned).collect();
    let asks = |name: &LeafName| leaves.iter().any(|(leaf, kind)| leaf == name && !kind.servers().is_empty());
    Ok((files, store.sealing.policy.is_met_by(&asks)))
}

/// What an initramfs has to have so that the leaves of a policy can be asked.
pub fn taken_by_leaves(store: &StoreConfig) -> Result<Vec<Takes>, Error> {
    let leaves = leaves_of(&store.sealing, store.network)?;
    let takes = leaves.iter().map(|(_, leaf)| leaf.takes().map_err(SealError::from));
    Ok(takes.collect::<Result<_, _>>()?)
}

/// Whether an entry of the lockbox opens a volume where the container's policy takes more than an admitted host, and nobody
/// has allowed that.
pub(super) fn is_lockbox_weaker(config: &Config, store: &StoreConfig) -> bool {
    let is_host = |name: &LeafName| name.as_str() == LeafName::HOSTS;
    let allowed = config.lockbox.as_ref().is_some_and(|lockbox| lockbox.weaker);
    !allowed && !store.sealing.policy.is_met_by(&is_host)
}

/// The servers and tokens of a policy, as a place that has the key if enough of them have their shares. Other leaves are judged
/// by themselves: this host's identities are places, too.
pub(super) fn place(sealing: &Sealing, network: Network) -> Result<Option<Place>, ConfigError> {
    let leaves = leaves_of(sealing, network)?;
    Ok(place_of(&sealing.policy, &leaves))
}

fn place_of(policy: &Policy, leaves: &Leaves) -> Option<Place> {
    let (least, of) = match policy {
        Policy::Leaf(name) => {
            let (_, leaf) = leaves.iter().find(|(leaf, _)| leaf == name)?;
            let mut places = leaf.places(name);
            // At several, such as the addresses of a server: each of them gives the share.
            return match places.len() {
                0 => None,
                1 => places.pop(),
                _ => Some(group(1, places, format!("leaf {name}"))),
            };
        }
        Policy::Any(of) => (1, of),
        Policy::Threshold { least, of } => (*least, of),
    };
    let places: Vec<_> = of.iter().filter_map(|policy| place_of(policy, leaves)).collect();
    (!places.is_empty()).then(|| group(least, places, policy.to_string()))
}

fn group(least: usize, of: Vec<Place>, what: String) -> Place {
    Place { what, at: Location::Threshold { least, of }, opens: true }
}

impl Container {
    /// What may open it, as the configuration says.
    pub fn policy(&self) -> &Policy {
        &self.sealing.policy
    }

    /// Asks what the current container key takes, and tells what each part of its policy says; `None` if it has the default, or
    /// there is no key yet.
    pub fn ask_policy(&self) -> Result<Option<Told>, Error> {
        let Some(current) = self.container_keys()?.current()? else { return Ok(None) };
        match self.container_key(current.epoch) {
            Ok(key) => Ok(key.told().cloned()),
            Err(Error::ContainerKeyRefused { source: SealError::PolicyNotMet(told), .. }) => Ok(Some(*told)),
            Err(error) => Err(error),
        }
    }

    /// What each part of the policy said of the last container key that was opened here.
    pub fn told(&self) -> Option<Told> {
        let opened = self.opened.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        opened.values().rev().find_map(|key| key.told().cloned())
    }

    /// The leaves whose servers have newer keys than those that the current container key is sealed to.
    pub fn outdated_leaves(&self) -> Result<Vec<LeafName>, Error> {
        let keys = self.container_keys()?;
        let Some(current) = keys.current()? else { return Ok(Vec::new()) };
        Ok(self.identities()?.outdated(&keys.get(current.epoch)?))
    }

    /// Whether a container key could be sealed by the policy now: all public keys are at hand.
    pub fn can_be_sealed(&self) -> Result<(), Error> {
        self.key_recipients(&ContainerKey::random(&self.name, None)?).map(drop)
    }

    /// Whom a container key is sealed to.
    pub(in crate::unlock) fn key_recipients(&self, key: &ContainerKey) -> Result<Vec<Box<dyn Recipient>>, Error> {
        let leaves = leaves_of(&self.sealing, self.network)?;
        let recipients = self.recipients_of(&self.sealing.policy, &leaves, key)?;
        if recipients.is_empty() {
            return Err(Error::NoOwner(self.name.clone()));
        }
        Ok(recipients)
    }

    fn recipients_of(
        &self,
        policy: &Policy,
        leaves: &Leaves,
        key: &ContainerKey,
    ) -> Result<Vec<Box<dyn Recipient>>, Error> {
        Ok(match policy {
            Policy::Leaf(name) => {
                let mut all = recipients_of_leaf(&self.sealing, leaves, name, &self.state)?;
                if name.as_str() == LeafName::HOSTS {
                    all.extend(key.host_recipients()?);
                }
                all
            }
            Policy::Any(of) => {
                let of = of.iter().map(|policy| self.recipients_of(policy, leaves, key));
                of.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect()
            }
            Policy::Threshold { least, of } => {
                let of = of.iter().map(|policy| self.recipients_of(policy, leaves, key));
                let threshold = Threshold::of(*least, of.collect::<Result<_, _>>()?);
                threshold.into_iter().map(|threshold| Box::new(threshold) as Box<dyn Recipient>).collect()
            }
        })
    }

    /// Whom clevis is to seal to, so that it opens as the policy says; and the leaves that it does without, where others are
    /// enough by themselves. Nothing is opened more easily than the policy allows.
    pub fn for_clevis(&self) -> Result<(Whom, Vec<LeafName>), Error> {
        let leaves = leaves_of(&self.sealing, self.network)?;
        let mut without = Vec::new();
        let policy = &self.sealing.policy;
        let whom = self.clevis_of(policy, &leaves, &mut without)?.map_err(|leaf| Error::NotForClevis {
            container: self.name.clone(),
            leaf: leaf.clone(),
            policy: policy.clone(),
        });
        Ok((whom?, without))
    }

    /// The inner error is a leaf that clevis cannot do without.
    fn clevis_of<'a>(
        &self,
        policy: &'a Policy,
        leaves: &Leaves,
        without: &mut Vec<LeafName>,
    ) -> Result<Result<Whom, &'a LeafName>, Error> {
        let (least, of) = match policy {
            Policy::Leaf(name) => {
                let whom = leaves.iter().find(|(leaf, _)| leaf == name).and_then(|(_, leaf)| leaf.clevis(&self.state));
                return Ok(whom.transpose()?.ok_or(name));
            }
            Policy::Any(of) => (None, of),
            Policy::Threshold { least, of } => (Some(*least), of),
        };
        let (mut whom, mut lacking) = (Vec::new(), Vec::new());
        for policy in of {
            match self.clevis_of(policy, leaves, without)? {
                Ok(one) => whom.push(one),
                Err(leaf) => lacking.push(leaf),
            }
        }
        Ok(match (least, lacking.first()) {
            (Some(least), None) => Ok(Whom::Threshold { least, of: whom }),
            (Some(_), Some(leaf)) => Err(*leaf),
            (None, first) => match (Whom::any(whom), first) {
                (Some(any), _) => {
                    without.extend(lacking.iter().copied().cloned());
                    Ok(any)
                }
                (None, Some(leaf)) => Err(*leaf),
                (None, None) => return Err(Error::NoOwner(self.name.clone())),
            },
        })
    }

    fn shape_of(&self, key: &ContainerKey) -> Result<BTreeSet<Shape>, Error> {
        Ok(self.key_recipients(key)?.iter().map(|recipient| recipient.shape()).collect())
    }

    /// Whom a container key is for by the policy, as a digest for comparing.
    pub(super) fn whom_for(&self, key: &ContainerKey) -> Result<String, Error> {
        Ok(hex::encode(&openssl::sha::sha256(format!("{:?}", self.shape_of(key)?).as_bytes())))
    }

    /// Whether a container key is sealed by the policy, to hosts that are admitted as well.
    pub(super) fn is_by_the_policy(&self, key: &ContainerKey) -> Result<bool, Error> {
        let right = self.shape_of(key)?;
        let sealed = self.container_keys()?.get(key.epoch())?;
        Ok(Node::of(&sealed).is_ok_and(|node| node.shape() == right))
    }

    /// What opens the container on this host: the lockbox key if it is open, the identities that the configuration names, and
    /// the leaves of its policy and of former ones: a change of the policy has to open what was sealed by the one before.
    pub(super) fn identities(&self) -> Result<Identities, Error> {
        let lockbox_key = self.lockbox.as_ref().and_then(Lockbox::key);
        let lockbox_key = lockbox_key.map(|key| Box::new(key.clone()) as Box<dyn Identity>);
        let identities = match Identities::read(&self.sealing.identities, &self.sealing.tpm) {
            Err(error) if error.is_missing_file() && (lockbox_key.is_some() || !self.sealing.leaves.is_empty()) => {
                seal::warn_of_missing(&error);
                Identities::default()
            }
            identities => identities?,
        };
        let identities = identities.with(lockbox_key);
        let mut leaves = leaves_of(&self.sealing, self.network)?;
        leaves.extend(other_leaves(&self.sealing, self.network));
        let names = self.names_of_keys(&leaves);
        Ok(identities.with_leaves(leaves, names).with_person(self.asking.clone()))
    }

    /// What people call the holders of keys.
    pub(super) fn names(&self) -> Result<BTreeMap<String, String>, Error> {
        Ok(self.names_of_keys(&leaves_of(&self.sealing, self.network)?))
    }

    /// What people call the holders of keys, as far as their public keys are on this host.
    fn names_of_keys(&self, leaves: &Leaves) -> BTreeMap<String, String> {
        if self.sealing.has_policy() { self.names_by_policy(leaves) } else { BTreeMap::new() }
    }

    /// All leaves, and the names of all keys.
    pub(super) fn all_names(&self) -> Result<(Leaves, BTreeMap<String, String>), Error> {
        let mut leaves = leaves_of(&self.sealing, self.network)?;
        leaves.extend(other_leaves(&self.sealing, self.network));
        let names = self.names_by_policy(&leaves);
        Ok((leaves, names))
    }

    fn names_by_policy(&self, leaves: &Leaves) -> BTreeMap<String, String> {
        let Sealing { owner, escrow, hosts, .. } = &self.sealing;
        let built_in =
            [(LeafName::OWNER, owner.as_slice()), (LeafName::ESCROW, escrow.as_slice()), (LeafName::HOSTS, hosts)];
        let built_in = built_in.into_iter().filter(|(name, _)| self.sealing.policy.names(name));
        let built_in = built_in.map(|(name, files)| (name.to_owned(), seal::recipients(files)));
        let of_leaves = leaves.iter().filter(|(_, leaf)| leaf.servers().is_empty());
        let of_leaves = of_leaves.map(|(name, leaf)| (name.to_string(), leaf.recipients(&self.state)));
        let mut names = BTreeMap::new();
        for (name, recipients) in of_leaves.chain(built_in) {
            for recipient in recipients.into_iter().flatten() {
                if let Shape::Key(kid) = recipient.shape() {
                    names.entry(kid).or_insert_with(|| name.clone());
                }
            }
        }
        names
    }
}
