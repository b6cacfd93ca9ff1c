//! Backups over stores in memory: what is lost comes back, what was retired does not, and nothing is overwritten unasked.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{BackedUp, BackupError, How, Restored, collect, restore};
use crate::{
    base::key::{Consumer, HostName, KeyId, ManagedObject, ObjectFacts, SecretBytes},
    keys::{
        seal::{ContainerKey, OwnerKey},
        store::{Consumers, ContainerKeys, HostKeys, KeyStore, StoreError, memory::Memory},
    },
    unlock::{
        Error,
        container::{By, Container, TrustError, rehearse},
        testing::Site,
    },
};

const AS_IT_IS: How = How { create: false, replace: false, older: false };
const OLDER: How = How { older: true, ..AS_IT_IS };
const REPLACE: How = How { replace: true, ..AS_IT_IS };

fn kept(container: &Container) -> KeyId {
    let facts = ObjectFacts { fresh: true, ..ObjectFacts::symmetric(256) };
    container.keep_object(ManagedObject { facts, value: SecretBytes::random(32).unwrap() }).unwrap().key
}

/// A container with three keys.
fn site() -> (Site, Vec<KeyId>) {
    let site = Site::with("");
    site.container().make_first_key().unwrap();
    let keys = (0..3).map(|_| kept(&site.container())).collect();
    (site, keys)
}

fn back_up(site: &Site, name: &str) -> (PathBuf, BackedUp) {
    let path = site.beside_the_keys(name);
    let backup = collect(&site.config, &site.name, &|_| ()).unwrap();
    let content = backup.write(&path).unwrap();
    (path, content)
}

fn restored(site: &Site, path: &Path, how: How) -> Result<Restored, Error> {
    restore(&site.config, &site.name, path, how, &|_| ())
}

fn refused(site: &Site, path: &Path, how: How) -> BackupError {
    match restored(site, path, how) {
        Err(Error::Backup(error)) => *error,
        other => panic!("{other:?}"),
    }
}

fn rotate(site: &Site) {
    site.container().rotate(Duration::ZERO, &|_| ()).unwrap();
}

/// From now on the container is in another store, which is empty.
fn lose_the_store(site: &mut Site) -> Memory {
    let lost = std::mem::take(&mut site.store);
    site.store.hand_in(&site.name);
    lost
}

/// This machine knows nothing of the container any more.
fn forget(site: &Site) {
    fs::remove_dir_all(site.config.state.as_ref() as &Path).unwrap();
}

#[test]
fn a_lost_store_comes_back_whole_into_another_one() {
    let (mut site, keys) = site();
    let consumer = Consumer { service: "cinder".into(), resource_type: "volume".into(), resource_id: "one".to_owned() };
    site.store.add_consumer(&keys[0], &consumer).unwrap();
    let (host, lockbox): (HostName, _) = ("one".parse().unwrap(), site.store.stored(keys[1]).unwrap());
    HostKeys::create(&site.store, &host, &lockbox).unwrap();
    rotate(&site);
    let (path, content) = back_up(&site, "backup");
    assert_eq!((content.keys, content.container_keys, content.hosts), (3, 2, 1));

    let lost = lose_the_store(&mut site);
    let done = restored(&site, &path, AS_IT_IS).unwrap();
    assert_eq!((done.written, done.unchanged, done.sealed_anew), (6, 0, 0), "{done:?}");
    assert_eq!(site.store.current().unwrap(), lost.current().unwrap());
    for name in keys.iter().map(ToString::to_string).chain(["kek/1", "kek/2", "host/one"].map(str::to_owned)) {
        assert_eq!(site.store.stored(&name), lost.stored(&name), "{name}");
    }
    assert_eq!(site.store.consumers(&keys[0]).unwrap(), [consumer]);
    keys.iter().for_each(|id| drop(site.container().object(id).unwrap()));
    let again = restored(&site, &path, AS_IT_IS).unwrap();
    assert_eq!((again.written, again.unchanged), (0, 6), "{again:?}");
}

#[test]
fn a_machine_that_knows_nothing_restores_and_trusts_the_author_from_then_on() {
    let (mut site, keys) = site();
    let (path, _) = back_up(&site, "backup");
    lose_the_store(&mut site);
    forget(&site);
    restored(&site, &path, AS_IT_IS).unwrap();
    assert!(site.container().trusted_epoch().unwrap().is_some());
    site.container().object(&keys[0]).unwrap();
}

#[test]
fn a_restore_that_was_stopped_goes_on() {
    let (mut site, keys) = site();
    rotate(&site);
    let (path, _) = back_up(&site, "backup");
    for action in ["create", "set current", "get"] {
        let lost = lose_the_store(&mut site);
        let denied = || StoreError::Denied { action: "write to", at: "memory".to_owned() };
        site.store.fail_at(action, denied());
        assert!(matches!(restored(&site, &path, AS_IT_IS), Err(Error::Store(StoreError::Denied { .. }))), "{action}");
        restored(&site, &path, AS_IT_IS).unwrap();
        assert_eq!(site.store.current().unwrap(), lost.current().unwrap());
        keys.iter().for_each(|id| drop(site.container().object(id).unwrap()));
    }
}

#[test]
fn what_is_there_is_replaced_only_when_asked() {
    let (site, keys) = site();
    let (path, _) = back_up(&site, "backup");
    let (right, wrong) = (site.store.stored(keys[0]).unwrap(), site.store.stored(keys[1]).unwrap());
    site.store.put(keys[0], wrong.clone());
    let done = restored(&site, &path, AS_IT_IS).unwrap();
    assert_eq!((done.written, done.left_alone.len()), (0, 1), "{done:?}");
    assert_eq!(site.store.stored(keys[0]), Some(wrong));
    let done = restored(&site, &path, REPLACE).unwrap();
    assert_eq!((done.written, done.replaced.len()), (1, 1), "{done:?}");
    assert_eq!(site.store.stored(keys[0]), Some(right));
}

#[test]
fn a_store_that_makes_up_ids_says_what_it_does_not_hold_and_loses_nothing() {
    let (site, keys) = site();
    let (path, _) = back_up(&site, "backup");
    let wrong = site.store.stored(keys[1]).unwrap();
    site.store.put(keys[0], wrong.clone());
    KeyStore::delete(&site.store, &keys[2]).unwrap();
    site.store.make_up_ids();
    let done = restored(&site, &path, REPLACE).unwrap();
    assert_eq!((done.written, done.not_held.len()), (0, 2), "{done:?}");
    assert_eq!(site.store.stored(keys[0]), Some(wrong), "what could not come back is not deleted");
}

#[test]
fn a_later_form_stays_whatever_is_asked() {
    let (site, keys) = site();
    let (path, _) = back_up(&site, "backup");
    site.container().give_out(&keys[0]).unwrap();
    let later = site.store.stored(keys[0]);
    let done = restored(&site, &path, How { older: true, ..REPLACE }).unwrap();
    assert_eq!((done.written, done.later.len()), (0, 1), "{done:?}");
    assert_eq!(site.store.stored(keys[0]), later);
}

#[test]
fn a_key_that_was_given_out_since_does_not_come_back_unused_unasked() {
    let (site, keys) = site();
    let (path, _) = back_up(&site, "backup");
    site.container().give_out(&keys[0]).unwrap();
    site.container().object(&keys[0]).unwrap();
    KeyStore::delete(&site.store, &keys[0]).unwrap();
    let BackupError::Older { brings, .. } = refused(&site, &path, AS_IT_IS) else { panic!("it is older") };
    assert_eq!(brings, [format!("key {}", keys[0])]);
    let done = restored(&site, &path, OLDER).unwrap();
    assert_eq!((done.written, done.sealed_anew), (1, 1), "{done:?}");
    site.container().object(&keys[0]).expect("its generation is later than what this host has seen");
}

#[test]
fn an_older_backup_brings_back_what_was_retired_only_when_asked() {
    let (site, keys) = site();
    let host: HostName = "one".parse().unwrap();
    HostKeys::create(&site.store, &host, &site.store.stored(keys[1]).unwrap()).unwrap();
    let (path, _) = back_up(&site, "backup");
    (0..3).for_each(|_| rotate(&site));
    HostKeys::delete(&site.store, &host).unwrap();
    KeyStore::delete(&site.store, &keys[0]).unwrap();
    assert!(site.store.stored("kek/1").is_none(), "it was retired");
    let BackupError::Older { brings, .. } = refused(&site, &path, AS_IT_IS) else { panic!("it is older") };
    assert_eq!(
        brings,
        ["container key 1".to_owned(), "lockbox key of host one".to_owned(), format!("key {}", keys[0])]
    );
    assert!(site.store.stored("kek/1").is_none() && site.store.stored(keys[0]).is_none(), "nothing was written");

    let done = restored(&site, &path, OLDER).unwrap();
    assert_eq!((&done.brought_back, done.sealed_anew), (&brings, 1), "{done:?}");
    let sealed = site.store.stored(keys[0]).unwrap();
    assert!(
        sealed.recipient_kids().eq([format!("{}/kek/4", site.name)]),
        "no proof leads from the first to the fourth"
    );
    site.container().object(&keys[0]).unwrap();
    assert_eq!(site.store.current().unwrap().unwrap().epoch, "4".parse().unwrap());
}

#[test]
fn a_store_that_is_lost_comes_back_from_an_older_backup_when_asked() {
    let (mut site, keys) = site();
    let (path, _) = back_up(&site, "backup");
    rotate(&site);
    lose_the_store(&mut site);
    let BackupError::Older { brings, .. } = refused(&site, &path, AS_IT_IS) else { panic!("it is older") };
    assert!(brings[0].contains("1 as the current one, where this host knows 2"), "{brings:?}");
    restored(&site, &path, OLDER).unwrap();
    keys.iter().for_each(|id| drop(site.container().object(id).unwrap()));
    kept(&site.container());
}

#[test]
fn nobody_but_the_holder_of_the_container_key_makes_a_backup() {
    let (site, _) = site();
    let (path, _) = back_up(&site, "backup");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"rotating\":false", "\"rotating\":true")).unwrap();
    assert!(matches!(refused(&site, &path, OLDER), BackupError::Forged { .. }));
    let owner = site.beside_the_keys("owner.key").to_str().unwrap().parse().unwrap();
    let found = rehearse(&site.config, &site.name, &By::Identity(&owner), Some(&path), &|_| ());
    assert!(matches!(found, Err(Error::Backup(error)) if matches!(*error, BackupError::Forged { .. })));
    fs::write(&path, &text).unwrap();
    let found = rehearse(&site.config, &site.name, &By::Identity(&owner), Some(&path), &|_| ()).unwrap();
    assert_eq!((found.saved, found.lost.len()), (3, 0));

    // Anybody can seal a container key to the owner, and vouch with that.
    let other = ContainerKey::random(&site.name, None).unwrap();
    let sealed = other.seal_to(site.container().key_recipients(&other).unwrap(), 0).unwrap();
    let (honest, memory) = (site.store.clone(), Memory::default());
    memory.hand_in(&site.name);
    ContainerKeys::create(&memory, other.epoch(), &sealed).unwrap();
    memory.set_current(&honest.current().unwrap().unwrap(), "").unwrap();
    let state = fs::read(site.config.state.join("containers").join(site.name.as_str())).unwrap();
    forget(&site);
    let (forged, _) = back_up(&site, "forged");
    fs::create_dir_all(site.config.state.join("containers")).unwrap();
    fs::write(site.config.state.join("containers").join(site.name.as_str()), state).unwrap();
    for store in [honest, Memory::default()] {
        store.hand_in(&site.name);
        let refused = restored(&site, &forged, OLDER);
        assert!(matches!(refused, Err(Error::Trust(TrustError::Another { .. }))), "{refused:?}");
        assert!(store.list().unwrap().is_empty() || store.list().unwrap().len() == 3);
    }
}

#[test]
fn a_backup_of_another_container_or_none_is_refused() {
    let ((one, _), (other, _)) = (site(), site());
    let (path, _) = back_up(&one, "backup");
    assert!(matches!(refused(&other, &path, AS_IT_IS), BackupError::OtherContainer { .. }));
    fs::write(&path, "{}\n{}\n").unwrap();
    assert!(matches!(refused(&one, &path, AS_IT_IS), BackupError::Malformed { .. }));
    nix::unistd::mkfifo(&one.beside_the_keys("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(refused(&one, &one.beside_the_keys("pipe"), AS_IT_IS), BackupError::File { .. }));
}

#[test]
fn a_backup_is_written_once_and_for_its_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let (site, _) = site();
    let (path, _) = back_up(&site, "backup");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let before = fs::read(&path).unwrap();
    let again = collect(&site.config, &site.name, &|_| ()).unwrap().write(&path);
    assert!(matches!(again, Err(BackupError::File { .. })));
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn a_store_that_fails_in_the_middle_gives_no_backup() {
    let (site, _) = site();
    site.store.fail_at("list consumers", StoreError::Denied { action: "read from", at: "memory".to_owned() });
    assert!(matches!(collect(&site.config, &site.name, &|_| ()), Err(Error::Store(StoreError::Denied { .. }))));
}

#[test]
fn a_stranger_cannot_restore() {
    let (mut site, _) = site();
    let (path, _) = back_up(&site, "backup");
    lose_the_store(&mut site);
    let owner = OwnerKey::generate().unwrap();
    fs::write(site.beside_the_keys("owner.key"), owner.private_pem().unwrap().expose()).unwrap();
    assert!(matches!(restored(&site, &path, AS_IT_IS), Err(Error::ContainerKeyRefused { .. })));
    assert!(site.store.list().unwrap().is_empty() && site.store.epochs().unwrap().is_empty());
}

/// A store can claim any number, and damage may come after a rotation.
#[test]
fn a_damaged_key_is_no_later_form_of_it() {
    let (site, keys) = site();
    let (path, _) = back_up(&site, "backup");
    rotate(&site);
    let mut damaged = site.store.stored(keys[0]).unwrap();
    damaged.ciphertext.replace_range(..2, if damaged.ciphertext.starts_with("AA") { "BB" } else { "AA" });
    site.store.put(keys[0], damaged);
    assert!(site.container().object(&keys[0]).is_err());
    let told = restored(&site, &path, OLDER).unwrap();
    assert_eq!((told.left_alone.len(), told.later.len()), (1, 2), "{told:?}");
    let done = restored(&site, &path, How { replace: true, ..OLDER }).unwrap();
    assert_eq!((done.replaced.len(), done.sealed_anew), (1, 1), "{done:?}");
    keys.iter().for_each(|id| drop(site.container().object(id).unwrap()));
}
