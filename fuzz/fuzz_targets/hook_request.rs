//! A request of os-brick's or castellan's.
#![no_main]
use cryptattach::{base::key::SecretBytes, cli};
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let input = SecretBytes::copy_of(data).expect("memory");
    let store = "cinder".parse().expect("a name");
    cli::attach_request(&input, store).map_or_else(|error| check_error(&error), drop);
    match cli::stored_object(&input) {
        Ok(object) => assert!(object.value.len() <= data.len()),
        Err(error) => check_error(&error),
    }
});
