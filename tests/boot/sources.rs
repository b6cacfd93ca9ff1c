//! Where a root's key may come from besides a disk or a store on the network: the TPM's own memory, and policies over the TPM
//! and Tang servers that are killed and revived.

use std::{
    fs,
    net::TcpListener,
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
};

use crate::{
    Story,
    machine::{Machine, Parts, STATIC},
    site::{Initrd, PASSPHRASE, Site, UUID},
    stories::{self, boots, boots_by_the_system, is_latched, silent, volume},
    token_program,
};

pub const STORIES: &[Story] = &[
    ("the TPM's own memory opens the root of a machine with one disk", one_disk),
    ("dracut: the TPM's own memory opens the root of a machine with one disk", dracut_one_disk),
    ("a disk that was moved to another machine opens nothing and says why", moved_disk),
    ("a TPM that was cleared opens nothing and says so", cleared),
    ("a stick that is plugged in opens the root instead of a TPM that was cleared", stick_instead),
    ("the TPM's memory and a Tang server open the root together", with_server),
    ("without its Tang server a person is asked, and the server opens the root when it comes back", revived_server),
    ("the TPM and two of three Tang servers open the root exactly if they are there", subsets),
    ("two of a TPM and two Tang servers are enough, whichever is dead", any_two),
];

const TANGD: &str = "/usr/libexec/tangd";
const PROMPT: &str = "Please unlock disk root (it is being opened automatically, too): ";

/// The root's keys in stores whose policies take the TPM in `tpm/chip`, Tang servers, or both.
pub struct Sources {
    /// In the TPM's memory, for its key.
    disk: String,
    /// There as well, for that key and one server.
    both: String,
    /// In a directory on a stick, for that key and two of three servers.
    two: String,
    /// There as well, for two of that key and two servers.
    any: String,
}

impl Sources {
    fn key(&self, store: &str) -> &str {
        match store {
            "disk" => &self.disk,
            "both" => &self.both,
            "two" => &self.two,
            BAO | ALL => BAO_KEY,
            TOKEN => TOKEN_KEY,
            _ => &self.any,
        }
    }
}

/// The configuration's sections of a store; the machine's, or with `identities` of another.
fn store(name: &str, identity: &str) -> String {
    let opens = match name {
        BAO => return BAO_SECTIONS.to_owned(),
        TOKEN => {
            return format!(
                "[stores.token]\ntype = 'directory'\npath = '/mnt/keys/any'\nopens = 'any(escrow, hsm)'\n\
                 escrow = 'escrow.pem'\n{HSM}"
            );
        }
        ALL => return format!("{BAO_SECTIONS}opens = 'any(escrow, 3 of (tpm, t1, vault, hsm))'\n{VAULT}{HSM}"),
        "disk" => {
            return format!(
                "[stores.disk]\ntype = 'tpm-nv'\nowner = 'host.pem'\nescrow = 'escrow.pem'\nidentities = ['{identity}']\n"
            );
        }
        "both" => "type = 'tpm-nv'\nopens = 'any(escrow, all(tpm, t1))'",
        "two" => "type = 'directory'\npath = '/mnt/keys/two'\nopens = 'any(escrow, all(tpm, 2 of (t1, t2, t3)))'",
        _ => "type = 'directory'\npath = '/mnt/keys/any'\nopens = 'any(escrow, 2 of (tpm, t1, t2))'",
    };
    format!("[stores.{name}]\n{opens}\nescrow = 'escrow.pem'\nidentities = ['{identity}']\n")
}

/// What the administrator's configuration has besides.
const OWN: &str = "state = 'state'\n[audit]\nfile = 'audit'\n";
/// The leaves, whose servers the machine finds at 10.0.2.100 and the next addresses.
const LEAVES: &str = "[leaves.tpm]\npublic = 'host.pem'\n[leaves.t1]\ntang = 'http://10.0.2.100:443'\n\
    [leaves.t2]\ntang = 'http://10.0.2.101:443'\n[leaves.t3]\ntang = 'http://10.0.2.102:443'\n";
const STICK: &str =
    "[boot]\nprompt_after_seconds = 10\n[[boot.mounts]]\ndevice = 'LABEL=keys'\nat = '/mnt/keys'\ntype = 'ext4'\n";
/// PCR 14 is the same in all of these machines: what they boot is the lockbox's stories' matter.
const TPM: &str = "[tpm]\nidentity = 'host.tpm.pem'\npcrs = [14]\n";

/// What the machine's administrator has done. Sealing asks no server, and the escrow's key opens what is sealed anew.
fn make(site: &Site) -> Sources {
    site.sh("mkdir -p chip/stick tpm/chip");
    let stores: String = ["both", "two", "any"].map(|name| store(name, "escrow.key")).concat();
    fs::write(site.file("chip/host.toml"), format!("{OWN}{TPM}")).unwrap();
    fs::write(site.file("chip/policies.toml"), format!("{}{LEAVES}", stores.replace("/mnt/keys", "stick"))).unwrap();
    (1..=3).for_each(|number| pin(site, number));
    let references = with_chip(
        site,
        "chip",
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out escrow.key
        openssl pkey -in escrow.key -pubout -out escrow.pem
        host=\"$CRYPTATTACH --config host.toml\"
        $host host join --output request >&2
        $host init --store disk --tpm-nv --escrow escrow.pem >&2
        mv disk.owner.pem host.pem && sed -i s/disk.owner.pem/host.pem/ host.toml && cat policies.toml >>host.toml
        for store in disk both two any; do
            [ $store = disk ] || $host container create $store >&2
            $host key import --key-file $TREE/passphrase --allow-shared --store $store ../root.img
        done",
    );
    site.sh("mkdir -p chip/host/etc/cryptattach chip/host/var/lib && cd chip
        cp host.pem host.tpm.pem escrow.pem host/etc/cryptattach/
        cp -r state host/var/lib/cryptattach
        mke2fs -q -t ext4 -L keys -d stick stick.img 8M");
    let mut references = references.lines().map(str::to_owned);
    let [disk, both, two, any] = std::array::from_fn(|_| references.next().unwrap());
    Sources { disk, both, two, any }
}

/// Runs a script in the folder `chip`, with the TPM whose state is in `tpm/STATE`.
fn with_chip(site: &Site, state: &str, script: &str) -> String {
    site.sh(&format!(
        "cd chip && tpm=$PWD/../tpm/socket
        swtpm socket --tpm2 --tpmstate dir=../tpm/{state} --server type=unixio,path=$tpm --ctrl type=unixio,path=$tpm.ctrl \
            --flags not-need-init,startup-clear >/dev/null 2>&1 & swtpm=$!
        trap 'kill $swtpm; wait $swtpm || true' EXIT
        for i in $(seq 100); do [ -e $tpm ] && break; sleep 0.1; done
        export CRYPTATTACH_TCTI=swtpm:path=$tpm TPM2TOOLS_TCTI=swtpm:path=$tpm
        {script}"
    ))
}

/// Makes a Tang server's keys, and has its advertisement confirmed by its thumbprint, as on the day when it is set up.
fn pin(site: &Site, number: usize) {
    let keys = site.file(&format!("chip/tang{number}"));
    site.sh(&format!("mkdir {0} && {TANGD}-keygen {0}", keys.display()));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let leaf = format!("{OWN}[leaves.t{number}]\ntang = 'http://{}'\n", listener.local_addr().unwrap());
    fs::write(site.file("chip/pin.toml"), leaf).unwrap();
    let server = thread::spawn(move || {
        let stream = listener.accept().unwrap().0;
        let input = OwnedFd::from(stream.try_clone().unwrap());
        Command::new(TANGD)
            .arg(keys)
            .stdin(input)
            .stdout(OwnedFd::from(stream))
            .stderr(Stdio::null())
            .status()
            .unwrap();
    });
    site.sh(&format!(
        "cd chip && for key in tang{number}/*.jwk; do
            jose fmt -j $key -g key_ops -Af- | grep -q verify || continue
            $CRYPTATTACH --config pin.toml leaf pin t{number} --thumbprint $(jose jwk thp -a S256 -i $key) >&2
        done"
    ));
    server.join().unwrap();
}

fn sources(site: &Site) -> &Sources {
    site.sources.get_or_init(|| make(site))
}

/// What weighs what: a source of keys, and the store that has it.
pub const KINDS: [(&str, &str); 6] = [
    ("the TPM's own memory", "disk"),
    ("the same and a Tang server", "both"),
    ("TPM, Tang servers, a stick", "two"),
    ("an OpenBao server and the TPM", BAO),
    ("a PKCS#11 token (SoftHSM), a stick", TOKEN),
    ("OpenBao, a token, Tang and the TPM", ALL),
];
/// Only their initramfs is made: the host layer has the server and the token.
const BAO: &str = "bao";
const TOKEN: &str = "token";
const ALL: &str = "all";
const BAO_SECTIONS: &str = "[servers.main]\nbao = ['https://10.0.2.100:443']\nca = 'ca.pem'\n\
    approle = { role_id = 'role_id', secret_id = 'secret_id' }\n\
    [stores.bao]\ntype = 'bao'\nserver = 'main'\npath = 'kv/cryptattach/keys'\nowner = 'host.pem'\n\
    escrow = 'escrow.pem'\nidentities = ['tpm:host.tpm.pem']\n";
const BAO_KEY: &str = "bao/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de";
const TOKEN_KEY: &str = "token/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de";
const VAULT: &str = "[leaves.vault]\ntransit = 'owner'\nserver = 'main'\npublic = 'vault.pem'\n";
const HSM: &str = "[leaves.hsm]\npkcs11 = 'pkcs11:token=owner;object=ec'\nmodule = '/usr/lib/softhsm/libsofthsm2.so'\n\
    public = 'hsm.pem'\n";

/// The initramfs NAME of a machine whose root is to be opened out of one of the stores.
pub fn initrd(site: &Site, name: &str, maker: &str, store: &str) -> PathBuf {
    made(site, name, maker, store).path
}

fn made(site: &Site, name: &str, maker: &str, of: &str) -> Initrd {
    let key = sources(site).key(of);
    site.sh(&format!("mkdir -p {name}.files && cp -r chip/host/. {name}.files/"));
    if [BAO, ALL].contains(&of) {
        ["role_id", "secret_id"].iter().for_each(|file| site.add(name, &format!("etc/cryptattach/{file}"), "a UUID\n"));
    }
    if [TOKEN, ALL].contains(&of) {
        with_token(site, name);
    }
    let (leaves, mount) = match of {
        "disk" | BAO => ("", ""),
        "both" | ALL => (LEAVES, ""),
        TOKEN => ("", STICK),
        _ => (LEAVES, STICK),
    };
    let sections = [volume("root", UUID, &[key]), store(of, "tpm:host.tpm.pem"), TPM.to_owned()].concat();
    let initrd = site.initrd_by(maker, name, &format!("{sections}{leaves}{mount}"));
    assert!(!initrd.doctor.contains("unfit"), "{}\n{}", initrd.warnings, initrd.doctor);
    initrd
}

/// What a machine with a token has besides: the program that asks it, a module, and the public keys of the leaves.
fn with_token(site: &Site, name: &str) {
    let program = token_program::build().display();
    site.sh(&format!(
        "cd {name}.files && mkdir -p usr/libexec usr/lib/softhsm && cp /usr/lib/softhsm/libsofthsm2.so usr/lib/softhsm/
        cp {program} usr/libexec/ && strip usr/libexec/cryptattach-pkcs11 && mkdir -p etc/cryptattach && cd etc/cryptattach
        openssl ecparam -name prime256v1 -genkey -noout | openssl pkey -pubout -out hsm.pem
        openssl genrsa 2048 2>/dev/null | openssl pkey -pubout -out vault.pem"
    ));
}

/// A machine with that TPM and that initramfs.
fn machine(site: &Site, name: &str, maker: &str, of: &str) -> Parts {
    let initrd = made(site, name, maker, of);
    site.sh(&format!("cp -r tpm/chip tpm/{name}"));
    Parts { tpm: Some(site.file(&format!("tpm/{name}"))), append: "guest-shows=pcrs".into(), ..site.parts(&initrd) }
}

/// The same with a network card and the three Tang servers. One that is down closes what it takes.
fn networked(site: &Site, parts: Parts) -> Parts {
    let server = |number| {
        let (script, folder) = (format!("chip/server{number}"), site.file("chip"));
        let folder = folder.display();
        let text = format!("#!/bin/sh\n[ -e {folder}/up{number} ] && exec {TANGD} {folder}/tang{number} 2>/dev/null\n");
        fs::write(site.file(&script), text).unwrap();
        site.sh(&format!("chmod +x {script}"));
        site.file(&script).display().to_string()
    };
    Parts { servers: (1..=3).map(server).collect(), append: format!("{} {STATIC}", parts.append), ..parts }
}

/// From now on these servers answer, and the others do not.
fn set_up(site: &Site, up: [bool; 3]) {
    for (number, up) in (1..).zip(up) {
        site.sh(&format!("{} chip/up{number}", if up { "touch" } else { "rm -f" }));
    }
}

/// The machine's disk and initramfs with another TPM: the one whose state is in `tpm/STATE`.
fn with_tpm(site: &Site, parts: &Parts, state: &str) -> Parts {
    site.sh(&format!("mkdir -p tpm/{state}"));
    Parts { tpm: Some(site.file(&format!("tpm/{state}"))), ..parts.clone() }
}

fn one_disk(site: &Site, story: &str) {
    let key = &sources(site).disk;
    let parts = machine(site, "one-disk", "mkinitramfs", "disk");
    assert!(parts.servers.is_empty(), "it has no network card");
    let mut machine = site.start(story, &parts);
    let record = boots(&mut machine, key);
    println!("  by {key} after {} s", record["volumes"][0]["seconds"]);
    assert!(record["volumes"][0]["proven"].as_bool().unwrap(), "{record}");
    is_latched(&mut machine);
}

fn dracut_one_disk(site: &Site, story: &str) {
    let key = &sources(site).disk;
    let mut parts = machine(site, "dracut-one-disk", "dracut", "disk");
    parts.append = format!("rd.luks.name={UUID}=root rd.shell=0 {}", parts.append);
    let mut machine = site.start(story, &parts);
    let record = boots(&mut machine, key);
    assert!(record["volumes"][0]["proven"].as_bool().unwrap(), "{record}");
    is_latched(&mut machine);
}

const NO_KEY: &str =
    "which has no key of cryptattach at all: this is another TPM, or it was cleared (by the firmware's settings";

fn moved_disk(site: &Site, story: &str) {
    let parts = machine(site, "moved", "mkinitramfs", "disk");
    let mut machine = site.start(story, &with_tpm(site, &parts, "other"));
    machine.see(NO_KEY);
    let record = boots_by_the_system(&mut machine);
    assert_eq!(record["volumes"][0]["failures"][0]["reason"], 67, "{record}");
}

fn cleared(site: &Site, story: &str) {
    let parts = machine(site, "cleared", "mkinitramfs", "disk");
    with_chip(site, "cleared", "tpm2_clear -c platform");
    let mut machine = site.start(story, &parts);
    machine.see(NO_KEY);
    let record = boots_by_the_system(&mut machine);
    assert_eq!(record["volumes"][0]["failures"][0]["reason"], 67, "{record}");
}

fn stick_instead(site: &Site, story: &str) {
    let (disk, stick) = (&sources(site).disk, &site.stick);
    // As sticks are made in a shop.
    site.sh("mkfs.vfat -n KEYS -C vfat.img 8192 >&2; mcopy -s -i vfat.img keys/stick keys/stick.owner.key ::/");
    site.sh("mkdir -p instead.files tpm/empty && cp -r chip/host/. instead.files/");
    let on_stick = stories::STICK.replace("LABEL=keys", "LABEL=KEYS").replace("ext4", "vfat");
    let own = store("disk", "tpm:host.tpm.pem");
    let initrd = site.initrd("instead", &format!("{}{own}{TPM}{on_stick}", volume("root", UUID, &[disk, stick])));
    let mut machine = site.start(story, &Parts { tpm: Some(site.file("tpm/empty")), ..site.parts(&initrd) });
    machine.see(&format!("root: {disk}: "));
    machine.see(NO_KEY);
    machine.see(PROMPT);
    machine.plug("stick", &site.file("vfat.img"));
    let record = boots(&mut machine, stick);
    assert_eq!(record["volumes"][0]["failures"][0]["reason"], 67, "{record}");
}

fn with_server(site: &Site, story: &str) {
    let key = &sources(site).both;
    let parts = networked(site, machine(site, "both", "mkinitramfs", "both"));
    set_up(site, [true, false, false]);
    let mut machine = site.start(story, &parts);
    let record = boots(&mut machine, key);
    println!("  by {key} after {} s", record["volumes"][0]["seconds"]);
    is_latched(&mut machine);
}

fn revived_server(site: &Site, story: &str) {
    let key = &sources(site).both;
    let mut parts = networked(site, machine(site, "revived", "mkinitramfs", "both"));
    // It takes connections and says nothing.
    let server = std::mem::replace(&mut parts.servers[0], silent(site));
    let mut machine = site.start(&format!("{story} (silent)"), &parts);
    machine.see(PROMPT);
    machine.type_line(PASSPHRASE);
    let record = boots(&mut machine, "passphrase");
    let asked = record["prompt_after"].as_f64().unwrap();
    assert!((5.0..30.0).contains(&asked), "{record}");
    is_latched(&mut machine);
    // Its TPM is the next one's.
    drop(machine);

    parts.servers[0] = server;
    set_up(site, [false; 3]);
    let mut machine = site.start(story, &parts);
    machine.see(PROMPT);
    set_up(site, [true, false, false]);
    machine.see(&format!("root is attached, by {key}"));
    boots(&mut machine, key);
    is_latched(&mut machine);
}

/// Boots with these of TPM and servers, and expects that the policy opens the root, or that only a person does.
fn boots_with(site: &Site, story: &str, parts: &Parts, key: &str, (chip, up): (bool, [bool; 3]), opens: bool) {
    set_up(site, up);
    let parts = if chip { parts.clone() } else { Parts { tpm: None, append: STATIC.to_owned(), ..parts.clone() } };
    // Each has a log of its own.
    let there = [chip, up[0], up[1], up[2]].map(|up| if up { '+' } else { '-' });
    let mut machine: Machine = site.start(&format!("{story} {}", String::from_iter(there)), &parts);
    if !opens {
        machine.see(PROMPT);
        machine.type_line(PASSPHRASE);
    }
    let record = boots(&mut machine, if opens { key } else { "passphrase" });
    let (after, asked) = (&record["volumes"][0]["seconds"], &record["prompt_after"]);
    println!("  TPM {chip:5} t1, t2, t3 {up:?}: opens {opens:5} after {after} s, a person was asked after {asked} s");
    assert!(record["seconds"].as_f64() >= after.as_f64(), "of the whole boot, whatever was done again: {record}");
    // On a busy machine a person is asked before the policy is met, too.
    assert!(opens || !asked.is_null(), "{record}");
}

fn subsets(site: &Site, story: &str) {
    let key = &sources(site).two;
    let mut parts = networked(site, machine(site, "two", "mkinitramfs", "two"));
    parts.disks.push(("stick".to_owned(), site.file("chip/stick.img")));
    let cases = [
        ((true, [true, false, true]), true),
        ((true, [false, true, true]), true),
        ((true, [false, true, false]), false),
        ((false, [true, true, true]), false),
    ];
    for (subset, opens) in cases {
        boots_with(site, story, &parts, key, subset, opens);
    }
}

fn any_two(site: &Site, story: &str) {
    let key = &sources(site).any;
    let mut parts = networked(site, machine(site, "any", "mkinitramfs", "any"));
    parts.disks.push(("stick".to_owned(), site.file("chip/stick.img")));
    let cases = [
        ((true, [true, false, false]), true),
        ((true, [false, true, false]), true),
        ((false, [true, true, false]), true),
        ((true, [false, false, false]), false),
    ];
    for (subset, opens) in cases {
        boots_with(site, story, &parts, key, subset, opens);
    }
}
