//! Volumes with their keys in Swift: container keys, rotation, what is on the wire.

use std::{process::Stdio, sync::Arc, thread, time::Duration};

use cryptattach::{
    config::Config,
    keys::seal::For,
    sys::kernel_keyring,
    unlock::container::{Container, Use, ViaLockbox},
};

use crate::opens::opens;
use crate::{
    Story,
    access::withdraw_tokens,
    cloud::{Cloud, Site},
    shell::sh,
    speed::{counted, logged},
};

pub const STORIES: &[Story] = &[
    ("a_volume_opens_by_its_key_in_swift", a_volume),
    ("rotation_seals_all_keys_anew", rotation),
    ("a_killed_rotation_is_finished", killed_rotation),
    ("an_old_or_foreign_container_key_is_not_sealed_under", container_key_trust),
    ("a_host_that_missed_rotations_follows_while_it_can", missed_rotations),
    ("one_key_get_when_warm", requests),
    ("attaches_of_one_boot_ask_for_little_besides_the_key", attaches_of_one_boot),
    ("logging_in_in_every_way", log_in),
    ("the_escrow_key_opens_everything", escrow),
];

fn a_volume(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume]);
    let shown = site.json(&["key", "show", &reference]);
    assert_eq!(shown["recipients"][0]["kid"], "cinder/kek/1");
    assert_eq!(shown["recipients"][0]["alg"], "A256KW");
    assert_eq!(site.ok(&["key", "list"]), reference);

    let device = site.ok(&["attach", &volume, &site.name("v"), "--backend", "userspace"]);
    sh(&format!("printf %s 'the quick brown fox' | dd of={device} bs=4096 conv=sync,fsync status=none"));
    site.ok(&["detach", &site.name("v")]);
    let device = site.ok(&["attach", &volume, &site.name("v"), "--backend", "userspace"]);
    assert_eq!(sh(&format!("head -c 19 {device}")), "the quick brown fox");
    site.ok(&["detach", &site.name("v")]);

    site.fails(64, &["key", "delete", &reference]);
    site.ok(&["key", "delete", &reference, "--yes"]);
    let text = site.fails(67, &["attach", &volume, &site.name("v"), "--backend", "userspace"]);
    assert!(text.contains("there is no key") && text.contains(&site.container("cinder")), "{text}");
    let audit = std::fs::read_to_string(site.path("audit")).unwrap();
    assert!(audit.contains(" of 127.0.0.11"), "the proof with its replicas is in the audit record: {audit}");
}

fn rotation(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volumes: Vec<_> = (0..3).map(|n| site.file(&format!("v{n}"))).collect();
    let keys: Vec<_> = volumes.iter().map(|volume| site.ok(&["format", volume])).collect();
    let first = site.json(&["container", "show"]);
    let done = site.json(&["container", "rotate", "cinder"]);
    assert_eq!((&done["epoch"], &done["resealed"]), (&"2".into(), &3.into()));
    let second = site.json(&["container", "show"]);
    assert_ne!(first["fingerprint"], second["fingerprint"]);
    assert_eq!(second["fingerprint"], done["fingerprint"]);
    for (volume, key) in volumes.iter().zip(&keys) {
        let shown = site.json(&["key", "show", key]);
        assert_eq!(
            (&shown["recipients"][0]["kid"], &shown["claims"]["generation"]),
            (&"cinder/kek/2".into(), &2.into())
        );
        site.attaches(volume);
    }
    // Container keys stay for a week, for the store may list a key late; the one before the current one stays in any case.
    let done = site.json(&["container", "rotate", "cinder"]);
    assert_eq!(done["deleted"], serde_json::json!([]));
    let done = site.json(&["container", "rotate", "cinder", "--keep-days", "0"]);
    assert_eq!(done["deleted"], serde_json::json!(["1", "2"]));
    volumes.iter().for_each(|volume| site.attaches(volume));
}

fn killed_rotation(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    for _ in 0..24 {
        hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":256}"#);
    }
    let mut killed = 0;
    for milliseconds in [150, 300, 500] {
        let mut rotate = site.command();
        let mut rotate =
            rotate.args(["container", "rotate", "cinder"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        thread::sleep(Duration::from_millis(milliseconds));
        rotate.kill().unwrap();
        killed += usize::from(!rotate.wait().unwrap().success());
        site.attaches(&volume);
    }
    assert!(killed > 0, "at least one rotation was killed in the middle");
    let done = site.json(&["container", "rotate", "cinder"]);
    assert_eq!(done["failed"], serde_json::json!([]));
    let kid = format!("cinder/kek/{}", done["epoch"].as_str().unwrap());
    let keys: Vec<String> = serde_json::from_value(site.json(&["key", "list"])).unwrap();
    assert_eq!(keys.len(), 25);
    for key in keys {
        assert_eq!(site.json(&["key", "show", &key])["recipients"][0]["kid"], kid);
    }
    assert_eq!(site.json(&["container", "show"])["rotating"], false);
    site.attaches(&volume);
}

/// Whoever writes to the store can seal a container key of theirs to the owner's public key. It must not be used.
fn container_key_trust(cloud: &Cloud) {
    let site = Site::new(cloud);
    site.ok(&["format", &site.file("one")]);
    // The thief's own container key, of the same number, sealed to the right owner: made on a host that trusts nothing.
    let thief = Site::bare(cloud);
    for name in ["owner.pem", "owner.key", "escrow.pem"] {
        std::fs::copy(site.path(name), thief.path(name)).unwrap();
    }
    thief.swift("cinder", "keys", "");
    thief.ok(&["container", "create", "cinder"]);
    let token = cloud.token("cinder");
    let (from, to) = (cloud.container_url(&thief.container("cinder")), cloud.container_url(&site.container("cinder")));
    let curl = |more: &str| sh(&format!("curl -sf -H 'X-Auth-Token: {token}' {more}"));
    curl(&format!("{from}/kek/1 -o {}", site.path("stolen").display()));
    curl(&format!("{to}/kek/1 -o {}", site.path("right").display()));
    curl(&format!("-X PUT {to}/kek/1 -T {}", site.path("stolen").display()));
    let text = site.fails(68, &["format", &site.file("two")]);
    assert!(text.contains("cinder/kek/1") && text.contains("fingerprint"), "{text}");

    // As the next epoch it has no proof.
    curl(&format!("-X PUT {to}/kek/1 -T {}", site.path("right").display()));
    thief.ok(&["container", "rotate", "cinder"]);
    curl(&format!("{from}/kek/2 -o {}", site.path("stolen").display()));
    curl(&format!("-X PUT {to}/kek/2 -T {}", site.path("stolen").display()));
    curl(&format!("-X POST -H 'X-Container-Meta-Cryptattach-Epoch: 2' {to}"));
    let text = site.fails(68, &["format", &site.file("three")]);
    assert!(text.contains("no proof by the key before it"), "{text}");

    // Nor does a host go back to an epoch from before a withdrawal.
    curl(&format!("-X POST -H 'X-Container-Meta-Cryptattach-Epoch: 1' {to}"));
    curl(&format!("-X DELETE {to}/kek/2"));
    site.ok(&["container", "rotate", "cinder"]);
    curl(&format!("-X POST -H 'X-Container-Meta-Cryptattach-Epoch: 1' {to}"));
    let text = site.fails(68, &["format", &site.file("four")]);
    assert!(text.contains("has trusted epoch 2"), "{text}");
}

fn missed_rotations(cloud: &Cloud) {
    let site = Site::new(cloud);
    site.ok(&["format", &site.file("one")]);
    let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    site.write("administrator.toml", &text.replace("/state\"", "/state-of-the-administrator\""));
    let administrator = site.path("administrator.toml").into_os_string().into_string().unwrap();
    let rotate = || drop(site.ok(&["container", "rotate", "cinder", "--keep-days", "0", "--config", &administrator]));
    rotate();
    site.ok(&["format", &site.file("two")]);
    let known = std::fs::read_to_string(site.path("state/containers/cinder")).unwrap();
    assert!(known.contains("\"2\""), "{known}");
    rotate();
    rotate();
    let text = site.fails(68, &["format", &site.file("three")]);
    assert!(text.contains("cinder/kek/4") && text.contains("cannot check that"), "{text}");
    std::fs::remove_file(site.path("state/containers/cinder")).unwrap();
    site.ok(&["format", &site.file("four")]);
}

/// In one process with a token and the container key, a key costs one request.
fn requests(cloud: &Cloud) {
    let site = Site::new(cloud);
    let keys: Vec<String> = (0..3).map(|n| site.ok(&["format", &site.file(&format!("v{n}"))])).collect();
    drop(crate::stores::open(&site, "cinder"));
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let container = Container::open(&config, &"cinder".parse().unwrap(), None, Use::Keys).unwrap();
    let fetch = |key: &String| assert!(opens(&container, &key[7..].parse().unwrap()));
    fetch(&keys[0]);
    // The proxy logs what it has answered, one request after the other: once a mark is in its log, all before it is.
    let log = format!("{}/log/proxy.log", cloud.var("STATE"));
    let (token, url) = (cloud.token("cinder"), cloud.container_url(&site.container("cinder")));
    let mark = |name: &str| {
        let logged = format!("for i in $(seq 300); do grep -q {name} {log} && exit; sleep 0.1; done; exit 1");
        sh(&format!("curl -s -o /dev/null -H 'X-Auth-Token: {token}' {url}/{name}; {logged}"));
    };
    mark("mark-before");
    keys.iter().for_each(fetch);
    mark("mark-after");
    let seen = sh(&format!(
        "sed -n '/mark-before/,/mark-after/p' {log} | grep -c '/{}/.* cryptattach/'",
        site.container("cinder")
    ));
    assert_eq!(seen, "3", "one GET for each of three keys");
}

/// What earlier attaches have left in the kernel's keyring: descriptions.
fn kept_tokens() -> Vec<String> {
    let keys = std::fs::read_to_string("/proc/keys").unwrap();
    let described =
        keys.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with("cryptattach:token:")));
    described.map(|word| word.trim_end_matches(':').to_owned()).collect()
}

/// As after a boot: the next attach logs in.
pub fn forget_tokens() {
    kept_tokens().iter().for_each(|kept| drop(kernel_keyring::remove(kept)));
}

/// What attaches have left is root's alone, also to a process that was root and has kept root's session keyring.
fn another_user_gets_nothing() {
    let is_there = |kept: &String| kernel_keyring::get(kept, 16 << 10).is_ok_and(|found| found.is_some());
    let kept = kept_tokens().into_iter().find(is_there).unwrap();
    let keys = std::fs::read_to_string("/proc/keys").unwrap();
    // The second word has R, D or i for one that is revoked, dead or invalidated.
    let lives = |line: &&str| line.split_whitespace().nth(1).is_some_and(|flags| !flags.contains(['R', 'D', 'i']));
    let line = keys.lines().filter(lives).find(|line| line.contains(&kept)).unwrap();
    let serial = line.split_whitespace().next().unwrap();
    let nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    let ways = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openstack/other_user.py");
    // The system's Python: one of root's own is not for nobody to run.
    let ways = |who: &str| sh(&format!("PATH=/usr/bin:/bin {who} python3 - {kept} {serial} <{ways}"));
    let ours = ways("");
    assert!(ours.contains("read") && ours.contains("describe"), "the ways are ways: {ours}");
    assert_eq!(ways(nobody).trim(), "");
    sh("ls /run/cryptattach/.warm/*/kek-1");
    sh(&format!("! {nobody} sh -c 'ls /run/cryptattach/.warm || cat /run/cryptattach/.warm/*/kek-1' 2>/dev/null"));
}

fn attaches_of_one_boot(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volumes: Vec<_> = (0..8).map(|n| site.file(&format!("v{n}"))).collect();
    let keys: Vec<String> = volumes.iter().map(|volume| site.ok(&["format", volume])).collect();
    forget_tokens();
    let attach = |volume: &str| {
        let name = site.name("v");
        let output = site.run(&["-v", "attach", volume, &name, "--backend", "userspace"]);
        let log = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{log}");
        site.ok(&["detach", &name]);
        (counted(&log), log)
    };
    assert_eq!(attach(&volumes[0]).0, [1, 2, 3], "log-in; key and container key; three rings");
    assert_eq!(attach(&volumes[1]).0, [0, 1, 1], "the key, and the ring that has it");
    another_user_gets_nothing();
    assert_eq!(attach(&volumes[0]).0, [0, 1, 1], "each time");

    // Keystone withdraws the token that is kept: it is in no file, and the next attach logs in once.
    // The kernel lists what was removed until it collects it.
    let (json, _) = kept_tokens().iter().find_map(|kept| kernel_keyring::get(kept, 16 << 10).unwrap()).unwrap();
    let json: serde_json::Value = serde_json::from_slice(json.expose()).unwrap();
    let token = json["token"].as_str().unwrap();
    let folders = format!("{} {} /run/cryptattach", site.path("").display(), site.disk().display());
    sh(&format!("! grep -rqF -- '{token}' {folders}"));
    withdraw_tokens(cloud);
    let (requests, log) = attach(&volumes[2]);
    assert!(requests[0] == 1 && requests[2] == 1 && log.contains("logging in again"), "{requests:?} {log}");
    assert_eq!(attach(&volumes[3]).0, [0, 1, 1]);

    // A rotation: its container key is asked for once. A deleted key is gone at once.
    site.ok(&["container", "rotate", "cinder"]);
    assert_eq!(attach(&volumes[4]).0, [0, 2, 1], "the key and its container key");
    assert_eq!(attach(&volumes[5]).0, [0, 1, 1]);
    site.ok(&["key", "delete", &keys[5], "--yes"]);
    site.fails(67, &["attach", &volumes[5], &site.name("v"), "--backend", "userspace"]);

    // As a boot has them: one container for all of its volumes.
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let container = Arc::new(Container::open(&config, &"cinder".parse().unwrap(), None, Use::BootByStore).unwrap());
    let ids: Vec<_> =
        keys.iter().enumerate().filter(|(n, _)| *n != 5).map(|(_, key)| key[7..].parse().unwrap()).collect();
    let boot = logged(|| {
        for id in &ids {
            ViaLockbox::look(container.clone(), *id, For::Any, &|_| Ok(())).places().unwrap();
            assert!(opens(&container, id));
        }
    });
    assert_eq!(counted(&boot), [1, ids.len() + 1, ids.len() + 2]);
}

fn log_in(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    let key = site.ok(&["format", &volume]);
    let key = &key[7..];
    let container = site.container("cinder");
    let sealing = "owner = \"owner.pem\"\nescrow = \"escrow.pem\"\nidentities = [\"owner.key\"]";
    let attach = |store: &str| {
        // Sealed for the container `cinder`: under another store's name the key is refused, but it was fetched.
        let output = site.run(&["attach", &volume, &site.name("x"), "--key", &format!("{store}/{key}")]);
        String::from_utf8(output.stderr).unwrap()
    };
    for cloud in ["robot", "tls"] {
        site.configure(&format!(
            "[stores.{cloud}]\ntype = \"swift\"\ncontainer = \"{container}\"\ncloud = \"{cloud}\"\n{sealing}"
        ));
        let text = attach(cloud);
        assert!(text.contains(&format!("belongs to container cinder, but {cloud} was requested")), "{text}");
    }
    // A password in a file of its own, and none in clouds.yaml.
    let clouds = std::fs::read_to_string(site.path("clouds.yaml")).unwrap();
    site.write("bare.yaml", &clouds.replace(&format!("password: \"{}\", ", cloud.var("PASSWORD_CINDER")), ""));
    site.write("password", &format!("{}\n", cloud.var("PASSWORD_CINDER")));
    let section = |name: &str, secret: &str| {
        site.configure(&format!(
            "[stores.{name}]\ntype = \"swift\"\ncontainer = \"{container}\"\ncloud = \"keys\"\nclouds = \"bare.yaml\"\n{secret}\n{sealing}"
        ));
    };
    section("without", "");
    assert!(attach("without").contains("has no password"));
    section("file", "secret = \"password\"");
    assert!(attach("file").contains("but file was requested"));
    // A token that someone else got, as file.
    site.write("token", &cloud.token("cinder"));
    site.write(
        "token.yaml",
        &format!("clouds:\n  keys:\n    auth_type: v3token\n    auth: {{auth_url: \"{}\"}}\n", cloud.var("AUTH_URL")),
    );
    site.configure(&format!(
        "[stores.token]\ntype = \"swift\"\ncontainer = \"{container}\"\ncloud = \"keys\"\nclouds = \"token.yaml\"\nsecret = \"token\"\n{sealing}"
    ));
    assert!(attach("token").contains("but token was requested"));
}

fn escrow(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    site.ok(&["format", &volume]);
    std::fs::remove_file(site.path("owner.key")).unwrap();
    std::fs::rename(site.path("escrow.key"), site.path("owner.key")).unwrap();
    site.attaches(&volume);
}

/// A hook's answer.
#[track_caller]
pub fn hook(site: &Site<'_>, verb: &str, request: &str) -> serde_json::Value {
    let output = run_hook(site, verb, request);
    assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

pub fn run_hook(site: &Site<'_>, verb: &str, request: &str) -> std::process::Output {
    crate::cloud::with_input(site.command().arg("hook").args(verb.split(' ')), request)
}
