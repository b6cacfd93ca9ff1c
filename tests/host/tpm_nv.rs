//! Keys in the TPM's NV memory (swtpm): a machine with one disk, writers that are killed, a memory that is full, a TPM that was
//! cleared.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    thread::sleep,
    time::Instant,
};

use cryptattach::{
    base::key::{KeyId, StoreName},
    config::Config,
    keys::store::{self, Current, KeyStore, StoreError},
};

use crate::{
    site::{LoopDevice, Site, sh},
    store_suite,
    tpm::Host,
    wiretap::{SUCCESS, Wiretap},
};

const TCTI: &str = "CRYPTATTACH_TCTI";
const ATTRIBUTES: &str = "ownerread|ownerwrite|authread|no_da|read_stclear";

/// A host whose keys are in its TPM, and whose owner's key is, too.
struct Machine {
    host: Host,
    site: Site,
}

impl Machine {
    fn new() -> Self {
        let machine = Self::without_store();
        let site = &machine.site;
        site.ok(&["init", "--store", "disk", "--tpm-nv", "--escrow", site.keys("escrow.pem")]);
        machine
    }

    fn without_store() -> Self {
        let host = Host::new();
        let machine = Self { site: host.site(), host };
        let tcti = machine.host.swtpm.tcti();
        machine.configure(&format!("[tpm]\ntcti = '{tcti}'\nidentity = 'host.tpm.pem'\n"));
        machine
    }

    fn configure(&self, text: &str) {
        let path = self.site.keys("cryptattach.toml");
        fs::write(path, format!("{}\n{text}", fs::read_to_string(path).unwrap())).unwrap();
    }

    /// A member of the store's section.
    fn set(&self, member: &str) {
        let path = self.site.keys("cryptattach.toml");
        let text = fs::read_to_string(path).unwrap();
        fs::write(path, text.replace("type = \"tpm-nv\"\n", &format!("type = \"tpm-nv\"\n{member}\n"))).unwrap();
    }

    fn store(&self) -> Box<dyn KeyStore> {
        let config = Config::read(self.site.keys("cryptattach.toml").as_ref()).unwrap();
        let name: StoreName = "disk".parse().unwrap();
        let store = config.store(&name).unwrap();
        store::open(&*store::kind(store).unwrap(), &name, store, None).unwrap()
    }

    fn volume(&self, name: &str) -> String {
        self.site.volume(name, &["--store", "disk"]).0
    }

    /// What `container show` says, as a number.
    fn shown(&self, member: &str) -> u64 {
        self.site.json(&["container", "show", "disk"])[member].as_u64().unwrap()
    }

    fn tool(&self, arguments: &str) -> String {
        self.host.swtpm.tool(&arguments.split(' ').collect::<Vec<_>>())
    }

    /// The NV indices of the store, in order.
    fn indices(&self) -> Vec<String> {
        let listed = self.tool("tpm2_getcap handles-nv-index");
        let indices = listed.lines().map(|line| line.trim_start_matches("- ").to_lowercase());
        indices.filter(|index| ("0x180ca80".."0x180cb00").contains(&&**index)).collect()
    }

    /// What is in an index, in a file.
    fn saved(&self, index: &str) -> PathBuf {
        let file = self.site.path(index);
        self.tool(&format!("tpm2_nvread -C {index} -o {} {index}", file.display()));
        file
    }

    /// An index of the store's with what is in a file.
    fn put(&self, index: &str, file: &Path) {
        let bytes = fs::metadata(file).unwrap().len();
        self.tool(&format!("tpm2_nvdefine -C o -s {bytes} -a {ATTRIBUTES} {index}"));
        self.tool(&format!("tpm2_nvwrite -C o -i {} {index}", file.display()));
    }
}

#[test]
fn the_tpm_conforms() {
    let machine = Machine::without_store();
    let site = &machine.site;
    sh(&format!(
        "cd {} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out owner.key 2>/dev/null && \
         openssl pkey -in owner.key -pubout -out owner.pem",
        site.keys("")
    ));
    machine.configure("[stores.s]\ntype = 'tpm-nv'\nowner = 'owner.pem'\nno_escrow = true\n");
    site.ok(&["container", "create", "s"]);
    let config = Config::read(site.keys("cryptattach.toml").as_ref()).unwrap();
    let name: StoreName = "s".parse().unwrap();
    let config = config.store(&name).unwrap();
    let store = store::open(&*store::kind(config).unwrap(), &name, config, None).unwrap();
    store_suite::conforms(site.keys("").as_ref(), &*store, true);
    assert_eq!(machine.indices().len(), 2, "the container key, and which it is");
    assert_eq!(machine.host.swtpm.leftovers(), "");
}

#[test]
fn a_store_in_the_tpm_is_for_the_key_in_the_tpm_unless_another_owner_is_named() {
    let machine = Machine::without_store();
    let site = &machine.site;
    let made = site.json(&["init", "--store", "disk", "--tpm-nv", "--no-escrow"]);
    assert_eq!(made["identity"], format!("tpm:{}", site.keys("host.tpm.pem")));
    assert_eq!(made["place"], "the TPM's NV memory");
    fs::remove_file(site.keys("host.tpm.pem")).unwrap();
    let told = site.fails(78, &["init", "--store", "other", "--tpm-nv", "--no-escrow"]);
    assert!(told.contains("this host has no key in its TPM") && told.contains("host join"), "{told}");
    assert!(!site.ok(&["container", "show", "disk"]).contains("other"));
    let owner = site.keys("escrow.pem");
    site.ok(&["init", "--store", "other", "--tpm-nv", "--no-escrow", "--owner", owner]);
    site.fails(64, &["init", "--store", "third", "--no-escrow"]);
    site.fails(64, &["container", "create", "third", "--tpm-nv", "--owner", owner, "--no-escrow", "--reader", "a:b"]);
}

#[test]
fn a_machine_with_one_disk_keeps_its_key_in_the_tpm() {
    let mut machine = Machine::new();
    let volume = machine.volume("volume");
    let site = &machine.site;
    let report = site.json(&["separation", &volume]);
    assert_eq!(report["verdict"], "unproven");
    let why = report["evidence"].to_string();
    assert!(why.contains("sealed keys in the TPM (IBM)") && why.contains("virtual"), "{why}");
    assert_eq!(report["evidence"].as_array().unwrap().len(), 1, "nothing else is unproven: {why}");
    site.fails(72, &["attach", &volume, "--separation", "strict"]);
    site.attaches(&volume);

    let shown = site.ok(&["container", "show", "disk"]);
    assert!(shown.contains("TPM              IBM") && shown.contains("disk/kek/1"), "{shown}");
    assert_eq!(site.json(&["container", "rotate", "disk"])["resealed"], 1);
    site.attaches(&volume);
    assert_eq!(site.ok(&["key", "list", "--store", "disk"]).lines().count(), 1);

    // By hand: what is in an index is a header of 20 bytes and a JWE.
    let value = machine.saved(&machine.indices()[0]);
    let by_hand = "import sys, zlib; print(zlib.decompress(open(sys.argv[1], 'rb').read()[20:], -15).decode())";
    let json = sh(&format!("python3 -c \"{by_hand}\" {} | jq -c 'keys'", value.display()));
    assert_eq!(json, r#"["ciphertext","iv","protected","recipients","tag"]"#);

    // The NV memory outlives a power-off; another container in the same TPM has nothing to do with it.
    machine.host.reboot();
    let site = &machine.site;
    let identity = format!("tpm:{}", site.keys("host.tpm.pem"));
    let (owner, escrow) = (site.keys("host.pem"), site.keys("escrow.pem"));
    site.ok(&[
        "container",
        "create",
        "other",
        "--tpm-nv",
        "--escrow",
        escrow,
        "--owner",
        owner,
        "--identity",
        &identity,
    ]);
    assert_eq!(site.ok(&["key", "list", "--store", "other"]), "");
    site.attaches(&volume);
    assert_eq!(machine.host.swtpm.leftovers(), "");
}

#[test]
fn what_a_killed_writer_leaves_is_seen_and_removed_by_the_next() {
    let machine = Machine::new();
    let volume = machine.volume("volume");
    let site = &machine.site;
    let before = machine.indices();
    assert_eq!(before.len(), 3);
    // Killed before any part was written, and between two parts.
    machine.tool(&format!("tpm2_nvdefine -C o -s 700 -a {ATTRIBUTES} 0x180ca90"));
    machine.tool(&format!("tpm2_nvdefine -C o -s 1500 -a {ATTRIBUTES} 0x180ca91"));
    fs::write(site.path("tail"), "x".repeat(476)).unwrap();
    machine.tool(&format!("tpm2_nvwrite -C o -i {} --offset 1024 0x180ca91", site.path("tail").display()));
    // Somebody else's: other attributes, and other content.
    machine.tool("tpm2_nvdefine -C o -s 8 -a ownerread|ownerwrite|authread 0x180ca92");
    fs::write(site.path("other"), "something else, of another program").unwrap();
    machine.put("0x180ca93", &site.path("other"));
    // Its name is a hash that ours never are.
    machine.tool("tpm2_nvdefine -C o -s 8 -g sha384 -a ownerread|ownerwrite|authread 0x180ca94");
    assert_eq!((machine.shown("keys"), machine.shown("nv_indices")), (1, 8));
    let shown = site.ok(&["container", "show", "disk"]);
    assert!(shown.contains("leftovers        2 not finished"), "{shown}");
    site.attaches(&volume);

    machine.volume("next");
    let others = ["0x180ca92", "0x180ca93", "0x180ca94"].map(str::to_owned);
    let left: Vec<_> = machine.indices().into_iter().filter(|index| !before.contains(index)).collect();
    assert_eq!(left, [&["0x180ca83".to_owned()][..], &others].concat());
    assert!(!site.ok(&["container", "show", "disk"]).contains("leftovers"));
}

#[test]
fn of_two_values_of_one_key_the_later_counts() {
    let machine = Machine::new();
    let volume = machine.volume("volume");
    let site = &machine.site;
    let store = machine.store();
    let id = store.list().unwrap()[0];
    let saved: Vec<_> = machine.indices().iter().map(|index| machine.saved(index)).collect();
    let is_key = |file: &&PathBuf| fs::read(file).unwrap().starts_with(b"ca\x01v");
    let earlier = saved.iter().find(is_key).unwrap();
    site.ok(&["container", "rotate", "disk"]);
    assert_eq!(machine.indices().len(), 4, "two container keys, which is current, and the key");
    // As if the rotation had been killed before the earlier form went.
    machine.put("0x180caa0", earlier);
    let generation = || match store.get(&id).unwrap() {
        store::Stored::Sealed(key) => key.claimed_generation().unwrap(),
        store::Stored::Released(_) => panic!("it was sealed"),
    };
    assert_eq!((generation(), store.list().unwrap()), (2, vec![id]));
    site.attaches(&volume);
    site.ok(&["container", "rotate", "disk"]);
    assert_eq!((generation(), machine.indices().len()), (3, 5));
    assert!(!machine.indices().contains(&"0x180caa0".to_owned()), "the next writer has removed it");
    site.attaches(&volume);
}

#[test]
fn a_writer_that_is_killed_at_any_time_loses_nothing() {
    let machine = Machine::new();
    let (one, two) = (machine.volume("one"), machine.volume("two"));
    let site = &machine.site;
    let (start, tries) = (Instant::now(), 16);
    site.ok(&["container", "rotate", "disk", "--keep-days", "0"]);
    let whole = start.elapsed();
    for number in 1..tries {
        let mut rotation = site.command();
        let rotation = rotation.args(["container", "rotate", "disk", "--keep-days", "0"]);
        let mut rotation = rotation.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        sleep(whole * number / tries);
        rotation.kill().unwrap();
        rotation.wait().unwrap();
        // The kernel's resource manager does that for whoever is killed; swtpm alone does not.
        for kind in ["-t", "-l", "-s"] {
            machine.tool(&format!("tpm2_flushcontext {kind}"));
        }
        for volume in [&one, &two] {
            site.ok(&["test", volume]);
        }
    }
    site.ok(&["container", "rotate", "disk", "--keep-days", "0"]);
    site.attaches(&one);
    site.attaches(&two);
    assert_eq!(site.ok(&["key", "list", "--store", "disk"]).lines().count(), 2);
    assert_eq!(machine.host.swtpm.leftovers(), "");
}

#[test]
fn a_full_memory_is_told_in_bytes_and_every_key_can_still_be_replaced() {
    let machine = Machine::new();
    let volume = machine.volume("volume");
    let site = &machine.site;
    let other = site.file("other", 64 << 20).into_os_string().into_string().unwrap();
    let store = machine.store();
    let keys = store.container_keys().unwrap();
    let mark = |rotating| {
        let current = keys.current().unwrap().unwrap();
        keys.set_current(&Current { rotating, ..current }, "aa")
    };
    // All numbers but one are taken.
    let fill = |numbers: std::ops::Range<u32>, bytes: u32| {
        let tcti = machine.host.swtpm.tcti();
        let numbers = numbers.map(|number| format!("0x{number:x}")).collect::<Vec<_>>().join(" ");
        sh(&format!(
            "for n in {numbers}; do TPM2TOOLS_TCTI={tcti} tpm2_nvdefine -C o -s {bytes} -a 'ownerread|ownerwrite' $n \
             >/dev/null 2>&1 || exit 0; done"
        ));
    };
    fill(0x0180_ca83..0x0180_caff, 1);
    assert_eq!(machine.indices().len(), 127);
    let told = site.fails(69, &["format", &other, "--store", "disk"]);
    assert!(told.contains("in 127 of 128 indices") && told.contains("key delete"), "{told}");
    mark(true).unwrap();
    mark(false).unwrap();
    site.attaches(&volume);
}

#[test]
fn a_backup_is_restored_into_the_tpm_as_far_as_there_is_room_and_into_a_directory() {
    let machine = Machine::new();
    let volumes = ["one", "two"].map(|name| machine.volume(name));
    let site = &machine.site;
    let backup = site.keys("backup");
    site.ok(&["container", "backup", "disk", backup]);
    let empty = || machine.indices().iter().for_each(|index| drop(machine.tool(&format!("tpm2_nvundefine {index}"))));
    empty();
    assert_eq!(site.json(&["container", "restore", "disk", backup])["written"], 3);
    volumes.iter().for_each(|volume| site.attaches(volume));

    // Room for the container key and no more.
    empty();
    let taken = (0x0180_ca80..0x0180_cafd).map(|number| format!("0x{number:x}")).collect::<Vec<_>>().join(" ");
    let tcti = machine.host.swtpm.tcti();
    sh(&format!(
        "for n in {taken}; do TPM2TOOLS_TCTI={tcti} tpm2_nvdefine -C o -s 1 -a 'ownerread|ownerwrite' $n >/dev/null; done"
    ));
    let told = site.fails(69, &["container", "restore", "disk", backup]);
    assert!(told.contains("of 128 indices"), "{told}");
    for index in ["0x180ca80", "0x180ca81", "0x180ca82"] {
        machine.tool(&format!("tpm2_nvundefine {index}"));
    }
    let done = site.json(&["container", "restore", "disk", backup]);
    assert_eq!((&done["written"], &done["unchanged"]), (&2.into(), &1.into()));
    volumes.iter().for_each(|volume| site.attaches(volume));

    let path = site.keys("cryptattach.toml");
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, text.replace("type = \"tpm-nv\"\n", "type = \"directory\"\npath = \"disk\"\n")).unwrap();
    assert_eq!(site.json(&["container", "restore", "disk", backup, "--create"])["written"], 3);
    volumes.iter().for_each(|volume| site.attaches(volume));
}

#[test]
fn a_chip_without_room_is_told_in_bytes() {
    let machine = Machine::new();
    let volume = machine.volume("volume");
    let site = &machine.site;
    let tcti = machine.host.swtpm.tcti();
    sh(&format!(
        "n=25280000; while TPM2TOOLS_TCTI={tcti} tpm2_nvdefine -C o -s 2048 -a 'ownerread|ownerwrite' $n >/dev/null 2>&1; do
           n=$((n + 1)); done
         TPM2TOOLS_TCTI={tcti} tpm2_nvundefine -C o $((n - 1))"
    ));
    let other = site.file("other", 64 << 20).into_os_string().into_string().unwrap();
    let told = loop {
        let output = site.run(&["format", &other, "--store", "disk"]);
        let told = String::from_utf8(output.stderr).unwrap();
        if !output.status.success() {
            assert_eq!(output.status.code(), Some(69), "{told}");
            break told;
        }
        fs::remove_file(&other).unwrap();
        site.file("other", 64 << 20);
    };
    println!("{told}");
    assert!(told.contains("has no room for") && told.contains("bytes more: keys take"), "{told}");
    let store = machine.store();
    let keys = store.container_keys().unwrap();
    keys.set_current(&keys.current().unwrap().unwrap(), "aa").expect("but what is there can be replaced");
    site.attaches(&volume);
}

#[test]
fn a_cleared_tpm_is_told_as_that() {
    let machine = Machine::new();
    let volume = machine.volume("volume");
    let missing = machine.store().get(&KeyId::random()).err().unwrap();
    assert!(matches!(&missing, StoreError::NotFound { at, .. } if !at.contains("cleared")), "{missing}");
    machine.tool("tpm2_clear");
    let told = machine.site.fails(67, &["attach", &volume]);
    assert!(told.contains("has no key of cryptattach at all") && told.contains("cleared"), "{told}");
}

#[test]
fn the_owners_password_is_for_writing_only() {
    let machine = Machine::new();
    let volume = machine.volume("volume");
    let site = &machine.site;
    let other = site.file("other", 64 << 20).into_os_string().into_string().unwrap();
    machine.tool("tpm2_changeauth -c owner secret");
    site.attaches(&volume);
    let told = site.fails(77, &["format", &other, "--store", "disk"]);
    assert!(told.contains("the owner's password of this TPM is needed") && told.contains("owner_password"), "{told}");
    fs::write(site.keys("password"), "wrong\n").unwrap();
    machine.set(&format!("owner_password = '{}'", site.keys("password")));
    assert!(site.fails(77, &["format", &other, "--store", "disk"]).contains("is wrong"));
    fs::write(site.keys("password"), "secret\n").unwrap();
    site.ok(&["format", &other, "--store", "disk"]);
    site.attaches(&other);
}

#[test]
fn after_a_boot_with_the_lock_nobody_reads_the_keys() {
    let mut machine = Machine::new();
    let volume = machine.volume("volume");
    machine.set("read_lock = true");
    let device = LoopDevice::new(volume.as_ref(), "");
    let name = machine.site.name("root");
    machine.configure(&format!("[[boot.volumes]]\nname = '{name}'\ndevice = '{}'\n", device.path()));
    machine.site.ok(&["boot"]);
    machine.site.ok(&["detach", &name]);
    let told = machine.site.fails(69, &["test", &volume]);
    assert!(told.contains("locked until the next reset") && told.contains("read_lock = false"), "{told}");
    machine.host.reboot();
    machine.site.ok(&["boot"]);
    machine.site.ok(&["detach", &name]);
}

#[test]
fn whoever_listens_learns_no_owners_password() {
    const PASSWORD: &str = "the owner's own password";
    let machine = Machine::new();
    let site = &machine.site;
    machine.host.swtpm.tool(&["tpm2_changeauth", "-c", "owner", PASSWORD]);
    fs::write(site.keys("password"), PASSWORD).unwrap();
    machine.set(&format!("owner_password = '{}'", site.keys("password")));
    let tap = Wiretap::on(&machine.host.swtpm.socket());
    let volume = site.file("volume", 64 << 20);
    let format = site.command().arg("format").arg(volume).args(["--store", "disk"]).env(TCTI, tap.tcti()).output();
    let format = format.unwrap();
    assert!(format.status.success(), "{}", String::from_utf8_lossy(&format.stderr));
    assert!(tap.heard(b"ca\x01v"), "what is public is heard");
    assert!(!tap.heard(PASSWORD.as_bytes()) && !tap.heard(&PASSWORD.as_bytes()[..12]));
}

#[test]
fn a_boot_tells_that_its_lock_was_swallowed() {
    /// TPM2_NV_ReadLock
    const NV_READ_LOCK: [u8; 4] = [0, 0, 1, 0x4F];
    let machine = Machine::new();
    machine.set("read_lock = true");
    let tap = Wiretap::on(&machine.host.swtpm.socket());
    tap.swallow(&NV_READ_LOCK, &SUCCESS);
    let boot = machine.site.command().arg("boot").env(TCTI, tap.tcti()).output().unwrap();
    let told = String::from_utf8_lossy(&boot.stderr);
    assert!(told.contains("can still read the store 'disk'"), "{told}");
}
