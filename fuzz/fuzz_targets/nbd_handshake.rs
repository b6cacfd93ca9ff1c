//! What an NBD client says before its first request.
#![no_main]
use cryptattach::volumes::backend::userspace::nbd::handshake::{Offer, negotiate};
use cryptattach_fuzz::check_text;

const SIZE: u64 = 0x1234_5678_9abc_d000;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut said = Vec::new();
    match negotiate(data, &mut said, &Offer::new(SIZE, 512, false)) {
        // No agreement without a word about the export.
        Ok(agreed) => assert!(agreed.is_none() || said.windows(8).any(|bytes| bytes == SIZE.to_be_bytes())),
        Err(error) => check_text(&error.to_string()),
    }
    // No option has more than 12 + 14 + 3 * 20 bytes of replies, and each has at least 16 itself.
    assert!(said.len() <= 18 + 134 + data.len() * 6, "{} bytes of answers", said.len());
});
