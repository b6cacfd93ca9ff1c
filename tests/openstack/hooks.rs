//! os-brick and castellan, the real ones, through the Python package.

use std::{collections::BTreeMap, process::Command};

use crate::{
    Story,
    cloud::{Cloud, Site},
    keys::{hook, run_hook},
    shell::{LoopDevice, sh},
};

pub const STORIES: &[Story] = &[
    ("os_brick_attaches_in_process", |cloud| brick(cloud, "inproc")),
    ("os_brick_attaches_through_privsep", |cloud| brick(cloud, "privsep")),
    ("castellans_own_tests_pass_with_swift", |cloud| castellan(cloud, "swift")),
    ("castellans_own_tests_pass_with_barbican", |cloud| castellan(cloud, "barbican")),
    ("volumes_of_stock_os_brick_open", stock_volumes),
    ("stock_os_brick_opens_ours", opens_ours),
    ("a_shell_hook_attaches", shell_hook),
    ("a_service_that_is_not_root_has_a_memory_of_its_own", not_root),
    ("a_link_is_only_put_where_none_or_a_link_is", link_in_the_way),
    ("a_list_goes_on_after_a_key_that_cannot_be_read", list_goes_on),
];

const TESTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/openstack");

/// The virtual environment with another release's os-brick and castellan, in place of the servers' (scripts/openstack-releases).
pub fn other_clients() -> Option<String> {
    std::env::var("CRYPTATTACH_OS_CLIENTS").ok()
}

/// Python with the clients and our package, from a wheel as users install it. The name of a story that uses it has `os_brick` or
/// `castellan` in it.
pub fn python(site: &Site<'_>, script: &str) -> Command {
    let state = site.cloud.var("STATE");
    let venv = other_clients().unwrap_or_else(|| site.cloud.var("VENV").to_owned());
    sh(&format!(
        "[ -d {state}/site ] || (
           cp -r {TESTS}/../../openstack {state}/package && cd {state}/package &&
           {venv}/bin/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w {state}/wheel . &&
           {venv}/bin/pip install -q --disable-pip-version-check --no-deps --target {state}/site {state}/wheel/*.whl)"
    ));
    let mut command = site.environment(format!("{venv}/bin/python"));
    command.args(["-W", "ignore", &format!("{TESTS}/{script}")]);
    command.env("PYTHONPATH", format!("{state}/site"));
    // privsep-helper is looked for there.
    command.env("PATH", format!("{venv}/bin:{}", std::env::var("PATH").unwrap()));
    command.env("TOKEN", site.cloud.token("cinder"));
    command.envs(site.cloud.variables().iter().filter(|(name, _)| {
        matches!(name.as_str(), "AUTH_URL" | "PASSWORD_CINDER" | "PASSWORD_GLANCE" | "PROJECT_ID_KEYS")
    }));
    command
}

/// Runs it, expects success, returns what it printed.
#[track_caller]
pub fn tells(mut command: Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

fn brick(cloud: &Cloud, mode: &str) {
    let site = Site::new(cloud);
    let file = site.file("volume");
    let device = LoopDevice::new(file.as_ref(), "");
    let mut command = python(&site, "brick.py");
    command.arg(mode).env("DEVICE", device.path()).env("FILE", &file).env("LOG", site.path("log"));
    println!("{}", tells(command));
}

fn castellan(cloud: &Cloud, store: &str) {
    let site = Site::of_kind(cloud, store);
    let mut command = python(&site, "castellan_functional.py");
    if store == "barbican" {
        command.env("CALLER_TOKEN", "yes");
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    println!("{}", text.lines().rev().take(3).collect::<Vec<_>>().join(" "));
}

/// Two volumes, FILE.luks and FILE.luks2, made by stock os-brick with keys by castellan's own driver; the keys' ids.
pub fn stock_keys(site: &Site<'_>, file: &str) -> BTreeMap<String, String> {
    let mut command = python(site, "stock.py");
    command.args(["make", file]);
    serde_json::from_str(tells(command).lines().last().unwrap()).unwrap()
}

/// Made by stock os-brick, the key in Barbican by castellan's own driver; opened by us with nothing but the key's id.
fn stock_volumes(cloud: &Cloud) {
    let site = Site::bare(cloud);
    site.barbican("barbican", false);
    let path = site.file("stock");
    let made = stock_keys(&site, &path);
    for provider in ["luks", "luks2"] {
        let (volume, key) = (format!("{path}.{provider}"), &made[provider]);
        let reference = format!("barbican/{key}");
        let name = site.name(provider);
        let arguments = ["attach", &volume, &name, "--backend", "userspace", "--key", &reference];
        let device = site.ok(&arguments);
        sh(&format!("printf %s 'the quick brown fox' | dd of={device} bs=4096 conv=sync,fsync status=none"));
        site.ok(&["detach", &name]);
        // cryptsetup still opens it, with the passphrase that we compute from the key.
        let passphrase = site.path("passphrase");
        let mut pipe = site.command();
        let output = pipe.args(["key", "passphrase", &reference]).output().unwrap();
        assert!(output.status.success());
        std::fs::write(&passphrase, &output.stdout).unwrap();
        sh(&format!("cryptsetup open --test-passphrase --key-file {} {volume}", passphrase.display()));
        let device = site.ok(&arguments);
        assert_eq!(sh(&format!("head -c 19 {device}")), "the quick brown fox");
        site.ok(&["detach", &name]);
        // As a hook of Nova's: an existing volume is never formatted.
        let request = format!(
            r#"{{"version":1,"device":"{volume}","link":null,"name":"{name}","key_id":"{key}","provider":"{provider}","auth":{{"token":"{}"}}}}"#,
            cloud.token("cinder")
        );
        let device = hook(&site, "attach", &request)["device"].as_str().unwrap().to_owned();
        assert_eq!(sh(&format!("head -c 19 {device}")), "the quick brown fox");
        hook(&site, "detach", &format!(r#"{{"version":1,"name":"{name}"}}"#));
    }
    let other = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":256}"#);
    let other = format!("barbican/{}", other["key_id"].as_str().unwrap());
    let volume = format!("{path}.luks");
    let text = site.fails(68, &["attach", &volume, "x", "--backend", "userspace", "--key", &other]);
    assert!(text.contains("opens no keyslot"), "{text}");
}

/// A volume of ours with a keyslot, opened by stock os-brick through castellan; and one that our hook made.
fn opens_ours(cloud: &Cloud) {
    let site = Site::new(cloud);
    let open = |volume: &str, key: &str| {
        let mut command = python(&site, "stock.py");
        command.args(["open", volume, key]).env("BACKEND", "cryptattach");
        assert!(tells(command).contains("opened"));
    };
    let volume = site.file("ours");
    let reference = site.ok(&["format", &volume, "--keyslot"]);
    open(&volume, &reference[7..]);
    let (volume, name) = (site.file("hooked"), site.name("hooked"));
    let key = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":512}"#);
    let key = key["key_id"].as_str().unwrap();
    hook(
        &site,
        "attach",
        &format!(r#"{{"version":1,"device":"{volume}","link":null,"name":"{name}","key_id":"{key}"}}"#),
    );
    hook(&site, "detach", &format!(r#"{{"version":1,"name":"{name}"}}"#));
    open(&volume, key);
}

/// What is refused, and that nothing is formatted but a blank device with an unused key.
fn shell_hook(cloud: &Cloud) {
    let site = Site::new(cloud);
    let create = || {
        hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":256}"#)["key_id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let attach = |volume: &str, key: &str, more: &str| {
        let name = site.name("hook");
        let request =
            format!(r#"{{"version":1,"device":"{volume}","link":null,"name":"{name}","key_id":"{key}"{more}}}"#);
        let output = run_hook(&site, "attach", &request);
        if output.status.success() {
            hook(&site, "detach", &format!(r#"{{"version":1,"name":"{name}"}}"#));
        }
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let unchanged = |volume: &str| sh(&format!("sha256sum {volume}"));

    // Someone's data, of no known kind: a plain dm-crypt volume looks like that.
    let noise = site.file("noise");
    sh(&format!("dd if=/dev/urandom of={noise} bs=1M seek=40 count=8 conv=notrunc status=none"));
    let before = unchanged(&noise);
    let (code, text) = attach(&noise, &create(), "");
    assert!(code == 73 && text.contains("of no known kind"), "{code}: {text}");
    assert_eq!(unchanged(&noise), before);
    // A file system.
    let ext4 = site.file("ext4");
    sh(&format!("mkfs.ext4 -q {ext4}"));
    let (code, text) = attach(&ext4, &create(), "");
    assert!(code == 65 && text.contains("ext4"), "{code}: {text}");
    // A key that castellan gave out: another program may have used it, and this is not where.
    let given = create();
    hook(&site, "key get", &format!(r#"{{"version":1,"key_id":"{given}"}}"#));
    let (code, text) = attach(&site.file("blank"), &given, "");
    assert!(code == 73 && text.contains("was given out"), "{code}: {text}");
    // One that is looked at without its value is not given out.
    let looked_at = create();
    hook(&site, "key get", &format!(r#"{{"version":1,"key_id":"{looked_at}","metadata_only":true}}"#));
    let volume = site.file("volume");
    assert_eq!(attach(&volume, &looked_at, "").0, 0);
    assert_eq!(attach(&volume, &looked_at, "").0, 0, "and again");
    // Of two volumes with one key, the second is refused.
    let (code, text) = attach(&site.file("second"), &looked_at, "");
    assert!(code == 73 && text.contains("has already been used"), "{code}: {text}");

    for (request, code) in [
        ("", 64),
        ("{", 64),
        (r#"{"version":2}"#, 64),
        (r#"{"version":1}"#, 64),
        (r#"{"version":1,"device":"/dev/none","name":"x","key_id":"not-a-key"}"#, 67),
        (r#"{"version":1,"device":"/dev/none","name":"x","key_id":"3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"}"#, 66),
        (r#"{"version":1,"device":"/dev/none","name":"../x","key_id":"3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"}"#, 64),
        (
            r#"{"version":1,"device":"/dev/none","name":"x","key_id":"3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de","cipher":"null"}"#,
            64,
        ),
        (
            r#"{"version":1,"store":"none","device":"/dev/none","name":"x","key_id":"3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de"}"#,
            78,
        ),
    ] {
        let output = run_hook(&site, "attach", request);
        assert_eq!(output.status.code(), Some(code), "{request}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// On a compute node root attaches, and Nova's castellan driver fetches keys as Nova's user; with one configuration.
fn not_root(cloud: &Cloud) {
    let site = Site::new(cloud);
    let key = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":512}"#);
    let key = key["key_id"].as_str().unwrap();
    let attach =
        format!(r#"{{"version":1,"device":"{}","name":"{}","key_id":"{key}"}}"#, site.file("v"), site.name("v"));
    hook(&site, "attach", &attach);
    hook(&site, "detach", &format!(r#"{{"version":1,"name":"{}"}}"#, site.name("v")));
    assert!(site.path("state/generations/cinder").join(key).exists(), "root remembers the key's generation");
    // What nova is given: the program, the configuration and what it names; and a home.
    let (memory, disk) = (site.path(""), site.disk());
    let program = disk.join("cryptattach");
    std::fs::copy(env!("CARGO_BIN_EXE_cryptattach"), &program).unwrap();
    std::fs::create_dir(disk.join("home")).unwrap();
    sh(&format!(
        "chmod 711 {} {} && cd {0} && chmod o+r cryptattach.toml clouds.yaml owner.pem owner.key escrow.pem && chown nobody {1}/home",
        memory.display(),
        disk.display()
    ));
    let mut get = site.environment("setpriv");
    get.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"]).arg(&program).args(["hook", "key", "get"]);
    get.env("HOME", disk.join("home"));
    let output = crate::cloud::with_input(&mut get, &format!(r#"{{"version":1,"key_id":"{key}"}}"#));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let kept = disk.join("home/.local/state/cryptattach/generations/cinder").join(key);
    assert!(kept.exists(), "nobody remembers, too");
}

fn link_in_the_way(cloud: &Cloud) {
    let site = Site::new(cloud);
    let key = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":512}"#);
    let (device, name, file) = (site.file("v"), site.name("v"), site.file("precious"));
    for (link, why) in [
        (file.as_str(), "exists and is not a symbolic link"),
        ("relative", "is not an absolute path"),
        ("/nowhere/link", "a directory that does not exist"),
    ] {
        let request = format!(
            r#"{{"version":1,"device":"{device}","name":"{name}","key_id":{},"link":"{link}"}}"#,
            key["key_id"]
        );
        let output = run_hook(&site, "attach", &request);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(why), "{text}");
        site.fails(66, &["status", &name]);
    }
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 64 << 20, "it is as it was");
}

fn list_goes_on(cloud: &Cloud) {
    let site = Site::new(cloud);
    let keys = [(); 3].map(|()| {
        let key = hook(&site, "key create", r#"{"version":1,"algorithm":"AES","bit_length":256}"#);
        key["key_id"].as_str().unwrap().to_owned()
    });
    let (token, url) = (cloud.token("cinder"), cloud.container_url(&site.container("cinder")));
    sh(&format!("curl -sf -X PUT -H 'X-Auth-Token: {token}' {url}/{} -d garbage", keys[1]));
    for metadata_only in [true, false] {
        let request = format!(r#"{{"version":1,"metadata_only":{metadata_only}}}"#);
        let output = run_hook(&site, "key list", &request);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{text}");
        assert!(text.contains(&format!("the list omits cinder/{}", keys[1])), "{text}");
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let mut listed: Vec<_> = answer["keys"].as_array().unwrap().iter().map(|key| key["key_id"].as_str()).collect();
        listed.sort_unstable();
        let mut expected = vec![Some(&*keys[0]), Some(&*keys[2])];
        expected.sort_unstable();
        assert_eq!(listed, expected);
    }
}
