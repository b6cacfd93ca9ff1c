//! The kernel's command line.
#![no_main]
use cryptattach::verbs::boot::{
    command_line::{CommandLine, Stage},
    crypttab_entries,
};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let said = CommandLine::parse(&String::from_utf8_lossy(data), Stage::Initrd);
    let planned: Vec<_> = said.entries().into_iter().filter_map(crypttab_entries::planned).collect();
    for (n, volume) in planned.iter().enumerate() {
        assert!(planned[..n].iter().all(|other| other.device != volume.device), "{} twice", volume.device);
    }
});
