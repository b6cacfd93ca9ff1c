//! Another owner or escrow of a container: proven first, told what the former one still opens, and resumed after a kill.

use std::{fs, path::Path, process::Stdio};

use cryptattach::base::key::SealedKey;

use crate::{
    busy::wait_for_progress,
    site::{Site, sh},
};

/// A new key pair `NAME.key`, `NAME.pem`.
fn pair(site: &Site, name: &str) -> (&'static str, &'static str) {
    sh(&format!(
        "cd {} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {name}.key 2>/dev/null && \
         openssl pkey -in {name}.key -pubout -out {name}.pem",
        site.keys("")
    ));
    (site.keys(&format!("{name}.pem")), site.keys(&format!("{name}.key")))
}

fn config(site: &Site) -> String {
    fs::read_to_string(site.keys("cryptattach.toml")).unwrap()
}

/// The container key that a key is sealed under.
fn under(site: &Site, key: &str) -> String {
    site.json(&["key", "show", key])["recipients"][0]["kid"].as_str().unwrap().to_owned()
}

#[test]
fn a_new_owner_opens_what_comes_and_the_former_one_no_more() {
    let site = Site::new();
    let (volume, key) = site.volume("one", &[]);
    let ((public, private), (_, other)) = (pair(&site, "new"), pair(&site, "other"));
    let before = config(&site);
    let former = site.keys("cinder.owner.key");
    site.fails(64, &["container", "owner", "replace", "cinder", public]);
    let told = site.fails(68, &["container", "owner", "replace", "cinder", public, "--identity", other]);
    assert!(told.contains("does not open what is sealed to"), "{told}");
    let told = site.fails(68, &["container", "owner", "replace", "cinder", public, "--unproven"]);
    assert!(told.contains("this host would not open the next container key"), "{told}");
    assert_eq!((config(&site), under(&site, &key)), (before, "cinder/kek/1".to_owned()), "nothing was changed");

    let done = site.json(&["container", "owner", "replace", "cinder", public, "--identity", private]);
    assert_eq!((&done["proven"], &done["resealed"], &done["epoch"]), (&true.into(), &1.into(), &"2".into()));
    assert!(config(&site).contains(&format!("owner = \"{public}\"")), "{}", config(&site));
    assert_eq!(under(&site, &key), "cinder/kek/2");
    site.attaches(&volume);
    site.ok(&["container", "rehearse", "cinder", "--identity", private]);
    let told = site.fails(68, &["container", "rehearse", "cinder", "--identity", former]);
    assert!(told.contains("would lose 1 keys"), "{told}");
    // The former one is not needed here any more.
    fs::remove_file(former).unwrap();
    let text = config(&site).replace(&format!("\"{former}\", "), "");
    fs::write(site.keys("cryptattach.toml"), text).unwrap();
    site.attaches(&volume);
    assert!(site.path("keys").join("cinder/kek/1.jwe").exists());
    site.ok(&["container", "rotate", "cinder", "--keep-days", "0"]);
    assert!(!site.path("keys").join("cinder/kek/1.jwe").exists(), "what the former one opens is retired");
    site.attaches(&volume);
}

#[test]
fn a_new_escrow_is_proven_or_answered_for_and_stays_off_this_host() {
    let site = Site::new();
    let (volume, _) = site.volume("one", &[]);
    let (public, private) = pair(&site, "new");
    let told = site.ok(&["container", "escrow", "replace", "cinder", public, "--identity", private]);
    assert!(told.contains("still opened     by the former escrow"), "{told}");
    assert!(!config(&site).contains("new.key"), "{}", config(&site));
    site.ok(&["container", "rehearse", "cinder", "--identity", private]);
    site.fails(68, &["container", "rehearse", "cinder", "--identity", site.keys("escrow.key")]);
    let (public, _) = pair(&site, "third");
    let told = site.ok(&["container", "escrow", "replace", "cinder", public, "--unproven"]);
    assert!(told.contains("NOT PROVEN"), "{told}");
    site.attaches(&volume);

    let none = Site::bare();
    none.ok(&["init", "--store", "cinder", "--path", none.keys("cinder"), "--no-escrow"]);
    let told = none.fails(64, &["container", "escrow", "replace", "cinder", none.keys("escrow.pem"), "--unproven"]);
    assert!(told.contains("no_escrow"), "{told}");
}

#[test]
fn a_replacement_that_is_killed_goes_on_by_the_same_command() {
    let site = Site::new();
    let (volume, _) = site.volume("one", &[]);
    crate::backup::keys(&site, 30);
    let all = site.ok(&["key", "list"]);
    let store = site.path("keys").join("cinder");
    let is_under = |name: &Path, epoch: usize| {
        let sealed = SealedKey::from_json(&fs::read(name).unwrap()).unwrap();
        sealed.recipient_kids().any(|kid| kid == format!("cinder/kek/{epoch}"))
    };
    let (mut killed, mut latest) = (0, 1);
    for resealed in [0, 1, 10, 25] {
        let (public, private) = pair(&site, &format!("new{resealed}"));
        let arguments = ["container", "owner", "replace", "cinder", public, "--identity", private];
        let mut replace = site.command();
        let mut replace = replace.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let count = || {
            let keys = fs::read_dir(&store).unwrap().flatten().map(|entry| entry.path());
            let keys = keys.filter(|path| path.extension().is_some_and(|end| end == "jwe"));
            keys.filter(|path| path.exists() && is_under(path, latest + 1)).count()
        };
        let has_begun = || config(&site).contains(public);
        wait_for_progress(&mut replace, || has_begun() && count() >= resealed);
        replace.kill().unwrap();
        killed += usize::from(!replace.wait().unwrap().success());
        site.ok(&["test", &volume]);
        let done = site.json(&arguments);
        latest = done["epoch"].as_str().unwrap().parse().unwrap();
        site.ok(&["container", "rehearse", "cinder", "--identity", private]);
        assert_eq!(site.ok(&["key", "list"]), all, "no key is lost");
        site.attaches(&volume);
    }
    assert!(killed > 0);
}
