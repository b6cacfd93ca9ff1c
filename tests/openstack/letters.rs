//! What a host that joins and its administrator leave for each other in Swift, and who may read and change that.

use std::fs;

use crate::{
    Story,
    cloud::{Cloud, Site},
    lockbox::Open,
    shell::sh,
    swtpm::Swtpm,
};

pub const STORIES: &[Story] = &[("a_host_joins_through_swift_and_its_neighbour_does_not_in_its_name", through_swift)];

/// A host with a TPM, who uses the store as another user than the administrator.
struct Host {
    config: String,
    name: String,
    _swtpm: Swtpm,
    _open: Open,
}

impl Host {
    fn new(site: &Site<'_>, name: &str, user: &str) -> Self {
        let swtpm = Swtpm::start();
        for (pcr, digit) in [(4, '4'), (7, '7')] {
            swtpm.extend(pcr, digit);
        }
        let folder = site.path(name);
        fs::create_dir(&folder).unwrap();
        let config = folder.join("cryptattach.toml").into_os_string().into_string().unwrap();
        let name = site.name(name);
        let text = format!(
            "state = 'state'\n[audit]\nfile = 'audit'\n[stores.cinder]\ntype = 'swift'\ncontainer = '{}'\n\
             cloud = '{user}'\nclouds = '../clouds.yaml'\nowner = '../owner.pem'\nescrow = '../escrow.pem'\n\
             [lockbox]\nhost = '{name}'\nstore = 'cinder'\nidentities = ['tpm:host.tpm.pem']\npath = 'lockbox'\n\
             [tpm]\ntcti = '{}'\nidentity = 'host.tpm.pem'\nsignatures = []\nevent_log = 'log'\n",
            site.container("cinder"),
            swtpm.tcti()
        );
        fs::write(&config, text).unwrap();
        let open = Open(format!("cryptattach:lockbox:{name}"));
        Self { config, name, _swtpm: swtpm, _open: open }
    }

    /// Of one that has this name and user, with its own TPM.
    fn under(&self, name: &str, user: (&str, &str)) -> String {
        let text = fs::read_to_string(&self.config).unwrap();
        let text = text.replace(&self.name, name).replace(&format!("'{}'", user.0), &format!("'{}'", user.1));
        let config = self.config.replace("cryptattach.toml", "other.toml");
        fs::write(&config, text.replace("'state'", "'other-state'").replace("host.tpm.pem", "other.tpm.pem")).unwrap();
        config
    }
}

/// With another letter in the middle of a text.
fn changed(document: &str, pointer: &str) -> String {
    let mut document: serde_json::Value = serde_json::from_str(document).unwrap();
    let mut text = document.pointer(pointer).and_then(|text| text.as_str()).unwrap().to_owned();
    let middle = text.len() / 2;
    let other = if text.as_bytes()[middle] == b'A' { "B" } else { "A" };
    text.replace_range(middle..=middle, other);
    *document.pointer_mut(pointer).unwrap() = text.into();
    document.to_string()
}

fn through_swift(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.swift("cinder", "keys", "");
    // As docs/openstack.md has it: hosts are writers. The neighbour is one that only reads.
    let (writer, reader) = (cloud.acl("nova"), cloud.acl("glance"));
    site.ok(&["container", "create", "cinder", "--writer", &writer, "--reader", &reader]);
    let (host, neighbour) = (Host::new(&site, "compute-7", "nova"), Host::new(&site, "compute-8", "glance"));
    let join = |config: &str| [&["--config", config][..], &["host", "join", "--store", "cinder"]].concat().join(" ");
    let on = |command: &str| site.run(&command.split(' ').collect::<Vec<_>>());
    let ok = |command: &str| site.ok(&command.split(' ').collect::<Vec<_>>());
    let fails = |code, command: &str| site.fails(code, &command.split(' ').collect::<Vec<_>>());
    assert!(ok(&join(&host.config)).contains(&format!("host admit {}", host.name)));

    // The store lets the neighbour read, and leave no letter: neither its own nor one in the host's name.
    let posing = neighbour.under(&host.name, ("glance", "glance"));
    for config in [&neighbour.config, &posing] {
        let refused = fails(77, &join(config));
        assert!(refused.contains("this user may not"), "{refused}");
    }

    // Whoever writes there lies: what is no request under this name, or one with a letter changed.
    let url = |letter: &str| format!("{}/join/{}.{letter}", cloud.container_url(&site.container("cinder")), host.name);
    let token = cloud.token("cinder");
    let read = |letter: &str| sh(&format!("curl -sfH 'X-Auth-Token: {token}' {}", url(letter)));
    let write = |letter: &str, text: &str| {
        fs::write(site.path("letter"), text).unwrap();
        let file = site.path("letter");
        sh(&format!("curl -sfH 'X-Auth-Token: {token}' -T {} {}", file.display(), url(letter)));
    };
    let admit = format!("host admit {} --trust-first-use --trust-pcr-values", host.name);
    let request = read("request");
    write("request", "{}");
    assert!(fails(80, &admit).contains("does not say what it is"));
    write("request", &changed(&request, "/creation/signature"));
    let refused = fails(80, &admit);
    assert!(refused.contains("in the request of"), "{refused}");
    assert!(ok("host list").starts_with("no host is admitted"));
    // The host's own command puts it right.
    assert!(ok(&join(&host.config)).contains("request of"));
    assert_eq!(read("request"), request);

    let admitted = site.run(&admit.split(' ').collect::<Vec<_>>());
    assert!(admitted.status.success(), "{admitted:?}");
    let answer = read("answer");
    // The neighbour reads the answer, which is for another TPM; and to a writer in the host's name the TPM does not open it.
    fs::write(site.path("stolen.answer"), &answer).unwrap();
    let take = format!("--config {} host join {}", neighbour.config, site.path("stolen.answer").display());
    assert!(fails(80, &take).contains("this host is"));
    write("answer", &changed(&answer, "/credential"));
    let refused = fails(80, &join(&host.config));
    assert!(refused.contains("the answer"), "{refused}");
    assert!(!on(&format!("--config {} lockbox open", host.config)).status.success(), "nothing was taken");
    write("answer", &answer);
    assert!(ok(&join(&host.config)).contains("has joined"));
    ok(&format!("--config {} lockbox open", host.config));
    let listed = site.json(&["host", "list"]);
    assert_eq!(listed[0]["store_says"], "there", "{listed}");
    assert!(listed[0]["last_seen"].as_u64().is_some(), "{listed}");
}
