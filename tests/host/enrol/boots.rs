//! What a boot leaves behind to the system that runs next: the host's own, or one that an attacker has brought along.

use std::process::Command;

use serde_json::Value;

use super::stage::{Host, Stage};
use crate::{
    site::{LoopDevice, sh},
    wiretap::Wiretap,
};

/// A host with volumes of its own, off and on again.
struct Victim<'s> {
    host: Host<'s>,
    root: String,
    home: String,
    /// Nothing opens it at a boot.
    data: String,
}

/// What somebody has who is root after the boot.
#[derive(Debug, PartialEq, Eq)]
struct Loot {
    /// Exit code of `lockbox open`.
    open: String,
    /// Lockbox keys in the kernel's keyring, before and after that.
    keys: String,
    /// Exit code of `attach`, with the disk of the volume `data`.
    attach: String,
    /// PCR 15 is as after power-on.
    latched: bool,
}

impl Loot {
    /// Nothing of the host's.
    fn nothing() -> Self {
        Self { open: "79".to_owned(), keys: "0 0".to_owned(), attach: "68".to_owned(), latched: true }
    }

    /// What the host's own system has.
    fn all() -> Self {
        Self { open: "0".to_owned(), keys: "1 1".to_owned(), attach: "0".to_owned(), latched: true }
    }
}

impl<'s> Victim<'s> {
    fn new(stage: &'s Stage) -> Self {
        let mut host = stage.host("compute-7");
        stage.enrols(&host);
        host.ok(&["lockbox", "open"]);
        let [root, home, data] = ["root.img", "home.img", "data.img"].map(|name| host.volume(name));
        host.reboots();
        Self { host, root, home, data }
    }

    /// A disk of the attacker's: a volume of his own with the UUID of `root`, and with its token if that is wanted.
    fn copy(&self, name: &str, token: bool) -> String {
        let (evil, root) = (self.host.file(name), &self.root);
        let token = if token {
            format!(" && cryptsetup token export --token-id 0 {root} | cryptsetup token import --token-id 0 {evil}")
        } else {
            String::new()
        };
        sh(&format!(
            "rm -f {evil} && truncate -s 4M {evil} && printf attacker | cryptsetup luksFormat -q --type luks2 \
             --luks2-metadata-size 16k --luks2-keyslots-size 256k --uuid $(cryptsetup luksUUID {root}) \
             --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {evil} -{token}"
        ));
        evil
    }

    /// Runs a script in the host's next boot, which has a /run/cryptattach of its own; what it prints and says.
    ///
    /// `ca` is cryptattach with the host's configuration, which has `boot` in `[boot]`; `loot` is what somebody does who is root
    /// then.
    fn runs(&self, config: &str, boot: &str, script: &str) -> String {
        let Self { host, data, .. } = self;
        let settings = format!("[boot]\nprompt_after_seconds = 60\ntotal_seconds = 20\n{boot}");
        let text = std::fs::read_to_string(config).unwrap();
        std::fs::write(host.file("booting.toml"), format!("{text}\n{settings}\n")).unwrap();
        let (booting, name, tcti) = (host.file("booting.toml"), host.name(), host.swtpm.tcti());
        let ca = env!("CARGO_BIN_EXE_cryptattach");
        let script = format!(
            "for own in /run/cryptattach /dev/disk/by-cryptattach; do
                mkdir -p $own; mount -t tmpfs -o mode=0755 none $own
            done
            cd {folder}
            export TPM2TOOLS_TCTI={tcti}
            ca() {{ {ca} --config {booting} \"$@\"; }}
            pcr15() {{ tpm2_pcrread sha256:15 | tail -n1; }}
            keys() {{ keyctl show @u | grep -c cryptattach:lockbox:{name} || true; }}
            loot() {{
                echo \"PCR15 $(pcr15)\"
                before=$(keys)
                ca lockbox open >opened 2>&1 && open=0 || open=$?
                echo \"KEYS $before $(keys)\"; echo \"OPEN $open\"; cat opened
                ca attach {data} stolen --backend userspace >attached 2>&1 && attach=0 || attach=$?
                echo \"ATTACH $attach\"; cat attached
                ! [ $attach = 0 ] || ca detach stolen
            }}
            {script}
            ca detach root >/dev/null 2>&1 || true",
            folder = host.file(""),
        );
        let output =
            Command::new("unshare").args(["-m", "--propagation", "private", "bash", "-euc", &script]).output().unwrap();
        let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(output.status.success(), "{said}");
        println!("{said}");
        said
    }

    /// Boots with this crypttab, which has `L` for the loop device of this disk; then what the next system has.
    fn boots(&self, crypttab: &str, disk: &str) -> (String, Loot) {
        let disk = LoopDevice::new(disk.as_ref(), "");
        std::fs::write(self.host.file("crypttab"), crypttab.replace('L', disk.path())).unwrap();
        let script = "ca boot --crypttab crypttab && rc=0 || rc=$?; echo \"BOOT $rc\"; loot";
        let said = self.runs(&self.host.file("cryptattach.toml"), "", script);
        let loot = loot(&said);
        (said, loot)
    }
}

fn word(said: &str, name: &str) -> String {
    let line = said.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("{name}: {said}"));
    line.trim().to_owned()
}

fn loot(said: &str) -> Loot {
    let latched = !word(said, "PCR15 ").ends_with(&"0".repeat(64));
    Loot { open: word(said, "OPEN "), keys: word(said, "KEYS "), attach: word(said, "ATTACH "), latched }
}

#[test]
fn a_boot_of_an_attackers_disk_leaves_nothing_to_his_system() {
    let stage = Stage::new();
    let mut victim = Victim::new(&stage);
    let (bare, tokened) = (victim.copy("bare.img", false), victim.copy("tokened.img", true));
    let blank = victim.host.file("blank.img");
    sh(&format!("truncate -s 4M {blank}"));
    let root = victim.root.clone();
    let attacks = [
        ("a volume of the same UUID without our token", "root L none luks\n", &bare, 0),
        ("a volume of the same UUID with our token", "root L none luks\n", &tokened, 81),
        ("a disk that is no volume", "root L none luks\n", &blank, 0),
        ("no volume at all", "", &bare, 0),
        ("a disk that was pulled", "root /dev/none none luks,nofail\n", &bare, 0),
        (
            "the host's own disk, and another that was pulled",
            "root L none luks\nhome /dev/none none luks,nofail\n",
            &root,
            0,
        ),
    ];
    for (what, crypttab, disk, code) in attacks {
        println!("--- {what}");
        victim.host.reboots();
        let (said, loot) = victim.boots(crypttab, disk);
        assert_eq!(word(&said, "BOOT "), code.to_string(), "{what}");
        assert_eq!(loot, Loot::nothing(), "{what}");
    }
}

#[test]
fn a_boot_of_the_hosts_own_disk_leaves_the_lockbox_open_and_says_what_it_opened() {
    let stage = Stage::new();
    let victim = Victim::new(&stage);
    let disk = LoopDevice::new(victim.root.as_ref(), "");
    std::fs::write(victim.host.file("crypttab"), format!("root {} none luks\n", disk.path())).unwrap();
    let script = "ca boot --crypttab crypttab; echo \"BEFORE $(pcr15)\"
        # The scripts of the initramfs run this however the boot ended.
        ca boot --finish; cp /run/cryptattach/boot.json record; loot; ca explain";
    let said = victim.runs(&victim.host.file("cryptattach.toml"), "", script);
    assert_eq!(loot(&said), Loot::all());
    assert_eq!(word(&said, "BEFORE "), word(&said, "PCR15 "), "extended once");
    assert!(said.contains("root was attached, by cinder/") && said.contains("PCR 15 is extended, by what was opened"));

    // Whoever has the record can check what the TPM has: SHA-256 of its old value and of the event's digest.
    let record: Value = serde_json::from_slice(&std::fs::read(victim.host.file("record")).unwrap()).unwrap();
    let (event, value) = (record["latch"]["event"].as_str().unwrap(), record["latch"]["value"].as_str().unwrap());
    assert_eq!(record["latch"]["measured"], true, "{record}");
    let uuid = sh(&format!("cryptsetup luksUUID {}", victim.root));
    assert!(event.contains(&format!(" cryptsetup:root:{uuid}:")), "{event}");
    let extended = openssl::sha::sha256(&[&[0; 32][..], &openssl::sha::sha256(event.as_bytes())].concat());
    assert_eq!(value, cryptattach::base::hex::encode(&extended));
    assert!(word(&said, "PCR15 ").to_lowercase().ends_with(value), "{said}");
}

#[test]
fn a_volume_that_was_attached_before_is_proven_only_if_this_boot_attached_it() {
    let stage = Stage::new();
    let mut victim = Victim::new(&stage);
    let admin = format!("{} --config {}", env!("CARGO_BIN_EXE_cryptattach"), stage.keys("cryptattach.toml"));
    let (root, home) = (LoopDevice::new(victim.root.as_ref(), ""), LoopDevice::new(victim.home.as_ref(), ""));
    let crypttab = format!("root {} none luks\nhome {} none luks\n", root.path(), home.path());
    std::fs::write(victim.host.file("crypttab"), crypttab).unwrap();
    let config = victim.host.file("cryptattach.toml");
    let attach = format!("{admin} attach {} root --backend userspace >/dev/null", root.path());
    let boot = "ca boot --crypttab crypttab; ca detach home; loot";
    let said = victim.runs(&config, "", &format!("{attach}; {boot}"));
    assert_eq!(loot(&said), Loot::nothing());
    assert!(said.contains("the lockbox was closed: nothing proves that this host's own volume was opened as root"));
    let audit = std::fs::read_to_string(victim.host.file("audit")).unwrap();
    assert!(audit.contains("\"action\":\"lockbox close\""), "{audit}");

    // Started twice, as a unit may be.
    victim.host.reboots();
    let said = victim.runs(&config, "", &format!("ca boot --crypttab crypttab; {boot}"));
    assert_eq!(loot(&said), Loot::all());
    assert!(said.contains("root is attached, by an earlier run"), "{said}");
}

#[test]
fn a_boot_that_is_ended_by_a_signal_leaves_nothing_open() {
    let stage = Stage::new();
    let mut victim = Victim::new(&stage);
    let disk = LoopDevice::new(victim.root.as_ref(), "");
    let crypttab = format!("root {} none luks\nhome /dev/none none luks\n", disk.path());
    std::fs::write(victim.host.file("crypttab"), crypttab).unwrap();
    let config = victim.host.file("cryptattach.toml");
    let start = |signal: &str| {
        format!(
            "{} --config booting.toml boot --crypttab crypttab & boot=$!
            until grep -q 'root is attached' /run/cryptattach/boot.log; do sleep 0.1; done
            kill -{signal} $boot; wait $boot && rc=0 || rc=$?; echo \"BOOT $rc\"",
            env!("CARGO_BIN_EXE_cryptattach")
        )
    };
    for (signal, code) in [("TERM", "81"), ("INT", "81"), ("HUP", "81")] {
        let said = victim.runs(&config, "", &format!("{}; loot", start(signal)));
        assert_eq!((word(&said, "BOOT ").as_str(), loot(&said)), (code, Loot::nothing()), "{signal}");
        victim.host.reboots();
    }
    // This one leaves all to the initramfs' script.
    let said = victim.runs(&config, "", &format!("{}; keys; ca boot --finish; loot", start("KILL")));
    assert_eq!((word(&said, "BOOT ").as_str(), loot(&said)), ("137", Loot::nothing()));
    assert!(said.contains("the lockbox was closed: the boot was ended before it was done"), "{said}");
    // So it does where the boot never came to be.
    victim.host.reboots();
    victim.host.ok(&["--config", &victim.host.unlatched(), "lockbox", "open"]);
    assert_eq!(loot(&victim.runs(&config, "", "ca boot --finish; loot")), Loot::nothing());
}

#[test]
fn a_latch_that_is_swallowed_on_the_wires_closes_the_lockbox_and_stops_a_boot_that_requires_it() {
    let stage = Stage::new();
    let mut victim = Victim::new(&stage);
    let disk = LoopDevice::new(victim.root.as_ref(), "");
    std::fs::write(victim.host.file("crypttab"), format!("root {} none luks\n", disk.path())).unwrap();
    let boot = "ca boot --crypttab crypttab && rc=0 || rc=$?; echo \"BOOT $rc\"; echo \"KEYS $(keys)\"
        ca boot --finish && rc=0 || rc=$?; echo \"FINISH $rc\"; ca explain";
    for (latch, code) in [("true", "0"), ("\"required\"", "82")] {
        let tap = Wiretap::on(&victim.host.swtpm.socket());
        tap.swallow_the_latch();
        victim.host.configure(&format!("latch = {latch}\n"));
        let said = victim.runs(&victim.host.by_tcti("tapped.toml", &tap.tcti()), "", boot);
        assert_eq!([word(&said, "BOOT "), word(&said, "FINISH "), word(&said, "KEYS ")], [code, code, "0"]);
        assert!(said.contains("root is attached, by cinder/"), "{said}");
        assert!(said.contains("PCR 15 is not extended: the TPM refuses PCR_Extend"), "{said}");
        assert!(said.contains("the lockbox was closed: PCR 15 is not extended"), "{said}");
        victim.host.reboots();
    }
    // Somebody between at one time only: the script's second try proves it.
    let once = format!(
        "ca boot --crypttab crypttab || true; sed -i s#tcti.*#tcti=\\'$TPM2TOOLS_TCTI\\'# booting.toml; {boot}"
    );
    let tap = Wiretap::on(&victim.host.swtpm.socket());
    tap.swallow_the_latch();
    let said = victim.runs(&victim.host.by_tcti("tapped.toml", &tap.tcti()), "", &format!("{once}; loot"));
    assert_eq!((word(&said, "FINISH ").as_str(), loot(&said).latched), ("0", true));
    // The verb, too.
    victim.host.reboots();
    let tap = Wiretap::on(&victim.host.swtpm.socket());
    tap.swallow_the_latch();
    let tapped = victim.host.by_tcti("tapped.toml", &tap.tcti());
    let refused = victim.host.fails(79, &["--config", &tapped, "lockbox", "open"]);
    assert!(refused.contains("was closed again: PCR 15 is not extended"), "{refused}");
    assert!(!victim.host.has_lockbox_key());
}

#[test]
fn a_host_without_its_tpm_boots_and_says_that_nothing_is_latched() {
    let stage = Stage::new();
    let victim = Victim::new(&stage);
    let bare = LoopDevice::new(victim.copy("bare.img", false).as_ref(), "");
    std::fs::write(victim.host.file("crypttab"), format!("root {} none luks\n", bare.path())).unwrap();
    let away = victim.host.by_tcti("away.toml", "device:/dev/none");
    let said = victim.runs(&away, "", "ca boot --crypttab crypttab; echo \"BOOT $?\"");
    assert_eq!(word(&said, "BOOT "), "0");
    assert!(said.contains("PCR 15 is not extended: there is no TPM /dev/none"), "{said}");
}

/// The attacker leaves the host's disks where they are, and puts in one whose file system has the UUID that `root=` names.
#[test]
fn a_root_file_system_that_is_not_on_the_hosts_own_volume_gets_neither_lockbox_nor_volumes() {
    let stage = Stage::new();
    let mut victim = Victim::new(&stage);
    let disk = LoopDevice::new(victim.root.as_ref(), "");
    std::fs::write(victim.host.file("crypttab"), format!("root {} none luks\n", disk.path())).unwrap();
    let config = victim.host.file("cryptattach.toml");
    let boot = "ca boot --crypttab crypttab; device=$(ca status root --json | sed 's/.*\"device\":\"//; s/\".*//'); mkdir -p mnt";
    let own = "mke2fs -q -t ext4 $device; mount $device mnt; ca boot --finish --root mnt; umount mnt; loot";
    let said = victim.runs(&config, "", &format!("{boot}; {own}"));
    assert_eq!(loot(&said), Loot::all());

    let theirs = "truncate -s 4M theirs; mke2fs -q -t ext4 theirs; mount -o loop theirs mnt; ca boot --finish --root mnt; umount mnt
        ca status root && echo 'ROOT is there' || echo 'ROOT is away'; loot; ca explain";
    for (what, script) in [("another disk", theirs), ("none", "ca boot --finish --root none; loot")] {
        victim.host.reboots();
        let said = victim.runs(&config, "", &format!("{boot}; {script}"));
        assert_eq!(loot(&said), Loot::nothing(), "{what}");
        assert!(said.contains("root was detached: the root file system in"), "{what}: {said}");
        assert!(what == "none" || said.contains("ROOT is away"), "{said}");
    }
}
