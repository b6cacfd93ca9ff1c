//! Headers of volumes, backed up and restored: as cryptsetup does it, and where it must not.

use std::{
    fs,
    os::unix::{fs::FileExt, process::ExitStatusExt},
    path::Path,
    process::Command,
};

use crate::site::{LoopDevice, Site, sh};

const HEADER: usize = 16 << 20;

fn overwrite(volume: &str, at: u64, len: usize) {
    fs::OpenOptions::new().write(true).open(volume).unwrap().write_all_at(&vec![0x55; len], at).unwrap();
}

#[test]
fn a_header_goes_to_cryptsetup_and_back() {
    let site = Site::new();
    let (volume, key) = site.volume("one", &["--keyslot"]);
    let (ours, theirs) = (site.path("ours"), site.path("theirs"));
    let [our_file, their_file] = [&ours, &theirs].map(|path| path.to_str().unwrap());
    let device = LoopDevice::new(volume.as_ref(), "");
    let saved = site.json(&["header", "backup", device.path(), our_file]);
    assert_eq!((&saved["key"], saved["bytes"].as_u64()), (&key.clone().into(), Some(HEADER as u64)));
    assert_eq!(sh(&format!("stat -c %a {our_file}")), "600");
    sh(&format!("cryptsetup luksHeaderBackup {volume} --header-backup-file {their_file}"));
    assert!(fs::read(&ours).unwrap() == fs::read(&theirs).unwrap(), "it is the same file");
    sh(&format!("cryptsetup luksDump {our_file}"));

    overwrite(&volume, 0, HEADER);
    assert!(site.fails(73, &["header", "restore", device.path(), their_file]).contains("nothing on "));
    let told = site.ok(&["header", "restore", device.path(), their_file, "--lost"]);
    assert!(told.contains(": restored") && told.contains(&key), "{told}");
    site.attaches(device.path());
    let passphrase = format!("{} key passphrase --for {volume}", env!("CARGO_BIN_EXE_cryptattach"));
    sh(&format!(
        "{passphrase} --config {} | cryptsetup open --test-passphrase --key-file=- {volume}",
        site.keys("cryptattach.toml")
    ));
    assert!(site.ok(&["header", "restore", device.path(), our_file]).contains("nothing was written"));
    assert!(fs::read_to_string(site.keys("audit")).unwrap().contains("header restore"));
}

#[test]
fn an_attached_volumes_header_is_saved_and_not_restored() {
    let site = Site::new();
    let (volume, _) = site.volume("one", &[]);
    let file = site.path("header").into_os_string().into_string().unwrap();
    let name = site.name("one");
    site.attach(&volume, &name, &[]);
    site.ok(&["header", "backup", &volume, &file]);
    assert!(site.fails(75, &["header", "restore", &volume, &file]).contains("is attached already"));
    site.ok(&["detach", &name]);
    site.ok(&["key", "rotate", &volume]);
    let told = site.fails(65, &["header", "restore", &volume, &file, "--older"]);
    assert!(told.contains("another volume key") && told.contains("data would be lost"), "{told}");
    site.attaches(&volume);
}

/// One device name that was mistyped, and the data of another volume would begin with a header.
#[test]
fn a_volume_that_has_its_header_elsewhere_keeps_its_data() {
    let site = Site::new();
    let (volume, _) = site.volume("one", &[]);
    let file = site.path("header").into_os_string().into_string().unwrap();
    site.ok(&["header", "backup", &volume, &file]);
    let [other, detached] = ["other", "detached"].map(|name| site.path(name).into_os_string().into_string().unwrap());
    sh(&format!("truncate -s 32M {other}"));
    site.ok(&["format", &other, "--header", &detached]);
    sh(&format!("dd if=/dev/urandom of={other} bs=1M count=32 conv=notrunc status=none"));
    let (config, data) = (site.keys("cryptattach.toml"), fs::read(&other).unwrap());
    let before = fs::read_to_string(config).unwrap();
    let listed = |text: &str| fs::write(config, before.clone() + text).unwrap();
    let refused = |why: &str| {
        let told = site.fails(73, &["header", "restore", &other, &file, "--lost"]);
        assert!(told.contains(why) && fs::read(&other).unwrap() == data, "{told}");
    };
    listed(&format!("[volumes.other]\ndevice = \"{other}\"\nheader = \"{detached}\"\n"));
    refused("is not on the device itself");
    listed(&format!("[volumes.one]\ndevice = \"{volume}\"\n"));
    refused("is the volume");
}

/// What /etc/crypttab and udev know, too. The command has a /etc and a /dev/disk of its own.
#[test]
fn a_device_that_crypttab_or_udev_knows_otherwise_is_not_written_over() {
    let site = Site::new();
    let (volume, _) = site.volume("one", &[]);
    let device = LoopDevice::new(volume.as_ref(), "");
    let file = site.path("header").into_os_string().into_string().unwrap();
    let uuid = site.json(&["header", "backup", &volume, &file])["volume"].as_str().unwrap().to_owned();
    let other = site.file("other", 32 << 20).into_os_string().into_string().unwrap();
    sh(&format!("dd if=/dev/urandom of={other} bs=1M count=32 conv=notrunc status=none"));
    let data = fs::read(&other).unwrap();
    let refused = |crypttab: &str, link: &str, why: &str| {
        let own = format!(
            "mkdir -p /dev/disk && etc=$(mktemp -d) && mount -t tmpfs etc $etc && cp -a /etc/. $etc && \
             echo '{crypttab}' >$etc/crypttab && mount --bind $etc /etc && mount -t tmpfs disk /dev/disk && \
             mkdir /dev/disk/by-uuid && ln -s {} /dev/disk/by-uuid/{link} && \
             exec {} header restore {other} {file} --lost",
            device.path(),
            env!("CARGO_BIN_EXE_cryptattach")
        );
        let mut unshare = Command::new("unshare");
        unshare.args(["-m", "sh", "-c", &own]).env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml"));
        let output = unshare.output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(73) && told.contains(why), "{told}");
        assert!(fs::read(&other).unwrap() == data, "{told}");
    };
    refused(&format!("x {other} none luks,header=/boot/x"), "no", "is not on the device itself");
    refused(&format!("x {other} none plain,cipher=aes-xts-plain64"), "no", "is not on the device itself");
    refused(&format!("x {volume} none luks"), "no", "is the volume");
    refused("", &uuid, "is the volume");
}

#[test]
fn a_backup_from_before_a_move_names_the_new_place_when_it_is_told() {
    let site = Site::new();
    let (volume, old) = site.volume("one", &[]);
    let (_, others) = site.volume("two", &[]);
    let file = site.path("header").into_os_string().into_string().unwrap();
    site.ok(&["header", "backup", &volume, &file]);
    crate::moving::with_vault(&site);
    let new = site.ok(&["key", "move", &old, "--to", "vault", "--volume", &volume]);
    let new = new.lines().next().unwrap();
    overwrite(&volume, 0, HEADER);
    let damaged = fs::read(&volume).unwrap();
    let restore = ["header", "restore", &volume, &file, "--lost"];
    site.fails(67, &restore);
    // Nobody's word is enough.
    site.fails(68, &[&restore[..], &["--key", &others]].concat());
    assert!(fs::read(&volume).unwrap() == damaged);
    assert_eq!(site.json(&[&restore[..], &["--key", new]].concat())["key"], new);
    site.attaches(&volume);
    let token = sh(&format!("cryptsetup token export --token-id 0 {volume}"));
    assert!(token.contains("vault") && !token.contains("cinder"), "{token}");
    assert!(site.ok(&[&restore[..], &["--key", new]].concat()).contains("nothing was written"));
}

#[test]
fn a_backup_whose_passphrase_is_no_longer_sealed_comes_back_only_when_asked() {
    let site = Site::new();
    let (volume, key) = site.volume("one", &["--keyslot"]);
    let file = site.path("header").into_os_string().into_string().unwrap();
    site.ok(&["header", "backup", &volume, &file]);
    site.ok(&["key", "rotate", "--passphrase", &volume]);
    overwrite(&volume, 0, HEADER);
    let damaged = fs::read(&volume).unwrap();
    let restore = ["header", "restore", &volume, &file, "--lost"];
    let told = site.fails(65, &restore);
    assert!(
        told.contains(&format!("sealed with the key {key} opens no keyslot")) && told.contains("--older"),
        "{told}"
    );
    assert!(fs::read(&volume).unwrap() == damaged);
    site.ok(&[&restore[..], &["--older"]].concat());
    site.attaches(&volume);
    // The next step that it says.
    site.ok(&["key", "rotate", "--passphrase", &volume]);
    let passphrase = format!("{} key passphrase --for {volume}", env!("CARGO_BIN_EXE_cryptattach"));
    sh(&format!(
        "{passphrase} --config {} | cryptsetup open --test-passphrase --key-file=- {volume}",
        site.keys("cryptattach.toml")
    ));
}

/// Runs it and kills it before its write or flush of this number; whether it was killed.
fn killed_at(site: &Site, number: u32, arguments: &[&str]) -> bool {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64,fsync", "-e"]);
    strace.arg(format!("inject=pwrite64,fsync:signal=KILL:when={number}"));
    strace.arg(env!("CARGO_BIN_EXE_cryptattach")).args(arguments);
    let output = strace.env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml")).output().unwrap();
    assert!(output.status.success() || output.status.signal() == Some(9), "{output:?}");
    !output.status.success()
}

#[test]
fn a_restore_that_is_killed_at_any_write_goes_on() {
    for (damaged, one_copy_is_whole) in [(0..512, true), (16 << 10..17 << 10, true), (0..HEADER, false)] {
        let site = Site::new();
        let (volume, _) = site.volume("one", &["--keyslot"]);
        let file = site.path("header").into_os_string().into_string().unwrap();
        site.ok(&["header", "backup", &volume, &file]);
        let data = fs::read(&volume).unwrap()[HEADER..].to_vec();
        let damage = || overwrite(&volume, damaged.start as u64, damaged.len());
        let mut kills = 0;
        for number in 1.. {
            damage();
            let is_killed = killed_at(&site, number, &["header", "restore", &volume, &file, "--lost"]);
            if one_copy_is_whole || !is_killed {
                site.ok(&["test", &volume]);
            }
            if !is_killed {
                break;
            }
            kills += 1;
            site.ok(&["header", "restore", &volume, &file, "--lost"]);
            site.ok(&["test", &volume]);
            assert!(site.ok(&["header", "restore", &volume, &file]).contains("nothing was written"), "{number}");
            assert!(fs::read(&volume).unwrap()[HEADER..] == data, "no data is written over");
        }
        println!("{kills} kills");
        assert!(kills >= 6, "the keyslots and two copies, each with a flush: {kills}");
        assert!(Path::new(&file).exists());
    }
}
