//! A LUKS header's first 512 bytes, and what follows: of LUKS2 the JSON area. Checksums are made right.
#![no_main]
use cryptattach_fuzz::{MOST_JSON_BYTES, luks2, probe};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((binary, rest)) = data.split_at_checked(512) else { return };
    if binary[6..8] == [0, 2] && rest.len() <= MOST_JSON_BYTES {
        probe(&luks2(binary, rest));
    } else {
        probe(data);
    }
});
