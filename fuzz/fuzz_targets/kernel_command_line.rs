//! The kernel's command line.
#![no_main]
use cryptattach::verbs::boot::crypttab_entries;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let planned = crypttab_entries::from_kernel(&String::from_utf8_lossy(data));
    for (n, volume) in planned.iter().enumerate() {
        assert!(planned[..n].iter().all(|other| other.device != volume.device), "{} twice", volume.device);
    }
});
