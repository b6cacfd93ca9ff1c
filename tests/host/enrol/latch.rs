//! A boot: the lockbox opens by the TPM once, then PCR 15 is extended.

use super::stage::{Host, Stage};

/// Commands and policy sessions that the TPM took, as `-v` says them.
pub fn counted(said: &str) -> (u32, u32) {
    let number = |words: &[&str], after: &str| -> u32 {
        let at = words.windows(2).find(|pair| pair[1].starts_with(after)).unwrap_or_else(|| panic!("{words:?}"));
        at[0].parse().unwrap()
    };
    let lines = said.lines().filter(|line| line.contains("the TPM took"));
    lines.fold((0, 0), |(commands, sessions), line| {
        let words: Vec<_> = line.split_whitespace().collect();
        (commands + number(&words, "commands"), sessions + number(&words, "policy"))
    })
}

fn is_extended(host: &Host<'_>) -> bool {
    let read = host.swtpm.tool(&["tpm2_pcrread", "sha256:15"]);
    !read.to_lowercase().contains(&"0".repeat(64))
}

#[test]
fn one_policy_session_serves_a_boot_and_then_the_tpm_opens_it_no_more() {
    let stage = Stage::new();
    let mut host = stage.host("compute-7");
    stage.enrols(&host);
    // What is refused is not latched: the key is not in the keyring.
    let other = "A".repeat(43);
    assert!(host.fails(68, &["lockbox", "open", "--fingerprint", &other]).contains("expected AAAA"));
    assert!(!is_extended(&host));

    let said = host.says(&["lockbox", "open"]);
    let (commands, sessions) = counted(&said);
    assert_eq!(sessions, 1, "opening and latch: {said}");
    assert!((1..=20).contains(&commands), "{commands} commands: {said}");
    assert!(is_extended(&host) && host.swtpm.leftovers().is_empty());

    let status = host.ok(&["lockbox", "status"]);
    assert!(status.contains("whoever can use this server's TPM") && !status.contains("private key"), "{status}");

    // Open already: neither this nor any volume asks the TPM.
    let away = host.by_tcti("away.toml", "device:/dev/none");
    let again = host.ok(&["--config", &away, "lockbox", "open"]);
    assert!(again.contains("is open already") && again.contains("PCR 15 is extended"), "{again}");
    let (first, second) = (host.volume("first"), host.volume("second"));
    for volume in [&first, &first, &second] {
        let name = host.mapping();
        let said = host.says(&["--config", &away, "attach", volume, &name, "--backend", "userspace"]);
        assert_eq!(counted(&said), (0, 0), "{said}");
        host.ok(&["detach", &name]);
    }
    let extended = host.swtpm.tool(&["tpm2_pcrread", "sha256:15"]);
    assert_eq!(counted(&host.says(&["lockbox", "open"])), (0, 0));
    assert_eq!(host.swtpm.tool(&["tpm2_pcrread", "sha256:15"]), extended, "extended once");

    // Whoever comes later in this boot has the TPM and no key.
    host.ok(&["lockbox", "close"]);
    for _ in 0..2 {
        let refused = host.fails(79, &["lockbox", "open"]);
        assert!(refused.contains("'lockbox open' extended PCR 15 at ") && refused.contains(" GMT"), "{refused}");
        assert!(refused.contains("next: power the machine off and on"), "{refused}");
    }
    assert!(!host.has_lockbox_key());

    host.reboots();
    assert_eq!(counted(&host.says(&["lockbox", "open"])).1, 1);
    host.attaches(&second);
    assert!(is_extended(&host));
}

#[test]
fn who_else_extended_pcr_15_is_not_made_out_to_be_the_lockbox() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    stage.enrols(&host);
    host.swtpm.extend(15, '1');
    let refused = host.fails(79, &["lockbox", "open"]);
    assert!(refused.contains("PCR 15 has been extended") && !refused.contains("'lockbox open' extended"), "{refused}");
}

#[test]
fn what_stopped_between_keyring_and_latch_is_made_up_for() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    stage.enrols(&host);
    // As if it had been killed between the two: it was told to leave the latch out.
    host.ok(&["--config", &host.unlatched(), "lockbox", "open"]);
    assert!(!is_extended(&host));
    let made_up = host.ok(&["lockbox", "open"]);
    assert!(made_up.contains("is open already") && is_extended(&host), "{made_up}");
}

#[test]
fn a_lockbox_is_closed_again_where_no_tpm_proves_the_latch() {
    let stage = Stage::new();
    let host = stage.host("compute-7");
    stage.enrols(&host);
    host.ok(&["--config", &host.unlatched(), "lockbox", "open"]);
    // The TPM goes away.
    let away = host.by_tcti("away.toml", "device:/dev/none");
    let failed = host.fails(79, &["--config", &away, "lockbox", "open"]);
    assert!(failed.contains("was closed again: PCR 15 is not extended"), "{failed}");
    assert!(!host.has_lockbox_key());
}

#[test]
fn without_the_latch_it_opens_again_in_the_same_boot() {
    let stage = Stage::new();
    stage.configure("latch = false");
    let host = stage.host("compute-7");
    host.configure("latch = false\n");
    stage.enrols(&host);
    for _ in 0..2 {
        let opened = host.ok(&["lockbox", "open"]);
        assert!(!opened.contains("PCR 15") && !is_extended(&host), "{opened}");
        host.ok(&["lockbox", "close"]);
    }
}
