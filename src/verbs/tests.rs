//! The verbs, with a store and a backend in memory: what they do, and each refusal.

use std::{
    fs::{self, OpenOptions},
    io::{Seek, SeekFrom, Write},
    path::Path,
    thread,
};

use super::{
    attach, detach, erase, error::Error, format, hook, import, r#move, new_passphrase, passphrase, resize, rotate, test,
};
use crate::{
    base::{
        advice::Advice,
        hex,
        key::{
            Consumer, KeyId, KeyReference, KeySize, ManagedObject, ObjectFacts, ObjectKind, Place, SecretBytes,
            StoreName, VolumeKey,
        },
    },
    config::Config,
    keys::{
        net::Caller,
        seal::{OwnerKey, SealError},
        store::{StoreError, memory::Memory},
    },
    sys::device::{Device, DeviceError},
    unlock::{
        self,
        case::{self, Asked, Case, Circumstances, Strictness},
        container::{Container, TrustError, Use},
        receipt::{self, Answer, Desk},
        tenant::{Claim, Tenant, TenantError},
        testing::Site,
    },
    volumes::{
        Authority,
        backend::{BackendError, Mapping},
        header::{self, Midway, Volume, VolumeError, reencryption::State, rekey},
    },
};

/// A volume of Cinder's, which needs a key.
fn consumer(id: &str) -> Consumer {
    Consumer { service: "cinder".to_owned(), resource_type: "volume".to_owned(), resource_id: id.to_owned() }
}

pub(super) fn formatted(site: &Site, name: &str, keyslot: bool) -> (std::path::PathBuf, KeyReference) {
    let device = site.blank(name);
    let reference = format::format(&site.config, &format_request(&device, keyslot)).unwrap().reference;
    (device, reference)
}

fn format_request(device: &Path, keyslot: bool) -> format::Request<'_> {
    format::Request {
        device,
        store: None,
        keyslot,
        header: None,
        key_size: KeySize::Bits512,
        sector_size: None,
        force: false,
        separation: Strictness::default(),
    }
}

fn attach_request(device: &Path) -> attach::Request<'_> {
    attach::Request {
        device,
        name: Some("data".parse().unwrap()),
        key: None,
        header: None,
        plain: None,
        backend: None,
        options: attach::Options::default(),
        separation: Strictness::default(),
        tenant: None,
        target: None,
        volume_id: None,
        fills: false,
    }
}

pub(super) fn attached(site: &Site, device: &Path) -> Result<Mapping, Error> {
    attach::attach(&site.config, &site.backend, attach_request(device))
}

fn header_is_blank(device: &Path) -> bool {
    fs::read(device).unwrap()[..4096].iter().all(|byte| *byte == 0)
}

/// Nothing was mapped, and the error is the expected one.
macro_rules! refuses {
    ($site:expr, $attempt:expr, $pattern:pat) => {{
        let refused = $attempt.err().expect("it is refused");
        assert!(matches!(&refused, $pattern), "{refused:?}");
        assert!($site.backend.names().is_empty(), "nothing is mapped");
    }};
}

#[test]
fn a_formatted_volume_is_attached_by_its_sealed_key() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", false);
    let mapping = attached(&site, &device).unwrap();
    assert!(!mapping.already_active);
    assert_eq!(site.backend.by("data"), Some(Authority::SealedKey(reference)));
    assert!(attached(&site, &device).unwrap().already_active, "a second time it is there");
    assert!(site.audit().contains("\"action\":\"attach\""), "{}", site.audit());
    detach::detach(&site.backend, &"data".parse().unwrap(), crate::volumes::backend::Deferred::No).unwrap();
    assert!(site.backend.names().is_empty());
}

#[test]
fn one_volume_is_attached_once_whatever_its_name() {
    let site = Site::with("");
    let (device, _) = formatted(&site, "a", false);
    attached(&site, &device).unwrap();
    let link = site.path("link");
    std::os::unix::fs::symlink(&device, &link).unwrap();
    let hard_link = site.path("hard link");
    fs::hard_link(&device, &hard_link).unwrap();
    for name in [&device, &link, &hard_link] {
        let request = attach::Request { name: Some("again".parse().unwrap()), ..attach_request(name) };
        let refused = attach::attach(&site.config, &site.backend, request).expect_err("it is refused");
        assert_eq!(refused.exit(), crate::base::exit::Exit::Busy, "{refused:?}");
        assert!(refused.to_string().ends_with("is attached already, as 'data'"), "{refused}");
    }
    assert_eq!(site.backend.names(), ["data"]);
}

#[test]
fn another_volumes_mapping_is_never_taken_for_this_ones() {
    let site = Site::with("");
    let (one, _) = formatted(&site, "a", false);
    let (other, _) = formatted(&site, "b", false);
    attached(&site, &one).unwrap();
    let refused = attached(&site, &other).err();
    assert!(matches!(refused, Some(Error::Backend(BackendError::Foreign { .. }))), "{refused:?}");
}

#[test]
fn a_mapping_that_is_there_answers_no_request_for_another_key() {
    let site = Site::with("");
    let (one, own) = formatted(&site, "a", false);
    let (_, foreign) = formatted(&site, "b", false);
    attached(&site, &one).unwrap();
    let by = |key| {
        let request = attach::Request { key: Some(key), ..attach_request(&one) };
        attach::attach(&site.config, &site.backend, request)
    };
    assert!(by(own).unwrap().already_active);
    let refused = by(foreign).err();
    assert!(
        matches!(refused, Some(Error::Unlock(unlock::Error::KeyRefused { source: SealError::OtherVolume { .. }, .. }))),
        "{refused:?}"
    );
    assert_eq!(site.backend.names(), ["data"]);
}

#[test]
fn the_key_of_another_volume_is_refused() {
    let site = Site::with("");
    let (one, _) = formatted(&site, "a", false);
    let (_, foreign) = formatted(&site, "b", false);
    let request = attach::Request { key: Some(foreign), ..attach_request(&one) };
    refuses!(
        site,
        attach::attach(&site.config, &site.backend, request),
        Error::Unlock(unlock::Error::KeyRefused { source: SealError::OtherVolume { .. }, .. })
    );
}

fn cryptsetup(arguments: &[&str], device: &Path) {
    let output = std::process::Command::new("cryptsetup").args(arguments).arg(device).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn a_uuid_that_a_person_has_changed_is_told_as_that() {
    let site = Site::with("");
    let (device, _) = formatted(&site, "a", false);
    let was = header::probe(&device, None).unwrap().uuid().unwrap();
    cryptsetup(&["luksUUID", "-q", "--uuid", "0f0f0f0f-1111-4222-8333-444444444444"], &device);
    let refused = attached(&site, &device).expect_err("it is refused");
    assert!(matches!(refused, Error::Unlock(unlock::Error::UuidChanged { .. })), "{refused:?}");
    assert!(refused.next_step().unwrap().contains(&format!("cryptsetup luksUUID --uuid {was}")));
    cryptsetup(&["luksUUID", "-q", "--uuid", &was.to_string()], &device);
    attached(&site, &device).unwrap();
}

#[test]
fn a_key_from_before_a_re_encryption_no_longer_fits_and_import_keeps_the_new_one() {
    let site = Site::with("");
    let (device, _) = formatted(&site, "a", true);
    let request = passphrase::Request { device: &device, header: None, key: None };
    let passphrase = passphrase::release(&site.config, request).unwrap();
    let key_file = site.beside_the_keys("pass");
    fs::write(&key_file, passphrase.expose()).unwrap();
    let pbkdf = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let reencrypt = ["reencrypt", "-q", "--force-offline-reencrypt", "--key-file", key_file.to_str().unwrap()];
    cryptsetup(&[&reencrypt[..], &pbkdf[..]].concat(), &device);
    let refused = attached(&site, &device).expect_err("it is refused");
    assert!(matches!(refused, Error::Unlock(unlock::Error::NoLongerFits { .. })), "{refused:?}");
    assert!(refused.next_step().unwrap().contains("cryptattach key import"));
    let imported = import::import(
        &site.config,
        import::Request {
            device: &device,
            store: None,
            header: None,
            plain: None,
            secret: Some(passphrase),
            token: false,
            separation: Strictness::default(),
            announce: &|_| Ok(()),
        },
    )
    .unwrap();
    let request = attach::Request { key: Some(imported), ..attach_request(&device) };
    attach::attach(&site.config, &site.backend, request).unwrap();
}

#[test]
fn a_key_beside_its_volume_is_refused_unless_a_person_says_so_on_record() {
    let site = Site::with("");
    let (device, _) = formatted(&site, "a", false);
    site.keys_beside_the_volumes();
    refuses!(site, attached(&site, &device), Error::Unlock(unlock::Error::NotSeparate(_)));
    assert!(site.audit().contains("\"action\":\"refused\""));
    let overridden = Strictness { allow_shared: true, ..Strictness::default() };
    let request = || attach::Request { separation: overridden, ..attach_request(&device) };

    // An override that cannot be recorded is not granted.
    let mut silent = Config::read(&site.beside_the_keys("c.toml")).unwrap();
    silent.audit.file = site.beside_the_keys("c.toml/audit").into();
    refuses!(site, attach::attach(&silent, &site.backend, request()), Error::Unlock(unlock::Error::Audit(_)));

    attach::attach(&site.config, &site.backend, request()).unwrap();
    assert!(site.audit().contains("--allow-shared"));
    assert_eq!(site.backend.names(), ["data"]);
}

#[test]
fn a_store_that_fails_or_lies_maps_nothing() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", false);
    let (_, other) = formatted(&site, "b", false);
    site.store.set_unreachable(true);
    refuses!(site, attached(&site, &device), Error::Unlock(unlock::Error::Store(StoreError::Io { .. })));
    site.store.set_unreachable(false);

    site.store.lie(reference.key, site.store.stored(other.key).unwrap());
    refuses!(
        site,
        attached(&site, &device),
        Error::Unlock(unlock::Error::KeyRefused { source: SealError::Other { what: "key", .. }, .. })
    );
    site.store.be_honest(reference.key);
    attached(&site, &device).expect("a lie ends with the lie");
}

#[test]
fn an_older_form_of_a_key_is_refused_once_a_later_one_was_seen() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", false);
    let before = site.store.stored(reference.key).unwrap();
    site.container().make_first_key().unwrap();
    site.container().rotate(std::time::Duration::ZERO, &|_| ()).unwrap();
    attached(&site, &device).unwrap();
    detach::detach(&site.backend, &"data".parse().unwrap(), crate::volumes::backend::Deferred::No).unwrap();
    site.store.put(reference.key, before);
    refuses!(
        site,
        attached(&site, &device),
        Error::Unlock(unlock::Error::Trust(TrustError::OldGeneration { is: 1, seen: 2.., .. }))
    );
}

#[test]
fn format_writes_no_header_whose_key_cannot_be_had_back() {
    let site = Site::with("");
    let device = site.blank("a");
    let failure = || StoreError::Denied { action: "write to", at: "memory".to_owned() };
    site.store.fail_next(failure());
    refuses!(site, format::format(&site.config, &format_request(&device, false)), Error::Unlock(_));
    assert!(header_is_blank(&device) && site.keys().is_empty());

    // Stored, but not read back: the key is removed again.
    let (_, other) = formatted(&site, "b", false);
    let lie = site.store.stored(other.key).unwrap();
    site.store.lie_about_all(lie);
    refuses!(
        site,
        format::format(&site.config, &format_request(&device, false)),
        Error::Unlock(unlock::Error::KeyRefused { .. })
    );
    assert!(header_is_blank(&device));
    site.store.be_honest_about_all();
    assert_eq!(site.keys(), [other], "the key that nothing depends on is gone");
}

#[test]
fn format_takes_no_device_that_holds_something() {
    let site = Site::with("");
    let (device, _) = formatted(&site, "a", false);
    let again = || format::format(&site.config, &format_request(&device, false));
    refuses!(site, again(), Error::NotBlank { .. });
    site.keys_beside_the_volumes();
    let device = site.blank("b");
    let shared = format::format(&site.config, &format_request(&device, false));
    refuses!(site, shared, Error::Unlock(unlock::Error::NotSeparate(_)));
    assert!(header_is_blank(&device) && site.keys().len() == 1);
}

#[test]
fn import_keeps_the_key_that_a_passphrase_opens() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", true);
    let given = |site: &Site| passphrase::Request { device: &device, header: None, key: None }.released(site);
    let secret = given(&site);
    let other = Site::with("");
    let request = |secret: &[u8]| import::Request {
        device: &device,
        store: None,
        header: None,
        plain: None,
        secret: Some(SecretBytes::copy_of(secret).unwrap()),
        token: false,
        separation: Strictness::default(),
        announce: &|_| Ok(()),
    };
    refuses!(
        other,
        import::import(&other.config, request(b"wrong")),
        Error::Unlock(unlock::Error::Volume(VolumeError::WrongPassphrase { .. }))
    );
    assert!(other.keys().is_empty());
    let imported = import::import(&other.config, request(secret.expose())).unwrap();
    assert_ne!(imported, reference);
    let by_import = attach::Request { key: Some(imported), ..attach_request(&device) };
    attach::attach(&other.config, &other.backend, by_import).unwrap();
    assert_eq!(other.backend.names(), ["data"]);
}

impl passphrase::Request<'_> {
    fn released(self, site: &Site) -> SecretBytes {
        passphrase::release(&site.config, self).unwrap()
    }
}

#[test]
fn a_passphrase_is_released_for_its_volume_only_and_if_there_is_one() {
    let site = Site::with("");
    let (compatible, reference) = formatted(&site, "a", true);
    let (strict, _) = formatted(&site, "b", false);
    let ask = |device: &Path, key| passphrase::release(&site.config, passphrase::Request { device, header: None, key });
    let passphrase = ask(&compatible, None).unwrap();
    assert_eq!(passphrase.len(), 64);
    header::probe(&compatible, None).unwrap().open_keyslot(&passphrase).unwrap();
    refuses!(site, ask(&strict, None), Error::Unlock(unlock::Error::NoPassphrase(_)));
    refuses!(site, ask(&strict, Some(reference)), Error::Unlock(unlock::Error::KeyRefused { .. }));
    site.keys_beside_the_volumes();
    refuses!(site, ask(&compatible, None), Error::Unlock(unlock::Error::NotSeparate(_)));
}

#[test]
fn resize_proves_and_fetches_again() {
    let site = Site::with("");
    let (device, _) = formatted(&site, "a", false);
    attached(&site, &device).unwrap();
    OpenOptions::new().write(true).open(&device).unwrap().set_len(40 << 20).unwrap();
    let name = "data".parse().unwrap();
    let request = || resize::Request {
        name: &name,
        key: None,
        header: None,
        plain: None,
        separation: Strictness::default(),
        tenant: None,
        target: None,
    };
    assert_eq!(resize::resize(&site.config, &site.backend, request()).unwrap(), 24 << 20);
    site.keys_beside_the_volumes();
    let refused = resize::resize(&site.config, &site.backend, request()).err();
    assert!(matches!(refused, Some(Error::Unlock(unlock::Error::NotSeparate(_)))), "{refused:?}");
}

#[test]
fn test_opens_the_key_and_maps_nothing() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", true);
    let request = test::Request {
        device: &device,
        key: None,
        header: None,
        plain: None,
        separation: Strictness::default(),
        as_boot: false,
    };
    let passed = test::try_out(&site.config, request).unwrap();
    assert_eq!(passed.key, reference);
    assert!(passed.steps.iter().any(|step| step.found.contains("its passphrase opens the keyslot")));
    assert!(site.backend.names().is_empty());
}

fn symmetric(site: &Site) -> KeyReference {
    let facts = ObjectFacts::symmetric(256);
    hook::create_key(&site.config, &site.keys_of(&Tenant::only(&site.name)), facts).unwrap()
}

#[test]
fn a_hook_formats_a_blank_device_once_and_with_an_unused_key_only() {
    let site = Site::with("");
    let (key, device) = (symmetric(&site), site.blank("a"));
    let hook = |device: &str, key: &KeyReference| {
        hook::attach(&site.config, &site.backend, &hook::tests::request(&site, device, key), &Tenant::only(&site.name))
    };
    hook("a", &key).unwrap();
    assert_eq!(site.backend.names(), ["data"]);
    let name = "data".parse().unwrap();
    assert!(hook::detach(&site.backend, &name).unwrap());
    assert!(!hook::detach(&site.backend, &name).unwrap(), "os-brick asks more than once");
    let uuid = header::probe(&device, None).unwrap().uuid();
    hook("a", &key).unwrap();
    assert_eq!(header::probe(&device, None).unwrap().uuid(), uuid, "it was not formatted again");
    hook::detach(&site.backend, &name).unwrap();

    // The volume is not where it should be: a blank device with a used key.
    site.blank("b");
    refuses!(site, hook("b", &key), Error::Unlock(unlock::Error::KeyUsed { .. }));
    assert!(header_is_blank(&site.path("b")));

    // Given out, a key may have been used by others.
    let given = symmetric(&site);
    hook::get_key(&site.config, &site.keys_of(&Tenant::only(&site.name)), &given, true).unwrap();
    refuses!(site, hook("b", &given), Error::Unlock(unlock::Error::KeyUsed { .. }));
    // What stands there is not known, but it is something.
    let mut file = OpenOptions::new().write(true).open(site.path("b")).unwrap();
    file.seek(SeekFrom::Start(4096)).unwrap();
    file.write_all(b"data of no known kind").unwrap();
    refuses!(site, hook("b", &symmetric(&site)), Error::NotBlank { .. });
}

#[test]
fn a_hook_takes_no_weak_key_and_no_other_cipher() {
    let site = Site::with("");
    site.blank("a");
    let facts = ObjectFacts { algorithm: None, fresh: true, ..ObjectFacts::symmetric(128) };
    let object = ManagedObject { facts, value: SecretBytes::random(16).unwrap() };
    let weak = site.container().keep_object(object).unwrap();
    let attempt =
        |request: hook::Request| hook::attach(&site.config, &site.backend, &request, &Tenant::only(&site.name));
    refuses!(site, attempt(hook::tests::request(&site, "a", &weak)), Error::Unlock(unlock::Error::KeyTooWeak(_)));
    let key = symmetric(&site);
    let other =
        hook::Request { cipher: Some("aes-cbc-essiv:sha256".to_owned()), ..hook::tests::request(&site, "a", &key) };
    refuses!(site, attempt(other), Error::Usage(_));
    let missing = KeyReference { key: KeyId::random(), ..key };
    refuses!(
        site,
        attempt(hook::tests::request(&site, "a", &missing)),
        Error::Unlock(unlock::Error::Store(StoreError::NotFound { .. }))
    );
    assert!(header_is_blank(&site.path("a")));
}

#[test]
fn a_deleted_key_is_told_as_deleted_although_that_cannot_be_recorded() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", false);
    let mut silent = Config::read(&site.beside_the_keys("c.toml")).unwrap();
    silent.audit.file = site.beside_the_keys("c.toml/audit").into();
    super::keys::delete(&silent, &site.container(), &reference, false).unwrap();
    refuses!(site, attached(&site, &device), Error::Unlock(unlock::Error::Store(StoreError::NotFound { .. })));
    refuses!(site, super::keys::delete(&silent, &site.container(), &reference, false), Error::Unlock(_));
}

/// A key that was made for a project, and a volume that was formatted with it and is attached.
fn of_project(site: &Site, project: &str) -> KeyReference {
    let facts = ObjectFacts::symmetric(256);
    let tenant = Tenant::vouched_for(&site.name, project, None);
    hook::create_key(&site.config, &site.keys_of(&tenant), facts).unwrap()
}

fn is_not_found<T>(outcome: Result<T, Error>) -> String {
    match outcome.err().expect("it is refused") {
        Error::Unlock(error @ unlock::Error::Store(StoreError::NotFound { .. })) => error.to_string(),
        error => panic!("{error:?}"),
    }
}

#[test]
fn a_key_of_another_project_is_one_that_does_not_exist() {
    let site = Site::with("");
    let (key, unused) = (of_project(&site, "AAAA"), of_project(&site, "AAAA"));
    site.blank("a");
    let (a, b) = (Tenant::vouched_for(&site.name, "AAAA", None), Tenant::vouched_for(&site.name, "BBBB", None));
    let attach = |key: &KeyReference, tenant: &Tenant, device: &str| {
        hook::attach(&site.config, &site.backend, &hook::tests::request(&site, device, key), tenant)
    };
    is_not_found(attach(&key, &b, "a"));
    assert!(header_is_blank(&site.path("a")), "nothing is formatted with it");
    attach(&key, &a, "a").unwrap();
    is_not_found(attach(&key, &b, "a"));
    assert!(attach(&key, &a, "a").unwrap().already_active);
    is_not_found(hook::extend(&site.config, &site.backend, &hook::tests::request(&site, "a", &key), &b));

    let of = site.keys_of(&b);
    for with_value in [false, true] {
        assert!(hook::list_keys(&site.config, &of, None, with_value).unwrap().is_empty());
        let missing = KeyReference { key: KeyId::random(), ..key.clone() };
        let told = |key: &KeyReference| {
            let text = is_not_found(hook::get_key(&site.config, &of, key, with_value));
            text.replace(&key.key.to_string(), "ID")
        };
        assert_eq!(told(&unused), told(&missing), "there is nothing to tell them apart by");
    }
    is_not_found(hook::delete_key(&site.config, &of, &unused, false));
    // None of it was for nothing: the key is there and unused.
    let of = site.keys_of(&a);
    assert_eq!(hook::list_keys(&site.config, &of, None, false).unwrap().len(), 2);
    assert!(hook::get_key(&site.config, &of, &unused, false).unwrap().facts.fresh);
    hook::delete_key(&site.config, &of, &unused, false).unwrap();
    // What no hook has made is nobody's.
    let (_, ours) = formatted(&site, "b", true);
    is_not_found(hook::get_key(&site.config, &of, &ours, true));
    is_not_found(hook::get_key(&site.config, &of, &symmetric(&site), false));
}

#[test]
fn a_key_that_others_need_is_deleted_by_force_only() {
    let site = Site::with("");
    let key = of_project(&site, "AAAA");
    let (a, b) = (Tenant::vouched_for(&site.name, "AAAA", None), Tenant::vouched_for(&site.name, "BBBB", None));
    let (of, others) = (site.keys_of(&a), site.keys_of(&b));
    is_not_found(hook::add_consumer(&site.config, &others, &key, &consumer("1")));
    for id in ["1", "1", "2"] {
        hook::add_consumer(&site.config, &of, &key, &consumer(id)).unwrap();
    }
    let refused = hook::add_consumer(&site.config, &of, &key, &consumer(""));
    assert!(matches!(refused, Err(Error::Usage(_))), "{refused:?}");
    assert_eq!(hook::consumers(&of, &key).unwrap(), [consumer("1"), consumer("2")]);
    is_not_found(hook::consumers(&others, &key));
    is_not_found(hook::remove_consumer(&site.config, &others, &key, &consumer("1")));
    is_not_found(hook::delete_key(&site.config, &others, &key, true));
    for refused in [
        hook::delete_key(&site.config, &of, &key, false),
        super::keys::delete(&site.config, &site.container(), &key, false),
    ] {
        let text = refused.err().unwrap().to_string();
        assert!(text.contains("cinder volume 1; cinder volume 2"), "{text}");
    }
    hook::remove_consumer(&site.config, &of, &key, &consumer("1")).unwrap();
    let again = hook::remove_consumer(&site.config, &of, &key, &consumer("1")).err();
    assert!(matches!(again, Some(Error::Unlock(unlock::Error::Store(StoreError::NoConsumer { .. })))), "{again:?}");
    hook::delete_key(&site.config, &of, &key, true).unwrap();
    assert!(site.keys().is_empty());
    assert!(site.container().store().consumers(&key.key).unwrap().is_empty(), "nothing is left beside it");
}

#[test]
fn a_certificate_that_is_handed_in_is_kept_as_der_or_refused() {
    let site = Site::with("");
    let of = site.keys_of(&Tenant::only(&site.name));
    let owner = OwnerKey::generate().unwrap();
    let store = |value: &[u8]| {
        let facts = ObjectFacts {
            kind: ObjectKind::Public,
            algorithm: None,
            bit_length: None,
            name: None,
            created: None,
            fresh: false,
            filling: None,
        };
        let object = ManagedObject { facts, value: SecretBytes::copy_of(value).unwrap() };
        hook::store_key(&site.config, &of, object)
    };
    let pem = owner.public_pem().unwrap();
    let key = store(&[b"words\n".as_slice(), pem.as_ref()].concat()).unwrap();
    let value = hook::get_key(&site.config, &of, &key, true).unwrap().value.unwrap();
    assert_eq!(value.expose()[0], 0x30, "a DER sequence");
    assert!(matches!(store(b"no key"), Err(Error::Usage(_))));
}

#[test]
fn a_role_that_the_configuration_names_may_use_all_keys_and_is_on_record() {
    let site = Site::with("");
    let key = of_project(&site, "AAAA");
    let of = site.keys_of(&Tenant::vouched_for(&site.name, "BBBB", Some("service")));
    hook::get_key(&site.config, &of, &key, true).unwrap();
    assert!(site.audit().contains(r#""caller":{"user":"user","project":"BBBB","role":"service"}"#), "{}", site.audit());
}

#[test]
fn a_project_that_is_only_claimed_opens_nothing() {
    let site = Site::with("");
    let (key, other) = (of_project(&site, "AAAA"), of_project(&site, "BBBB"));
    // Whoever writes to the store lets the key say that it is another project's.
    let mut forged = site.store.stored(key.key).unwrap();
    forged.protected = site.store.stored(other.key).unwrap().protected;
    site.store.lie(key.key, forged);
    let of = site.keys_of(&Tenant::vouched_for(&site.name, "BBBB", None));
    refuses!(site, hook::get_key(&site.config, &of, &key, true), Error::Unlock(unlock::Error::KeyRefused { .. }));
}

#[test]
fn a_store_that_cannot_tell_projects_apart_serves_hooks_only_if_a_person_says_so() {
    let claim = || Claim {
        caller: Some(Caller { token: SecretBytes::copy_of(b"forged").unwrap(), service_token: None }),
        project: Some("BBBB".to_owned()),
    };
    let site = Site::with("");
    let refused = Tenant::prove(&site.config, &site.name, claim()).err().unwrap();
    assert!(matches!(refused, unlock::Error::Tenant(TenantError::NotServed(_))), "{refused:?}");
    let site = Site::with("[hooks]\ntenants = 'one'\n");
    Tenant::prove(&site.config, &site.name, claim()).unwrap();

    let sealed = "owner = 'o.pem'\nno_escrow = true\n";
    let prove = |kind: &str, hooks: &str, claim: Claim| {
        let text = format!("[stores.s]\n{kind}[hooks]\n{hooks}");
        let config = Config::parse(&text, Path::new("/etc/cryptattach/c.toml")).unwrap();
        match Tenant::prove(&config, &"s".parse().unwrap(), claim).err() {
            None => "served",
            Some(unlock::Error::Tenant(TenantError::NotServed(_))) => "not served",
            Some(unlock::Error::Tenant(TenantError::NoToken)) => "no token",
            Some(unlock::Error::Tenant(TenantError::Unverified(_))) => "asks Keystone",
            Some(error) => panic!("{error:?}"),
        }
    };
    let keystone = "keystone = { cloud = 'c', clouds = '/nonexistent' }\n";
    let directory = format!("type = 'directory'\npath = 'k'\n{sealed}");
    let swift = format!("type = 'swift'\n{sealed}");
    let swift_as_caller = format!("type = 'swift'\ncaller_token = true\n{sealed}");
    let barbican_as_service = format!("type = 'barbican'\ncaller_token = false\n{sealed}");
    for (kind, without, with) in [
        (&*directory, "not served", "asks Keystone"),
        (&swift, "not served", "asks Keystone"),
        (&barbican_as_service, "not served", "asks Keystone"),
        (&swift_as_caller, "served", "served"),
        ("type = 'barbican'\n", "served", "served"),
        // Its keys do not say whose they are.
        ("type = 'barbican'\ncaller_token = false\n", "not served", "not served"),
    ] {
        assert_eq!((prove(kind, "", claim()), prove(kind, keystone, claim())), (without, with), "{kind}");
        assert_eq!(prove(kind, "tenants = 'one'\n", Claim::default()), "served");
        let nobody = if with == "not served" { with } else { "no token" };
        assert_eq!(prove(kind, keystone, Claim::default()), nobody, "{kind}");
    }
}

#[test]
fn a_name_that_leads_to_another_volumes_mapping_is_in_the_way() {
    let site = Site::with("");
    let tenant = Tenant::only(&site.name);
    let (one, other) = (symmetric(&site), symmetric(&site));
    site.blank("a");
    let attach = |request: &hook::Request| hook::attach(&site.config, &site.backend, request, &tenant);
    let mapping = attach(&hook::tests::request(&site, "a", &one)).unwrap();
    // As os-brick names it from then on.
    let link = site.path("link");
    std::os::unix::fs::symlink(&mapping.device, &link).unwrap();
    let by_link = |key: &KeyReference, name: &str| hook::Request {
        device: link.clone(),
        name: name.parse().unwrap(),
        ..hook::tests::request(&site, "a", key)
    };
    assert!(attach(&by_link(&one, "data")).unwrap().already_active);
    let refused = attach(&by_link(&other, "data")).err();
    assert!(matches!(refused, Some(Error::OtherVolume { .. })), "{refused:?}");
    let refused = attach(&by_link(&other, "other")).err();
    assert!(matches!(refused, Some(Error::LeadsToMapping { .. })), "{refused:?}");
}

fn rotated(site: &Site, device: &Path, delete_old: bool) -> Result<rotate::Rotated, Error> {
    let separation = Strictness::default();
    let how =
        rotate::How { drop_others: false, delete_old, hotzone_bytes: 1 << 20, bytes_per_second: None, separation };
    rotate::rotate(&site.config, device, &how, &mut |_, _| {})
}

/// What a run of this host has left that was killed.
fn left(site: &Site, device: &Path, old: &KeyReference, new: &KeyReference, begun: bool) {
    let journal = serde_json::json!({"device": device, "old": old, "new": new, "begun": begun});
    let uuid = header::probe(device, None).unwrap().uuid().unwrap();
    fs::create_dir_all(site.config.state.join("rekey")).unwrap();
    fs::write(site.config.state.join("rekey").join(uuid.to_string()), journal.to_string()).unwrap();
}

#[test]
fn a_rotated_volume_opens_by_its_new_key_only() {
    let site = Site::with("");
    let (device, old) = formatted(&site, "a", false);
    attached(&site, &device).unwrap();
    detach::detach(&site.backend, &"data".parse().unwrap(), crate::volumes::backend::Deferred::No).unwrap();
    let new = rotated(&site, &device, true).unwrap();
    assert_eq!((new.old, new.deleted), (Some(old.clone()), true));
    assert_eq!(site.keys(), std::slice::from_ref(&new.key));
    attached(&site, &device).unwrap();
    assert_eq!(site.backend.by("data"), Some(Authority::SealedKey(new.key.clone())));
    assert!(site.audit().contains(&format!("\"action\":\"key delete\",\"key\":\"{old}\"")), "{}", site.audit());
    let released = passphrase::of_key(&site.config, &new.key);
    assert!(matches!(released, Err(Error::Unlock(unlock::Error::NoPassphrase(_)))), "a strict volume's stays secret");
}

#[test]
fn a_rotation_deletes_a_key_that_no_header_names_and_never_one_that_data_may_have() {
    let site = Site::with("");
    let (device, old) = formatted(&site, "a", false);
    let (_, unused) = formatted(&site, "b", false);
    left(&site, &device, &old, &unused, true);
    let refused = rotated(&site, &device, false).unwrap_err();
    assert!(matches!(&refused, Error::HeaderRestored { new, .. } if *new == unused), "{refused:?}");
    assert!(site.keys().contains(&unused));
    left(&site, &device, &old, &unused, false);
    rotated(&site, &device, false).unwrap();
    assert!(!site.keys().contains(&unused) && site.keys().contains(&old));
}

/// Brings a volume into the middle of a rotation, whose new key says that it takes this one's place.
fn to_the_middle(site: &Site, path: &Path, old: &KeyReference, replaces: &KeyReference) -> KeyReference {
    let container = std::sync::Arc::new(site.container());
    let case = Case::of(&site.config, header::probe(path, None).unwrap(), old.clone(), container.clone());
    let unlocked = case.prove(Circumstances::default()).unwrap().key().unwrap();
    let new = container.new_reference().unwrap();
    let (key, passphrase) = (VolumeKey::random(KeySize::Bits512).unwrap(), case::random_passphrase().unwrap());
    let prepared = rekey::prepare(unlocked.volume(), [unlocked.key(), &key], &passphrase, &new).unwrap();
    let case = Case::of_rotation(&site.config, prepared.volume.clone(), new.clone(), container);
    let sealed = SecretBytes::copy_of(passphrase.expose()).unwrap();
    case.prove(Circumstances::default()).unwrap().store_successor(key, sealed, replaces.clone()).unwrap();
    let device = Device::look(path).unwrap();
    prepared.write(&OpenOptions::new().read(true).write(true).open(path).unwrap()).unwrap();
    rekey::run(&device, None, &passphrase, rekey::Run::Begin, 64 << 10, &mut |done, _| done == 0).unwrap();
    assert_eq!(rekey::state(&device).unwrap(), State::Clean);
    new
}

#[test]
fn a_volume_in_the_middle_of_a_rotation_is_mapped_with_both_keys_or_not_at_all() {
    let site = Site::with("");
    let (device, old) = formatted(&site, "a", false);
    let new = to_the_middle(&site, &device, &old, &old);
    // All others know one key only: they refuse it, and say how to go on.
    let refused = header::probe(&device, None).unwrap_err();
    assert!(refused.next_step().unwrap().contains("key rotate"), "{refused:?}");
    // Whichever of the two is asked for, both open it; no other key does.
    let (_, other) = formatted(&site, "b", false);
    let ask = |key: &KeyReference| {
        let asked = attach::Request { key: Some(key.clone()), ..attach_request(&device) };
        attach::attach(&site.config, &site.backend, asked)
    };
    refuses!(site, ask(&other), Error::Unlock(unlock::Error::KeyRefused { .. }));
    for key in [&old, &new] {
        ask(key).unwrap();
        assert_eq!(site.backend.by("data"), Some(Authority::SealedKey(new.clone())));
        detach::detach(&site.backend, &"data".parse().unwrap(), crate::volumes::backend::Deferred::No).unwrap();
    }
    let volume = header::find_to_map(&device, None, None).unwrap();
    let midway = volume.midway().unwrap().unwrap();
    let now = |volume: &Volume| Midway::of(&fs::File::open(&device).unwrap(), volume.uuid()).unwrap();
    assert!(midway.from_bytes > 0 && now(&volume) == Some(midway));
    let case = Case::find(&site.config, volume.clone(), Asked::default()).unwrap();
    let unlocked = case.prove(Circumstances::default()).unwrap().key().unwrap();
    assert!(unlocked.rest().is_some_and(|(old, _)| old != unlocked.key()));
    // A worker that is told of this header finds out that the rotation has gone on.
    rotated(&site, &device, false).unwrap();
    assert_eq!(now(&volume), None);
    let refused = volume.rest.as_ref().unwrap().load(&device).err();
    assert!(matches!(refused, Some(VolumeError::HeaderChanged { .. })), "{refused:?}");
    attached(&site, &device).unwrap();
    assert_eq!(site.backend.by("data"), Some(Authority::SealedKey(new)));
}

/// Whoever writes to the disk names any key of the store as the next one.
#[test]
fn a_key_that_was_not_made_to_take_the_place_of_another_is_no_half_of_a_volume() {
    let site = Site::with("");
    let (device, old) = formatted(&site, "a", false);
    let (_, other) = formatted(&site, "b", false);
    to_the_middle(&site, &device, &old, &other);
    refuses!(site, attached(&site, &device), Error::Unlock(unlock::Error::Volume(VolumeError::NotRotating { .. })));
}

#[test]
fn a_key_that_others_need_is_not_rotated() {
    let site = Site::with("");
    let (device, key) = formatted(&site, "a", false);
    let consumer = consumer("3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de");
    let before = fs::read(&device).unwrap();
    site.container().store().add_consumer(&key.key, &consumer).unwrap();
    assert!(rotated(&site, &device, false).unwrap_err().to_string().contains("it has consumers"));
    assert!(fs::read(&device).unwrap() == before && site.keys() == [key], "nothing is begun");
}

#[test]
fn keys_beside_the_data_are_not_made() {
    let site = Site::with("");
    let (device, key) = formatted(&site, "a", false);
    site.keys_beside_the_volumes();
    let refused = rotated(&site, &device, false).unwrap_err();
    assert!(matches!(refused, Error::Unlock(unlock::Error::NotSeparate(_))), "{refused:?}");
    assert_eq!(site.keys(), [key]);
}

fn erased(site: &Site, device: &Path) -> Result<erase::Erased, Error> {
    let (separation, confirm) = (Strictness::default(), |_: &erase::Doomed<'_>| Ok(()));
    let request = erase::Request { device, header: None, receipt: None, separation, confirm: &confirm };
    loop {
        match erase::erase(&site.config, &request) {
            // A child of another test has what was open here until it runs its program, and with it the lock.
            Err(Error::Unlock(unlock::Error::Device(DeviceError::Busy { .. }))) => thread::yield_now(),
            erased => return erased,
        }
    }
}

#[test]
fn an_erased_volume_has_neither_key_nor_header_and_a_receipt() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", true);
    let (other, _) = formatted(&site, "b", false);
    let uuid = header::probe(&device, None).unwrap().uuid().unwrap();
    let erase::Erased { file, receipt, .. } = erased(&site, &device).unwrap();
    let key = &receipt.keys[0];
    assert_eq!((&key.key, key.answer, receipt.volume), (&reference, Answer::Deleted, uuid));
    let signer = Desk::of(&site.config).signer().unwrap();
    assert_eq!(receipt::verify(&file, signer.as_deref()).unwrap(), receipt);
    assert!(header_is_blank(&device) && site.store.stored(reference.key).is_none());
    let digest = hex::encode(&openssl::sha::sha256(&fs::read(&file).unwrap()));
    assert!(site.audit().contains(&format!("\"action\":\"key erase\",\"device\":\"{}\"", device.display())));
    assert!(site.audit().contains(&digest), "{}", site.audit());
    refuses!(site, erased(&site, &device), Error::Unlock(unlock::Error::Volume(VolumeError::NoHeader { .. })));
    attached(&site, &other).unwrap();
}

#[test]
fn what_is_not_agreed_to_or_needed_by_others_is_not_erased() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", false);
    let before = fs::read(&device).unwrap();
    let no = |_: &erase::Doomed<'_>| Err(Error::Usage("no".to_owned()));
    let separation = Strictness::default();
    let request = erase::Request { device: &device, header: None, receipt: None, separation, confirm: &no };
    refuses!(site, erase::erase(&site.config, &request), Error::Usage(_));
    let consumer = consumer("1");
    site.container().store().add_consumer(&reference.key, &consumer).unwrap();
    refuses!(site, erased(&site, &device), Error::Unlock(unlock::Error::InUse { .. }));
    assert!(fs::read(&device).unwrap() == before && site.keys() == [reference], "nothing is changed");
    assert!(!site.audit().contains("key erase"), "{}", site.audit());
}

#[test]
fn a_store_that_keeps_what_it_has_deleted_is_told_and_the_header_stays_until_it_has_not() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", false);
    site.store.lie(reference.key, site.store.stored(reference.key).unwrap());
    let half = erased(&site, &device).expect_err("it lies");
    let Error::HalfErased { source, .. } = &half else { panic!("{half:?}") };
    assert!(matches!(&**source, Error::StillThere(key) if *key == reference), "{half:?}");
    assert!(half.next_step().unwrap().contains("go on: cryptattach key erase"), "{half:?}");
    assert!(!header_is_blank(&device), "it says whose it is");
    site.store.be_honest(reference.key);
    let receipt = erased(&site, &device).unwrap().receipt;
    assert_eq!(receipt.keys[0].answer, Answer::GoneMeanwhile);
    assert!(header_is_blank(&device));
}

#[test]
fn a_store_that_is_away_loses_nothing_and_a_key_that_is_gone_holds_nothing_up() {
    let site = Site::with("");
    let (device, reference) = formatted(&site, "a", false);
    site.store.set_unreachable(true);
    refuses!(site, erased(&site, &device), Error::Unlock(unlock::Error::Store(_)));
    site.store.set_unreachable(false);
    attached(&site, &device).unwrap();
    detach::detach(&site.backend, &"data".parse().unwrap(), crate::volumes::backend::Deferred::No).unwrap();
    site.container().store().delete(&reference.key).unwrap();
    assert_eq!(erased(&site, &device).unwrap().receipt.keys[0].answer, Answer::NotThere);
    assert!(header_is_blank(&device));
}

/// An old header that was put back, or somebody who writes to the disk, names another key: then the volume's own would stay.
#[test]
fn a_volume_whose_key_is_elsewhere_than_its_header_says_is_not_erased() {
    let site = Site::with("");
    let (device, own) = formatted(&site, "a", false);
    let named = KeyReference { store: own.store.clone(), key: KeyId::random() };
    header::probe(&device, None).unwrap().move_token(&own, &named).unwrap();
    let before = fs::read(&device).unwrap();
    let refused = erased(&site, &device).unwrap_err();
    assert!(matches!(&refused, Error::KeyElsewhere { others, .. } if *others == [own.clone()]), "{refused:?}");
    assert!(fs::read(&device).unwrap() == before && site.keys() == [own], "nothing is changed");
}

#[test]
fn a_device_and_a_header_that_do_not_belong_together_are_not_erased() {
    let site = Site::with("");
    let ((one, _), (other, _)) = (formatted(&site, "a", false), formatted(&site, "b", false));
    let plain = site.blank("c");
    // A copy of its own header, too: that would be wiped, and the header stay.
    let copy = site.beside_the_keys("copy");
    fs::copy(&one, &copy).unwrap();
    for (device, header) in [(&one, &other), (&plain, &other), (&one, &copy)] {
        let confirm = |_: &erase::Doomed<'_>| Ok(());
        let separation = Strictness::default();
        let request = erase::Request { device, header: Some(header), receipt: None, separation, confirm: &confirm };
        let before = fs::read(header).unwrap();
        refuses!(site, erase::erase(&site.config, &request), Error::NotItsHeader { .. });
        assert!(fs::read(header).unwrap() == before && site.keys().len() == 2, "nothing is changed");
    }
}

/// Whoever writes to the disk would have another volume's key deleted.
#[test]
fn a_key_that_only_the_header_calls_the_volumes_is_not_deleted() {
    let site = Site::with("");
    let (device, own) = formatted(&site, "a", false);
    let (_, victim) = formatted(&site, "b", false);
    cryptsetup(&["token", "remove", "--token-id", "0"], &device);
    let token = site.path("token");
    fs::write(
        &token,
        format!(r#"{{"type":"cryptattach","keyslots":[],"store":"{}","key":"{}"}}"#, victim.store, victim.key),
    )
    .unwrap();
    cryptsetup(&["token", "import", "--token-id", "0", "--json-file", token.to_str().unwrap()], &device);
    let before = fs::read(&device).unwrap();
    refuses!(site, erased(&site, &device), Error::NotProven { .. });
    assert!(fs::read(&device).unwrap() == before && site.keys().len() == 2 && own != victim, "nothing is changed");
}

/// A site with a second store.
struct Movers {
    site: Site,
    vault: StoreName,
    there: Memory,
}

impl Movers {
    fn new() -> Self {
        let site = Site::with(
            "[stores.SITE-vault]\ntype = 'directory'\npath = 'none'\nowner = 'owner.pem'\nno_escrow = true\n\
             identities = ['owner.key']\n",
        );
        let (vault, there): (StoreName, _) = (format!("{}-vault", site.name).parse().unwrap(), Memory::default());
        there.hand_in(&vault);
        there.set_places(vec![Place::path("sealed key", site.beside_the_keys("c.toml"), true)]);
        let mut site = site;
        site.config.default_store = Some(site.name.clone());
        Self { site, vault, there }
    }

    fn moved(&self, key: &KeyReference, device: &Path) -> Result<r#move::Moved, Error> {
        let to = if key.store == self.vault { &self.site.name } else { &self.vault };
        let request = r#move::Request { to, separation: Strictness::default() };
        r#move::one(&self.site.config, &request, key, Some(r#move::At { device: device.to_owned(), header: None }))
    }

    fn named(device: &Path) -> KeyReference {
        header::probe(device, None).unwrap().luks().unwrap().reference.clone().unwrap()
    }

    /// The volume attaches.
    fn check(&self, device: &Path) {
        attached(&self.site, device).unwrap();
        detach::detach(&self.site.backend, &"data".parse().unwrap(), crate::volumes::backend::Deferred::No).unwrap();
    }
}

#[test]
fn a_store_that_goes_away_in_a_move_loses_nothing_and_the_same_command_goes_on() {
    for which in [0, 1] {
        let mut requests = 0;
        loop {
            let movers = Movers::new();
            let (device, old) = formatted(&movers.site, "a", requests % 2 == 0);
            let store = [&movers.site.store, &movers.there][which];
            store.answer_only(Some(requests));
            let moved = movers.moved(&old, &device);
            store.answer_only(None);
            movers.check(&device);
            let was_done = moved.is_ok();
            assert!(was_done || requests < 40, "{moved:?}");
            let moved = movers.moved(&old, &device).unwrap();
            assert_eq!((&moved.key.store, moved.key.key), (&movers.vault, old.key));
            movers.check(&device);
            assert!(movers.site.keys().is_empty() && movers.there.stored(old.key).is_some());
            if was_done {
                break;
            }
            requests += 1;
        }
        assert!(requests > 4, "{requests} requests");
    }
}

#[test]
fn a_store_that_gives_another_key_back_gets_none() {
    let movers = Movers::new();
    let (device, old) = formatted(&movers.site, "a", false);
    let (_, other) = formatted(&movers.site, "b", false);
    let before = fs::read(&device).unwrap();
    movers.there.lie_about_all(movers.site.store.stored(other.key).unwrap());
    let refused = movers.moved(&old, &device).unwrap_err();
    assert!(matches!(refused, Error::Unlock(_)), "{refused:?}");
    assert!(fs::read(&device).unwrap() == before && movers.site.keys().contains(&old), "all is as it was");
    movers.check(&device);
}

#[test]
fn a_key_gets_a_new_id_where_its_own_is_taken() {
    let movers = Movers::new();
    let (device, old) = formatted(&movers.site, "a", true);
    let (_, other) = formatted(&movers.site, "b", false);
    let taken = movers.site.store.stored(other.key).unwrap();
    movers.there.put(old.key, taken.clone());
    let moved = movers.moved(&old, &device).unwrap();
    assert_ne!(moved.key.key, old.key);
    assert_eq!(movers.there.stored(old.key), Some(taken), "what is there stays");
    assert_eq!(Movers::named(&device), moved.key);
    movers.check(&device);
    assert!(!movers.site.keys().contains(&old));
}

/// The stored copy of a run that was killed long ago lacks what was sealed with the key since.
#[test]
fn a_copy_that_says_less_than_the_key_does_not_take_its_place() {
    let movers = Movers::new();
    let (device, old) = formatted(&movers.site, "a", true);
    let config = &movers.site.config;
    let proven = |reference: &KeyReference| {
        let container = Container::open(config, &reference.store, None, Use::Keys).unwrap();
        let volume = header::probe(&device, None).unwrap();
        Case::of(config, volume, reference.clone(), container.into()).prove(Circumstances::default()).unwrap()
    };
    let copy = KeyReference { store: movers.vault.clone(), key: old.key };
    proven(&copy).store_copy(&proven(&old)).unwrap();
    proven(&copy).forget_passphrase().unwrap();
    // Nor if the header names it.
    header::probe(&device, None).unwrap().move_token(&old, &copy).unwrap();
    let refused = movers.moved(&old, &device).unwrap_err();
    assert!(matches!(&refused, Error::NotMovable { why, .. } if why.contains("is no copy of it")), "{refused:?}");
    assert!(movers.site.keys().contains(&old), "it is not deleted");
    header::probe(&device, None).unwrap().move_token(&copy, &old).unwrap();
    let moved = movers.moved(&old, &device).unwrap();
    assert_ne!(moved.key, copy);
    let request = passphrase::Request { device: &device, header: None, key: None };
    passphrase::release(config, request).expect("it has its passphrase");
}

#[test]
fn keys_that_others_know_by_their_ids_are_not_moved() {
    let movers = Movers::new();
    let (device, key) = formatted(&movers.site, "a", false);
    let refused = |key: &KeyReference, device: &Path| match movers.moved(key, device).unwrap_err() {
        Error::NotMovable { why, .. } => why,
        error => panic!("{error:?}"),
    };
    let (other, _) = formatted(&movers.site, "b", false);
    assert!(refused(&key, &other).contains("names another key"));
    let object = of_project(&movers.site, "AAAA");
    assert!(refused(&object, &device).contains("a tenant's"));
    let consumer = consumer("3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de");
    movers.site.container().store().add_consumer(&key.key, &consumer).unwrap();
    assert!(refused(&key, &device).contains("it has consumers"));
    movers.site.container().store().remove_consumer(&key.key, &consumer).unwrap();
    // Nor while its rotation is to be gone on with.
    left(&movers.site, &device, &key, &key, false);
    assert!(refused(&key, &device).contains("a rotation has begun"));
    // Nor to a third store while its move to another one is.
    let journal = movers.site.config.state.join("move").join(movers.site.name.as_str());
    fs::create_dir_all(&journal).unwrap();
    let begun =
        serde_json::json!({"volume": uuid::Uuid::nil(), "at": {"device": device}, "new": format!("third/{}", key.key)});
    fs::write(journal.join(key.key.to_string()), begun.to_string()).unwrap();
    assert!(refused(&key, &device).contains("its move to 'third' has begun"));
    assert!(movers.there.asked().iter().all(|asked| !asked.starts_with("create")), "nothing is stored");
    movers.check(&device);
}

fn with_new_passphrase(site: &Site, device: &Path) -> Result<new_passphrase::Rotated, Error> {
    let request = new_passphrase::Request { device, header: None, separation: Strictness::default() };
    new_passphrase::rotate(&site.config, &request)
}

/// What the store gives opens the keyslot.
fn released(site: &Site, device: &Path) -> SecretBytes {
    let request = passphrase::Request { device, header: None, key: None };
    let passphrase = passphrase::release(&site.config, request).unwrap();
    header::probe(device, None).unwrap().open_keyslot(&passphrase).expect("it opens the keyslot");
    passphrase
}

#[test]
fn a_store_that_goes_away_while_a_passphrase_is_rotated_loses_none_and_the_same_command_goes_on() {
    for requests in 0.. {
        let site = Site::with("");
        let (device, _) = formatted(&site, "a", true);
        let old = released(&site, &device);
        site.store.answer_only(Some(requests));
        let rotated = with_new_passphrase(&site, &device);
        site.store.answer_only(None);
        released(&site, &device);
        let was_done = rotated.is_ok();
        assert!(was_done || requests < 60, "{rotated:?}");
        with_new_passphrase(&site, &device).unwrap();
        assert!(released(&site, &device) != old);
        let volume = header::probe(&device, None).unwrap();
        assert!(matches!(volume.open_keyslot(&old), Err(VolumeError::WrongPassphrase { .. })));
        assert_eq!(volume.claimed_keyslots().unwrap().len(), 1);
        if was_done {
            assert!(requests > 10, "{requests} requests");
            break;
        }
    }
}

/// With the older form the new keyslot would be removed, and the old one kept.
#[test]
fn a_store_that_brings_the_old_passphrase_back_has_no_keyslot_removed() {
    let site = Site::with("");
    let (device, key) = formatted(&site, "a", true);
    // Killed before the old keyslot was removed: as many requests as are answered until then.
    let mut earlier = Vec::new();
    for requests in 0.. {
        site.store.answer_only(Some(requests));
        let rotated = with_new_passphrase(&site, &device);
        site.store.answer_only(None);
        if rotated.is_ok() {
            break;
        }
        earlier.push((site.store.stored(key.key).unwrap(), fs::read(&device).unwrap()));
    }
    let new = released(&site, &device);
    let last = site.store.stored(key.key).unwrap();
    for (form, image) in earlier.into_iter().filter(|(form, _)| *form != last) {
        fs::write(&device, image).unwrap();
        site.store.lie(key.key, form);
        assert!(with_new_passphrase(&site, &device).is_err(), "this host has seen a later form");
        site.store.be_honest(key.key);
        if header::probe(&device, None).unwrap().claimed_keyslots().unwrap().len() > 1 {
            header::probe(&device, None).unwrap().open_keyslot(&new).expect("it is not removed");
        }
    }
}

#[test]
fn a_passphrase_that_others_know_by_its_key_is_not_rotated() {
    let site = Site::with("");
    let (device, key) = formatted(&site, "a", true);
    let consumer = consumer("3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de");
    let before = fs::read(&device).unwrap();
    site.container().store().add_consumer(&key.key, &consumer).unwrap();
    assert!(with_new_passphrase(&site, &device).unwrap_err().to_string().contains("it has consumers"));
    assert!(fs::read(&device).unwrap() == before, "nothing is begun");
}

#[test]
fn a_key_is_moved_in_the_middle_of_its_passphrases_rotation_which_goes_on_there() {
    let movers = Movers::new();
    let (device, old) = formatted(&movers.site, "a", true);
    let claimed = || header::probe(&device, None).unwrap().claimed_keyslots().unwrap().len();
    for requests in 0.. {
        movers.site.store.answer_only(Some(requests));
        let stopped = with_new_passphrase(&movers.site, &device);
        movers.site.store.answer_only(None);
        assert!(stopped.is_err());
        if claimed() == 2 {
            break;
        }
    }
    let before = released(&movers.site, &device);
    let moved = movers.moved(&old, &device).unwrap();
    assert!(released(&movers.site, &device) == before && claimed() == 2);
    assert_eq!(with_new_passphrase(&movers.site, &device).unwrap().key, moved.key);
    assert!(released(&movers.site, &device) != before && claimed() == 1);
}
