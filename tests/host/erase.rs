//! Erasing a volume: what is gone afterwards, what the receipt says, and what a kill at each step leaves.

use std::{fs, path::Path, process::Stdio};

use serde_json::Value;

use crate::site::{LoopDevice, Site, sh};

/// A small volume, its UUID and its key.
fn volume(site: &Site, name: &str, arguments: &[&str]) -> (String, String, String) {
    let path = site.file(name, 20 << 20).into_os_string().into_string().unwrap();
    let key = site.ok(&[&["format", &path], arguments].concat());
    let uuid = sh(&format!("cryptsetup luksUUID {path}")).trim_end().to_owned();
    (path, uuid, key)
}

fn keys(site: &Site) -> String {
    site.ok(&["key", "list"])
}

/// What the receipt says, and that it is believed.
fn verified(site: &Site, file: &str) -> Value {
    site.json(&["receipt", "verify", file])["receipt"].clone()
}

#[test]
fn an_erased_volume_is_gone_with_its_header_and_any_copy_of_it_and_the_receipt_says_so() {
    let site = Site::new();
    for (name, arguments) in [("strict", &[][..]), ("keyslot", &["--keyslot"])] {
        let (path, uuid, key) = volume(&site, name, arguments);
        let (_, _, other) = volume(&site, &format!("other {name}").replace(' ', "-"), &[]);
        let before = fs::read(&path).unwrap();
        let file = site.path("receipt.json").display().to_string();
        let told = site.ok(&["key", "erase", &path, "--yes", "--receipt", &file]);
        assert!(told.contains(&uuid) && told.contains(&format!("{key}: deleted by its store")), "{told}");
        assert!(!keys(&site).contains(&key) && keys(&site).contains(&other));
        let after = fs::read(&path).unwrap();
        let differ = before.chunks(512).zip(after.chunks(512)).filter(|(one, other)| one != other).count();
        assert!(after[16 << 20..] == before[16 << 20..], "the data stay: nobody reads them");
        assert!(differ > (15 << 20) / 512, "keyslots are written over: {differ}");
        assert!(sh(&format!("cryptsetup isLuks {path}; echo $?")).contains('1'));
        assert!(site.fails(65, &["key", "erase", &path, "--yes"]).contains("has no LUKS header"));

        let receipt = verified(&site, &file);
        assert_eq!((receipt["volume"].as_str(), receipt["device"].as_str()), (Some(&*uuid), Some(&*path)));
        assert_eq!(
            (&receipt["keys"][0]["key"], &receipt["keys"][0]["answer"]),
            (&key.as_str().into(), &"deleted".into())
        );
        assert!(
            receipt["verified"].to_string().contains("has no LUKS header") && receipt["not_promised"][0].is_string()
        );
        // The header in the receipt is the one that a backup has, by hand.
        let backup = site.path("backup");
        fs::write(&backup, &before[..16384]).unwrap();
        assert!(
            sh(&format!("sha256sum {}", backup.display())).starts_with(receipt["header"]["sha256"].as_str().unwrap())
        );
        // José reads it, by the key that this host tells.
        let jwk = site.path("jwk");
        fs::write(&jwk, site.json(&["receipt", "key"])["jwk"].to_string()).unwrap();
        let payload = sh(&format!("jose jws ver -i {file} -k {} -O-", jwk.display()));
        assert_eq!(serde_json::from_str::<Value>(&payload).unwrap(), receipt);
        // The record has the receipt's digest.
        let digest = sh(&format!("sha256sum {file} | cut -d' ' -f1"));
        assert!(fs::read_to_string(site.keys("audit")).unwrap().contains(digest.trim_end()));
        site.ok(&["audit", "verify"]);

        fs::write(&path, &before).unwrap();
        assert!(site.fails(67, &["attach", &path, &site.name("x"), "--backend", "userspace"]).contains("no key"));
        // What has come back is erased once more, though its key is gone.
        fs::remove_file(&file).unwrap();
        site.ok(&["key", "erase", &path, "--yes", "--receipt", &file]);
        assert_eq!(verified(&site, &file)["keys"][0]["answer"], "not-there");
        fs::remove_file(&file).unwrap();
    }
}

#[test]
fn a_detached_header_and_a_volume_by_its_name_are_erased() {
    let site = Site::new();
    let data = site.file("data", 4 << 20).display().to_string();
    let header = site.path("header").display().to_string();
    let key = site.ok(&["format", &data, "--header", &header]);
    let plain = fs::read(&data).unwrap();
    let mut config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    config += &format!("[volumes.data]\ndevice = \"{data}\"\nheader = \"{header}\"\n");
    fs::write(site.keys("cryptattach.toml"), config).unwrap();
    let erased = site.json(&["key", "erase", "data", "--yes"]);
    assert_eq!(erased["receipt"]["detached_header"], header.as_str());
    assert!(keys(&site).is_empty() && erased["receipt"]["keys"][0]["key"] == key.as_str());
    assert!(fs::read(&data).unwrap() == plain, "nothing of the data's device is touched");
    assert!(fs::read(&header).unwrap()[..32768].iter().all(|byte| *byte == 0));
}

#[test]
fn it_is_refused_where_it_must_not_be_done() {
    let site = Site::new();
    let (path, uuid, key) = volume(&site, "v", &[]);
    let before = fs::read(&path).unwrap();
    let refused = site.fails(64, &["key", "erase", &path]);
    assert!(refused.contains(&uuid) && refused.contains(&key) && refused.contains("--yes"), "{refused}");
    let name = site.name("used");
    site.attach(&path, &name, &[]);
    assert!(site.fails(75, &["key", "erase", &path, "--yes"]).contains("is attached already"));
    site.ok(&["detach", &name]);
    let device = LoopDevice::new(path.as_ref(), "");
    assert!(site.fails(75, &["key", "erase", &path, "--yes"]).contains("behind the loop device"));
    drop(device);
    let there = site.path("there").display().to_string();
    fs::write(&there, "a receipt of another day").unwrap();
    assert!(site.fails(73, &["key", "erase", &path, "--yes", "--receipt", &there]).contains("exists already"));
    assert_eq!(fs::read_to_string(&there).unwrap(), "a receipt of another day");

    let foreign = site.file("foreign", 20 << 20).display().to_string();
    sh(&format!("printf x | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {foreign} -"));
    let others = fs::read(&foreign).unwrap();
    assert!(site.fails(64, &["key", "erase", &foreign, "--yes"]).contains("no token of type 'cryptattach'"));
    assert!(fs::read(&foreign).unwrap() == others && fs::read(&path).unwrap() == before, "nothing is written");
    assert_eq!(keys(&site), key);
    site.attaches(&path);
}

/// Before each system call that changes something it is killed. Whatever that is, the same command goes on; until it has, the
/// header says whose it is, or nothing is left to be done to it.
#[test]
fn kill_9_at_any_step_is_gone_on_with() {
    let mut kills = 0;
    for arguments in [&[][..], &["--keyslot"]] {
        let site = Site::new();
        let ours = env!("CARGO_BIN_EXE_cryptattach");
        for call in 1.. {
            let (path, uuid, key) = volume(&site, &format!("v{call}"), arguments);
            let before = fs::read(&path).unwrap();
            let command = format!("{ours} --config {} key erase {path} --yes", site.keys("cryptattach.toml"));
            let calls = "fsync,fdatasync,rename,renameat,renameat2,linkat,unlink,unlinkat,pwrite64";
            let inject = format!("{calls}:signal=KILL:when={call}");
            let ended = sh(&format!(
                "strace -f -qq -o /dev/null -e trace={calls} -e inject={inject} {command} >/dev/null 2>&1 && echo whole || true"
            ));
            let header = fs::read(&path).unwrap()[..32768].to_vec();
            let is_known = header.windows(36).any(|bytes| bytes == uuid.as_bytes());
            let is_wiped = header.iter().all(|byte| *byte == 0);
            assert!(is_known || is_wiped, "{call}: the header is neither");
            let journal = Path::new(site.keys("site-state")).join("erase").join(&uuid);
            let receipts = || sh(&format!("ls {}/receipts | grep {uuid} || true", site.keys("site-state")));
            if !ended.contains("whole") {
                kills += 1;
                if keys(&site).contains(&key) {
                    assert!(header == before[..32768], "{call}: while the store has the key, the header stays");
                }
                if journal.exists() || is_known {
                    site.ok(&["key", "erase", &path, "--yes"]);
                }
            }
            assert!(!keys(&site).contains(&key) && !journal.exists(), "{call}");
            assert!(fs::read(&path).unwrap()[..32768].iter().all(|byte| *byte == 0), "{call}");
            let (folder, names) = (Path::new(site.keys("site-state")).join("receipts"), receipts());
            let file = folder.join(names.lines().next().expect("a receipt")).display().to_string();
            let answer = verified(&site, &file)["keys"][0]["answer"].clone();
            assert!(answer == "deleted" || answer == "gone-meanwhile", "{call}: {answer}");
            fs::remove_file(&path).unwrap();
            if ended.contains("whole") {
                break;
            }
        }
        site.ok(&["audit", "verify"]);
    }
    println!("{kills} kills");
    assert!(kills > 40, "{kills}");
}

#[test]
fn in_the_middle_of_a_rotation_both_keys_go_and_after_it_the_old_one_is_named() {
    let site = Site::new();
    for arguments in [&[][..], &["--keyslot"]] {
        let path = site.file("v", 40 << 20).display().to_string();
        site.ok(&[&["format", &path], arguments].concat());
        sh(&format!(
            "strace -f -qq -o /dev/null -e trace=fsync,fdatasync -e inject=fsync,fdatasync:signal=KILL:when=40 {} --config {} \
             key rotate {path} --hotzone 64 >/dev/null 2>&1 || true",
            env!("CARGO_BIN_EXE_cryptattach"),
            site.keys("cryptattach.toml")
        ));
        assert_eq!(keys(&site).lines().count(), 2, "it is under way");
        let both = keys(&site);
        let receipt = site.json(&["key", "erase", &path, "--yes"])["receipt"].clone();
        assert_eq!((receipt["keys"].as_array().unwrap().len(), keys(&site)), (2, String::new()));
        assert!(receipt["keys"].as_array().unwrap().iter().all(|key| both.contains(key["key"].as_str().unwrap())));
        let journals = sh(&format!("ls {}/rekey", site.keys("site-state")));
        assert_eq!(journals, "", "nothing is left to go on with");
        fs::remove_file(&path).unwrap();

        let (path, _, old) = volume(&site, "w", arguments);
        site.ok(&["key", "rotate", &path]);
        let receipt = site.json(&["key", "erase", &path, "--yes"])["receipt"].clone();
        assert_eq!((&receipt["kept"][0], keys(&site)), (&old.as_str().into(), old.clone()));
        site.ok(&["key", "delete", &old, "--yes"]);
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn what_fails_on_the_way_is_told_and_gone_on_with() {
    let site = Site::new();
    let (path, uuid, key) = volume(&site, "v", &[]);
    // No room for the receipt: the volume is erased all the same, and that is told.
    let full = site.path("full");
    fs::create_dir(&full).unwrap();
    sh(&format!("mount -t tmpfs -o size=8k full {0} && head -c 8k /dev/zero >{0}/fill || true", full.display()));
    let file = full.join("receipt.json").display().to_string();
    let told = site.fails(74, &["key", "erase", &path, "--yes", "--receipt", &file]);
    sh(&format!("umount {}", full.display()));
    assert!(told.contains(&format!("the erase of the volume {uuid}")) && told.contains("not finished"), "{told}");
    assert!(told.contains("No space left") && told.contains(&format!("go on: cryptattach key erase {path}")), "{told}");
    assert!(!keys(&site).contains(&key));
    let elsewhere = site.path("receipt.json").display().to_string();
    fs::write(&elsewhere, "a receipt of another day").unwrap();
    assert!(site.fails(73, &["key", "erase", &path, "--yes", "--receipt", &elsewhere]).contains("exists already"));
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "a receipt of another day");
    fs::remove_file(&elsewhere).unwrap();
    site.ok(&["key", "erase", &path, "--yes", "--receipt", &elsewhere]);
    assert_eq!(verified(&site, &elsewhere)["keys"][0]["answer"], "deleted");

    // Half-way, a copy of the volume is not taken for the volume.
    let (path, _, _) = volume(&site, "w", &[]);
    let copy = site.path("copy").display().to_string();
    fs::copy(&path, &copy).unwrap();
    sh(&format!(
        "strace -f -qq -o /dev/null -P {path} -e trace=pwrite64 -e inject=pwrite64:signal=KILL:when=1 {} --config {} key erase {path} --yes \
         2>/dev/null || true",
        env!("CARGO_BIN_EXE_cryptattach"),
        site.keys("cryptattach.toml")
    ));
    let before = fs::read(&copy).unwrap();
    let told = site.fails(73, &["key", "erase", &copy, "--yes"]);
    assert!(told.contains("is a copy of the volume on") && told.contains(&path), "{told}");
    // Nor is another device that has got its path.
    let moved = site.path("moved").display().to_string();
    fs::rename(&path, &moved).unwrap();
    let blank = site.file("w", 20 << 20);
    let told = site.fails(65, &["key", "erase", &path, "--yes"]);
    assert!(
        told.contains("no header of the volume") && fs::read(&blank).unwrap().iter().all(|byte| *byte == 0),
        "{told}"
    );
    assert!(fs::read(&copy).unwrap() == before);
    // Nor another volume of ours.
    fs::remove_file(&blank).unwrap();
    let (another, _, anothers) = volume(&site, "w", &[]);
    assert!(site.fails(65, &["key", "erase", &another, "--yes"]).contains("remove erase/"));
    assert!(keys(&site).contains(&anothers));
    site.attaches(&another);
    let erased = site.json(&["key", "erase", &moved, "--yes"]);
    assert_eq!(erased["receipt"]["device"], moved.as_str());
    assert_eq!(site.json(&["key", "erase", &copy, "--yes"])["receipt"]["keys"][0]["answer"], "not-there");
}

/// Before anybody is asked, the receipt has a place; and what is in that place at the end stays.
#[test]
fn a_receipt_keeps_to_its_place() {
    let site = Site::new();
    let (path, uuid, key) = volume(&site, "v", &[]);
    let folder = site.path("receipts");
    let file = folder.join("v.json").display().to_string();
    // Nothing is begun.
    assert!(site.fails(66, &["key", "erase", &path, "--receipt", &file]).contains("folder of the receipt"));
    assert!(!Path::new(site.keys("site-state")).join("erase").join(&uuid).exists() && keys(&site) == key);
    fs::create_dir(&folder).unwrap();
    let killed = |trace: &str, at: &str| {
        sh(&format!(
            "strace -f -qq -o /dev/null -P {at} -e trace={trace} -e inject={trace}:signal=KILL:when=1 {} --config {} key erase {path} \
             --yes --receipt {file} 2>/dev/null || true",
            env!("CARGO_BIN_EXE_cryptattach"),
            site.keys("cryptattach.toml")
        ));
    };
    killed("unlink,unlinkat", &site.sealed(&key).display().to_string());
    // The folder is gone when it goes on: that is told before the question.
    fs::remove_dir(&folder).unwrap();
    for more in [&[][..], &["--receipt", &file]] {
        let told = site.fails(66, &[&["key", "erase", &path], more].concat());
        assert!(told.contains("folder of the receipt") && !told.contains("confirm with --yes"), "{told}");
    }
    // A folder of somebody's, who puts a file there while the volume is wiped.
    fs::create_dir(&folder).unwrap();
    killed("pwrite64", &path);
    fs::write(&file, "somebody's").unwrap();
    assert!(site.fails(73, &["key", "erase", &path, "--yes"]).contains("exists already"));
    assert_eq!(fs::read_to_string(&file).unwrap(), "somebody's");
    fs::remove_file(&file).unwrap();
    // Killed once more, when the receipt has its name and the journal is still there: it is written in its own place.
    let journal = Path::new(site.keys("site-state")).join("erase").join(&uuid);
    killed("unlink,unlinkat", &journal.display().to_string());
    assert!(journal.exists() && Path::new(&file).exists());
    site.ok(&["key", "erase", &path, "--yes", "--receipt", &file]);
    assert!(!journal.exists());
    assert_eq!(verified(&site, &file)["volume"], uuid.as_str());
}

/// Somebody makes a receipt say what did not happen.
#[test]
fn a_receipt_that_was_edited_or_signed_by_another_or_is_none_is_refused() {
    let (site, thief) = (Site::new(), Site::new());
    let receipt = |site: &Site, name: &str| {
        let (path, ..) = volume(site, name, &[]);
        site.json(&["key", "erase", &path, "--yes"])["file"].as_str().unwrap().to_owned()
    };
    let (ours, another, theirs) = (receipt(&site, "a"), receipt(&site, "b"), receipt(&thief, "a"));
    let read = |file: &str| -> Value { serde_json::from_slice(&fs::read(file).unwrap()).unwrap() };
    let forged = site.path("forged").display().to_string();
    let refused = |what: &str| {
        let told = site.fails(85, &["receipt", "verify", &forged]);
        assert!(!told.contains("panicked"), "{what}: {told}");
        told
    };
    // Another payload, another signature, another key; and all of these together.
    for member in ["payload", "signature"] {
        for from in [&another, &theirs] {
            let mut edited = read(&ours);
            edited[member] = read(from)[member].clone();
            fs::write(&forged, edited.to_string()).unwrap();
            assert!(refused(member).contains("was changed"));
        }
    }
    let mut edited = read(&theirs);
    edited["payload"] = read(&ours)["payload"].clone();
    fs::write(&forged, edited.to_string()).unwrap();
    refused("the thief's key under our words");
    fs::copy(&theirs, &forged).unwrap();
    assert!(refused("the thief's own").contains("is signed by another key"));
    let signer = site.json(&["receipt", "key"])["thumbprint"].as_str().unwrap().to_owned();
    assert!(thief.fails(85, &["receipt", "verify", &theirs, "--signer", &signer]).contains(&signer));
    thief.ok(&["receipt", "verify", &ours, "--signer", &signer]);
    // As one thumbprint of 64 begins.
    assert!(site.fails(85, &["receipt", "verify", &ours, "--signer", "-another"]).contains("-another"));
    // An auditor needs the program only.
    thief.ok(&["--config", "/nonexistent", "receipt", "verify", &ours, "--signer", &signer]);
    assert!(thief.fails(78, &["--config", "/nonexistent", "receipt", "verify", &ours]).contains("/nonexistent"));

    // Hostile sizes and shapes: each is refused at once.
    let whole = fs::read(&ours).unwrap();
    for end in [0, 1, whole.len() / 2, whole.len() - 2] {
        fs::write(&forged, &whole[..end]).unwrap();
        refused("truncated");
    }
    for hostile in
        ["[".repeat(60_000), format!("{{\"payload\":\"{}\"}}", "A".repeat(60_000)), "{}".to_owned(), "\0".repeat(9)]
    {
        fs::write(&forged, hostile).unwrap();
        refused("hostile");
    }
    fs::File::create(&forged).unwrap().set_len(1 << 40).unwrap();
    assert!(refused("a tebibyte").contains("has more than 65536 bytes"));
    fs::remove_file(&forged).unwrap();
    sh(&format!("mkfifo {forged}"));
    assert!(refused("a pipe that nobody writes to").contains("it is not a file"));
    assert!(site.fails(85, &["receipt", "verify", "/dev/zero"]).contains("it is not a file"));
    assert!(site.fails(66, &["receipt", "verify", "/nonexistent"]).contains("cannot open"));
    // The record of the erase says which file is the right one.
    let digest = sh(&format!("sha256sum {ours} | cut -d' ' -f1"));
    assert!(fs::read_to_string(site.keys("audit")).unwrap().contains(digest.trim_end()));
    site.ok(&["receipt", "verify", &ours]);
}

#[test]
fn a_person_at_the_terminal_has_to_say_yes_in_capital_letters() {
    let site = Site::new();
    let (path, _, key) = volume(&site, "v", &[]);
    let ours =
        format!("{} --config {} key erase {path}", env!("CARGO_BIN_EXE_cryptattach"), site.keys("cryptattach.toml"));
    let answer = |answer: &str| {
        let mut script = std::process::Command::new("script");
        script.args(["-qec", &ours, "/dev/null"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut asked = script.spawn().unwrap();
        std::io::Write::write_all(&mut asked.stdin.take().unwrap(), answer.as_bytes()).unwrap();
        let output = asked.wait_with_output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for no in ["yes\n", "\n", "YES, no\n"] {
        let (done, told) = answer(no);
        assert!(!done && told.contains(&key) && told.contains("nothing is changed"), "{told}");
        assert_eq!(keys(&site), key);
    }
    let (done, told) = answer("YES\n");
    assert!(done && keys(&site).is_empty(), "{told}");
}

/// The store goes away before anything is gone, the volume is used on, and has another key when it is to be erased again.
#[test]
fn an_erase_that_had_changed_nothing_asks_again_and_looks_again() {
    let site = Site::new();
    let (path, uuid, key) = volume(&site, "v", &[]);
    sh(&format!(
        "strace -f -qq -o /dev/null -P {} -e trace=unlink,unlinkat -e inject=unlink,unlinkat:signal=KILL:when=1 {} --config {} key \
         erase {path} --yes 2>/dev/null || true",
        site.sealed(&key).display(),
        env!("CARGO_BIN_EXE_cryptattach"),
        site.keys("cryptattach.toml")
    ));
    assert!(Path::new(site.keys("site-state")).join("erase").join(&uuid).exists() && keys(&site) == key);
    assert!(site.fails(64, &["key", "erase", &path]).contains("confirm with --yes"));
    site.attaches(&path);
    let new = site.json(&["key", "rotate", &path, "--delete-old"])["key"].as_str().unwrap().to_owned();
    assert!(site.fails(64, &["key", "erase", &path]).contains(&new));
    // A rotation that was killed before its header was written has left a key.
    let (_, _, unused) = volume(&site, "other", &[]);
    let journal = serde_json::json!({"device": path, "old": new, "new": unused, "named": true, "begun": false});
    fs::write(Path::new(site.keys("site-state")).join("rekey").join(&uuid), journal.to_string()).unwrap();
    let receipt = site.json(&["key", "erase", &path, "--yes"])["receipt"].clone();
    assert_eq!((&receipt["keys"][0]["key"], &receipt["keys"][0]["answer"]), (&new.as_str().into(), &"deleted".into()));
    assert_eq!((&receipt["kept"], keys(&site)), (&serde_json::json!([unused]), unused.clone()));
}
