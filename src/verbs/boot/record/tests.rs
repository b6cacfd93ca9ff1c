use std::process::Command;

use super::*;

#[test]
fn what_is_written_is_read_again_and_told() {
    let evidence = Evidence { proven: true, measured: Some("cryptsetup:root:1:2".to_owned()), header: None };
    let volume = |name: &str, result, by: &str, evidence| VolumeFacts {
        name: name.parse().unwrap(),
        device: "/dev/vda".to_owned(),
        path: PathBuf::new(),
        several: false,
        result,
        by: Some(by.to_owned()),
        evidence,
        seconds: None,
        failures: Vec::new(),
    };
    let volumes = vec![
        volume("root", Outcome::Attached, "a/1", evidence),
        volume("data", Outcome::Attached, "passphrase", Evidence::default()),
        volume("home", Outcome::NotOurs, "", Evidence::default()),
    ];
    let latch = Some(LatchFacts::NotExtended { why: "the TPM does not answer".to_owned() });
    let lockbox_closed = Some("PCR 15 is not extended".to_owned());
    let facts = Facts { version: 1, started: 1.0, seconds: None, prompt_after: None, volumes, latch, lockbox_closed };
    let read: Facts = serde_json::from_slice(&serde_json::to_vec(&facts).unwrap()).unwrap();
    let told = [
        "this boot:",
        "  root was attached, by a/1",
        "  data was attached, by passphrase, which does not prove that it is this host's own",
        "  home was not attached",
        "  PCR 15 is not extended: the TPM does not answer",
        "  the lockbox was closed: PCR 15 is not extended",
    ];
    assert_eq!(lines(&read), told);
}

#[test]
fn each_result_has_the_name_that_the_record_writes() {
    for result in [Outcome::Pending, Outcome::Attached, Outcome::NotOurs, Outcome::NotAttached, Outcome::Detached] {
        assert_eq!(serde_json::to_value(result).unwrap(), RESULTS[result as usize]);
    }
}

/// This test again, in a process of its own, whose standard error takes nothing.
const PRINTS: &str = "CRYPTATTACH_TEST_PRINTS";

#[test]
fn goes_on_where_nobody_listens() {
    if std::env::var_os(PRINTS).is_some() {
        return super::print("nobody reads this\n");
    }
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let name = "verbs::boot::record::tests::goes_on_where_nobody_listens";
    let mut again = Command::new(std::env::current_exe().unwrap());
    let again = again.args(["--exact", name, "--nocapture"]).env(PRINTS, "").stderr(full).output().unwrap();
    assert!(again.status.success(), "{again:?}");
    assert!(String::from_utf8_lossy(&again.stdout).contains("1 passed"), "{again:?}");
}
