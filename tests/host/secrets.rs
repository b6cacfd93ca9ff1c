//! Where the volume key is, and above all where it is not: arguments, environment, files, swappable or dumpable memory.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use base64ct::{Base64, Base64UrlUnpadded, Encoding};
use cryptattach::{
    base::key::SealedKey,
    keys::seal::{Content, Expected, For, Identities},
};

use crate::{
    busy::{wait_until, worker},
    container_key,
    site::{Site, sh},
};

/// The volume key, out of the store by the owner's key, as the product opens it.
fn volume_key(site: &Site, reference: &str) -> Vec<u8> {
    let sealed = SealedKey::from_json(&fs::read(site.sealed(reference)).unwrap()).unwrap();
    let (store, key) = reference.split_once('/').unwrap();
    let expected = Expected { key_id: key.parse().unwrap(), container: store.parse().unwrap(), volume: For::Any };
    let kek = SealedKey::from_json(&fs::read(site.keys("cinder/kek/1.jwe")).unwrap()).unwrap();
    let kek = container_key::first(store, &kek, site.keys("cinder.owner.key").as_ref());
    let identities = Identities::of(vec![Box::new(Arc::new(kek))]);
    let Content::VolumeKey(payload) = identities.open(&sealed, &expected).unwrap().content else { panic!() };
    payload.volume_key.expose().to_vec()
}

/// The key as someone might spell it.
fn spellings(key: &[u8]) -> Vec<Vec<u8>> {
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let (standard, url) = (Base64::encode_string(key), Base64UrlUnpadded::encode_string(key));
    [key.to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes(), standard.into_bytes(), url.into_bytes()]
        .into_iter()
        // A part is enough: AES keys stand alone, and lines break.
        .map(|spelling| spelling[..24].to_vec())
        .collect()
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn the_key_passes_no_system_call_but_the_socket_to_the_worker() {
    let site = Site::new();
    let (volume, reference) = site.volume("traced", &[]);
    let (key, name, trace) = (volume_key(&site, &reference), site.name("traced"), site.path("trace"));
    // All system calls of the command and its worker: strings in full and in hexadecimal, descriptors with what they are.
    let mut traced = Command::new("strace")
        .args(["-f", "-v", "-yy", "-xx", "-s", "1000000", "-o"])
        .arg(&trace)
        .arg(env!("CARGO_BIN_EXE_cryptattach"))
        .args(["attach", &volume, &name, "--backend", "userspace"])
        .env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // The command says where the device is, and ends; strace goes on with the worker.
    let mut device = String::new();
    BufReader::new(traced.stdout.take().unwrap()).read_line(&mut device).unwrap();
    site.ok(&["detach", &name]);
    traced.wait().unwrap();

    let trace = fs::read_to_string(trace).unwrap();
    let escaped = |part: &[u8]| part.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>();
    let mut over_the_socket = 0;
    for spelling in spellings(&key) {
        for line in trace.lines().filter(|line| line.contains(&escaped(&spelling))) {
            assert!(line.contains("<UNIX-STREAM:["), "{line}");
            over_the_socket += 1;
        }
    }
    assert!(over_the_socket >= 2, "sent and received: the search works");
    assert!(trace.lines().filter(|line| line.contains("execve(")).count() >= 2, "command and worker are in the trace");
}

#[test]
fn the_worker_has_the_key_in_locked_memory_only() {
    let site = Site::new();
    let (volume, reference) = site.volume("memory", &[]);
    let (key, name) = (volume_key(&site, &reference), site.name("memory"));
    let device = site.attach(&volume, &name, &[]);
    sh(&format!("dd if=/dev/urandom of={} bs=1M count=8 conv=fsync status=none", device.display()));

    let process = Path::new("/proc").join(worker(&name));
    assert_eq!(fs::read(process.join("cmdline")).unwrap(), b"cryptattach\0userspace-worker\0");
    assert_eq!(fs::read(process.join("environ")).unwrap(), b"");
    let limits = fs::read_to_string(process.join("limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");

    let (mut found, mut unlocked) = (0, Vec::new());
    let memory = File::open(process.join("mem")).unwrap();
    for mapping in mappings(&fs::read_to_string(process.join("smaps")).unwrap()) {
        let mut bytes = vec![0; mapping.len];
        if memory.read_exact_at(&mut bytes, mapping.start).is_err() {
            continue;
        }
        if key.chunks(32).any(|half| contains(&bytes, &half[..16])) {
            found += 1;
            if !mapping.flags.split_whitespace().any(|flag| flag == "lo") {
                unlocked.push(mapping.name);
            }
        }
    }
    assert!(found > 0, "the worker must have the key somewhere, or this looks in the wrong place");
    assert_eq!(unlocked, Vec::<String>::new(), "mappings with the key that may be swapped");

    // A crash leaves no core file with the key in it, whatever the limits of who started it.
    let cores = site.path("cores");
    fs::create_dir(&cores).unwrap();
    let pattern = CorePattern::set(&format!("{}/core.%p", cores.display()));
    sh(&format!("kill -ABRT {}", worker(&name)));
    // A core is written before the process is dead.
    wait_until("the worker's death shows", || !site.json(&["status", &name])["trouble"].is_null());
    drop(pattern);
    assert_eq!(fs::read_dir(&cores).unwrap().count(), 0, "a core file was written");
    site.ok(&["detach", &name]);
}

/// Where the kernel writes cores; as it was before, with the value.
struct CorePattern {
    before: String,
}

impl CorePattern {
    const FILE: &str = "/proc/sys/kernel/core_pattern";

    fn set(pattern: &str) -> Self {
        let before = fs::read_to_string(Self::FILE).unwrap();
        fs::write(Self::FILE, pattern).unwrap();
        Self { before }
    }
}

impl Drop for CorePattern {
    fn drop(&mut self) {
        let _ = fs::write(Self::FILE, &self.before);
    }
}

struct Mapping {
    start: u64,
    len: usize,
    name: String,
    flags: String,
}

/// The mappings in /proc/PID/smaps (proc_pid_smaps(5)).
fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let hex = |text| u64::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = range.map(|(start, end)| (hex(start), hex(end))) {
            mappings.push(Mapping { start, len: (end - start) as usize, name: line.to_owned(), flags: String::new() });
        } else if let (Some(flags), Some(mapping)) = (line.strip_prefix("VmFlags:"), mappings.last_mut()) {
            mapping.flags = flags.to_owned();
        }
    }
    mappings
}

#[test]
fn no_file_of_ours_has_the_key() {
    let site = Site::new();
    let (volume, reference) = site.volume("files", &["--keyslot"]);
    let key = volume_key(&site, &reference);
    let name = site.name("files");
    site.ok(&["attach", &volume, &name, "--backend", "userspace", "-vv"]);
    let mut looked_at = 0;
    for root in [site.keys("").to_owned(), format!("/run/cryptattach/{name}"), volume.clone()] {
        for path in sh(&format!("find {root} -xdev -type f")).lines() {
            let bytes = fs::read(path).unwrap();
            spellings(&key).iter().for_each(|spelling| assert!(!contains(&bytes, spelling), "{path}"));
            looked_at += 1;
        }
    }
    assert!(looked_at >= 6, "store, configuration, audit record, state, log and volume");
    let output = site.command().args(["-vv", "attach", &volume, &name, "--backend", "userspace"]).output().unwrap();
    spellings(&key).iter().for_each(|spelling| assert!(!contains(&output.stderr, spelling), "the log"));
    site.ok(&["detach", &name]);
}
