//! Challenges and answers that are wrong, late, repeated or somebody else's.

use std::fs;

use base64ct::{Base64, Encoding};
use serde_json::Value;

use super::stage::{Stage, edit};

#[test]
fn an_answer_counts_once_and_so_does_a_bundle() {
    let stage = Stage::new();
    let host = stage.challenged_host("compute-7");
    host.answer();
    let first = host.file("first");
    fs::rename(host.file("answer"), &first).unwrap();
    let early = stage.pending();
    stage.challenge(&host);
    host.answer();
    stage.admit(&host);
    assert!(
        stage.fails(80, &["host", "admit", &host.file("answer"), "--store", "cinder"]).contains("no open challenge")
    );
    // The other challenge is still open, and its answer is right; but the bundle has been used.
    assert_eq!(stage.pending(), early);
    let refused = stage.fails(80, &["host", "admit", &first, "--store", "cinder"]);
    assert!(refused.contains("has already been used"), "{refused}");
    assert!(stage.refuses(&host, &["--ca", stage.authority()]).contains("has already been used"));
    // Removal does not make it good again.
    stage.ok(&["host", "remove", host.name()]);
    assert!(stage.refuses(&host, &["--ca", stage.authority()]).contains("has already been used"));
    assert!(stage.fails(80, &["host", "admit", &first, "--store", "cinder"]).contains("has already been used"));
}

/// A host that enrols again must not be brought back to the key that it had before, nor to that key's policy.
#[test]
fn a_bundle_from_before_the_last_one_stays_used() {
    let stage = Stage::new();
    let host = stage.challenged_host("compute-7");
    host.answer();
    let (late, first) = (host.file("late"), host.file("first"));
    fs::rename(host.file("answer"), &late).unwrap();
    stage.challenge(&host);
    host.answer();
    stage.admit(&host);
    fs::rename(host.file("bundle"), &first).unwrap();
    host.ok(&["host", "enrol", "--replace", "--output", &host.file("bundle")]);
    stage.challenge(&host);
    host.answer();
    stage.admit(&host);
    let again = |refused: String| assert!(refused.contains("has already been used"), "{refused}");
    again(stage.fails(80, &["host", "admit", &late, "--store", "cinder"]));
    fs::rename(&first, host.file("bundle")).unwrap();
    again(stage.refuses(&host, &["--ca", stage.authority()]));
    stage.ok(&["host", "remove", host.name()]);
    again(stage.refuses(&host, &["--ca", stage.authority()]));
}

#[test]
fn edited_answers_are_refused_and_cost_nothing() {
    let stage = Stage::new();
    let host = stage.challenged_host("compute-7");
    host.answer();
    let whole = fs::read(host.file("answer")).unwrap();
    let edited = |change: &dyn Fn(&mut Value)| {
        fs::write(host.file("answer"), &whole).unwrap();
        host.edit("answer", change);
        stage.does_not_admit(&host)
    };
    assert!(edited(&|answer| answer["mac"] = "0".repeat(64).into()).contains("is wrong"));
    assert!(edited(&|answer| answer["host"] = "compute-9".into()).contains("the answer is from 'compute-9'"));
    assert!(edited(&|answer| answer["enrolment"] = "0".repeat(64).into()).contains("but its challenge was for"));
    assert!(edited(&|answer| answer["challenge"] = "0".repeat(64).into()).contains("no open challenge 0000"));
    assert!(edited(&|answer| answer["challenge"] = "../../x".into()).contains("64 hexadecimal"));
    assert!(
        edited(&|answer| answer["type"] = "cryptattach enrolment bundle".into())
            .contains("it is a 'cryptattach enrolment bundle'")
    );
    assert!(edited(&|answer| answer["version"] = 2.into()).contains("it has version 2"));
    for len in [0, whole.len() / 2, whole.len() - 3] {
        fs::write(host.file("answer"), &whole[..len]).unwrap();
        assert!(stage.does_not_admit(&host).contains("it is damaged"));
    }
    fs::write(host.file("answer"), &whole).unwrap();
    stage.admit(&host);
}

#[test]
fn edited_challenges_are_refused() {
    let stage = Stage::new();
    let host = stage.challenged_host("compute-7");
    let whole = fs::read(host.file("challenge")).unwrap();
    let edited = |change: &dyn Fn(&mut Value)| {
        fs::write(host.file("challenge"), &whole).unwrap();
        host.edit("challenge", change);
        host.does_not_answer(80)
    };
    for member in ["credential", "secret"] {
        let flip = |challenge: &mut Value| {
            let mut bytes = Base64::decode_vec(challenge[member].as_str().unwrap()).unwrap();
            *bytes.last_mut().unwrap() ^= 1;
            challenge[member] = Base64::encode_string(&bytes).into();
        };
        assert!(edited(&flip).contains("the TPM does not open the challenge"));
        assert!(
            edited(&|challenge| challenge[member] = Base64::encode_string(&[0; 4096]).into()).contains("does not open")
        );
    }
    assert!(edited(&|challenge| challenge["expires"] = 1.into()).contains("has expired"));
    assert!(edited(&|challenge| challenge["host"] = "compute-9".into()).contains("is for 'compute-9'"));
    assert!(
        edited(&|challenge| challenge["endorsement_key"] = format!("000b{}", "0".repeat(64)).into())
            .contains("another host")
    );
    // A longer life, or another number, is not what the administrator has kept: the answer is wrong.
    fs::write(host.file("challenge"), &whole).unwrap();
    host.edit("challenge", |challenge| challenge["id"] = "1".repeat(64).into());
    host.answer();
    assert!(stage.does_not_admit(&host).contains("no open challenge 1111"));
    host.edit("answer", |answer| answer["challenge"] = serde_json::from_slice::<Value>(&whole).unwrap()["id"].clone());
    assert!(stage.does_not_admit(&host).contains("is wrong"));
}

#[test]
fn challenges_expire_on_both_sides() {
    let stage = Stage::new();
    let host = stage.challenged_host("compute-7");
    host.answer();
    edit(&stage.pending(), |pending| pending["expires"] = (cryptattach::base::clock::now() - 100).into());
    assert!(stage.does_not_admit(&host).contains("has expired 10"));
    assert!(stage.does_not_admit(&host).contains("no open challenge"), "it is forgotten");
    // The next challenge clears away what nobody has answered.
    stage.challenge(&host);
    edit(&stage.pending(), |pending| pending["expires"] = 1.into());
    stage.challenge(&host);
    stage.pending();
}

#[test]
fn a_challenge_is_for_one_host_and_its_last_enrolment() {
    let stage = Stage::new();
    let (host, other) = (stage.host("compute-7"), stage.host("compute-8"));
    let challenge = host.file("challenge");
    host.enrolled();
    assert!(
        other.fails(66, &["host", "answer", &challenge, "--output", &other.file("answer")]).contains("No such file")
    );
    stage.challenge(&host);
    fs::copy(&challenge, other.file("challenge")).unwrap();
    assert!(other.does_not_answer(66).contains("this host has no enrolment"));
    other.enrolled();
    assert!(other.does_not_answer(80).contains("this host is"));
    // An answer of another host, under the number of this one's challenge.
    let number = serde_json::from_slice::<Value>(&fs::read(&challenge).unwrap()).unwrap()["id"].clone();
    stage.challenge(&other);
    other.answer();
    fs::copy(other.file("answer"), host.file("answer")).unwrap();
    host.edit("answer", |answer| answer["challenge"] = number.clone());
    assert!(stage.does_not_admit(&host).contains("but its challenge was for"));
    let own = serde_json::from_slice::<Value>(&fs::read(&challenge).unwrap()).unwrap();
    host.edit("answer", |answer| {
        answer["host"] = own["host"].clone();
        answer["enrolment"] = own["enrolment"].clone();
    });
    assert!(stage.does_not_admit(&host).contains("is wrong"));

    fs::remove_file(host.file("bundle")).unwrap();
    host.ok(&["host", "enrol", "--replace", "--output", &host.file("bundle")]);
    assert!(host.does_not_answer(80).contains("another enrolment than the last"));
    assert!(fs::exists(host.file("host.tpm.pem.before")).unwrap());
}

#[test]
fn a_cleared_tpm_does_not_answer() {
    let stage = Stage::new();
    let host = stage.challenged_host("compute-7");
    host.swtpm.tool(&["tpm2_clear"]);
    let refused = host.does_not_answer(79);
    assert!(refused.contains("it did not make the key, or was cleared"), "{refused}");
}

#[test]
fn a_name_and_a_tpm_belong_together_until_the_host_is_removed() {
    let stage = Stage::new();
    let (host, exchanged) = (stage.host("compute-7"), stage.host("compute-7"));
    for host in [&host, &exchanged] {
        host.enrolled();
        stage.challenge(host);
        host.answer();
    }
    stage.admit(&host);
    // It was challenged before the other was admitted.
    let refused = stage.fails(80, &["host", "admit", &exchanged.file("answer"), "--store", "cinder"]);
    assert!(refused.contains("is known with another TPM"), "{refused}");
    let refused = stage.refuses(&exchanged, &["--ca", stage.authority()]);
    assert!(refused.contains("is known with another TPM") && refused.contains("host remove"), "{refused}");
    let refused = stage.refuses(&exchanged, &["--trust-first-use"]);
    assert!(refused.contains("is known with another TPM"), "{refused}");

    let (bundle, renamed) = (host.file("bundle"), host.file("renamed"));
    fs::remove_file(&bundle).unwrap();
    host.ok(&["host", "enrol", "--replace", "--name", "compute-9", "--output", &renamed]);
    fs::rename(&renamed, &bundle).unwrap();
    let refused = stage.refuses(&host, &["--ca", stage.authority()]);
    assert!(refused.contains("the TPM in the bundle of 'compute-9' is that of"), "{refused}");

    stage.ok(&["host", "remove", host.name()]);
    stage.challenge(&host);
    stage.challenge(&exchanged);
}

#[test]
fn nothing_that_travels_or_is_kept_opens_anything() {
    let stage = Stage::new();
    let host = stage.challenged_host("compute-7");
    let pending: Value = serde_json::from_slice(&fs::read(stage.pending()).unwrap()).unwrap();
    host.answer();
    // Whoever reads the administrator's files cannot answer: they have the digest of the answer only.
    host.edit("answer", |answer| answer["mac"] = pending["answer"].clone());
    assert!(stage.does_not_admit(&host).contains("is wrong"));
    use std::os::unix::fs::MetadataExt;
    for file in [stage.pending(), host.file("state/enrolment.json").into(), host.file("host.tpm.pem").into()] {
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600, "{}", file.display());
    }
}
