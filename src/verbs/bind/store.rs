//! The key in the TPM and the store that `bind` makes where there are none, and taking them back.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Request, journal::Made, plan::Plan};
use crate::{
    base::{key::StoreName, pcr_set::PcrSet},
    config::{Config, LeafConfig, LeafName, Policy, StoreConfig, TpmConfig},
    keys::{
        seal::{clevis, leaves},
        store,
        tpm::{self, Tpm},
    },
    sys::durable::folder_of,
    unlock,
    verbs::{
        container, edit,
        error::Error,
        init::{self, keep},
        leaf, policy, setup,
        setup::NewPlace,
    },
};

/// Makes this host's key in its TPM. It needs no administrator: nobody else seals to it.
pub fn make_tpm_key(config: &Config, pcrs: Option<PcrSet>) -> Result<(), Error> {
    let bound = TpmConfig { pcrs: pcrs.or(config.tpm.pcrs), ..config.tpm.clone() };
    let (tpm, with_pin) = (Tpm::open(&bound)?, bound.pin.is_some());
    let policy = tpm.policy_here(&bound, with_pin)?;
    let pin = with_pin.then(|| tpm::pin(&bound)).transpose()?;
    let made = tpm.create_identity(&policy, pin.as_ref())?;
    let (path, folder) = (&*bound.identity, folder_of(&bound.identity));
    fs::create_dir_all(folder).map_err(Error::io(format!("make {}", folder.display())))?;
    keep(path, 0o600, made.file.to_pem()?.as_bytes())
}

/// Makes the store, or goes on with it: what opens it besides comes last.
pub fn make(request: &Request<'_>, plan: &Plan) -> Result<(), Error> {
    let (path, wishes) = (request.config, request.wishes);
    if plan.new_store {
        let recovery = request.hands.filter(|_| plan.recovery);
        let place = NewPlace::Tpm;
        let escrow = wishes.escrow.as_deref();
        init::init(path, &init::Request { store: &plan.store, place, escrow, owner: None, identity: None, recovery })?;
    }
    let wanted = match (&wishes.opens, &wishes.tang) {
        (Some(policy), _) => policy.clone(),
        (None, Some(url)) => with_tang(request, &plan.store, url)?,
        (None, None) => return Ok(()),
    };
    if setup::configuration(path)?.store(&plan.store)?.sealing.policy == wanted {
        return Ok(());
    }
    policy::change(path, &plan.store, &wanted, Duration::ZERO, &request.attendant, &|_| {}).map(drop)
}

/// The policy of TPM and server. Their leaves are written into the configuration, and the server's key is pinned.
fn with_tang(request: &Request<'_>, store: &StoreName, url: &str) -> Result<Policy, Error> {
    let address = url.parse().map_err(|_| Error::Usage(format!("'{url}' is no address of a Tang server")))?;
    let config = setup::configuration(request.config)?;
    let kind = |name: &LeafName, leaf: &LeafConfig| leaves::kind(name, leaf, config.network).ok();
    let found = |is_it: &dyn Fn(&dyn leaves::Kind) -> bool| {
        let is = |(name, leaf): &(&LeafName, &LeafConfig)| kind(name, leaf).is_some_and(|kind| is_it(&*kind));
        config.leaves.iter().find(is).map(|(name, _)| name.clone())
    };
    let owner = config.store(store)?.sealing.owner.clone().map(PathBuf::from).unwrap_or_default();
    let mut tables = String::new();
    let mut leaf = |found: Option<LeafName>, stem: &str, member: &str, value: &str| {
        found.map_or_else(
            || {
                let (name, value) = (setup::free_leaf(stem, &config.leaves)?, toml::Value::String(value.to_owned()));
                tables += &format!("[leaves.{name}]\n{member} = {value}\n\n");
                Ok::<_, Error>(name)
            },
            Ok,
        )
    };
    let tpm = leaf(found(&|kind| kind.files().contains(&&*owner)), "tpm", "public", &owner.to_string_lossy())?;
    let tang = leaf(found(&|kind| clevis::is_of(kind, &address)), "tang", "tang", url)?;
    if !tables.is_empty() {
        edit::with_table(request.config, &tables)?.write()?;
    }
    let config = setup::configuration(request.config)?;
    leaf::pin(&config, &tang, request.thumbprint, |pin, offer| (request.choose)(&tang, pin, offer))?;
    let sealing = &config.store(store)?.sealing;
    let escrow = sealing.escrow.as_ref().map(|_| LeafName::ESCROW.to_owned());
    let paper = container::recovery_leaf(&config, store).ok().map(|leaf| leaf.to_string());
    let both = format!("all({tpm}, {tang})");
    let any: Vec<_> = escrow.into_iter().chain(paper).chain([both]).collect();
    let text = if any.len() > 1 { format!("any({})", any.join(", ")) } else { any.concat() };
    text.parse().map_err(|why| Error::Usage(format!("{text}: {why}")))
}

/// Removes the store that was made, with its leaves and files, if it has no key; why not, in words, if it stays.
pub fn unmake(path: &Path, noted: &Made) -> Result<Option<String>, Error> {
    let Some(name) = &noted.store else { return Ok(None) };
    let config = super::or_empty(path)?;
    let Ok(made) = config.store(name) else { return Ok(None) };
    let used = [
        (config.default_store.as_ref() == Some(name) && config.stores.len() > 1, "it is the default_store"),
        (config.lockbox.as_ref().is_some_and(|lockbox| lockbox.store == *name), "[lockbox] names it"),
    ];
    if let Some((_, why)) = used.into_iter().find(|(is_used, _)| *is_used) {
        return Ok(Some(format!("the store '{name}' stays: {why}")));
    }
    match store::kind(made)?.unmake(name, made).transpose()? {
        Some(true) => {}
        _ => return Ok(Some(format!("the store '{name}' stays: it has keys of other volumes"))),
    }
    let is_shared = |leaf: &LeafName| {
        let others = config.stores.iter().filter(|(other, _)| *other != name);
        others.into_iter().any(|(_, other)| other.sealing.leaves.contains_key(leaf))
    };
    let leaves: Vec<_> = made.sealing.leaves.iter().filter(|(leaf, _)| !is_shared(leaf)).collect();
    remove_files(path, name, made, &leaves)?;
    unlock::container::forget(&config, name)?;
    let mut tables = vec![("stores", name.as_str())];
    tables.extend(leaves.iter().map(|(leaf, _)| ("leaves", leaf.as_str())));
    let edited = edit::without_tables(path, &tables)?;
    if edited.is_empty() && noted.config {
        remove(path)?;
    } else {
        edited.write()?;
    }
    Ok(None)
}

/// What `init` has written beside the configuration, and what this host remembers of leaves.
fn remove_files(
    path: &Path,
    name: &StoreName,
    made: &StoreConfig,
    leaves: &[(&LeafName, &LeafConfig)],
) -> Result<(), Error> {
    let folder = setup::absolute(folder_of(path))?;
    let own = ["owner.pem", "escrow.pem"].map(|end| folder.join(format!("{name}.{end}")));
    own.iter().try_for_each(|file| remove(file))?;
    for (leaf, config) in leaves {
        if let Some((_, file)) = leaves::kind(leaf, config, made.network)?.person() {
            remove(file)?;
        }
        remove(&config.memory)?;
    }
    Ok(())
}

/// Removes the key in the TPM that was made, unless something else is opened by it.
pub fn unmake_tpm_key(path: &Path, noted: &Made) -> Result<Option<String>, Error> {
    let Some(key) = &noted.tpm_key else { return Ok(None) };
    let config = super::or_empty(path)?;
    let of_stores = config.stores.values().flat_map(|store| &store.sealing.identities);
    let mut all = of_stores.chain(config.lockbox.iter().flat_map(|lockbox| &lockbox.identities));
    if all.any(|identity| *identity.path == **key) {
        return Ok(Some(format!("this host's key in the TPM stays: {} opens other keys, too", key.display())));
    }
    remove(key).map(|()| None)
}

/// Removes a file; one that is not there is gone.
fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io(format!("remove {}", path.display()))(error))
        }
        _ => Ok(()),
    }
}
