//! `[tpm]`

use std::{env, path::PathBuf};

use serde::Deserialize;

use super::ConfigPath;
use crate::base::pcr_set::PcrSet;

/// Overrides `tcti`, for an initramfs and for tests.
const TCTI_VARIABLE: &str = "CRYPTATTACH_TCTI";

/// `[tpm]`: where the TPM is, and what is needed to use it.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TpmConfig {
    /// How to reach it (libtss2's name and configuration of a TCTI).
    pub tcti: String,
    /// The file of this host's identity key.
    pub identity: ConfigPath,
    /// The public key or certificate (PEM) whose signatures over boot states this host follows.
    pub site_key: Option<ConfigPath>,
    /// PCRs that are bound to their present values when a key is made, in place of what fits the boot chain.
    pub pcrs: Option<PcrSet>,
    /// Whether PCR 15 must not have been extended, and is extended once this host has its keys.
    pub latch: bool,
    /// Files of signatures over boot states (`tpm2-pcr-signature.json`); those that exist are read.
    pub signatures: Vec<ConfigPath>,
    /// File with the PIN of this host's key, or `credential:NAME`.
    pub pin: Option<ConfigPath>,
    /// Seconds that one command may take. Making an RSA key takes old chips a minute.
    pub command_seconds: f64,
    /// What firmware and boot loader say they have measured.
    pub event_log: ConfigPath,
    /// NV index of the counter that retires old signatures.
    pub counter: u32,
}

impl Default for TpmConfig {
    fn default() -> Self {
        Self {
            tcti: "device:/dev/tpmrm0".to_owned(),
            identity: "/etc/cryptattach/host.tpm.pem".into(),
            site_key: None,
            pcrs: None,
            latch: true,
            // Ours, and the places where systemd-stub, systemd and distributions leave them.
            signatures: [
                "/etc/cryptattach/tpm2-pcr-signature.json",
                "/etc/systemd/tpm2-pcr-signature.json",
                "/run/systemd/tpm2-pcr-signature.json",
                "/.extra/tpm2-pcr-signature.json",
                "/usr/lib/systemd/tpm2-pcr-signature.json",
            ]
            .map(ConfigPath::from)
            .into(),
            pin: None,
            command_seconds: 120.0,
            event_log: "/sys/kernel/security/tpm0/binary_bios_measurements".into(),
            // In the owner's range (TCG Registry of Reserved TPM 2.0 Handles and Localities, section 2.2).
            counter: 0x0180_CA77,
        }
    }
}

impl TpmConfig {
    /// The TCTI to use.
    pub fn tcti(&self) -> String {
        env::var(TCTI_VARIABLE).ok().filter(|name| !name.is_empty()).unwrap_or_else(|| self.tcti.clone())
    }

    /// The device of a TPM that is one of this machine.
    pub fn device(&self) -> Option<PathBuf> {
        self.tcti().strip_prefix("device:").map(PathBuf::from)
    }
}
