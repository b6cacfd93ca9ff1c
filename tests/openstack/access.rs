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
    ("a_wrong_certificate_is_refused", certificates),
    ("a_clock_that_is_wrong_is_named", clock),
    ("a_withdrawn_token_is_replaced_and_a_callers_is_not", tokens),
];

fn access_lists(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.swift("cinder", "keys", "");
    site.ok(&["container", "create", "cinder", "--reader", &cloud.acl("nova")]);
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume]);
    let container = site.container("cinder");
    // The same store, other users: what the store lets them do, and not what their keys would open, is asked for.
    let as_user = |user: &str| {
        let folder = site.path(user);
        std::fs::create_dir(&folder).unwrap();
        let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
        let text = text
            .replace("cloud = \"keys\"", &format!("cloud = \"{user}\""))
            .replace("inventory.toml", "../inventory.toml")
            .replace("clouds.yaml", "../clouds.yaml");
        let text = text.replace("owner.", "../owner.").replace("escrow.", "../escrow.");
        std::fs::write(folder.join("cryptattach.toml"), text).unwrap();
        folder.join("cryptattach.toml").into_os_string().into_string().unwrap()
    };
    let (nova, glance) = (as_user("nova"), as_user("glance"));
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
fn withdraw_tokens(cloud: &Cloud) {
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
