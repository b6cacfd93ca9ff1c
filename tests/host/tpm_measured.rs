//! What firmware and GRUB have measured, and say so in the event log: explained.

use std::fs;

use cryptattach::keys::tpm::Finding;
use openssl::sha::sha256;

use crate::tpm::{Host, P256};

const IPL: u32 = 0xD;

/// A boot by GRUB, in a host's folder: its kernel and initramfs are files there.
struct Boot {
    log: Vec<u8>,
}

impl Boot {
    /// Measures and logs, as GRUB does.
    fn of(host: &Host, command: &str) -> Self {
        // The log's head: TCG_EfiSpecIDEvent, with SHA-256 only.
        let mut spec = b"Spec ID Event03\0".to_vec();
        spec.extend([0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 11, 0, 32, 0, 0]);
        let mut log = [0, 3].map(u32::to_le_bytes).concat();
        log.extend([0; 20]);
        log.extend((spec.len() as u32).to_le_bytes());
        log.extend(spec);
        let mut boot = Self { log };
        boot.measure(host, 8, &format!("grub_cmd: {command}"), command.as_bytes());
        for file in ["vmlinuz", "initrd.img"] {
            let path = host.path(file);
            boot.measure(host, 9, &path.display().to_string(), &fs::read(&path).unwrap());
        }
        fs::write(host.path("log"), &boot.log).unwrap();
        boot
    }

    fn measure(&mut self, host: &Host, pcr: u32, description: &str, content: &[u8]) {
        let digest = sha256(content);
        let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        host.swtpm.tool(&["tpm2_pcrextend", &format!("{pcr}:sha256={digits}")]);
        self.log.extend([pcr, IPL, 1].map(u32::to_le_bytes).concat());
        self.log.extend([11, 0]);
        self.log.extend(digest);
        self.log.extend((description.len() as u32).to_le_bytes());
        self.log.extend(description.as_bytes());
    }
}

fn installed() -> Host {
    let host = Host::new();
    host.configure();
    fs::write(host.path("vmlinuz"), "kernel").unwrap();
    fs::write(host.path("initrd.img"), "initramfs").unwrap();
    host
}

#[test]
fn an_explanation_names_what_was_measured_last() {
    let mut host = installed();
    Boot::of(&host, "linux /vmlinuz root=/dev/sda1");
    let sealed = host.enrol(&host.literal("8+9"), None);
    host.reboot();
    Boot::of(&host, "linux /vmlinuz root=/dev/sda1 init=/bin/sh");
    let findings = host.refusal(&sealed);
    let [Finding::Pcr { pcr: 8, events, .. }] = findings.as_slice() else { panic!("{findings:?}") };
    assert!(events[0].description.ends_with("init=/bin/sh"));
    let told = host.fails(&["policy", "test"]);
    assert!(told.contains("PCR 8 is") && told.contains("init=/bin/sh"), "{told}");
    let shown = host.ok(&["policy", "show"]);
    assert!(shown.contains("GRUB") && shown.contains("it does not open"), "{shown}");
}

/// Whoever attacks chooses among the signatures: the weakest counts.
#[test]
fn what_goes_unnoticed_is_told_by_the_weakest_signature() {
    let host = installed();
    Boot::of(&host, "linux /vmlinuz");
    let policy = host.revocable(P256);
    host.enrol(&policy, None);
    let shown = |signed: &str| {
        fs::write(host.path("signatures.json"), signed).unwrap();
        host.ok(&["policy", "show"])
    };
    let sign = ["policy", "sign", "--private-key", "site.key", "--current"];
    let strong = host.ok(&[&sign[..], &["4+7+8+9"]].concat());
    let told = shown(&strong);
    assert!(told.contains("PCR 4+7+8+9 as signed") && told.contains("it opens"), "{told}");
    assert!(!told.contains("init=/bin/sh"), "{told}");
    let weak = host.ok(&[&sign[..], &["7", "--append-to", "signatures.json"]].concat());
    let told = shown(&weak);
    assert!(told.contains("PCR 7 or PCR 4+7+8+9 as signed"), "{told}");
    assert!(told.contains("init=/bin/sh") && told.contains("the kernel and the initramfs"), "{told}");
}
