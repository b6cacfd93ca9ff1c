//! Format: what it refuses, and what a kill at each step leaves.

use std::{
    fs,
    os::unix::{ffi::OsStrExt, fs::FileExt},
    process::{Command, Output},
};

use crate::site::{LoopDevice, Site, sh};

#[test]
fn only_blank_devices_are_formatted() {
    let site = Site::new();
    for (name, make) in
        [("ext4", "mkfs.ext4 -q"), ("fat", "mkfs.fat"), ("gpt", "echo 'label: gpt' | sfdisk -q"), ("swap", "mkswap -q")]
    {
        let path = site.file(name, 64 << 20);
        sh(&format!("{make} {} >/dev/null", path.display()));
        let before = fs::read(&path).unwrap();
        let refused = site.fails(73, &["format", path.to_str().unwrap()]);
        assert!(refused.contains("is not blank: it holds") && refused.contains("--force"), "{refused}");
        assert!(refused.contains("at byte ") || name == "gpt", "{refused}");
        assert_eq!(fs::read(&path).unwrap(), before, "{name}");
        assert_eq!(site.ok(&["key", "list"]), "", "no key is made for a device that is refused");
    }
    let (volume, _) = site.volume("ours", &[]);
    assert!(site.fails(73, &["format", &volume]).contains("crypto_LUKS"));
}

#[test]
fn bytes_of_no_known_kind_are_not_blank() {
    let site = Site::new();
    let path = site.file("unknown", 64 << 20);
    fs::File::options().write(true).open(&path).unwrap().write_all_at(b"\x5a", 40 << 20).unwrap();
    let device = LoopDevice::new(&path, "");
    for name in [device.path(), path.to_str().unwrap()] {
        let refused = site.fails(if name == device.path() { 73 } else { 75 }, &["format", name]);
        assert!(refused.contains("data at byte 41943040") || refused.contains("behind the loop device"), "{refused}");
    }
    site.ok(&["format", device.path(), "--force"]);
}

#[test]
fn force_leaves_no_old_signature_behind() {
    let site = Site::new();
    let path = site.file("old", 64 << 20);
    sh(&format!(
        "mkfs.ext4 -q {0} && echo 'label: gpt' | sfdisk -q --force --wipe never {0} >/dev/null",
        path.display()
    ));
    site.ok(&["format", path.to_str().unwrap(), "--force"]);
    assert_eq!(sh(&format!("wipefs --noheadings --output TYPE {} | sort -u", path.display())), "crypto_LUKS");
}

#[test]
fn devices_that_cannot_be_formatted_say_why() {
    let site = Site::new();
    assert!(site.fails(66, &["format", "/dev/does-not-exist"]).contains("does not exist"));
    assert!(site.fails(65, &["format", "/proc"]).contains("neither a block device nor a regular file"));
    let small = site.file("small", 1 << 20);
    assert!(site.fails(65, &["format", small.to_str().unwrap()]).contains("too small"));

    let file = site.file("read-only", 64 << 20);
    let device = LoopDevice::new(&file, "--read-only");
    assert!(site.fails(74, &["format", device.path()]).contains("read-only"));
    drop(device);

    let file = site.file("mounted", 64 << 20);
    sh(&format!("mkfs.ext4 -q {}", file.display()));
    let device = LoopDevice::new(&file, "");
    let files = site.mount(device.path().as_ref());
    let refused = site.fails(75, &["format", device.path(), "--force"]);
    assert!(refused.contains(&format!("mounted on {}", files.path().display())), "{refused}");
}

#[test]
fn a_detached_header_leaves_the_device_untouched() {
    let site = Site::new();
    let path = site.file("data", 64 << 20);
    let volume = path.to_str().unwrap();
    let header = site.path("header").into_os_string().into_string().unwrap();
    site.ok(&["format", volume, "--header", &header]);
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    assert!(site.fails(65, &["attach", volume, "x"]).contains("has no LUKS header"));
    let name = site.name("detached");
    let device = site.attach(volume, &name, &["--header", &header]);
    assert_eq!(site.json(&["status", &name])["size_bytes"], 64 << 20);
    sh(&format!("mkfs.ext4 -q {}", device.display()));
    site.ok(&["detach", &name]);
    assert!(sh(&format!("cryptsetup luksDump {header}")).contains("cryptattach"));
}

#[test]
fn a_header_file_that_holds_something_is_left_alone() {
    let site = Site::new();
    let volume = site.file("data", 64 << 20).into_os_string().into_string().unwrap();
    let backup = site.path("old.header");
    site.ok(&["format", &volume, "--header", backup.to_str().unwrap()]);
    fs::File::options().write(true).open(&backup).unwrap().set_len(4 << 20).unwrap();
    for (file, found) in [
        (site.keys("escrow.key").to_owned(), "data at byte 0, of no known kind"),
        (backup.into_os_string().into_string().unwrap(), "crypto_LUKS"),
    ] {
        let (before, keys) = (fs::read(&file).unwrap(), site.ok(&["key", "list"]));
        let refused = site.fails(73, &["format", &volume, "--header", &file]);
        assert!(refused.contains(found), "{refused}");
        assert!(fs::read(&file).unwrap() == before, "{file} is as it was");
        assert_eq!(site.ok(&["key", "list"]), keys);
    }
}

#[test]
fn a_header_does_not_stand_on_the_data() {
    let site = Site::new();
    let file = site.file("data", 64 << 20);
    let volume = file.to_str().unwrap();
    assert!(site.fails(75, &["format", volume, "--header", volume]).contains("is in use"));
    let device = LoopDevice::new(&file, "");
    for (volume, header) in [(device.path(), volume), (volume, device.path()), (device.path(), device.path())] {
        assert!(site.fails(75, &["format", volume, "--header", header]).contains("is in use"));
    }
    assert_eq!(site.ok(&["key", "list"]), "");
}

#[test]
fn a_device_may_have_a_name_that_is_no_text() {
    let site = Site::new();
    let volume = site.path("").join(std::ffi::OsStr::from_bytes(b"caf\xe9.img"));
    fs::File::create_new(&volume).unwrap().set_len(64 << 20).unwrap();
    let reference = site.ok(&["format".as_ref(), volume.as_os_str()]);
    assert_eq!(site.ok(&["key", "list"]), reference);
    let audit = fs::read_to_string(site.keys("audit")).unwrap();
    assert!(audit.contains("caf\u{fffd}.img"), "{audit}");
}

/// Runs `format` and kills it as it enters the `nth` of a system call.
fn killed(site: &Site, call: &str, nth: usize, volume: &str) -> Output {
    let inject = format!("inject={call}:signal=KILL:when={nth}");
    let trace = format!("trace={call}");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
    command.arg(env!("CARGO_BIN_EXE_cryptattach")).args(["format", volume, "--force"]);
    command.env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml")).output().unwrap()
}

#[test]
fn a_kill_at_any_step_loses_nothing() {
    let site = Site::new();
    let (bystander, _) = site.volume("bystander", &[]);
    let mut kills = 0;
    for call in ["fsync", "pwrite64", "renameat2", "linkat", "unlink", "flock", "write", "memfd_create", "ftruncate"] {
        for nth in 1..40 {
            let path = site.file(&format!("{call}{nth}"), 64 << 20);
            // Format is told to take the device, and must not touch more than its header and where signatures stand.
            fs::File::options().write(true).open(&path).unwrap().write_all_at(b"behind the header", 20 << 20).unwrap();
            let volume = path.to_str().unwrap();
            let before = site.ok(&["key", "list"]);
            let output = killed(&site, call, nth, volume);
            if output.status.success() {
                break;
            }
            kills += 1;
            // Each key in the store is whole, and those that were there still are.
            let after = site.ok(&["key", "list"]);
            assert!(before.lines().all(|key| after.lines().any(|other| other == key)), "{call} {nth}");
            for key in after.lines() {
                site.ok(&["key", "show", key]);
            }
            // Either there is no header, or a whole one whose key is stored. Then format again, or attach.
            let name = site.name(&format!("k{call}{nth}"));
            let raw = fs::read(&path).unwrap();
            if raw.starts_with(b"LUKS\xba\xbe") {
                site.attach(volume, &name, &["--read-only"]);
            } else {
                site.ok(&["format", volume, "--force"]);
                site.attach(volume, &name, &["--read-only"]);
            }
            site.ok(&["detach", &name]);
            assert_eq!(&raw[20 << 20..][..17], b"behind the header", "{call} {nth}");
            fs::remove_file(&path).unwrap();
        }
    }
    assert!(kills >= 15, "only {kills} kills happened");
    println!("{kills} kills");
    site.attaches(&bystander);
}

#[test]
fn a_volume_in_use_is_not_formatted_even_by_force() {
    let site = Site::new();
    let (volume, _) = site.volume("used", &[]);
    let name = site.name("used");
    site.attach(&volume, &name, &[]);
    assert!(site.fails(75, &["format", &volume, "--force"]).contains("is attached already"));
    site.ok(&["detach", &name]);
    let device = LoopDevice::new(volume.as_ref(), "");
    let refused = site.fails(75, &["format", &volume, "--force"]);
    assert!(refused.contains(&format!("behind the loop device {}", &device.path()["/dev/".len()..])), "{refused}");
}
