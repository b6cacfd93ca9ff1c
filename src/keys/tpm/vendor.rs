//! Who made the TPM: a chip of this machine, or a program of the host that this machine is a guest of.

use std::fmt;

use tss_esapi::constants::tss;

use super::{Tpm, TpmError};
use crate::base::key::Location;

/// Those whose TPMs are programs: libtpms, Hyper-V and Azure, Google, Amazon, VMware (TCG Vendor ID Registry). Their state is a
/// file, and nothing here tells where that rests. Microsoft's Pluton has the name of the second, too: it cannot be told apart.
const VIRTUAL: [&str; 5] = ["IBM", "MSFT", "GOOG", "AMZN", "VMW"];

/// The maker's name in the TCG's registry: up to four characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vendor(String);

impl Vendor {
    /// The vendor of this number (TPM_PT_MANUFACTURER): four characters, filled up with blanks or zeros.
    fn of(property: u32) -> Self {
        let letter = |byte: u8| if byte.is_ascii_graphic() { char::from(byte) } else { ' ' };
        let text: String = property.to_be_bytes().map(letter).iter().collect();
        Self(text.trim().to_owned())
    }

    /// Whether its TPMs are programs.
    fn is_virtual(&self) -> bool {
        VIRTUAL.contains(&&*self.0)
    }

    /// Where what is in such a TPM rests: in a chip, if it is one.
    pub fn location(&self) -> Location {
        let name = format!("the TPM ({self})");
        if !self.is_virtual() {
            return Location::Chip { name };
        }
        let why = format!("a TPM of {self} is a virtual one; its memory is a file of whoever runs this machine");
        Location::Elsewhere { name, why }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Tpm {
    /// Who made it.
    pub fn vendor(&self) -> Result<Vendor, TpmError> {
        Ok(Vendor::of(self.esys().property(tss::TPM2_PT_MANUFACTURER)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_no_chip() {
        let of = |name: &[u8; 4]| Vendor::of(u32::from_be_bytes(*name));
        for name in [b"IBM ", b"IBM\0", b"MSFT", b"GOOG", b"AMZN", b"VMW "] {
            assert!(matches!(of(name).location(), Location::Elsewhere { .. }), "{}", of(name));
        }
        for name in [b"IFX\0", b"INTC", b"AMD\0", b"NTC\0", b"STM ", b"QCOM"] {
            assert!(matches!(of(name).location(), Location::Chip { .. }), "{}", of(name));
        }
        assert_eq!(of(b"I\x1b[m").to_string(), "I [m");
    }
}
