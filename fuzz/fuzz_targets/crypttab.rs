//! /etc/crypttab, and what of it is ours.
#![no_main]
use cryptattach::{boot::listed, crypttab};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let planned = listed::entries(&text);
    assert!(planned.len() <= crypttab::parse(&text).len());
    for volume in planned {
        assert!(volume.device.is_node() && volume.header.is_none_or(|header| header.is_absolute()));
    }
});
