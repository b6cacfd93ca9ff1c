//! A fresh Debian 13 with one disk, as its owner has it: firmware with or without Secure Boot, shim and GRUB, a root that a
//! passphrase opens, a TPM on the board. One command binds it, and it boots without a keystroke from then on. `bench-bind` tells
//! the same with what others need for it.

use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::{
    machine::{Init, Machine},
    measured::Chip,
    page_words::words_of,
    shell::sh,
};

/// It takes longer than the others together may, so it is run by name.
pub const STORY: (&str, fn()) =
    ("a fresh Debian 13 with one disk boots without a keystroke once its root is bound", one_command);

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
}

impl Laptop {
    fn new(has_secure_boot: bool) -> Self {
        let folder = tempfile::Builder::new().prefix("cryptattach-vm").tempdir_in("/var/tmp").unwrap();
        let variables = if has_secure_boot { "OVMF_VARS_4M.ms.fd" } else { "OVMF_VARS_4M.fd" };
        let at = folder.path().display();
        sh(&format!(
            "cp /usr/share/OVMF/{variables} {at}/variables && mkdir {at}/authority &&
             qemu-img create -q -f qcow2 -F raw -b {}/disk.img {at}/disk",
            disk().display()
        ));
        let chip = Some(Chip::new(&folder.path().join("authority")));
        Self { folder, chip, has_secure_boot }
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

fn disk() -> std::path::PathBuf {
    crate::image::make_by("vm", "make-disk", &[])
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
        let (shown, seconds) = terminal.types(command);
        let (code, _) = terminal.types("echo code=$?");
        assert!(code.contains("code=0"), "{shown}\n{code}");
        told.push((shown, seconds));
    }
    machine.ok("sync");
    for _ in 0..boots {
        let before = machine.shown().len();
        let start = Instant::now();
        machine.reboot();
        let seconds = start.elapsed().as_secs_f64();
        let shown = machine.shown()[before..].to_owned();
        assert!(!shown.contains(QUESTION) && !shown.contains("enter passphrase"), "nobody is asked:\n{shown}");
        let mut terminal = Terminal::log_in(&mut machine);
        let (shown, _) = terminal.types("uptime --since; findmnt -no SOURCE /; cryptattach status 2>/dev/null");
        told.push((format!("{PROMPT}reboot\n{shown}"), seconds));
    }
    told
}

const INSTALL: &str = "apt install -qq -y ./cryptattach.deb";

fn one_command() {
    let mut laptop = Laptop::new(true);
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
        "/boot is not encrypted, and PCR 7",
        "is bound, and opened as a boot would open it",
    ] {
        assert!(bound.contains(line), "{line}: {bound}");
    }
    assert!(!bound.contains("Secure Boot is not on") && !bound.contains("MISSING"), "{bound}");
}

/// Prints the terminal of the whole journey, and what others need for the same.
pub fn compare() {
    let peers: [(&str, &[&str]); 3] = [
        ("cryptattach", &[INSTALL, &format!("cryptattach bind {DEVICE}")]),
        (
            "systemd-cryptenroll",
            &[
                "apt install -qq -y /srv/peers/dracut/*.deb",
                &format!("systemd-cryptenroll --tpm2-device=auto --tpm2-pcrs=7 {DEVICE}"),
                "sed -i 's/luks,discard/luks,discard,tpm2-device=auto/' /etc/crypttab",
                "dracut --force --regenerate-all",
            ],
        ),
        (
            "clevis",
            &[
                "apt install -qq -y /srv/peers/initramfs-tools/*.deb",
                &format!("clevis luks bind -d {DEVICE} tpm2 '{{\"pcr_ids\":\"7\"}}'"),
                "update-initramfs -u -k all",
            ],
        ),
    ];
    let mut rows = Vec::new();
    for (name, commands) in peers {
        let told = journey(&mut Laptop::new(true), commands, 2);
        println!("== {name}");
        for (shown, seconds) in &told {
            println!("{shown}\n[{seconds:.0} s]\n");
        }
        let all: f64 = told[..commands.len()].iter().map(|(_, seconds)| seconds).sum();
        let after: f64 = told[1..commands.len()].iter().map(|(_, seconds)| seconds).sum();
        rows.push(format!("| {name} | {} | {all:.0} | {after:.0} |", commands.len()));
    }
    println!("| | commands | seconds | of it without apt |\n|---|---:|---:|---:|\n{}", rows.join("\n"));
}
