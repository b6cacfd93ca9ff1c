//! /etc/crypttab, and what of it is ours.
#![no_main]
use cryptattach::{
    config::crypttab,
    verbs::boot::crypttab_entries::{self, Crypttab},
};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let planned = Crypttab::of(&text).entries.into_iter().filter_map(crypttab_entries::planned);
    let planned: Vec<_> = planned.collect();
    assert!(planned.len() <= crypttab::parse(&text).len());
    for volume in planned {
        assert!(volume.device.is_node() && volume.header.is_none_or(|header| header.is_absolute()));
    }
});
