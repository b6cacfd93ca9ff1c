//! A token's URI, and what the program says that loads its module.
#![no_main]
use cryptattach::keys::seal::leaves::TokenAnswer;
use cryptattach_fuzz::{check_error, check_text};
use cryptattach_pkcs11::Uri;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(uri) = Uri::parse(&format!("pkcs11:{text}"))
    {
        let paths = [uri.module_path, uri.pin_source];
        assert!(paths.iter().flatten().all(|path| path.is_absolute()));
        assert!(uri.module_name.is_none_or(|name| !name.contains('/')));
    }
    match TokenAnswer::read(data) {
        Ok(TokenAnswer::Done(bytes)) => assert!(data.ends_with(bytes.expose())),
        Ok(TokenAnswer::NeedsPin(wanting)) => check_text(&cryptattach::base::chain::printable(&wanting.label)),
        Ok(TokenAnswer::NotTaken(error) | TokenAnswer::Failed(error)) => check_error(&error),
        Err(logged_in) => assert_eq!(logged_in, data.starts_with(b"login\n")),
    }
});
