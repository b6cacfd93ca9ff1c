//! Policies: an expression of the configuration, or the tree that a store gives and a Tang server's advertisement.
#![no_main]
use cryptattach::{
    base::key::SealedKey,
    config::Policy,
    keys::seal::{Node, leaves::Advertisement},
};
use cryptattach_fuzz::{check_error, check_text, check_word};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        check_word::<Policy>(text);
    }
    if let Ok(sealed) = SealedKey::from_json(data) {
        match Node::of(&sealed) {
            Ok(node) => drop(node.shape()),
            Err(error) => check_error(&error),
        }
    }
    if let Ok(jws) = serde_json::from_slice(data)
        && let Err(why) = Advertisement::of(jws)
    {
        check_text(&why);
    }
});
