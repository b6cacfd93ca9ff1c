//! systemd-measure's tpm2-pcr-signature.json, and a site's key.
#![no_main]
use std::sync::LazyLock;

use cryptattach::keys::tpm::{PcrSignatures, SiteKey};
use cryptattach_fuzz::{check_error, check_text};
use openssl::{ec::EcGroup, ec::EcKey, nid::Nid, pkey::PKey};

static SITE: LazyLock<SiteKey> = LazyLock::new(|| {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).expect("a curve");
    let key = PKey::from_ec_key(EcKey::generate(&group).expect("a key")).expect("a key");
    let public = PKey::public_key_from_der(&key.public_key_to_der().expect("a key")).expect("a key");
    SiteKey::of(public).expect("P-256")
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(key) = serde_json::from_slice::<SiteKey>(data) {
        let json = serde_json::to_vec(&key).expect("what was read");
        assert_eq!(serde_json::from_slice::<SiteKey>(&json).expect("what was written"), key);
    }
    let signatures = match PcrSignatures::parse(data) {
        Ok(signatures) => signatures,
        Err(error) => return check_error(&error),
    };
    for signature in &signatures {
        assert!(!signature.is_by(&SITE).unwrap_or(false));
        signature.for_tpm(&SITE).map_or_else(|error| check_error(&error), drop);
    }
    let json = PcrSignatures::to_json(signatures.clone()).expect("what was read");
    check_text(&json);
    assert_eq!(PcrSignatures::parse(json.as_bytes()).expect("what was written"), signatures);
});
