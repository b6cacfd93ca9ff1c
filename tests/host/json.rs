//! docs/json.md: which members `--json` prints, and of which type, told from what the verbs do print.
//!
//! `UPDATE_DOCS=1` writes the page's tables anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use serde_json::Value;

use crate::{
    clevis, encrypt,
    enrol::stage::Stage,
    moving::with_vault,
    policy::Policies,
    site::{LoopDevice, Site, sh},
};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/json.md");
const BEGIN: &str = "<!-- members: begin -->\n";
const END: &str = "<!-- members: end -->\n";

/// What stands in these depends on the machine.
const OF_THE_MACHINE: [&str; 10] =
    ["devices", "tree", "swap", "evidence", "gaps", "not_compared", "fit", "pcrs", "values", "why_not"];

/// The outputs of each verb.
#[derive(Default)]
struct Seen(BTreeMap<String, Vec<Value>>);

/// A member: its types, and in how many of the objects that may have it it was.
#[derive(Default)]
struct Member {
    types: BTreeSet<&'static str>,
    times: usize,
}

impl Seen {
    fn note(&mut self, verb: &str, output: Value) -> Value {
        self.0.entry(verb.to_owned()).or_default().push(output.clone());
        output
    }

    /// A table for each verb.
    fn tables(&self) -> String {
        let table = |(verb, outputs): (&String, &Vec<Value>)| {
            let mut members = BTreeMap::new();
            outputs.iter().for_each(|output| collect(output, String::new(), &mut members));
            let row = |(path, member): (&String, &Member)| {
                let types = member.types.iter().copied().collect::<Vec<_>>().join(" or ");
                let parent = path.rsplit_once('.').map_or("", |(parent, _)| parent);
                let parents = members.get(parent).map_or(outputs.len(), |parent: &Member| parent.times);
                let maybe = if member.times < parents && !path.ends_with("[]") { ", or not there" } else { "" };
                let path = if path.is_empty() { "(all)" } else { path };
                format!("| `{path}` | {types}{maybe} |\n")
            };
            let is_told = |(path, member): &(&String, &Member)| !path.is_empty() || !member.types.contains("object");
            let rows: String = members.iter().filter(is_told).map(row).collect();
            format!("### `{verb}`\n\n| member | type |\n|---|---|\n{rows}\n")
        };
        self.0.iter().map(table).collect()
    }
}

fn collect(value: &Value, path: String, members: &mut BTreeMap<String, Member>) {
    let member = members.entry(path.clone()).or_default();
    member.times += 1;
    member.types.insert(match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "number",
        Value::String(_) => "text",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    });
    match value {
        _ if OF_THE_MACHINE.iter().any(|name| path.ends_with(name)) => {}
        Value::Array(values) => values.iter().for_each(|value| collect(value, format!("{path}[]"), members)),
        Value::Object(map) => {
            for (name, value) in map {
                let dot = if path.is_empty() { "" } else { "." };
                collect(value, format!("{path}{dot}{name}"), members);
            }
        }
        _ => {}
    }
}

/// Leaves, and volumes that other programs have made.
fn with_people(seen: &mut Seen) {
    let policies = Policies::new();
    let (site, tcti) = (&policies.site, &policies.tcti);
    let mut run = |verb: &str, arguments: &[&str]| {
        let words: Vec<&str> = verb.split(' ').chain(arguments.iter().copied()).collect();
        let output = site.command().args(&words).arg("--json").env("CRYPTATTACH_TCTI", tcti).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        seen.note(verb, serde_json::from_slice(&output.stdout).unwrap())
    };
    run("leaf pin", &["t1"]);
    let (passphrase, pass) = (site.keys("passphrase"), site.keys("pass"));
    fs::write(passphrase, "correct horse battery staple\n").unwrap();
    clevis::append(site, "[leaves.anna]\npassphrase = \"anna.json\"\n");
    run("leaf new", &["anna", "--answer", passphrase]);
    run("container policy", &["cinder", "any(owner, escrow, t1)"]);
    let volume = clevis::luks(site, "luks");
    let imported = run("key import", &[&volume, "--key-file", pass, "--token", "--allow-shared"]);
    run("key export", &[&policies.volume, "--clevis", "--allow-shared"]);
    run("key delete", &[imported["key"].as_str().unwrap(), "--yes"]);
}

/// What needs a TPM, here and elsewhere.
fn with_a_host(seen: &mut Seen) {
    let stage = Stage::new();
    stage.site_key("site.pem");
    let mut host = stage.host("compute-7");
    let signatures = host.file("signatures.json");
    fs::write(&signatures, "{}").unwrap();
    host.configure("site_key = '../site.pem'\n");
    let config = fs::read_to_string(host.file("cryptattach.toml")).unwrap();
    let config = config.replace("signatures = []", "signatures = ['signatures.json']");
    fs::write(host.file("cryptattach.toml"), config).unwrap();
    let (request, answer) = (host.file("request"), host.file("answer"));
    seen.note("host join", host.json(&["host", "join", "--output", &request]));
    let admit = ["host", "admit", &request, "--output", &answer, "--ca", stage.authority()];
    seen.note("host admit", stage.json(&admit));
    seen.note("host join", host.json(&["host", "join", &answer]));
    seen.note("host join", host.json(&["host", "join"]));
    seen.note("host list", stage.json(&["host", "list"]));
    seen.note("policy show", host.json(&["policy", "show"]));
    let key = stage.keys("site.key");
    let signed = host.json(&["policy", "sign", "--private-key", key, "--current", "4+7", "--epoch", "1"]);
    seen.note("policy sign", signed.clone());
    fs::write(signatures, signed.to_string()).unwrap();
    seen.note("policy show", host.json(&["policy", "show"]));
    seen.note("policy test", host.json(&["policy", "test"]));
    seen.note("lockbox status", host.json(&["lockbox", "status"]));
    seen.note("lockbox open", host.json(&["lockbox", "open"]));
    seen.note("lockbox open", host.json(&["lockbox", "open"]));
    seen.note("host list", stage.json(&["host", "list"]));
    let key = stage.volume_and_key("volume").1;
    seen.note("lockbox add", host.json(&["lockbox", "add", &key]));
    seen.note("lockbox status", host.json(&["lockbox", "status"]));
    seen.note("lockbox forget", host.json(&["lockbox", "forget", &key]));
    seen.note("lockbox close", host.json(&["lockbox", "close"]));
    host.reboots();
    seen.note("policy revoke-old", host.json(&["policy", "revoke-old"]));
    seen.note("policy latch", host.json(&["policy", "latch"]));
    seen.note("audit anchor", host.json(&["audit", "anchor"]));
    seen.note("audit anchor --to tpm", host.json(&["audit", "anchor", "--to", "tpm"]));
    seen.note("host remove", stage.json(&["host", "remove", host.name()]));
    seen.note("host list", stage.json(&["host", "list", "--removed"]));
}

fn with_a_plain_disk(seen: &mut Seen) {
    let filled = encrypt::plain(8, 0);
    seen.note("encrypt", filled.site.json(&["encrypt", &filled.volume]));
}

/// A boot prints nothing, and leaves its record.
fn with_a_boot(seen: &mut Seen) {
    let site = Site::new();
    let (volume, _) = site.volume("booted", &[]);
    let (disk, name) = (LoopDevice::new(volume.as_ref(), ""), site.name("booted"));
    let entries = format!("{name} {} none luks\nlate /dev/none none luks,nofail\n", disk.path());
    fs::write(site.keys("crypttab"), entries).unwrap();
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    fs::write(site.keys("booting.toml"), format!("{config}\n[boot]\ntotal_seconds = 5\n")).unwrap();
    let script = format!(
        "for own in /run/cryptattach /dev/disk/by-cryptattach; do mkdir -p $own; mount -t tmpfs -o mode=0755 none $own; done
        ca() {{ {} --config {} $*; }}
        ca boot --crypttab {} >&2 || true
        cat /run/cryptattach/boot.json; ca detach {name} >&2",
        env!("CARGO_BIN_EXE_cryptattach"),
        site.keys("booting.toml"),
        site.keys("crypttab"),
    );
    let record = sh(&format!("unshare -m --propagation private sh -euc '{script}'"));
    seen.note("/run/cryptattach/boot.json", serde_json::from_str(&record).unwrap());

    // lsinitramfs lists like cpio. An initramfs without anything in it is not fit, and says so beside the findings.
    let folder = site.path("image");
    let image = folder.join("image").display().to_string();
    fs::create_dir(&folder).unwrap();
    sh(&format!(
        "cd {} && mkdir etc && echo x >etc/x && find etc | cpio -o -H newc --quiet >image &&
         printf '#!/bin/sh\\nexec cpio -itv --quiet <%s\\n' {image} >lsinitramfs && chmod 755 lsinitramfs",
        folder.display()
    ));
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let doctor = ["doctor", "--image", &image, "--crypttab", site.keys("crypttab"), "--json"];
    let output = site.command().args(doctor).env("PATH", path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    seen.note("doctor", serde_json::from_slice(&output.stdout).expect(&said));
}

#[test]
fn the_page_has_each_member_that_is_printed_and_no_other() {
    let site = Site::bare();
    let mut seen = Seen::default();
    let name = site.name("json");
    let mut run = |verb: &str, arguments: &[&str]| {
        let words: Vec<&str> = verb.split(' ').chain(arguments.iter().copied()).collect();
        let mut output = site.json(&words);
        // Other tests run meanwhile.
        let mappings = if verb == "list" { Some(&mut output) } else { output.get_mut("volumes") };
        if let Some(Value::Array(mappings)) = mappings {
            mappings.retain(|mapping| mapping["name"] == name.as_str());
        }
        let of_one = if verb == "status" && !arguments.is_empty() { " NAME" } else { "" };
        seen.note(&format!("{verb}{of_one}"), output)
    };
    let init =
        |store: &'static str| ["--store", store, "--path", site.keys(store), "--escrow", site.keys("escrow.pem")];
    run("init", &init("cinder"));
    with_vault(&site);
    let (volume, moved, other) = (site.volume_file("v"), site.volume_file("moved"), site.volume_file("other"));
    let key = run("format", &[&volume])["key"].as_str().unwrap().to_owned();
    let second = run("format", &[&moved, "--keyslot"])["key"].as_str().unwrap().to_owned();
    let attach = [&volume, &*name, "--backend", "userspace"];
    run("attach", &attach);
    run("attach", &attach);
    run("list", &[]);
    run("status", &[]);
    run("status", &[&name]);
    run("resize", &[&name]);
    run("detach", &[&name]);
    run("attach", &[&volume, &name, "--export", "nbd", "--backend", "userspace"]);
    run("detach", &[&name]);
    run("separation", &[&volume]);
    run("test", &[&volume]);
    run("key list", &[]);
    run("key show", &[&key]);
    run("container create", &["vault"]);
    run("container show", &[]);
    run("container rotate", &["cinder"]);
    run("container show", &[]);
    run("container policy", &["cinder", "any(owner, escrow)"]);
    run("container rehearse", &["cinder", "--identity", site.keys("escrow.key")]);
    run("container backup", &["cinder", site.keys("backup")]);
    run("container restore", &["cinder", site.keys("backup")]);
    let header = site.path("header").display().to_string();
    run("header backup", &[&volume, &header]);
    run("header restore", &[&volume, &header]);
    run("key move", &[&second, "--to", "vault", "--volume", &moved]);
    run("key rotate", &["--passphrase", &moved]);
    run("key rotate", &[&volume]);
    let receipt = site.path("receipt").display().to_string();
    run("key erase", &[&moved, "--yes", "--receipt", &receipt]);
    run("receipt verify", &[&receipt]);
    run("receipt key", &[]);
    run("audit verify", &[]);
    fs::rename(site.keys("cinder"), site.keys("away")).unwrap();
    let failed = site.run(&["attach", &volume, "--json"]);
    // The log is there, too.
    let last = |text: &[u8]| serde_json::from_str(String::from_utf8_lossy(text).lines().last().unwrap()).unwrap();
    let failure: Value = last(&failed.stderr);
    run("status", &[]);
    run("explain", &[&volume]);
    fs::rename(site.keys("away"), site.keys("cinder")).unwrap();
    seen.note("(a failure)", failure);
    let usage = site.run(&["attach", &other, "--json", "--nonsense"]);
    seen.note("(a failure)", last(&usage.stderr));
    with_people(&mut seen);
    with_a_host(&mut seen);
    with_a_plain_disk(&mut seen);
    with_a_boot(&mut seen);

    let page = fs::read_to_string(PAGE).unwrap();
    let (before, rest) = page.split_once(BEGIN).unwrap();
    let (written, after) = rest.split_once(END).unwrap();
    let tables = seen.tables();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(PAGE, format!("{before}{BEGIN}{tables}{END}{after}")).unwrap();
    } else {
        assert!(written == tables, "docs/json.md differs; UPDATE_DOCS=1 writes it anew:\n{tables}");
    }
    let schema = site.json(&["status"])["schema"].as_u64().unwrap();
    assert!(before.contains(&format!("version {schema} ")), "{before}");
}
