//! The event log of firmware and boot loader.
#![no_main]
use cryptattach::keys::tpm::parse_event_log;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    for event in parse_event_log(data).unwrap_or_default() {
        let said = event.to_string();
        assert!(!said.contains(char::is_control) && said.chars().count() < 300, "{said:?}");
    }
});
