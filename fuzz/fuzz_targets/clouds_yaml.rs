//! clouds.yaml.
#![no_main]
use std::path::Path;

use cryptattach::keys::net::{Cloud, Texts};
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|text: &str| {
    // The same text in each place: what it says of a cloud, a secret and a profile.
    let texts = Texts { clouds: text, secure: Some(text), public: Some(text) };
    let cloud = Cloud::parse(texts, Path::new("/etc/openstack/clouds.yaml"), "a".to_owned(), None, None);
    cloud.map_or_else(|error| check_error(&error), drop);
});
