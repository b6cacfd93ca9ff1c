//! Every kind of store does the same: one suite for the directory, Swift and Barbican. The host layer has it for the TPM.

use cryptattach::{
    base::key::StoreName,
    config::Config,
    keys::store::{self, KeyStore},
};

use crate::{
    Story,
    cloud::{Cloud, Site},
    store_suite,
};

pub const STORIES: &[Story] = &[
    ("directory_conforms", |cloud| conforms(&Site::bare(cloud), "directory")),
    ("swift_conforms", |cloud| conforms(&Site::bare(cloud), "swift")),
    ("swift_with_an_application_credential_conforms", |cloud| conforms(&Site::bare(cloud), "robot")),
    ("swift_with_tempauth_conforms", |cloud| conforms(&Site::bare(cloud), "tempauth")),
    ("swift_with_versions_conforms_and_shreds", versions),
    ("barbican_conforms", |cloud| conforms(&Site::bare(cloud), "barbican")),
];

/// The library's store of that name in the site's configuration.
pub fn open(site: &Site<'_>, name: &str) -> Box<dyn KeyStore> {
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let name: StoreName = name.parse().unwrap();
    let store = config.store(&name).unwrap();
    store::open(&*store::kind(store).unwrap(), &name, store, None).unwrap()
}

fn conforms(site: &Site<'_>, kind: &str) {
    match kind {
        "directory" => {
            let path = site.path("keys");
            std::fs::create_dir(&path).unwrap();
            site.configure(&format!(
                "[stores.s]\ntype = \"directory\"\npath = \"{}\"\nowner = \"owner.pem\"\nno_escrow = true\n",
                path.display()
            ));
        }
        "barbican" => site.barbican("s", true),
        "robot" => site.swift("s", "robot", ""),
        "tempauth" => site.swift("s", "alone", ""),
        _ => site.swift("s", "keys", ""),
    }
    site.ok(&["container", "create", "s"]);
    let store = open(site, "s");
    store_suite::conforms(&site.path(""), &*store, kind != "barbican");
}

/// In a container that keeps old versions a deleted key must be gone in all of them.
fn versions(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.swift("s", "keys", "");
    site.ok(&["container", "create", "s"]);
    let (token, url) = (cloud.token("cinder"), cloud.container_url(&site.container("s")));
    let curl = |more: &str| crate::shell::sh(&format!("curl -sf -H 'X-Auth-Token: {token}' {more}"));
    curl(&format!("-X POST -H 'X-Versions-Enabled: true' {url}"));
    store_suite::suite(&site.path(""), &*open(&site, "s"));
    let left = curl(&format!("'{url}?versions&format=json'"));
    let left: Vec<serde_json::Value> = serde_json::from_str(&left).unwrap();
    let names: Vec<_> = left.iter().filter_map(|object| object["name"].as_str()).collect();
    assert_eq!(names, ["kek/1"], "nothing of the keys is left");
}
