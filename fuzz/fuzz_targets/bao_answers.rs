//! What an OpenBao server answers: a secret, the versions of a key, what it decrypted.
#![no_main]
use cryptattach::{
    base::key::SecretBytes,
    keys::{net::BaoSecrets, seal::leaves::TransitVersions, store::BaoFound},
};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((status, body)) = data.split_first() else { return };
    let status = [200, 204, 400, 403, 404, 500][usize::from(*status) % 6];
    match BaoFound::of(status, body) {
        Ok(BaoFound::There { .. }) => assert_eq!(status, 200),
        Ok(BaoFound::Nothing | BaoFound::Deleted { .. }) => assert_eq!(status, 404),
        Err(what) => assert!(what.chars().count() < 400 && !what.contains(char::is_control), "{what:?}"),
    }
    if let Some(versions) = TransitVersions::of(body) {
        let _ = versions.newest();
    }
    let secret = SecretBytes::copy_of(body).expect("locked memory");
    let _ = BaoSecrets::of(&secret).plaintext();
});
