//! A sealed key as a store gives it, before anything is opened.
#![no_main]
use cryptattach::{base::key::SealedKey, keys::seal::EntryContext};
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let key = match SealedKey::from_json(data) {
        Ok(key) => key,
        Err(error) => return check_error(&error),
    };
    let again = SealedKey::from_json(&key.to_json()).expect("what was printed");
    assert_eq!(parts(&again), parts(&key));
    assert!(key.recipient_kids().count() <= key.recipients.len());
    key.claimed_context().map_or_else(|error| check_error(&error), drop);
    key.claimed_generation().map_or_else(|error| check_error(&error), drop);
    EntryContext::claimed(&key).map_or_else(|error| check_error(&error), drop);
});

/// What is authentic or opens it. Elsewhere a number may have more digits than are kept.
fn parts(key: &SealedKey) -> (Vec<&str>, Vec<&str>) {
    let texts = vec![&*key.protected, &key.iv, &key.ciphertext, &key.tag];
    let keys = key.recipients.iter().map(|recipient| &*recipient.encrypted_key);
    (texts, key.recipient_kids().chain(keys).collect())
}
