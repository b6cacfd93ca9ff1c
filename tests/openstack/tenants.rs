//! Two projects, and neither reaches the other's keys: by the hooks, by castellan, by os-brick, in each kind of store.

use serde_json::{Value, json};

use crate::{
    Story,
    cloud::{Cloud, Site},
    hooks::{python, tells},
    keys::{hook, run_hook},
    shell::{LoopDevice, sh},
};

pub const STORIES: &[Story] = &[
    ("projects_do_not_meet_in_a_directory", |cloud| apart(&Site::in_store(cloud, "directory"), 67)),
    ("projects_do_not_meet_in_swift", |cloud| apart(&Site::in_store(cloud, "swift"), 67)),
    ("projects_do_not_meet_in_swift_as_the_caller", |cloud| apart(&Site::in_store(cloud, "swift-caller"), 77)),
    ("projects_do_not_meet_in_barbican", |cloud| apart(&Site::in_store(cloud, "barbican"), 77)),
    ("projects_do_not_meet_in_castellan_and_os_brick_with_a_directory", |cloud| through_python(cloud, "directory")),
    ("projects_do_not_meet_in_castellan_and_os_brick_with_swift", |cloud| through_python(cloud, "swift")),
    ("projects_do_not_meet_in_castellan_and_os_brick_with_swift_as_the_caller", |cloud| {
        through_python(cloud, "swift-caller");
    }),
    ("projects_do_not_meet_in_castellan_and_os_brick_with_barbican", |cloud| through_python(cloud, "barbican")),
    ("castellans_copies_and_transfers_before_the_first_attach_end_no_volume_with_swift", |cloud| {
        copies(cloud, "swift");
    }),
    ("castellans_copies_and_transfers_before_the_first_attach_end_no_volume_with_barbican", |cloud| {
        copies(cloud, "barbican");
    }),
    ("a_token_is_what_keystone_says_it_is", verified),
    ("an_admin_and_a_service_act_for_the_project_that_a_key_has", roles),
    ("a_store_that_cannot_tell_projects_apart_serves_no_hooks", not_served),
];

impl<'a> Site<'a> {
    /// With a store `keys` of that kind, whose hooks tell projects apart.
    fn in_store(cloud: &'a Cloud, kind: &str) -> Self {
        let site = Self::bare(cloud);
        match kind {
            "directory" => {
                site.directory();
                site.many_tenants();
            }
            "swift" => {
                site.swift("keys", "keys", "");
                site.many_tenants();
            }
            "swift-caller" => {
                // The container of project `keys`, whoever asks.
                let account = cloud.container_url("");
                let more = format!("caller_token = true\nurls = [\"{}\"]", account.trim_end_matches('/'));
                site.swift("keys", "keys", &more);
                site.hooks("");
            }
            _ => {
                site.barbican("keys", false);
                site.hooks("");
            }
        }
        if kind != "barbican" {
            site.ok(&["container", "create", "keys"]);
        }
        site
    }

    fn directory(&self) {
        let path = self.path("keys");
        self.configure(&format!(
            "[stores.keys]\ntype = \"directory\"\npath = \"{}\"\nowner = \"owner.pem\"\nno_escrow = true\n\
             identities = [\"owner.key\"]\n",
            path.display()
        ));
    }
}

/// Who asks.
struct Who {
    token: String,
    project: String,
}

impl Who {
    fn of(cloud: &Cloud, user: &str, project: &str) -> Self {
        let id = cloud.var(&format!("PROJECT_ID_{}", project.to_uppercase()));
        Self { token: cloud.token_of(user, project), project: id.to_owned() }
    }

    fn request(&self, mut members: Value) -> String {
        members["version"] = 1.into();
        members["auth"] = json!({"token": self.token, "project_id": self.project});
        members.to_string()
    }

    fn creates(&self, site: &Site<'_>) -> String {
        let key = hook(site, "key create", &self.request(json!({"algorithm": "AES", "bit_length": 256})));
        key["key_id"].as_str().unwrap().to_owned()
    }

    fn lists(&self, site: &Site<'_>) -> Vec<String> {
        let listed = hook(site, "key list", &self.request(json!({"metadata_only": true})));
        let ids = listed["keys"].as_array().unwrap().iter();
        ids.map(|key| key["key_id"].as_str().unwrap().to_owned()).collect()
    }
}

/// The exit code, and what was said.
fn asks(site: &Site<'_>, who: &Who, verb: &str, members: Value) -> (i32, String) {
    let output = run_hook(site, verb, &who.request(members));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn apart(site: &Site<'_>, refusal: i32) {
    let cloud = site.cloud;
    let (a, b) = (Who::of(cloud, "cinder", "keys"), Who::of(cloud, "demo", "demo"));
    let (key, unused) = (a.creates(site), a.creates(site));
    let (volume, blank) = (site.file("volume"), site.file("blank"));
    let name = site.name("a");
    let attach = |volume: &str, key: &str| json!({"device": volume, "link": null, "name": name, "key_id": key});
    hook(site, "attach", &a.request(attach(&volume, &key)));
    let refused = |verb: &str, members: Value| {
        let (code, text) = asks(site, &b, verb, members);
        println!("{verb}: {code} {text}");
        assert_eq!(code, refusal, "{verb}: {text}");
        assert!(!text.contains(&a.project), "it says whose it is: {text}");
    };
    for id in [&key, &unused] {
        refused("key get", json!({"key_id": id}));
        refused("key get", json!({"key_id": id, "metadata_only": true}));
        refused("key delete", json!({"key_id": id}));
        // While it is attached, and a device that is not.
        refused("attach", attach(&volume, id));
        refused("attach", attach(&blank, id));
        refused("extend", attach(&volume, id));
    }
    assert_eq!(sh(&format!("tr -d '\\0' <{blank} | head -c 1 | wc -c")).trim(), "0", "it was formatted");
    if refusal == 67 {
        let (_, of_others) = asks(site, &b, "key get", json!({"key_id": unused}));
        let (_, of_nobody) = asks(site, &b, "key get", json!({"key_id": "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"}));
        assert_eq!(of_others.replace(&unused, "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"), of_nobody);
        let own = b.creates(site);
        assert_eq!(b.lists(site), std::slice::from_ref(&own), "its own and no other");
        hook(site, "key delete", &b.request(json!({"key_id": own})));
    } else {
        let output = run_hook(site, "key list", &b.request(json!({})));
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(!text.contains(&key) && !text.contains(&unused), "{text}");
    }
    // All is as it was for the one whose keys they are.
    assert!(a.lists(site).contains(&unused));
    assert_eq!(hook(site, "key get", &a.request(json!({"key_id": unused, "metadata_only": true})))["fresh"], true);
    hook(site, "attach", &a.request(attach(&volume, &key)));
    hook(site, "detach", &a.request(json!({"name": name})));
    hook(site, "attach", &a.request(attach(&volume, &key)));
    hook(site, "detach", &a.request(json!({"name": name})));
    for id in [&key, &unused] {
        hook(site, "key delete", &a.request(json!({"key_id": id})));
    }
}

fn through_python(cloud: &Cloud, kind: &str) {
    two_projects(cloud, kind, "tenants.py");
}

fn copies(cloud: &Cloud, kind: &str) {
    two_projects(cloud, kind, "copies.py");
}

fn two_projects(cloud: &Cloud, kind: &str, script: &str) {
    let site = Site::in_store(cloud, kind);
    let (file, blank) = (site.file("volume"), site.file("blank"));
    let (device, blank) = (LoopDevice::new(file.as_ref(), ""), LoopDevice::new(blank.as_ref(), ""));
    let mut command = python(&site, script);
    command.env("DEVICE", device.path()).env("BLANK", blank.path()).env("NAME", site.name("p"));
    command.env("OTHER_TOKEN", cloud.token_of("demo", "demo")).env("PROJECT_ID_DEMO", cloud.var("PROJECT_ID_DEMO"));
    println!("{}", tells(command));
}

fn verified(cloud: &Cloud) {
    let site = Site::in_store(cloud, "directory");
    let a = Who::of(cloud, "cinder", "keys");
    let key = a.creates(&site);
    let get = |who: &Who, says: &str| {
        let (code, text) = asks(&site, who, "key get", json!({"key_id": key}));
        assert!(code == 77 && text.contains(says), "{code}: {text}");
        assert!(!text.contains(&who.token), "{text}");
    };
    let project = a.project.clone();
    get(&Who { token: "forged".to_owned(), project: project.clone() }, "refuses the caller's token");
    let b = Who::of(cloud, "demo", "demo");
    get(&Who { token: b.token, project }, "belongs to project");
    let output = run_hook(&site, "key get", &json!({"version": 1, "key_id": key}).to_string());
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(77) && text.contains("auth.token"), "{text}");
    // Who verifies has to be allowed to.
    let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    site.write("cryptattach.toml", &text.replace("\"verifier\"", "\"nova\""));
    let (code, text) = asks(&site, &a, "key get", json!({"key_id": key}));
    assert!(code == 78 && text.contains("does not let this user verify tokens"), "{code}: {text}");
    let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    site.write(
        "cryptattach.toml",
        &format!("{}\n[network]\ntotal_seconds = 2\n", text.replace("\"nova\"", "\"verifier\"")),
    );
    cloud.stop("keystone");
    let (code, text) = asks(&site, &a, "key get", json!({"key_id": key}));
    cloud.repair();
    assert!(code == 69 && text.contains("cannot connect"), "{code}: {text}");
}

fn roles(cloud: &Cloud) {
    let site = Site::in_store(cloud, "directory");
    let a = Who::of(cloud, "cinder", "keys");
    let key = a.creates(&site);
    let service = Who { project: a.project.clone(), ..Who::of(cloud, "nova", "service") };
    let asked = json!({"key_id": key});
    hook(&site, "key get", &service.request(asked.clone()));
    // What it makes for the project is the project's.
    let made = service.creates(&site);
    hook(&site, "key get", &a.request(json!({"key_id": made})));
    let audit = std::fs::read_to_string(site.path("audit")).unwrap();
    assert!(audit.contains("\"role\":\"service\"") && audit.contains(cloud.var("USER_ID_NOVA")), "{audit}");
    let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    site.write("cryptattach.toml", &text.replace("[hooks]\n", "[hooks]\nservice_roles = []\n"));
    assert_eq!(asks(&site, &Who::of(cloud, "nova", "service"), "key get", asked).0, 67);
}

fn not_served(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.directory();
    site.hooks("");
    site.ok(&["container", "create", "keys"]);
    let a = Who::of(cloud, "cinder", "keys");
    for verb in ["key create", "key list", "key get", "key delete", "attach", "extend"] {
        let (code, text) = asks(&site, &a, verb, json!({"key_id": "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"}));
        assert!(code == 78 && text.contains("tenants = \"one\""), "{verb}: {code} {text}");
    }
}
