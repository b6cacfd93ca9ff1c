//! Exit codes. The numbers follow sysexits(3) where it has a meaning for them.

use std::process::ExitCode;

/// The codes, with the meaning that `--help` and docs/exit-codes.md show.
macro_rules! exits {
    ($($name:ident = $code:literal, $meaning:literal;)*) => {
        /// Why the program ends without success.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Exit {
            $(#[doc = $meaning] $name = $code,)*
        }

        impl Exit {
            /// All of them, by number.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// In one line.
            pub fn meaning(self) -> &'static str {
                match self {
                    $(Self::$name => $meaning,)*
                }
            }
        }
    };
}

exits! {
    Usage = 64, "the command line is wrong";
    Header = 65, "the volume's header is damaged, has a value that is not allowed, or does not fit the key";
    Missing = 66, "the device, file or mapping does not exist";
    NoKey = 67, "the store does not have the key";
    KeyRefused = 68, "the sealed key does not open here, or belongs to something else";
    StoreUnavailable = 69, "the key store cannot be reached or read, or cannot do this now";
    Internal = 70, "an error in cryptattach itself";
    System = 71, "the system refuses: no device-mapper, no FUSE, no locked memory, a worker that died";
    NotSeparate = 72, "key and data are on the same device or host, or (strict) nothing proves that they are not";
    InTheWay = 73, "something is in the way: a device that is not blank, a name that is taken, a file that exists";
    Io = 74, "reading or writing a device failed";
    Busy = 75, "the device or mapping is in use";
    NoSealedKey = 76, "the store's answer is not a sealed key, or the file is not a backup";
    PermissionDenied = 77, "permission denied, here or by the key store";
    Config = 78, "the configuration is missing or wrong, or an initramfs does not fit it";
    Tpm = 79, "the TPM does not open the key: another boot state, another TPM, a wrong PIN, or no TPM at all";
    ProofRefused = 80, "a host's proof is refused: a request or answer that is wrong, changed, used already, too old or for another host";
    BootUnfinished = 81, "boot: not all volumes could be attached in time";
    BootUnlatched = 82, "boot: the TPM does not prove that PCR 15 is extended, and latch = \"required\"";
    Paused = 83, "encrypt, key rotate, key move: paused, or volumes of the container are left; the same command goes on";
    AuditBroken = 84, "audit: the audit record was cut or changed, or does not fit an anchor";
    ReceiptRefused = 85, "receipt verify: it is no receipt, or was changed, or is signed by another key";
    DependencyLoop = 86, "a store needs itself: its disk is opened by a key that is in the store, or in one that needs it";
}

/// What the exit code 0 means.
pub const DONE: &str = "done (also: it was done already)";

/// Each exit code with its meaning, 0 among them.
pub fn table() -> impl Iterator<Item = (u8, &'static str)> {
    let failures = Exit::ALL.iter().map(|exit| (u8::from(*exit), exit.meaning()));
    std::iter::once((0, DONE)).chain(failures)
}

impl From<Exit> for u8 {
    fn from(exit: Exit) -> Self {
        exit as Self
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_has_this_table() {
        let page = include_str!("../../docs/exit-codes.md");
        let (_, rest) = page.split_once("<!-- exit codes: begin -->\n").unwrap();
        let (written, _) = rest.split_once("<!-- exit codes: end -->").unwrap();
        let rows: String = table().map(|(code, meaning)| format!("| {code} | {meaning} |\n")).collect();
        assert_eq!(written, format!("| code | meaning |\n|---:|---|\n{rows}"));
    }

    #[test]
    fn each_code_is_there_once() {
        let codes: Vec<u8> = table().map(|(code, _)| code).collect();
        assert!(codes.is_sorted_by(|one, next| one < next), "{codes:?}");
    }
}
