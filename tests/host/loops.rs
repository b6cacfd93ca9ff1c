//! Dependency loops: stores on volumes whose keys are in those stores.

use std::{
    fs,
    path::{Path, PathBuf},
};

use cryptattach::{
    base::key::{Location, Place, Replica, Ring},
    config::Config,
    unlock::loops,
};

use crate::site::{Site, sh};

/// The plaintext of a volume, with a file system that is mounted.
struct Opened {
    at: PathBuf,
}

impl Opened {
    fn new(site: &Site, volume: &str, name: &str) -> Self {
        let device = site.attach(volume, &site.name(name), &[]);
        let at = site.path(&format!("on-{name}"));
        fs::create_dir_all(&at).unwrap();
        sh(&format!("mkfs.ext4 -q {} && mount {0} {}", device.display(), at.display()));
        Self { at }
    }

    fn path(&self, name: &str) -> String {
        self.at.join(name).display().to_string()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.at).status();
    }
}

/// A second disk, in memory.
fn memory(site: &Site) -> Opened {
    let at = site.path("memory");
    fs::create_dir(&at).unwrap();
    sh(&format!("mount -t tmpfs -o size=48m memory {}", at.display()));
    Opened { at }
}

/// A blank file on it.
fn blank(disk: &Opened, name: &str) -> String {
    let path = disk.path(name);
    fs::File::create_new(&path).unwrap().set_len(20 << 20).unwrap();
    path
}

fn create<'a>(site: &Site, name: &'a str, path: &'a str) -> Vec<&'a str> {
    let (owner, identity) = (site.keys("cinder.owner.pem"), site.keys("cinder.owner.key"));
    vec!["container", "create", name, "--path", path, "--owner", owner, "--identity", identity, "--no-escrow"]
}

fn configuration(site: &Site, change: impl FnOnce(String) -> String) {
    let path = site.keys("cryptattach.toml");
    fs::write(path, change(fs::read_to_string(path).unwrap())).unwrap();
}

#[test]
fn a_store_on_a_volume_whose_key_is_in_it_is_not_made() {
    let site = Site::new();
    let memory = site.keys("logs").to_owned();
    site.ok(&create(&site, "logs", &memory));
    let before = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    let (volume, key) = site.volume("v", &["--store", "logs"]);
    let opened = Opened::new(&site, &volume, "v");
    // The store was elsewhere, and is made anew on the volume.
    configuration(&site, |text| text[..text.find("[stores.logs]").unwrap()].to_owned());
    let path = opened.path("logs");
    let told = site.fails(86, &create(&site, "logs", &path));
    assert!(
        told.contains("a dependency loop: the store 'logs'") && told.contains(&volume) && told.contains(&key),
        "{told}"
    );
    assert!(told.contains("next: keep the keys of 'logs' on a disk that opens without the store 'logs'"), "{told}");
    assert!(!fs::read_to_string(site.keys("cryptattach.toml")).unwrap().contains("logs"), "nothing is configured");
    assert!(site.fails(86, &["init", "--store", "logs", "--path", &path, "--no-escrow"]).contains("a dependency loop"));
    // One that has another name is in no loop.
    site.ok(&create(&site, "others", &opened.path("others")));
    fs::write(site.keys("cryptattach.toml"), before).unwrap();
    site.ok(&["test", &volume]);
}

#[test]
fn two_stores_that_rest_on_each_others_volumes_are_a_loop() {
    let site = Site::new();
    let (one, key) = site.volume("one", &[]);
    let on_one = Opened::new(&site, &one, "one");
    let path = on_one.path("second");
    site.ok(&create(&site, "second", &path));
    let disk = memory(&site);
    let other = blank(&disk, "other");
    let other_key = site.ok(&["format", &other, "--store", "second", "--keyslot"]);
    let on_other = Opened::new(&site, &other, "other");
    site.ok(&["test", &one]);
    site.ok(&["test", &other]);
    let (new, beside) = (site.file("new", 20 << 20).display().to_string(), blank(&disk, "beside"));

    // The first store moves to the other volume: each volume's key is on the other volume now.
    let (before, moved) = (site.keys("cinder").to_owned(), on_other.path("cinder"));
    sh(&format!("cp -a {before} {moved}"));
    configuration(&site, |text| text.replace(&format!("\"{before}\""), &format!("\"{moved}\"")));
    for arguments in [
        &["test", &one][..],
        &["test", &other],
        &["format", &new, "--store", "cinder"],
        &["format", &beside, "--store", "second"],
    ] {
        let told = site.fails(86, arguments);
        for word in
            ["the store 'cinder'", "the store 'second'", &one, &other, &key, &other_key, "nothing opens it again"]
        {
            assert!(told.contains(word), "{word}: {told}");
        }
    }
    for blank in [&new, &beside] {
        assert!(fs::read(blank).unwrap().iter().all(|byte| *byte == 0), "nothing is formatted");
    }
    let third = on_one.path("third");
    assert!(
        site.fails(86, &create(&site, "third", &third)).contains("a dependency loop"),
        "it would need a store in a loop"
    );
    // Attaching goes on: what is open is not made worse.
    site.ok(&["status", &site.name("one")]);

    // A person's passphrase opens one of them: then it is said only.
    let ours = format!("{} --config {}", env!("CARGO_BIN_EXE_cryptattach"), site.keys("cryptattach.toml"));
    sh(&format!(
        "{ours} key passphrase --for {other} >{0}; printf person | cryptsetup luksAddKey -q --pbkdf pbkdf2 \
         --pbkdf-force-iterations 1000 --key-file {0} {other} -",
        site.keys("passphrase")
    ));
    let output = site.run(&["test", &one]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && told.contains("there may be a dependency loop"), "{told}");

    // And back: no loop, and nothing is said.
    configuration(&site, |text| text.replace(&moved, &before));
    let output = site.run(&["test", &one]);
    assert!(output.status.success() && !String::from_utf8_lossy(&output.stderr).contains("loop"), "{output:?}");
}

#[test]
fn a_private_key_on_such_a_volume_is_said_and_a_lockbox_opens_what_is_under_the_store() {
    let site = Site::new();
    let (volume, _) = site.volume("v", &[]);
    let opened = Opened::new(&site, &volume, "v");
    let (identity, moved) = (site.keys("cinder.owner.key"), opened.path("owner.key"));
    sh(&format!("cp {identity} {moved}"));
    configuration(&site, |text| text.replace(identity, &moved));
    let disk = memory(&site);
    let output = site.run(&["format", &blank(&disk, "w")]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && told.contains("there may be a dependency loop: the store 'cinder' (private key"),
        "{told}"
    );

    // All of it on the volume: refused; but a lockbox opens the volume while the store is away.
    let (before, moved) = (site.keys("cinder").to_owned(), opened.path("cinder"));
    sh(&format!("cp -a {before} {moved}"));
    configuration(&site, |text| text.replace(&format!("\"{before}\""), &format!("\"{moved}\"")));
    let check = || {
        let config = Config::read(Path::new(site.keys("cryptattach.toml"))).unwrap();
        let store = "cinder".parse().unwrap();
        (loops::of(&config, &store, &[]).len(), loops::check(&config, &store, &[]).is_ok())
    };
    assert_eq!(check(), (1, false));
    configuration(&site, |text| text + "\n[lockbox]\nhost = \"a\"\nstore = \"cinder\"\n");
    assert_eq!(check(), (1, true));
}

/// Swift on loopback: the inventory says where its devices are.
#[test]
fn an_object_store_on_this_host_whose_disks_need_its_keys_is_a_loop_if_no_replica_is_elsewhere() {
    let site = Site::new();
    let (volume, key) = site.volume("disk", &[]);
    let opened = Opened::new(&site, &volume, "disk");
    let inventory = format!(
        "[[host]]\nname = 'here'\naddresses = ['127.0.0.1']\n[[device]]\nhost = 'here'\ndevice = 'd1'\npath = '{}'\n[[device]]\nhost = \
         'here'\ndevice = 'd2'\npath = '{}'\n",
        opened.at.display(),
        site.keys("")
    );
    fs::write(site.keys("inventory.toml"), inventory).unwrap();
    configuration(&site, |text| text + "\n[separation]\ninventory = \"inventory.toml\"\n");
    let config = Config::read(Path::new(site.keys("cryptattach.toml"))).unwrap();
    let replica = |device: &str| Place {
        what: "sealed key".to_owned(),
        at: Location::Replica(Replica {
            ring: Ring::Object,
            host: "127.0.0.1".into(),
            port: 6200,
            device: device.into(),
        }),
        opens: true,
    };
    let store = "cinder".parse().unwrap();
    let told = loops::check(&config, &store, &[replica("d1")]).unwrap_err().to_string();
    assert!(told.contains(&key) && told.contains("the object's replica on 127.0.0.1 device d1"), "{told}");
    loops::check(&config, &store, &[replica("d1"), replica("d2")]).unwrap();
    assert_eq!(loops::of(&config, &store, &[replica("d1"), replica("d2")]).len(), 1, "it is said");
    assert_eq!(loops::of(&config, &store, &[replica("d2")]).len(), 0);
}
