//! Tokens of SoftHSM, in a folder of one's own; and the program that asks them.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

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
        let softhsm = Self { folder };
        let config = format!("directories.tokendir = {}\nobjectstore.backend = file\n", softhsm.tokens().display());
        std::fs::write(softhsm.config(), config).unwrap();
        softhsm
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

/// Builds the program beside the tested one.
pub fn build_program() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let is_release = Path::new(env!("CARGO_BIN_EXE_cryptattach")).parent().unwrap().ends_with("release");
        let profile = if is_release { "release" } else { "dev" };
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--locked", "--package", "cryptattach-pkcs11", "--profile", profile]);
        assert!(cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().unwrap().success());
    });
}
