//! What is Barbican's only: its forms, what it is asked for, and what stays there.

use crate::{
    Story,
    cloud::{Cloud, Site},
    hooks::{python, tells},
    keys::{hook, run_hook},
    shell::sh,
};

pub const STORIES: &[Story] = &[
    ("barbican_has_what_castellans_own_driver_reads", exchange),
    ("barbican_is_not_asked_for_values_that_nobody_wants", facts_only),
    ("a_secret_that_others_need_is_deleted_by_force_only", consumers),
    ("barbican_keeps_nothing_that_was_only_begun", nothing_begun),
];

fn exchange(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.barbican("barbican", false);
    assert!(tells(python(&site, "exchange.py")).contains("exchanged"));
}

fn facts_only(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.barbican("barbican", false);
    let key = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":512,"name":"n"}"#);
    let key = key["key_id"].as_str().unwrap();
    let asked = |metadata_only| {
        let path = site.path("request");
        std::fs::write(&path, format!(r#"{{"version":1,"key_id":"{key}","metadata_only":{metadata_only}}}"#)).unwrap();
        let mut command = site.command();
        let input = std::fs::File::open(path).unwrap();
        let output = command.args(["-v", "hook", "key", "get"]).stdin(input).output().unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&answer["bit_length"], &answer["name"]), (&512.into(), &"n".into()));
        assert_eq!(answer["value"].is_null(), metadata_only);
        String::from_utf8(output.stderr).unwrap()
    };
    let log = asked(true);
    assert!(log.contains(&format!("/secrets/{key}")) && !log.contains("/payload"), "{log}");
    assert!(asked(false).contains("/payload"));
}

/// They are Barbican's own: any program adds them.
fn consumers(cloud: &Cloud) {
    for sealed in [false, true] {
        let site = Site::bare(cloud);
        site.barbican("barbican", sealed);
        let key = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":256}"#);
        let key = key["key_id"].as_str().unwrap();
        let (token, url) = (cloud.token("cinder"), cloud.var("BARBICAN_URL"));
        let body = r#"{"service":"glance","resource_type":"image","resource_id":"7ed2"}"#;
        sh(&format!(
            "curl -sf -o /dev/null -H 'X-Auth-Token: {token}' -H 'Content-Type: application/json' \
             {url}/v1/secrets/{key}/consumers -d '{body}'"
        ));
        let reference = format!("barbican/{key}");
        let text = site.fails(73, &["key", "delete", &reference, "--yes"]);
        assert!(text.contains("glance image 7ed2") && text.contains("--force"), "{text}");
        let output = run_hook(&site, "key delete", &format!(r#"{{"version":1,"key_id":"{key}"}}"#));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(73) && text.contains("glance image 7ed2"), "{text}");
        let got = hook(&site, "key get", &format!(r#"{{"version":1,"key_id":"{key}","metadata_only":true}}"#));
        assert_eq!(got["consumers"][0]["resource_id"], "7ed2");
        site.ok(&["key", "delete", &reference, "--yes", "--force"]);
        site.fails(67, &["key", "show", &reference]);
    }
}

/// How many secrets and orders there are.
fn count(cloud: &Cloud) -> [u64; 2] {
    ["secrets", "orders"].map(|what| {
        let (token, url) = (cloud.token("cinder"), cloud.var("BARBICAN_URL"));
        let json = sh(&format!("curl -sf -H 'X-Auth-Token: {token}' '{url}/v1/{what}?limit=1'"));
        serde_json::from_str::<serde_json::Value>(&json).unwrap()["total"].as_u64().unwrap()
    })
}

fn nothing_begun(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.barbican("barbican", true);
    site.ok(&["container", "create", "barbican"]);
    let before = count(cloud);
    let volume = site.file("volume");
    // Where Barbican keeps it cannot be proven.
    site.fails(72, &["format", &volume, "--separation", "strict"]);
    let luks = site.file("luks");
    sh(&format!("printf secret | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {luks} -"));
    site.write("wrong", "other");
    let wrong = site.path("wrong").into_os_string().into_string().unwrap();
    site.fails(68, &["key", "import", &luks, "--key-file", &wrong]);
    assert_eq!(count(cloud), before);
    let reference = site.ok(&["format", &volume]);
    site.attaches(&volume);
    let key = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":256}"#);
    let key = key["key_id"].as_str().unwrap();
    // Given out, it is sealed anew without its mark.
    hook(&site, "key get", &format!(r#"{{"version":1,"key_id":"{key}"}}"#));
    assert_eq!(count(cloud)[0], before[0] + 3, "two keys, one of them re-sealed");
    site.ok(&["key", "delete", &reference, "--yes"]);
    site.ok(&["key", "delete", &format!("barbican/{key}"), "--yes"]);
    assert_eq!(count(cloud), before);
    // One that Barbican makes leaves no order.
    let site = Site::bare(cloud);
    site.barbican("barbican", false);
    let key = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":256}"#);
    assert_eq!(count(cloud), [before[0] + 1, before[1]]);
    site.ok(&["key", "delete", &format!("barbican/{}", key["key_id"].as_str().unwrap()), "--yes"]);
}
