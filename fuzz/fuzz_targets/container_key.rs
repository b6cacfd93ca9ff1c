//! Opening what a store says is sealed to us: headers, ephemeral keys, wrapped keys. Nobody can guess our keys, so it fails.
#![no_main]
use std::sync::Arc;

use cryptattach::{
    base::key::{ContainerKeyId, SealedKey},
    keys::seal::{ContainerKey, Expected, For, Identities, OwnerKey},
};
use cryptattach_fuzz::check_error;

thread_local! {
    static KEYRING: Identities = {
        let key = ContainerKey::random(&"cinder".parse().expect("a name"), None).expect("a key");
        Identities::of(vec![Box::new(OwnerKey::generate().expect("a key")), Box::new(Arc::new(key))])
    };
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(sealed) = SealedKey::from_json(data) else { return };
    KEYRING.with(|keyring| {
        let id: ContainerKeyId = "cinder/kek/1".parse().expect("an id");
        check_error(&ContainerKey::open(&sealed, keyring, &id).map(drop).expect_err("not sealed to us"));
        let key_id = "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de".parse().expect("an id");
        let expected = Expected { key_id, container: id.container, volume: For::Any };
        check_error(&keyring.open(&sealed, &expected).map(drop).expect_err("not sealed to us"));
    });
});
