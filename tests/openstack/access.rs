//! Who may do what: Swift's access lists, TLS, tokens.

use std::process::Command;

use crate::{
    Story,
    cloud::{Cloud, Site},
    keys::{hook, run_hook},
    shell::sh,
};

pub const STORIES: &[Story] = &[
    ("a_reader_reads_and_nobody_else_does", access_lists),
    ("a_writer_makes_keys", writer),
    ("an_admitted_host_opens_until_it_is_withdrawn", admitted_host),
    ("no_secret_is_in_what_is_said", secrets),
    ("a_wrong_certificate_is_refused", certificates),
    ("a_clock_that_is_wrong_is_named", clock),
    ("what_clouds_yaml_says_of_the_region_is_heeded", regions),
    ("a_withdrawn_token_is_replaced_and_a_callers_is_not", tokens),
];

fn access_lists(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.swift("cinder", "keys", "");
    site.ok(&["container", "create", "cinder", "--reader", &cloud.acl("nova")]);
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume]);
    let container = site.container("cinder");
    let (nova, glance) = (as_user(&site, "nova"), as_user(&site, "glance"));
    assert_eq!(site.ok(&["key", "list", "--config", &nova]), reference);
    site.ok(&["attach", &volume, &site.name("n"), "--backend", "userspace", "--config", &nova]);
    site.ok(&["detach", &site.name("n")]);
    for arguments in [
        vec!["format", &site.file("other"), "--config", &nova],
        vec!["key", "delete", &reference, "--yes", "--config", &nova],
        vec!["key", "list", "--config", &glance],
        vec!["key", "show", &reference, "--config", &glance],
        vec!["attach", &volume, &site.name("g"), "--backend", "userspace", "--config", &glance],
        vec!["format", &site.file("third"), "--config", &glance],
    ] {
        let text = site.fails(77, &arguments);
        assert!(text.contains("this user may not") && text.contains(&container), "{text}");
    }
    for everyone in [".r:*", "*:*", "nova"] {
        site.fails(64, &["container", "create", "cinder", "--reader", everyone]);
    }
}

/// The same store, another user: what the store lets them do, and not what their keys would open, is asked for.
pub fn as_user(site: &Site<'_>, user: &str) -> String {
    let folder = site.path(user);
    std::fs::create_dir(&folder).unwrap();
    let mut text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    text = text.replace("cloud = \"keys\"", &format!("cloud = \"{user}\""));
    for file in ["inventory.toml", "clouds.yaml", "owner.pem", "owner.key", "escrow.pem"] {
        text = text.replace(&format!("\"{file}\""), &format!("\"../{file}\""));
    }
    std::fs::write(folder.join("cryptattach.toml"), text).unwrap();
    folder.join("cryptattach.toml").into_os_string().into_string().unwrap()
}

fn writer(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.swift("cinder", "keys", "");
    site.ok(&["container", "create", "cinder", "--writer", &cloud.acl("nova")]);
    let nova = as_user(&site, "nova");
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume, "--config", &nova]);
    site.attaches(&volume);
    site.ok(&["key", "delete", &reference, "--yes", "--config", &nova]);
}

/// A compute host with a key pair of its own, and none of the owner's.
fn admitted_host(cloud: &Cloud) {
    let site = Site::bare(cloud);
    sh(&format!(
        "cd {} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out host.key 2>/dev/null &&
         openssl pkey -in host.key -pubout -out host.pem",
        site.path("").display()
    ));
    site.swift("cinder", "keys", "hosts = [\"host.pem\"]");
    site.ok(&["container", "create", "cinder"]);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    let as_administrator = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    let as_host = as_administrator.replace("owner.key", "host.key");
    site.write("cryptattach.toml", &as_host);
    site.attaches(&volume);

    site.write("cryptattach.toml", &as_administrator.replace("hosts = [\"host.pem\"]", ""));
    site.ok(&["container", "rotate", "cinder"]);
    site.write("cryptattach.toml", &as_host);
    let text = site.fails(68, &["attach", &volume, "x", "--backend", "userspace"]);
    assert!(text.contains("the container key cinder/kek/2 is refused"), "{text}");
}

fn secrets(cloud: &Cloud) {
    let site = Site::new(cloud);
    site.barbican("barbican", false);
    let volume = site.file("volume");
    let token = cloud.token("cinder");
    let mut said = String::new();
    let mut hear = |output: std::process::Output| said += &String::from_utf8_lossy(&output.stderr);
    hear(site.run(&["format", &volume, "--store", "cinder", "-vv"]));
    hear(site.run(&["attach", &volume, &site.name("v"), "--backend", "userspace", "-vv"]));
    hear(site.run(&["detach", &site.name("v"), "-vv"]));
    let request = format!(
        r#"{{"version":1,"store":"barbican","algorithm":"AES","bit_length":256,"auth":{{"token":"{token}"}}}}"#
    );
    let key = hook(&site, "key create", &request)["key_id"].as_str().unwrap().to_owned();
    let request = format!(r#"{{"version":1,"store":"barbican","key_id":"{key}","auth":{{"token":"{token}"}}}}"#);
    let output = run_hook(&site, "key get -vv", &request);
    let given: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    hear(output);
    hear(run_hook(&site, "key get -vv", &request.replace(&key, "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de")));
    hear(run_hook(&site, "key get -vv", &request.replace("\"version\":1", "\"version\":\"1\"")));
    said += &std::fs::read_to_string(site.path("audit")).unwrap();
    assert!(said.contains("201 http://127.0.0.1:") && said.contains("key get"), "much was said: {said}");
    // Keystone's tokens (Fernet) begin like this.
    for secret in ["gAAAA", &token, cloud.var("PASSWORD_CINDER"), given["value"].as_str().unwrap()] {
        assert!(!said.contains(secret), "{secret} in {said}");
    }
}

fn certificates(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.swift("right", "tls", "");
    site.ok(&["container", "create", "right"]);
    site.swift("wrong", "wrong-tls", "");
    let text = site.fails(69, &["key", "list", "--store", "wrong"]);
    assert!(text.contains("certificate") && text.contains("cacert"), "{text}");
    // In the clear only on this host.
    let clouds = std::fs::read_to_string(site.path("clouds.yaml")).unwrap();
    site.write("clouds.yaml", &clouds.replace("http://127.0.0.1", "http://192.0.2.1"));
    site.swift("clear", "keys", "");
    let text = site.fails(78, &["key", "list", "--store", "clear"]);
    assert!(text.contains("is not https"), "{text}");
}

fn clock(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.swift("cinder", "tls", "");
    let output = Command::new("faketime")
        .arg("2020-01-01")
        .arg(env!("CARGO_BIN_EXE_cryptattach"))
        .args(["key", "list"])
        .env("CRYPTATTACH_CONFIG", site.path("cryptattach.toml"))
        .env("OS_CLIENT_CONFIG_FILE", site.path("clouds.yaml"))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    println!("$ faketime 2020-01-01 cryptattach key list\n{text}");
    assert_eq!(output.status.code(), Some(69), "{text}");
    assert!(text.contains("certificate") && text.contains("clock"), "{text}");
}

fn regions(cloud: &Cloud) {
    let site = Site::new(cloud);
    let clouds = std::fs::read_to_string(site.path("clouds.yaml")).unwrap();
    let keys = |says: &str| {
        // An entry that is nobody's business, and what is said of the cloud that is used.
        let text = clouds.replace("  keys:\n    region_name: RegionOne\n", &format!("  other:\n  keys:\n{says}"));
        site.write("clouds.yaml", &text);
    };
    for says in ["    regions: [RegionOne, RegionTwo]\n", "    object_store_interface: [nobody, internal]\n"] {
        keys(says);
        site.ok(&["key", "list"]);
    }
    for says in
        ["    regions: [{name: RegionTwo}]\n    region_name: RegionOne\n", "    object_store_region_name: RegionTwo\n"]
    {
        keys(says);
        let text = site.fails(78, &["key", "list"]);
        assert!(text.contains("object-store in region RegionTwo"), "{text}");
    }
    // The password apart.
    let password = cloud.var("PASSWORD_CINDER");
    site.write("clouds.yaml", &clouds.replace(&format!("password: \"{password}\", "), ""));
    site.fails(78, &["key", "list"]);
    site.write("secure.yaml", &format!("clouds: {{keys: {{auth: {{password: \"{password}\"}}}}}}\n"));
    site.ok(&["key", "list"]);
}

fn tokens(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    // In one process: logged in, then all tokens of the user are withdrawn by a new password's being set to the old one.
    let store = crate::stores::open(&site, "cinder");
    assert_eq!(store.list().unwrap().len(), 1);
    withdraw_tokens(cloud);
    assert_eq!(store.list().unwrap().len(), 1, "a new token was fetched");

    site.barbican("barbican", false);
    let token = cloud.token("cinder");
    let request = format!(
        r#"{{"version":1,"store":"barbican","algorithm":"AES","bit_length":256,"auth":{{"token":"{token}"}}}}"#
    );
    hook(&site, "key create", &request);
    withdraw_tokens(cloud);
    let output = run_hook(&site, "key create", &request);
    let text = String::from_utf8(output.stderr).unwrap();
    println!("{text}");
    assert_eq!(output.status.code(), Some(77), "{text}");
    assert!(text.contains("the caller's token") && !text.contains(&token), "{text}");
}

/// A change of the password withdraws a user's tokens; where tokens are checked, they may be remembered for a while, so
/// those servers start anew.
pub fn withdraw_tokens(cloud: &Cloud) {
    let (url, password) = (cloud.var("AUTH_URL"), cloud.var("PASSWORD_CINDER"));
    let (user, token) = (cloud.var("USER_ID_CINDER"), cloud.token("cinder"));
    for (old, new) in [(password, "another-for-a-moment"), ("another-for-a-moment", password)] {
        let token = if old == password { token.clone() } else { password_token(cloud, old) };
        sh(&format!(
            "curl -sf -X POST -H 'X-Auth-Token: {token}' -H 'Content-Type: application/json' {url}/users/{user}/password \
             -d '{{\"user\": {{\"password\": \"{new}\", \"original_password\": \"{old}\"}}}}'"
        ));
    }
    cloud.stop("proxy barbican");
    cloud.repair();
}

fn password_token(cloud: &Cloud, password: &str) -> String {
    let body = format!(
        r#"{{"auth": {{"identity": {{"methods": ["password"], "password": {{"user": {{"name": "cinder", "domain": {{"id": "default"}}, "password": "{password}"}}}}}}}}}}"#
    );
    sh(&format!(
        "curl -sf -D - -o /dev/null -H 'Content-Type: application/json' {}/auth/tokens -d '{body}' | \
         tr -d '\\r' | sed -n 's/^[Xx]-[Ss]ubject-[Tt]oken: //p'",
        cloud.var("AUTH_URL")
    ))
}
