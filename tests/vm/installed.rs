//! An installed machine with an encrypted root and a TPM, as its user has it: the package by apt, an enrolment, an initramfs by
//! the distribution's own maker, and a boot that needs nobody. QEMU stands for the boot loader: it takes kernel and initramfs
//! from the machine's /boot.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::Command,
};

use libtest_mimic::Trial;
use tempfile::TempDir;

use crate::{
    machine::{Init, Machine, image},
    measured::Chip,
    own_machine,
    shell::sh,
    units,
};

const STORIES: [(&str, fn()); 2] = [
    ("Debian 12 with the package and initramfs-tools boots unattended from an encrypted root", || boots(&DEBIAN_12)),
    ("Debian 13 with the package and dracut boots unattended from an encrypted root", || boots(&DEBIAN_13)),
];

/// A package built on Debian 13 is for no older release; the stories of those are ignored.
pub fn trials() -> impl Iterator<Item = Trial> {
    let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let first = match text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME=")) {
        Some("bookworm") => 0,
        Some("trixie") => 1,
        _ => STORIES.len(),
    };
    STORIES.iter().enumerate().map(move |(place, story)| own_machine(story).with_ignored_flag(place < first))
}

struct Release {
    name: &'static str,
    /// Of the kernel's command line; dracut's image for any machine has no crypttab.
    root: &'static str,
    /// Without us.
    question: &'static str,
}

const DEBIAN_12: Release = Release { name: "bookworm", root: "", question: "Please unlock disk root" };
const DEBIAN_13: Release = Release {
    name: "trixie",
    root: "rd.luks.name=11111111-2222-3333-4444-555555555555=root",
    question: "Please enter passphrase for disk root",
};

/// make-image has both, too.
const UUID: &str = "11111111-2222-3333-4444-555555555555";
const PASSPHRASE: &str = "passphrase";

/// What the machine is configured with; the store is on a disk of its own, which stands for all that is elsewhere.
const CONFIG: &str = r#"
[stores.cinder]
type = "directory"
path = "/keys/cinder"
owner = "cinder.owner.pem"
escrow = "cinder.escrow.pem"

[lockbox]
host = "vm"
store = "cinder"
identities = ["tpm:host.tpm.pem"]
path = "/run/cryptattach/lockbox"

[tpm]
identity = "host.tpm.pem"

# Nobody is asked, however long this emulated machine takes.
[boot]
prompt_after_seconds = 80

[[boot.mounts]]
device = "LABEL=keys"
at = "/keys"
type = "ext4"
"#;

/// The machine, off: its disks and its TPM.
struct Server {
    folder: TempDir,
    chip: Chip,
    release: &'static Release,
}

impl Server {
    fn new(release: &'static Release) -> Self {
        let folder = tempfile::Builder::new().prefix("cryptattach-vm").tempdir_in("/var/tmp").unwrap();
        let (at, image) = (folder.path().display(), image(Some(release.name)));
        let image = image.display();
        sh(&format!("qemu-img create -q -f qcow2 -F raw -b {image}/installed.img {at}/root"));
        sh(&format!("cp --sparse=always {image}/boot.img {at}/boot && mkdir {at}/authority"));
        for disk in ["keys", "data"] {
            File::create(folder.path().join(disk)).unwrap().set_len(64 << 20).unwrap();
        }
        let chip = Chip::new(&folder.path().join("authority"));
        Self { folder, chip, release }
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).into_os_string().into_string().unwrap()
    }

    /// Powers it on, with what is in its /boot now.
    fn power_on(&mut self) -> Machine {
        let loaded = self.folder.path().join("loaded");
        let _ = fs::remove_dir_all(&loaded);
        fs::create_dir(&loaded).unwrap();
        let read = format!("rdump / {}", loaded.display());
        assert!(Command::new("debugfs").args(["-R", &read, &self.file("boot")]).output().unwrap().status.success());
        let find = |name: &str| -> PathBuf {
            let mut files = fs::read_dir(&loaded).unwrap().map(|entry| entry.unwrap().path());
            files.find(|path| path.file_name().unwrap().to_str().unwrap().starts_with(name)).unwrap()
        };
        let mut options = vec!["-kernel".to_owned(), find("vmlinuz").display().to_string()];
        options.extend(["-initrd".to_owned(), find("initrd.img").display().to_string()]);
        let command_line = "console=ttyS0 quiet panic=-1 no_timer_check root=/dev/mapper/root rw";
        options.extend(["-append".to_owned(), format!("{command_line} {}", self.release.root)]);
        for disk in ["boot", "keys", "data"] {
            let drive = format!("if=none,id={disk},format=raw,cache=unsafe,file={}", self.file(disk));
            let device = format!("virtio-blk-pci,drive={disk},serial={disk}");
            options.extend(["-drive".to_owned(), drive, "-device".to_owned(), device]);
        }
        options.extend(self.chip.power_on());
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Machine::power_on(Init::Systemd, &format!("format=qcow2,cache=unsafe,file={}", self.file("root")), &options)
    }

    /// Powers it on; a person types the passphrase.
    fn power_on_with_a_person(&mut self) -> Machine {
        let mut machine = self.power_on();
        machine.answer(self.release.question, PASSPHRASE);
        machine.wait_for_agent();
        machine
    }
}

/// The package, all but what it has done to the initramfs: that is for when the configuration is there, and takes long.
fn install(machine: &mut Machine) {
    machine.ok("apt-get install -qq --no-install-recommends -o DPkg::NoTriggers=true -o DPkg::ConfigurePending=false \
         -o DPkg::TriggersPending=false /tools/cryptattach.deb &&
         dpkg --no-triggers --configure cryptattach");
}

/// The administrator makes a store and admits the host, all in one machine under two configurations; the root's key goes into
/// the store.
fn enrol(machine: &mut Machine) {
    machine.ok(
        "mkfs.ext4 -q -L keys /dev/disk/by-id/virtio-keys && echo LABEL=keys /keys ext4 nofail 0 2 >>/etc/fstab && mount /keys &&
         mkdir -p /keys/administrator /etc/cryptattach && cd /keys/administrator &&
         openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out escrow.key 2>/dev/null &&
         openssl pkey -in escrow.key -pubout -out escrow.pem && printf \"state = 'state'\\n[audit]\\nfile = 'audit'\\n\" >site.toml &&
         cryptattach init --config site.toml --store cinder --path /keys/cinder --escrow escrow.pem &&
         cryptattach --config site.toml container create cinder && cp cinder.*.pem /etc/cryptattach",
    );
    machine.put("/etc/cryptattach/cryptattach.toml", CONFIG.as_bytes());
    let site = "cryptattach --config /keys/administrator/site.toml";
    machine.ok(&format!(
        "cd /keys && cryptattach host join --output request &&
         {site} host admit request --trust-first-use --trust-pcr-values --output answer && cryptattach host join answer &&
         printf {PASSPHRASE} >/run/passphrase &&
         {site} key import /dev/disk/by-id/virtio-root --store cinder --token --key-file /run/passphrase && rm /run/passphrase"
    ));
}

/// A data volume whose unit opens the lockbox: within its hardening, from a TPM whose node is another user's.
fn attach_by_the_unit(machine: &mut Machine) {
    machine.ok("cryptattach --config /keys/administrator/site.toml format --keyslot /dev/disk/by-id/virtio-data");
    machine.ok(
        "printf '[volumes.data]\ndevice = \"UUID=%s\"\n' $(cryptsetup luksUUID /dev/disk/by-id/virtio-data) >>/etc/cryptattach/cryptattach.toml
         mkdir -p /etc/systemd/system/cryptattach@data.service.d && cd /etc/systemd/system/cryptattach@data.service.d &&
         printf '[Service]\nExecStartPre=/usr/bin/cryptattach lockbox open\n' >lockbox.conf && systemctl daemon-reload",
    );
    assert_eq!(machine.ok("stat -c %U /dev/tpmrm0"), "tss");
    machine.ok("systemctl start cryptattach@data && mkfs.ext4 -q -L told /dev/mapper/data");
    let status = machine.ok("cryptattach lockbox status");
    assert!(status.contains("until power-off"), "{status}");
}

/// The initramfs is made anew, and is fit.
fn make_initramfs(machine: &mut Machine) {
    // What installing the package has asked for.
    println!("{}", machine.ok("dpkg --configure --pending 2>&1 | grep -v ^Creating; sync"));
    let doctor = machine.ok("cryptattach doctor --image /boot/initrd.img-$(uname -r)");
    assert!(doctor.contains("well       file /etc/cryptattach/host.tpm.pem"), "{doctor}");
    let told = machine.ok("cryptattach test /dev/disk/by-id/virtio-root --as-boot");
    assert!(told.contains("would unlock in") && told.contains("/keys/cinder is on the file system at /keys"), "{told}");
    println!("{told}");
}

/// The root was opened without a person, and the booted system tells how.
fn tells_of_its_boot(machine: &mut Machine) {
    assert!(!machine.has_shown("disk root"), "nobody is asked");
    machine.ok("systemctl is-system-running --wait || { systemctl --failed; exit 1; }");
    let record: serde_json::Value = serde_json::from_str(&machine.ok("cat /run/cryptattach/boot.json")).unwrap();
    assert!(record["volumes"][0]["by"].as_str().unwrap().ends_with(" with the lockbox"), "{record}");
    let journal = machine.ok("journalctl -b -o short-monotonic -t cryptattach");
    assert!(journal.contains("root is attached, by cinder/"), "{journal}");
    println!("{journal}");
    let status = machine.ok("cryptattach status root && cryptattach explain root && cryptattach lockbox status");
    for line in [format!("LUKS {UUID}"), "mounted on /".into(), "no failure of 'root'".into(), "until power-off".into()]
    {
        assert!(status.contains(&line), "{line}: {status}");
    }
    machine.ok("test $(cat /sys/class/tpm/tpm0/pcr-sha256/15) != $(printf %064d 0)");
    // The data volume's unit has found the lockbox open.
    machine
        .eventually("systemctl is-active cryptattach@data && test $(blkid -o value -s LABEL /dev/mapper/data) = told");
}

fn boots(release: &'static Release) {
    let mut server = Server::new(release);
    let mut machine = server.power_on_with_a_person();
    install(&mut machine);
    enrol(&mut machine);
    attach_by_the_unit(&mut machine);
    // dracut's: less in it, and the entry of crypttab.
    machine.ok("[ ! -e /etc/dracut.conf.d ] || echo hostonly=yes >/etc/dracut.conf.d/this-machine.conf");
    make_initramfs(&mut machine);
    machine.shut_down();

    let mut machine = server.power_on();
    machine.wait_for_agent();
    tells_of_its_boot(&mut machine);
    programs_open_volumes(&mut machine);
    units::hardened(&mut machine);
}

/// Programs that know nothing of us, by the token.
fn programs_open_volumes(machine: &mut Machine) {
    machine.ok("sed -i '/^.volumes/,$d' /etc/cryptattach/cryptattach.toml && systemctl stop cryptattach@data && cryptsetup open --token-only /dev/disk/by-id/virtio-data data && cryptsetup close data");
    machine.ok(
        "echo tab /dev/disk/by-id/virtio-data none luks,noauto,headless=1 >>/etc/crypttab && systemctl daemon-reload &&
         { systemctl start systemd-cryptsetup@tab && test -b /dev/mapper/tab || { journalctl -b -n 50; exit 1; }; }",
    );
}
