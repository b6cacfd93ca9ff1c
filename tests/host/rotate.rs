//! Rotation of a volume's own key: what a kill, a power cut or a torn block leaves at each write, and that nothing is lost.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::site::{LoopDevice, Site, sh};

pub const HEADER: u64 = 16 << 20;
pub const DATA: u64 = 2 << 20;

/// A volume with random data, and that data.
pub struct Filled {
    pub site: Site,
    pub volume: String,
    pub plain: Vec<u8>,
}

impl Filled {
    pub fn new(arguments: &[&str], data: u64) -> Self {
        let site = Site::new();
        let volume = site.file("v", HEADER + data).into_os_string().into_string().unwrap();
        site.ok(&[&["format", &volume], arguments].concat());
        let name = site.name("fill");
        let device = site.attach(&volume, &name, &[]);
        sh(&format!(
            "head -c {data} /dev/urandom | dd of={} bs=64k iflag=fullblock conv=fsync status=none",
            device.display()
        ));
        let plain = fs::read(device).unwrap();
        site.ok(&["detach", &name]);
        assert_eq!(plain.len() as u64, data);
        Self { site, volume, plain }
    }

    fn rotate(&self, more: &[&str]) -> std::process::Output {
        self.site.run(&[&["key", "rotate", &self.volume, "--hotzone", "256"], more].concat())
    }

    /// The volume is attached by the key that its header names, and all its data is there.
    pub fn check(&self, what: &str) {
        let name = self.site.name("check");
        let device = self.site.attach(&self.volume, &name, &["--read-only"]);
        let is_same = fs::read(device).unwrap() == self.plain;
        self.site.ok(&["detach", &name]);
        assert!(is_same, "{what}: DATA LOST");
    }

    /// Paused by SIGTERM in the middle, while it waits between two stretches; what it said.
    fn midway(&self, more: &[&str]) -> String {
        let mut command = self.site.command();
        command.args(["key", "rotate", &self.volume, "--rate", "1", "--json"]).args(more);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let (mut said, mut lines) = (String::new(), BufReader::new(child.stderr.take().unwrap()));
        let is_midway = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["done_bytes"].as_u64().unwrap() >= 1 << 20 && line["bytes_per_second"].is_u64()
        };
        while lines.read_line(&mut said).unwrap() > 0 && !is_midway(said.lines().last().unwrap()) {}
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(child.id() as i32), nix::sys::signal::SIGTERM).unwrap();
        lines.read_to_string(&mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(83), "{said}");
        said
    }

    fn begin(&self, more: &[&str]) -> Child {
        let mut command = self.site.command();
        command.args(["key", "rotate", &self.volume, "--hotzone", "64"]).args(more);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }
}

#[test]
fn a_rotated_volume_has_its_data_under_a_new_key_and_cryptsetup_accepts_its_header() {
    for arguments in [&[][..], &["--keyslot"], &["--key-size", "256"], &["--sector-size", "512"]] {
        let filled = Filled::new(arguments, DATA);
        let Filled { site, volume, .. } = &filled;
        let old = site.ok(&["key", "list"]);
        let before = fs::read(volume).unwrap();
        let rotated = site.json(&["key", "rotate", volume]);
        let new = rotated["key"].as_str().unwrap();
        assert_eq!((rotated["old"].as_str(), rotated["deleted"].as_bool()), (Some(&*old), Some(false)));
        assert_eq!(site.ok(&["key", "list"]).lines().count(), 2);
        filled.check("rotated");
        let dump = sh(&format!("cryptsetup luksDump {volume}"));
        assert!(!dump.contains("requirement") && dump.contains("cryptattach"), "{dump}");
        let is_open = site.run(&["key", "passphrase", "--for", volume]).status.success();
        assert_eq!(is_open, arguments == ["--keyslot"], "a strict volume's key has no passphrase");
        if is_open {
            let to = format!("cryptsetup open --test-passphrase --key-file=- {volume}");
            let ours = env!("CARGO_BIN_EXE_cryptattach");
            sh(&format!("{ours} --config {} key passphrase --for {volume} | {to}", site.keys("cryptattach.toml")));
        }
        let same = |at: u64| before[at as usize..][..512] == fs::read(volume).unwrap()[at as usize..][..512];
        assert!((HEADER..HEADER + DATA).step_by(4096).all(|at| !same(at)), "each sector is another one");

        // The old key, its header and the pin: none of them brings the old key back.
        let header = site.path("old-header");
        fs::write(&header, &before[..HEADER as usize]).unwrap();
        let refused = site.fails(65, &["test", volume, "--header", header.to_str().unwrap()]);
        assert!(refused.contains("has another volume key than the one"), "{refused}");
        let again = site.json(&["key", "rotate", volume, "--delete-old"]);
        assert_eq!((again["old"].as_str(), again["deleted"].as_bool()), (Some(new), Some(true)));
        assert!(!site.ok(&["key", "list"]).contains(new));
        filled.check("rotated twice");
        // Another host that knows the first key: the chain of keys is broken for it after two rotations, and told.
        let audit = fs::read_to_string(site.keys("audit")).unwrap();
        assert!(audit.contains("\"action\":\"key rotate\"") && audit.contains(new), "{audit}");
    }
}

#[test]
fn another_host_takes_the_successor_of_the_key_that_it_has_pinned() {
    let filled = Filled::new(&[], DATA);
    let Filled { site, volume, .. } = &filled;
    sh(&format!("cp -a {} {}", site.keys("site-state"), site.keys("other-state")));
    assert!(filled.rotate(&[]).status.success());
    sh(&format!("rm -r {0} && mv {1} {0}", site.keys("site-state"), site.keys("other-state")));
    filled.check("as the other host");
    // Not a key that says nothing of the one before: here, the same volume with the pin of a stranger.
    let pin = sh(&format!("ls {}/volumes | head -1", site.keys("site-state")));
    let pin = Path::new(site.keys("site-state")).join("volumes").join(pin);
    let text = fs::read_to_string(&pin).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["digest"] = "sha256:1:AA:AA".into();
    fs::write(&pin, json.to_string()).unwrap();
    assert!(site.fails(65, &["test", volume]).contains("has another volume key"));
}

#[test]
fn what_others_have_put_into_the_header_is_listed_and_kept() {
    let filled = Filled::new(&["--keyslot"], DATA);
    let Filled { site, volume, .. } = &filled;
    let ours = format!("{} --config {}", env!("CARGO_BIN_EXE_cryptattach"), site.keys("cryptattach.toml"));
    let person = site.path("person");
    fs::write(&person, "a person's").unwrap();
    sh(&format!(
        "{ours} key passphrase --for {volume} > {0}; cryptsetup luksAddKey -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \
         --key-file {0} {volume} {1}; rm {0}",
        site.keys("passphrase"),
        person.display()
    ));
    sh(&format!("echo '{{\"type\":\"clevis\",\"keyslots\":[\"1\"],\"jwe\":{{}}}}' | cryptsetup token import {volume}"));
    let before = fs::read(volume).unwrap();
    let keys = site.ok(&["key", "list"]);
    let refused = site.fails(73, &["key", "rotate", volume]);
    assert!(refused.contains("keyslot 1, token 1 (clevis)") && refused.contains("--drop-others"), "{refused}");
    assert!(fs::read(volume).unwrap() == before && site.ok(&["key", "list"]) == keys, "nothing is begun");
    site.ok(&["key", "rotate", volume, "--drop-others"]);
    filled.check("rotated");
    let dump = sh(&format!("cryptsetup luksDump --dump-json-metadata {volume}"));
    let json: serde_json::Value = serde_json::from_str(&dump).unwrap();
    assert_eq!(json["keyslots"].as_object().unwrap().len(), 1, "{dump}");
}

#[test]
fn it_is_refused_where_it_cannot_be_done() {
    let filled = Filled::new(&[], DATA);
    let Filled { site, volume, .. } = &filled;
    let name = site.name("used");
    site.attach(volume, &name, &[]);
    assert!(site.fails(75, &["key", "rotate", volume]).contains("is attached already"));
    site.ok(&["detach", &name]);
    // A re-encryption that another program has begun is not ours to go on with: nobody's next key is in the token.
    let (foreign, _) = site.volume("foreign", &["--keyslot"]);
    let ours = format!("{} --config {}", env!("CARGO_BIN_EXE_cryptattach"), site.keys("cryptattach.toml"));
    sh(&format!(
        "{ours} key passphrase --for {foreign} | cryptsetup reencrypt -q --init-only --force-offline-reencrypt --pbkdf pbkdf2 \
         --pbkdf-force-iterations 1000 --key-file - {foreign}"
    ));
    let before = fs::read(&foreign).unwrap();
    let refused = site.fails(65, &["key", "rotate", &foreign]);
    assert!(refused.contains("none of 'cryptattach key rotate'") && refused.contains("names no next key"), "{refused}");
    assert!(fs::read(&foreign).unwrap() == before, "nothing is written");
    let plain = site.file("plain", DATA);
    assert!(site.fails(65, &["key", "rotate", plain.to_str().unwrap()]).contains("has no LUKS header"));
}

#[test]
fn a_loop_device_is_rotated_too_and_only_while_nobody_has_it() {
    let filled = Filled::new(&[], DATA);
    let device = LoopDevice::new(filled.volume.as_ref(), "");
    assert!(filled.site.fails(75, &["key", "rotate", &filled.volume]).contains("behind the loop device"));
    let second = LoopDevice::new(filled.volume.as_ref(), "");
    for verb in [&["key", "rotate"][..], &["key", "erase", "--yes"], &["format", "--force"], &["attach"]] {
        let refused = filled.site.fails(75, &[verb, &[device.path()]].concat());
        assert!(refused.contains(&format!("behind the loop device {}", &second.path()["/dev/".len()..])), "{refused}");
    }
    drop(second);
    filled.site.ok(&["key", "rotate", device.path()]);
    drop(device);
    filled.check("rotated");
}

/// libcryptsetup would begin again at 0, or never open it (docs/rotation.md).
#[test]
fn what_cryptsetup_left_in_its_last_moments_is_attached_and_finished() {
    let mut all_done = 0;
    // The syncs of its last header update but one, of the old keyslot's wipe, and of the flag's removal.
    for sync in 5..16 {
        let filled = Filled::new(&["--keyslot"], DATA);
        let Filled { site, volume, .. } = &filled;
        let ours = format!("{} --config {}", env!("CARGO_BIN_EXE_cryptattach"), site.keys("cryptattach.toml"));
        let passphrase = site.keys("passphrase");
        sh(&format!("{ours} key passphrase --for {volume} >{passphrase}"));
        let reencrypt = format!(
            "cryptsetup reencrypt -q --force-offline-reencrypt --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file {passphrase} \
             --hotzone-size 2M"
        );
        sh(&format!(
            "{reencrypt} --init-only {volume}; strace -f -qq -o /dev/null -e trace=fsync,fdatasync \
             -e inject=fsync,fdatasync:signal=KILL:when={sync} {reencrypt} --resume-only {volume} || true"
        ));
        let before = fs::read(volume).unwrap();
        // Its new key is one that no store has.
        let import = site.run(&["key", "import", volume, "--key-file", passphrase]);
        let said = String::from_utf8_lossy(&import.stderr);
        if !said.contains("all data of") {
            continue;
        }
        assert!(import.status.success(), "sync {sync}: {said}");
        let key = String::from_utf8(import.stdout).unwrap();
        let name = site.name("finished");
        let device = site.attach(volume, &name, &["--key", key.trim_end(), "--read-only"]);
        assert!(fs::read(device).unwrap() == filled.plain, "sync {sync}: DATA LOST");
        site.ok(&["detach", &name]);
        assert!(fs::read(volume).unwrap() == before, "only the image in memory is finished");
        all_done += 1;
    }
    println!("{all_done} kills of cryptsetup in its last moments");
    assert!(all_done >= 4);
}

/// Whoever writes to the disk would have another volume's key deleted, or a volume brought under a key that they know.
#[test]
fn a_key_that_the_header_alone_calls_the_old_one_is_not_deleted() {
    let filled = Filled::new(&[], DATA);
    let Filled { site, volume, .. } = &filled;
    let other = site.file("w", HEADER + DATA).into_os_string().into_string().unwrap();
    site.ok(&["format", &other]);
    let export = |volume: &str| -> serde_json::Value {
        serde_json::from_str(&sh(&format!("cryptsetup token export --token-id 0 {volume}"))).unwrap()
    };
    let (mut forged, others) = (export(volume), export(&other));
    forged["next"] = serde_json::json!({"store": forged["store"], "key": forged["key"], "digest": "0", "keyslots": []});
    forged["key"] = others["key"].clone();
    let file = site.path("token");
    fs::write(&file, forged.to_string()).unwrap();
    sh(&format!("cryptsetup token remove --token-id 0 {volume}"));
    sh(&format!("cryptsetup token import --token-id 0 --json-file {} {volume}", file.display()));
    let before = fs::read(volume).unwrap();
    let refused = site.fails(65, &["key", "rotate", volume, "--delete-old"]);
    assert!(refused.contains("its next key was not made to take the place of its key"), "{refused}");
    assert!(fs::read(volume).unwrap() == before, "nothing is written");
    site.ok(&["test", &other]);
    filled.check("refused");
}

/// A rotation was killed when the header was being written, another host has ended it, and a snapshot from before is rotated here.
#[test]
fn a_new_key_that_a_header_may_name_is_not_deleted_as_unused() {
    let filled = Filled::new(&[], DATA);
    let Filled { site, volume, .. } = &filled;
    let snapshot = site.path("snapshot");
    fs::copy(volume, &snapshot).unwrap();
    let rotated = site.json(&["key", "rotate", volume]);
    let (old, new) = (&rotated["old"], &rotated["key"]);
    let journal = serde_json::json!({"device": volume, "old": old, "new": new, "named": true, "begun": false});
    let uuid = sh(&format!("cryptsetup luksUUID {volume}"));
    fs::write(Path::new(site.keys("site-state")).join("rekey").join(uuid.trim()), journal.to_string()).unwrap();
    let told = site.fails(65, &["key", "rotate", snapshot.to_str().unwrap()]);
    assert!(told.contains("stays in its store") && told.contains("has another volume key"), "{told}");
    filled.check("after that");
}

#[test]
fn sigterm_pauses_and_the_same_command_goes_on() {
    let filled = Filled::new(&[], 24 << 20);
    let Filled { site, volume, .. } = &filled;
    let mut header = fs::read(volume).unwrap();
    header.truncate(HEADER as usize);
    filled.midway(&[]);
    filled.check("paused");
    // An old header over half new data: nothing may be written then, and the new key is needed.
    let midway = fs::read(volume).unwrap();
    let keys = site.ok(&["key", "list"]);
    for key in keys.lines() {
        assert!(
            site.fails(75, &["key", "delete", key, "--yes"])
                .contains(&format!("end it: cryptattach key rotate {volume}"))
        );
    }
    fs::write(volume, [&header[..], &midway[header.len()..]].concat()).unwrap();
    let refused = site.fails(65, &["key", "rotate", volume]);
    assert!(refused.contains("has the key cinder/") && site.ok(&["key", "list"]) == keys, "{refused}");
    fs::write(volume, &midway).unwrap();
    // On another host, which has neither journal nor memory: the header is enough.
    fs::remove_dir_all(Path::new(site.keys("site-state")).join("rekey")).unwrap();
    site.ok(&["key", "rotate", volume]);
    filled.check("resumed");
    // A backup of the header from the middle: going on would encrypt the new data once more.
    let done = fs::read(volume).unwrap();
    let restored = [&midway[..header.len()], &done[header.len()..]].concat();
    fs::write(volume, &restored).unwrap();
    let refused = site.fails(65, &["key", "rotate", volume]);
    assert!(refused.contains("or all, has the key cinder/"), "{refused}");
    assert!(fs::read(volume).unwrap() == restored, "nothing is written");
    fs::write(volume, done).unwrap();
    filled.check("with its own header again");
}

#[test]
fn a_throttled_rotation_tells_how_fast_it_is_and_is_paused_while_it_waits() {
    let filled = Filled::new(&[], 12 << 20);
    let said = filled.midway(&[]);
    // A stretch is a second's: of the default 64 MiB there would be but one.
    assert!(said.contains("\"all_bytes\":12582912") && said.contains("go on: cryptattach key rotate"), "{said}");
    filled.site.ok(&["key", "rotate", &filled.volume]);
    filled.check("throttled");
}

#[test]
fn status_list_and_explain_say_where_a_rotation_stands() {
    let filled = Filled::new(&[], 12 << 20);
    let Filled { site, volume, .. } = &filled;
    let name = site.name("data");
    let config = format!("[volumes.{name}]\ndevice = '{volume}'\n");
    sh(&format!("printf \"{config}\" >> {}", site.keys("cryptattach.toml")));
    assert!(site.fails(66, &["status", &name]).contains("nothing is attached"), "no rotation, no word of it");
    filled.midway(&[]);
    let standing = site.json(&["status", &name]);
    let done = standing["rotation"]["done_bytes"].as_u64().unwrap();
    let next = format!("cryptattach key rotate {volume}");
    assert_eq!((standing["name"].as_str(), standing["source"].as_str()), (Some(&*name), Some(&**volume)));
    assert_eq!(standing["rotation"]["state"], "paused");
    assert_eq!(standing["rotation"]["next"], next);
    let words = format!("re-encrypting, {} %, paused; go on with: {next}", done * 100 / (12 << 20));
    for verb in [&["status", &name][..], &["list"], &["explain"], &["explain", &name], &["explain", volume]] {
        assert!(site.ok(verb).contains(&words), "{verb:?}: {}", site.ok(verb));
    }
    let listed = |site: &Site| {
        let all = site.json(&["list"]);
        all.as_array().unwrap().iter().find(|one| one["volume"] == standing["volume"]).cloned()
    };
    assert_eq!(listed(site).unwrap(), standing);
    // By the header alone, as another host sees it.
    let journals = Path::new(site.keys("site-state")).join("rekey");
    let kept = site.path("kept");
    sh(&format!("cp -a {0} {1} && rm -r {0}", journals.display(), kept.display()));
    assert!(site.ok(&["explain", volume]).contains(&words));
    sh(&format!("cp -a {} {}", kept.display(), journals.display()));
    // By the journal alone: the device is not there.
    let away = site.path("away");
    fs::rename(volume, &away).unwrap();
    assert_eq!(listed(site).unwrap()["rotation"]["state"], "absent");
    assert!(site.ok(&["explain", away.to_str().unwrap()]).contains(", paused; go on"));
    fs::rename(&away, volume).unwrap();
    site.ok(&["key", "rotate", &name]);
    assert_eq!(listed(site), None);
    assert!(site.ok(&["explain", &name]).contains("no failure of"));
    filled.check("told");
}

#[test]
fn kill_9_at_any_time_loses_nothing() {
    let (mut kills, mut rounds) = (0, 0);
    let (start, mut random) = (Instant::now(), Random(7));
    for arguments in [&[][..], &["--keyslot"]] {
        let filled = Filled::new(arguments, 8 << 20);
        let end = Duration::from_secs(if arguments.is_empty() { 30 } else { 60 });
        while start.elapsed() < end {
            loop {
                let mut child = filled.begin(&["--delete-old"]);
                thread::sleep(Duration::from_millis(random.below(600)));
                let _ = child.kill();
                let status = child.wait().unwrap();
                match status.signal() {
                    Some(_) => kills += 1,
                    None => {
                        assert!(status.success(), "{status:?}: {:?}", filled.rotate(&[]));
                        break;
                    }
                }
            }
            rounds += 1;
            filled.check("after kills");
        }
    }
    println!("{kills} kills in {rounds} rotations");
    assert!(kills >= 10 && rounds >= 2, "{kills} kills in {rounds} rotations");
}

#[test]
fn a_volume_in_the_middle_of_a_rotation_is_attached_and_what_is_written_then_stays() {
    for arguments in [&[][..], &["--keyslot"], &["--sector-size", "512"]] {
        let mut filled = Filled::new(arguments, 8 << 20);
        for _ in 0..2 {
            filled.midway(&[]);
            let Filled { site, volume, plain } = &mut filled;
            let name = site.name("midway");
            let device = site.attach(volume, &name, &[]);
            assert!(fs::read(&device).unwrap() == *plain, "{arguments:?}");
            assert!(site.fails(75, &["key", "rotate", volume]).contains("is attached already"));
            let told = site.ok(&["status", &name]);
            let next = format!("paused; go on with: cryptattach detach {name} && cryptattach key rotate {volume}");
            assert!(told.contains("re-encrypting, ") && told.contains(&next), "{told}");
            // All over the volume, so across the place where the keys change, at odd places and of odd lengths.
            let writer = fs::OpenOptions::new().write(true).open(&device).unwrap();
            let mut random = Random(9);
            for _ in 0..200 {
                let (at, length) = (random.below(8 << 20) as usize, random.below(300_000) as usize);
                let data: Vec<_> = (0..length.min((8 << 20) - at)).map(|_| random.below(256) as u8).collect();
                std::os::unix::fs::FileExt::write_all_at(&writer, &data, at as u64).unwrap();
                plain[at..][..data.len()].copy_from_slice(&data);
            }
            drop(writer);
            site.ok(&["detach", &name]);
            filled.check("written to in the middle");
        }
        filled.site.ok(&["key", "rotate", &filled.volume, "--delete-old"]);
        filled.check("written to in the middle, and rotated to the end");
    }
}

#[test]
fn a_header_from_the_middle_is_refused_once_this_host_has_ended_the_rotation() {
    let filled = Filled::new(&[], 8 << 20);
    let Filled { site, volume, .. } = &filled;
    filled.midway(&[]);
    let midway = fs::read(volume).unwrap();
    site.ok(&["key", "rotate", volume]);
    let done = fs::read(volume).unwrap();
    let at = HEADER as usize;
    fs::write(volume, [&midway[..at], &done[at..]].concat()).unwrap();
    let refused = site.fails(65, &["attach", volume, &site.name("x"), "--backend", "userspace"]);
    assert!(refused.contains("has another volume key than the one"), "{refused}");
    // To a host that knows nothing of the volume the new key says that it is over.
    let (pins, away) = (Path::new(&site.keys("site-state")).join("volumes"), site.path("pins"));
    sh(&format!("cp -a {0} {1} && rm -r {0}", pins.display(), away.display()));
    let refused = site.fails(65, &["attach", volume, &site.name("x"), "--backend", "userspace"]);
    assert!(refused.contains("that has ended"), "{refused}");
    sh(&format!("rm -rf {0} && cp -a {1} {0}", pins.display(), away.display()));
    fs::write(volume, done).unwrap();
    filled.check("with its own header again");
}

/// By such a header data would be decrypted with the old key that has the new one, and lost.
#[test]
fn an_older_header_of_the_same_rotation_is_neither_attached_nor_gone_on_with() {
    let filled = Filled::new(&[], 12 << 20);
    let Filled { site, volume, .. } = &filled;
    filled.midway(&[]);
    let older = fs::read(volume).unwrap()[..HEADER as usize].to_vec();
    filled.midway(&[]);
    let newest = fs::read(volume).unwrap();
    let restored = [&older[..], &newest[older.len()..]].concat();
    fs::write(volume, &restored).unwrap();
    for verb in [&["key", "rotate", volume][..], &["attach", volume, &site.name("x"), "--backend", "userspace"]] {
        let refused = site.fails(65, verb);
        assert!(
            refused.contains("is older than what the rotation of its key") && refused.contains("restore"),
            "{refused}"
        );
    }
    assert!(fs::read(volume).unwrap() == restored, "nothing is written");
    fs::write(volume, newest).unwrap();
    filled.check("with the newest header");
    site.ok(&["key", "rotate", volume]);
    filled.check("rotated to the end");
}

/// A volume as a kill leaves it in a stretch: what is in that is partly old, partly new.
fn killed(filled: &Filled) -> Vec<u8> {
    let Recorded { base, operations, snapshots } = record(filled, &["key", "rotate", &filled.volume]);
    let (mut image, mut done) = (base, 0);
    for operation in &operations {
        done += 1;
        if let Operation::Write(at, data) = operation {
            image[*at..][..data.len()].copy_from_slice(data);
            // The first write to the data is in a stretch.
            if *at as u64 >= HEADER {
                break;
            }
        }
    }
    filled.restore(&image, &snapshots.join(done.to_string()));
    image
}

#[test]
fn an_attach_for_writing_recovers_the_stretch_in_which_a_rotation_was_killed() {
    for arguments in [&[][..], &["--keyslot"]] {
        let mut filled = Filled::new(arguments, DATA);
        let image = killed(&filled);
        let Filled { site, volume, plain } = &mut filled;
        let name = site.name("killed");
        let attach = ["attach", volume, &name, "--backend", "userspace"];
        let refused = site.fails(65, &[&attach[..], &["--read-only"]].concat());
        assert!(refused.contains("is half written") && refused.contains("attach for writing recovers it"), "{refused}");
        // Nobody else is at work on it: that would be a running 'key rotate'.
        let journals = Path::new(&site.keys("site-state")).join("rekey");
        let uuid = sh(&format!("cryptsetup luksUUID {volume}"));
        let mut other = std::process::Command::new("flock")
            .args([&*journals.join(format!(".{uuid}")).to_string_lossy(), "sh", "-c", "echo has it; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        BufReader::new(other.stdout.as_mut().unwrap()).read_line(&mut String::new()).unwrap();
        site.fails(75, &attach);
        drop(other.stdin.take());
        other.wait().unwrap();
        // A block that is neither old nor new: whoever writes more loses more.
        let mut damaged = image.clone();
        damaged[HEADER as usize + 5000..][..100].fill(7);
        fs::write(&*volume, &damaged).unwrap();
        let refused = site.fails(65, &attach);
        assert!(refused.contains("1 blocks of") && fs::read(&*volume).unwrap() == damaged, "{refused}");

        fs::write(&*volume, &image).unwrap();
        assert!(site.ok(&["test", volume]).contains("killed"));
        assert!(fs::read(&*volume).unwrap() == image, "nothing is written");
        let output = site.run(&attach);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("recovering that stretch"), "{said}");
        let device = String::from_utf8(output.stdout).unwrap();
        assert!(fs::read(device.trim_end()).unwrap() == *plain, "{arguments:?}");
        let new = [7; 70_000];
        let writer = fs::OpenOptions::new().write(true).open(device.trim_end()).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&writer, &new, 4096).unwrap();
        plain[4096..][..new.len()].copy_from_slice(&new);
        drop(writer);
        site.ok(&["detach", &name]);
        filled.check("recovered by attaching");
        filled.site.ok(&["key", "rotate", &filled.volume, "--delete-old"]);
        filled.check("recovered by attaching, and rotated to the end");
    }
}

/// A generator that gives the same numbers each time (Knuth's MMIX).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// One write, or a sync.
pub enum Operation {
    Write(usize, Vec<u8>),
    Sync,
}

/// A command that was recorded: what was on the volume before, what was written, and the key disk at each operation.
pub struct Recorded {
    pub base: Vec<u8>,
    pub operations: Vec<Operation>,
    pub snapshots: PathBuf,
}

pub fn record(filled: &Filled, arguments: &[&str]) -> Recorded {
    let Filled { site, volume, .. } = filled;
    record_command(site, volume, site.command().args(arguments))
}

pub fn record_command(site: &Site, volume: &str, command: &mut Command) -> Recorded {
    let (library, log, snapshots) = (site.path("write_log.so"), site.path("log"), site.path("snapshots"));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/write_log.c");
    sh(&format!("cc -shared -fPIC -O1 -o {} {source}", library.display()));
    fs::create_dir(&snapshots).unwrap();
    let base = fs::read(volume).unwrap();
    let script = site.path("snapshot");
    fs::write(&script, format!("cp -a {} {}/$1\n", site.keys(""), snapshots.display())).unwrap();
    command.stdout(Stdio::null()).env("LD_PRELOAD", &library).env("LOG_FILE", volume).env("LOG_OUT", &log);
    command.env("LOG_BEFORE", format!("sh {}", script.display()));
    assert!(command.status().unwrap().success());
    let (bytes, mut at, mut operations) = (fs::read(log).unwrap(), 0, Vec::new());
    while at < bytes.len() {
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
        let (offset, length) = (number(at + 1), number(at + 9));
        let data = bytes[at + 17..][..length].to_vec();
        operations.push(if bytes[at] == 1 { Operation::Write(offset, data) } else { Operation::Sync });
        at += 17 + length;
    }
    sh(&format!("sh {} {}", script.display(), operations.len()));
    Recorded { base, operations, snapshots }
}

impl Filled {
    /// Brings the volume and the key disk back as they were.
    pub fn restore(&self, image: &[u8], keys: &Path) {
        fs::write(&self.volume, image).unwrap();
        let disk = self.site.keys("");
        sh(&format!("rm -rf {disk}/* && cp -a {}/. {disk}", keys.display()));
    }

    /// Whatever the crash was, the rotation goes on and nothing is lost.
    fn trial(&self, what: &str, image: &[u8], keys: &Path) -> &'static str {
        self.restore(image, keys);
        // Attaching first: read-only it gives the data or says that a stretch is half written, and never touches the volume.
        let name = self.site.name("first");
        let first = self.site.run(&["attach", &self.volume, &name, "--read-only", "--backend", "userspace"]);
        let said = String::from_utf8_lossy(&first.stderr).into_owned();
        if first.status.success() {
            let device = String::from_utf8(first.stdout).unwrap();
            let is_same = fs::read(device.trim_end()).unwrap() == self.plain;
            self.site.ok(&["detach", &name]);
            assert!(is_same, "{what}: attached WRONG DATA");
        } else {
            assert!(said.contains("is half written"), "{what}: {said}");
        }
        assert!(fs::read(&self.volume).unwrap() == image, "{what}: attaching has written");
        // For writing it recovers that: so do half of them.
        let by_attach = !first.status.success() && what.bytes().map(u32::from).sum::<u32>() % 2 == 0;
        if by_attach {
            let device = self.site.attach(&self.volume, &name, &[]);
            let is_same = fs::read(device).unwrap() == self.plain;
            self.site.ok(&["detach", &name]);
            assert!(is_same, "{what}: recovered by attaching, WRONG DATA");
        }
        let output = self.site.run(&["key", "rotate", &self.volume]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{what}: {told}");
        self.check(what);
        match (first.status.success(), told.contains("mended"), said.contains("all data of")) {
            (true, _, true) => "attached, header finished in memory",
            (true, ..) => "attached",
            (false, ..) if by_attach => "recovered by attaching",
            (false, true, _) => "mended, resumed",
            (false, false, _) => "resumed",
        }
    }
}

/// How often which kind of crash ended how.
pub type Counts = BTreeMap<(&'static str, &'static str), i32>;

/// Every write that was recorded is a point where the command is killed, or where a disk loses its cache; `trial` gets the
/// volume and the key disk as they are then. A part of them is tried, or all.
pub fn replay(
    recorded: Recorded,
    what: &str,
    (all, phase): (bool, usize),
    counts: &mut Counts,
    trial: &dyn Fn(&str, &[u8], &Path) -> &'static str,
) {
    let Recorded { base, operations, snapshots } = recorded;
    let count = operations.len();
    println!("{what}: {count} writes and syncs");
    let (mut image, mut stable, mut pending, mut random) = (base.clone(), base, Vec::new(), Random(count as u64));
    for done in 0..=count {
        match done.checked_sub(1).map(|last| &operations[last]) {
            Some(Operation::Write(at, data)) => {
                image[*at..][..data.len()].copy_from_slice(data);
                pending.push((*at, data));
            }
            Some(Operation::Sync) => {
                stable.clone_from(&image);
                pending.clear();
            }
            None => {}
        }
        if all && done % 20 == 0 {
            println!("{done}: {} crashes so far", counts.values().sum::<i32>());
        }
        let is_tried = |every: usize| all || (done + phase) % every == 0;
        let keys = snapshots.join(done.to_string());
        // The store has changed between the two: a kill before that.
        let before = snapshots.join(done.saturating_sub(1).to_string());
        if done > 0 && !sh(&format!("diff -rq {} {} || true", before.display(), keys.display())).is_empty() {
            let what = format!("{what} killed after {done} of {count}, before the store changed");
            *counts.entry(("kill", trial(&what, &image, &before))).or_insert(0) += 1;
        }
        if is_tried(3) {
            let what = format!("{what} killed after {done} of {count}");
            *counts.entry(("kill", trial(&what, &image, &keys))).or_insert(0) += 1;
        }
        for (kind, block) in [("power cut, 4096 bytes whole", 4096), ("power cut, 512 bytes whole", 512)] {
            if pending.is_empty() || !is_tried(5) {
                continue;
            }
            let mut cut = stable.clone();
            for (at, data) in &pending {
                let fate = random.below(10);
                for (index, bytes) in data.chunks(block).enumerate() {
                    if fate > 3 && (fate > 7 || random.below(2) == 0) {
                        cut[at + index * block..][..bytes.len()].copy_from_slice(bytes);
                    }
                }
            }
            let what = format!("{what} {kind} after {done} of {count}");
            *counts.entry((kind, trial(&what, &cut, &keys))).or_insert(0) += 1;
        }
    }
}

/// Says how the crashes ended, and how many there were.
pub fn told(counts: &Counts) -> i32 {
    counts.iter().for_each(|((kind, outcome), count)| println!("{kind:<28} {outcome:<36} {count:>5}"));
    let all = counts.values().sum();
    println!("{all} crashes");
    all
}

/// `CRYPTATTACH_ALL_CRASHES` tries all writes that were recorded; else a part that takes a minute.
pub fn all_crashes() -> bool {
    std::env::var_os("CRYPTATTACH_ALL_CRASHES").is_some()
}

#[test]
fn a_crash_at_any_write_and_lost_or_torn_blocks_lose_nothing() {
    let mut counts = Counts::new();
    for (phase, arguments) in [&["--keyslot"][..], &[]].into_iter().enumerate() {
        let filled = Filled::new(arguments, DATA);
        let recorded = record(&filled, &["key", "rotate", &filled.volume, "--hotzone", "256"]);
        let trial = |what: &str, image: &[u8], keys: &Path| filled.trial(what, image, keys);
        replay(recorded, &format!("{arguments:?}"), (all_crashes(), 1 - phase), &mut counts, &trial);
    }
    assert!(told(&counts) > 30);
}
