//! A fresh Debian 13 with one disk, as its owner has it: firmware with or without Secure Boot, shim and GRUB, a root that a
//! passphrase opens, a TPM on the board. One command binds it, and it boots without a keystroke from then on. `bench-bind` tells
//! the same with what others need for it.

use std::{
    fs,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{
    machine::{Init, Machine},
    measured::Chip,
    page_words::words_of,
    shell::sh,
};

/// They take longer than the others together may, so they are run by name.
pub const STORIES: &[(&str, fn())] = &[
    ("journey: a fresh Debian 13 with one disk boots without a keystroke once its root is bound", one_command),
    (
        "journey: bind refuses a machine without a TPM and LUKS1, and says before what a key will not keep out",
        refused_or_warned,
    ),
    (
        "journey: Ansible and cloud-init bind the root of a host by the examples, and change nothing the second time",
        fleet,
    ),
];

/// make-disk has both, too.
const DEVICE: &str = "/dev/vda3";
const PASSPHRASE: &str = "passphrase";
const QUESTION: &str = "Please unlock disk vda3_crypt";
/// QEMU emulates the processor, and the machine may be busy: only what hangs takes so long.
const PATIENCE: Duration = Duration::from_secs(900);
/// The shell's prompt.
const PROMPT: &str = "root@debian:~# ";

/// The machine, off: its disk, its firmware's variables and its TPM.
struct Laptop {
    folder: TempDir,
    chip: Option<Chip>,
    has_secure_boot: bool,
    /// What is plugged in besides, as QEMU's options say it.
    besides: Vec<String>,
}

impl Laptop {
    /// With these packages more.
    fn new(has_secure_boot: bool, packages: &[&str]) -> Self {
        let folder = tempfile::Builder::new().prefix("cryptattach-vm").tempdir_in("/var/tmp").unwrap();
        let variables = if has_secure_boot { "OVMF_VARS_4M.ms.fd" } else { "OVMF_VARS_4M.fd" };
        let at = folder.path().display();
        sh(&format!(
            "cp /usr/share/OVMF/{variables} {at}/variables && mkdir {at}/authority &&
             qemu-img create -q -f qcow2 -F raw -b {}/disk.img {at}/disk",
            crate::image::make_by("vm", "make-disk", packages).display()
        ));
        let chip = Some(Chip::new(&folder.path().join("authority")));
        Self { folder, chip, has_secure_boot, besides: Vec::new() }
    }

    fn power_on(&mut self) -> Machine {
        let code = if self.has_secure_boot { "OVMF_CODE_4M.secboot.fd" } else { "OVMF_CODE_4M.fd" };
        let mut options: Vec<String> =
            ["-machine", "q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on"]
                .map(str::to_owned)
                .into();
        for (option, file) in [
            (",readonly=on", format!("/usr/share/OVMF/{code}")),
            ("", self.folder.path().join("variables").display().to_string()),
        ] {
            options.extend(["-drive".to_owned(), format!("if=pflash,format=raw{option},file={file}")]);
        }
        options.extend(self.chip.as_mut().map(Chip::power_on).into_iter().flatten());
        options.extend(self.besides.iter().cloned());
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let disk = self.folder.path().join("disk");
        Machine::power_on(Init::OneDisk, &format!("format=qcow2,cache=unsafe,file={}", disk.display()), &options)
    }

    /// Powers it on; a person types the passphrase.
    fn power_on_with_a_person(&mut self) -> Machine {
        let mut machine = self.power_on();
        machine.answer(QUESTION, PASSPHRASE);
        machine.wait_for_agent();
        machine
    }
}

/// Root at the serial terminal.
struct Terminal<'m> {
    machine: &'m mut Machine,
    /// How much of what is shown has been read.
    seen: usize,
}

impl<'m> Terminal<'m> {
    /// Once somebody may type there.
    fn log_in(machine: &'m mut Machine) -> Self {
        let seen = machine.shown().len();
        let mut terminal = Self { machine, seen };
        terminal.machine.type_line("");
        terminal.see(&[PROMPT]);
        terminal
    }

    /// Waits for one of these; returns what was shown up to its end, and which.
    fn see(&mut self, texts: &[&str]) -> (String, usize) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = self.machine.shown();
            let new = &shown[self.seen..].replace('\r', "");
            if let Some(at) = texts.iter().position(|text| new.contains(text)) {
                self.seen = shown.len();
                return (new.clone(), at);
            }
            assert!(Instant::now() < deadline, "none of {texts:?} is shown:\n{new}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Types a command that ends with this code.
    fn ends(&mut self, code: i32, command: &str) -> (String, f64) {
        let (shown, seconds) = self.types(command);
        let (ended, _) = self.types("echo code=$?");
        assert!(ended.contains(&format!("code={code}\n")), "{shown}\n{ended}");
        (shown, seconds)
    }

    /// Types a command; answers its questions for a passphrase and for words. What was shown, and the seconds it took.
    fn types(&mut self, command: &str) -> (String, f64) {
        let start = Instant::now();
        self.machine.type_line(command);
        let mut shown = String::new();
        loop {
            let (new, at) = self.see(&["shown): ", "(press TAB for no echo)", "LUKS password: ", PROMPT]);
            shown += &new;
            if at == 3 {
                return (format!("{PROMPT}{}", shown.trim_end_matches(PROMPT)), start.elapsed().as_secs_f64());
            }
            let answer = if new.contains("Type the words back") { words_of(&new) } else { PASSPHRASE.to_owned() };
            self.machine.type_line(&answer);
        }
    }
}

/// Powers it on, a person types the passphrase, and root types these commands; then it boots, and again, without a keystroke.
/// What was shown, with the seconds of each command.
fn journey(laptop: &mut Laptop, commands: &[&str], boots: usize) -> Vec<(String, f64)> {
    let mut machine = laptop.power_on_with_a_person();
    machine.ok("mount -o ro /dev/sda /tools && cp /tools/cryptattach.deb /root");
    let mut terminal = Terminal::log_in(&mut machine);
    let mut told = Vec::new();
    for command in commands {
        told.push(terminal.ends(0, command));
    }
    machine.ok("sync");
    told.extend((0..boots).map(|_| boot_alone(&mut machine)));
    told
}

/// Boots it again; nobody types, whatever prompt a slow machine shows meanwhile. What root sees then, and the seconds.
fn boot_alone(machine: &mut Machine) -> (String, f64) {
    let before = machine.shown().len();
    let start = Instant::now();
    machine.reboot();
    let seconds = start.elapsed().as_secs_f64();
    let shown = machine.shown()[before..].to_owned();
    let of_ours: String =
        shown.lines().filter(|line| line.starts_with("cryptattach: ")).map(|line| line.to_owned() + "\n").collect();
    let (shown, _) = Terminal::log_in(machine).types("findmnt -no SOURCE /");
    (format!("{PROMPT}reboot\n{of_ours}{shown}"), seconds)
}

const INSTALL: &str = "apt install -qq -y ./cryptattach.deb";

fn one_command() {
    let mut laptop = Laptop::new(true, &[]);
    let bind = format!("cryptattach bind {DEVICE}");
    let told = journey(&mut laptop, &[INSTALL, &bind], 1);
    for (shown, seconds) in &told {
        println!("{shown}\n-- {seconds:.1} s\n");
    }
    let bound = &told[1].0;
    for line in [
        "the root's, LUKS2",
        "on a machine with one disk",
        "made in the TPM's memory",
        "/boot is not encrypted, and its initramfs is not measured into PCR 7",
        "is bound, and opened as a boot would open it",
    ] {
        assert!(bound.contains(line), "{line}: {bound}");
    }
    assert!(!bound.contains("Secure Boot is not on") && !bound.contains("MISSING"), "{bound}");
}

/// Firmware without Secure Boot and at first without a TPM, GRUB with an unencrypted /boot, another system on the disk.
fn refused_or_warned() {
    let mut laptop = Laptop::new(false, &[]);
    let chip = laptop.chip.take();
    let mut machine = laptop.power_on_with_a_person();
    machine.ok(
        "mount -o ro /dev/sda /tools && cp /tools/cryptattach.deb /root &&
         echo size=32MiB | sfdisk --quiet --append --no-reread --force /dev/vda && partx --add --nr 4 /dev/vda &&
         printf passphrase | cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 --key-file - /dev/vda4",
    );
    Terminal::log_in(&mut machine).ends(0, INSTALL);
    let before = machine.ok(MADE);
    let mut terminal = Terminal::log_in(&mut machine);
    let no_tpm = terminal.ends(64, &format!("cryptattach bind {DEVICE}")).0;
    let luks1 = terminal.ends(65, "cryptattach bind /dev/vda4").0;
    println!("{no_tpm}\n{luks1}");
    assert!(
        no_tpm.contains("this machine has no TPM (cannot use a TPM at 'device:/dev/tpmrm0': ")
            && !no_tpm.contains("shown): "),
        "{no_tpm}"
    );
    assert!(luks1.contains("'cryptsetup convert --type luks2'"), "{luks1}");
    assert_eq!(machine.ok(MADE), before, "nothing was made");
    // Another system takes the place of the old volume.
    machine.ok("wipefs -qa /dev/vda4 && mkfs.ext4 -q /dev/vda4 && sync");
    machine.shut_down();

    laptop.chip = chip;
    let mut machine = laptop.power_on_with_a_person();
    let (bound, _) = Terminal::log_in(&mut machine).ends(0, &format!("cryptattach bind {DEVICE}"));
    println!("{bound}");
    let (plan, _) = bound.split_once("(nothing is shown)").unwrap();
    for line in [
        "a new key in the TPM (PCR 4+7)",
        "note    Secure Boot is not on",
        "note    /boot is not encrypted, and its initramfs is not measured into PCR 4+7",
        "note    /dev/vda4 (ext4) may be another system",
    ] {
        assert!(plan.contains(line), "{line}: {plan}");
    }
    assert!(bound.contains("somebody with a stick      EVERYTHING") && !bound.contains("MISSING"), "{bound}");
    println!("{}", boot_alone(&mut machine).0);
}

/// What a run makes or changes.
const MADE: &str = "cryptsetup luksDump --dump-json-metadata /dev/vda3 | sha256sum; \
    find /etc/cryptattach /etc/crypttab /var/lib/cryptattach/bind -type f ! -name '*.example' \
         -exec sha256sum {} + 2>/dev/null | sort -k 2; \
    stat -c '%n %Y' /boot/initrd.img-* | grep -v dpkg";

/// The examples as they are, but for what each site has of its own. The image has the package, and the firmware no Secure Boot, as
/// in most clouds.
fn fleet() {
    let package = crate::machine::package();
    let mut laptop = Laptop::new(false, &["ansible-core", "cloud-init", "sudo", package.to_str().unwrap()]);
    let at = laptop.folder.path().display().to_string();
    sh(&format!(
        "cd {at} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 | openssl pkey -pubout -out site-escrow.pem"
    ));
    let escrow = fs::read_to_string(laptop.folder.path().join("site-escrow.pem")).unwrap();
    let data = include_str!("../../examples/bind.cloud-init.yml");
    let sites = "      -----BEGIN PUBLIC KEY-----\n      (the site's)\n      -----END PUBLIC KEY-----\n";
    assert!(data.contains(sites) && data.contains("content: for the setup only\n"), "{data}");
    let lines: String = escrow.lines().map(|line| format!("      {line}\n")).collect();
    let data = data.replace(sites, &lines).replace("for the setup only\n", &format!("{PASSPHRASE}\n"));
    fs::write(laptop.folder.path().join("user-data"), data).unwrap();
    sh(&format!(
        "cd {at} && echo instance-id: host >meta-data && truncate -s 1M seed && mkfs.vfat -n CIDATA seed >/dev/null &&
         mcopy -i seed user-data meta-data ::"
    ));
    let seed = format!("if=none,id=seed,format=raw,readonly=on,file={at}/seed");
    // There when systemd asks its generators: cloud-init's looks for the seed.
    laptop.besides = ["-drive", &seed, "-device", "virtio-blk-pci,drive=seed"].map(str::to_owned).into();

    let mut machine = laptop.power_on_with_a_person();
    let done = "cloud-init status --wait --long; cat /var/log/cloud-init-output.log";
    let first = machine.ok(done);
    println!("{first}");
    assert!(first.contains("status: done"), "{first}");
    assert!(first.contains("/dev/vda3 is bound, and opened as a boot would open it"), "{first}");
    machine.ok("[ ! -e /run/cryptattach.passphrase ] && cryptattach test /dev/vda3 --as-boot");
    println!("{}", machine.ok("cryptattach unbind /dev/vda3 2>&1"));
    machine.fails(78, "cryptattach test /dev/vda3 --as-boot");

    machine.put("site-escrow.pem", escrow.as_bytes());
    machine.put("bind.ansible.yml", include_bytes!("../../examples/bind.ansible.yml"));
    machine.ok(&format!(
        "rm /etc/cryptattach/bind.toml /etc/cryptattach/site-escrow.pem && umask 77 && echo vault >vault.password &&
         echo passphrase: {PASSPHRASE} >vault.yml && ansible-vault encrypt --vault-password-file vault.password vault.yml"
    ));
    let play = "ANSIBLE_NOCOLOR=1 ansible-playbook --inventory localhost, --connection local bind.ansible.yml \
                --extra-vars @vault.yml --vault-password-file vault.password 2>&1";
    let first = machine.ok(play);
    println!("{first}");
    assert!(first.contains("changed=3") && first.contains("failed=0"), "{first}");
    let made = machine.ok(MADE);
    let second = machine.ok(play);
    println!("{second}");
    assert!(second.contains("changed=0") && second.contains("failed=0"), "{second}");
    assert_eq!(machine.ok(MADE), made);
    machine.ok("cryptattach test /dev/vda3 --as-boot && [ ! -e /run/cryptattach.passphrase ]");

    // As if it were the first boot.
    machine.ok("cloud-init clean --logs && sync");
    boot_alone(&mut machine);
    let second = machine.ok(done);
    println!("{second}");
    assert!(second.contains("status: done"), "{second}");
    assert!(second.contains("/dev/vda3 is bound already; nothing was changed"), "{second}");
    assert_eq!(machine.ok(MADE), made);
    machine.ok("[ ! -e /run/cryptattach.passphrase ]");
}

/// Likewise: the whole journey of each, as a record and a line of a table.
pub const BENCHES: &[(&str, fn())] = &[
    ("bench-bind cryptattach", || {
        compare("cryptattach", &[INSTALL, &format!("cryptattach bind {DEVICE}")], 2);
    }),
    ("bench-bind systemd-cryptenroll", || {
        compare(
            "systemd-cryptenroll",
            &[
                // Debian's dracut makes an image for any machine, without crypttab.
                "mkdir -p /etc/dracut.conf.d && echo 'hostonly=\"yes\"' >/etc/dracut.conf.d/hostonly.conf",
                "apt install -qq -y /srv/peers/dracut/*.deb",
                &format!("systemd-cryptenroll --tpm2-device=auto --tpm2-pcrs=7 {DEVICE}"),
                "sed -i 's/luks,discard/luks,discard,tpm2-device=auto/' /etc/crypttab",
                "dracut --force --regenerate-all",
            ],
            1,
        );
    }),
    ("bench-bind clevis", || {
        compare(
            "clevis",
            &[
                "apt install -qq -y /srv/peers/initramfs-tools/*.deb",
                &format!("clevis luks bind -d {DEVICE} tpm2 '{{\"pcr_bank\":\"sha256\",\"pcr_ids\":\"7\"}}'"),
                "update-initramfs -u -k all",
            ],
            1,
        );
    }),
];

/// Prints the terminal of the whole journey, and a line of a table: commands, seconds, and seconds without the packages.
fn compare(name: &str, commands: &[&str], boots: usize) {
    let told = journey(&mut Laptop::new(true, &[]), commands, boots);
    println!("== {name}");
    for (shown, seconds) in &told {
        println!("{shown}\n[{seconds:.0} s]\n");
    }
    let of = |is_it: fn(&&str) -> bool| -> f64 {
        commands.iter().zip(&told).filter(|(command, _)| is_it(command)).map(|(_, (_, seconds))| seconds).sum()
    };
    let (all, after) = (of(|_| true), of(|command| !command.starts_with("apt ")));
    println!("| {name} | {} | {all:.0} | {after:.0} |", commands.len());
}
