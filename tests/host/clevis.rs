//! Coming from clevis and going back: Debian's clevis and jose, real Tang servers, a TPM.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use base64ct::{Base64UrlUnpadded, Encoding};
use serde_json::{Value, json};

use crate::{
    page,
    site::{Site, sh},
    tangd::Tangd,
    tpm::Host,
    tpm_attach,
};

const NO_TPM: &str = "device:/dev/none";
const LIMITS: &str = "[network]\nconnect_seconds = 8.0\ntry_seconds = 8.0\ntotal_seconds = 8.0\n";

/// What clevis is told of a server.
pub fn pin(tang: &Tangd) -> Value {
    let advertised = sh(&format!("curl -sf {}/adv", tang.url));
    json!({"url": tang.url, "adv": serde_json::from_str::<Value>(&advertised).unwrap()})
}

/// A volume that cryptsetup has made, whose passphrase is in `pass`.
pub fn luks(site: &Site, name: &str) -> String {
    let (pass, volume) = (site.keys("pass"), site.file(name, 64 << 20).into_os_string().into_string().unwrap());
    fs::write(pass, "a passphrase").unwrap();
    // With room for a large token.
    let fast = "--type luks2 --luks2-metadata-size 1m --pbkdf pbkdf2 --pbkdf-force-iterations 1000";
    sh(&format!("cryptsetup luksFormat -q {fast} --key-file {pass} {volume}"));
    volume
}

/// The same, bound by clevis: keyslot 1.
pub fn bound(site: &Site, name: &str, tcti: &str, pin: &str, config: &Value) -> String {
    let volume = luks(site, name);
    let file = site.path("pin.json");
    fs::write(&file, config.to_string()).unwrap();
    sh(&format!(
        "export TPM2TOOLS_TCTI={tcti}; clevis luks bind -y -k {} -d {volume} {pin} \"$(cat {})\"",
        site.keys("pass"),
        file.display()
    ));
    volume
}

/// What clevis opens the volume with.
pub fn pass(volume: &str, keyslot: u32) -> String {
    sh(&format!("clevis luks pass -d {volume} -s {keyslot}"))
}

pub fn append(site: &Site, text: &str) {
    let config = site.keys("cryptattach.toml");
    fs::write(config, fs::read_to_string(config).unwrap() + text).unwrap();
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn tangs<const N: usize>() -> [Tangd; N] {
    std::array::from_fn(|_| Tangd::start())
}

#[test]
fn what_clevis_has_bound_is_taken_over_and_clevis_goes_on_to_open_it() {
    let tangs: [Tangd; 3] = tangs();
    let pins: Vec<_> = tangs.iter().map(pin).collect();
    let nested = json!({"t": 1, "pins": {"sss": [{"t": 2, "pins": {"tang": pins[1..]}}], "tang": pins[0]}});
    for (name, kind, config, policy) in [
        ("tang", "tang", pins[0].clone(), "any(escrow, t1)"),
        ("sss", "sss", json!({"t": 2, "pins": {"tang": pins}}), "any(escrow, 2 of (t1, t2, t3))"),
        ("nested", "sss", nested, "any(escrow, all(t1, t2), t3)"),
    ] {
        let site = Site::new();
        append(&site, LIMITS);
        let volume = bound(&site, name, NO_TPM, kind, &config);
        let header = fs::read(&volume).unwrap();

        // Nothing opens it unasked.
        let asked: Vec<_> = tangs.iter().map(Tangd::asked).collect();
        for verb in [&["test", &volume][..], &["attach", &volume, "x", "--backend", "userspace"]] {
            let told = site.fails(67, verb);
            assert!(told.contains("clevis opens it with") && told.contains(&tangs[0].url), "{told}");
            assert!(told.contains(&format!("cryptattach key import {volume} --token")), "{told}");
        }
        assert_eq!(tangs.iter().map(Tangd::asked).collect::<Vec<_>>(), asked);
        assert!(site.ok(&["explain", &volume]).contains("clevis opens it with"));

        let ours = site.command().args(["key", "passphrase", "--clevis", "--for", &volume]).output().unwrap();
        assert_eq!(String::from_utf8(ours.stdout).unwrap(), pass(&volume, 1));
        if kind == "tang" {
            assert_eq!(by_hand(&volume), pass(&volume, 1));
        }
        let lines = site.ok(&["key", "import", &volume, "--print-policy"]);
        println!("{lines}");
        assert_eq!(fs::read(&volume).unwrap(), header, "nothing is changed");

        let reference = site.ok(&["key", "import", &volume, "--token", "--allow-shared"]);
        assert_eq!(site.json(&["test", &volume, "--allow-shared"])["key"], reference);
        let before = pass(&volume, 1);

        // The lines are the configuration with which the container opens as clevis does.
        append(&site, &lines);
        let command = lines.lines().find_map(|line| line.strip_prefix("# then: cryptattach ")).unwrap();
        assert!(command.ends_with(&format!("'{policy}'")), "{command}");
        site.ok(&["container", "policy", "cinder", policy]);
        append_identities(&site, "[]");
        let tested = site.json(&["test", &volume, "--allow-shared"]);
        assert_eq!(tested["policy"]["said"], "opened", "{tested}");
        assert_eq!(pass(&volume, 1), before);
        // What is there already keeps its name.
        let again = site.ok(&["key", "import", &volume, "--print-policy"]);
        assert_eq!(again, format!("# then: {}", command_line(policy)), "{again}");
    }
}

/// By the commands of docs/clevis.md, as they stand there.
fn by_hand(volume: &str) -> String {
    let script = page::commands(include_str!("../../docs/clevis.md"), "## By hand");
    page::run("/".as_ref(), &script, &[("DEVICE", volume)])
}

fn command_line(policy: &str) -> String {
    format!("cryptattach container policy cinder '{policy}'")
}

/// Replaces the identities of the store: nothing but its policy opens it.
fn append_identities(site: &Site, identities: &str) {
    let config = site.keys("cryptattach.toml");
    let text = fs::read_to_string(config).unwrap();
    let lines = text.lines().map(|line| match line.starts_with("identities") {
        true => format!("identities = {identities}\n"),
        false => format!("{line}\n"),
    });
    fs::write(config, lines.collect::<String>()).unwrap();
}

#[test]
fn a_server_that_is_silent_or_down_delays_nobody_as_long_as_enough_answer() {
    let [one, two] = tangs();
    let (silent, listener) = silent();
    let site = Site::new();
    append(&site, LIMITS);
    let mut third = pin(&two);
    third["url"] = json!(silent);
    let config = json!({"t": 2, "pins": {"tang": [pin(&one), pin(&two), third]}});
    let volume = bound(&site, "volume", NO_TPM, "sss", &config);
    let open = || {
        let started = Instant::now();
        let output = site.command().args(["key", "passphrase", "--clevis", "--for", &volume]).output().unwrap();
        (started.elapsed(), output)
    };
    let (took, output) = open();
    assert!(output.status.success() && took < Duration::from_secs(7), "{took:?} {}", said(&output));
    two.set_up(false);
    let (took, output) = open();
    let told = said(&output);
    println!("{told}");
    assert_eq!(output.status.code(), Some(69), "{told}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    assert!(told.contains("2 of 3") && told.contains("(opened)") && told.contains("did not answer within"), "{told}");
    assert!(told.contains("--key-file FILE"), "{told}");
    drop(listener);
}

/// A server that takes connections and says nothing.
fn silent() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (format!("http://{}", listener.local_addr().unwrap()), listener)
}

#[test]
fn pins_that_are_not_ours_are_opened_by_clevis() {
    let host = Host::new();
    let tcti = host.swtpm.tcti();
    let [tang] = tangs();
    let site = Site::new();
    append(&site, LIMITS);
    let config = json!({"t": 2, "pins": {"tang": pin(&tang), "tpm2": {"pcr_bank": "sha256", "pcr_ids": "7"}}});
    let volume = bound(&site, "tpm2", &tcti, "sss", &config);
    let passphrase = |tcti: &str| {
        let mut command = site.command();
        command
            .args(["key", "passphrase", "--clevis", "--for", &volume])
            .env("CRYPTATTACH_TCTI", tcti)
            .output()
            .unwrap()
    };
    let opened = passphrase(&tcti);
    assert!(opened.status.success(), "{}", said(&opened));
    assert_eq!(
        String::from_utf8(opened.stdout).unwrap(),
        sh(&format!("TPM2TOOLS_TCTI={tcti} clevis luks pass -d {volume} -s 1"))
    );
    let refused = passphrase(NO_TPM);
    let told = said(&refused);
    println!("{told}");
    assert!(!refused.status.success() && told.contains("clevis' pin 'tpm2' does not open it"), "{told}");
    // Another boot state.
    host.swtpm.extend(7, 'a');
    assert!(!passphrase(&tcti).status.success());

    // A pin that has its key itself, and clevis' own refusal of another.
    let volume = bound(&site, "null", NO_TPM, "null", &json!({}));
    let told = site.fails(67, &["test", &volume]);
    assert!(told.contains("clevis opens it with pin null"), "{told}");
    let lines = site.ok(&["key", "import", &volume, "--print-policy"]);
    assert!(lines.contains("[leaves.null-1]") && lines.contains("clevis' pin null"), "{lines}");
    let reference = site.ok(&["key", "import", &volume, "--token", "--allow-shared"]);
    assert_eq!(site.json(&["test", &volume, "--allow-shared"])["key"], reference);
}

#[test]
fn clevis_opens_what_is_exported_as_the_policy_says() {
    let tangs: [Tangd; 3] = tangs();
    let site = Site::new();
    append(&site, LIMITS);
    for (at, tang) in tangs.iter().enumerate() {
        let (name, thumbprint) = (at + 1, tang.thumbprint());
        append(&site, &format!("[leaves.t{name}]\ntang = \"{}\"\nthumbprint = \"{thumbprint}\"\n", tang.url));
    }
    let (volume, reference) = site.volume("volume", &[]);
    let export = ["key", "export", &volume, "--clevis", "--allow-shared"];
    for (policy, leaf) in [("any(owner, escrow, hosts)", "owner"), ("any(escrow, all(owner, t1))", "escrow")] {
        site.ok(&["container", "policy", "cinder", policy]);
        let told = site.fails(78, &export);
        assert!(told.contains(&format!("because of its leaf '{leaf}'")) && told.contains(policy), "{told}");
    }
    for (number, policy, opens) in [
        (0, "any(owner, escrow, t1)", "t1"),
        (1, "any(owner, escrow, 2 of (t1, t2, t3))", "2 of (t1, t2, t3)"),
        (2, "any(owner, escrow, all(t1, any(owner, t2)), t3)", "any(all(t1, t2), t3)"),
    ] {
        let keyslot = number.min(1);
        site.ok(&["container", "policy", "cinder", policy]);
        if number == 2 {
            // The usual header has room for five servers or so.
            let before = sh(&format!("cryptsetup luksDump --dump-json-metadata {volume}"));
            let told = site.fails(65, &export);
            assert!(told.contains("no room for it"), "{told}");
            assert_eq!(sh(&format!("cryptsetup luksDump --dump-json-metadata {volume}")), before, "both, or neither");
            sh(&format!("clevis luks unbind -f -d {volume} -s 1"));
        }
        let output = site.run(&export);
        let (text, told) = (String::from_utf8(output.stdout.clone()).unwrap(), said(&output));
        assert!(output.status.success() && told.contains("left out") && told.contains("escrow"), "{told}");
        let urls = tangs.iter().enumerate().fold(opens.to_owned(), |opens, (at, tang)| {
            opens.replace(&format!("t{}", at + 1), &format!("{}/", tang.url))
        });
        assert_eq!(text.trim(), format!("clevis opens the keyslot {keyslot} of {volume} with {urls}"));
        println!("{}", sh(&format!("clevis luks list -d {volume}")));
        let passphrase = pass(&volume, keyslot);
        sh(&format!("printf %s '{passphrase}' | cryptsetup open --test-passphrase --key-file - {volume}"));
        // And jose opens ours as clevis' own: with one server less, as the policy says.
        tangs[1].set_up(false);
        assert_eq!(pass(&volume, keyslot), passphrase);
        tangs[1].set_up(true);
    }
    // One that is enough by itself is down, and so is too much of the rest.
    tangs[0].set_up(false);
    sh(&format!("! clevis luks pass -d {volume} -s 0"));
    tangs[0].set_up(true);
    // It comes back as it went.
    let lines = site.ok(&["key", "import", &volume, "--print-policy"]);
    assert!(lines.ends_with("'any(escrow, t1)'"), "{lines}");
    for number in 0..2 {
        sh(&format!("clevis luks unbind -f -d {volume} -s {number}"));
    }
    assert_eq!(site.json(&["test", &volume, "--allow-shared"])["key"], reference);

    // A volume whose key is in no store.
    let volume = luks(&site, "luks");
    site.ok(&["key", "export", &volume, "--clevis", "--key-file", site.keys("pass")]);
    sh(&format!("printf %s '{}' | cryptsetup open --test-passphrase --key-file - {volume}", pass(&volume, 1)));
    sh(&format!("cryptsetup open --test-passphrase --key-file {} {volume}", site.keys("pass")));
    fs::write(site.keys("wrong"), "another").unwrap();
    let told = site.fails(68, &["key", "export", &volume, "--clevis", "--key-file", site.keys("wrong")]);
    assert!(told.contains("opens no keyslot"), "{told}");
}

/// A token that somebody has written into a header.
fn hostile(site: &Site, name: &str, jwe: &Value) -> String {
    let volume = luks(site, name);
    let token = json!({"type": "clevis", "keyslots": ["0"], "jwe": jwe});
    let file = site.path(&format!("{name}.json"));
    fs::write(&file, token.to_string()).unwrap();
    sh(&format!("cryptsetup token import --json-file {} {volume}", file.display()));
    volume
}

fn jwe(header: &Value) -> Value {
    let protected = Base64UrlUnpadded::encode_string(header.to_string().as_bytes());
    json!({"protected": protected, "encrypted_key": "", "iv": "AAAAAAAAAAAAAAAA", "ciphertext": "AAAA", "tag": "AAAAAAAAAAAAAAAAAAAAAA"})
}

fn compact(header: &Value) -> String {
    let jwe = jwe(header);
    let part = |name: &str| jwe[name].as_str().unwrap().to_owned();
    ["protected", "encrypted_key", "iv", "ciphertext", "tag"].map(part).join(".")
}

#[test]
fn a_hostile_token_is_refused_or_ends_in_time() {
    let site = Site::new();
    append(&site, LIMITS);
    let foreign = |pin: &str| json!({"alg": "dir", "enc": "A256GCM", "clevis": {"pin": pin, pin: {}}});
    let split = |least: i64, p: &str, shares: Vec<String>| json!({"alg": "dir", "enc": "A256GCM", "clevis": {"pin": "sss", "sss": {"t": least, "p": p, "jwe": shares}}});
    let prime = Base64UrlUnpadded::encode_string(&[0xff; 32]);
    let even = Base64UrlUnpadded::encode_string(&[0xfe; 32]);
    let share = || compact(&foreign("x"));
    let deep = (0..5).fold(foreign("x"), |inner, _| split(1, &prime, vec![compact(&inner)]));
    for (name, header, told) in [
        ("even", split(1, &even, vec![share()]), "no prime"),
        ("zero", split(0, &prime, vec![share()]), "'t' that is not from 1"),
        ("many", split(1, &prime, vec![share(); 100]), "more than 64 pins"),
        ("deep", deep, "more than 4 levels"),
        ("path", foreign("../../bin/sh"), "no name of a pin"),
        ("option", foreign("--help;reboot"), "no name of a pin"),
        ("unknown", foreign("no-such-pin"), "clevis' pin 'no-such-pin'"),
    ] {
        let volume = hostile(&site, name, &jwe(&header));
        let refused = site.run(&["key", "import", &volume, "--allow-shared"]);
        assert_eq!(refused.status.code(), Some(68), "{name}: {}", said(&refused));
        assert!(said(&refused).contains(told), "{name}: {}", said(&refused));
        assert_eq!(site.ok(&["key", "list"]), "", "no key is left behind");
    }

    // Servers of somebody else's choice, with keys that are whole.
    let tang = Tangd::start();
    let mut number = 0;
    let mut at = |url: &str| {
        number += 1;
        let volume = bound(&site, &format!("bound-{number}"), NO_TPM, "tang", &pin(&tang));
        let token: Value =
            serde_json::from_str(&sh(&format!("cryptsetup token export --token-id 0 {volume}"))).unwrap();
        let protected = Base64UrlUnpadded::decode_vec(token["jwe"]["protected"].as_str().unwrap()).unwrap();
        let mut header: Value = serde_json::from_slice(&protected).unwrap();
        header["clevis"]["tang"]["url"] = json!(url);
        hostile(&site, &format!("hostile-{number}"), &jwe(&header))
    };
    let file = at("file:///etc/passwd");
    let told = site.fails(68, &["key", "import", &file, "--allow-shared"]);
    assert!(told.contains("is not an http or https URL of a server") && !told.contains("passwd\""), "{told}");
    let (url, _listener) = silent();
    let started = Instant::now();
    let told = site.fails(69, &["key", "import", &at(&url), "--allow-shared"]);
    assert!(told.contains("did not answer within") && started.elapsed() < Duration::from_secs(40), "{told}");
    let endless = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", endless.local_addr().unwrap());
    thread::spawn(move || {
        for mut stream in endless.incoming().map_while(Result::ok) {
            // An answer before the request would be another fault.
            let _ = Read::read(&mut stream, &mut [0; 4096]);
            let _ = Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\n\r\n");
            while Write::write_all(&mut stream, &[b'x'; 65536]).is_ok() {}
        }
    });
    let told = site.fails(76, &["key", "import", &at(&url), "--allow-shared"]);
    assert!(told.contains("longer than the limit"), "{told}");
    // The server answers, and what it opens was changed: it is the server that is blamed, and nothing is imported.
    let told = site.fails(69, &["key", "import", &at(&tang.url), "--allow-shared"]);
    assert!(told.contains("does not open the leaf"), "{told}");
    assert_eq!(site.ok(&["key", "list"]), "");
    // Words of the header on a terminal.
    let told = site.fails(67, &["attach", &at("http://x/\u{1b}[2J"), "x", "--backend", "userspace"]);
    assert!(!told.contains('\u{1b}'), "{told}");
}

/// How often each is done.
const TIMES: usize = 15;

struct Row {
    name: &'static str,
    /// Milliseconds, median.
    clevis: f64,
    token: f64,
    policy: f64,
    /// Processes of clevis, and of ours.
    processes: [usize; 3],
    /// Bytes of what is sealed, clevis' and ours.
    bytes: [usize; 2],
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn timed(command: &mut Command) -> (f64, Output) {
    let started = Instant::now();
    let output = command.stdin(Stdio::null()).output().unwrap();
    let took = started.elapsed().as_secs_f64() * 1e3;
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    (took, output)
}

/// Processes that a command starts, itself included.
fn processes(site: &Site, command: &str) -> usize {
    let trace = site.path("trace");
    // What clevis leaves behind for a silent server waits without end, and strace with it. By then all have been started.
    sh(&format!(
        "timeout 20 strace -f -qq -e trace=clone,clone3,fork,vfork -o {} {command} >/dev/null 2>&1 || [ $? = 124 ]",
        trace.display()
    ));
    let text = fs::read_to_string(trace).unwrap();
    let started = text.lines().filter(|line| line.contains(") = ") && !line.contains("CLONE_THREAD"));
    let resumed = started.filter(|line| line.contains("clone") || line.contains("fork"));
    1 + resumed.filter(|line| !line.contains("= -1")).count()
}

#[test]
#[ignore = "a measurement: make bench-sources"]
fn bench_sources() {
    let host = Host::new();
    let tcti = host.swtpm.tcti();
    let tangs: [Tangd; 3] = tangs();
    let (silent, _listener) = silent();
    let site = tpm_attach::site(&host);
    append(&site, "[leaves.tpm]\npublic = \"host.pem\"\n");
    let urls = [&tangs[0].url, &tangs[1].url, &tangs[2].url, &silent];
    let keys = [&tangs[0], &tangs[1], &tangs[2], &tangs[2]];
    for (at, (url, tang)) in urls.into_iter().zip(keys).enumerate() {
        let (name, thumbprint) = (at + 1, tang.thumbprint());
        // What is silent now was not when it was pinned.
        let pinned = site.keys("cryptattach.toml");
        append(&site, &format!("[leaves.t{name}]\ntang = \"{}\"\nthumbprint = \"{thumbprint}\"\n", tang.url));
        sh(&format!("CRYPTATTACH_CONFIG={pinned} {} leaf pin t{name}", env!("CARGO_BIN_EXE_cryptattach")));
        let text = fs::read_to_string(pinned).unwrap();
        let (before, after) = text.split_at(text.rfind("[leaves.").unwrap());
        fs::write(pinned, before.to_owned() + &after.replace(&tang.url, url)).unwrap();
    }
    let pins: Vec<_> = tangs.iter().map(pin).collect();
    let mut fourth = pins[2].clone();
    fourth["url"] = json!(silent);
    let of = |least: usize, pins: &[Value]| json!({"t": least, "pins": {"tang": pins}});
    let with_silent = [pins[0].clone(), pins[1].clone(), fourth];
    let tpm = json!({"t": 2, "pins": {"tang": pins[0], "tpm2": {"pcr_bank": "sha256", "pcr_ids": "7"}}});
    let cases = [
        ("tang", "tang", pins[0].clone(), "any(escrow, t1)"),
        ("2 of 3 tang", "sss", of(2, &pins), "any(escrow, 2 of (t1, t2, t3))"),
        ("2 of 3, one is silent", "sss", of(2, &with_silent), "any(escrow, 2 of (t1, t2, t4))"),
        ("tpm2 + tang", "sss", tpm, "any(escrow, all(tpm, t1))"),
    ];
    let run = |arguments: &[&str]| {
        let mut command = site.command();
        command.args(arguments).env("CRYPTATTACH_TCTI", &tcti);
        command
    };
    let mut rows = Vec::new();
    for (number, (name, kind, config, policy)) in cases.into_iter().enumerate() {
        let volume = bound(&site, &format!("volume{number}"), &tcti, kind, &config);
        timed(&mut run(&["key", "import", &volume, "--token", "--allow-shared"]));
        timed(&mut run(&["container", "policy", "tpm", policy]));
        let by_token = ["key", "passphrase", "--clevis", "--for", &volume];
        let by_policy = ["test", &volume, "--allow-shared", "--json"];
        // It leaves a curl behind that waits for the silent server, and that holds what it has inherited.
        let clevis = format!("env TPM2TOOLS_TCTI={tcti} clevis luks pass -d {volume} -s 1 2>/dev/null");
        let (mut times, mut start) = ([Vec::new(), Vec::new(), Vec::new()], Vec::new());
        // In turn: all have the same neighbours on this machine.
        for _ in 0..TIMES {
            let (theirs, passphrase) = timed(Command::new("sh").args(["-c", &clevis]));
            let (ours, same) = timed(&mut run(&by_token));
            assert!(passphrase.stdout == same.stdout, "the passphrases differ");
            let (_, tested) = timed(&mut run(&by_policy));
            let tested: Value = serde_json::from_slice(&tested.stdout).unwrap();
            start.push(timed(&mut run(&["--version"])).0);
            times[0].push(theirs);
            times[1].push(ours);
            times[2].push(tested["seconds"].as_f64().unwrap() * 1e3);
        }
        let [clevis_ms, token_ms, policy_ms] = times.map(median);
        let ours = |arguments: &[&str]| {
            let (config, program) = (site.keys("cryptattach.toml"), env!("CARGO_BIN_EXE_cryptattach"));
            let arguments = arguments.join(" ");
            processes(&site, &format!("env CRYPTATTACH_CONFIG={config} CRYPTATTACH_TCTI={tcti} {program} {arguments}"))
        };
        let token = sh(&format!("cryptsetup token export --token-id 0 {volume}"));
        let shown = run(&["container", "show", "tpm", "--json"]).output().unwrap();
        let shown: Value = serde_json::from_slice(&shown.stdout).unwrap();
        let key = site.keys(&format!("sealed/kek/{}.jwe", shown["epoch"].as_str().unwrap()));
        rows.push(Row {
            name,
            clevis: clevis_ms,
            token: token_ms,
            policy: policy_ms + median(start),
            processes: [processes(&site, &clevis), ours(&by_token), ours(&by_policy)],
            bytes: [token.len(), fs::read(key).unwrap().len()],
        });
    }
    let load = fs::read_to_string("/proc/loadavg").unwrap();
    println!("median of {TIMES}, in turn; load {}; swtpm is a program, not a chip", load.trim());
    println!("token: key passphrase --clevis; policy: test without the mapping, and a program's start");
    println!(
        "{:<24} {:>9} {:>9} {:>9} {:>7} {:>7}  {:>18} {:>14}",
        "", "clevis ms", "token ms", "policy ms", "ratio", "ratio", "processes", "bytes"
    );
    for Row { name, clevis, token, policy, processes: [a, b, c], bytes: [theirs, ours] } in rows {
        println!(
            "{name:<24} {clevis:>9.0} {token:>9.0} {policy:>9.0} {:>7.2} {:>7.2}  {:>18} {:>14}",
            token / clevis,
            policy / clevis,
            format!("{a} / {b} / {c}"),
            format!("{theirs} / {ours}")
        );
    }
}
