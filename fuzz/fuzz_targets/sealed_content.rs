//! What is inside a sealed key: whoever knows the owner's public key can make one.
#![no_main]
use cryptattach::{base::key::SecretBytes, keys::seal::Content};
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let content = match Content::from_json(&SecretBytes::copy_of(data).expect("memory")) {
        Ok(content) => content,
        Err(error) => return check_error(&error),
    };
    // What another program has written may be longer than what we write.
    let Ok(json) = content.to_json() else { return };
    let again = Content::from_json(&json).ok().expect("what was printed");
    assert_eq!(again.to_json().expect("as before").expose(), json.expose());
});
