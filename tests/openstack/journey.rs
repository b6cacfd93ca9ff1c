//! docs/openstack.md, followed by its own commands: from nothing to the first attached volume, with the real `openstack`.

use serde_json::Value;

use crate::{
    Story,
    cloud::{Cloud, Site, with_input},
    operator::{self, PAGE, clouds_yaml},
    page,
};

pub const STORIES: &[Story] = &[("the_operators_page_leads_to_an_attached_volume", followed)];

fn followed(cloud: &Cloud) {
    let site = Site::bare(cloud);
    // The volume is on a disk, the configuration in memory; other runs have names of their own.
    let (volume, name) = (site.disk().join("first.img"), site.name("first"));
    let followed = operator::hosts(cloud, &site.path(""), &site.path("inventory.toml"), &volume, &name);
    let (host, project) = (followed.host, followed.project.as_str());

    // Keystone tells the hooks whose a request is.
    let creates = || {
        let token = cloud.token_of("demo", "demo");
        let request = format!(r#"{{"version":1,"algorithm":"AES","bit_length":512,"auth":{{"token":"{token}"}}}}"#);
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cryptattach"));
        command.args(["hook", "key", "create"]).env("CRYPTATTACH_CONFIG", host.config());
        let output = with_input(command.env("OS_CLIENT_CONFIG_FILE", host.clouds()), &request);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    creates();

    // The same with what the application credential lets it do, and no more.
    let block = page::commands(PAGE, "### An application credential");
    let (rules, rest) = block.split_once("openstack ").unwrap();
    let (create, yaml) = rest.split_once('\n').unwrap();
    host.writes("rules.json", &rules.replace("PROJECT", project));
    let made: Value = serde_json::from_str(&host.types(&format!("openstack {create} -f json"))).unwrap();
    // Releases of the client differ in how they write a column's name.
    let column = |name: &str| {
        let members = made.as_object().unwrap();
        let (_, value) = members.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).unwrap();
        value.as_str().unwrap().to_owned()
    };
    let yaml = clouds_yaml(cloud, yaml);
    let yaml = yaml.replace("credential_id: ...", &format!("credential_id: {}", column("id")));
    host.writes("clouds.yaml", &yaml.replace("secret: ...", &format!("secret: {}", column("secret"))));
    host.types(&operator::named("cryptattach attach first.img first\ncryptattach detach first\n", &volume, &name));
    creates();
    let refused = host.types("! openstack --os-cloud keys container create other 2>&1");
    assert!(refused.contains("40"), "{refused}");
}
