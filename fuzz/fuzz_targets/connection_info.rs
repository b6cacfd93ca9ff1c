//! Who serves a volume, as Cinder's connection_info says.
#![no_main]
use cryptattach::volumes::separation::Target;
use cryptattach_fuzz::{check_error, check_text};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match Target::parse(data) {
        Ok(Target::Remote(remote)) => {
            check_text(&remote.to_string());
            assert!(remote.names.iter().all(|name| name.len() <= 4200));
        }
        Ok(Target::Unknown { why }) => check_text(&why),
        Ok(Target::Local) => {}
        Err(error) => check_error(&error),
    }
});
