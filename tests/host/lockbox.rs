//! The lockbox: opened once per boot with the host's identity, it attaches volumes while the store is away; and what it does
//! not do.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use base64ct::{Base64UrlUnpadded, Encoding};
use cryptattach::{
    base::key::{HostName, SecretBytes, StoreName},
    config::Config,
    keys::seal::{OwnerRecipient, Recipient},
    sys::kernel_keyring,
    unlock::{
        container::{Container, Use},
        lockbox::{self, Admission},
    },
};

use crate::site::{Site, sh};

/// An administrator's configuration, which has the owner's key, and a host's, which has a key of its own and the lockbox.
struct Hosted {
    site: Site,
    host: HostName,
    config: &'static str,
}

impl Hosted {
    fn new(more: &str) -> Self {
        let site = Site::new();
        site.ok(&["container", "create", "cinder"]);
        let hosted = Self::bare(site, more);
        hosted.admit();
        hosted
    }

    fn bare(site: Site, more: &str) -> Self {
        let host: HostName = site.name("host").parse().unwrap();
        sh(&format!(
            "cd {} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out host.key 2>/dev/null && \
             openssl pkey -in host.key -pubout -out host.pem && chmod 600 host.key",
            site.keys("")
        ));
        let config = site.keys("host.toml");
        let text = format!(
            "state = 'state'\n[audit]\nfile = 'audit'\n[stores.cinder]\ntype = 'directory'\npath = '{}'\n\
             owner = 'cinder.owner.pem'\nescrow = 'cinder.escrow.pem'\n\
             [lockbox]\nhost = '{host}'\nstore = 'cinder'\nidentities = ['host.key']\npath = 'lockbox'\n{more}\n",
            site.keys("cinder")
        );
        // Not in the configuration's folder: both are a host's own.
        let text = text.replace("'state'", &format!("'{}'", site.keys("state")));
        fs::write(config, text.replace("'audit'", &format!("'{}'", site.keys("host.audit")))).unwrap();
        Self { site, host, config }
    }

    fn container(&self) -> Container {
        let config = Config::read(Path::new(self.site.keys("cryptattach.toml"))).unwrap();
        Container::open(&config, &"cinder".parse::<StoreName>().unwrap(), None, Use::Keys).unwrap()
    }

    /// What the administrator does once the host has proved itself.
    fn admit(&self) -> Admission {
        let container = self.container();
        let identity = OwnerRecipient::read(self.site.keys("host.pem").as_ref()).unwrap();
        let mut recipients = container.escrow().unwrap();
        recipients.push(Box::new(identity) as Box<dyn Recipient>);
        let admission = lockbox::admit(container.host_keys().unwrap(), &self.host, &recipients).unwrap();
        container.admit_host(&self.host, &admission.recipient).unwrap();
        admission
    }

    fn remove(&self) {
        let container = self.container();
        lockbox::withdraw(container.host_keys().unwrap(), &self.host).unwrap();
        let rotation = container.remove_host(&self.host, &|_| {}).unwrap();
        assert!(rotation.failed.is_empty());
    }

    fn arguments<'a>(&self, arguments: &[&'a str]) -> Vec<&'a str> {
        [&["--config", self.config], arguments].concat()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        self.site.ok(&self.arguments(arguments))
    }

    #[track_caller]
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        self.site.fails(code, &self.arguments(arguments))
    }

    fn status(&self) -> serde_json::Value {
        self.site.json(&self.arguments(&["lockbox", "status"]))
    }

    /// Attaches and detaches on the host; what it says on standard error.
    #[track_caller]
    fn attaches(&self, volume: &str) -> String {
        let name = self.site.name("v");
        let output = self.site.run(&self.arguments(&["attach", volume, &name, "--backend", "userspace"]));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        self.ok(&["detach", &name]);
        said
    }

    #[track_caller]
    fn does_not_attach(&self, code: i32, volume: &str) -> String {
        self.fails(code, &["attach", volume, &self.site.name("v"), "--backend", "userspace"])
    }

    /// A new volume, formatted on the host.
    fn volume(&self, name: &str) -> (String, String) {
        let path = self.site.file(name, 64 << 20).into_os_string().into_string().unwrap();
        let reference = self.ok(&["format", &path]);
        (path, reference)
    }

    fn entry(&self, reference: &str) -> PathBuf {
        PathBuf::from(self.site.keys("lockbox")).join(format!("{reference}.jwe"))
    }

    fn store_goes(&self) {
        fs::rename(self.site.keys("cinder"), self.site.keys("away")).unwrap();
    }

    fn store_comes_back(&self) {
        fs::rename(self.site.keys("away"), self.site.keys("cinder")).unwrap();
    }

    fn description(&self) -> String {
        format!("cryptattach:lockbox:{}", self.host)
    }
}

impl Drop for Hosted {
    fn drop(&mut self) {
        let _ = kernel_keyring::remove(&self.description());
    }
}

#[test]
fn opened_once_it_attaches_while_the_store_is_away() {
    let hosted = Hosted::new("");
    assert!(hosted.fails(68, &["lockbox", "add", "cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"]).contains("is closed"));
    // As in a service of systemd's, whose session keyring leads nowhere: it is open for every other, too.
    let in_a_service = |verb: &str| {
        let binary = env!("CARGO_BIN_EXE_cryptattach");
        sh(&format!("keyctl session - {binary} --config {} lockbox {verb} 2>/dev/null", hosted.config))
    };
    let opened = in_a_service("open");
    assert!(opened.contains("is open") && opened.contains("until power-off"), "{opened}");
    let again = hosted.ok(&["lockbox", "open"]);
    assert!(again.contains("is open already") && again.contains("the store has its lockbox key"), "{again}");

    assert!(in_a_service("status").contains("is open"));

    // The container key opens with the lockbox key: for a new volume, and for the first attach.
    let (volume, reference) = hosted.volume("one");
    assert!(!hosted.entry(&reference).exists(), "format looks at the store only");
    hosted.ok(&["test", &volume]);
    assert!(!hosted.entry(&reference).exists(), "what only looks adds nothing");
    hosted.attaches(&volume);
    let status = hosted.status();
    assert_eq!((&status["open"], &status["entries"][0]["state"]), (&true.into(), &"valid".into()), "{status}");
    assert_eq!(status["entries"][0]["key"], reference.as_str());
    let screen = hosted.ok(&["status"]);
    let entry = screen.lines().find(|line| line.trim_start().starts_with(&reference)).expect(&screen);
    assert!(entry.contains(" left, valid"), "{screen}");
    assert!(hosted.ok(&["lockbox", "list"]).contains(entry), "{screen}");

    hosted.store_goes();
    assert!(hosted.ok(&["separation", &volume]).contains("unproven"), "as attach judges");
    let said = hosted.attaches(&volume);
    assert!(said.contains("it is not there now"), "where the sealed key rests cannot be proven: {said}");
    assert!(hosted.ok(&["lockbox", "open"]).contains("not known"), "it stays open");
    hosted.ok(&["lockbox", "forget", &reference]);
    assert!(hosted.does_not_attach(69, &volume).contains("cannot open the key store"));

    hosted.store_comes_back();
    hosted.ok(&["lockbox", "add", &volume, &reference]);
    hosted.store_goes();
    hosted.attaches(&volume);
    hosted.store_comes_back();

    let audit = fs::read_to_string(hosted.site.keys("host.audit")).unwrap();
    for action in ["lockbox open", "lockbox forget", "attach", "format"] {
        assert!(audit.contains(&format!("\"action\":\"{action}\"")), "{action}: {audit}");
    }
    assert_eq!(audit.matches("\"lockbox open\"").count(), 1, "opened once: {audit}");
}

#[test]
fn an_erased_volume_is_in_no_lockbox() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let (volume, reference) = hosted.volume("one");
    hosted.attaches(&volume);
    assert!(hosted.entry(&reference).exists());
    let erased: serde_json::Value =
        serde_json::from_str(&hosted.ok(&["key", "erase", &volume, "--yes", "--json"])).unwrap();
    assert_eq!(erased["receipt"]["keys"][0]["lockbox_entry"], true);
    assert!(!hosted.entry(&reference).exists());
    assert!(hosted.status()["entries"].as_array().unwrap().is_empty());
}

#[test]
fn other_programs_have_their_passphrase_while_the_store_is_away() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let volume = hosted.site.file("one", 64 << 20).into_os_string().into_string().unwrap();
    hosted.ok(&["format", &volume, "--keyslot"]);
    let told = hosted.ok(&["test", &volume]);
    assert!(told.contains("from store 'cinder' (the directory"), "{told}");
    let passphrase = hosted.ok(&["key", "passphrase", "--for", &volume]);

    hosted.store_goes();
    assert_eq!(hosted.ok(&["key", "passphrase", "--for", &volume]), passphrase);
    let told = hosted.ok(&["test", &volume]);
    assert!(told.contains("from the lockbox") && told.contains("matches the header's digest"), "{told}");
    hosted.store_comes_back();
}

#[test]
fn closing_removes_key_and_entries() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let (volume, reference) = hosted.volume("one");
    hosted.attaches(&volume);
    assert!(hosted.entry(&reference).exists());
    let closed = hosted.ok(&["lockbox", "close"]);
    assert!(closed.contains("taken out of the kernel's keyring") && closed.contains("1 entry was removed"), "{closed}");
    assert!(!hosted.entry(&reference).exists());
    assert!(kernel_keyring::get(&hosted.description(), 64).unwrap().is_none());
    assert_eq!(hosted.status()["open"], false);
    let refused = hosted.does_not_attach(68, &volume);
    assert!(refused.contains("container key cinder/kek/1 is refused while the lockbox of"), "{refused}");
    assert!(refused.contains("next: 'cryptattach lockbox open' opens it"), "{refused}");
    assert!(hosted.ok(&["lockbox", "close"]).contains("it was closed"), "closing twice is no failure");
    hosted.ok(&["lockbox", "open"]);
    hosted.attaches(&volume);
}

#[test]
fn entries_expire_and_the_error_says_so() {
    // A second.
    const LIFETIME: &str = "lifetime_hours = 0.0001";
    let hosted = Hosted::new(LIFETIME);
    hosted.ok(&["lockbox", "open"]);
    let (volume, reference) = hosted.volume("one");
    hosted.attaches(&volume);
    while hosted.status()["entries"][0]["state"] != "unusable" {
        thread::sleep(Duration::from_millis(100));
    }
    hosted.store_goes();
    let refused = hosted.does_not_attach(69, &volume);
    assert!(refused.contains("its lockbox entry is not usable: it expired"), "{refused}");
    assert!(refused.contains("cannot open the key store"), "and why the store does not have it: {refused}");
    hosted.store_comes_back();
    let text = fs::read_to_string(hosted.config).unwrap();
    fs::write(hosted.config, text.replace(LIFETIME, "")).unwrap();
    hosted.attaches(&volume);
    assert_eq!(hosted.status()["entries"][0]["state"], "valid", "the store gave it anew");

    // A longer life cannot be written into the file.
    let text = fs::read_to_string(hosted.entry(&reference)).unwrap();
    let mut entry: serde_json::Value = serde_json::from_str(&text).unwrap();
    let header = Base64UrlUnpadded::decode_vec(entry["protected"].as_str().unwrap()).unwrap();
    let mut header: serde_json::Value = serde_json::from_slice(&header).unwrap();
    header["cryptattach"]["expires"] = 4_000_000_000_u64.into();
    entry["protected"] = Base64UrlUnpadded::encode_string(header.to_string().as_bytes()).into();
    fs::write(hosted.entry(&reference), entry.to_string()).unwrap();
    hosted.store_goes();
    assert!(hosted.does_not_attach(69, &volume).contains("has been changed since it was sealed"));
    hosted.store_comes_back();
}

#[test]
fn a_damaged_entry_is_named_and_never_in_the_way() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let (volume, reference) = hosted.volume("one");
    let (_, other) = hosted.volume("two");
    hosted.ok(&["lockbox", "add", &reference, &other]);
    let whole = fs::read(hosted.entry(&reference)).unwrap();
    let flipped = {
        let mut entry: serde_json::Value = serde_json::from_slice(&whole).unwrap();
        let text = entry["ciphertext"].as_str().unwrap();
        let first = if text.starts_with('A') { "B" } else { "A" };
        entry["ciphertext"] = format!("{first}{}", &text[1..]).into();
        entry.to_string().into_bytes()
    };
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("flipped", flipped, "has been changed"),
        ("truncated", whole[..whole.len() / 2].to_vec(), "is malformed"),
        ("empty", Vec::new(), "is malformed"),
        ("of another key", fs::read(hosted.entry(&other)).unwrap(), "it belongs to key"),
        ("of the store's form", fs::read(hosted.site.sealed(&reference)).unwrap(), "is malformed"),
    ];
    for (case, bytes, told) in cases {
        fs::write(hosted.entry(&reference), &bytes).unwrap();
        let status = hosted.status();
        let listed = status["entries"].as_array().unwrap().iter().find(|entry| entry["key"] == reference.as_str());
        assert_eq!(listed.unwrap()["state"], "unusable", "{case}: {status}");
        let said = hosted.attaches(&volume);
        assert!(said.contains(told) && said.contains(&format!("entry of {reference} is not used")), "{case}: {said}");
        assert_eq!(hosted.attaches(&volume), "", "{case}: there is a good one again");

        fs::write(hosted.entry(&reference), &bytes).unwrap();
        hosted.store_goes();
        let refused = hosted.does_not_attach(69, &volume);
        assert!(refused.contains(told), "{case}: {refused}");
        assert!(!hosted.entry(&reference).exists(), "{case}: it is removed, for it never opens again");
        hosted.store_comes_back();
        hosted.ok(&["lockbox", "add", &reference]);
    }

    // Another host's entry, on a disk that was moved.
    let stranger = Hosted::bare(Site::new(), "");
    stranger.site.ok(&["container", "create", "cinder"]);
    stranger.admit();
    stranger.ok(&["lockbox", "open"]);
    fs::create_dir_all(stranger.entry(&reference).parent().unwrap()).unwrap();
    fs::copy(hosted.entry(&reference), stranger.entry(&reference)).unwrap();
    let status = stranger.status();
    let why = status["entries"][0]["why"].as_str().unwrap();
    assert!(why.contains("it belongs to lockbox key") && why.contains(hosted.host.as_str()), "{why}");
}

#[test]
fn an_entry_does_not_bring_back_what_the_store_has_replaced() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let (volume, reference) = hosted.volume("one");
    hosted.attaches(&volume);
    let old = fs::read(hosted.entry(&reference)).unwrap();
    hosted.site.ok(&["container", "rotate", "cinder"]);
    hosted.ok(&["lockbox", "add", &reference]);
    fs::write(hosted.entry(&reference), old).unwrap();
    let said = hosted.attaches(&volume);
    assert!(said.contains("outdated: it has generation 1; the store has shown generation 2"), "{said}");
    assert_eq!(hosted.attaches(&volume), "");
}

#[test]
fn nobody_but_root_has_the_open_key() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let (kept, _) = kernel_keyring::get(&hosted.description(), 64).unwrap().unwrap();
    assert_eq!(kept.len(), 40, "root has it: generation and key");
    let id = sh(&format!("keyctl search @u user {}", hosted.description()));
    let as_nobody = |script: &str| {
        let arguments = ["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script];
        Command::new("setpriv").args(arguments).stdin(Stdio::null()).output().unwrap()
    };
    assert!(as_nobody("true").status.success());
    // Also from a session of root's, whose keyring leads to the key: giving up root gives up the key.
    assert!(sh("keyctl show @s").contains(&hosted.description()));
    for script in [
        format!("keyctl pipe {id}"),
        format!("keyctl link {id} @s && keyctl pipe {id}"),
        format!("keyctl setperm {id} 0x3f3f3f3f"),
        format!("keyctl search @u user {} && keyctl pipe {id}", hosted.description()),
    ] {
        let output = as_nobody(&script);
        assert!(!output.status.success() && output.stdout.is_empty(), "{script}");
    }
    let config = format!("--config {}", hosted.config);
    let tool = env!("CARGO_BIN_EXE_cryptattach");
    assert!(!as_nobody(&format!("{tool} {config} lockbox status")).status.success(), "files are 0600");

    // Nor is it in any file.
    let key = SecretBytes::copy_of(&kept.expose()[8..]).unwrap();
    for path in sh(&format!("find {} -xdev -type f", hosted.site.keys(""))).lines() {
        let bytes = fs::read(path).unwrap();
        for spelling in [key.expose().to_vec(), Base64UrlUnpadded::encode_string(key.expose()).into_bytes()] {
            assert!(!bytes.windows(24).any(|window| window == &spelling[..24]), "{path}");
        }
    }
}

#[test]
fn killed_in_the_middle_it_leaves_whole_entries_only() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let volumes: Vec<_> = (0..4).map(|number| hosted.volume(&format!("v{number}"))).collect();
    let references: Vec<&str> = volumes.iter().map(|(_, reference)| reference.as_str()).collect();
    let mut killed = 0;
    for milliseconds in [2, 4, 6, 8, 10, 15, 20, 30] {
        let add = hosted.arguments(&[&["lockbox", "add"], &references[..]].concat());
        let mut add = hosted.site.command().args(add).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(milliseconds));
        let _ = add.kill();
        killed += usize::from(!add.wait().unwrap().success());
        let status = hosted.status();
        let entries = status["entries"].as_array().unwrap();
        assert!(entries.iter().all(|entry| entry["state"] == "valid"), "{status}");
    }
    assert!(killed > 0, "at least one was killed in the middle");
    hosted.ok(&[&["lockbox", "add"], &references[..]].concat());
    let files = fs::read_dir(hosted.site.keys("lockbox/cinder")).unwrap().flatten();
    let files = files.filter(|file| file.file_name() != ".lock").count();
    assert_eq!(files, references.len(), "nothing unfinished is left");
}

#[test]
fn a_removed_host_opens_nothing_new_and_nothing_at_its_next_boot() {
    let hosted = Hosted::new("offline = true");
    hosted.ok(&["lockbox", "open"]);
    let (volume, reference) = hosted.volume("one");
    let (fresh, _) = hosted.volume("two");
    hosted.attaches(&volume);
    let copy = PathBuf::from(hosted.site.keys("state")).join(format!("host/{}.jwe", hosted.host));
    assert!(copy.exists());
    // A rotation keeps the host.
    hosted.site.ok(&["container", "rotate", "cinder"]);
    hosted.attaches(&fresh);
    hosted.ok(&["lockbox", "forget", "--all"]);
    hosted.attaches(&volume);

    hosted.remove();
    assert_eq!(hosted.container().hosts().unwrap(), []);
    // What it has in its lockbox opens until it expires; the rest no longer does.
    hosted.attaches(&volume);
    let refused = hosted.does_not_attach(68, &fresh);
    assert!(refused.contains("cinder/kek/3 is refused"), "{refused}");

    let removed = hosted.fails(67, &["lockbox", "open"]);
    assert!(removed.contains("was removed") && removed.contains("1 entry was removed"), "{removed}");
    assert!(removed.contains("taken out of the kernel's keyring"), "{removed}");
    assert!(!copy.exists() && !hosted.entry(&reference).exists());
    hosted.does_not_attach(68, &volume);
    let audit = fs::read_to_string(hosted.site.keys("host.audit")).unwrap();
    assert!(audit.contains("lockbox wipe"), "{audit}");

    // Admitted again, it opens again; the new lockbox key is another one, which a person has to vouch for.
    let admission = hosted.admit();
    let refused = hosted.fails(68, &["lockbox", "open"]);
    assert!(refused.contains(&format!("--fingerprint {}", admission.fingerprint)), "{refused}");
    hosted.ok(&["lockbox", "open", "--fingerprint", &admission.fingerprint]);
    hosted.attaches(&volume);
}

#[test]
fn a_store_cannot_put_a_lockbox_key_of_its_own_in_place() {
    let hosted = Hosted::new("");
    let right = hosted.container().host_keys().unwrap().get(&hosted.host).unwrap();
    let fingerprint = hosted.ok(&["lockbox", "open", "--json"]);
    let fingerprint: serde_json::Value = serde_json::from_str(&fingerprint).unwrap();
    // It is sealed to the host's public key, which everyone may know, and of a later generation.
    let thief = hosted.container();
    let identity = OwnerRecipient::read(hosted.site.keys("host.pem").as_ref()).unwrap();
    lockbox::admit(thief.host_keys().unwrap(), &hosted.host, &[Box::new(identity)]).unwrap();
    let refused = hosted.fails(68, &["lockbox", "open"]);
    assert!(refused.contains(fingerprint["fingerprint"].as_str().unwrap()), "{refused}");
    hosted.ok(&["lockbox", "close"]);
    hosted.fails(68, &["lockbox", "open"]);

    // Nor is one open that was not meant.
    let (wrong, right_one) = (format!("-{}", "A".repeat(42)), fingerprint["fingerprint"].as_str().unwrap());
    let path = PathBuf::from(hosted.site.keys("cinder")).join(format!("host/{}.jwe", hosted.host));
    fs::write(&path, right.to_json()).unwrap();
    hosted.fails(68, &["lockbox", "open", "--fingerprint", &wrong]);
    hosted.ok(&["lockbox", "open", "--fingerprint", right_one]);
    hosted.fails(68, &["lockbox", "open", "--fingerprint", &wrong]);

    // Nor can it go back to a key from before.
    fs::remove_file(&path).unwrap();
    let later = hosted.admit();
    hosted.ok(&["lockbox", "open", "--fingerprint", &later.fingerprint]);
    hosted.ok(&["lockbox", "close"]);
    fs::write(&path, right.to_json()).unwrap();
    let refused = hosted.fails(68, &["lockbox", "open"]);
    assert!(refused.contains("has opened generation"), "{refused}");

    // Nor give one host's key to another.
    let stranger = Hosted::bare(Site::new(), "");
    stranger.site.ok(&["container", "create", "cinder"]);
    assert!(stranger.fails(67, &["lockbox", "open"]).contains("is not admitted"), "nobody is");
    fs::create_dir(PathBuf::from(stranger.site.keys("cinder")).join("host")).unwrap();
    let other = PathBuf::from(stranger.site.keys("cinder")).join(format!("host/{}.jwe", stranger.host));
    fs::write(other, right.to_json()).unwrap();
    fs::copy(hosted.site.keys("host.key"), stranger.site.keys("host.key")).unwrap();
    let refused = stranger.fails(68, &["lockbox", "open"]);
    assert!(refused.contains("it belongs to host") && refused.contains(hosted.host.as_str()), "{refused}");
}

#[test]
fn offline_it_boots_without_the_store_and_says_what_that_costs() {
    let hosted = Hosted::new("");
    hosted.store_goes();
    // Not there, or an empty mount point in its place, is no removal.
    fs::create_dir(hosted.site.keys("cinder")).unwrap();
    hosted.fails(69, &["lockbox", "open"]);
    fs::remove_dir(hosted.site.keys("cinder")).unwrap();
    let refused = hosted.fails(69, &["lockbox", "open"]);
    assert!(refused.contains("no copy is kept on this host (offline = false)"), "{refused}");
    hosted.store_comes_back();
    hosted.ok(&["lockbox", "open"]);
    let online = hosted.ok(&["lockbox", "status"]);
    assert!(online.contains("switched off: nothing without the network"), "{online}");

    let text = fs::read_to_string(hosted.config).unwrap();
    fs::write(hosted.config, text + "offline = true\n").unwrap();
    hosted.ok(&["lockbox", "open"]);
    let (volume, _) = hosted.volume("one");
    hosted.attaches(&volume);
    // Power-off: the kernel's keyring is empty.
    kernel_keyring::remove(&hosted.description()).unwrap();
    hosted.store_goes();
    let opened = hosted.ok(&["lockbox", "open"]);
    assert!(opened.contains("from the copy on this host"), "{opened}");
    hosted.attaches(&volume);
    let offline = hosted.ok(&["lockbox", "status"]);
    assert!(offline.contains("the sealed lockbox key is on its disk"), "{offline}");
    assert!(offline.contains("removing the host does not delete that copy"), "{offline}");
    hosted.store_comes_back();

    // Who no longer wants the copy, has none.
    let text = fs::read_to_string(hosted.config).unwrap();
    fs::write(hosted.config, text.replace("offline = true\n", "")).unwrap();
    hosted.ok(&["lockbox", "open"]);
    assert!(hosted.ok(&["lockbox", "status"]).contains("nothing without the network"));
}

#[test]
fn a_store_cannot_spoil_the_copy_of_an_open_lockbox() {
    let hosted = Hosted::new("offline = true");
    hosted.ok(&["lockbox", "open"]);
    let path = hosted.site.keys(&format!("cinder/host/{}.jwe", hosted.host));
    let mut forged: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    forged["tag"] = "AAAAAAAAAAAAAAAAAAAAAA".into();
    fs::write(path, forged.to_string()).unwrap();
    hosted.ok(&["lockbox", "open"]);
    kernel_keyring::remove(&hosted.description()).unwrap();
    hosted.store_goes();
    hosted.ok(&["lockbox", "open"]);
}

#[test]
fn a_lockbox_on_the_volumes_own_disk_is_refused() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let (volume, _) = hosted.volume("one");
    let text = fs::read_to_string(hosted.config).unwrap();
    let beside = hosted.site.path("lockbox");
    fs::write(hosted.config, text.replace("path = 'lockbox'", &format!("path = '{}'", beside.display()))).unwrap();
    let refused = hosted.does_not_attach(72, &volume);
    assert!(refused.contains("lockbox entries") && refused.contains("on the volume's"), "{refused}");
    hosted.fails(72, &["lockbox", "add", &volume]);
    assert!(!beside.exists());
}

#[test]
fn deleting_a_key_takes_its_entry_along() {
    let hosted = Hosted::new("");
    hosted.ok(&["lockbox", "open"]);
    let (volume, reference) = hosted.volume("one");
    hosted.attaches(&volume);
    hosted.ok(&["key", "delete", &reference, "--yes"]);
    assert!(!hosted.entry(&reference).exists());
    hosted.does_not_attach(67, &volume);
}

#[test]
fn a_moved_key_has_an_entry_in_the_lockbox_if_it_had_one() {
    let vault = "[stores.vault]\ntype = 'directory'\npath = 'vault'\nowner = 'cinder.owner.pem'\nno_escrow = true\n\
                 identities = ['cinder.owner.key']";
    let hosted = Hosted::new(vault);
    hosted.ok(&["container", "create", "vault"]);
    hosted.ok(&["lockbox", "open"]);
    for has_entry in [true, false] {
        let path = hosted.site.file(&format!("v{has_entry}"), 64 << 20).into_os_string().into_string().unwrap();
        let old = hosted.ok(&["format", &path, "--store", "cinder"]);
        if has_entry {
            hosted.ok(&["lockbox", "add", &path, &old]);
        } else {
            hosted.ok(&["lockbox", "forget", &old]);
        }
        let moved = hosted.ok(&["key", "move", &old, "--to", "vault", "--volume", &path]);
        let new = moved.lines().next().unwrap();
        assert_eq!((hosted.entry(&old).exists(), hosted.entry(new).exists()), (false, has_entry));
        if has_entry {
            fs::rename(hosted.site.keys("vault"), hosted.site.keys("gone")).unwrap();
            hosted.attaches(&path);
            fs::rename(hosted.site.keys("gone"), hosted.site.keys("vault")).unwrap();
        }
        // A closed lockbox cannot take the entry, so the old key stays; the same command goes on.
        if has_entry {
            hosted.ok(&["lockbox", "close"]);
            fs::create_dir_all(hosted.entry(new).parent().unwrap()).unwrap();
            fs::write(hosted.entry(new), "an entry").unwrap();
            let refused = hosted.fails(68, &["key", "move", new, "--to", "cinder", "--volume", &path]);
            assert!(refused.contains("is closed") && hosted.site.sealed(new).exists(), "{refused}");
            hosted.ok(&["lockbox", "open"]);
            hosted.ok(&["key", "move", new, "--to", "cinder", "--volume", &path]);
            assert!(!hosted.site.sealed(new).exists());
        }
    }
}
