//! What clevis has bound: a JWE in the header of a volume, whose URLs and thresholds are the header's word.
#![no_main]
use cryptattach::keys::seal::clevis::{Binding, to_members};
use cryptattach_fuzz::{check_error, check_text};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Binding::of_text(text.to_owned()) {
        Ok(binding) => {
            check_text(&binding.to_string());
            let members = to_members(text).expect("it has five parts");
            assert_eq!(Binding::of_members(&members).ok().expect("as before").to_string(), binding.to_string());
        }
        Err(error) => check_error(&error),
    }
    if let Ok(members) = serde_json::from_slice(data) {
        drop(Binding::of_members(&members));
    }
});
