//! What a store or a file may say of a leaf that a person opens, and what a person may type. Nothing is derived from it.
#![no_main]
use cryptattach::{
    base::key::SecretBytes,
    keys::seal::leaves::person::{By, Entry, Kept},
};
use cryptattach_fuzz::check_error;
use serde_json::{Map, Value};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match Kept::of(data) {
        Ok(kept) => {
            let json = kept.to_json().expect("what was read");
            Kept::of(json.as_bytes()).map(drop).expect("what was printed");
        }
        Err(error) => check_error(&error),
    }
    if let Ok(header) = serde_json::from_slice::<Map<String, Value>>(data) {
        match Entry::of(&header) {
            Some(Ok(entry)) => {
                let key = &header["person"]["key"];
                let inner = key.get("recipients").map_or(&key["header"], |recipients| &recipients[0]["header"]);
                assert!(inner["p2c"].as_u64().is_some_and(|count| (1..=2_000_000).contains(&count)), "{key}");
                assert_eq!(Some(entry.kid()), header["kid"].as_str());
            }
            Some(Err(error)) => check_error(&error),
            None => assert!(!header.contains_key("person")),
        }
    }
    match By::Recovery.read(&SecretBytes::copy_of(data).expect("memory")) {
        Ok(words) => assert!(By::Recovery.read(&words).expect("what was read") == words),
        Err(error) => check_error(&error),
    }
});
