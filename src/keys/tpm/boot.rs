//! What booted this machine, as far as the PCRs show it, and which PCRs that makes worth binding to.
//!
//! Who measures what: TCG PC Client Platform Firmware Profile section 3.3.4 (PCRs 0 to 7), GRUB's manual "Measured Boot" (8
//! and 9), systemd's "Linux TPM PCR Registry" (11 to 15).

use std::fmt;

use serde::Serialize;

use super::{
    EPOCHS, IdentityFile, PcrValues, Policy, Revocation, SignedPcrs, SiteKey, Tpm, TpmError, counter::Counter,
};
use crate::{base::pcr_set::PcrSet, config::TpmConfig};

/// The PCRs that are looked at: those of the static root of trust.
const BOOT_PCRS: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Where systemd-stub measures what lies beside a unified kernel image: credentials, which need no signature and may open a
/// shell, and additions to the command line (12), system extensions (13). Without those they are zero, for every image.
const BESIDE_THE_IMAGE: [u8; 2] = [12, 13];

/// What booted this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootChain {
    /// systemd-stub, which measures a unified kernel image into PCR 11.
    UnifiedKernelImage,
    /// GRUB, which measures its commands into PCR 8 and the files that it reads into PCR 9.
    Grub,
    /// A kernel that the firmware started itself: an EFI application in PCR 4.
    Firmware,
    /// The firmware has measured nothing.
    Unmeasured,
}

impl fmt::Display for BootChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UnifiedKernelImage => "a unified kernel image, measured by systemd-stub into PCR 11",
            Self::Grub => "GRUB, which measures its commands into PCR 8 and what it reads into PCR 9",
            Self::Firmware => "a kernel that the firmware started and measured into PCR 4",
            Self::Unmeasured => "nothing that was measured: the PCRs are as after power-on",
        })
    }
}

impl BootChain {
    fn of(values: &PcrValues) -> Self {
        let measured = |pcr| values.get(pcr).is_some_and(|value| *value != [0; 32]);
        match () {
            () if measured(11) => Self::UnifiedKernelImage,
            () if measured(8) => Self::Grub,
            () if measured(4) => Self::Firmware,
            () => Self::Unmeasured,
        }
    }

    /// The PCRs that say together what booted.
    pub fn worth_binding(self) -> PcrSet {
        match self {
            Self::UnifiedKernelImage => PcrSet::of(&[7, 11]).with(PcrSet::of(&BESIDE_THE_IMAGE)),
            _ => PcrSet::of(&[4, 7, 8, 9]),
        }
    }
}

/// Something that can be changed without the policy noticing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Exposure(&'static str);

impl fmt::Display for Exposure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// What an attacker with physical access could still change or use if a policy binds these PCRs.
pub fn exposures(bound: PcrSet, chain: BootChain, secure_boot: Option<bool>, latch: bool) -> Vec<Exposure> {
    let free = |pcr: u8| !bound.contains(pcr);
    let kernel_free = free(11) && free(9) && free(4);
    let cases = [
        (free(0), "the firmware's code: another version or a manipulated flash chip (PCR 0 is not bound)"),
        (free(1), "the firmware's settings and the order of boot devices (PCR 1 is not bound)"),
        (free(2), "code on added cards: option ROMs (PCR 2 is not bound)"),
        (free(7), "Secure Boot: turn it off, or enrol other keys (PCR 7 is not bound)"),
        (
            !free(7) && secure_boot == Some(false),
            "Secure Boot is off: PCR 7 says no more than that, and any boot loader runs",
        ),
        (
            free(4) && free(11) && secure_boot != Some(false),
            "the boot loader, by any other that the Secure Boot keys accept (PCR 4 is not bound)",
        ),
        (kernel_free, "the kernel and the initramfs (none of the PCRs 4, 9 and 11 is bound)"),
        (
            chain != BootChain::UnifiedKernelImage && free(9) && !free(4),
            "the initramfs, which the EFI application in PCR 4 does not contain (PCR 9 is not bound)",
        ),
        (
            chain == BootChain::Grub && free(8),
            "the kernel's command line, typed at GRUB's menu: init=/bin/sh (PCR 8 is not bound)",
        ),
        (
            chain == BootChain::UnifiedKernelImage && free(12),
            "credentials beside the unified kernel image, which may open a shell, and additions to its command line \
             (PCR 12 is not bound)",
        ),
        (
            chain == BootChain::UnifiedKernelImage && free(13),
            "system extensions beside the unified kernel image (PCR 13 is not bound)",
        ),
        (!latch, "the key itself, later in this boot: whoever becomes root can use it again (no latch)"),
        (
            true,
            "the wires of a separate TPM chip: reset it, replay the measurements of a good boot, and ask it (a \
             firmware TPM has no such wires; a PIN prevents this)",
        ),
    ];
    cases.into_iter().filter_map(|(holds, words)| holds.then_some(Exposure(words))).collect()
}

impl Tpm {
    /// The PCRs of the boot, as far as the bank has them.
    pub fn boot_values(&self) -> Result<PcrValues, TpmError> {
        self.esys().pcr_read(PcrSet::of(&BOOT_PCRS), None)
    }

    /// What booted this machine.
    pub fn boot_chain(&self) -> Result<BootChain, TpmError> {
        Ok(BootChain::of(&self.boot_values()?))
    }

    /// The policy for a key of this host, by the configuration and by what booted it.
    ///
    /// With a site's key: the PCRs that are signed, with a counter that retires signatures, and PCRs 7, 12 and 13 as they are
    /// now where a unified kernel image boots (those are the machine's own, a signature of PCR 11 goes with the image).
    /// Without: the PCRs worth binding, as they are now. The configuration's `pcrs` takes precedence. The counter is made if it is not there.
    pub fn policy_here(&self, config: &TpmConfig, pin: bool) -> Result<Policy, TpmError> {
        if config.site_key.is_some() {
            self.counter_or_new(Counter::at(config.counter))?;
        }
        self.policy_preview(config, pin)
    }

    /// The same, for looking at: nothing is made.
    pub fn policy_preview(&self, config: &TpmConfig, pin: bool) -> Result<Policy, TpmError> {
        let chain = self.boot_chain()?;
        let signed = match &config.site_key {
            None => None,
            Some(path) => {
                let (key, counter) = (SiteKey::read(path)?, Counter::at(config.counter));
                let value = self.counter_if_there(counter)?.map_or(0, |value| value.0);
                let base = base(config, &key, counter, value);
                Some(SignedPcrs { key, revocation: Some(Revocation { counter, base }) })
            }
        };
        let literal = match (config.pcrs, &signed) {
            (Some(pcrs), _) => pcrs,
            (None, Some(_)) if chain == BootChain::UnifiedKernelImage => {
                PcrSet::of(&[7]).with(PcrSet::of(&BESIDE_THE_IMAGE))
            }
            (None, Some(_)) => PcrSet::default(),
            (None, None) => chain.worth_binding(),
        };
        let pcrs = if literal.is_empty() { PcrValues::default() } else { self.pcr_values(literal)? };
        if signed.is_none() && pcrs.iter().all(|(_, value)| *value == [0; 32]) {
            tracing::warn!("all of PCR {literal} are zero: nothing was measured, and any boot state opens the key");
        }
        let policy = Policy { signed, pcrs, latch: config.latch.is_wanted(), pin };
        policy.check()?;
        Ok(policy)
    }
}

/// What the epochs of a new key are counted from. A key that follows the same site's key as the one before goes on with that
/// one's: what was retired must not come back with it.
fn base(config: &TpmConfig, key: &SiteKey, counter: Counter, value: u64) -> u64 {
    let before = IdentityFile::read(&config.identity).ok().and_then(|file| file.policy.signed);
    let before = before.filter(|signed| signed.key == *key).and_then(|signed| signed.revocation);
    match before.filter(|revocation| revocation.counter == counter && revocation.base <= value) {
        None => value,
        Some(Revocation { base, .. }) if value - base < EPOCHS => base,
        Some(_) => {
            tracing::warn!(
                "all epochs of the site's key {key} are used up and start again: retired signatures are valid again"
            );
            value
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn booted(pcrs: &[u8]) -> BootChain {
        BootChain::of(&pcrs.iter().map(|pcr| (*pcr, [1; 32])).chain([(0, [0; 32])]).collect())
    }

    #[test]
    fn tells_what_booted() {
        assert_eq!(booted(&[4, 7, 11]), BootChain::UnifiedKernelImage);
        assert_eq!(booted(&[4, 7, 8, 9]), BootChain::Grub);
        assert_eq!(booted(&[4, 7, 9]), BootChain::Firmware);
        assert_eq!(booted(&[]), BootChain::Unmeasured);
    }

    #[test]
    fn says_what_is_left_open() {
        let has = |bound: &[u8], chain, secure_boot, word: &str| {
            exposures(PcrSet::of(bound), chain, secure_boot, true).iter().any(|exposure| exposure.0.contains(word))
        };
        assert!(has(&[7], BootChain::Grub, Some(true), "kernel and the initramfs"));
        assert!(has(&[4, 7, 9], BootChain::Grub, Some(true), "init=/bin/sh"));
        assert!(!has(&[4, 7, 8, 9], BootChain::Grub, Some(true), "init=/bin/sh"));
        assert!(has(&[4, 7], BootChain::Firmware, Some(true), "the initramfs, which"));
        assert!(has(&[7, 11], BootChain::UnifiedKernelImage, Some(false), "Secure Boot is off"));
        assert!(!has(&[7, 11], BootChain::UnifiedKernelImage, Some(true), "Secure Boot is off"));
        let beside = |bound: PcrSet| {
            let unnoticed = exposures(bound, BootChain::UnifiedKernelImage, Some(true), true);
            unnoticed.iter().filter(|exposure| exposure.0.contains("beside")).count()
        };
        assert_eq!(beside(PcrSet::of(&[7, 11])), 2);
        assert_eq!(beside(BootChain::UnifiedKernelImage.worth_binding()), 0);
        assert!(has(&[0, 1, 2, 4, 7, 8, 9, 11, 12, 13], BootChain::Grub, Some(true), "wires"));
    }
}
