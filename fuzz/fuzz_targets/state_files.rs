//! What this host and the administrator's machine wrote down and read back.
#![no_main]
use cryptattach::{unlock::enrol::Admitted, verbs::explain::LastFailure};
use cryptattach_fuzz::check_error;
use serde::{Serialize, de::DeserializeOwned};

/// What is parsed is printed, and parsed to the same again.
fn check<T: Serialize + DeserializeOwned>(data: &[u8]) {
    let value: T = match serde_json::from_slice(data) {
        Ok(value) => value,
        Err(error) => return check_error(&error),
    };
    let json = serde_json::to_vec(&value).expect("what was read");
    let again: T = serde_json::from_slice(&json).expect("what was written");
    assert_eq!(serde_json::to_vec(&again).expect("as before"), json);
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    check::<Admitted>(data);
    check::<LastFailure>(data);
});
