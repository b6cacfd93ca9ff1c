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
use crate::{person::at_terminal, swtpm::Swtpm};

#[test]
fn a_host_proves_itself_is_admitted_opens_volumes_and_is_removed() {
    let stage = Stage::new();
    let (mut host, other) = (stage.host("compute-7"), stage.host("compute-8"));
    let asked = host.asks();
    assert!(asked.contains("with a certificate"), "{asked}");
    let admitted = stage.admit(&host);
    assert!(admitted.contains("certificate by swtpm-localca for id:00001014, swtpm"), "{admitted}");
    // What is sealed to the host opens only once its TPM has opened the answer.
    let refused = host.fails(68, &["lockbox", "open"]);
    assert!(refused.contains("which this host has not taken") && refused.contains("host join ANSWER"), "{refused}");
    let taken = host.takes();
    println!("{asked}\n{admitted}\n{taken}");
    assert!(stage.ok(&["host", "list"]).contains("cinder: there"));

    let listed = stage.json(&["host", "list"])[0].clone();
    assert_eq!(listed["last_seen"], serde_json::Value::Null);
    let fingerprint = listed["lockbox_key"].as_str().unwrap().to_owned();
    assert!(taken.contains(&fingerprint), "{taken}");
    assert!(!host.says(&["lockbox", "open"]).contains("for the first time"), "the answer has said which key");
    let seen = stage.json(&["host", "list"])[0]["last_seen"].as_u64().unwrap();
    assert!(seen >= listed["admitted"].as_u64().unwrap() && seen <= cryptattach::base::clock::now());
    // What is no time was never seen, and costs nothing.
    let letter = stage.keys(&format!("cinder/join/{}.seen", host.name()));
    for text in ["99999999999", "soon", ""] {
        fs::write(letter, text).unwrap();
        assert!(stage.ok(&["host", "list"]).contains("not known"), "{text}");
    }
    let volume = host.volume("first");
    host.attaches(&volume);

    // The other host has a TPM and a key of its own, and the store: none of that is for it.
    other.asks();
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
fn a_host_that_asks_again_gets_a_later_lockbox_key() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    stage.enrols(&host);
    assert!(host.ok(&["host", "join", "--output", &host.file("again")]).contains("has joined already"));
    let first = stage.json(&["host", "list"])[0].clone();

    host.asks_again();
    let refused = stage.with_existing(&host);
    assert!(refused.contains("by another request") && refused.contains("--replace"), "{refused}");
    stage.admit_again(&host);
    host.takes();
    let second = stage.json(&["host", "list"])[0].clone();
    assert_eq!(first["endorsement_key"], second["endorsement_key"]);
    assert!(second["generation"].as_u64() > first["generation"].as_u64());
    assert_ne!(first["kid"], second["kid"]);
    host.ok(&["lockbox", "open"]);
    host.attaches(&host.volume("volume"));
}

/// The key that opens the lockbox key of now is lost neither by a request that cannot be written nor by one that the
/// administrator refuses.
#[test]
fn asking_again_and_again_keeps_the_key_that_was_admitted() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    stage.enrols(&host);
    let admitted = fs::read(host.file("host.tpm.pem")).unwrap();
    host.fails(66, &["host", "join", "--replace", "--output", &host.file("no-such-folder/request")]);
    host.fails(73, &["host", "join", "--replace", "--output", &host.file("host.tpm.pem")]);
    assert_eq!(fs::read(host.file("host.tpm.pem")).unwrap(), admitted);
    for _ in 0..2 {
        host.asks_again();
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
    host.asks();
    stage.admit(&host);
    assert!(fs::exists(stage.keys(&format!("cinder/host/{}.jwe", host.name()))).unwrap());

    host.asks_again();
    let stores = ["--ca", stage.authority(), "--replace", "--store", "logs", "--lockbox-store", "logs"];
    assert!(stage.run_admission(&host, &stores).status.success());
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
    host.asks();
    // No value of a PCR needs to be believed.
    let output = host.file("answer");
    let admitted = stage.ok(&["host", "admit", &host.file("request"), "--ca", stage.authority(), "--output", &output]);
    assert!(admitted.contains("the PCRs are as signed by the site's key"), "{admitted}");
    host.takes();
}

#[test]
fn a_tpm_without_certificate_is_known_by_its_fingerprint_or_trusted_aloud() {
    let stage = Stage::new();
    let host = stage.bare_host("compute-7");
    let asked = host.json(&["host", "join", "--output", &host.file("request")]);
    let fingerprint = asked["endorsement_keys"][0]["fingerprint"].as_str().unwrap();
    let trust = ["--ca", stage.authority()];
    let (request, output) = (host.file("request"), host.file("answer"));
    let arguments = [&["host", "admit", &request, "--output", &output, "--trust-pcr-values"], &trust[..]].concat();
    assert!(stage.fails(78, &arguments).contains("has no certificate authority"));
    drop(Swtpm::certified(stage.authority().as_ref()));
    let refused = stage.refuses(&host, &trust);
    assert!(refused.contains("its TPM has no certificate for it"), "{refused}");
    let refused = stage.refuses(&host, &["--ek", &"0".repeat(64)]);
    assert!(refused.contains(&format!("its fingerprint is {fingerprint}; expected 0000")), "{refused}");
    let refused = stage.fails(64, &["host", "admit", &request]);
    assert!(refused.contains("nobody can be asked") && refused.contains("--ek FINGERPRINT"), "{refused}");

    let output = stage.run_admission(&host, &["--trust-first-use"]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("no proof that") && said.contains(fingerprint), "{said}");
    stage.ok(&["host", "remove", host.name()]);
    host.asks_again();
    let output = stage.run_admission(&host, &["--ek", fingerprint]);
    assert!(output.status.success() && output.stderr.is_empty());
    assert!(String::from_utf8(output.stdout).unwrap().contains("fingerprint, compared by the administrator"));
    host.takes();
}

/// What an administrator sees and says who has no options ready.
#[test]
fn at_a_terminal_the_administrator_sees_who_asks_and_says_yes() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    let fingerprint = host.asks().split("endorsement key   ").nth(1).unwrap()[..64].to_owned();
    let (request, output) = (host.file("request"), host.file("answer"));
    let admit = ["host", "admit", &request, "--output", &output];
    let no = at_terminal(&stage.site, &[], &admit, |_| "no".to_owned());
    assert!(no.shown.contains("was not admitted: nothing is changed"), "{}", no.shown);
    assert!(stage.ok(&["host", "list"]).starts_with("no host is admitted, by what "));
    let yes = at_terminal(&stage.site, &[], &admit, |_| "yes".to_owned());
    for part in ["asks to be admitted", &fingerprint, "certificate by swtpm-localca", "nobody has checked", "PCR 7 = "]
    {
        assert!(yes.shown.contains(part), "{part}: {}", yes.shown);
    }
    assert!(stage.ok(&["host", "list"]).contains("fingerprint, compared"));
    host.takes();
    host.ok(&["lockbox", "open"]);
}

#[test]
fn a_request_and_its_answer_go_through_the_store() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    let join = ["host", "join", "--store", "cinder"];
    assert!(stage.fails(66, &["host", "admit", host.name(), "--ca", stage.authority()]).contains("neither a file"));
    assert!(host.ok(&join).contains(&format!("host admit {}", host.name())));
    // Nobody has answered yet.
    assert!(host.ok(&join).contains("request of"));
    let admit = ["host", "admit", host.name(), "--ca", stage.authority(), "--pcr-values", &host.pcr_values()];
    assert!(stage.ok(&admit).contains("host join --store cinder"));
    assert!(host.ok(&join).contains("has joined"));
    host.ok(&["lockbox", "open"]);
    // Again, both: nothing is changed.
    let listed = stage.json(&["host", "list"]);
    assert!(stage.ok(&admit).contains("already, by this request"));
    assert!(host.ok(&join).contains("has joined"));
    assert_eq!(stage.json(&["host", "list"]), listed);

    // A store that lies: another host's request under this name, and what is no request.
    let other = stage.host("compute-8");
    other.asks();
    let letter = |name: &str| stage.keys(&format!("cinder/join/{name}.request"));
    fs::copy(other.file("request"), letter("compute-9")).unwrap();
    let refused = stage.fails(80, &["host", "admit", "compute-9", "--trust-first-use"]);
    assert!(refused.contains(&format!("it is the request of '{}'", other.name())), "{refused}");
    fs::write(letter("compute-9"), "{}").unwrap();
    assert!(stage.fails(80, &["host", "admit", "compute-9", "--trust-first-use"]).contains("does not say what it is"));
}

/// A host that has no [lockbox] yet gets one.
#[test]
fn joining_writes_what_the_lockbox_needs() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    let config = host.file("cryptattach.toml");
    let text = fs::read_to_string(&config).unwrap();
    let (before, after) = (text.find("[lockbox]").unwrap(), text.find("[tpm]").unwrap());
    fs::write(&config, format!("{}{}", &text[..before], &text[after..])).unwrap();
    host.ok(&["host", "join", "--name", host.name(), "--output", &host.file("request")]);
    stage.admit(&host);
    assert!(host.takes().contains("wrote             [lockbox]"));
    host.ok(&["lockbox", "open"]);
}
