//! Keys go between Swift, Barbican and OpenBao, strict volumes' and those of volumes with a keyslot; and the target goes away in
//! the middle.

use std::{
    fs,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    Story,
    bao::BaoServer,
    cloud::{Cloud, SEALING, Site},
    shell::sh,
};

pub const STORIES: &[Story] = &[
    ("keys_move_from_swift_to_barbican_to_openbao_and_back", around),
    ("a_move_whose_target_goes_away_is_told_and_gone_on_with", away),
];

/// So that an outage ends soon.
const SHORT: &str = "[network]\ntotal_seconds = 4\n";

/// A site with all three, and volumes with their keys in Swift that the configuration names: each second one has a keyslot.
/// With what is in Barbican, whose project is shared with other stories.
fn site<'a>(cloud: &'a Cloud, bao: &BaoServer, count: usize) -> (Site<'a>, Vec<String>, String) {
    let site = Site::new(cloud);
    site.configure(SHORT);
    site.barbican("barbican", true);
    // OpenBao is on this machine.
    let text = fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    site.write("cryptattach.toml", &text.replace("[separation]\n", "[separation]\nlevel = \"device\"\n"));
    for file in ["ca.pem", "role_id", "secret_id"] {
        fs::copy(bao.path(file), site.path(file)).unwrap();
    }
    site.configure(&format!(
        "[servers.main]\nbao = ['{}']\nca = 'ca.pem'\napprole = {{ role_id = 'role_id', secret_id = 'secret_id' }}\n\
         [stores.vault]\ntype = 'bao'\nserver = 'main'\npath = 'kv/cryptattach/keys'\n{SEALING}",
        bao.url
    ));
    for store in ["barbican", "vault"] {
        site.ok(&["container", "create", store]);
    }
    let make = |number: usize| {
        let path = site.file(&format!("v{number}"));
        let keyslot: &[&str] = if number % 2 == 1 { &["--keyslot"] } else { &[] };
        site.ok(&[&["format", &path, "--store", "cinder"], keyslot].concat());
        site.configure(&format!("[volumes.v{number}]\ndevice = \"{path}\"\n"));
        path
    };
    let volumes = (0..count).map(make).collect();
    let others = site.ok(&["key", "list", "--store", "barbican"]);
    (site, volumes, others)
}

/// The key that the header names.
pub fn named(volume: &str) -> String {
    let token: Value = serde_json::from_str(&sh(&format!("cryptsetup token export --token-id 0 {volume}"))).unwrap();
    format!("{}/{}", token["store"].as_str().unwrap(), token["key"].as_str().unwrap())
}

fn around(cloud: &Cloud) {
    let bao = BaoServer::start();
    let (site, volumes, others) = site(cloud, &bao, 4);
    let passphrases: Vec<_> =
        [1, 3].map(|number: usize| site.ok(&["key", "passphrase", "--for", &volumes[number]])).into();
    for (from, to) in [("cinder", "barbican"), ("barbican", "vault"), ("vault", "cinder")] {
        // A strict one and one with a keyslot by name, the others with their container.
        for volume in &volumes[..2] {
            let old = named(volume);
            assert!(old.starts_with(from), "{old}");
            site.ok(&["key", "move", &old, "--to", to]);
            site.fails(67, &["key", "show", &old]);
        }
        let report = site.json(&["key", "move", "--container", from, "--to", to]);
        assert_eq!(report["moved"].as_array().unwrap().len(), 2, "{report}");
        is_emptied(&site, from, &others);
        for volume in &volumes {
            assert!(named(volume).starts_with(to));
            site.attaches(volume);
        }
        for (volume, passphrase) in [1, 3].map(|number: usize| &volumes[number]).into_iter().zip(&passphrases) {
            assert_eq!(site.ok(&["key", "passphrase", "--for", volume]), *passphrase);
        }
    }
}

fn away(cloud: &Cloud) {
    let bao = BaoServer::start();
    let (site, volumes, others) = site(cloud, &bao, 8);
    // From the beginning: nothing is changed.
    cloud.signal("barbican", "STOP");
    let told = site.fails(69, &["key", "move", &named(&volumes[0]), "--to", "barbican"]);
    assert!(told.contains("did not answer within"), "{told}");
    cloud.repair();
    volumes.iter().for_each(|volume| assert!(named(volume).starts_with("cinder")));
    // In the middle, once some headers name the new place.
    type Step<'a> = &'a dyn Fn();
    let legs: [(&str, &str, Step<'_>, Step<'_>); 3] = [
        ("cinder", "barbican", &|| cloud.signal("barbican", "STOP"), &|| cloud.repair()),
        ("barbican", "vault", &|| bao.seal(), &|| bao.unseal()),
        ("vault", "cinder", &|| cloud.signal("proxy", "STOP"), &|| cloud.repair()),
    ];
    for (from, to, goes, comes) in legs {
        let move_all = ["key", "move", "--container", from, "--to", to];
        let mut command = site.command();
        let said = fs::File::create(site.path("said")).unwrap();
        let mut run = command.args(move_all).args(["--json"]).stdout(Stdio::null()).stderr(said).spawn().unwrap();
        let moved = || volumes.iter().filter(|volume| named(volume).starts_with(to)).count();
        wait_until(&mut run, &|| moved() > 0);
        goes();
        let code = run.wait().unwrap().code().unwrap();
        comes();
        let told = fs::read_to_string(site.path("said")).unwrap();
        println!("{from} -> {to}: {code}, {} of {} have moved\n{told}", moved(), volumes.len());
        // The run may have been faster. Else each key that has failed is told at once, with its reason, and the next step.
        let failed = told.lines().filter(|line| line.contains(r#""is":"failed""#)).count();
        assert!(
            code == 0 || code == 69 && failed > 0 && told.contains("go on: cryptattach key move"),
            "{code}: {told}"
        );
        // Each volume attaches by what its header names, whether its move has ended or not.
        volumes.iter().for_each(|volume| site.attaches(volume));
        site.ok(&move_all);
        assert_eq!(moved(), volumes.len());
        is_emptied(&site, from, &others);
        volumes.iter().for_each(|volume| site.attaches(volume));
    }
}

/// Swift may list a key for a while that is not there any more.
fn is_emptied(site: &Site, store: &str, others: &str) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let listed = site.ok(&["key", "list", "--store", store]);
        if listed.lines().all(|key| others.lines().any(|other| other == key)) {
            return;
        }
        assert!(Instant::now() < deadline, "{store}: {listed}");
        thread::sleep(Duration::from_millis(200));
    }
}

fn wait_until(run: &mut Child, is_so: &dyn Fn() -> bool) {
    while run.try_wait().unwrap().is_none() && !is_so() {
        thread::sleep(Duration::from_millis(10));
    }
}
