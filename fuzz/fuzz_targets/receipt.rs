//! A receipt, which somebody may have made up: its signature, and what it says.
#![no_main]
use cryptattach::{keys::seal::jws, unlock::receipt::Receipt};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(signed) = jws::verify(data) {
        assert_eq!(signed.signer.len(), 43, "a thumbprint");
    }
    if let Ok(receipt) = serde_json::from_slice::<Receipt>(data) {
        let written = serde_json::to_vec(&receipt).expect("it is text");
        assert_eq!(serde_json::from_slice::<Receipt>(&written).expect("it was one"), receipt);
    }
});
