//! A host whose identity is in a TPM that firmware and kernel measure into, across boots: libtss2 talks to `/dev/tpmrm0`, the
//! event log is the kernel's.

use std::{fs, fs::File, path::PathBuf};

use tempfile::TempDir;

use crate::{
    machine::{DiskOptions, Machine},
    measured::{Chip, UnifiedKernelImage},
};

pub const STORIES: &[(&str, fn())] = &[
    ("a host proves itself by its TPM, and opens its lockbox once per boot, in no other TPM", once_per_boot),
    (
        "another command line or initramfs opens when the site has signed it, without a new enrolment",
        signed_boot_states,
    ),
];

const VOLUME: &str = "/dev/disk/by-id/virtio-d2";

/// A server's two disks: one with configuration, keys and store, which stands for all that is elsewhere, and the volume.
struct Server {
    folder: TempDir,
    chip: Chip,
}

impl Server {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("cryptattach-vm").tempdir_in("/var/tmp").unwrap();
        for disk in ["keys", "volume"] {
            File::create(folder.path().join(disk)).unwrap().set_len(64 << 20).unwrap();
        }
        fs::create_dir(folder.path().join("authority")).unwrap();
        let chip = Chip::new(&folder.path().join("authority"));
        Self { folder, chip }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Boots, with the disks plugged in.
    fn boot(&mut self, kernel: &UnifiedKernelImage) -> Machine {
        let mut machine = kernel.boot(&mut self.chip);
        for disk in ["keys", "volume"] {
            machine.plug_file(&self.file(disk), DiskOptions::default());
        }
        machine.ok(
            "test -c /dev/tpmrm0 || exit 1; mkdir -p /etc/cryptattach && ln -s /keys/host.toml /etc/cryptattach/cryptattach.toml &&
             { mount /dev/disk/by-id/virtio-d1 /keys || { mkfs.ext4 -q /dev/disk/by-id/virtio-d1 && mount /dev/disk/by-id/virtio-d1 /keys; }; } 2>/dev/null",
        );
        machine
    }

    /// An administrator with a store, and a host that follows the PCRs `tpm` says, in one machine under two configurations. The
    /// host is admitted, and there is a volume with something on it.
    fn enrol(&self, machine: &mut Machine, tpm: &str) {
        machine.ok("mkdir /keys/authority");
        for certificate in ["issuercert.pem", "swtpm-localca-rootca-cert.pem"] {
            let content = fs::read(self.file("authority").join(certificate)).unwrap();
            machine.put(&format!("/keys/authority/{certificate}"), &content);
        }
        let site = format!("state = '/keys/site-state'\n[audit]\nfile = '/keys/audit'\n[tpm]\n{tpm}");
        let host = format!(
            "state = '/keys/state'\n[audit]\nfile = '/keys/host.audit'\n[stores.cinder]\ntype = 'directory'\npath = '/keys/cinder'\n\
             owner = '/keys/cinder.owner.pem'\nescrow = '/keys/cinder.escrow.pem'\n\
             [lockbox]\nhost = 'compute-7'\nstore = 'cinder'\nidentities = ['tpm:/keys/host.tpm.pem']\npath = '/run/cryptattach/lockbox'\n\
             [tpm]\nidentity = '/keys/host.tpm.pem'\nsignatures = ['/keys/tpm2-pcr-signature.json']\n{tpm}"
        );
        machine.put("/keys/site.toml", site.as_bytes());
        machine.put("/keys/host.toml", host.as_bytes());
        machine.ok(
            "cd /keys && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out escrow.key 2>/dev/null &&
             openssl pkey -in escrow.key -pubout -out escrow.pem &&
             cryptattach init --config site.toml --store cinder --path cinder --escrow escrow.pem &&
             cryptattach --config site.toml container create cinder",
        );
        let shown: serde_json::Value = serde_json::from_str(&machine.ok("cryptattach policy show --json")).unwrap();
        machine.put("/keys/pcrs.json", shown["pcrs"].to_string().as_bytes());
        println!("{}", machine.ok("cd /keys && cryptattach host join --output request && cryptattach policy show"));
        println!(
            "{}",
            machine.ok(
                "cd /keys && cryptattach --config site.toml host admit request --ca authority --pcr-values pcrs.json --output answer &&
                 cryptattach host join answer"
            )
        );
        machine.ok(&format!(
            "cd /keys && cryptattach --config site.toml format {VOLUME} && cryptattach --config site.toml attach {VOLUME} data &&
             mkfs.ext4 -q /dev/mapper/data && mount /dev/mapper/data /mnt && seq 1 100000 >/mnt/numbers && umount /mnt &&
             cryptattach --config site.toml detach data"
        ));
        // The owner's key is the administrator's.
        machine.ok("mkdir /keys/administrator && mv /keys/cinder.owner.key /keys/escrow.key /keys/administrator");
    }
}

fn power_off(mut machine: Machine) {
    machine.ok("umount /keys && sync");
    machine.power_off();
}

/// The volume, on dm-crypt, has what was written on it.
fn attaches(machine: &mut Machine) {
    machine.ok(&format!("cryptattach attach {VOLUME} data && mount -o ro /dev/mapper/data /mnt"));
    machine.ok("dmsetup table data | grep -q crypt && seq 1 100000 | cmp - /mnt/numbers && umount /mnt");
    machine.ok("cryptattach detach data");
}

/// Refuses to open with the TPM's exit code; what it says, which is printed.
#[track_caller]
fn refused(machine: &mut Machine, command: &str) -> String {
    let said = machine.fails(79, command);
    println!("# {command}\n{said}");
    said
}

fn once_per_boot() {
    let (mut server, kernel) = (Server::new(), UnifiedKernelImage::new("", None));
    let mut machine = server.boot(&kernel);
    server.enrol(&mut machine, "");
    power_off(machine);

    let mut machine = server.boot(&kernel);
    println!("{}", machine.ok("cryptattach policy test && cryptattach lockbox open"));
    attaches(&mut machine);
    assert!(machine.ok("cryptattach lockbox open").contains("is open already"));
    // Its key is gone, and this boot's TPM does not give it again.
    machine.ok("cryptattach lockbox close");
    for command in ["cryptattach lockbox open", "cryptattach policy test"] {
        let said = refused(&mut machine, command);
        assert!(said.contains("PCR 15 has been extended") && said.contains("power the machine off and on"), "{said}");
    }
    machine.fails(68, &format!("cryptattach attach {VOLUME} data"));
    power_off(machine);

    // The disks in a server of the same kind.
    server.chip = Chip::new(&server.file("authority"));
    let mut thief = server.boot(&kernel);
    for command in ["cryptattach lockbox open", "cryptattach policy test"] {
        assert!(refused(&mut thief, command).contains("did not make the key"));
    }
    println!("{}", thief.fails(68, &format!("cryptattach attach {VOLUME} data")));
    // Nor if it has a storage root key of its own.
    thief.ok("cryptattach --config /keys/site.toml host join --name thief --output /tmp/thief.request");
    assert!(refused(&mut thief, "cryptattach lockbox open").contains("did not make the key"));
    thief.ok("test ! -e /dev/mapper/data && umount /keys");
}

fn signed_boot_states() {
    let (mut server, kernel) = (Server::new(), UnifiedKernelImage::new("", None));
    let (other_line, other_initramfs) = (
        UnifiedKernelImage::new("init=/bin/sh init=/sbin/guest-init", None),
        UnifiedKernelImage::new("", Some("implant")),
    );
    let mut machine = server.boot(&kernel);
    machine
        .ok("cd /keys && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out site.key 2>/dev/null &&
         openssl pkey -in site.key -pubout -out site.pem");
    // Signed where it was made, before it ever ran.
    machine.put("/keys/measured.json", &kernel.measured());
    machine.ok(
        "cd /keys && cryptattach policy sign --private-key site.key --measured measured.json >tpm2-pcr-signature.json",
    );
    server.enrol(&mut machine, "site_key = '/keys/site.pem'");
    println!("{}", machine.ok("cryptattach policy test && cryptattach lockbox open"));
    attaches(&mut machine);
    power_off(machine);

    for changed in [other_line, other_initramfs] {
        let mut machine = server.boot(&changed);
        for command in ["cryptattach policy test", "cryptattach lockbox open"] {
            let said = refused(&mut machine, command);
            assert!(said.contains("PCR 11 is ") && !said.contains("PCR 7 is"), "{said}");
            for section in [".cmdline", ".initrd"] {
                assert_eq!(said.matches(&format!("IPL into PCR 11: {section}")).count(), 1, "{said}");
            }
        }
        machine.fails(68, &format!("cryptattach attach {VOLUME} data"));
        machine.put("/keys/measured.json", &changed.measured());
        machine.ok(
            "cd /keys && cryptattach policy sign --private-key site.key --measured measured.json --append-to tpm2-pcr-signature.json \
             >new.json && mv new.json tpm2-pcr-signature.json && cryptattach policy test && cryptattach lockbox open",
        );
        attaches(&mut machine);
        power_off(machine);
    }
}
