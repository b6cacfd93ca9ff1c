//! The configuration.
#![no_main]
use std::path::Path;

use cryptattach::config::Config;
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|text: &str| {
    match Config::parse(text, Path::new("/etc/cryptattach/cryptattach.toml")) {
        Ok(config) => config.store_or_default(None).map_or_else(|error| check_error(&error), drop),
        Err(error) => check_error(&error),
    }
});
