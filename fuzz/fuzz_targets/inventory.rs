//! The inventory of hosts and devices.
#![no_main]
use std::path::Path;

use cryptattach::volumes::separation::Inventory;
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|text: &str| {
    Inventory::parse(text, Path::new("inventory.toml")).map_or_else(|error| check_error(&error), drop);
});
