//! What a server says of its refusal.
#![no_main]
use cryptattach::keys::net::reason_in;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(said) = reason_in(data) {
        assert!(!said.is_empty() && said.chars().count() <= 300 && !said.contains(char::is_control), "{said:?}");
    }
});
