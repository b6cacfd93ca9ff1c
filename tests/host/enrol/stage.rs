//! An administrator, who has the owner's key and no TPM, and hosts, which have TPMs and nothing else.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};

use cryptattach::{config::TpmConfig, sys::kernel_keyring};
use serde_json::Value;

use crate::{
    site::{Site, sh},
    swtpm::Swtpm,
};

/// The administrator's machine, with a store `cinder` and an authority that certifies TPMs.
pub struct Stage {
    pub site: Site,
}

/// A host and its TPM; its files are in a folder of its own.
pub struct Host<'s> {
    pub swtpm: Swtpm,
    stage: &'s Stage,
    name: String,
    folder: PathBuf,
}

impl Stage {
    pub fn new() -> Self {
        let site = Site::new();
        site.ok(&["container", "create", "cinder"]);
        fs::create_dir(site.keys("authority")).unwrap();
        Self { site }
    }

    /// A host with a TPM that the authority has certified.
    pub fn host(&self, name: &str) -> Host<'_> {
        self.host_with(name, Swtpm::certified(Path::new(self.authority())))
    }

    /// A host with a TPM that nobody has certified.
    pub fn bare_host(&self, name: &str) -> Host<'_> {
        self.host_with(name, Swtpm::start())
    }

    /// A certified host that has asked to join.
    pub fn asking_host(&self, name: &str) -> Host<'_> {
        let host = self.host(name);
        host.asks();
        host
    }

    pub fn host_with(&self, name: &str, swtpm: Swtpm) -> Host<'_> {
        let folder = PathBuf::from(
            self.site.keys(&format!("host-{name}-{}", fs::read_dir(self.site.keys("")).unwrap().count())),
        );
        fs::create_dir(&folder).unwrap();
        let host = Host { swtpm, stage: self, name: self.site.name(name), folder };
        host.boot();
        host.configure("");
        host
    }

    /// A new key for signatures over boot states, which the administrator's configuration has from now on.
    pub fn site_key(&self, name: &str) {
        sh(&format!(
            "cd {} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out site.key 2>/dev/null && \
             openssl pkey -in site.key -pubout -out {name}",
            self.site.keys("")
        ));
        self.configure(&format!("site_key = '{name}'"));
    }

    /// Lines of the administrator's `[tpm]`.
    pub fn configure(&self, lines: &str) {
        let config = self.site.keys("cryptattach.toml");
        let text = fs::read_to_string(config).unwrap();
        fs::write(config, format!("{}\n[tpm]\n{lines}\n", text.split("\n[tpm]").next().unwrap())).unwrap();
    }

    pub fn keys(&self, name: &str) -> &'static str {
        self.site.keys(name)
    }

    pub fn authority(&self) -> &'static str {
        self.site.keys("authority")
    }

    pub fn ok(&self, arguments: &[&str]) -> String {
        self.site.ok(arguments)
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.site.run(arguments)
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        self.site.json(arguments)
    }

    #[track_caller]
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        self.site.fails(code, arguments)
    }

    /// With the authority's certificates and the values of PCRs that the host has now.
    pub fn admit(&self, host: &Host<'_>) -> String {
        self.with_admission(host, &["--ca", self.authority()], |arguments| self.ok(arguments))
    }

    /// One that is admitted already.
    pub fn admit_again(&self, host: &Host<'_>) -> String {
        self.with_admission(host, &["--ca", self.authority(), "--replace"], |arguments| self.ok(arguments))
    }

    /// Refuses the host's request with 80; standard error. Nothing is written.
    #[track_caller]
    pub fn refuses(&self, host: &Host<'_>, trust: &[&str]) -> String {
        let refused = self.with_admission(host, trust, |arguments| self.fails(80, arguments));
        assert!(!Path::new(&host.file("answer")).exists());
        refused
    }

    /// Refuses a request of the host's, although its endorsement key is believed in.
    #[track_caller]
    pub fn refuses_part(&self, host: &Host<'_>, part: &str, why: &str) {
        let refused = self.refuses(host, &["--ca", self.authority()]);
        assert!(
            refused.contains(&format!("the {part} in the request of")) && refused.contains(why),
            "not: {part}: {why}"
        );
    }

    /// Does not admit again who is admitted.
    #[track_caller]
    pub fn with_existing(&self, host: &Host<'_>) -> String {
        self.with_admission(host, &["--ca", self.authority()], |arguments| self.fails(73, arguments))
    }

    pub fn run_admission(&self, host: &Host<'_>, trust: &[&str]) -> Output {
        self.with_admission(host, trust, |arguments| self.site.run(arguments))
    }

    #[track_caller]
    fn with_admission<T>(&self, host: &Host<'_>, trust: &[&str], run: impl FnOnce(&[&str]) -> T) -> T {
        let _ = fs::remove_file(host.file("answer"));
        let (request, output, values) = (host.file("request"), host.file("answer"), host.pcr_values());
        run(&[&["host", "admit", &request, "--output", &output, "--pcr-values", &values], trust].concat())
    }

    /// The host asks, is admitted and takes the answer.
    pub fn enrols(&self, host: &Host<'_>) {
        host.asks();
        self.admit(host);
        host.takes();
    }

    /// A new volume of the administrator's.
    pub fn volume(&self, name: &str) -> String {
        self.volume_and_key(name).0
    }

    /// One, with its key's reference.
    pub fn volume_and_key(&self, name: &str) -> (String, String) {
        self.site.volume(name, &[])
    }
}

impl Host<'_> {
    /// What every boot of these machines measures.
    fn boot(&self) {
        self.swtpm.extend(4, '4');
        self.swtpm.extend(7, '7');
    }

    /// Its configuration, with these lines in `[tpm]`.
    pub fn configure(&self, lines: &str) {
        let keys = self.stage.site.keys("");
        let text = format!(
            "state = 'state'\n[audit]\nfile = 'audit'\n[stores.cinder]\ntype = 'directory'\npath = '{keys}cinder'\n\
             owner = '{keys}cinder.owner.pem'\nescrow = '{keys}cinder.escrow.pem'\n\
             [lockbox]\nhost = '{}'\nstore = 'cinder'\nidentities = ['tpm:host.tpm.pem']\npath = 'lockbox'\n\
             [tpm]\ntcti = '{}'\nidentity = 'host.tpm.pem'\nsignatures = []\nevent_log = 'log'\n{lines}",
            self.name,
            self.swtpm.tcti()
        );
        fs::write(self.file("cryptattach.toml"), text).unwrap();
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn file(&self, name: &str) -> String {
        self.folder.join(name).into_os_string().into_string().unwrap()
    }

    pub fn tpm_config(&self) -> TpmConfig {
        cryptattach::config::Config::read(self.file("cryptattach.toml").as_ref()).unwrap().tpm
    }

    fn with_config<'a>(&self, arguments: &[&'a str]) -> Vec<&'a str> {
        if arguments.contains(&"--config") {
            return arguments.to_vec();
        }
        [&["--config", Box::leak(self.file("cryptattach.toml").into_boxed_str())], arguments].concat()
    }

    pub fn ok(&self, arguments: &[&str]) -> String {
        self.stage.site.ok(&self.with_config(arguments))
    }

    pub fn json(&self, arguments: &[&str]) -> Value {
        self.stage.site.json(&self.with_config(arguments))
    }

    #[track_caller]
    pub fn fails(&self, code: i32, arguments: &[&str]) -> String {
        self.stage.site.fails(code, &self.with_config(arguments))
    }

    /// Its request is made.
    pub fn asks(&self) -> String {
        let _ = fs::remove_file(self.file("request"));
        let said = self.ok(&["host", "join", "--output", &self.file("request")]);
        assert!(self.swtpm.leftovers().is_empty(), "left in the TPM: {}", self.swtpm.leftovers());
        said
    }

    /// Likewise, with a new key.
    pub fn asks_again(&self) {
        let _ = fs::remove_file(self.file("request"));
        self.ok(&["host", "join", "--replace", "--output", &self.file("request")]);
    }

    /// What it says on standard error with `-v`, of a command that succeeds.
    #[track_caller]
    pub fn says(&self, arguments: &[&str]) -> String {
        let output = self.stage.site.run(&self.with_config(&[arguments, &["-v"]].concat()));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{arguments:?}: {said}");
        said
    }

    /// A configuration of this name: the host's own, with another way to the TPM.
    pub fn by_tcti(&self, name: &str, tcti: &str) -> String {
        let text = fs::read_to_string(self.file("cryptattach.toml")).unwrap();
        fs::write(self.file(name), text.replace(&self.swtpm.tcti(), tcti)).unwrap();
        self.file(name)
    }

    /// A configuration by which the TPM is not latched.
    pub fn unlatched(&self) -> String {
        let text = fs::read_to_string(self.file("cryptattach.toml")).unwrap();
        fs::write(self.file("unlatched.toml"), format!("{text}\nlatch = false\n")).unwrap();
        self.file("unlatched.toml")
    }

    /// Off and on again: PCRs, keyring, entries in memory.
    pub fn reboots(&mut self) {
        kernel_keyring::remove(&self.description()).unwrap();
        self.swtpm.reboot();
        self.boot();
    }

    pub fn takes(&self) -> String {
        let said = self.ok(&["host", "join", &self.file("answer")]);
        assert!(self.swtpm.leftovers().is_empty(), "left in the TPM: {}", self.swtpm.leftovers());
        said
    }

    #[track_caller]
    pub fn does_not_take(&self, code: i32) -> String {
        self.fails(code, &["host", "join", &self.file("answer")])
    }

    /// The present values of its PCRs, in a file.
    pub fn pcr_values(&self) -> String {
        let path = self.file("pcrs.json");
        let shown = self.json(&["policy", "show"]);
        fs::write(&path, shown["pcrs"].to_string()).unwrap();
        path
    }

    /// A document of this host's, edited.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
        edit(self.file(name).as_ref(), change);
    }

    /// A configuration `thief.toml` for another host's name and key file.
    pub fn copy_key_of(&self, victim: &Host<'_>) {
        fs::copy(victim.file("host.tpm.pem"), self.file("stolen.tpm.pem")).unwrap();
        let text = fs::read_to_string(self.file("cryptattach.toml")).unwrap();
        let text = text.replace(self.name(), victim.name()).replace("host.tpm.pem", "stolen.tpm.pem");
        // The victim's keyring is not this machine's.
        kernel_keyring::remove(&victim.description()).unwrap();
        fs::write(self.file("thief.toml"), text).unwrap();
    }

    fn description(&self) -> String {
        format!("cryptattach:lockbox:{}", self.name)
    }

    pub fn has_lockbox_key(&self) -> bool {
        kernel_keyring::remove(&self.description()).unwrap()
    }

    /// A new volume, formatted on the host.
    pub fn volume(&self, name: &str) -> String {
        let path = self.stage.site.file(name, 64 << 20).into_os_string().into_string().unwrap();
        self.ok(&["format", &path]);
        path
    }

    /// A name for a mapping.
    pub fn mapping(&self) -> String {
        self.stage.site.name("v")
    }

    pub fn attaches(&self, volume: &str) {
        let name = self.mapping();
        self.ok(&["attach", volume, &name, "--backend", "userspace"]);
        self.ok(&["detach", &name]);
    }

    #[track_caller]
    pub fn does_not_attach(&self, volume: &str) {
        let refused = self.fails(68, &["attach", volume, &self.mapping(), "--backend", "userspace"]);
        assert!(refused.contains("is refused"), "{refused}");
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        let _ = kernel_keyring::remove(&self.description());
    }
}

/// Edits a JSON file.
pub fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let before = value.clone();
    change(&mut value);
    assert_ne!(value, before, "the edit changes something");
    fs::write(path, value.to_string()).unwrap();
}
