//! One command binds a volume, and one takes it back: with a TPM of its own (swtpm), killed at any time, beside clevis.

use std::{
    fs,
    process::{Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    clevis,
    page_words::words_of,
    person::at_terminal,
    shell::{LoopDevice, sh},
    site::Site,
    swtpm::Swtpm,
    tangd::Tangd,
};

const PASSPHRASE: &str = "a passphrase";

/// A machine that has booted by GRUB, with nothing of ours but where it remembers.
struct Machine {
    swtpm: Swtpm,
    site: Site,
}

impl Machine {
    fn new() -> Self {
        let machine = Self { swtpm: Swtpm::start(), site: Site::bare() };
        for (pcr, digit) in [(4, '4'), (7, '7'), (8, '8')] {
            machine.swtpm.extend(pcr, digit);
        }
        let path = machine.site.keys("cryptattach.toml");
        let text = fs::read_to_string(path).unwrap();
        let tcti = machine.swtpm.tcti();
        fs::write(path, format!("{text}[tpm]\ntcti = '{tcti}'\nidentity = 'host.tpm.pem'\n")).unwrap();
        machine
    }

    fn volume(&self, name: &str) -> String {
        clevis::luks(&self.site, name)
    }

    /// What somebody changes who binds: files beside the volume, the configuration, the TPM's memory, the header.
    fn traces(&self, volume: &str) -> Vec<String> {
        let listed = sh(&format!("ls {}", self.site.keys("")));
        let listed =
            listed.lines().filter(|name| !["audit", "audit.lock", "site-state"].contains(name)).collect::<Vec<_>>();
        let text = fs::read_to_string(self.site.keys("cryptattach.toml")).unwrap();
        let indices = self.swtpm.tool(&["tpm2_getcap", "handles-nv-index"]);
        let trusted = sh(&format!("ls {}/containers 2>/dev/null || true", self.site.keys("site-state")));
        vec![listed.join(" "), text, indices, tokens(volume), trusted]
    }

    fn bind(&self, volume: &str) -> Command {
        let mut command = self.site.command();
        command.args(["bind", volume, "--no-recovery", "--key-file", self.site.keys("pass")]);
        command
    }

    /// Runs it, kills it after a while. The kernel's resource manager flushes what it leaves in the TPM; swtpm alone does not.
    fn killed(&self, mut command: Command, after: Duration) {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        sleep(after);
        let _ = child.kill();
        child.wait().unwrap();
        for kind in ["-t", "-l", "-s"] {
            self.swtpm.tool(&["tpm2_flushcontext", kind]);
        }
    }

    fn tested(&self, volume: &str) -> Value {
        self.site.json(&["test", volume])
    }
}

fn tokens(volume: &str) -> String {
    sh(&format!("cryptsetup luksDump --dump-json-metadata {volume} | jq -c '[.tokens, (.keyslots | keys)]'"))
}

fn opens_by_passphrase(volume: &str) {
    sh(&format!("printf '{PASSPHRASE}' | cryptsetup open --test-passphrase --key-file - {volume}"));
}

fn ok(output: Output) -> String {
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{}{told}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{told}");
    String::from_utf8(output.stdout).unwrap()
}

/// The command in a system of its own: crypttab, and a program that makes no initramfs but a note.
fn in_own_system(site: &Site, arguments: &[&str]) -> Output {
    let script = format!(
        "mount --bind {0}/etc /etc && mount --bind {0}/sbin /usr/sbin && mount --bind {0}/boot /boot && exec \"$@\"",
        site.path("system").display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script, "sh", env!("CARGO_BIN_EXE_cryptattach")]).args(arguments);
    command.env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml")).stdin(Stdio::null()).output().unwrap()
}

#[test]
fn one_command_binds_a_disk_and_one_takes_it_back() {
    let machine = Machine::new();
    let site = &machine.site;
    let system = site.path("system");
    let maker = "#!/bin/sh\necho \"$*\" >>$(dirname $0)/../boot/made\n";
    sh(&format!(
        "mkdir -p {0}/etc {0}/sbin {0}/boot && cp -a /etc/ld.so.cache /etc/passwd /etc/group /etc/nsswitch.conf {0}/etc && \
         printf '{maker}' >{0}/sbin/update-initramfs && chmod +x {0}/sbin/update-initramfs && : >{0}/boot/made",
        system.display()
    ));
    fs::write(system.join("sbin/update-initramfs"), "#!/bin/sh\necho \"$*\" >>/boot/made\n").unwrap();
    // A comment in Latin-1 goes back as it was.
    let crypttab = b"# the system's Schl\xfcssel\nroot UUID=11111111-2222-3333-4444-555555555555 none luks,discard\n";
    fs::write(system.join("etc/crypttab"), crypttab).unwrap();
    let device = LoopDevice::new(machine.volume("volume").as_ref(), "");
    let (volume, before) = (device.path(), machine.traces(device.path()));

    let pass = site.keys("pass");
    fs::write(pass, format!("{PASSPHRASE}\n")).unwrap();
    let bind = ["bind", volume, "--no-recovery", "--name", "data", "--key-file", pass];
    let plan = ok(in_own_system(site, &[&bind[..], &["--dry-run"]].concat()));
    assert!(
        plan.contains("PCR 4+7") && plan.contains("update-initramfs -u -k all") && plan.lines().count() == 4,
        "{plan}"
    );
    assert!(plan.contains("note    Secure Boot is not on"), "{plan}");
    assert_eq!(machine.traces(volume), before, "nothing is changed");

    let bound: Value = serde_json::from_str(&ok(in_own_system(site, &[&bind[..], &["--json"]].concat()))).unwrap();
    assert_eq!((&bound["tried"], &bound["already"]), (&true.into(), &false.into()));
    assert_eq!(bound["plan"]["boot"], "crypttab");
    assert!(bound["thieves"]["stick"].as_str().unwrap().starts_with("EVERYTHING"), "{bound}");
    let written = fs::read(system.join("etc/crypttab")).unwrap();
    let line = format!("data UUID={} none luks,nofail,initramfs\n", bound["volume"].as_str().unwrap());
    assert_eq!(written, [&crypttab[..], line.as_bytes()].concat());
    assert_eq!(fs::read_to_string(system.join("boot/made")).unwrap(), "-u -k all\n");
    assert_eq!(machine.tested(volume)["key"], bound["key"]);
    opens_by_passphrase(volume);

    let after = machine.traces(volume);
    let again = ok(in_own_system(site, &bind));
    assert!(again.contains("bound already; nothing was changed"), "{again}");
    assert_eq!(machine.traces(volume), after);
    assert_eq!(fs::read_to_string(system.join("boot/made")).unwrap().lines().count(), 1);

    ok(in_own_system(site, &["unbind", volume]));
    assert_eq!(machine.traces(volume), before);
    assert_eq!(fs::read(system.join("etc/crypttab")).unwrap(), crypttab);
    assert_eq!(fs::read_to_string(system.join("boot/made")).unwrap().lines().count(), 2);
    opens_by_passphrase(volume);
    let told = site.fails(66, &["unbind", volume]);
    assert!(told.contains("was not bound"), "{told}");
}

#[test]
fn whoever_is_stopped_goes_on_by_the_same_command() {
    let machine = Machine::new();
    let volume = machine.volume("volume");
    let before = machine.traces(&volume);
    let start = Instant::now();
    ok(machine.bind(&volume).output().unwrap());
    let whole = start.elapsed();
    let indices = machine.traces(&volume)[2].lines().count();
    let unbind = || {
        let mut command = machine.site.command();
        command.args(["unbind", &volume]);
        command
    };
    let start = Instant::now();
    ok(unbind().output().unwrap());
    let whole_unbind = start.elapsed();
    assert_eq!(machine.traces(&volume), before);
    let tries = 5;
    for number in 1..tries {
        machine.killed(machine.bind(&volume), whole * number / tries);
        opens_by_passphrase(&volume);
        ok(machine.bind(&volume).output().unwrap());
        assert_eq!(machine.site.ok(&["key", "list"]).lines().count(), 1, "no key that nothing names");
        assert_eq!(machine.traces(&volume)[2].lines().count(), indices);
        machine.tested(&volume);
        machine.killed(unbind(), whole_unbind * number / tries);
        opens_by_passphrase(&volume);
        let ended = unbind().output().unwrap();
        // It had ended before it was killed.
        assert!(
            ended.status.success() || ended.status.code() == Some(66),
            "{}",
            String::from_utf8_lossy(&ended.stderr)
        );
        assert_eq!(machine.traces(&volume), before, "killed after {number} of {tries} parts");
    }
    // And one that is bound while half of it is taken back.
    ok(machine.bind(&volume).output().unwrap());
    machine.killed(unbind(), whole_unbind / 2);
    ok(machine.bind(&volume).output().unwrap());
    machine.tested(&volume);
    ok(unbind().output().unwrap());
    assert_eq!(machine.traces(&volume), before);
}

#[test]
fn a_tpm_without_room_is_told_and_the_same_command_goes_on_once_it_has() {
    let machine = Machine::new();
    let volume = machine.volume("volume");
    let tcti = machine.swtpm.tcti();
    let each = |do_it: &str, from: u32, to: u32| {
        sh(&format!("for n in $(seq {from} {to}); do TPM2TOOLS_TCTI={tcti} {do_it} $n >/dev/null 2>&1; done; true"))
    };
    let define = "tpm2_nvdefine -C o -s 1 -a 'ownerread|ownerwrite'";
    each(define, 0x0180_ca88, 0x0180_caff);
    let before = machine.traces(&volume);
    each(define, 0x0180_ca82, 0x0180_ca87);
    let full = machine.bind(&volume).output().unwrap();
    let told = String::from_utf8_lossy(&full.stderr).into_owned();
    assert!(full.status.code() == Some(69) && told.contains("of 128 indices"), "{told}");
    opens_by_passphrase(&volume);
    each("tpm2_nvundefine -C o", 0x0180_ca82, 0x0180_ca87);
    ok(machine.bind(&volume).output().unwrap());
    machine.tested(&volume);
    machine.site.ok(&["unbind", &volume]);
    assert_eq!(machine.traces(&volume), before);

    // A cleared TPM has nothing to be taken back; what it was for goes all the same.
    ok(machine.bind(&volume).output().unwrap());
    machine.swtpm.tool(&["tpm2_clear"]);
    let told = String::from_utf8(machine.bind(&volume).output().unwrap().stderr).unwrap();
    assert!(told.contains("cleared"), "{told}");
    machine.site.ok(&["unbind", &volume]);
    assert_eq!(tokens(&volume), before[3]);
}

#[test]
fn at_the_terminal_a_passphrase_is_asked_for_and_words_are_handed_over() {
    let machine = Machine::new();
    let (site, volume) = (&machine.site, machine.volume("volume"));
    let told = site.fails(64, &["bind", &volume]);
    assert!(told.contains("--no-recovery"), "{told}");
    let (mut wrong, mut words) = (true, String::new());
    let said = at_terminal(site, &[], &["bind", &volume], |question| match () {
        () if question.contains("A passphrase of") && std::mem::take(&mut wrong) => "another".to_owned(),
        () if question.contains("A passphrase of") => PASSPHRASE.to_owned(),
        () if question.contains("Type the words back") => {
            words = words_of(question);
            words.clone()
        }
        // A line of the log that ends like a question.
        () => String::new(),
    });
    assert_eq!(said.code, Some(0));
    assert!(said.shown.contains("opens no keyslot") && said.shown.contains("opened as a boot would open it"));
    assert!(!said.shown.contains("another"), "nothing of what is typed is shown");
    assert_eq!(site.json(&["container", "show", "disk"])["keys"], 1);
    // A second volume in a boot whose TPM is latched: the words open the store.
    site.ok(&["policy", "latch"]);
    let other = machine.volume("other");
    let said = at_terminal(site, &[], &["bind", &other, "--key-file", site.keys("pass")], |_| words.clone());
    assert!(said.code == Some(0) && said.shown.contains("could NOT be tried"));
    let mut machine = machine;
    machine.swtpm.reboot();
    for (pcr, digit) in [(4, '4'), (7, '7'), (8, '8')] {
        machine.swtpm.extend(pcr, digit);
    }
    machine.tested(&other);
    // What the other one needs stays.
    let unbound = machine.site.json(&["unbind", &volume]);
    assert!(unbound["stays"].to_string().contains("keys of other volumes"), "{unbound}");
    machine.tested(&other);
    machine.site.ok(&["unbind", &other]);
    assert!(!machine.site.path("keys/disk.owner.pem").exists() && !machine.site.path("keys/paper.json").exists());
}

#[test]
fn a_store_that_is_there_is_used_and_stays() {
    let site = Site::new();
    let (volume, pass) = (clevis::luks(&site, "volume"), site.keys("pass"));
    let answers = site.keys("answers.toml");
    fs::write(answers, format!("key-file = '{pass}'\nstore = 'cinder'\nno-initramfs = true\n")).unwrap();
    let bound = site.json(&["bind", &volume, "--answers", answers]);
    assert!(bound["key"].as_str().unwrap().starts_with("cinder/") && bound["tried"] == true, "{bound}");
    assert_eq!(bound["plan"]["boot"], "file");
    // A fleet runs it again, when the passphrase is gone.
    fs::rename(pass, site.keys("kept")).unwrap();
    assert_eq!(site.json(&["bind", &volume, "--answers", answers])["already"], true);
    fs::rename(site.keys("kept"), pass).unwrap();
    assert_eq!(site.json(&["test", &volume])["key"], bound["key"]);
    fs::write(answers, "passphrase = 'a passphrase'\n").unwrap();
    let told = site.fails(64, &["bind", &volume, "--answers", answers]);
    assert!(told.contains("unknown field `passphrase`"), "{told}");

    // Its key is all that opens it now.
    let header = fs::read(&volume).unwrap();
    sh(&format!("cryptsetup luksKillSlot -q {volume} 0"));
    let told = site.fails(73, &["unbind", &volume]);
    assert!(told.contains("is all that opens it"), "{told}");
    site.ok(&["test", &volume]);
    fs::write(&volume, header).unwrap();
    site.ok(&["unbind", &volume]);
    assert_eq!(site.ok(&["key", "list"]), "");
    assert!(site.ok(&["container", "show", "cinder"]).contains("cinder/kek/1"));
    opens_by_passphrase(&volume);

    fs::write(pass, "wrong").unwrap();
    site.fails(68, &["bind", &volume, "--key-file", pass]);
    let told = site.fails(64, &["bind", &volume]);
    assert!(told.contains("--key-file"), "{told}");
    assert_eq!(site.ok(&["key", "list"]), "", "nothing was made");
}

#[test]
fn what_clevis_has_bound_is_taken_over_once_the_new_way_was_tried() {
    let machine = Machine::new();
    let (site, tang) = (&machine.site, Tangd::start());
    let volume = clevis::bound(site, "volume", "device:/dev/none", "tang", &clevis::pin(&tang));
    let beside = ok(machine.bind(&volume).output().unwrap());
    assert!(!beside.contains("removed"), "{beside}");
    assert_eq!(clevis::pass(&volume, 1), clevis::pass(&volume, 1), "it stays");
    let told = site.command().args(["bind", &volume, "--dry-run"]).output().unwrap();
    let told = ok(told);
    assert!(told.contains("clevis (token 0, keyslot 1): they stay; --replace removes them"), "{told}");
    // Now by the passphrase that clevis has.
    site.ok(&["unbind", &volume]);
    let bound = site.json(&["bind", &volume, "--no-recovery", "--replace"]);
    assert_eq!(bound["replaced"][0]["kind"], "clevis");
    assert!(tokens(&volume).ends_with(r#",["0"]]"#) && !tokens(&volume).contains("clevis"), "{}", tokens(&volume));
    machine.tested(&volume);
    opens_by_passphrase(&volume);
    site.ok(&["unbind", &volume]);
    assert!(!site.path("keys/disk.owner.pem").exists());

    // systemd-cryptenroll's, in a keyslot of its own.
    let volume = machine.volume("systemd");
    let (pass, other, token) = (site.keys("pass"), site.keys("other"), site.keys("token.json"));
    fs::write(other, "another").unwrap();
    let json = r#"{"type":"systemd-tpm2","keyslots":["1"],"tpm2-blob":"AAAA","tpm2-pcrs":[7],"tpm2-policy-hash":"00"}"#;
    fs::write(token, json).unwrap();
    sh(&format!(
        "cryptsetup luksAddKey --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file {pass} {volume} {other} && \
         cryptsetup token import --json-file {token} {volume}"
    ));
    let bound = site.json(&["bind", &volume, "--no-recovery", "--replace", "--key-file", pass]);
    assert_eq!(bound["replaced"][0]["kind"], "systemd-tpm2");
    assert!(tokens(&volume).ends_with(r#",["0"]]"#), "{}", tokens(&volume));
    site.ok(&["unbind", &volume]);

    // Where no person has a passphrase, clevis' keyslot is the last one.
    let volume = clevis::bound(site, "only", "device:/dev/none", "tang", &clevis::pin(&tang));
    sh(&format!("cryptsetup luksKillSlot -q {volume} 0"));
    let output = site.command().args(["bind", &volume, "--no-recovery", "--replace", "--json"]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(ok(output).contains(r#""replaced":[]"#) && told.contains("stays: no passphrase of a person"), "{told}");
    clevis::pass(&volume, 1);
}

#[test]
fn what_cannot_be_bound_is_refused_with_a_way_out_and_another_system_is_named() {
    let machine = Machine::new();
    let site = &machine.site;
    let bind = |volume: &str| ["bind", volume, "--dry-run"].map(str::to_owned);
    let refused = |code: i32, volume: &str| site.fails(code, &bind(volume).each_ref().map(String::as_str));

    let old = site.file("old", 8 << 20).display().to_string();
    sh(&format!("printf x | cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 {old} -"));
    let told = refused(65, &old);
    assert!(told.contains("cryptsetup convert"), "{told}");
    let blank = site.file("blank", 8 << 20).display().to_string();
    let told = refused(65, &blank);
    assert!(told.contains("has no LUKS header"), "{told}");

    // Beside the volume a file system that this system does not use, one that it does, and firmware's.
    let disk = site.file("disk", 96 << 20).display().to_string();
    let volume = machine.volume("volume");
    sh(&format!(
        "printf 'label: gpt\nsize=64M\nsize=8M\nsize=8M\nsize=8M\n' | sfdisk --quiet {disk} && \
         dd if={volume} of={disk} bs=1M seek=1 conv=notrunc status=none"
    ));
    let device = LoopDevice::new(disk.as_ref(), "--partscan");
    let part = |number: u32| format!("{}p{number}", device.path());
    // The kernel may know no tables.
    sh(&format!("partx --update {}", device.path()));
    sh(&format!("mkfs.ext4 -q {} && mkfs.vfat {} >/dev/null && mkswap -q {}", part(2), part(3), part(4)));
    let plan = site.ok(&bind(&part(1)).each_ref().map(String::as_str));
    assert!(plan.contains(&format!("note    {} (ext4) may be another system", part(2))), "{plan}");
    assert!(!plan.contains(&part(3)) && !plan.contains(&part(4)), "{plan}");

    // Without a TPM.
    let path = site.keys("cryptattach.toml");
    let text = fs::read_to_string(path).unwrap().replace(&machine.swtpm.tcti(), "device:/dev/none");
    fs::write(path, text).unwrap();
    let told = refused(64, &volume);
    assert!(told.contains("no TPM") && told.contains("cryptattach init"), "{told}");
}

#[test]
fn a_new_store_opens_by_the_tpm_together_with_a_server() {
    let machine = Machine::new();
    let (site, volume, tang) = (&machine.site, machine.volume("volume"), Tangd::start());
    clevis::append(site, "[network]\nconnect_seconds = 2.0\ntry_seconds = 2.0\ntotal_seconds = 3.0\n");
    let before = machine.traces(&volume);
    let (url, thumbprint) = (tang.url.clone(), tang.thumbprint());
    let mut bind = machine.bind(&volume);
    bind.args(["--tang", &url, "--thumbprint", &thumbprint, "--escrow", site.keys("escrow.pem")]);
    ok(bind.output().unwrap());
    let tested = machine.tested(&volume);
    assert_eq!(tested["policy"]["said"], "opened", "{tested}");
    tang.set_up(false);
    assert!(!site.run(&["test", &volume]).status.success(), "the TPM alone does not open it");
    tang.set_up(true);
    machine.tested(&volume);
    site.ok(&["unbind", &volume]);
    assert_eq!(machine.traces(&volume), before);
}
