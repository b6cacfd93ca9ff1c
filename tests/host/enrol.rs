//! Enrolment: a host proves by its TPM what its key is, is admitted, opens what it may, and is removed.

mod boots;
mod bus;
mod certificates;
mod forger;
mod latch;
mod others;
mod proofs;
pub mod stage;
mod steps;

use std::fs;

use self::stage::Stage;
use crate::swtpm::Swtpm;

#[test]
fn a_host_proves_itself_is_admitted_opens_volumes_and_is_removed() {
    let stage = Stage::new();
    let (mut host, other) = (stage.host("compute-7"), stage.host("compute-8"));
    let enrolled = host.ok(&["host", "enrol", "--output", &host.file("bundle")]);
    assert!(enrolled.contains("with a certificate"), "{enrolled}");
    let challenged = stage.challenge(&host);
    assert!(challenged.contains("certificate by swtpm-localca for id:00001014, swtpm"), "{challenged}");
    host.answer();
    let admitted = stage.admit(&host);
    println!("{enrolled}\n{challenged}\n{admitted}");
    assert!(stage.ok(&["host", "list"]).contains("cinder: there"));

    let fingerprint = stage.json(&["host", "list"])[0]["lockbox_key"].as_str().unwrap().to_owned();
    host.ok(&["lockbox", "open", "--fingerprint", &fingerprint]);
    let volume = host.volume("first");
    host.attaches(&volume);

    // The other host has a TPM and a key of its own, and the store: none of that is for it.
    other.enrolled();
    let refused = other.fails(67, &["lockbox", "open"]);
    assert!(refused.contains("compute-8"), "{refused}");
    other.copy_key_of(&host);
    let refused = other.fails(79, &["--config", &other.file("thief.toml"), "lockbox", "open"]);
    assert!(refused.contains("this TPM did not make the key"), "{refused}");
    other.does_not_attach(&volume);
    host.reboots();
    host.ok(&["lockbox", "open"]);

    let removed = stage.ok(&["host", "remove", host.name()]);
    assert!(removed.contains("cinder/host/") && removed.contains("cinder/kek/2"), "{removed}");
    assert!(stage.ok(&["host", "list"]).starts_with("no host is admitted, by what "));
    assert!(stage.ok(&["host", "list", "--removed"]).contains("removed"));
    assert!(stage.fails(66, &["host", "remove", host.name()]).contains("is not admitted"));
    // It opens nothing new, although its lockbox is still open; and at its next boot nothing at all.
    let volume = stage.volume("second");
    host.does_not_attach(&volume);
    assert!(host.fails(67, &["lockbox", "open"]).contains("removed"));
    assert!(!host.has_lockbox_key());
}

#[test]
fn a_host_that_enrols_again_gets_a_later_lockbox_key() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    host.enrolled();
    let bundle = host.file("bundle");
    assert!(host.fails(73, &["host", "enrol", "--output", &host.file("again")]).contains("host.tpm.pem exists"));
    stage.challenge(&host);
    host.answer();
    stage.admit(&host);
    let first = stage.json(&["host", "list"])[0].clone();

    fs::remove_file(&bundle).unwrap();
    host.ok(&["host", "enrol", "--replace", "--output", &bundle]);
    stage.challenge(&host);
    host.answer();
    stage.admit(&host);
    let second = stage.json(&["host", "list"])[0].clone();
    assert_eq!(first["endorsement_key"], second["endorsement_key"]);
    assert!(second["generation"].as_u64() > first["generation"].as_u64());
    assert_ne!(first["kid"], second["kid"]);
    host.ok(&["lockbox", "open"]);
    host.attaches(&host.volume("volume"));
}

/// The key that opens the lockbox key of now is lost neither by a bundle that cannot be written nor by one that the
/// administrator refuses.
#[test]
fn enrolling_again_and_again_keeps_the_key_that_was_admitted() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    stage.enrols(&host);
    let admitted = fs::read(host.file("host.tpm.pem")).unwrap();
    host.fails(66, &["host", "enrol", "--replace", "--output", &host.file("no-such-folder/bundle")]);
    assert_eq!(fs::read(host.file("host.tpm.pem")).unwrap(), admitted);
    for _ in 0..2 {
        fs::remove_file(host.file("bundle")).unwrap();
        host.ok(&["host", "enrol", "--replace", "--output", &host.file("bundle")]);
        assert_eq!(fs::read(host.file("host.tpm.pem.before")).unwrap(), admitted);
    }
    assert!(fs::exists(host.file("host.tpm.pem.before.2")).unwrap());
}

#[test]
fn a_removal_that_was_stopped_goes_on() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    stage.enrols(&host);
    let (_, key) = stage.volume_and_key("volume");
    let file = stage.keys(&format!("{key}.jwe"));
    let sealed = fs::read(file).unwrap();
    fs::write(file, "{}").unwrap();
    stage.fails(69, &["host", "remove", host.name()]);
    fs::write(file, sealed).unwrap();
    let removed = stage.ok(&["host", "remove", host.name()]);
    assert!(removed.contains("cinder/kek/3"), "{removed}");
    // The host knows the container key from before, and may have hidden that it knows the one after it.
    assert_eq!(stage.json(&["key", "show", &key])["recipients"][0]["kid"], "cinder/kek/3");
}

#[test]
fn a_host_keeps_its_stores_and_has_one_lockbox_key() {
    let stage = Stage::new();
    let (owner, key) = (stage.keys("cinder.owner.pem"), stage.keys("cinder.owner.key"));
    let logs = ["container", "create", "logs", "--path", stage.keys("logs"), "--owner", owner, "--identity", key];
    stage.ok(&[&logs[..], &["--no-escrow"]].concat());
    let host = stage.host("compute-7");
    host.enrolled();
    stage.challenge(&host);
    host.answer();
    stage.admit(&host);
    assert!(fs::exists(stage.keys(&format!("cinder/host/{}.jwe", host.name()))).unwrap());

    fs::remove_file(host.file("bundle")).unwrap();
    host.ok(&["host", "enrol", "--replace", "--output", &host.file("bundle")]);
    stage.challenge(&host);
    host.answer();
    stage.ok(&["host", "admit", &host.file("answer"), "--store", "logs", "--lockbox-store", "logs"]);
    let listed = stage.json(&["host", "list"])[0].clone();
    assert_eq!(listed["stores"], serde_json::json!(["cinder", "logs"]));
    assert_eq!((&listed["lockbox_store"], &listed["store_says"]), (&"logs".into(), &"there".into()));
    assert!(!fs::exists(stage.keys(&format!("cinder/host/{}.jwe", host.name()))).unwrap());
    let removed = stage.ok(&["host", "remove", host.name()]);
    for part in ["logs/host/", "cinder/kek/2", "logs/kek/2"] {
        assert!(removed.contains(part), "{removed}");
    }
}

#[test]
fn signed_policies_are_checked_against_the_sites_key_and_the_counter() {
    let stage = Stage::new();
    stage.site_key("site.pem");
    let host = stage.host("compute-7");
    host.configure("site_key = '../site.pem'\n");
    host.enrolled();
    // No value of a PCR needs to be believed.
    let challenged = stage.ok(&[
        "host",
        "challenge",
        &host.file("bundle"),
        "--ca",
        stage.authority(),
        "--output",
        &host.file("challenge"),
    ]);
    assert!(challenged.contains("the PCRs are as signed by the site's key"), "{challenged}");
    host.answer();
    stage.admit(&host);
}

#[test]
fn a_tpm_without_certificate_is_known_by_its_fingerprint_or_trusted_aloud() {
    let stage = Stage::new();
    let host = stage.bare_host("compute-7");
    let enrolled = host.json(&["host", "enrol", "--output", &host.file("bundle")]);
    let fingerprint = enrolled["endorsement_keys"][0]["fingerprint"].as_str().unwrap();
    let trust = ["--ca", stage.authority()];
    let (bundle, output) = (host.file("bundle"), host.file("challenge"));
    let arguments = [&["host", "challenge", &bundle, "--output", &output, "--trust-pcr-values"], &trust[..]].concat();
    assert!(stage.fails(78, &arguments).contains("has no certificate authority"));
    drop(Swtpm::certified(stage.authority().as_ref()));
    let refused = stage.refuses(&host, &trust);
    assert!(refused.contains("its TPM has no certificate for it"), "{refused}");
    let refused = stage.refuses(&host, &["--ek", &"0".repeat(64)]);
    assert!(refused.contains(&format!("its fingerprint is {fingerprint}; expected 0000")), "{refused}");

    let output = stage.run_challenge(&host, &["--trust-first-use"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("no proof that") && said.contains(fingerprint), "{said}");
    fs::remove_file(host.file("challenge")).unwrap();
    let output = stage.run_challenge(&host, &["--ek", fingerprint]);
    assert!(output.status.success() && output.stderr.is_empty());
    host.answer();
    assert!(stage.admit(&host).contains("fingerprint, compared by the administrator"));
}
