//! What the program `cryptattach-pkcs11` and cryptattach itself both read: URIs of PKCS#11 objects.

mod uri;

pub use uri::{BadUri, Uri};
