//! The file of a key that is in a TPM ("TSS2 PRIVATE KEY").
#![no_main]
use cryptattach::keys::tpm::IdentityFile;
use cryptattach_fuzz::check_error;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Ok(file) = IdentityFile::parse(data) else { return };
    file.public_pem().map_or_else(|error| check_error(&error), drop);
    let pem = file.to_pem().expect("what was read");
    let again = IdentityFile::parse(pem.as_bytes()).expect("what was written");
    assert_eq!((again.public, again.private, again.policy), (file.public, file.private, file.policy));
});
