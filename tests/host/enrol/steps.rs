//! Requests and answers that are wrong, late, repeated or somebody else's, and commands that are stopped.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

use base64ct::{Base64, Encoding};
use serde_json::Value;

use super::stage::Stage;

#[test]
fn a_request_admits_once_and_gives_the_same_answer_again() {
    let stage = Stage::new();
    let host = stage.asking_host("compute-7");
    stage.admit(&host);
    let (first, listed) = (fs::read(host.file("answer")).unwrap(), stage.json(&["host", "list"]));
    stage.admit(&host);
    assert_eq!(fs::read(host.file("answer")).unwrap(), first);
    assert_eq!(stage.json(&["host", "list"]), listed);
    // Nor is the file in the way that has it already.
    let (request, output) = (host.file("request"), host.file("answer"));
    let admit = ["host", "admit", &request, "--output", &output, "--ca", stage.authority(), "--trust-pcr-values"];
    assert!(stage.ok(&admit).contains("already, by this request"));
    fs::write(&output, "something else").unwrap();
    assert!(stage.fails(73, &admit).contains("File exists"));
    // Not to another store, which was not said then.
    let more = [&admit[..3], &["--trust-first-use", "--trust-pcr-values", "--store", "other"]].concat();
    assert!(stage.fails(80, &more).contains("has already been used"));
    fs::write(&output, first).unwrap();
    host.takes();
    // Removal does not make it good again.
    stage.ok(&["host", "remove", host.name()]);
    assert!(stage.refuses(&host, &["--ca", stage.authority()]).contains("has already been used"));
}

/// A host that asks again must not be brought back to the key that it had before, nor to that key's policy.
#[test]
fn a_request_from_before_the_last_one_stays_used() {
    let stage = Stage::new();
    let host = stage.asking_host("compute-7");
    stage.admit(&host);
    let (first, late) = (host.file("first"), host.file("late"));
    fs::rename(host.file("request"), &first).unwrap();
    fs::rename(host.file("answer"), &late).unwrap();
    host.asks_again();
    stage.admit_again(&host);
    let again = |refused: String| assert!(refused.contains("has already been used"), "{refused}");
    let last = host.file("last");
    fs::rename(host.file("request"), &last).unwrap();
    fs::rename(&first, host.file("request")).unwrap();
    again(stage.refuses(&host, &["--ca", stage.authority(), "--replace"]));
    // The answer of before is for the key of before.
    assert!(host.fails(80, &["host", "join", &late]).contains("another request than the last"));
    stage.ok(&["host", "remove", host.name()]);
    again(stage.refuses(&host, &["--ca", stage.authority()]));
    fs::rename(&last, host.file("request")).unwrap();
    again(stage.refuses(&host, &["--ca", stage.authority()]));
}

#[test]
fn edited_answers_are_refused_and_cost_nothing() {
    let stage = Stage::new();
    let host = stage.asking_host("compute-7");
    stage.admit(&host);
    let whole = fs::read(host.file("answer")).unwrap();
    let edited = |change: &dyn Fn(&mut Value)| {
        fs::write(host.file("answer"), &whole).unwrap();
        host.edit("answer", change);
        host.does_not_take(80)
    };
    for member in ["credential", "secret"] {
        let flip = |answer: &mut Value| {
            let mut bytes = Base64::decode_vec(answer[member].as_str().unwrap()).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            answer[member] = Base64::encode_string(&bytes).into();
        };
        assert!(edited(&flip).contains("the TPM does not open the answer"));
        assert!(edited(&|answer| answer[member] = Base64::encode_string(&[0; 4096]).into()).contains("does not open"));
    }
    assert!(edited(&|answer| answer["host"] = "compute-9".into()).contains("is for 'compute-9'"));
    assert!(edited(&|answer| answer["enrolment"] = "0".repeat(64).into()).contains("another request than the last"));
    assert!(edited(&|answer| answer["enrolment"] = "../../x".into()).contains("64 hexadecimal"));
    assert!(edited(&|answer| answer["more"] = 1.into()).contains("unknown field `more`"));
    assert!(edited(&|answer| answer["version"] = 2.into()).contains("it has version 2"));
    assert!(
        edited(&|answer| answer["endorsement_key"] = format!("000b{}", "0".repeat(64)).into()).contains("another host")
    );
    for len in [0, whole.len() / 2, whole.len() - 3] {
        fs::write(host.file("answer"), &whole[..len]).unwrap();
        assert!(host.does_not_take(80).contains("it is damaged"));
    }
    // The request is no answer, nor the other way round; and what is no file is not waited for.
    fs::copy(host.file("request"), host.file("answer")).unwrap();
    assert!(host.does_not_take(80).contains("it is a 'cryptattach enrolment request'"));
    fs::write(host.file("answer"), &whole).unwrap();
    assert!(host.fails(74, &["host", "join", "/dev/zero"]).contains("not a regular file"));
    // Who cares compares.
    let other = "A".repeat(43);
    let refused = host.fails(68, &["host", "join", &host.file("answer"), "--fingerprint", &other]);
    assert!(refused.contains("has the fingerprint"), "{refused}");

    // A fingerprint that was edited is one that the key has not: the lockbox stays closed, and the right answer still counts.
    host.edit("answer", |answer| answer["lockbox_key"] = other.as_str().into());
    host.takes();
    assert!(host.fails(68, &["lockbox", "open"]).contains("expected AAAA"));
    fs::write(host.file("answer"), &whole).unwrap();
    host.takes();
    host.ok(&["lockbox", "open"]);
}

#[test]
fn an_answer_is_for_one_host_and_its_last_request() {
    let stage = Stage::new();
    let (host, other) = (stage.asking_host("compute-7"), stage.host("compute-8"));
    let answer = host.file("answer");
    assert!(host.does_not_take(66).contains("No such file"));
    stage.admit(&host);
    fs::copy(&answer, other.file("answer")).unwrap();
    assert!(other.does_not_take(66).contains("this host has not asked to join"));
    other.asks();
    assert!(other.does_not_take(80).contains("this host is"));
    host.asks_again();
    assert!(host.does_not_take(80).contains("another request than the last"));
    assert!(fs::exists(host.file("host.tpm.pem.before")).unwrap());
}

#[test]
fn a_cleared_tpm_does_not_take_the_answer() {
    let stage = Stage::new();
    let host = stage.asking_host("compute-7");
    stage.admit(&host);
    host.swtpm.tool(&["tpm2_clear"]);
    let refused = host.does_not_take(79);
    assert!(refused.contains("it did not make the key, or was cleared"), "{refused}");
}

#[test]
fn a_name_and_a_tpm_belong_together_until_the_host_is_removed() {
    let stage = Stage::new();
    let (host, exchanged) = (stage.asking_host("compute-7"), stage.asking_host("compute-7"));
    stage.admit(&host);
    for trust in [&["--ca", stage.authority(), "--replace"][..], &["--trust-first-use"]] {
        let refused = stage.refuses(&exchanged, trust);
        assert!(refused.contains("is known with another TPM") && refused.contains("host remove"), "{refused}");
    }
    let renamed = host.file("renamed");
    let config = fs::read_to_string(host.file("cryptattach.toml")).unwrap();
    fs::write(host.file("cryptattach.toml"), config.replace(host.name(), "compute-9")).unwrap();
    host.ok(&["host", "join", "--replace", "--output", &renamed]);
    fs::rename(&renamed, host.file("request")).unwrap();
    let refused = stage.refuses(&host, &["--ca", stage.authority()]);
    assert!(refused.contains("the TPM in the request of 'compute-9' is that of"), "{refused}");
    stage.ok(&["host", "remove", host.name()]);
    stage.admit(&exchanged);
}

/// Stopped after any step, the same command does the rest; and makes no second key.
#[test]
fn a_host_that_was_stopped_while_it_asked_goes_on() {
    let stage = Stage::new();
    let host = stage.asking_host("compute-7");
    let (key, request) = (host.file("host.tpm.pem"), host.file("request"));
    let made = (fs::read(&key).unwrap(), fs::read(&request).unwrap());
    for missing in [&[&key][..], &[&request], &[&key, &request], &[]] {
        missing.iter().for_each(|file| fs::remove_file(file).unwrap());
        host.ok(&["host", "join", "--output", &request]);
        assert!((fs::read(&key).unwrap(), fs::read(&request).unwrap()) == made, "{missing:?}");
    }
    // With --replace as well, once all was written.
    host.ok(&["host", "join", "--replace", "--output", &request]);
    assert!(fs::read(&request).unwrap() == made.1);
    assert!(host.fails(64, &["host", "join", "--name", "compute-9"]).contains("as 'compute-9'"));
    // A key that was made for something else is not thrown away.
    fs::remove_file(host.file("state/enrolment.json")).unwrap();
    assert!(host.fails(73, &["host", "join", "--output", &host.file("other")]).contains("host.tpm.pem exists"));
}

#[test]
fn nothing_that_travels_opens_anything_and_what_is_kept_is_its_owners() {
    let stage = Stage::new();
    let host = stage.asking_host("compute-7");
    stage.admit(&host);
    host.takes();
    let share = fs::read_to_string(host.file("host.tpm.pem")).unwrap();
    let share = share.split("\"admission\":\"").nth(1).unwrap()[..64].to_owned();
    let answers = PathBuf::from(stage.keys(&format!("site-state/answers/{}.json", host.name())));
    for file in [host.file("answer").into(), host.file("request").into(), answers.clone()] {
        assert!(!fs::read_to_string::<PathBuf>(file).unwrap().contains(&share));
    }
    for file in [answers, host.file("state/enrolment.json").into(), host.file("host.tpm.pem").into()] {
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600, "{}", file.display());
    }
}
