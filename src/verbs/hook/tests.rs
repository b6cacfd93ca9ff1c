//! Which blank device may be formatted with which key: copies, second beginnings, and who tries to have more formatted.

use std::fs;

use super::*;
use crate::{
    base::key::{KeyId, ManagedObject, ObjectFacts},
    keys::store::StoreError,
    unlock::{self, container::TenantKeys, testing::Site},
};

pub fn request(site: &Site, device: &str, key: &KeyReference) -> Request {
    Request {
        device: site.path(device),
        link: None,
        name: "data".parse().unwrap(),
        key: key.clone(),
        plain: false,
        cipher: None,
        key_size: None,
        target: None,
        volume_id: None,
        fills: false,
    }
}

/// A cloud's volumes, in files, with their keys in a store in memory.
struct Cloud {
    site: Site,
}

impl Cloud {
    fn new() -> Self {
        Self { site: Site::with("") }
    }

    fn tenant(&self, project: &str) -> Tenant {
        Tenant::vouched_for(&self.site.name, project, None)
    }

    fn keys(&self) -> TenantKeys {
        self.keys_of("AAAA")
    }

    fn keys_of(&self, project: &str) -> TenantKeys {
        self.site.keys_of(&self.tenant(project))
    }

    fn key(&self) -> KeyReference {
        create_key(&self.site.config, &self.keys(), ObjectFacts::symmetric(256)).unwrap()
    }

    /// As Cinder clones a key.
    fn copy(&self, key: &KeyReference) -> KeyReference {
        copy_key(&self.site.config, &self.keys(), key, &self.keys()).unwrap()
    }

    fn try_to_attach(&self, device: &str, key: &KeyReference, image_of: Option<&str>) -> Result<(), Error> {
        let request = Request {
            volume_id: Some(image_of.unwrap_or("v").to_owned()),
            fills: image_of.is_some(),
            ..request(&self.site, device, key)
        };
        attach(&self.site.config, &self.site.backend, &request, &self.tenant("AAAA"))?;
        detach(&self.site.backend, &request.name).map(drop)
    }

    #[track_caller]
    fn attaches(&self, device: &str, key: &KeyReference) {
        self.try_to_attach(device, key, None).unwrap();
    }

    /// Cinder fills the volume of that id; how it ends is not told.
    #[track_caller]
    fn fills(&self, device: &str, key: &KeyReference, id: &str) {
        self.try_to_attach(device, key, Some(id)).unwrap();
    }

    /// A wrong LUN: a blank device in place of the volume.
    #[track_caller]
    fn refuses_a_blank_device(&self, key: &KeyReference, image_of: Option<&str>) {
        let wrong = self.site.blank("wrong");
        let refused = self.try_to_attach("wrong", key, image_of).expect_err("it was formatted");
        assert!(matches!(refused, Error::Unlock(unlock::Error::KeyUsed { .. })), "{refused:?}");
        assert_eq!(refused.exit(), Exit::InTheWay);
        assert!(refused.next_step().is_some());
        assert!(is_blank(&wrong), "it was written to");
    }

    fn is_fresh(&self, key: &KeyReference) -> bool {
        get_key(&self.site.config, &self.keys(), key, false).unwrap().facts.fresh
    }
}

fn is_blank(path: &Path) -> bool {
    fs::read(path).unwrap().iter().all(|byte| *byte == 0)
}

#[test]
fn a_clone_snapshot_backup_or_transfer_before_the_first_attach_ends_no_volume() {
    let cloud = Cloud::new();
    let key = cloud.key();
    let copies = [(); 3].map(|()| cloud.copy(&key));
    let of_a_copy = cloud.copy(&copies[0]);
    assert!(cloud.is_fresh(&key), "nobody has its value");
    for (name, key) in ["a", "b", "c", "d", "e"].into_iter().zip([&key].into_iter().chain(&copies).chain([&of_a_copy]))
    {
        let device = cloud.site.blank(name);
        cloud.attaches(name, key);
        assert!(!is_blank(&device));
        cloud.attaches(name, key);
        cloud.refuses_a_blank_device(key, None);
    }
    // One that is deleted after it was transferred.
    let (key, _) = (cloud.key(), cloud.site.blank("f"));
    let moved = cloud.copy(&key);
    delete_key(&cloud.site.config, &cloud.keys(), &key, false).unwrap();
    cloud.attaches("f", &moved);
}

#[test]
fn a_copy_of_a_key_that_may_have_been_used_formats_nothing() {
    let cloud = Cloud::new();
    let (formatted, given_out, stored) = (cloud.key(), cloud.key(), cloud.key());
    cloud.site.blank("a");
    cloud.attaches("a", &formatted);
    get_key(&cloud.site.config, &cloud.keys(), &given_out, true).unwrap();
    // With its value, as a program does that does not say what it is a copy of; also if it claims more.
    let value = get_key(&cloud.site.config, &cloud.keys(), &stored, true).unwrap().value.unwrap();
    let facts = ObjectFacts { fresh: true, filling: Some("v".to_owned()), ..ObjectFacts::symmetric(256) };
    let stored = store_key(&cloud.site.config, &cloud.keys(), ManagedObject { facts, value }).unwrap();
    for key in [formatted, given_out, stored] {
        let copy = cloud.copy(&key);
        for key in [&key, &copy, &cloud.copy(&copy)] {
            assert!(!cloud.is_fresh(key));
            cloud.refuses_a_blank_device(key, None);
            cloud.refuses_a_blank_device(key, Some("v"));
        }
    }
}

#[test]
fn a_clone_of_a_volume_with_data_opens_with_the_copy_and_the_copy_is_used_then() {
    let cloud = Cloud::new();
    let key = cloud.key();
    // Copied while it was unused; Cinder copied the device after somebody had attached it.
    let copy = cloud.copy(&key);
    let device = cloud.site.blank("a");
    cloud.attaches("a", &key);
    fs::copy(&device, cloud.site.path("clone")).unwrap();
    cloud.attaches("clone", &copy);
    assert!(!cloud.is_fresh(&copy));
    cloud.refuses_a_blank_device(&copy, None);
    assert_eq!(fs::read(device).unwrap(), fs::read(cloud.site.path("clone")).unwrap());
}

#[test]
fn nobody_copies_the_key_of_another_project() {
    let cloud = Cloud::new();
    let (key, before) = (cloud.key(), cloud.site.keys().len());
    let (own, others) = (cloud.keys(), cloud.keys_of("BBBB"));
    for to in [&others, &own] {
        let told = |key: &KeyReference| {
            let refused = copy_key(&cloud.site.config, &others, key, to).err().unwrap();
            assert!(
                matches!(&refused, Error::Unlock(unlock::Error::Store(StoreError::NotFound { .. }))),
                "{refused:?}"
            );
            refused.to_string().replace(&key.key.to_string(), "ID")
        };
        let missing = KeyReference { key: KeyId::random(), ..key.clone() };
        assert_eq!(told(&key), told(&missing), "there is nothing to tell them apart by");
    }
    assert_eq!(cloud.site.keys().len(), before, "no copy is left");
    // A transfer: who may use it makes the copy for another, whose it is then alone.
    let given = copy_key(&cloud.site.config, &own, &key, &others).unwrap();
    assert!(get_key(&cloud.site.config, &own, &given, false).is_err());
    assert!(get_key(&cloud.site.config, &others, &given, false).unwrap().facts.fresh);
    let audit = cloud.site.audit();
    assert!(audit.contains(&format!(r#""action":"key copy","key":"{key}""#)), "{audit}");
}

#[test]
fn an_image_is_written_again_from_the_beginning_until_somebody_opens_the_volume() {
    let cloud = Cloud::new();
    let key = cloud.key();
    let first = cloud.site.blank("first");
    cloud.fills("first", &key, "v");
    // On the way it fails, and Cinder begins again: another device, the same volume.
    let second = cloud.site.blank("second");
    cloud.fills("second", &key, "v");
    cloud.fills("second", &key, "v");
    assert!(!is_blank(&second));
    // What was given up is no volume of the key's any more.
    let given_up = cloud.try_to_attach("first", &key, None).unwrap_err();
    assert_eq!(given_up.exit(), Exit::KeyRefused, "{given_up:?}");
    assert!(!is_blank(&first));

    cloud.refuses_a_blank_device(&key, Some("another"));
    // A migration, or Nova: it does not fill the volume, so that it has to be there.
    cloud.refuses_a_blank_device(&key, None);
    cloud.attaches("second", &key);
    // From now on somebody may have written to it.
    cloud.refuses_a_blank_device(&key, Some("v"));
    cloud.refuses_a_blank_device(&key, None);
    cloud.attaches("second", &key);
}

#[test]
fn no_image_is_begun_again_on_a_volume_that_was_not_made_for_one() {
    let cloud = Cloud::new();
    let (key, given_out, copied) = (cloud.key(), cloud.key(), cloud.key());
    for (name, key) in [("a", &key), ("b", &given_out), ("c", &copied)] {
        cloud.site.blank(name);
        match name {
            // A rebuild of a server fills it; its data were there before.
            "a" => cloud.attaches(name, key),
            _ => cloud.fills(name, key, "v"),
        }
    }
    cloud.fills("a", &key, "v");
    cloud.refuses_a_blank_device(&key, Some("v"));
    // Nova's QEMU, or stock os-brick: they write to what they open.
    get_key(&cloud.site.config, &cloud.keys(), &given_out, true).unwrap();
    cloud.refuses_a_blank_device(&given_out, Some("v"));
    cloud.refuses_a_blank_device(&cloud.copy(&copied), Some("v"));
    let nameless = Request { fills: true, ..request(&cloud.site, "a", &key) };
    assert!(nameless.filling().is_none());
}

#[test]
fn of_two_hosts_that_begin_again_one_comes_first() {
    let cloud = Cloud::new();
    let key = cloud.key();
    cloud.site.blank("a");
    cloud.fills("a", &key, "v");
    let volume = header::find(&cloud.site.path("a"), None, None).unwrap();
    let (one, other) = (cloud.site.container(), cloud.site.container());
    let begin = |container: &Container| container.unused(&key.key, false, Some("v")).unwrap();
    let (first, second) = (begin(&one), begin(&other));
    one.claim(&key.key, first, &volume, Some("v")).unwrap();
    let refused = other.claim(&key.key, second, &volume, Some("v")).err();
    assert!(matches!(refused, Some(unlock::Error::Store(StoreError::Outdated { .. }))), "{refused:?}");
    // Likewise if somebody opens it meanwhile.
    let late = begin(&other);
    cloud.attaches("a", &key);
    let refused = other.claim(&key.key, late, &volume, Some("v")).err();
    assert!(matches!(refused, Some(unlock::Error::Store(StoreError::Outdated { .. }))), "{refused:?}");
}

#[test]
fn a_store_that_takes_the_record_of_use_back_has_nothing_formatted_on_a_host_that_knows_better() {
    let cloud = Cloud::new();
    for image_of in [None, Some("v")] {
        let key = cloud.key();
        let fresh = cloud.site.store.stored(key.key).unwrap();
        cloud.site.blank("a");
        cloud.try_to_attach("a", &key, image_of).unwrap();
        let filling = cloud.site.store.stored(key.key).unwrap();
        cloud.attaches("a", &key);
        for before in [fresh, filling].into_iter().take(if image_of.is_some() { 2 } else { 1 }) {
            cloud.site.store.lie(key.key, before);
            let wrong = cloud.site.blank("wrong");
            let refused = cloud.try_to_attach("wrong", &key, image_of).unwrap_err();
            assert_eq!(refused.exit(), Exit::KeyRefused, "{refused:?}");
            assert!(is_blank(&wrong));
            cloud.site.store.be_honest(key.key);
        }
        cloud.attaches("a", &key);
    }
}

/// The process ends after each number of requests to the store in turn.
#[test]
fn a_first_attach_that_ends_anywhere_leaves_a_volume_or_a_refusal_and_never_a_header_that_does_not_open() {
    for image_of in [None, Some("v")] {
        let mut seen = (0, 0);
        for answers in 0.. {
            let cloud = Cloud::new();
            let key = cloud.key();
            let device = cloud.site.blank("a");
            cloud.site.store.answer_only(Some(answers));
            let ended = cloud.try_to_attach("a", &key, image_of);
            cloud.site.store.answer_only(None);
            if ended.is_ok() {
                break;
            }
            let was_blank = is_blank(&device);
            match cloud.try_to_attach("a", &key, image_of) {
                Ok(()) => seen.0 += 1,
                Err(error) => {
                    assert!(was_blank && image_of.is_none(), "{answers}: {error:?}");
                    assert!(is_blank(&device), "{answers}");
                    assert_eq!(error.exit(), Exit::InTheWay);
                    assert!(error.next_step().unwrap().contains("make a new one"));
                    seen.1 += 1;
                }
            }
        }
        assert!(seen.0 > 2, "{seen:?}");
    }
}

#[test]
fn a_copy_that_ends_anywhere_leaves_the_key_as_it_was() {
    let cloud = Cloud::new();
    let key = cloud.key();
    for answers in 0.. {
        cloud.site.store.answer_only(Some(answers));
        let ended = copy_key(&cloud.site.config, &cloud.keys(), &key, &cloud.keys());
        cloud.site.store.answer_only(None);
        assert!(cloud.is_fresh(&key));
        if ended.is_ok() {
            assert!(answers > 1);
            break;
        }
    }
    cloud.site.blank("a");
    cloud.attaches("a", &key);
}
