//! What somebody gets who takes something away, or comes with something: said once a volume is bound.

use serde::Serialize;

use super::machine::{TpmFound, TpmKey};
use crate::keys::tpm::BootChain;

/// What somebody gets who takes something away, or comes with something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Thieves {
    pub disk: String,
    pub machine: String,
    pub stick: String,
}

/// What opens a store: its place in words; the key in the TPM, if that does; whether servers are needed, too.
pub fn thieves(
    place: &str,
    is_in_tpm: bool,
    key: Option<TpmKey>,
    tpm: Option<TpmFound>,
    needs_servers: bool,
) -> Thieves {
    let disk = match is_in_tpm {
        true => "nothing: the sealed key is in this machine's TPM".to_owned(),
        false => format!("nothing, as long as the thief has not {place} as well"),
    };
    let Some(key) = key else {
        let machine = format!("nothing, unless {place} and what opens it come along");
        return Thieves { disk, stick: machine.clone(), machine };
    };
    let chain = tpm.map_or(BootChain::Unmeasured, |tpm| tpm.chain);
    let secure_boot = tpm.and_then(|tpm| tpm.secure_boot);
    let within = if needs_servers { ", in a network where its servers answer" } else { "" };
    let own = match key.has_pin {
        true => "nothing without the PIN".to_owned(),
        false => format!("what its own boot opens{within}: a login prompt"),
    };
    let stick = match () {
        () if key.has_pin => "nothing without the PIN".to_owned(),
        () if key.covers_image() => "nothing: another system, or a changed initramfs, measures other values".to_owned(),
        () if secure_boot == Some(true) && chain == BootChain::UnifiedKernelImage => {
            format!(
                "EVERYTHING{within}, if Secure Boot starts their system: the kernel's image is not among PCR {}",
                key.pcrs
            )
        }
        () => format!(
            "EVERYTHING{within}: whoever changes the initramfs, which is not measured into PCR {}; a PIN or signed unified kernel \
             images prevent it (docs/tpm.md)",
            key.pcrs
        ),
    };
    Thieves { disk, machine: own, stick }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::pcr_set::PcrSet;

    const GRUB: TpmFound = TpmFound { chain: BootChain::Grub, secure_boot: Some(true), configured: false };

    #[test]
    fn what_a_thief_gets_is_said_as_it_is() {
        let key = |pcrs: &[u8]| TpmKey { pcrs: PcrSet::of(pcrs), is_signed: false, has_pin: false };
        let told = |key, found, servers| thieves("the TPM", true, Some(key), Some(found), servers);
        assert!(told(key(&[7]), GRUB, false).stick.starts_with("EVERYTHING: "));
        assert!(told(key(&[7]), GRUB, true).machine.contains("network"));
        assert!(told(key(&[4, 7, 8, 9]), GRUB, false).stick.starts_with("nothing"));
        assert!(told(TpmKey { has_pin: true, ..key(&[7]) }, GRUB, false).stick.contains("PIN"));
        let unified = TpmFound { chain: BootChain::UnifiedKernelImage, ..GRUB };
        assert!(told(key(&[7, 12, 13]), unified, false).stick.contains("if Secure Boot starts"));
        assert!(told(key(&[7, 11]), unified, false).stick.starts_with("nothing"));
        let stick = thieves("the directory /mnt/keys", false, None, None, false);
        assert!(stick.disk.contains("/mnt/keys") && stick.machine.contains("come along"));
    }
}
