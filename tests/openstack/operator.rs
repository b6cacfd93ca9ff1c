//! Whoever types what docs/openstack.md says, on one machine: from nothing to a host that attaches volumes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{cloud::Cloud, page};

pub const PAGE: &str = include_str!("../../docs/openstack.md");

/// A reader of the page, with a folder for `/etc/cryptattach` and `/etc/openstack`.
pub struct Person {
    pub folder: PathBuf,
    path: String,
}

/// Whom the page's first four steps leave behind, and what they have printed.
pub struct Hosts {
    pub operator: Person,
    pub host: Person,
    /// The id of the project with the keys.
    pub project: String,
}

impl Person {
    fn new(cloud: &Cloud, folder: PathBuf) -> Self {
        fs::create_dir(&folder).unwrap();
        let path = format!(
            "{}:{}:{}",
            Path::new(env!("CARGO_BIN_EXE_cryptattach")).parent().unwrap().display(),
            Path::new(cloud.var("VENV")).join("bin").display(),
            std::env::var("PATH").unwrap()
        );
        Self { folder, path }
    }

    pub fn types(&self, script: &str) -> String {
        let (clouds, config) = (self.clouds(), self.config());
        let environment = [
            ("PATH", self.path.as_str()),
            ("OS_CLIENT_CONFIG_FILE", clouds.to_str().unwrap()),
            ("CRYPTATTACH_CONFIG", config.to_str().unwrap()),
        ];
        page::run(&self.folder, script, &environment)
    }

    pub fn config(&self) -> PathBuf {
        self.folder.join("cryptattach.toml")
    }

    pub fn clouds(&self) -> PathBuf {
        self.folder.join("clouds.yaml")
    }

    pub fn writes(&self, name: &str, text: &str) {
        fs::write(self.folder.join(name), text).unwrap();
    }
}

/// The page's clouds.yaml is the block's first part, up to its command.
pub fn clouds_yaml(cloud: &Cloud, block: &str) -> String {
    assert!(block.starts_with("clouds:\n"), "{block}");
    block.replace("https://keystone.example.org/v3", cloud.var("AUTH_URL"))
}

/// The commands about the page's first volume, for one of another file and name.
pub fn named(commands: &str, file: &Path, name: &str) -> String {
    let commands = commands.replace("first.img", file.to_str().unwrap());
    commands.replace(" first\n", &format!(" {name}\n"))
}

/// Steps 1 to 4, in a folder in memory; the volume that the host tries is this file on a disk, attached by this name.
pub fn hosts(cloud: &Cloud, folder: &Path, inventory: &Path, file: &Path, name: &str) -> Hosts {
    let person = |name: &str| Person::new(cloud, folder.join(name));
    let (operator, administrator, host) = (person("operator"), person("administrator"), person("host"));

    let entry = |user: &str| {
        format!(
            "  {user}:\n    region_name: RegionOne\n    auth: {{auth_url: \"{}\", username: {user}, password: \"{}\", \
             project_name: {user}, user_domain_id: default, project_domain_id: default}}\n",
            cloud.var("AUTH_URL"),
            cloud.var(&format!("PASSWORD_{}", user.to_uppercase()))
        )
    };
    operator.writes("clouds.yaml", &format!("clouds:\n{}{}", entry("admin"), entry("demo")));
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
    let config = fs::read_to_string(administrator.config()).unwrap().replace(from, to);
    // All servers are on this machine; the inventory says that they are several.
    host.writes(
        "cryptattach.toml",
        &format!(
            "state = \"state\"\n{config}{hooks}[audit]\nfile = \"audit\"\n[separation]\ninventory = \"{}\"\n",
            inventory.display()
        ),
    );
    let tried = host.types(&named(&format!("cryptattach {commands}"), file, name));
    assert_eq!(fingerprint(&tried), fingerprint(&created));
    Hosts { operator, host, project: project.to_owned() }
}

fn fingerprint(shown: &str) -> String {
    let line = shown.lines().find(|line| line.trim_start().starts_with("fingerprint "));
    line.unwrap_or_else(|| panic!("no fingerprint: {shown}")).to_owned()
}
