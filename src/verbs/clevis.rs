//! Volumes that clevis opens: taking its tokens over, and making them.
//!
//! A token stands on the volume itself, and it names servers. Nothing here is done unless a person asks for it: attach, boot
//! and the hooks open no token of clevis.

use std::path::Path;

use serde::Serialize;

use crate::{
    base::key::{KeyReference, SecretBytes, StoreName, VolumeKey},
    config::{Config, LeafName, Policy},
    keys::seal::{
        clevis::{self, Binding, Leaf, Means, Whom},
        leaves,
    },
    unlock::{
        audit::{self, Event},
        case::{Asked, Case, Circumstances, Strictness, random_passphrase},
        container::{Container, Use},
    },
    verbs::{as_texts, error::Error, key_file},
    volumes::header::{self, ClevisToken, Volume},
};

/// A token of clevis that opens its volume. Only [`open`] makes one: whoever made the token knew a passphrase of the volume.
pub struct Opened {
    pub binding: Binding,
    pub passphrase: SecretBytes,
    pub volume_key: VolumeKey,
}

/// Opens the volume's tokens in turn, until one opens a keyslot.
pub fn open(config: &Config, volume: &Volume) -> Result<Opened, Error> {
    let tokens = volume.luks().map(|luks| &luks.clevis[..]).unwrap_or_default();
    let mut last = Error::NoClevis(volume.device.path.clone());
    for token in tokens {
        match open_token(config, volume, token) {
            Ok(opened) => return Ok(opened),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn open_token(config: &Config, volume: &Volume, token: &ClevisToken) -> Result<Opened, Error> {
    let means = Means { network: config.network, tcti: &config.tpm.tcti() };
    let opened = Binding::of_members(&token.jwe).and_then(|binding| {
        tracing::info!("opening the clevis token {}: {binding}", token.number);
        let passphrase = binding.open(&means)?;
        Ok((binding, passphrase))
    });
    let device = volume.device.path.clone();
    let (binding, passphrase) =
        opened.map_err(|source| Error::Clevis { device, token: token.number.clone(), source: Box::new(source) })?;
    let (volume_key, _) = volume.open_keyslot_of(&passphrase, Some(&token.keyslots))?;
    Ok(Opened { binding, passphrase, volume_key })
}

/// The passphrase that clevis would open the volume with.
pub fn passphrase(config: &Config, device: &Path, header: Option<&Path>) -> Result<SecretBytes, Error> {
    let volume = header::probe(device, header)?;
    let opened = open(config, &volume)?;
    audit::done(config, &Event { action: "release by clevis", device: Some(&volume.device.path), ..Event::default() });
    Ok(opened.passphrase)
}

/// What to write into the configuration, so that a container opens as clevis has opened.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Proposal {
    /// The store's `opens`.
    pub opens: String,
    /// The tables of leaves that are not there yet.
    pub leaves: Vec<String>,
}

/// The policy of the volume's token, which is opened first: what opens no keyslot is nobody's policy.
pub fn proposal(config: &Config, device: &Path, header: Option<&Path>) -> Result<Proposal, Error> {
    let volume = header::probe(device, header)?;
    propose(config, &open(config, &volume)?.binding)
}

fn propose(config: &Config, binding: &Binding) -> Result<Proposal, Error> {
    let mut tables = Vec::new();
    let mut named: Vec<String> = Vec::new();
    let of_configuration = |url: &_| {
        let is_of = |name, leaf| leaves::kind(name, leaf, config.network).is_ok_and(|kind| clevis::is_of(&*kind, url));
        config.leaves.iter().find(|(name, leaf)| is_of(name, leaf)).map(|(name, _)| name.to_string())
    };
    let expression = binding.expression(&mut |leaf| {
        let stem;
        let (beginning, table) = match leaf {
            Leaf::Tang { url, thumbprint } => {
                if let Some(name) = of_configuration(url) {
                    return name;
                }
                let url = url.as_str().trim_end_matches('/');
                ("t", format!("tang = \"{url}\"\nthumbprint = \"{}\"", thumbprint.unwrap_or_default()))
            }
            Leaf::Foreign(pin) => {
                stem = format!("{pin}-");
                (&stem[..], format!("public = \"FILE\"          # of a key that stands for clevis' pin {pin}"))
            }
        };
        let is_free = |name: &String| !named.contains(name) && !config.leaves.keys().any(|leaf| leaf.as_str() == name);
        let name = (1..).map(|number| format!("{beginning}{number}")).find(is_free).unwrap_or_default();
        tables.extend([format!("[leaves.{name}]")].into_iter().chain(table.lines().map(str::to_owned)));
        named.push(name.clone());
        name
    });
    let opens = format!("any(escrow, {expression})");
    match opens.parse::<Policy>() {
        Ok(policy) => Ok(Proposal { opens: policy.to_string(), leaves: tables }),
        Err(why) => Err(Error::Usage(format!("the policy of clevis is none of ours: {opens}: {why}"))),
    }
}

/// Which volume clevis is to open.
pub struct Export<'a> {
    pub device: &'a Path,
    /// A detached LUKS header.
    pub header: Option<&'a Path>,
    /// The key; what the LUKS2 token says unless given.
    pub key: Option<KeyReference>,
    /// A keyslot's passphrase, and the store whose policy counts; the volume's own key and store unless given.
    pub secret: Option<(SecretBytes, Option<StoreName>)>,
    /// How strict to be about separation.
    pub separation: Strictness,
}

/// What was made for clevis.
#[derive(Serialize)]
pub struct Exported {
    pub keyslot: u32,
    /// What opens it, in words.
    pub opens: String,
    /// Leaves that clevis does without.
    #[serde(serialize_with = "as_texts")]
    pub without: Vec<LeafName>,
}

/// Adds a keyslot and a token with which clevis opens the volume as the policy of its container says. The keyslot has a
/// passphrase of its own: 'clevis luks unbind' removes it.
pub fn export(config: &Config, request: Export<'_>) -> Result<Exported, Error> {
    let volume = header::probe(request.device, request.header)?;
    let policy_of = |store: &StoreName| Container::open(config, store, None, Use::Keys)?.for_clevis();
    match request.secret {
        Some((mut secret, store)) => {
            let policy = policy_of(&config.store_or_default(store.as_ref())?)?;
            add(config, &volume, &key_file::open(&volume, &mut secret)?, policy)
        }
        None => {
            let case = Case::find(config, volume, Asked { key: request.key, ..Asked::default() })?;
            let policy = policy_of(&case.reference().store)?;
            let given = Circumstances { strictness: request.separation, ..Circumstances::default() };
            let unlocked = case.prove(given)?.key()?;
            add(config, unlocked.volume(), unlocked.key(), policy)
        }
    }
}

fn add(
    config: &Config,
    volume: &Volume,
    key: &VolumeKey,
    (whom, without): (Whom, Vec<LeafName>),
) -> Result<Exported, Error> {
    let passphrase = random_passphrase()?;
    let jwe = clevis::seal(&whom, &passphrase).and_then(|jwe| clevis::to_members(&jwe))?;
    let opens = Binding::of_members(&jwe)?.to_string();
    let keyslot = volume.add_keyslot(key, &passphrase, &|keyslot| ClevisToken::json(&jwe, keyslot))?;
    audit::done(config, &Event { action: "export to clevis", device: Some(&volume.device.path), ..Event::default() });
    Ok(Exported { keyslot, opens, without })
}
