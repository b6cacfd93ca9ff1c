//! What is refused: each says what, why, what next, by its own exit code, and loses nothing.

use std::fs;

use serde_json::json;

use crate::{
    luks2,
    site::{Site, sh},
};

#[test]
fn another_volumes_key_is_refused() {
    let site = Site::new();
    let (volume, right) = site.volume("right", &[]);
    let (_, other) = site.volume("other", &[]);
    let attach = ["attach", &volume, &site.name("x"), "--backend", "userspace"];

    // Asked for by the user ...
    let refused = site.fails(68, &[&attach[..], &["--key", &other]].concat());
    assert!(refused.contains("it belongs to volume"), "{refused}");
    // ... or slipped in by the store under the right key's name.
    let kept = fs::read(site.sealed(&right)).unwrap();
    fs::copy(site.sealed(&other), site.sealed(&right)).unwrap();
    let refused = site.fails(76, &attach);
    assert!(refused.contains("is not the requested sealed key"), "{refused}");
    assert!(refused.contains(&right["cinder/".len()..]), "it names the file: {refused}");

    fs::write(site.sealed(&right), kept).unwrap();
    site.attaches(&volume);
}

#[test]
fn a_wrong_key_in_a_rightly_sealed_form_is_refused() {
    let site = Site::new();
    let (volume, reference) = site.volume("v", &[]);
    // The owner's own software seals another volume key for this volume: authentic, but it is not the volume's key.
    let sealed: serde_json::Value = serde_json::from_slice(&fs::read(site.sealed(&reference)).unwrap()).unwrap();
    let protected = sealed["protected"].as_str().unwrap();
    let payload = json!({
        "volume_key": "A".repeat(86), "cipher": "aes-xts-plain64", "key_size_bits": 512,
        "sector_size_bytes": 4096, "data_offset_bytes": 16 << 20, "digest": digest(&volume),
    });
    fs::write(site.keys("payload"), payload.to_string()).unwrap();
    seal_with_jose(&site, protected, &reference);
    let refused = site.fails(65, &["attach", &volume, &site.name("x"), "--backend", "userspace"]);
    assert!(refused.contains("does not match the digest"), "{refused}");
}

fn digest(volume: &str) -> String {
    let text = sh(&format!("cryptsetup luksDump --dump-json-metadata {volume}"));
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let digest = &json["digests"]["0"];
    let text = |name: &str| digest[name].as_str().unwrap();
    format!("{}:{}:{}:{}", text("hash"), digest["iterations"], text("salt"), text("digest"))
}

/// Seals `payload` in the key disk with jose under the container key, with the protected header of an existing sealed key.
fn seal_with_jose(site: &Site, protected: &str, reference: &str) {
    use base64ct::{Base64UrlUnpadded, Encoding};
    let protected: serde_json::Value =
        serde_json::from_slice(&Base64UrlUnpadded::decode_vec(protected).unwrap()).unwrap();
    let template = json!({"protected": protected});
    fs::write(site.keys("template"), template.to_string()).unwrap();
    fs::write(site.keys("owner.jwk"), crate::foreign::jwk(site.keys("cinder.owner.key"))).unwrap();
    let kek = crate::foreign::container_key(site, site.keys("owner.jwk"));
    let header = r#"{"header":{"alg":"A256KW","kid":"cinder/kek/1"}}"#;
    sh(&format!(
        "cd {} && jose jwe enc -i template -I payload -r '{header}' -k {kek} -o {}",
        site.keys(""),
        site.sealed(reference).display()
    ));
}

#[test]
fn hostile_headers_are_refused() {
    let site = Site::new();
    let (volume, _) = site.volume("null", &[]);
    luks2::change(volume.as_ref(), |h| h["segments"]["0"]["encryption"] = json!("cipher_null-ecb"));
    let attach = |volume: &str| site.fails(65, &["attach", volume, &site.name("x"), "--backend", "userspace"]);
    let refused = attach(&volume);
    assert!(refused.contains("cipher is 'cipher_null-ecb'; only 'aes-xts-plain64' is supported"), "{refused}");

    // On the allow-list, but not what was sealed.
    let (volume, _) = site.volume("sectors", &[]);
    luks2::change(volume.as_ref(), |h| h["segments"]["0"]["sector_size"] = json!(512));
    let refused = attach(&volume);
    assert!(refused.contains("sector size 512 in the header, 4096 in the sealed key"), "{refused}");

    let (volume, _) = site.volume("offset", &[]);
    luks2::change(volume.as_ref(), |h| h["segments"]["0"]["offset"] = json!((20 << 20).to_string()));
    assert!(attach(&volume).contains("data offset"));

    let (volume, _) = site.volume("digest", &[]);
    luks2::change(volume.as_ref(), |h| h["digests"]["0"]["iterations"] = json!(1001));
    assert!(attach(&volume).contains("key import"));

    let (volume, _) = site.volume("truncated", &[]);
    fs::File::options().write(true).open(&volume).unwrap().set_len(8192).unwrap();
    let refused = attach(&volume);
    assert!(refused.contains("is damaged") && refused.contains(&volume), "{refused}");
}

#[test]
fn a_store_that_is_gone_or_damaged_says_which_file() {
    let site = Site::new();
    let (volume, reference) = site.volume("v", &[]);
    let sealed = site.sealed(&reference);
    let whole = fs::read(&sealed).unwrap();
    let attach = ["attach", &volume, &site.name("x"), "--backend", "userspace"];

    fs::write(&sealed, &whole[..100]).unwrap();
    assert!(site.fails(76, &attach).contains(sealed.to_str().unwrap()));
    let mut changed: serde_json::Value = serde_json::from_slice(&whole).unwrap();
    changed["tag"] = json!("AAAAAAAAAAAAAAAAAAAAAA");
    fs::write(&sealed, changed.to_string()).unwrap();
    assert!(site.fails(68, &attach).contains("has been changed since it was sealed"));
    fs::remove_file(&sealed).unwrap();
    assert!(site.fails(67, &attach).contains("there is no key"));
    fs::rename(site.keys("cinder"), site.keys("gone")).unwrap();
    assert!(site.fails(69, &attach).contains("cannot open the key store"));
    fs::rename(site.keys("gone"), site.keys("cinder")).unwrap();

    fs::write(&sealed, &whole).unwrap();
    let owner = site.keys("cinder.owner.key");
    fs::rename(owner, site.keys("away")).unwrap();
    assert!(site.fails(78, &attach).contains("cannot read the key file"));
    sh(&format!("openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {owner} 2>/dev/null"));
    assert!(site.fails(68, &attach).contains("it is sealed to"));
    fs::rename(site.keys("away"), owner).unwrap();
    site.attaches(&volume);
}

#[test]
fn a_full_key_store_leaves_the_device_blank() {
    let site = Site::new();
    sh(&format!("head -c 32m /dev/zero > {} 2>/dev/null || true", site.keys("filler")));
    let path = site.file("v", 64 << 20);
    let refused = site.fails(69, &["format", path.to_str().unwrap()]);
    assert!(refused.contains("No space left"), "{refused}");
    assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    fs::remove_file(site.keys("filler")).unwrap();
    assert_eq!(site.ok(&["key", "list"]), "");
    site.ok(&["format", path.to_str().unwrap()]);
}

#[test]
fn keys_on_the_volumes_own_disk_are_refused() {
    let site = Site::new();
    let store = site.path("store").into_os_string().into_string().unwrap();
    site.ok(&["init", "--store", "near", "--path", &store, "--escrow", site.keys("escrow.pem")]);
    let volume = site.file("v", 64 << 20).into_os_string().into_string().unwrap();

    let refused = site.fails(72, &["format", &volume, "--store", "near"]);
    assert!(refused.contains(&store) && refused.contains("volume's disk"), "{refused}");
    assert_eq!(site.ok(&["key", "list", "--store", "near"]), "", "no key is made");
    assert!(fs::read(&volume).unwrap().iter().all(|byte| *byte == 0));

    site.ok(&["format", &volume, "--store", "near", "--allow-shared"]);
    let audit = fs::read_to_string(site.keys("audit")).unwrap();
    assert!(audit.lines().any(|line| line.contains("\"overridden\":\"--allow-shared\"")), "{audit}");

    let name = site.name("x");
    site.fails(72, &["attach", &volume, &name, "--backend", "userspace"]);
    site.attach(&volume, &name, &["--allow-shared"]);
    site.ok(&["detach", &name]);
    assert!(site.fails(72, &["separation", &volume]).contains("same device"));
}

#[test]
fn unproven_warns_and_strict_refuses() {
    let site = Site::new();
    // The configuration beside the volume opens nothing, but nothing is proven either.
    let (volume, _) = site.volume("v", &[]);
    let config = site.path("cryptattach.toml");
    fs::copy(site.keys("cryptattach.toml"), &config).unwrap();
    let config = config.to_str().unwrap();
    let name = site.name("x");
    let attach = ["attach", &volume, &name, "--backend", "userspace", "--config", config];
    let refused = site.fails(72, &[&attach[..], &["--separation", "strict"]].concat());
    assert!(refused.contains("nothing proves"), "{refused}");
    let output = site.run(&attach);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("names the key"));
    site.ok(&["detach", &name]);
}

#[test]
fn a_device_that_vanishes_or_is_none_is_named() {
    let site = Site::new();
    for (device, code, told) in [
        ("/dev/no-such-device", 66, "does not exist"),
        ("/", 65, "neither a block device nor a regular file"),
        ("/dev/null", 65, "neither a block device nor a regular file"),
    ] {
        let refused = site.fails(code, &["attach", device, "x"]);
        assert!(refused.contains(told) && refused.contains(device), "{refused}");
    }
    let blank = site.file("blank", 64 << 20);
    assert!(site.fails(65, &["attach", blank.to_str().unwrap(), "x"]).contains("has no LUKS header"));
}

#[test]
fn what_a_store_says_moves_no_cursor() {
    let site = Site::new();
    let (_, key) = site.volume("ours", &[]);
    let path = site.sealed(&key);
    let mut sealed: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    sealed["recipients"][0]["header"]["kid"] = "\u{1b}[2Jowner".into();
    fs::write(&path, sealed.to_string()).unwrap();
    let shown = site.ok(&["key", "show", &key]);
    assert!(shown.contains("[2Jowner") && !shown.contains('\u{1b}'), "{shown:?}");
}
