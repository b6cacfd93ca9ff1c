//! docs/openstack.md, followed by its own commands: from nothing to the first attached volume, with the real `openstack`.

use std::{fs, path::PathBuf};

use serde_json::Value;

use crate::{
    Story,
    cloud::{Cloud, Site, with_input},
    page,
};

pub const STORIES: &[Story] = &[("the_operators_page_leads_to_an_attached_volume", followed)];

const PAGE: &str = include_str!("../../docs/openstack.md");

/// Whoever types what the page says, on one machine.
struct Person<'a> {
    site: &'a Site<'a>,
    folder: PathBuf,
}

impl Person<'_> {
    fn types(&self, script: &str) -> String {
        let path = format!(
            "{}:{}:{}",
            PathBuf::from(env!("CARGO_BIN_EXE_cryptattach")).parent().unwrap().display(),
            PathBuf::from(self.site.cloud.var("VENV")).join("bin").display(),
            std::env::var("PATH").unwrap()
        );
        let (clouds, config) = (self.folder.join("clouds.yaml"), self.folder.join("cryptattach.toml"));
        page::run(
            &self.folder,
            script,
            &[
                ("PATH", &path),
                ("OS_CLIENT_CONFIG_FILE", clouds.to_str().unwrap()),
                ("CRYPTATTACH_CONFIG", config.to_str().unwrap()),
            ],
        )
    }

    fn writes(&self, name: &str, text: &str) {
        fs::write(self.folder.join(name), text).unwrap();
    }

    fn reads(&self, name: &str) -> String {
        fs::read_to_string(self.folder.join(name)).unwrap()
    }
}

/// The page's clouds.yaml is the block's first part, up to its command.
fn clouds_yaml(cloud: &Cloud, block: &str) -> String {
    assert!(block.starts_with("clouds:\n"), "{block}");
    block.replace("https://keystone.example.org/v3", cloud.var("AUTH_URL"))
}

fn fingerprint(shown: &str) -> String {
    let line = shown.lines().find(|line| line.trim_start().starts_with("fingerprint "));
    line.unwrap_or_else(|| panic!("no fingerprint: {shown}")).to_owned()
}

fn followed(cloud: &Cloud) {
    let site = Site::bare(cloud);
    let person = |name: &str| {
        let folder = site.path(name);
        fs::create_dir(&folder).unwrap();
        Person { site: &site, folder }
    };
    let (operator, administrator, host) = (person("operator"), person("administrator"), person("host"));

    operator.writes(
        "clouds.yaml",
        &format!(
            "clouds:\n  admin:\n    region_name: RegionOne\n    auth: {{auth_url: \"{}\", username: admin, password: \"{}\", \
             project_name: admin, user_domain_id: default, project_domain_id: default}}\n",
            cloud.var("AUTH_URL"),
            cloud.var("PASSWORD_ADMIN")
        ),
    );
    let script = page::commands(PAGE, "## 1. Project, users, roles").replace("--password-prompt", "--password typed");
    let printed = operator.types(&format!("export OS_CLOUD=admin\n{script}"));
    let who = printed.lines().last().unwrap();
    let (project, _) = who.split_once(':').unwrap();

    let block = page::commands(PAGE, "## 2. Log-ins");
    let (yaml, check) = block.split_once("openstack ").unwrap();
    let yaml = clouds_yaml(cloud, yaml).replace("password: ...", "password: typed");
    for (person, yaml) in [(&administrator, yaml.replace("key-host", "key-admin")), (&host, yaml)] {
        person.writes("clouds.yaml", &yaml);
        assert_eq!(person.types(&format!("openstack {check}")).trim(), project);
    }

    let created = administrator.types(&page::commands(PAGE, "## 3. The container").replace("PROJECT:USER", who));
    assert!(created.contains(&format!("writers          {who}")), "{created}");

    for file in ["cinder.pem", "cinder.key", "escrow.pem"] {
        fs::copy(administrator.folder.join(file), host.folder.join(file)).unwrap();
    }
    let block = page::commands(PAGE, "## 4. The hosts");
    let (hooks, commands) = block.split_once("cryptattach ").unwrap();
    let [from, to] = [&administrator, &host].map(|person| person.folder.to_str().unwrap());
    let config = administrator.reads("cryptattach.toml").replace(from, to);
    // All servers are on this machine; the inventory says that they are four.
    let inventory = site.path("inventory.toml");
    host.writes(
        "cryptattach.toml",
        &format!(
            "state = \"state\"\n{config}{hooks}[audit]\nfile = \"audit\"\n[separation]\ninventory = \"{}\"\n",
            inventory.display()
        ),
    );
    // The volume is on a disk, the configuration in memory; other runs have names of their own.
    let disk = site.disk();
    let volume = disk.join("first.img").into_os_string().into_string().unwrap();
    let named = |commands: &str| {
        let commands = commands.replace("first.img", &volume);
        commands.replace(" first\n", &format!(" {}\n", site.name("first")))
    };
    let tried = host.types(&named(&format!("cryptattach {commands}")));
    assert_eq!(fingerprint(&tried), fingerprint(&created));

    // Keystone tells the hooks whose a request is.
    let creates = || {
        let token = cloud.token_of("demo", "demo");
        let request = format!(r#"{{"version":1,"algorithm":"AES","bit_length":512,"auth":{{"token":"{token}"}}}}"#);
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_cryptattach"));
        command.args(["hook", "key", "create"]).env("CRYPTATTACH_CONFIG", host.folder.join("cryptattach.toml"));
        let output = with_input(command.env("OS_CLIENT_CONFIG_FILE", host.folder.join("clouds.yaml")), &request);
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
    host.types(&named("cryptattach attach first.img first\ncryptattach detach first\n"));
    creates();
    let refused = host.types("! openstack --os-cloud keys container create other 2>&1");
    assert!(refused.contains("40"), "{refused}");
}
