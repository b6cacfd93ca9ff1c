//! The words that people try first, and what is said at once rather than later.

use std::{fs, process::Stdio};

use serde_json::Value;

use crate::site::{Site, sh};

#[test]
fn a_mapping_goes_by_its_name_its_plaintext_and_its_device() {
    let site = Site::new();
    let (volume, _) = site.volume("v", &[]);
    let name = site.name("words");
    // As cryptsetup says it.
    site.ok(&["open", &volume, &format!("/dev/mapper/{name}"), "--backend", "userspace"]);
    let by_name = site.ok(&["status", &name]);
    for word in [format!("/dev/mapper/{name}"), format!("/dev/disk/by-cryptattach/{name}"), volume.clone()] {
        assert_eq!(site.ok(&["status", &word]), by_name, "{word}");
    }
    assert!(site.ok(&["list"]).starts_with("NAME"));
    site.ok(&["close", &volume]);
    assert!(site.fails(66, &["detach", &name]).contains("nothing is attached as"));
    assert!(site.fails(66, &["detach", &volume]).contains(&format!("nothing on {volume} is attached")));
}

#[test]
fn a_reader_that_has_enough_is_no_failure() {
    let site = Site::new();
    site.volume("v", &[]);
    let run = site.command().args(["key", "list"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut run = run;
    drop(run.stdout.take());
    let output = run.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}

#[test]
fn a_second_store_breaks_no_command_and_one_in_memory_is_told() {
    let site = Site::new();
    let other =
        site.run(&["init", "--store", "other", "--path", site.keys("other"), "--escrow", site.keys("escrow.pem")]);
    let told = String::from_utf8(other.stderr).unwrap();
    assert!(other.status.success() && told.contains("in memory, and lost with the next boot"), "{told}");
    let (_, reference) = site.volume("v", &[]);
    assert!(reference.starts_with("cinder/"), "{reference}");
    assert!(fs::read_to_string(site.keys("cryptattach.toml")).unwrap().starts_with("default_store = \"cinder\"\n"));
}

#[test]
fn the_escrow_key_recovers_beside_an_owner_key_that_is_lost() {
    let site = Site::new();
    let (volume, _) = site.volume("v", &[]);
    let (file, owner) = (site.keys("cryptattach.toml"), site.keys("cinder.owner.key"));
    let config = fs::read_to_string(file).unwrap();
    fs::remove_file(owner).unwrap();
    assert!(site.fails(78, &["test", &volume]).contains("cannot read the key file"));
    let both = config.replace(&format!("\"{owner}\"]"), &format!("\"{owner}\", \"{}\"]", site.keys("escrow.key")));
    fs::write(file, both).unwrap();
    let output = site.run(&["test", &volume]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && told.matches("cinder.owner.key").count() == 1, "{told}");
    assert!(told.contains("the other identities are tried"), "{told}");
}

#[test]
fn a_newline_at_the_end_of_a_key_file_counts_only_if_it_opens_and_the_terminal_asks() {
    let site = Site::new();
    let volume = site.file("v", 64 << 20).into_os_string().into_string().unwrap();
    sh(&format!(
        "printf secret | cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {volume} -"
    ));
    fs::write(site.keys("line"), "secret\n").unwrap();
    let import = ["key", "import", &volume, "--key-file", site.keys("line")];
    let output = site.run(&import);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && told.contains("newline that is no part of the passphrase"), "{told}");
    // One that is a part of the passphrase, as cryptsetup's --key-file takes it.
    sh(&format!(
        "printf secret | cryptsetup luksAddKey --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file - {volume} {0} && \
         printf secret | cryptsetup luksRemoveKey {volume} --key-file -",
        site.keys("line")
    ));
    let output = site.run(&import);
    assert!(output.status.success() && !String::from_utf8(output.stderr).unwrap().contains("newline"));
    fs::write(site.keys("line"), "secret").unwrap();
    site.fails(68, &import);
    sh(&format!(
        "printf 'secret\n' | cryptsetup luksAddKey --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file - {volume} {}",
        site.keys("line")
    ));
    // script(1) gives it a terminal of its own.
    let program = env!("CARGO_BIN_EXE_cryptattach");
    let asked = format!("{program} --config {} key import {volume}", site.keys("cryptattach.toml"));
    sh(&format!(
        "(sleep 1; echo secret; sleep 1) | script -qec '{asked}' /dev/null | grep -q '^passphrase of {volume}'"
    ));
    assert_eq!(site.ok(&["key", "list"]).lines().count(), 3);
}

#[test]
fn the_key_of_an_attached_volume_is_deleted_by_force_only() {
    let site = Site::new();
    let (volume, reference) = site.volume("v", &[]);
    let name = site.name("attached");
    site.attach(&volume, &name, &[]);
    let told = site.fails(75, &["key", "delete", &reference, "--yes"]);
    assert!(told.contains(&format!("is attached as '{name}'")), "{told}");
    site.ok(&["test", &volume]);
    site.ok(&["key", "delete", &reference, "--yes", "--force"]);
    site.ok(&["detach", &name]);
    let (_, damaged) = site.volume("w", &[]);
    fs::write(site.sealed(&damaged), "{}").unwrap();
    site.ok(&["key", "delete", &damaged, "--yes"]);
}

#[test]
fn two_configurations_with_one_state_and_a_store_of_one_name_are_told_which_file() {
    let site = Site::new();
    site.volume("v", &[]);
    let second = site.keys("second.toml");
    fs::write(second, "state = \"site-state\"\n[audit]\nfile = \"audit\"\n").unwrap();
    fs::rename(site.keys("cinder.owner.key"), site.keys("first.key")).unwrap();
    fs::rename(site.keys("cinder.owner.pem"), site.keys("first.pem")).unwrap();
    let escrow = site.keys("escrow.pem");
    site.ok(&["--config", second, "init", "--store", "cinder", "--path", site.keys("2"), "--escrow", escrow]);
    site.ok(&["--config", second, "format", &site.volume_file("w"), "--allow-shared"]);
    fs::rename(site.keys("first.key"), site.keys("cinder.owner.key")).unwrap();
    let told = site.fails(68, &["format", &site.volume_file("x")]);
    assert!(
        told.contains("containers/cinder") && told.contains("another configuration has a store 'cinder'"),
        "{told}"
    );
}

#[test]
fn a_host_is_seen_on_one_screen_and_a_store_that_is_gone_is_named() {
    let site = Site::new();
    let (volume, _) = site.volume("v", &[]);
    let name = site.name("seen");
    site.attach(&volume, &name, &[]);
    let told = site.ok(&["status"]);
    for part in [&name, "answers, in", "lockbox    none", "TPM latch  no key", "failures"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    fs::rename(site.keys("cinder"), site.keys("away")).unwrap();
    assert!(site.ok(&["status"]).contains("DOES NOT ANSWER: cannot open the key store"));
    let status = site.json(&["status"]);
    assert_eq!((&status["schema"], &status["stores"][0]["reachable"]), (&Value::from(1), &Value::from(false)));
    fs::rename(site.keys("away"), site.keys("cinder")).unwrap();
    site.ok(&["detach", &name]);
}

#[test]
fn a_look_at_a_host_does_not_wait_for_a_silent_store_as_an_attach_does() {
    let site = Site::new();
    // Nobody listens there.
    fs::write(
        site.keys("clouds.yaml"),
        "clouds: {gone: {auth: {auth_url: 'http://127.0.0.1:1/v3', username: a, password: b, project_name: c}}}",
    )
    .unwrap();
    let config = site.keys("cryptattach.toml");
    let store = "[stores.gone]\ntype = \"swift\"\ncloud = \"gone\"\nclouds = \"clouds.yaml\"\nowner = \"cinder.owner.pem\"\n\
                 no_escrow = true\nidentities = [\"cinder.owner.key\"]\n";
    fs::write(config, fs::read_to_string(config).unwrap() + store).unwrap();
    let output = site.run(&["status"]);
    let (told, warned) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(told.contains("answers, in") && told.contains("DOES NOT ANSWER: cannot look at"), "{told}");
    assert!(warned.contains("trying again for up to 5 s"), "{warned}");
}

#[test]
fn a_key_is_seen_by_its_volume_with_the_names_of_those_who_open_it() {
    let site = Site::new();
    let (volume, reference) = site.volume("v", &[]);
    let name = site.name("shown");
    site.attach(&volume, &name, &[]);
    // Nothing is opened for it.
    fs::rename(site.keys("cinder.owner.key"), site.keys("lost")).unwrap();
    let told = site.ok(&["key", "show", &volume]);
    for word in [reference.as_str(), &name] {
        assert_eq!(site.ok(&["key", "show", word]), told, "{word}");
    }
    for part in ["store        the directory", "owner   ", "escrow  ", "cinder.owner.pem", "cinder/kek/1"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let shown = site.json(&["container", "show"]);
    let names: Vec<_> = shown["opened_by"]["openers"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["owner", "escrow"]);
    let since = |shown: &Value| shown["opened_by"]["openers"][0]["since"].as_u64().unwrap();
    let first = since(&shown);
    fs::rename(site.keys("lost"), site.keys("cinder.owner.key")).unwrap();
    sh("sleep 1.1");
    site.ok(&["container", "rotate", "cinder"]);
    // The container key before still says so.
    let rotated = site.json(&["container", "show"]);
    assert_eq!((since(&rotated), &rotated["opened_by"]["container_key"]), (first, &Value::from("cinder/kek/2")));
    site.ok(&["detach", &name]);
    assert!(site.fails(65, &["key", "show", &site.volume_file("none")]).contains("no LUKS header"));
}

#[test]
fn whoever_names_what_is_not_there_is_told_what_to_do() {
    let site = Site::new();
    let (volume, key) = site.volume("v", &[]);
    let store = site.keys("nowhere");
    let missing = "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de";
    let none = &*format!("cinder/{missing}");
    let commands: &[(i32, &[&str])] = &[
        (66, &["attach", "none", "x"]),
        (66, &["attach", &volume, "x", "--header", "none"]),
        (67, &["attach", &volume, "x", "--key", none]),
        (65, &["attach", "/", "x"]),
        (78, &["attach", &volume, "x", "--config", "none"]),
        (66, &["audit", "verify", "none"]),
        (66, &["bind", "none"]),
        (66, &["boot", "--needs-network", "--crypttab", "none"]),
        (66, &["container", "restore", "cinder", "none"]),
        (66, &["container", "rehearse", "cinder", "--identity", site.keys("escrow.key"), "--backup", "none"]),
        (78, &["container", "rehearse", "cinder", "--identity", "none"]),
        (78, &["container", "show", "none"]),
        (66, &["detach", "none"]),
        (66, &["doctor", "--image", "none"]),
        (66, &["doctor", "--image", &volume, "--crypttab", "none"]),
        (66, &["encrypt", "none"]),
        (66, &["format", "none"]),
        (66, &["header", "backup", "none", "copy"]),
        (66, &["header", "restore", &volume, "none"]),
        (66, &["host", "admit", "none"]),
        (66, &["host", "join", "none"]),
        (66, &["host", "remove", "none"]),
        (78, &["init", "--store", "other", "--path", store, "--escrow", "none"]),
        (66, &["key", "erase", "none"]),
        (66, &["key", "import", &volume, "--key-file", "none"]),
        (78, &["key", "list", "--store", "none"]),
        (78, &["key", "move", &key, "--to", "none"]),
        (66, &["key", "rotate", "none"]),
        (66, &["key", "show", "none"]),
        (78, &["leaf", "pin", "none"]),
        (66, &["receipt", "verify", "none"]),
        (66, &["resize", "none"]),
        (66, &["separation", "none"]),
        (66, &["separation", &volume, "--connection-info", "none"]),
        (66, &["status", "none"]),
        (66, &["test", "none"]),
        (66, &["unbind", "none"]),
    ];
    let mute: Vec<_> =
        commands.iter().filter(|(code, words)| !site.fails(*code, words).contains("\n  next: ")).collect();
    assert!(mute.is_empty(), "{mute:?}");

    // A boot has one configuration, wherever this session's is.
    let told = sh(&format!(
        "unshare -m --propagation private sh -c 'mkdir -p /etc/cryptattach; mount -t tmpfs none /etc/cryptattach; {} test {volume} --as-boot' \
         2>&1 || true",
        env!("CARGO_BIN_EXE_cryptattach")
    ));
    assert!(told.contains("a boot has no configuration") && !told.contains("another one"), "{told}");
}

/// The machine of this test has one disk: its sysfs knows no other.
#[test]
fn a_store_on_the_only_disk_is_told_at_once() {
    let site = Site::new();
    let (store, config) = (site.path("store"), site.path("second.toml"));
    let told = sh(&format!(
        "set -e; link=$(readlink -f /sys/dev/block/$(findmnt -nvo MAJ:MIN -T {}))
         unshare -m --propagation private sh -ec '
             mount -t tmpfs none /sys/dev/block
             for disk in '$link' '${{link%/*}}'; do
                 [ ! -e $disk/dev ] || ln -s $disk /sys/dev/block/$(cat $disk/dev)
             done
             {} --config {} init --store second --path {} --escrow {} 2>&1'",
        site.path("").display(),
        env!("CARGO_BIN_EXE_cryptattach"),
        config.display(),
        store.display(),
        site.keys("escrow.pem")
    ));
    let ways = ["init --tpm-nv", "on another disk or a stick", "container create"];
    assert!(
        told.contains("the only disk of this machine (") && told.contains("'format' refuses each volume"),
        "{told}"
    );
    assert!(ways.iter().all(|way| told.contains(way)) && told.contains("store 'second' in"), "{told}");
}

#[test]
fn a_table_that_a_terminal_has_no_room_for_is_paragraphs() {
    let site = Site::new();
    let config = site.keys("cryptattach.toml");
    let at = |columns| {
        let command =
            format!("stty cols {columns}; {} --config {config} container show", env!("CARGO_BIN_EXE_cryptattach"));
        sh(&format!("script -qec '{command}' /dev/null </dev/null")).replace('\r', "")
    };
    let narrow = at(80);
    assert!(narrow.contains("  NAME              owner\n  SINCE (AT LEAST)  "), "{narrow}");
    assert!(at(400).contains("  NAME    SINCE (AT LEAST)  "), "{}", at(400));
}
