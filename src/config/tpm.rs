//! `[tpm]`

use std::{env, fmt, path::PathBuf};

use serde::{Deserialize, Deserializer, de};

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
    pub latch: Latch,
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

/// `latch`: what becomes of PCR 15 once this host has its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Latch {
    /// `false`: nothing.
    Off,
    /// `true`: it is extended. Where the TPM does not prove that, the lockbox is closed.
    On,
    /// `"required"`: the same, and a boot does not go on without that proof.
    Required,
}

impl Latch {
    /// Whether PCR 15 is extended at all.
    pub fn is_wanted(self) -> bool {
        self != Self::Off
    }
}

impl<'de> Deserialize<'de> for Latch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Words;
        impl de::Visitor<'_> for Words {
            type Value = Latch;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false or \"required\"")
            }

            fn visit_bool<E: de::Error>(self, is_on: bool) -> Result<Latch, E> {
                Ok(if is_on { Latch::On } else { Latch::Off })
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Latch, E> {
                if word == "required" {
                    Ok(Latch::Required)
                } else {
                    Err(E::invalid_value(de::Unexpected::Str(word), &self))
                }
            }
        }
        deserializer.deserialize_any(Words)
    }
}

impl Default for TpmConfig {
    fn default() -> Self {
        Self {
            tcti: "device:/dev/tpmrm0".to_owned(),
            identity: "/etc/cryptattach/host.tpm.pem".into(),
            site_key: None,
            pcrs: None,
            latch: Latch::On,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latch_is_on_off_or_required() {
        let latch = |text: &str| toml::from_str::<TpmConfig>(text).map(|config| config.latch);
        assert_eq!(latch("").unwrap(), Latch::On);
        assert_eq!(latch("latch = true").unwrap(), Latch::On);
        assert_eq!(latch("latch = false").unwrap(), Latch::Off);
        assert_eq!(latch("latch = \"required\"").unwrap(), Latch::Required);
        let refused = latch("latch = \"always\"").unwrap_err().to_string();
        assert!(refused.contains("expected true, false or \"required\""), "{refused}");
    }
}
