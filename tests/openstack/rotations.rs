//! Many volumes with their keys in Swift get new ones, while the store is taken away and the command is killed, at random.
//! Afterwards all that has opened a volume before is tried: the old key, its passphrase, a copy of the header, the lockbox's
//! entry, and a copy of the whole container in the hands of a thief who has the owner's private key.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    os::unix::fs::FileExt,
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use crate::{
    Story,
    chance::Chance,
    cloud::{Cloud, SEALING, Site, with_input},
    lockbox,
    moves::named,
    shell::sh,
};

pub const STORIES: &[Story] = &[("rotated_while_the_store_goes_and_comes_nothing_old_opens", |cloud| {
    torture(cloud, Many { volumes: 6, bytes: 24 << 20, least_kills: 2, least_outages: 1, most_milliseconds: 1500 });
})];

pub fn two_hundred(cloud: &Cloud) {
    let volumes = std::env::var("VOLUMES").map_or(200, |volumes| volumes.parse().unwrap());
    torture(
        cloud,
        Many {
            volumes,
            bytes: 64 << 20,
            least_kills: volumes / 5,
            least_outages: volumes / 10,
            most_milliseconds: 8000,
        },
    );
}

struct Many {
    volumes: usize,
    bytes: u64,
    least_kills: usize,
    least_outages: usize,
    /// So long is a run let be, at most.
    most_milliseconds: u64,
}

/// A volume as it was before.
struct Before {
    path: String,
    key: String,
    header: String,
    passphrase: Option<String>,
    plain: String,
    /// The first bytes of the plaintext.
    first: Vec<u8>,
}

/// What the run of all rotations has met.
#[derive(Debug, Default)]
struct Met {
    runs: usize,
    kills: usize,
    /// Kills in the middle of a volume.
    in_hand: usize,
    outages: usize,
}

/// Answers to what has opened a volume once: exit codes, and how often each came.
type Codes = Mutex<BTreeMap<(&'static str, i32), usize>>;

/// So that an outage ends soon.
const SHORT: &str = "[network]\ntotal_seconds = 4\n";

fn torture(cloud: &Cloud, many: Many) {
    let start = Instant::now();
    let site = Site::new(cloud);
    site.configure(SHORT);
    let _open = lockbox::admitted(&site);
    let before = for_each(&(0..many.volumes).collect::<Vec<_>>(), &|number| make(&site, *number, many.bytes));
    let listed = before.iter().enumerate().map(|(number, before)| {
        format!("[volumes.{}]\ndevice = \"{}\"\n", site.name(&format!("n{number}")), before.path)
    });
    site.configure(&listed.collect::<String>());
    let backup = site.path("container.backup").display().to_string();
    site.ok(&["container", "backup", "cinder", &backup]);
    let (entries, copy) = (site.path("lockbox"), site.path("lockbox.copy"));
    sh(&format!("cp -a {} {}", entries.display(), copy.display()));
    println!("{} volumes made after {:.0?}", before.len(), start.elapsed());

    let begun = Instant::now();
    let met = rotate_all(cloud, &site, &many);
    println!("rotated after {:.0?}: {met:?}", begun.elapsed());

    // Nothing is lost, and nothing old opens.
    let begun = Instant::now();
    let lockbox = site.ok(&["lockbox", "status", "--json"]);
    assert!(before.iter().all(|before| !lockbox.contains(&before.key)), "{lockbox}");
    let left = fs::read_dir(site.path("state/rekey")).unwrap().flatten();
    let left: Vec<_> =
        left.map(|entry| entry.file_name()).filter(|name| !name.as_encoded_bytes().starts_with(b".")).collect();
    assert!(left.is_empty(), "{left:?}");
    // A list may be late, for nothing replicates here what a server has missed: each old key is asked for below.
    let listed = site.ok(&["key", "list"]);
    let (old, others): (Vec<_>, Vec<_>) =
        listed.lines().partition(|key| before.iter().any(|before| before.key == *key));
    let now: Vec<_> = before.iter().map(|before| named(&before.path)).collect();
    let (old, kept) = (old.len(), others.iter().filter(|key| !now.iter().any(|now| now == *key)).count());
    let thief = thief(cloud, &site, &backup);
    sh(&format!("rm -r {0} && cp -a {1} {0}", entries.display(), copy.display()));
    let codes = Codes::default();
    let compared = AtomicUsize::new(0);
    for_each(&before, &|before| {
        assert_eq!(plaintext(&site, &before.path, &[]).0, before.plain, "{}: DATA LOST", before.path);
        nothing_opens(&site, &thief, before, &codes);
        let compared = compared.fetch_add(1, Ordering::Relaxed) + 1;
        if compared.is_multiple_of(20) {
            println!("{compared} compared and tried");
        }
    });
    let codes = codes.into_inner().unwrap();
    println!(
        "compared and tried after {:.0?}: {} volumes as before, 0 lost, {} tries of old things, none opens: {codes:?}; keys that \
         nothing names: {kept}; old keys that are listed though gone: {old}",
        begun.elapsed(),
        before.len(),
        codes.values().sum::<usize>()
    );
}

/// A strict volume, or each fourth one with a keyslot.
fn make(site: &Site<'_>, number: usize, bytes: u64) -> Before {
    let path = site.disk().join(format!("v{number}")).display().to_string();
    File::create(&path).unwrap().set_len(bytes).unwrap();
    let has_keyslot = number % 4 == 3;
    let key = site.ok(&[&["format", &path][..], if has_keyslot { &["--keyslot"] } else { &[] }].concat());
    let header = site.disk().join(format!("header{number}")).display().to_string();
    site.ok(&["header", "backup", &path, &header]);
    let passphrase = has_keyslot.then(|| site.ok(&["key", "passphrase", &key]));
    // What was never written reads as random data, under the key that it has: as good as any.
    let (plain, first) = plaintext(site, &path, &[]);
    Before { path, key, header, passphrase, plain, first }
}

/// The SHA-256 of all that is on the volume, and its first bytes.
#[track_caller]
fn plaintext(site: &Site<'_>, path: &str, more: &[&str]) -> (String, Vec<u8>) {
    let name = site.name(&path[path.rfind('/').unwrap() + 1..]);
    let device = site.ok(&[&["attach", path, &name, "--backend", "userspace", "--read-only"], more].concat());
    let mut first = vec![0; 1 << 20];
    File::open(&device).unwrap().read_exact_at(&mut first, 0).unwrap();
    let sum = sh(&format!("sha256sum {device}"));
    site.ok(&["detach", &name]);
    (sum.split(' ').next().unwrap().to_owned(), first)
}

/// Runs the command until it says that all is done. A run is killed, or the store is taken away from it, or both, at some moment
/// after it has begun to rewrite a volume; and that often enough.
fn rotate_all(cloud: &Cloud, site: &Site<'_>, many: &Many) -> Met {
    let (mut chance, mut met) = (Chance::new(), Met::default());
    loop {
        met.runs += 1;
        assert!(met.runs < 20 + 2 * many.volumes, "it does not come to its end: {met:?}");
        let said = File::create(site.path("said")).unwrap();
        let arguments = ["key", "rotate", "--container", "cinder", "--because-leaked", "--json"];
        let mut command = site.command();
        let mut run = command.args(arguments).stdout(Stdio::null()).stderr(said).spawn().unwrap();
        let is_over = |run: &mut Child| run.try_wait().unwrap().is_some();
        let has_begun = || fs::read_to_string(site.path("said")).unwrap().contains("\"progress\"");
        while !is_over(&mut run) && !has_begun() {
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(Duration::from_millis(chance.below(many.most_milliseconds)));
        let (kill, outage) = match (met.kills >= many.least_kills, met.outages >= many.least_outages) {
            (false, _) => (true, chance.below(3) == 0),
            (true, false) => (false, true),
            (true, true) => (chance.below(2) == 0, chance.below(3) == 0),
        };
        if outage && !is_over(&mut run) {
            met.outages += 1;
            match chance.below(3) {
                0 => cloud.stop("proxy"),
                1 => cloud.signal("proxy", "STOP"),
                _ => cloud.stop("object1 object2"),
            }
            thread::sleep(Duration::from_millis(500 + chance.below(6000)));
        }
        if kill && !is_over(&mut run) {
            run.kill().unwrap();
            met.kills += 1;
            met.in_hand += usize::from(!journals(site).is_empty());
        }
        if outage {
            cloud.repair();
        }
        match run.wait().unwrap().code() {
            Some(0) => return met,
            // Some volumes have failed, or the store was away before it had begun. Or it was killed.
            Some(83 | 69) | None => {}
            code => panic!("{code:?}: {}", fs::read_to_string(site.path("said")).unwrap()),
        }
        if met.runs % 10 == 0 {
            println!("{met:?}");
        }
    }
}

/// The volumes whose rotation is not finished.
fn journals(site: &Site<'_>) -> Vec<OsString> {
    let all = fs::read_dir(site.path("state/rekey")).into_iter().flatten().flatten().map(|entry| entry.file_name());
    all.filter(|name| !name.as_encoded_bytes().starts_with(b".")).collect()
}

/// A host that trusts nothing and has all of the container from before, and the owner's private key.
fn thief<'a>(cloud: &'a Cloud, site: &Site<'_>, backup: &str) -> Site<'a> {
    let thief = Site::bare(cloud);
    for name in ["owner.pem", "owner.key", "escrow.pem"] {
        fs::copy(site.path(name), thief.path(name)).unwrap();
    }
    thief.configure(&format!("[stores.cinder]\ntype = \"directory\"\npath = \"store\"\n{SEALING}"));
    thief.ok(&["container", "restore", "cinder", backup, "--create"]);
    thief
}

fn nothing_opens(site: &Site<'_>, thief: &Site<'_>, before: &Before, codes: &Codes) {
    let Before { path, key, header, passphrase, plain, first } = before;
    let refused = |what, site: &Site<'_>, codes_of: &[i32], arguments: &[&str]| {
        let output = site.run(arguments);
        let (code, told) = (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr));
        assert!(codes_of.contains(&code), "{what}: {arguments:?}: {code} {told}");
        *codes.lock().unwrap().entry((what, code)).or_default() += 1;
    };
    let name = site.name(&format!("o{}", &path[path.rfind('/').unwrap() + 2..]));
    let attach = ["attach", path, &name, "--backend", "userspace", "--read-only"];
    // On the host itself, whose lockbox has all of its old entries again.
    refused("old key", site, &[67], &[&attach[..], &["--key", key]].concat());
    refused("old header", site, &[65, 67, 68], &[&attach[..], &["--header", header]].concat());
    refused("old header restored", site, &[65], &["header", "restore", path, header, "--older", "--lost"]);
    // By the old key itself, which the thief has.
    refused("stolen key", thief, &[65, 68], &[&attach[..], &["--key", key]].concat());
    if let Some(passphrase) = passphrase {
        let mut cryptsetup = Command::new("cryptsetup");
        let opened = with_input(cryptsetup.args(["open", "--test-passphrase", "--key-file=-", path]), passphrase);
        assert_eq!(opened.status.code(), Some(2), "the old passphrase opens {path}");
        *codes.lock().unwrap().entry(("old passphrase", 2)).or_default() += 1;
    }
    // Key and header of the same time fit each other, but not the data any more.
    let (sum, noise) = plaintext(thief, path, &["--key", key, "--header", header]);
    let blocks = noise.chunks(4096).zip(first.chunks(4096));
    assert!(sum != *plain && blocks.into_iter().all(|(now, before)| now != before), "{path}: data under its old key");
    *codes.lock().unwrap().entry(("stolen key and old header: noise", 0)).or_default() += 1;
}

/// Several at once: a command waits for the servers most of the time.
fn for_each<T: Sync, R: Send>(all: &[T], work: &(dyn Fn(&T) -> R + Sync)) -> Vec<R> {
    let (next, done) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || {
        while let Some((number, one)) = Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|n| Some((n, all.get(n)?)))
        {
            let result = work(one);
            done.lock().unwrap().insert(number, result);
        }
    };
    thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(work))));
    done.into_inner().unwrap().into_values().collect()
}
