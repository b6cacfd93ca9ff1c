//! docs/json.md: which members `--json` prints, and of which type, told from what the verbs do print.
//!
//! `UPDATE_DOCS=1` writes the page's tables anew.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use serde_json::Value;

use crate::{moving::with_vault, site::Site};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/json.md");
const BEGIN: &str = "<!-- members: begin -->\n";
const END: &str = "<!-- members: end -->\n";

/// What stands in these depends on the machine.
const OF_THE_MACHINE: [&str; 7] = ["devices", "tree", "swap", "evidence", "gaps", "not_compared", "fit"];

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
