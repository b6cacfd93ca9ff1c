//! Measured boot: firmware (OVMF) starts a unified kernel image, and all on the way measure into a TPM on the board (swtpm).

use std::{fs, path::Path, process::Child};

use tempfile::TempDir;

use crate::{
    machine::{COMMAND_LINE, Init, Machine, image},
    manufacture::manufacture,
    qemu,
    shell::sh,
    tpm_process,
};

const FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const FIRMWARE_VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// A disk with the guest's kernel, command line and initramfs in one file that systemd-stub measures into PCR 11.
pub struct UnifiedKernelImage {
    folder: TempDir,
}

impl UnifiedKernelImage {
    /// With these words at the end of the command line, and this file more in the initramfs.
    pub fn new(words: &str, implant: Option<&str>) -> Self {
        let folder = tempfile::Builder::new().prefix("cryptattach-vm").tempdir_in("/var/tmp").unwrap();
        let (at, image) = (folder.path().display(), image(None));
        fs::write(folder.path().join("cmdline"), format!("{COMMAND_LINE} {words}").trim_end()).unwrap();
        sh(&format!("cp {}/initrd {at}/initrd", image.display()));
        if let Some(name) = implant {
            sh(&format!(
                "mkdir {at}/implant && echo harmless >{at}/implant/{name} && cd {at}/implant && \
                 echo {name} | cpio --quiet -o -H newc >>{at}/initrd"
            ));
        }
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vm/make-uki");
        sh(&format!("{script} {}/kernel {at}/initrd {at}", image.display()));
        Self { folder }
    }

    /// What systemd-measure says that PCR 11 will be.
    pub fn measured(&self) -> Vec<u8> {
        fs::read(self.folder.path().join("measured.json")).unwrap()
    }

    /// Boots it on a board with this TPM.
    pub fn boot(&self, chip: &mut Chip) -> Machine {
        let file = |name: &str| self.folder.path().join(name).into_os_string().into_string().unwrap();
        fs::copy(FIRMWARE_VARIABLES, file("variables")).expect("OVMF is missing: scripts/prerequisites vm");
        let chip = chip.power_on();
        let mut options = vec![
            "-drive".to_owned(),
            format!("if=pflash,format=raw,readonly=on,file={FIRMWARE}"),
            "-drive".to_owned(),
            format!("if=pflash,format=raw,file={}", file("variables")),
            "-drive".to_owned(),
            format!("if=none,id=esp,format=raw,readonly=on,file={}", file("esp.img")),
            "-device".to_owned(),
            "virtio-blk-pci,drive=esp,serial=esp,bootindex=1".to_owned(),
        ];
        options.extend(chip);
        Machine::start(Init::Plain, &image(None), &options.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

/// A TPM on a board. What it remembers outlives the machine's power; the PCRs do not.
pub struct Chip {
    folder: TempDir,
    swtpm: Option<Child>,
}

impl Chip {
    /// A new one, whose endorsement key an authority has certified.
    pub fn new(authority: &Path) -> Self {
        let folder = tempfile::Builder::new().prefix("swtpm").tempdir_in("/tmp").unwrap();
        manufacture(folder.path(), authority);
        Self { folder, swtpm: None }
    }

    /// What has QEMU put it on the board; QEMU switches it off with the machine.
    pub fn power_on(&mut self) -> [String; 6] {
        self.power_off();
        let socket = self.folder.path().join("socket");
        let control = format!("type=unixio,path={}", socket.display());
        self.swtpm = Some(tpm_process::start(self.folder.path(), &socket, &["--ctrl", &control]));
        qemu::tpm(&socket)
    }

    fn power_off(&mut self) {
        if let Some(mut swtpm) = self.swtpm.take() {
            let _ = swtpm.kill();
            let _ = swtpm.wait();
        }
    }
}

impl Drop for Chip {
    fn drop(&mut self) {
        self.power_off();
    }
}
