//! clouds.yaml.
#![no_main]
use std::path::Path;

use cryptattach::keys::net::Cloud;
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|text: &str| {
    let cloud = Cloud::parse(text, Path::new("/etc/openstack/clouds.yaml"), "a".to_owned(), None, None);
    cloud.map_or_else(|error| check_error(&error), drop);
});
