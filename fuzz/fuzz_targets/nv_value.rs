//! What stands in an NV index of the TPM, which another system on the machine may have written.
#![no_main]
use cryptattach::{base::key::MAX_SEALED_BYTES, keys::store::NvValue};
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let value = match NvValue::unpack(data) {
        Ok(value) => value,
        Err(error) => return check_error(&error),
    };
    assert!(value.json.len() <= MAX_SEALED_BYTES);
    assert_eq!(NvValue::unpack(&value.pack()).expect("what was packed"), value);
    value.generation().map_or_else(|error| check_error(&error), drop);
});
