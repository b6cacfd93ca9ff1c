//! Headers as an attacker, a bad disk or another program writes them. Needs no root: headers are read from files.

#[path = "common/luks2.rs"]
mod luks2;

use std::{
    error::Error,
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use cryptattach::{
    base::key::{KeyReference, KeySize, SecretBytes, VolumeKey},
    sys::device::Device,
    volumes::header::{self, Format, HEADER_BYTES, NewHeader, SectorSize, VolumeError},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;

const SIZE: u64 = HEADER_BYTES + (1 << 20);

struct Fixture {
    folder: TempDir,
    key: VolumeKey,
}

impl Fixture {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), key: VolumeKey::random(KeySize::Bits512).unwrap() }
    }

    /// A volume of ours in a file.
    fn volume(&self, keyslot: Option<&SecretBytes>) -> PathBuf {
        let path = self.folder.path().join("volume.img");
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        let header = NewHeader {
            uuid: Uuid::new_v4(),
            key: &self.key,
            sector_size: SectorSize::B4096,
            reference: &reference(),
            keyslot,
            detached: false,
        };
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        header.make(&Device::look(&path).unwrap()).unwrap().write_to(&file, HEADER_BYTES).unwrap();
        path
    }
}

fn reference() -> KeyReference {
    "cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de".parse().unwrap()
}

fn chain(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", chain(cause)),
        None => error.to_string(),
    }
}

fn cryptsetup(arguments: &[&str], key: &[u8], path: &Path) {
    cryptsetup_with(arguments, key, path, &[]);
}

/// `more` are arguments behind the path.
fn cryptsetup_with(arguments: &[&str], key: &[u8], path: &Path, more: &[&Path]) {
    let key_file = path.with_extension("pass");
    std::fs::write(&key_file, key).unwrap();
    let output = std::process::Command::new("cryptsetup")
        .args(arguments)
        .arg("--key-file")
        .args([&key_file, path])
        .args(more)
        .output()
        .expect("cryptsetup must be installed (scripts/prerequisites unit)");
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn what_we_make_passes() {
    let fixture = Fixture::new();
    let path = fixture.volume(None);
    let volume = header::probe(&path, None).unwrap();
    let luks = volume.luks().unwrap();
    assert_eq!((luks.format, luks.reference.as_ref()), (Format::Luks2, Some(&reference())));
    assert_eq!(volume.geometry.sector_size, SectorSize::B4096);
    assert_eq!((volume.geometry.data_offset_bytes, volume.geometry.size_bytes), (HEADER_BYTES, 1 << 20));
    assert_eq!(volume.key_size, None, "a strict header has no keyslot that would tell");
    volume.verify_key(&fixture.key).unwrap();
    let other = VolumeKey::random(KeySize::Bits512).unwrap();
    assert!(matches!(volume.verify_key(&other), Err(VolumeError::WrongKey { .. })));
    let short = VolumeKey::random(KeySize::Bits256).unwrap();
    assert!(matches!(volume.verify_key(&short), Err(VolumeError::WrongKey { .. })));
}

#[test]
fn a_keyslot_opens_by_its_passphrase_only() {
    let fixture = Fixture::new();
    let passphrase = SecretBytes::copy_of(b"0123456789abcdef0123456789abcdef").unwrap();
    let volume = header::probe(&fixture.volume(Some(&passphrase)), None).unwrap();
    assert!(volume.open_keyslot(&passphrase).unwrap() == fixture.key);
    let wrong = SecretBytes::copy_of(b"wrong").unwrap();
    assert!(matches!(volume.open_keyslot(&wrong), Err(VolumeError::WrongPassphrase { .. })));
}

#[test]
fn hostile_metadata_is_refused_by_name() {
    type Change = fn(&mut Value);
    let cases: [(&str, Change, &str); 14] = [
        ("null cipher", |h| h["segments"]["0"]["encryption"] = json!("cipher_null-ecb"), "cipher_null-ecb"),
        ("weak cipher", |h| h["segments"]["0"]["encryption"] = json!("aes-ecb"), "aes-ecb"),
        ("sector size", |h| h["segments"]["0"]["sector_size"] = json!(1024 * 1024), "sector size is 1048576"),
        ("linear segment", |h| h["segments"]["0"]["type"] = json!("linear"), "linear"),
        ("shifted IV", |h| h["segments"]["0"]["iv_tweak"] = json!("8"), "IV 8"),
        ("oversize", |h| h["segments"]["0"]["size"] = json!("1099511627776"), "1099511627776"),
        ("beyond the end", |h| h["segments"]["0"]["offset"] = json!("1099511627776"), "1099511627776"),
        (
            "second segment",
            |h| {
                let mut second = h["segments"]["0"].clone();
                h["segments"]["0"]["size"] = json!("524288");
                second["offset"] = json!((16 << 20 | 524288).to_string());
                h["segments"]["1"] = second;
                h["digests"]["0"]["segments"] = json!(["0", "1"]);
            },
            "segments",
        ),
        ("re-encryption", |h| h["config"]["requirements"] = json!({"mandatory": ["online-reencrypt-v2"]}), "reencrypt"),
        ("unknown requirement", |h| h["config"]["requirements"] = json!({"mandatory": ["x-secret"]}), "x-secret"),
        ("endless digest", |h| h["digests"]["0"]["iterations"] = json!(4_000_000_000_u32), "4000000000"),
        ("odd digest hash", |h| h["digests"]["0"]["hash"] = json!("crc32"), "crc32"),
        ("malformed token", |h| h["tokens"]["0"]["key"] = json!("../../etc/passwd"), "token"),
        ("two tokens", |h| h["tokens"]["1"] = h["tokens"]["0"].clone(), "more than one token"),
    ];
    for (case, change, told) in cases {
        let path = Fixture::new().volume_kept(change);
        let error = header::probe(path.path(), None).expect_err(case);
        let text = chain(&error);
        println!("{case}: {text}");
        assert!(matches!(error, VolumeError::Refused { .. } | VolumeError::Damaged { .. }), "{case}: {text}");
        // libcryptsetup itself finds some of them and does not say more than that the header is no LUKS header.
        if let VolumeError::Refused { .. } = error {
            assert!(text.contains(told), "{case}: {text}");
        }
        assert!(text.contains("volume.img"), "{case} must name the device: {text}");
    }
}

/// A path that keeps its folder alive.
struct Kept(TempDir);

impl Kept {
    fn path(&self) -> &Path {
        Box::leak(self.0.path().join("volume.img").into_boxed_path())
    }
}

impl Fixture {
    fn volume_kept(self, change: fn(&mut Value)) -> Kept {
        luks2::change(&self.volume(None), change);
        Kept(self.folder)
    }
}

#[test]
fn a_null_cipher_for_the_keyslot_is_refused() {
    let fixture = Fixture::new();
    let passphrase = SecretBytes::copy_of(b"0123456789abcdef0123456789abcdef").unwrap();
    let path = fixture.volume(Some(&passphrase));
    luks2::change(&path, |h| h["keyslots"]["0"]["area"]["encryption"] = json!("cipher_null-ecb"));
    let error = header::probe(&path, None).unwrap_err();
    assert!(chain(&error).contains("keyslot 0's cipher is 'cipher_null-ecb'"), "{}", chain(&error));
}

#[test]
fn a_keyslot_is_opened_by_the_metadata_that_was_checked() {
    let fixture = Fixture::new();
    let passphrase = SecretBytes::copy_of(b"0123456789abcdef0123456789abcdef").unwrap();
    let path = fixture.volume(Some(&passphrase));
    let volume = header::probe(&path, None).unwrap();
    // Storage that answers the second read differently; with a null cipher and a key area to match it would open by anything.
    luks2::change(&path, |h| h["keyslots"]["0"]["area"]["encryption"] = json!("cipher_null-ecb"));
    assert!(volume.open_keyslot(&passphrase).unwrap() == fixture.key);
}

#[test]
fn a_keyslot_that_would_take_hours_or_all_memory_is_refused() {
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 5] = [
        (|kdf| kdf["iterations"] = json!(u32::MAX), "keyslot 0 takes 4294967295 iterations"),
        (|kdf| *kdf = argon2(u32::MAX, 1 << 20), "keyslot 0 takes 4294967295 passes over 1048576 KiB of memory"),
        (|kdf| *kdf = argon2(4, u32::MAX), "keyslot 0 takes 4 passes over 4294967295 KiB of memory"),
        (|kdf| *kdf = argon2(40, 4 << 20), "keyslot 0 takes 40 passes over 4194304 KiB of memory"),
        (|kdf| kdf["iterations"] = json!(60_000_000), "keyslot 0 takes 60000000 iterations"),
    ];
    let passphrase = SecretBytes::copy_of(b"0123456789abcdef0123456789abcdef").unwrap();
    for (change, told) in cases {
        let fixture = Fixture::new();
        let path = fixture.volume(Some(&passphrase));
        luks2::change(&path, |h| change(&mut h["keyslots"]["0"]["kdf"]));
        let error = chain(&header::probe(&path, None).expect_err(told));
        assert!(error.contains(told), "{error}");
    }
    let fixture = Fixture::new();
    let path = fixture.volume(Some(&passphrase));
    luks2::change(&path, |h| h["keyslots"]["0"]["kdf"] = argon2(10, 1 << 20));
    header::probe(&path, None).expect("what cryptsetup makes passes");

    File::create(&path).unwrap().set_len(SIZE).unwrap();
    cryptsetup(&["luksFormat", "--type", "luks1", "-q", "--pbkdf-force-iterations", "1000"], b"pass", &path);
    OpenOptions::new().write(true).open(&path).unwrap().write_all_at(&u32::MAX.to_be_bytes(), 212).unwrap();
    let error = chain(&header::probe(&path, None).expect_err("LUKS1"));
    assert!(error.contains("keyslot 0 takes 4294967295 iterations"), "{error}");
}

#[test]
fn many_keyslots_together_take_no_longer_than_one_header_may() {
    let fixture = Fixture::new();
    let passphrase = SecretBytes::copy_of(b"0123456789abcdef0123456789abcdef").unwrap();
    let path = fixture.volume(Some(&passphrase));
    for _ in 1..6 {
        let new = path.with_extension("new");
        std::fs::write(&new, b"another").unwrap();
        let add = ["luksAddKey", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        cryptsetup_with(&add, passphrase.expose(), &path, &[&new]);
    }
    let dear = |h: &mut Value| {
        for keyslot in h["keyslots"].as_object_mut().unwrap().values_mut() {
            keyslot["kdf"]["iterations"] = json!(48_000_000);
        }
        // The last one is as cheap as before, and comes into its own.
        h["keyslots"]["5"]["kdf"]["iterations"] = json!(1000);
        h["keyslots"]["0"]["priority"] = json!(0);
        for number in ["1", "2", "3", "4"] {
            h["keyslots"][number]["kdf"] = argon2(23, 4 << 20);
        }
    };
    luks2::change(&path, dear);
    let volume = header::probe(&path, None).expect("each alone is let pass");
    let begun = std::time::Instant::now();
    volume.open_keyslot(&SecretBytes::copy_of(b"another").unwrap()).unwrap();
    assert!(begun.elapsed().as_secs() < 5, "{:?}", begun.elapsed());
    luks2::change(&path, |h| h["keyslots"]["5"]["kdf"] = argon2(23, 4 << 20));
    let error = header::probe(&path, None).unwrap().open_keyslot(&passphrase).err().unwrap();
    assert!(matches!(error, VolumeError::Refused { .. }) && chain(&error).contains("keyslot 1 takes"), "{error:?}");
}

fn argon2(time: u32, memory: u32) -> Value {
    json!({"type": "argon2id", "time": time, "memory": memory, "cpus": 1, "salt": "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA="})
}

#[test]
fn damaged_headers_are_damaged_and_stay_so() {
    type Damage = fn(&File);
    let damage: [(&str, Damage); 4] = [
        ("truncated to the first block", |file| file.set_len(4096).unwrap()),
        ("truncated in the keyslots", |file| file.set_len(1 << 20).unwrap()),
        ("both checksums", |file| {
            for copy in [0, luks2::header_size(file) as u64] {
                file.write_all_at(b"garbage", copy + 5000).unwrap();
            }
        }),
        ("absurd header size", |file| file.write_all_at(&u64::MAX.to_be_bytes(), 8).unwrap()),
    ];
    for (case, damage) in damage {
        let fixture = Fixture::new();
        let path = fixture.volume(None);
        damage(&OpenOptions::new().read(true).write(true).open(&path).unwrap());
        let before = std::fs::read(&path).unwrap();
        match header::probe(&path, None) {
            // One copy of the header is whole: the volume can be used, but its header is not repaired behind the user.
            Ok(volume) => {
                assert_eq!(case, "absurd header size");
                volume.verify_key(&fixture.key).unwrap();
            }
            // The header is whole, the device is not.
            Err(error) if case == "truncated in the keyslots" => {
                assert!(chain(&error).contains("of a device of 1048576 bytes"), "{}", chain(&error));
            }
            Err(error) => assert!(matches!(error, VolumeError::Damaged { .. }), "{case}: {}", chain(&error)),
        }
        assert_eq!(std::fs::read(&path).unwrap(), before, "{case}: probing writes nothing");
    }
}

#[test]
fn one_whole_copy_of_the_header_is_enough() {
    type Damage = fn(&File);
    let damage: [(&str, Damage); 4] = [
        ("the first block is blank", |file| file.write_all_at(&[0; 4096], 0).unwrap()),
        ("the first copy is blank", |file| file.write_all_at(&vec![0; luks2::header_size(file)], 0).unwrap()),
        ("the first copy's text is torn", |file| file.write_all_at(b"garbage", 5000).unwrap()),
        ("the second copy is blank", |file| {
            let size = luks2::header_size(file);
            file.write_all_at(&vec![0; size], size as u64).unwrap();
        }),
    ];
    for (case, damage) in damage {
        let fixture = Fixture::new();
        let path = fixture.volume(None);
        damage(&OpenOptions::new().read(true).write(true).open(&path).unwrap());
        let before = std::fs::read(&path).unwrap();
        header::probe(&path, None).expect(case).verify_key(&fixture.key).expect(case);
        assert_eq!(std::fs::read(&path).unwrap(), before, "{case}: probing writes nothing");
    }
}

#[test]
fn what_other_programs_leave_behind_is_accepted() {
    let fixture = Fixture::new();
    let path = fixture.volume(None);
    File::create(&path).unwrap().set_len(SIZE + (16 << 20)).unwrap();
    let cheap = ["-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let pass = path.with_extension("pass");
    let run = |arguments: &[&str]| {
        let more = if arguments[0] == "luksAddKey" { &[pass.as_path()][..] } else { &[] };
        cryptsetup_with(&[arguments, &cheap[..]].concat(), b"secret", &path, more);
    };
    run(&["luksFormat", "--type", "luks2"]);
    let before = header::probe(&path, None).unwrap().luks().unwrap().digest.clone();
    run(&["reencrypt", "--force-offline-reencrypt"]);
    run(&["luksAddKey", "--unbound", "--key-size", "1024"]);
    luks2::change(&path, |h| {
        assert!(h["digests"]["0"].is_null() || h["digests"]["0"]["segments"] == json!([]), "number 1 is the data's");
        h["tokens"]["3"] = json!({"type": "systemd-tpm2", "keyslots": [], "tpm2-blob": "AA=="});
        h["tokens"]["4"] = json!({"type": "clevis", "keyslots": ["1"], "jwe": {}});
    });
    let volume = header::probe(&path, None).unwrap();
    assert_eq!(volume.key_size, Some(KeySize::Bits512), "the unbound keyslot's size does not count");
    let key = volume.open_keyslot(&SecretBytes::copy_of(b"secret").unwrap()).unwrap();
    volume.verify_key(&key).unwrap();
    assert_ne!(volume.luks().unwrap().digest, before);
    luks2::change(&path, |h| h["digests"]["1"]["segments"] = json!([]));
    assert!(header::probe(&path, None).is_err(), "no digest is the data's");
}

#[test]
fn what_is_only_unsupported_is_nobodys_fault() {
    use cryptattach::base::advice::Advice;
    type Change = fn(&mut Value);
    let cases: [(Change, &str); 3] = [
        (|h| h["segments"]["0"]["encryption"] = json!("serpent-xts-plain64"), "nothing is wrong"),
        (|h| h["segments"]["0"]["encryption"] = json!("cipher_null-ecb"), "do not use"),
        (|h| h["segments"]["0"]["size"] = json!("1099511627776"), "cut short"),
    ];
    for (change, advice) in cases {
        let path = Fixture::new().volume_kept(change);
        let step = header::probe(path.path(), None).unwrap_err().next_step().unwrap_or_default().into_owned();
        assert!(step.contains(advice), "{advice}: {step}");
    }
    let fixture = Fixture::new();
    let passphrase = SecretBytes::copy_of(b"0123456789abcdef0123456789abcdef").unwrap();
    let path = fixture.volume(Some(&passphrase));
    let begin = ["reencrypt", "--init-only", "--force-offline-reencrypt", "-q", "--pbkdf", "pbkdf2"];
    let begin = [&begin[..], &["--pbkdf-force-iterations", "1000"]].concat();
    cryptsetup(&begin, passphrase.expose(), &path);
    let error = header::probe(&path, None).unwrap_err();
    assert!(error.next_step().unwrap_or_default().contains("--resume-only"), "{}", chain(&error));
}

#[test]
fn words_that_are_no_text_are_damage_and_not_our_defect() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("luks1");
    // cipher-name, cipher-mode, hash-spec, uuid (LUKS1 On-Disk Format Specification, table 1)
    for at in [8, 40, 72, 168] {
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        cryptsetup(&["luksFormat", "--type", "luks1", "-q", "--pbkdf-force-iterations", "1000"], b"pass", &path);
        OpenOptions::new().write(true).open(&path).unwrap().write_all_at(b"\xff\x1b[2J\0", at).unwrap();
        let told = chain(&header::probe(&path, None).unwrap_err());
        assert!(!told.contains(char::is_control), "{told:?}");
    }
}

#[test]
fn says_what_is_there_instead_of_a_header() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("volume.img");
    File::create(&path).unwrap().set_len(SIZE).unwrap();
    assert!(matches!(header::probe(&path, None), Err(VolumeError::NoHeader { found: None, .. })));
    std::fs::write(folder.path().join("swap"), swap_signature()).unwrap();
    let error = header::probe(&folder.path().join("swap"), None).unwrap_err();
    assert!(
        matches!(&error, VolumeError::NoHeader { found: Some(found), .. } if found == "swap (at byte 4086)"),
        "{error:?}"
    );
}

fn swap_signature() -> Vec<u8> {
    let mut page = vec![0; 1 << 20];
    page[1024] = 1; // version
    page[1028..1032].copy_from_slice(&255_u32.to_le_bytes()); // last page
    page[4086..4096].copy_from_slice(b"SWAPSPACE2");
    page
}

#[test]
fn reads_what_cryptsetup_made() {
    let folder = tempfile::tempdir().unwrap();
    let pbkdf2 = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let luks1 = ["luksFormat", "-q", "--type", "luks1", "--key-size", "256", "--pbkdf-force-iterations", "1000"];
    let luks2 = ["luksFormat", "-q", "--type", "luks2", "--sector-size", "512"];
    let cases: [(&str, Vec<&str>, Format, KeySize); 2] = [
        ("luks1", luks1.to_vec(), Format::Luks1, KeySize::Bits256),
        ("luks2", [&luks2[..], &pbkdf2[..]].concat(), Format::Luks2, KeySize::Bits512),
    ];
    for (name, arguments, format, key_size) in cases {
        let path = folder.path().join(name);
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        cryptsetup(&arguments, b"secret", &path);
        let volume = header::probe(&path, None).unwrap();
        assert_eq!((volume.format(), volume.key_size), (format, Some(key_size)));
        assert_eq!(volume.geometry.sector_size, SectorSize::B512);
        let key = volume.open_keyslot(&SecretBytes::copy_of(b"secret").unwrap()).unwrap();
        volume.verify_key(&key).unwrap();
        let digest = volume.luks().unwrap().digest.clone();
        assert!(digest.starts_with("sha256:1000:") || format == Format::Luks1, "{digest}");
    }
}
