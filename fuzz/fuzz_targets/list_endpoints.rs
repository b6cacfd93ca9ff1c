//! Where Swift says that an object's replicas are.
#![no_main]
use cryptattach::{base::key::Ring, keys::store::parse_endpoints};
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    match parse_endpoints(data, Ring::Object) {
        Ok(replicas) => {
            assert!((1..=256).contains(&replicas.len()));
            for (n, replica) in replicas.iter().enumerate() {
                assert!(!replicas[..n].contains(replica) && !replica.device.contains('/'), "{replica:?}");
            }
        }
        Err(error) => check_error(&error),
    }
});
