//! Volumes and keys of other programs: cryptsetup, jose, qemu.

use std::fs;

use crate::site::{Site, sh};

#[test]
fn volumes_that_cryptsetup_made_are_imported_and_attached() {
    let site = Site::new();
    let pass = site.keys("pass");
    fs::write(pass, "a passphrase").unwrap();
    let fast = "--pbkdf-force-iterations 1000";
    for (label, options) in [
        ("luks1", format!("--type luks1 --key-size 512 {fast}")),
        ("luks1-128", format!("--type luks1 --key-size 256 {fast}")),
        ("luks2", format!("--type luks2 --pbkdf pbkdf2 {fast}")),
        ("luks2-4k", format!("--type luks2 --sector-size 4096 --key-size 256 --pbkdf pbkdf2 {fast}")),
    ] {
        let path = site.file(label, 64 << 20);
        let volume = path.to_str().unwrap();
        sh(&format!("cryptsetup luksFormat -q {options} --key-file {pass} {volume}"));
        let header = fs::read(&path).unwrap();
        let refused = site.fails(64, &["attach", volume, "x", "--backend", "userspace"]);
        assert!(refused.contains("does not say where its key is"), "{refused}");
        let reference = site.ok(&["key", "import", volume, "--key-file", pass]);
        assert_eq!(fs::read(&path).unwrap(), header, "import changes nothing");
        let name = site.name(label);
        let device = site.attach(volume, &name, &["--key", &reference]);
        sh(&format!("mkfs.ext4 -q {}", device.display()));
        site.ok(&["detach", &name]);
    }
    let wrong = site.keys("wrong");
    fs::write(wrong, "another").unwrap();
    let volume = site.path("luks2");
    let refused = site.fails(68, &["key", "import", volume.to_str().unwrap(), "--key-file", wrong]);
    assert!(refused.contains("opens no keyslot"), "{refused}");
}

#[test]
fn an_imported_volume_says_where_its_key_is_if_asked_to() {
    let site = Site::new();
    let pass = site.keys("pass");
    fs::write(pass, "a passphrase").unwrap();
    let path = site.file("luks2", 64 << 20);
    let volume = path.to_str().unwrap();
    sh(&format!(
        "cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file {pass} {volume}"
    ));
    let reference = site.ok(&["key", "import", volume, "--token", "--key-file", pass]);
    let dump = sh(&format!("cryptsetup luksDump --dump-json-metadata {volume}"));
    assert!(dump.contains(reference.split_once('/').unwrap().1), "{dump}");
    let name = site.name("token");
    site.attach(volume, &name, &[]);
    site.ok(&["detach", &name]);
    sh(&format!("cryptsetup open --test-passphrase --key-file {pass} {volume}"));
    let refused = site.fails(65, &["key", "import", volume, "--token", "--key-file", pass]);
    assert!(refused.contains("it has one already") && refused.contains("cryptsetup token remove"), "{refused}");
    assert_eq!(site.ok(&["key", "list"]), reference, "no second key is left behind");
}

#[test]
fn qemu_reads_what_was_written_to_a_luks1_volume() {
    let site = Site::new();
    let pass = site.keys("pass");
    fs::write(pass, "a passphrase").unwrap();
    let path = site.file("luks1", 64 << 20);
    let volume = path.to_str().unwrap();
    sh(&format!("cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 --key-file {pass} {volume}"));
    let reference = site.ok(&["key", "import", volume, "--key-file", pass]);
    let name = site.name("qemu");
    let device = site.attach(volume, &name, &["--key", &reference]);
    let text = site.path("text");
    sh(&format!("seq 1 1000000 | head -c 5m > {}", text.display()));
    sh(&format!("dd if={} of={} bs=1M conv=fsync,notrunc status=none", text.display(), device.display()));
    site.ok(&["detach", &name]);
    let plain = site.path("plain");
    sh(&format!(
        "qemu-img convert --object secret,id=s,file={pass} --image-opts driver=luks,key-secret=s,file.filename={volume} \
         -O raw {}",
        plain.display()
    ));
    sh(&format!("cmp -n $((5*1024*1024)) {} {}", text.display(), plain.display()));
}

#[test]
fn plain_volumes_are_attached_as_told() {
    let site = Site::new();
    let key = site.keys("volume.key");
    fs::write(key, [7_u8; 32].iter().chain(&[9; 32]).copied().collect::<Vec<_>>()).unwrap();
    let path = site.file("plain", 8 << 20);
    let volume = path.to_str().unwrap();
    let reference = site.ok(&["key", "import", volume, "--plain", "--skip", "16", "--key-file", key]);
    let name = site.name("plain");
    let refused = site.fails(65, &["attach", volume, &name, "--plain", "--key", &reference, "--backend", "userspace"]);
    assert!(refused.contains("IV offset"), "{refused}");
    let device = site.attach(volume, &name, &["--plain", "--skip", "16", "--key", &reference]);
    sh(&format!("printf '%512s' x | dd of={} conv=fsync,notrunc status=none", device.display()));
    site.ok(&["detach", &name]);
    // The tweak of the first sector is 16, little-endian: XTS as libcrypto does it.
    let (mut tweak, cipher) = ([0; 16], openssl::symm::Cipher::aes_256_xts());
    tweak[0] = 16;
    let plaintext = format!("{:>512}", "x");
    let expected = openssl::symm::encrypt(cipher, &fs::read(key).unwrap(), Some(&tweak), plaintext.as_bytes()).unwrap();
    assert_eq!(&fs::read(&path).unwrap()[..512], expected);
    let sealed = site.fails(68, &["attach", &site.volume("luks", &[]).0, "x", "--key", &reference]);
    assert!(sealed.contains("plain"), "a key of a plain volume opens no LUKS volume: {sealed}");
}

#[test]
fn cryptsetup_opens_a_keyslot_volume_by_its_sealed_passphrase() {
    let site = Site::new();
    let (volume, reference) = site.volume("compatible", &["--keyslot"]);
    let mut passphrase = site.command();
    let passphrase = passphrase.args(["key", "passphrase", &reference]).output().unwrap().stdout;
    assert_eq!(passphrase.len(), 64);
    assert!(passphrase.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')));
    fs::write(site.keys("pass"), passphrase).unwrap();
    sh(&format!("cryptsetup open --test-passphrase --key-file {} {volume}", site.keys("pass")));
    let dump = sh(&format!("cryptsetup luksDump {volume}"));
    assert!(dump.contains("pbkdf2") && dump.contains("1000") && dump.contains("0: cryptattach"), "{dump}");
    site.attaches(&volume);

    let (_, strict) = site.volume("strict", &[]);
    assert!(site.fails(68, &["key", "passphrase", &strict]).contains("without --keyslot"));
}

#[test]
fn the_escrow_key_recovers_the_volume_key_with_jose_alone() {
    let site = Site::new();
    let (volume, reference) = site.volume("lost", &[]);
    let recovered = site.keys("recovered");
    let escrow = site.keys("escrow.key");
    fs::write(site.keys("escrow.jwk"), jwk(escrow)).unwrap();
    let kek = container_key(&site, site.keys("escrow.jwk"));
    let sealed = site.sealed(&reference);
    sh(&format!(
        "jose jwe dec -i {} -k {kek} | jq -r .volume_key | tr -d '\\n' | jose b64 dec -i- -O {recovered}",
        sealed.display(),
    ));
    assert_eq!(fs::metadata(recovered).unwrap().len(), 64);
    // cryptsetup checks the volume key against the header's digest before it makes the keyslot.
    fs::write(site.keys("pass"), "new").unwrap();
    sh(&format!(
        "cryptsetup luksAddKey -q --volume-key-file {recovered} --key-size 512 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {volume} {}",
        site.keys("pass")
    ));
    // And with cryptattach: the escrow key as an identity.
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    let owner = site.keys("cinder.owner.key");
    fs::write(site.keys("cryptattach.toml"), config.replace(owner, escrow)).unwrap();
    fs::remove_file(owner).unwrap();
    site.attaches(&volume);
}

/// The file of the container key as JWK, opened with jose by the private key of a JWK file.
pub fn container_key(site: &Site, jwk: &str) -> String {
    let kek = site.keys("kek.jwk").to_owned();
    let (sealed, as_jwk) = (site.keys("cinder/kek/1.jwe"), r#"{kty: "oct", alg: "A256KW", k: .container_key}"#);
    sh(&format!("jose jwe dec -i {sealed} -k {jwk} | jq '{as_jwk}' > {kek}"));
    kek
}

/// A PEM P-256 private key as JWK (RFC 7517).
pub fn jwk(pem: &str) -> String {
    use base64ct::{Base64UrlUnpadded, Encoding};
    use openssl::{bn::BigNumContext, ec::EcKey};
    let key = EcKey::private_key_from_pem(&fs::read(pem).unwrap()).unwrap();
    let (mut x, mut y) = (openssl::bn::BigNum::new().unwrap(), openssl::bn::BigNum::new().unwrap());
    let mut context = BigNumContext::new().unwrap();
    key.public_key().affine_coordinates(key.group(), &mut x, &mut y, &mut context).unwrap();
    let text = |number: &openssl::bn::BigNumRef| Base64UrlUnpadded::encode_string(&number.to_vec_padded(32).unwrap());
    let (x, y, d) = (text(&x), text(&y), text(key.private_key()));
    format!(r#"{{"kty":"EC","crv":"P-256","x":"{x}","y":"{y}","d":"{d}"}}"#)
}
