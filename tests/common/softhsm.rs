//! Tokens of SoftHSM, in a folder of one's own.

use std::path::PathBuf;

use crate::shell::sh;

/// SoftHSM's module.
pub const MODULE: &str = "/usr/lib/softhsm/libsofthsm2.so";
/// The PIN of all tokens here.
pub const PIN: &str = "648219";

/// A folder with tokens.
pub struct SoftHsm {
    folder: PathBuf,
}

impl SoftHsm {
    /// Without tokens yet.
    pub fn new(folder: PathBuf) -> Self {
        std::fs::create_dir(&folder).unwrap();
        std::fs::create_dir(folder.join("tokens")).unwrap();
        std::fs::create_dir(folder.join("none")).unwrap();
        let softhsm = Self { folder };
        softhsm.plug(true);
        softhsm
    }

    /// From now on the tokens are there, or no token is.
    pub fn plug(&self, is_in: bool) {
        let tokens = if is_in { self.tokens() } else { self.folder.join("none") };
        let config = format!("directories.tokendir = {}\nobjectstore.backend = file\n", tokens.display());
        std::fs::write(self.config(), config).unwrap();
    }

    /// Where the tokens are.
    pub fn tokens(&self) -> PathBuf {
        self.folder.join("tokens")
    }

    /// SoftHSM's configuration, which `SOFTHSM2_CONF` names.
    pub fn config(&self) -> PathBuf {
        self.folder.join("softhsm2.conf")
    }

    /// A new token with an RSA key `rsa` (id 1) and a P-256 key `ec` (id 2).
    pub fn token(&self, label: &str) {
        self.run(&format!(
            "softhsm2-util --init-token --free --label {label} --so-pin 12345678 --pin {PIN} && \
             t='pkcs11-tool --module {MODULE} --token-label {label} --login --pin {PIN} --keypairgen' && \
             $t --key-type rsa:2048 --id 01 --label rsa && $t --key-type EC:prime256v1 --usage-derive --id 02 --label ec"
        ));
    }

    /// Runs a shell script that finds these tokens.
    #[track_caller]
    pub fn run(&self, script: &str) -> String {
        sh(&format!("export SOFTHSM2_CONF={}; {{ {script} ; }} 2>&1", self.config().display()))
    }
}
