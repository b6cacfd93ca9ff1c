//! A sealed key as a store gives it, before anything is opened.
#![no_main]
use cryptattach::{key::SealedKey, seal::EntryContext};
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let key = match SealedKey::from_json(data) {
        Ok(key) => key,
        Err(error) => return check_error(&error),
    };
    assert_eq!(SealedKey::from_json(&key.to_json()).expect("what was printed"), key);
    assert!(key.recipient_kids().count() <= key.recipients.len());
    key.claimed_context().map_or_else(|error| check_error(&error), drop);
    key.claimed_generation().map_or_else(|error| check_error(&error), drop);
    EntryContext::claimed(&key).map_or_else(|error| check_error(&error), drop);
});
