//! Round trips and refusals, and the standards' own vectors.

use std::path::Path;

use openssl::{
    ec::{EcGroup, EcKey},
    nid::Nid,
    rsa::Rsa,
};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::base::key::{ManagedObject, ObjectFacts, SecretBytes};

fn content() -> Content {
    Content::VolumeKey(Payload {
        sector_size_bytes: 4096,
        data_offset_bytes: 16 << 20,
        digest: Some("sha256:1000:c2FsdA==:ZGlnZXN0".to_owned()),
        passphrase: Some(SecretBytes::copy_of(b"00ff").unwrap()),
        passphrase_next: Some(SecretBytes::copy_of(b"11ee").unwrap()),
        ..Payload::random()
    })
}

fn context() -> BoundContext {
    BoundContext {
        version: 1,
        key_id: KeyId::random(),
        container: "cinder".parse().unwrap(),
        volume: Some(Uuid::new_v4()),
        project: None,
        generation: 1,
        created: 1_700_000_000,
    }
}

fn expected(context: &BoundContext) -> Expected {
    Expected { key_id: context.key_id, container: context.container.clone(), volume: For::volume(context.volume) }
}

fn pem(name: &str, bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    (folder, path)
}

fn rsa(bits: u32) -> OwnerKey {
    let (_folder, path) = pem("rsa.key", &Rsa::generate(bits).unwrap().private_key_to_pem().unwrap());
    OwnerKey::read(&path).unwrap()
}

fn recipients_of(keys: &[&OwnerKey]) -> Vec<Box<dyn Recipient>> {
    keys.iter().map(|key| Box::new(key.recipient().unwrap()) as Box<dyn Recipient>).collect()
}

/// A sealed key for a new owner, and the owner's identity.
fn sealed() -> (SealedKey, BoundContext, Identities) {
    let (owner, context) = (OwnerKey::generate().unwrap(), context());
    let sealed = seal(&context, &content(), &recipients_of(&[&owner])).unwrap();
    (sealed, context, Identities::of(vec![Box::new(owner)]))
}

#[test]
fn each_recipient_opens_alone() {
    let (owner, escrow, context, content) = (OwnerKey::generate().unwrap(), rsa(2048), context(), content());
    let sealed = seal(&context, &content, &recipients_of(&[&owner, &escrow])).unwrap();
    let sealed = SealedKey::from_json(&sealed.to_json()).unwrap();
    assert_eq!(sealed.recipient_kids().collect::<Vec<_>>(), [owner.kid(), escrow.kid()]);
    for identity in [owner, escrow] {
        let opened = Identities::of(vec![Box::new(identity)]).open(&sealed, &expected(&context)).unwrap();
        assert_eq!(opened.context, context);
        let (Content::VolumeKey(opened), Content::VolumeKey(sealed)) = (&opened.content, &content) else { panic!() };
        assert!(opened.volume_key == sealed.volume_key);
        assert!(opened.passphrase == sealed.passphrase);
        assert_eq!(opened.digest, sealed.digest);
    }
}

#[test]
fn nothing_of_the_key_is_in_the_sealed_form() {
    let (owner, content) = (OwnerKey::generate().unwrap(), content());
    let one = seal(&context(), &content, &recipients_of(&[&owner])).unwrap();
    let two = seal(&context(), &content, &recipients_of(&[&owner])).unwrap();
    assert!(one.ciphertext != two.ciphertext && one.iv != two.iv);
    let Content::VolumeKey(payload) = &content else { panic!() };
    let text = Base64UrlUnpadded::encode_string(payload.volume_key.expose());
    assert!(!String::from_utf8(one.to_json()).unwrap().contains(&text[..20]));
}

#[test]
fn a_stranger_is_told_whom_it_is_for() {
    let (sealed, context, identities) = sealed();
    let stranger = Identities::of(vec![Box::new(OwnerKey::generate().unwrap()), Box::new(rsa(2048))]);
    let Err(SealError::NotForUs { sealed_to, .. }) = stranger.open(&sealed, &expected(&context)) else { panic!() };
    assert_eq!(sealed_to, identities.identities[0].kid());
    assert!(matches!(Identities::of(vec![]).open(&sealed, &expected(&context)), Err(SealError::NotForUs { .. })));
}

#[test]
fn a_key_for_something_else_is_refused_and_says_for_what() {
    let (sealed, context, identities) = sealed();
    let right = expected(&context);
    let wrong = [
        ("key", Expected { key_id: KeyId::random(), ..right.clone() }),
        ("container", Expected { container: "glance".parse().unwrap(), ..right.clone() }),
    ];
    for (which, asked) in wrong {
        let what = match identities.open(&sealed, &asked) {
            Err(SealError::Other { what, .. }) => what,
            Err(SealError::OtherVolume { .. }) => "volume",
            _ => panic!("{which}"),
        };
        assert_eq!(what, which);
    }
    for volume in [For::Luks(Uuid::new_v4()), For::Plain] {
        let refused = identities.open(&sealed, &Expected { volume, ..right.clone() }).err();
        assert!(matches!(refused, Some(SealError::OtherVolume { is, .. }) if is == context.volume), "{refused:?}");
    }
    identities.open(&sealed, &Expected { volume: For::Any, ..right }).unwrap();
}

#[test]
fn every_change_is_noticed() {
    let (sealed, context, identities) = sealed();
    let flip = |text: &str| {
        let mut bytes = Base64UrlUnpadded::decode_vec(text).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        Base64UrlUnpadded::encode_string(&bytes)
    };
    type Change<'a> = &'a dyn Fn(&mut SealedKey);
    let changes: [(&str, Change<'_>); 5] = [
        ("ciphertext", &|key| key.ciphertext = flip(&key.ciphertext)),
        ("iv", &|key| key.iv = flip(&key.iv)),
        ("tag", &|key| key.tag = flip(&key.tag)),
        ("encrypted key", &|key| key.recipients[0].encrypted_key = flip(&key.recipients[0].encrypted_key)),
        ("generation", &|key| {
            let text = String::from_utf8(Base64UrlUnpadded::decode_vec(&key.protected).unwrap()).unwrap();
            let text = text.replace("\"generation\":1", "\"generation\":2");
            key.protected = Base64UrlUnpadded::encode_string(text.as_bytes());
        }),
    ];
    for (which, change) in changes {
        let mut changed = sealed.clone();
        change(&mut changed);
        assert_ne!(changed, sealed);
        let result = identities.open(&changed, &expected(&context));
        assert!(matches!(result, Err(SealError::Tampered)), "{which}");
    }
}

#[test]
fn what_we_do_not_do_is_refused() {
    let (sealed, context, identities) = sealed();
    let with_protected = |change: &dyn Fn(&mut JoseHeader)| {
        let mut key = sealed.clone();
        let mut header = key.protected_header().unwrap();
        change(&mut header);
        key.protected = Base64UrlUnpadded::encode_string(Value::Object(header).to_string().as_bytes());
        key
    };
    let with_entry = |name: &str, value: Value| {
        let mut key = sealed.clone();
        key.recipients[0].header.insert(name.to_owned(), value);
        key
    };
    let off_curve = json!({"kty": "EC", "crv": "P-256", "x": "A".repeat(43), "y": "A".repeat(43)});
    let cases = [
        ("enc", with_protected(&|h| drop(h.insert("enc".into(), json!("A128CBC-HS256"))))),
        ("typ", with_protected(&|h| drop(h.insert("typ".into(), json!("JWT"))))),
        ("version", with_protected(&|h| h["cryptattach"]["version"] = json!(2))),
        ("zip", with_protected(&|h| drop(h.insert("zip".into(), json!("DEF"))))),
        ("crit", with_protected(&|h| drop(h.insert("crit".into(), json!(["exp"]))))),
        ("enc twice", with_entry("enc", json!("A256GCM"))),
        ("alg", with_entry("alg", json!("RSA1_5"))),
        ("alg none", with_entry("alg", json!("dir"))),
        ("epk", with_entry("epk", off_curve)),
        ("epk missing", with_entry("epk", Value::Null)),
        ("short tag", SealedKey { tag: "AAAAAAAAAAA".to_owned(), ..sealed.clone() }),
        ("long iv", SealedKey { iv: "A".repeat(24), ..sealed.clone() }),
        ("base64", SealedKey { ciphertext: "***".to_owned(), ..sealed.clone() }),
    ];
    for (which, key) in cases {
        let result = identities.open(&key, &expected(&context));
        assert!(matches!(result, Err(SealError::Unsupported(_))), "{which}: {:?}", result.err());
    }
}

#[test]
fn what_else_is_authenticated_counts_and_two_forms_at_once_are_refused() {
    let (sealed, context, identities) = sealed();
    let open = |json: &Value| {
        let sealed = SealedKey::from_json(json.to_string().as_bytes()).map_err(SealError::from)?;
        identities.open(&sealed, &expected(&context)).map(drop)
    };
    let mut json: Value = serde_json::from_slice(&sealed.to_json()).unwrap();
    open(&json).expect("as it was sealed");
    json["aad"] = json!("bm90IHNlYWxlZCB3aXRoIGl0");
    assert!(matches!(open(&json), Err(SealError::Tampered)), "it was not authenticated");
    let mut both: Value = serde_json::from_slice(&sealed.to_json()).unwrap();
    both["encrypted_key"] = both["recipients"][0]["encrypted_key"].clone();
    assert!(matches!(open(&both), Err(SealError::Malformed(MalformedSealedKey::BothForms))));
    both.as_object_mut().unwrap().remove("encrypted_key");
    both["header"] = json!({"alg": "ECDH-ES+A256KW"});
    assert!(matches!(open(&both), Err(SealError::Malformed(MalformedSealedKey::BothForms))));
}

#[test]
fn keys_that_are_too_weak_or_unknown_are_refused_by_name() {
    let p384 = EcKey::generate(&EcGroup::from_curve_name(Nid::SECP384R1).unwrap()).unwrap();
    let ed25519 = openssl::pkey::PKey::generate_ed25519().unwrap();
    let encrypted = Rsa::generate(2048)
        .unwrap()
        .private_key_to_pem_passphrase(openssl::symm::Cipher::aes_128_cbc(), b"secret")
        .unwrap();
    let cases = [
        ("1024 bits", Rsa::generate(1024).unwrap().private_key_to_pem().unwrap()),
        ("another curve", p384.private_key_to_pem().unwrap()),
        ("neither", ed25519.private_key_to_pem_pkcs8().unwrap()),
        ("passphrase", encrypted),
        ("not a private key", b"hello".to_vec()),
        ("not a private key", OwnerKey::generate().unwrap().public_pem().unwrap()),
    ];
    for (told, bytes) in cases {
        let (_folder, path) = pem("wrong.key", &bytes);
        let error = OwnerKey::read(&path).err().unwrap().to_string();
        assert!(error.contains(told) && error.contains("wrong.key"), "{told}: {error}");
    }
    let (_folder, path) = pem("private.pem", OwnerKey::generate().unwrap().private_pem().unwrap().expose());
    assert!(OwnerRecipient::read(&path).err().unwrap().to_string().contains("is a private key"));
    assert!(matches!(OwnerKey::read(Path::new("/does/not/exist")), Err(SealError::Read { .. })));
}

#[test]
fn certificates_name_recipients() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
    for (kind, option) in [("ec", "ec_paramgen_curve:P-256"), ("rsa", "rsa_keygen_bits:2048")] {
        let (key, certificate) = (file(&format!("{kind}.key")), file(&format!("{kind}.pem")));
        let arguments = ["req", "-x509", "-nodes", "-newkey", kind, "-pkeyopt", option, "-subj", "/CN=cinder"];
        let mut openssl = std::process::Command::new("openssl");
        let made = openssl.args(arguments).args(["-keyout", &key, "-out", &certificate]).output().unwrap();
        assert!(made.status.success());
        let (recipient, identity) =
            (OwnerRecipient::read(certificate.as_ref()).unwrap(), OwnerKey::read(key.as_ref()).unwrap());
        assert_eq!(recipient.kid(), identity.kid());
        let context = context();
        let sealed = seal(&context, &content(), &[Box::new(recipient)]).unwrap();
        Identities::of(vec![Box::new(identity)]).open(&sealed, &expected(&context)).unwrap();
    }
}

/// RFC 3394 section 4.6: 256 bits of key data with a 256-bit key.
#[test]
fn key_wrap_as_in_rfc_3394() {
    let hex = |text: &str| -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    };
    let kek = hex("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F");
    let data = hex("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F");
    let wrapped = hex("28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21");
    let kek = SecretBytes::copy_of(&kek).unwrap();
    let key = ContentKey::from_secret(SecretBytes::copy_of(&data).unwrap()).unwrap();
    assert_eq!(key_wrap::wrap(&kek, &key).unwrap(), wrapped);
    assert_eq!(key_wrap::unwrap(&kek, &wrapped).unwrap().unwrap().expose(), data);
    let mut damaged = wrapped.clone();
    damaged[20] ^= 1;
    assert!(key_wrap::unwrap(&kek, &damaged).unwrap().is_none());
    assert!(key_wrap::unwrap(&kek, &wrapped[..32]).unwrap().is_none());
}

/// RFC 7516 appendix A.1: A256GCM with the content key, IV and protected header given there.
#[test]
fn content_encryption_as_in_rfc_7516_appendix_a_1() {
    let key = [
        177, 161, 244, 128, 84, 143, 225, 115, 63, 180, 3, 255, 107, 154, 212, 246, 138, 7, 110, 91, 112, 46, 34, 105,
        47, 130, 203, 46, 122, 234, 64, 252,
    ];
    let decode = |text: &str| Base64UrlUnpadded::decode_vec(text).unwrap();
    let sealed = content::Sealed {
        iv: decode("48V1_ALb6US04U3b"),
        ciphertext: decode("5eym8TW_c8SuK0ltJ3rpYIzOeDQz7TALvtu6UG9oMo4vpzs9tX_EFShS8iB7j6jiSdiwkIr3ajwQzaBtQD_A"),
        tag: decode("XFBoMYUZodetZdvTiFvSkQ"),
    };
    let key = ContentKey::from_secret(SecretBytes::copy_of(&key).unwrap()).unwrap();
    let opened = sealed.open(&key, b"eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifQ").unwrap();
    assert_eq!(opened.expose(), b"The true sign of intelligence is not knowledge but imagination.");
    let changed = sealed.open(&key, b"eyJhbGciOiJSU0EtT0FFUCIsImVuYyI6IkEyNTZHQ00ifR");
    assert!(matches!(changed, Err(SealError::Tampered)));
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = SealedKey::from_json(&bytes).map(|key| key.claimed_context());
    }

    #[test]
    fn a_damaged_sealed_key_never_opens(at in 0..2000_usize, byte in any::<u8>()) {
        thread_local!(static FIXTURE: (SealedKey, BoundContext, Identities) = sealed());
        FIXTURE.with(|(sealed, context, identities)| {
            let mut json = sealed.to_json();
            let at = at % (json.len() - 1);
            json[at] = byte;
            if let Ok(damaged) = SealedKey::from_json(&json) && let Ok(opened) = identities.open(&damaged, &expected(context)) {
                // Only a change that changes nothing is let pass: white space, or a member that is not ours.
                assert_eq!(&opened.context, context);
                assert_eq!((damaged.protected, damaged.ciphertext), (sealed.protected.clone(), sealed.ciphertext.clone()));
            }
        });
    }
}

#[test]
fn an_object_is_for_any_volume_until_it_is_bound_to_one() {
    let owner = OwnerKey::generate().unwrap();
    let object = || {
        let facts = ObjectFacts::symmetric(256);
        Content::Object(ManagedObject { facts, value: SecretBytes::random(8192).unwrap() })
    };
    let volume = Uuid::new_v4();
    let unbound = BoundContext { volume: None, ..context() };
    let bound = BoundContext { volume: Some(volume), ..context() };
    let recipients = recipients_of(&[&owner]);
    let [free, tied] = [&unbound, &bound].map(|context| seal(context, &object(), &recipients).unwrap());
    let identities = Identities::of(vec![Box::new(owner)]);
    let open = |sealed, context: &BoundContext, volume| {
        identities
            .open(sealed, &Expected { volume: For::volume(volume), ..expected(context) })
            .map(|opened| opened.content)
    };
    assert!(matches!(open(&free, &unbound, Some(volume)), Ok(Content::Object(object)) if object.value.len() == 8192));
    assert!(open(&free, &unbound, None).is_ok());
    assert!(open(&tied, &bound, Some(volume)).is_ok());
    assert!(matches!(open(&tied, &bound, Some(Uuid::new_v4())), Err(SealError::OtherVolume { .. })));
}
