//! The JSON of a LUKS2 header that is in order otherwise.
#![no_main]
use cryptattach_fuzz::{MOST_JSON_BYTES, luks2, probe};

libfuzzer_sys::fuzz_target!(|json: &[u8]| {
    let mut binary = [0; 512];
    binary[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    binary[23] = 1;
    binary[72..78].copy_from_slice(b"sha256");
    binary[168..204].copy_from_slice(b"3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de");
    if json.len() <= MOST_JSON_BYTES {
        probe(&luks2(&binary, json));
    }
});
