//! Encryption in place: what a kill, a power cut or a torn block leaves at each write, that nothing is lost, and that no
//! plaintext stays.

use std::{
    collections::HashSet,
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::Stdio,
    thread,
    time::Duration,
};

use crate::{
    rotate::{Counts, Filled, Operation, Random, Recorded, all_crashes, record, replay, told},
    site::{LoopDevice, Site, sh},
};

const MIB: u64 = 1 << 20;
const HEADER: usize = 16 << 20;
/// Header, first part and record.
const ROOM: u64 = 18 * MIB;
const MARK: &str = "this is known plaintext, line ";

/// A file with an ext4 file system of `mib` MiB at its start, full of random data and of known plaintext.
pub fn plain(mib: u64, more: u64) -> Filled {
    let site = Site::new();
    let folder = site.path("files");
    fs::create_dir(&folder).unwrap();
    let text: String = (0..20_000).map(|line| format!("{MARK}{line}\n")).collect();
    fs::write(folder.join("text"), text).unwrap();
    let volume = site.file("v", mib * MIB + ROOM + more).into_os_string().into_string().unwrap();
    sh(&format!(
        "head -c {} /dev/urandom > {1}/random; mkfs.ext4 -qF -b 1024 -d {1} {volume} {mib}m",
        (mib - 4) * MIB,
        folder.display()
    ));
    let mut plain = fs::read(&volume).unwrap();
    plain.truncate((mib * MIB) as usize);
    Filled { site, volume, plain }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

impl Filled {
    fn encrypt(&self, more: &[&str]) -> std::process::Output {
        self.site.run(&[&["encrypt", &self.volume], more].concat())
    }

    /// The volume is attached by the key that its header names, its data is all there, and the device has none of it.
    fn check_encrypted(&self, what: &str) {
        let name = self.site.name("check");
        let device = self.site.attach(&self.volume, &name, &["--read-only"]);
        let is_same = fs::read(device).unwrap().starts_with(&self.plain);
        self.site.ok(&["detach", &name]);
        assert!(is_same, "{what}: DATA LOST");
        let told: HashSet<_> = self.plain.chunks(512).filter(|sector| sector.iter().any(|byte| *byte != 0)).collect();
        let device = fs::read(&self.volume).unwrap();
        let left = device.chunks(512).skip(64).position(|sector| told.contains(sector));
        assert_eq!(left, None, "{what}: plaintext stays");
        assert!(device[HEADER..].chunks(512).all(|sector| sector.iter().any(|byte| *byte != 0)), "{what}: zeroes");
    }

    /// Whatever the crash was, the same command ends it.
    fn encryption_trial(&self, what: &str, image: &[u8], keys: &Path) -> &'static str {
        self.restore(image, keys);
        let outcome = match () {
            () if &image[..6] == b"LUKS\xba\xbe" || &image[16384..16390] == b"SKUL\xba\xbe" => "went on by the header",
            () if image[..self.plain.len()] != self.plain => "went on by the record, its start half written",
            () if find(&image[image.len() - (2 << 20)..], b"cryptattach-ipe1") == Some(0) => "went on by the record",
            () => "began",
        };
        let name = self.site.name("first");
        let first = self.site.run(&["attach", &self.volume, &name, "--read-only", "--backend", "userspace"]);
        let said = String::from_utf8_lossy(&first.stderr).into_owned();
        if first.status.success() {
            self.site.ok(&["detach", &name]);
        } else {
            let is_right = ["is being encrypted in place", "has no LUKS header", "is damaged"]
                .iter()
                .any(|words| said.contains(words));
            assert!(is_right, "{what}: {said}");
        }
        assert!(fs::read(&self.volume).unwrap() == image, "{what}: attaching has written");
        let output = self.encrypt(&[]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        // Done, and the journal removed.
        let is_done = first.status.success() && told.contains("is encrypted already");
        assert!(output.status.success() || is_done, "{what}: {told}");
        self.check_encrypted(what);
        let listed = self.site.ok(&["list"]);
        assert!(!listed.contains("in place"), "{what}: {listed}");
        if is_done { "done" } else { outcome }
    }

    /// Paused by SIGTERM once so much is done.
    fn pause(&self, bytes: u64) -> String {
        let mut command = self.site.command();
        command.args(["encrypt", &self.volume, "--rate", "2", "--step", "64", "--json"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut said, mut lines) = (String::new(), BufReader::new(child.stderr.take().unwrap()));
        let is_there = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["done_bytes"].as_u64().unwrap() >= bytes
        };
        while lines.read_line(&mut said).unwrap() > 0 && !is_there(said.lines().last().unwrap()) {}
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::SIGTERM).unwrap();
        lines.read_to_string(&mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(83), "{said}");
        said
    }

    /// The device and the key disk as they are before the first write that `is_it`.
    fn before(&self, recorded: &Recorded, is_it: impl Fn(usize) -> bool) -> Vec<u8> {
        let mut image = recorded.base.clone();
        for (done, operation) in recorded.operations.iter().enumerate() {
            if let Operation::Write(at, data) = operation {
                if is_it(*at) {
                    self.restore(&image, &recorded.snapshots.join(done.to_string()));
                    return image;
                }
                image[*at..][..data.len()].copy_from_slice(data);
            }
        }
        panic!("no such write");
    }
}

#[test]
fn a_crash_at_any_write_and_lost_or_torn_blocks_lose_nothing_and_leave_no_plaintext() {
    let mut counts = Counts::new();
    let filled = plain(6, 3 << 19);
    let recorded = record(&filled, &["encrypt", &filled.volume, "--step", "256"]);
    filled.check_encrypted("not interrupted");
    let trial = |what: &str, image: &[u8], keys: &Path| filled.encryption_trial(what, image, keys);
    replay(recorded, "encrypt", (all_crashes(), 0), &mut counts, &trial);
    assert!(told(&counts) > 20);
}

/// The whole way of a disk that is in use: it is full, it is shrunk, it is killed again and again.
#[test]
fn a_file_system_that_fills_its_loop_device_is_encrypted_through_kills_and_grows_again() {
    let site = Site::new();
    let file = site.file("disk", 96 * MIB);
    let device = LoopDevice::new(&file, "");
    let path = device.path();
    sh(&format!("mkfs.ext4 -q -b 4096 {path}"));
    let mounted = site.mount(path.as_ref());
    let text: String = (0..300_000).map(|line| format!("{MARK}{line}\n")).collect();
    fs::write(mounted.path().join("text"), text).unwrap();
    let at = mounted.path().display().to_string();
    sh(&format!(
        "for n in $(seq 40); do head -c $((n * 9000)) /dev/urandom > {at}/file$n; done; ln -s file1 {at}/link; sync"
    ));
    let sums = sh(&format!("cd {at} && sha256sum file* text"));
    let refused = site.fails(75, &["encrypt", path]);
    assert!(refused.contains("mounted on"), "{refused}");
    drop(mounted);
    let refused = site.fails(73, &["encrypt", path]);
    assert!(
        refused.contains("is too large") && refused.contains("--shrink") && refused.contains("79872K"),
        "{refused}"
    );

    let (mut kills, mut random) = (0, Random(11));
    loop {
        let mut command = site.command();
        command.args(["encrypt", path, "--shrink", "--step", "16"]).stdin(Stdio::null());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        // Not while resize2fs is at work: that is not ours to survive.
        let is_begun = sh(&format!("blkid -p -o value -s TYPE {path} || true")) == "crypto_LUKS";
        if is_begun {
            thread::sleep(Duration::from_millis(300 + random.below(700)));
            let _ = child.kill();
        } else {
            while child.try_wait().unwrap().is_none() && !fs::read(&file).unwrap().starts_with(b"LUKS\xba\xbe") {
                thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
        }
        let output = child.wait_with_output().unwrap();
        match output.status.signal() {
            Some(_) => kills += 1,
            None => {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                break;
            }
        }
        if kills == 40 {
            site.ok(&["encrypt", path]);
            break;
        }
    }
    println!("{kills} kills");
    assert!(kills >= 3);
    let name = site.name("grown");
    let plaintext = site.attach(path, &name, &[]);
    sh(&format!("e2fsck -f -n {0} && resize2fs {0} && e2fsck -f -n {0}", plaintext.display()));
    let mounted = site.mount(&plaintext);
    assert_eq!(sh(&format!("cd {} && sha256sum file* text", mounted.path().display())), sums);
    assert_eq!(fs::read_link(mounted.path().join("link")).unwrap(), Path::new("file1"));
    drop(mounted);
    site.ok(&["detach", &name]);
    let encrypted = fs::read(&file).unwrap();
    assert_eq!(find(&encrypted, MARK.as_bytes()), None, "plaintext stays");
    let dump = sh(&format!("cryptsetup luksDump {path}"));
    assert!(!dump.contains("equirement") && dump.contains("cryptattach"), "{dump}");
    assert!(site.fails(73, &["encrypt", path]).contains("is encrypted already"));
    let audit = fs::read_to_string(site.keys("audit")).unwrap();
    assert!(audit.contains("\"action\":\"encrypt begin\"") && audit.contains("\"action\":\"encrypt\""), "{audit}");
}

#[test]
fn xfs_and_btrfs_are_encrypted_too() {
    for (name, make, grow, check) in [
        ("xfs", "mkfs.xfs -q -d size=320m", "xfs_growfs", "xfs_repair -n"),
        ("btrfs", "mkfs.btrfs -q -b 320m", "btrfs filesystem resize max", "btrfs check --readonly"),
    ] {
        let site = Site::new();
        let file = site.file(name, 340 * MIB);
        let device = LoopDevice::new(&file, "");
        sh(&format!("{make} {}", device.path()));
        let mounted = site.mount(device.path().as_ref());
        let at = mounted.path().display().to_string();
        sh(&format!("for n in $(seq 30); do head -c $((n * 90000)) /dev/urandom > {at}/file$n; done"));
        let text: String = (0..100_000).map(|line| format!("{MARK}{line}\n")).collect();
        fs::write(mounted.path().join("text"), text).unwrap();
        let sums = sh(&format!("cd {at} && sha256sum file* text"));
        drop(mounted);
        site.ok(&["encrypt", device.path()]);
        let plaintext = site.attach(device.path(), &site.name(name), &[]);
        sh(&format!("{check} {}", plaintext.display()));
        let mounted = site.mount(&plaintext);
        assert_eq!(sh(&format!("cd {at} && sha256sum file* text")), sums, "{name}");
        sh(&format!("{grow} {at}"));
        let bytes = sh(&format!("df --output=size -B1 {at} | tail -1")).trim().parse::<u64>().unwrap();
        assert!(bytes > 300 * MIB || name == "xfs", "{name}: {bytes}");
        drop(mounted);
        site.ok(&["detach", &site.name(name)]);
        assert_eq!(find(&fs::read(&file).unwrap(), MARK.as_bytes()), None, "{name}: plaintext stays");
    }
}

#[test]
fn a_half_encrypted_device_is_told_as_that_and_nobody_opens_it() {
    let filled = plain(24, 0);
    let Filled { site, volume, .. } = &filled;
    let said = filled.pause(4 * MIB);
    assert!(said.contains("is paused") && said.contains(&format!("cryptattach encrypt {volume}")), "{said}");
    let before = fs::read(volume).unwrap();
    let words = format!("paused; go on with: cryptattach encrypt {volume}");
    for verb in [&["list"][..], &["explain", volume], &["explain"]] {
        let told = site.ok(verb);
        assert!(told.contains("being encrypted in place, ") && told.contains(&words), "{verb:?}: {told}");
    }
    let listed = site.json(&["list"]);
    let is_it = |one: &serde_json::Value| one["source"] == **volume && one["rotation"]["kind"] == "encrypt";
    assert!(listed.as_array().unwrap().iter().any(is_it), "{listed}");
    let key = site.ok(&["key", "list"]);
    let backup = site.path("backup").display().to_string();
    for verb in [
        &["attach", volume, &site.name("x"), "--backend", "userspace"][..],
        &["test", volume],
        &["key", "rotate", volume],
        &["key", "rotate", volume, "--passphrase"],
        &["key", "passphrase", "--for", volume],
        &["key", "erase", volume, "--yes"],
        &["key", "import", volume, "--key-file", "/etc/hostname"],
        &["header", "backup", volume, &backup],
    ] {
        let output = site.command().args(verb).stdin(Stdio::null()).stdout(Stdio::piped()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{verb:?}");
        assert!(
            said.contains("is being encrypted in place") && said.contains("'cryptattach encrypt"),
            "{verb:?}: {said}"
        );
    }
    assert!(!site.run(&["format", volume]).status.success());
    assert_eq!(site.ok(&["key", "list"]), key);
    // Other programs: nobody mounts it, nobody opens it.
    assert_eq!(sh(&format!("blkid -p -o value -s TYPE {volume}")), "crypto_LUKS");
    let others = sh(&format!(
        "cryptsetup luksDump {volume} 2>&1; cryptsetup open --test-passphrase --key-file /etc/hostname {volume} 2>&1; \
         cryptsetup repair -q {volume} 2>&1; cryptsetup reencrypt -q --key-file /etc/hostname {volume} 2>&1; true"
    ));
    assert!(others.contains("equirement"), "{others}");
    assert!(fs::read(volume).unwrap() == before, "somebody has written");

    // The store is away: nothing is written. Then it is back.
    sh(&format!("mv {0} {0}-away", site.keys("cinder")));
    assert!(!filled.encrypt(&[]).status.success());
    assert!(fs::read(volume).unwrap() == before, "without a key");
    sh(&format!("mv {0}-away {0}", site.keys("cinder")));
    // Another host goes on: the device tells all.
    sh(&format!("rm -r {}", site.keys("site-state")));
    site.ok(&["encrypt", volume]);
    filled.check_encrypted("on another host");
}

#[test]
fn an_older_header_of_the_same_run_ruins_nothing_here_nor_on_another_host() {
    let filled = plain(24, 0);
    let Filled { site, volume, .. } = &filled;
    filled.pause(MIB);
    let older = fs::read(volume).unwrap()[..32 << 10].to_vec();
    // As long as less than the header's length was done since, all plaintext that it tells of is still there.
    filled.pause(8 * MIB);
    let image = [&older[..], &fs::read(volume).unwrap()[older.len()..]].concat();
    fs::write(volume, &image).unwrap();
    filled.pause(18 * MIB);
    let newest = fs::read(volume).unwrap();
    let refused = |image: &[u8], what: &str| {
        let image = [&older[..], &image[older.len()..]].concat();
        fs::write(volume, &image).unwrap();
        let refused = site.fails(65, &["encrypt", volume]);
        assert!(
            refused.contains("is not what is to be encrypted next") && refused.contains("nothing was encrypted twice"),
            "{what}: {refused}"
        );
        assert!(fs::read(volume).unwrap()[32 << 10..] == image[32 << 10..], "{what}: data was written");
    };
    refused(&newest, "in the middle");
    sh(&format!("mv {0} {0}-kept", site.keys("site-state")));
    refused(&newest, "on another host");
    sh(&format!("rm -r {0} && mv {0}-kept {0}", site.keys("site-state")));
    fs::write(volume, &newest).unwrap();
    site.ok(&["encrypt", volume]);
    filled.check_encrypted("by the newest header");
    let done = fs::read(volume).unwrap();
    refused(&done, "after the end");
    fs::write(volume, done).unwrap();
    filled.check_encrypted("with its own header again");
}

#[test]
fn what_is_no_unused_file_system_is_refused_and_stays_as_it_is() {
    let filled = plain(6, 0);
    let Filled { site, volume, .. } = &filled;
    let plain = fs::read(volume).unwrap();
    let fails = |code: i32, make: &str, words: &str| {
        fs::write(volume, &plain).unwrap();
        sh(&format!("v={volume}; {make}"));
        let (before, keys) = (fs::read(volume).unwrap(), site.ok(&["key", "list"]));
        let refused = site.fails(code, &["encrypt", volume]);
        assert!(refused.contains(words), "{make}: {refused}");
        assert!(fs::read(volume).unwrap() == before && site.ok(&["key", "list"]) == keys, "{make}");
    };
    fails(73, "wipefs -qa $v", "no ext4, xfs or btrfs file system");
    fails(73, "mkswap -q $v", "it holds swap");
    fails(73, "wipefs -qa $v; echo ,,L | sfdisk -q $v", "partition table");
    fails(
        73,
        "cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 --key-file /etc/hostname $v",
        "crypto_LUKS",
    );
    fails(
        73,
        "cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file /etc/hostname $v",
        "is encrypted already",
    );
    fails(75, "debugfs -w -R 'feature needs_recovery' $v 2>&1", "was not unmounted in good order");
    fails(73, "truncate -s -1 $v", "is too large");
    fails(73, "truncate -s 400M $v; mkfs.xfs -qf $v", "xfs cannot be shrunk");
    // The state directory is full, or the store: nothing is begun.
    for full in ["cinder", "site-state"] {
        let at = site.keys(full);
        sh(&format!(
            "mkdir -p {at}; mount -t tmpfs -o size=64k full {at}; head -c 1M /dev/zero > {at}/fill 2>&1 || true"
        ));
        fs::write(volume, &plain).unwrap();
        let output = filled.encrypt(&[]);
        sh(&format!("umount {at}"));
        assert!(!output.status.success() && fs::read(volume).unwrap() == plain, "{full}");
    }
    // The key would rest on the device itself: the same file system has both.
    let beside = site.path("beside").display().to_string();
    site.ok(&["init", "--store", "beside", "--path", &beside, "--escrow", site.keys("escrow.pem")]);
    site.fails(72, &["encrypt", volume, "--store", "beside"]);
    assert!(fs::read(volume).unwrap() == plain);
    site.ok(&["encrypt", volume, "--store", "cinder"]);
    filled.check_encrypted("after all");
}

#[test]
fn a_device_that_was_used_between_two_runs_is_encrypted_as_it_is_then() {
    // A device of an odd size.
    let mut filled = plain(6, 1536);
    let recorded = record(&filled, &["encrypt", &filled.volume]);
    // Killed after the record was written. Then somebody writes: anywhere, or behind the first MiB only.
    for change in
        ["debugfs -w -R 'write /etc/hostname new' $v", "printf changed | dd of=$v bs=1 seek=3000000 conv=notrunc"]
    {
        filled.before(&recorded, |at| at == 0);
        sh(&format!("v={}; {change} 2>&1", filled.volume));
        filled.plain = fs::read(&filled.volume).unwrap()[..6 << 20].to_vec();
        let output = filled.encrypt(&[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("was used since its encryption was begun"), "{said}");
        filled.check_encrypted(change);
    }
    // It was mounted, and the host crashed: what the record has is older, so the file system is to be put right first.
    filled.before(&recorded, |at| at == 0);
    sh(&format!("debugfs -w -R 'feature needs_recovery' {} 2>&1", filled.volume));
    let refused = filled.site.fails(75, &["encrypt", &filled.volume]);
    assert!(refused.contains("was not unmounted in good order") && refused.contains("e2fsck -f"), "{refused}");
    sh(&format!("e2fsck -fy {} 2>&1 || [ $? = 1 ]", filled.volume));
    filled.plain = fs::read(&filled.volume).unwrap()[..6 << 20].to_vec();
    filled.site.ok(&["encrypt", &filled.volume]);
    filled.check_encrypted("after e2fsck");
    // Its key is gone: the record is one of long ago.
    filled.before(&recorded, |at| at == 0);
    filled.plain = recorded.base[..6 << 20].to_vec();
    let key = filled.site.ok(&["key", "list"]);
    filled.site.ok(&["key", "delete", &key, "--yes"]);
    filled.site.ok(&["encrypt", &filled.volume]);
    filled.check_encrypted("without the key of the record");
    // The superblock is gone, and somebody has written: nobody knows what counts.
    let image = filled.before(&recorded, |at| at == 16 << 10);
    let mut changed = image.clone();
    changed[40_000..40_512].fill(7);
    fs::write(&filled.volume, &changed).unwrap();
    let refused = filled.site.fails(65, &["encrypt", &filled.volume]);
    assert!(refused.contains("was changed at byte 39936") && refused.contains("copy of the whole device"), "{refused}");
    assert!(fs::read(&filled.volume).unwrap() == changed);
    // As docs/encrypt.md says.
    sh(&format!(
        "copy={}; blocks=$(($(stat -c %s $copy) / 4096)); dd if=$copy of=$copy bs=4096 skip=$((blocks - 511)) count=8 conv=notrunc \
         status=none",
        filled.volume
    ));
    filled.plain = recorded.base[..6 << 20].to_vec();
    filled.site.ok(&["encrypt", &filled.volume]);
    filled.check_encrypted("by the record's word");
}

/// What a tool puts back leaves out what the file system does not use: there the second copy of the header may be left.
#[test]
fn a_file_system_that_is_put_back_over_a_paused_run_stays_as_it_is() {
    let filled = plain(6, 0);
    let recorded = record(&filled, &["encrypt", &filled.volume]);
    for write in [HEADER + MIB as usize, HEADER, 32 << 10] {
        let mut image = filled.before(&recorded, |at| at == write);
        image[..16 << 10].copy_from_slice(&recorded.base[..16 << 10]);
        image[32 << 10..6 << 20].copy_from_slice(&recorded.base[32 << 10..6 << 20]);
        fs::write(&filled.volume, &image).unwrap();
        let refused = filled.site.fails(65, &["encrypt", &filled.volume]);
        assert!(refused.contains("what stands at byte 0 is not"), "{write}: {refused}");
        assert!(fs::read(&filled.volume).unwrap() == image, "{write}");
    }
}

/// The kernel lets somebody have a device for himself that is mounted by another name.
#[test]
fn what_is_mounted_by_another_name_is_refused() {
    let Filled { site, volume, plain } = plain(6, 0);
    let link = site.path("link").display().to_string();
    fs::hard_link(&volume, &link).unwrap();
    let one = LoopDevice::new(Path::new(&volume), "");
    let refused = |device: &str, words: &str| {
        let said = site.fails(75, &["encrypt", device]);
        assert!(said.contains(words), "{device}: {said}");
        assert!(fs::read(&volume).unwrap().starts_with(&plain), "{device}");
    };
    refused(&link, "behind the loop device");
    for over in [volume.as_str(), one.path()] {
        let other = LoopDevice::new(Path::new(over), "");
        // Mounted for reading, it looks unused.
        sh(&format!("mount -o ro {} {}", other.path(), site.path("mnt").display()));
        refused(one.path(), "mounted on");
        sh(&format!("umount {}", site.path("mnt").display()));
        refused(one.path(), "behind the loop device");
    }
    let above = LoopDevice::new(Path::new(one.path()), "");
    sh(&format!("mount -o ro {} {}", one.path(), site.path("mnt").display()));
    refused(above.path(), "mounted on");
    sh(&format!("umount {}", site.path("mnt").display()));
    // A loop device over a loop device is encrypted as any other.
    site.ok(&["encrypt", above.path()]);
}

/// Whoever writes to the disk does not have a volume encrypted again, nor under the key of another one.
#[test]
fn a_header_that_lies_about_it_is_refused() {
    let filled = plain(6, 0);
    let Filled { site, volume, .. } = &filled;
    let recorded = record(&filled, &["encrypt", volume]);
    let done = fs::read(volume).unwrap();
    let keys = recorded.snapshots.join(recorded.operations.len().to_string());
    let mut midway = Vec::new();
    // Headers from before the last part but the first was moved, from before the first was, and from before all was wiped, on
    // the volume that is done. It may have data everywhere by now.
    for write in [HEADER + MIB as usize, HEADER, 32 << 10] {
        let before = filled.before(&recorded, |at| at == write);
        let lying = [&before[..32 << 10], &done[32 << 10..]].concat();
        filled.restore(&lying, &keys);
        let refused = site.fails(65, &["encrypt", volume]);
        assert!(refused.contains("is not what is to be encrypted next"), "{write}: {refused}");
        assert!(fs::read(volume).unwrap() == lying, "{write}");
        midway = before;
    }
    // It says that all is in its place but for what is to be wiped, or that there is less: nothing of it is believed.
    let at_start = filled.before(&recorded, |at| at == HEADER + MIB as usize);
    for of in [None, Some(5 * MIB)] {
        fs::write(volume, &at_start).unwrap();
        crate::luks2::change(volume.as_ref(), |json| {
            let progress = &mut json["tokens"]["0"]["encrypting"];
            match of {
                Some(of) => progress["of"] = of.into(),
                None => {
                    progress["left"] = 0.into();
                    progress.as_object_mut().unwrap().remove("next");
                }
            }
        });
        let image = fs::read(volume).unwrap();
        let refused = site.fails(65, &["encrypt", volume]);
        assert!(of.is_some() || refused.contains("somebody has changed"), "{refused}");
        assert!(fs::read(volume).unwrap() == image);
    }
    // A token of another volume's key.
    let (other, _) = site.volume("other", &[]);
    let others: serde_json::Value =
        serde_json::from_str(&sh(&format!("cryptsetup token export --token-id 0 {other}"))).unwrap();
    for (what, member, value, words) in [
        ("another volume's key", "key", others["key"].clone(), ""),
        (
            "a part beyond the device",
            "encrypting",
            serde_json::json!({"of": 1_u64 << 40, "left": 0, "first": {"at": 0, "bytes": 0, "sha256": ""}}),
            "makes no sense",
        ),
        ("no progress", "encrypting", serde_json::Value::Null, "makes no sense"),
    ] {
        fs::write(volume, &midway).unwrap();
        crate::luks2::change(volume.as_ref(), |json| json["tokens"]["0"][member] = value.clone());
        let image = fs::read(volume).unwrap();
        let output = filled.encrypt(&[]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(words), "{what}: {said}");
        assert!(fs::read(volume).unwrap() == image, "{what}");
    }
}
