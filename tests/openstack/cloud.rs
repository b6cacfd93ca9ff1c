//! The servers, and a site that uses them: a configuration, owner and escrow keys, volumes.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::shell::{detach_all, sh};

const SERVERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openstack/servers");

/// Running servers; they end with the value.
pub struct Cloud {
    state: TempDir,
    variables: BTreeMap<String, String>,
}

/// A host that uses the cloud: files in memory, volumes on disk; all of it goes with the value.
pub struct Site<'a> {
    pub cloud: &'a Cloud,
    number: u32,
    memory: TempDir,
    disk: TempDir,
}

impl Cloud {
    pub fn up() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the openstack layer needs root: run scripts/test openstack");
        Self::up_in(tempfile::Builder::new().prefix("cryptattach-os").tempdir_in("/var/tmp").unwrap())
    }

    /// With that folder for all that the servers write.
    pub fn up_in(state: TempDir) -> Self {
        let mut cloud = Self { state, variables: BTreeMap::new() };
        let file = cloud.servers("up");
        let text = fs::read_to_string(file).unwrap();
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        cloud.variables = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        cloud
    }

    fn servers(&self, command: &str) -> String {
        sh(&format!("CRYPTATTACH_OS_STATE={} {SERVERS}/{command}", self.state.path().display()))
    }

    /// Ends servers: "object1 object2".
    pub fn stop(&self, servers: &str) {
        self.servers(&format!("down {servers}"));
    }

    /// Starts what does not run and wakes what sleeps.
    pub fn repair(&self) {
        for server in ["keystone", "object1", "object2", "object3", "proxy", "barbican"] {
            self.signal(server, "CONT");
        }
        self.servers("up");
    }

    /// Sends a signal to a server and all its processes.
    pub fn signal(&self, server: &str, signal: &str) {
        let pid = fs::read_to_string(self.state.path().join(format!("run/{server}.pid"))).unwrap_or_default();
        if let Some(pid) = pid.split(' ').next().filter(|pid| !pid.is_empty()) {
            let _ = Command::new("kill").args([&format!("-{signal}"), "--", &format!("-{pid}")]).status();
        }
    }

    /// The processor time that a server has taken, by its main process.
    pub fn processor_time(&self, server: &str) -> Duration {
        let pid = fs::read_to_string(self.state.path().join(format!("run/{server}.pid"))).unwrap();
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.split(' ').next().unwrap())).unwrap();
        // proc_pid_stat(5): what follows the name begins with field 3; utime and stime are 14 and 15, in ticks of 10 ms.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        Duration::from_millis(fields[11..13].iter().map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum())
    }

    /// A line of the servers' env file.
    #[track_caller]
    pub fn var(&self, name: &str) -> &str {
        self.variables.get(name).unwrap_or_else(|| panic!("the servers have no {name}"))
    }

    pub fn variables(&self) -> &BTreeMap<String, String> {
        &self.variables
    }

    /// Runs the ring builder in Swift's directory and has the proxy read what it made.
    pub fn move_ring_device(&self, device: &str, address: &str) {
        let (state, venv) = (self.var("STATE"), self.var("VENV"));
        sh(&format!("cd {state}/swift && {venv}/bin/python {SERVERS}/rings.py move {device} {address}"));
        self.stop("proxy");
        self.repair();
    }

    /// A token of a user of project `keys`.
    pub fn token(&self, user: &str) -> String {
        self.token_of(user, "keys")
    }

    /// A token of a user on a project.
    pub fn token_of(&self, user: &str, project: &str) -> String {
        let password = self.var(&format!("PASSWORD_{}", user.to_uppercase()));
        let body = format!(
            r#"{{"auth": {{"identity": {{"methods": ["password"], "password": {{"user": {{"name": "{user}", "domain": {{"id": "default"}}, "password": "{password}"}}}}}}, "scope": {{"project": {{"name": "{project}", "domain": {{"id": "default"}}}}}}}}}}"#
        );
        let url = self.var("AUTH_URL");
        let headers = sh(&format!(
            "curl -sf -D - -o /dev/null -H 'Content-Type: application/json' {url}/auth/tokens -d '{body}'"
        ));
        let token = headers.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("x-subject-token").then(|| value.trim().to_owned())
        });
        token.expect("Keystone gives a token")
    }

    /// `PROJECT:USER` as Swift's access lists want it.
    pub fn acl(&self, user: &str) -> String {
        format!("{}:{}", self.var("PROJECT_ID_KEYS"), self.var(&format!("USER_ID_{}", user.to_uppercase())))
    }

    /// The container's URL.
    pub fn container_url(&self, container: &str) -> String {
        format!("{}/v1/AUTH_{}/{container}", self.var("SWIFT_URL"), self.var("PROJECT_ID_KEYS"))
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        for server in ["keystone", "object1", "object2", "object3", "proxy", "barbican"] {
            self.signal(server, "CONT");
        }
        self.servers("down --purge");
    }
}

impl<'a> Site<'a> {
    /// Without any store; clouds.yaml has `keys` (cinder), `nova`, `glance`, `verifier` (glance in `service`), `robot` (application credential), `alone` (TempAuth),
    /// `tls` and `wrong-tls`.
    pub fn bare(cloud: &'a Cloud) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let folder = |place| tempfile::Builder::new().prefix("cryptattach-os-test").tempdir_in(place).unwrap();
        let (memory, disk) = (folder("/dev/shm"), folder("/var/tmp"));
        let site = Self { cloud, number: NUMBER.fetch_add(1, Ordering::Relaxed), memory, disk };
        sh(&format!(
            "cd {} && for n in owner escrow; do
               openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out $n.key 2>/dev/null
               openssl pkey -in $n.key -pubout -out $n.pem; done",
            site.memory.path().display()
        ));
        site.write("clouds.yaml", &site.clouds());
        site.write("inventory.toml", INVENTORY);
        let folder = site.memory.path().display();
        site.write(
            "cryptattach.toml",
            &format!(
                "state = \"{folder}/state\"\n[audit]\nfile = \"{folder}/audit\"\n\
                 [separation]\ninventory = \"inventory.toml\"\n[hooks]\n{ONE_TENANT}\n"
            ),
        );
        site
    }

    /// With a container `cinder` of its own and its container key.
    pub fn new(cloud: &'a Cloud) -> Self {
        let site = Self::bare(cloud);
        site.swift("cinder", "keys", "");
        site.ok(&["container", "create", "cinder"]);
        site
    }

    /// With a store `keys` of that kind, "swift" or "barbican" without sealing.
    pub fn of_kind(cloud: &'a Cloud, kind: &str) -> Self {
        let site = Self::bare(cloud);
        if kind == "swift" {
            site.swift("keys", "keys", "");
            site.ok(&["container", "create", "keys"]);
        } else {
            site.barbican("keys", false);
        }
        site
    }

    fn clouds(&self) -> String {
        let var = |name: &str| self.cloud.var(name).to_owned();
        let password = |user: &str, url: &str| {
            format!(
                "auth: {{auth_url: \"{url}\", username: {user}, password: \"{}\", project_name: keys, \
                 user_domain_id: default, project_domain_id: default}}",
                var(&format!("PASSWORD_{}", user.to_uppercase()))
            )
        };
        let url = var("AUTH_URL");
        let mut text = "clouds:\n".to_owned();
        for (name, user) in [("keys", "cinder"), ("nova", "nova"), ("glance", "glance")] {
            text += &format!("  {name}:\n    region_name: RegionOne\n    {}\n", password(user, &url));
        }
        // Of the project "service", where it has the role that may verify tokens.
        text += &format!("  verifier:\n    {}\n", password("glance", &url).replace("name: keys", "name: service"));
        for (name, url) in [("tls", var("TLS_AUTH_URL")), ("wrong-tls", var("WRONG_TLS_AUTH_URL"))] {
            text += &format!("  {name}:\n    cacert: {}\n    {}\n", var("CA_FILE"), password("cinder", &url));
        }
        text += &format!(
            "  robot:\n    auth_type: v3applicationcredential\n    auth: {{auth_url: \"{url}\", \
             application_credential_id: \"{}\", application_credential_secret: \"{}\"}}\n",
            var("APP_CREDENTIAL_ID"),
            var("APP_CREDENTIAL_SECRET")
        );
        text + &format!(
            "  alone:\n    auth_type: v1password\n    auth: {{auth_url: \"{}/auth/v1.0\", username: \"keys:cinder\", \
             password: \"{}\"}}\n",
            var("TEMPAUTH_URL"),
            var("PASSWORD_CINDER")
        )
    }

    /// Configures a store in Swift; its container is this site's own.
    pub fn swift(&self, name: &str, cloud: &str, more: &str) {
        let container = self.container(name);
        self.configure(&format!(
            "[stores.{name}]\ntype = \"swift\"\ncontainer = \"{container}\"\ncloud = \"{cloud}\"\n\
             clouds = \"clouds.yaml\"\n{SEALING}{more}\n"
        ));
    }

    /// Configures Barbican: keys sealed by us, or kept by it as they are.
    pub fn barbican(&self, name: &str, sealed: bool) {
        let sealing = if sealed { SEALING } else { "" };
        let container = self.container(name);
        self.configure(&format!(
            "[stores.{name}]\ntype = \"barbican\"\ncontainer = \"{container}\"\ncloud = \"keys\"\nclouds = \"clouds.yaml\"\n{sealing}\n"
        ));
    }

    /// Has the hooks tell projects apart: Keystone says whose a token is.
    pub fn many_tenants(&self) {
        self.hooks("keystone = { cloud = \"verifier\", clouds = \"clouds.yaml\" }");
    }

    /// `[hooks]`, in place of what says that there is one tenant.
    pub fn hooks(&self, members: &str) {
        let path = self.path("cryptattach.toml");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(ONE_TENANT));
        fs::write(path, text.replace(ONE_TENANT, members)).unwrap();
    }

    /// The container of a store of that name.
    pub fn container(&self, name: &str) -> String {
        format!("{name}-{}", self.number)
    }

    pub fn configure(&self, section: &str) {
        let path = self.path("cryptattach.toml");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, format!("{text}{section}\n")).unwrap();
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    /// A file in memory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.memory.path().join(name)
    }

    /// The folder on disk.
    pub fn disk(&self) -> PathBuf {
        self.disk.path().to_owned()
    }

    /// A new sparse file on disk.
    pub fn file(&self, name: &str) -> String {
        let path = self.disk.path().join(name);
        fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        path.into_os_string().into_string().unwrap()
    }

    /// A mapping name that no other site uses.
    pub fn name(&self, name: &str) -> String {
        format!("cat-os-{}-{}-{name}", std::process::id(), self.number)
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cryptattach"));
        command.env("CRYPTATTACH_CONFIG", self.path("cryptattach.toml"));
        command.env("OS_CLIENT_CONFIG_FILE", self.path("clouds.yaml"));
        command
    }

    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Output {
        self.command().args(arguments).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs it, expects success, returns standard output without its last newline.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// Runs it, expects this exit code, returns standard error; prints it, and how long it took.
    #[track_caller]
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let (text, _) = self.fails_within(code, Duration::from_secs(40), arguments);
        text
    }

    /// As [`Self::fails`], and not later than that.
    #[track_caller]
    pub fn fails_within(&self, code: i32, limit: Duration, arguments: &[&str]) -> (String, Duration) {
        let start = Instant::now();
        let output = self.run(arguments);
        let took = start.elapsed();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        assert!(took < limit, "{arguments:?} took {took:?}: {text}");
        println!("$ cryptattach {}\n{text}  -> {code} after {took:.1?}\n", arguments.join(" "));
        (text, took)
    }

    /// Attaches, detaches again: the volume's key can be had.
    #[track_caller]
    pub fn attaches(&self, volume: &str) {
        let name = self.name("once");
        self.ok(&["attach", volume, &name, "--backend", "userspace"]);
        self.ok(&["detach", &name]);
    }

    /// A program with this site's configuration in its environment.
    pub fn environment(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.env("CRYPTATTACH", env!("CARGO_BIN_EXE_cryptattach"));
        command.env("CRYPTATTACH_CONFIG", self.path("cryptattach.toml"));
        command.env("OS_CLIENT_CONFIG_FILE", self.path("clouds.yaml"));
        command
    }
}

/// What most stories need: they are about other things than who may use which key.
const ONE_TENANT: &str = "tenants = \"one\"";

/// No store is without a choice of escrow.
pub const SEALING: &str = "owner = \"owner.pem\"\nescrow = \"escrow.pem\"\nidentities = [\"owner.key\"]\n";

/// Every storage address of the test's Swift is of this machine; as hosts of a site they are different ones.
pub const INVENTORY: &str = r#"
[[host]]
name = "controller"
addresses = ["127.0.0.10"]
[[host]]
name = "storage1"
addresses = ["127.0.0.11"]
[[host]]
name = "storage2"
addresses = ["127.0.0.12"]
[[host]]
name = "storage3"
addresses = ["127.0.0.13"]
[[host]]
name = "storage4"
addresses = ["127.0.0.14"]
"#;

impl Drop for Site<'_> {
    fn drop(&mut self) {
        detach_all(&self.name(""), |arguments| self.run(arguments));
    }
}

/// Runs a command with this on its standard input.
pub fn with_input(command: &mut Command, input: &str) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}
