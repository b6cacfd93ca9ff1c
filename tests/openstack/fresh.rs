//! First attach: a blank device is formatted with a key that is proven unused, and with no other.

use std::process::Command;

use crate::{
    Story,
    access::as_user,
    cloud::{Cloud, Site},
    hooks::stock_keys,
    keys::{hook, run_hook},
    shell::sh,
};

pub const STORIES: &[Story] = &[
    ("only_a_key_that_was_never_used_formats_with_swift", |cloud| never_used(cloud, "swift")),
    ("only_a_key_that_was_never_used_formats_with_barbican", |cloud| never_used(cloud, "barbican")),
    ("a_key_of_stock_castellan_formats_only_if_the_administrator_says_so", stock_key),
    ("a_key_is_given_out_only_if_that_can_be_noted", noted),
];

/// The exit code and what was said of an attach of this device with this key; what was attached is detached again.
fn attach(site: &Site<'_>, volume: &str, key: &str) -> (i32, String) {
    let name = site.name("hook");
    let request = format!(r#"{{"version":1,"device":"{volume}","link":null,"name":"{name}","key_id":"{key}"}}"#);
    let output = run_hook(site, "attach", &request);
    if output.status.success() {
        hook(site, "detach", &format!(r#"{{"version":1,"name":"{name}"}}"#));
    }
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

#[track_caller]
fn refused(site: &Site<'_>, key: &str, says: &str) {
    let blank = site.file("blank");
    let (code, text) = attach(site, &blank, key);
    assert!(code == 73 && text.contains(says), "{code}: {text}");
    assert!(is_blank(&blank), "it was written to");
}

fn is_blank(volume: &str) -> bool {
    sh(&format!("tr -d '\\0' <{volume} | head -c 1 | wc -c")).trim() == "0"
}

fn create(site: &Site<'_>) -> String {
    let key = hook(site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":256}"#);
    key["key_id"].as_str().unwrap().to_owned()
}

fn get(site: &Site<'_>, key: &str, metadata_only: bool) -> serde_json::Value {
    hook(site, "key get", &format!(r#"{{"version":1,"key_id":"{key}","metadata_only":{metadata_only}}}"#))
}

fn passphrase(site: &Site<'_>, key: &str) -> Command {
    let mut command = site.command();
    command.args(["key", "passphrase", key]);
    command
}

fn never_used(cloud: &Cloud, store: &str) {
    let site = Site::of_kind(cloud, store);
    let key = create(&site);
    assert_eq!(get(&site, &key, true)["fresh"], true);
    let volume = site.file("volume");
    assert_eq!(attach(&site, &volume, &key).0, 0, "looked at only, so that it formats");
    assert!(!is_blank(&volume));
    assert_eq!(attach(&site, &volume, &key).0, 0, "and opens");
    assert!(get(&site, &key, true)["fresh"].is_null());
    // The volume's data are somewhere, and not here.
    refused(&site, &key, "has already been used");

    let given_out = create(&site);
    assert!(get(&site, &given_out, false)["fresh"].is_null());
    refused(&site, &given_out, "was given out");
    let given_out = create(&site);
    let written = passphrase(&site, &format!("keys/{given_out}")).output().unwrap();
    assert_eq!((written.status.success(), written.stdout.len()), (true, 64));
    refused(&site, &given_out, "was given out");
    let listed = create(&site);
    hook(&site, "key list", r#"{"version":1,"type":"symmetric","metadata_only":true}"#);
    assert_eq!(get(&site, &listed, true)["fresh"], true, "a list without values gives nothing out");

    // Cinder clones a volume's key by storing the same value again. A request cannot say otherwise.
    let value = get(&site, &listed, false)["value"].clone();
    let clone = hook(
        &site,
        "key store",
        &format!(
            r#"{{"version":1,"secret":{{"type":"symmetric","algorithm":"AES","bit_length":256,"fresh":true,"value":{value}}}}}"#
        ),
    );
    let clone = clone["key_id"].as_str().unwrap();
    assert!(get(&site, clone, true)["fresh"].is_null());
    refused(&site, clone, if store == "swift" { "came from outside" } else { "nothing proves that the key" });
}

fn stock_key(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.barbican("barbican", false);
    let path = site.file("stock");
    let stock = stock_keys(&site, &path);
    // Formatted by stock os-brick, which leaves no note; then the device comes up blank.
    let (key, opened) = (&stock["luks"], &stock["luks2"]);
    let blank = site.file("blank");
    let (code, text) = attach(&site, &blank, key);
    assert_eq!(code, 73, "{text}");
    assert!(
        text.contains("nothing proves that the key") && text.contains("format_with_unmarked_keys = true"),
        "{text}"
    );
    assert!(is_blank(&blank));
    println!("{text}");

    // What we have opened once, we know to be used.
    assert_eq!(attach(&site, &format!("{path}.luks2"), opened).0, 0);

    // Cinder with castellan's own driver, and our encryptor only: first attach is asked for by the administrator.
    site.hooks("tenants = \"one\"\nformat_with_unmarked_keys = true");
    assert_eq!(attach(&site, &blank, key).0, 0);
    assert!(!is_blank(&blank));
    refused(&site, key, "has already been used");
    refused(&site, opened, "has already been used");
    let given_out = create(&site);
    get(&site, &given_out, false);
    refused(&site, &given_out, "was given out");
}

/// Nor to a reader, who may not write: it could format with it by other means.
fn noted(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.configure("[network]\ntotal_seconds = 4\n");
    site.swift("cinder", "keys", "");
    site.ok(&["container", "create", "cinder", "--reader", &cloud.acl("nova")]);
    let key = create(&site);
    let reference = format!("cinder/{key}");
    cloud.stop("object1 object2");
    let output = passphrase(&site, &reference).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(69) && output.stdout.is_empty(), "{text}");
    let output = run_hook(&site, "key get", &format!(r#"{{"version":1,"key_id":"{key}"}}"#));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(69) && output.stdout.is_empty(), "{text}");
    println!("{text}");
    cloud.repair();
    assert_eq!(get(&site, &key, true)["fresh"], true);

    let nova = as_user(&site, "nova");
    let output = passphrase(&site, &reference).args(["--config", &nova]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(77) && output.stdout.is_empty(), "{text}");
    assert!(text.contains("is not given out") && text.contains("--writer"), "{text}");
    println!("{text}");
    assert_eq!(get(&site, &key, true)["fresh"], true);
    // One that is used already is for whoever may read.
    get(&site, &key, false);
    let output = passphrase(&site, &reference).args(["--config", &nova]).output().unwrap();
    assert_eq!((output.status.success(), output.stdout.len()), (true, 64));
    let second = create(&site);
    let blank = site.file("blank");
    let request = format!(r#"{{"version":1,"device":"{blank}","link":null,"name":"x","key_id":"{second}"}}"#);
    let output = {
        use std::io::Write;
        let mut child = site.command();
        child.args(["hook", "attach", "--config", &nova]).stdin(std::process::Stdio::piped());
        let mut child = child.stderr(std::process::Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(request.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    assert_eq!(output.status.code(), Some(77), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(is_blank(&blank));
}
