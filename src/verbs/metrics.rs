//! What this host counts, as a text file for node_exporter's textfile collector: off unless the configuration names a file.
//!
//! The file is the memory, too: a counter goes on from what it says. It has numbers only, under labels of which each has a few
//! known values: no name, no device and no key of anybody's. What is in a file besides is not read; a file that does not begin as
//! ours is somebody else's, and is left alone.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs::{DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
    time::{Duration, Instant},
};

use nix::fcntl::Flock;

use super::{
    boot,
    error::Error,
    failure,
    rotate::standing::{self, Worker},
};
use crate::{
    base::{chain::chain, clock::now, exit::Exit},
    config::Config,
    sys::{durable, lock},
    unlock::{
        container::Source,
        lockbox::{Lockbox, State},
    },
    volumes::backend::Mapping,
};

/// The first line of a file of ours.
const OURS: &str = "# cryptattach writes this file: docs/metrics.md\n";
/// More than all that there is to tell.
const MOST_BYTES: usize = 64 << 10;
/// An attach waits no longer for others that count.
const PATIENCE: Duration = Duration::from_secs(5);
/// Upper bounds of the histogram, in seconds.
const BOUNDS: [&str; 11] = ["0.1", "0.25", "0.5", "1", "2.5", "5", "10", "30", "60", "120", "+Inf"];

const ATTACHES: &str = "cryptattach_attaches_total";
const FAILURES: &str = "cryptattach_attach_failures_total";
const DURATION: &str = "cryptattach_attach_duration_seconds";
const LOCKBOX_OPEN: &str = "cryptattach_lockbox_open";
const LOCKBOX_ENTRIES: &str = "cryptattach_lockbox_entries";
const LOCKBOX_OLDEST: &str = "cryptattach_lockbox_oldest_entry_timestamp_seconds";
const LOCKBOX_EXPIRES: &str = "cryptattach_lockbox_first_expiry_timestamp_seconds";
const ROTATIONS: &str = "cryptattach_rotations";
const ROTATION_LEFT: &str = "cryptattach_rotation_left_bytes";
const BOOT_SECONDS: &str = "cryptattach_boot_duration_seconds";
const BOOT_VOLUMES: &str = "cryptattach_boot_volumes";
const BOOT_FAILURES: &str = "cryptattach_boot_failures";

/// Name, type, and what it is, in the order of the file.
const FAMILIES: [(&str, &str, &str); 12] = [
    (ATTACHES, "counter", "Volumes that were attached, by what gave the key (already: it was attached before)."),
    (FAILURES, "counter", "Attaches that failed, by exit code: docs/exit-codes.md."),
    (DURATION, "histogram", "Seconds that attaches took which succeeded, by what gave the key."),
    (LOCKBOX_OPEN, "gauge", "Whether the lockbox is open."),
    (LOCKBOX_ENTRIES, "gauge", "Entries of the lockbox."),
    (LOCKBOX_OLDEST, "gauge", "When the oldest entry of the lockbox was added."),
    (LOCKBOX_EXPIRES, "gauge", "When the first entry of the lockbox expires, or the time of the look if one has."),
    (ROTATIONS, "gauge", "Volumes that are being re-encrypted or encrypted in place."),
    (ROTATION_LEFT, "gauge", "Bytes that these volumes have still to be rewritten."),
    (BOOT_SECONDS, "gauge", "Seconds that the last boot took for its volumes."),
    (BOOT_VOLUMES, "gauge", "Volumes of the last boot, by what became of them."),
    (BOOT_FAILURES, "gauge", "Failures of the last boot, by exit code: docs/exit-codes.md."),
];

/// Each series that has a value.
#[derive(Default)]
struct Metrics(BTreeMap<String, f64>);

fn series(name: &str, label: &str, value: &str) -> String {
    format!("{name}{{{label}=\"{value}\"}}")
}

fn bucket(source: &str, bound: &str) -> String {
    format!("{DURATION}_bucket{{source=\"{source}\",le=\"{bound}\"}}")
}

/// All series of a family.
fn all(family: &str) -> Vec<String> {
    let each = |label: &str, values: &[&str]| values.iter().map(|value| series(family, label, value)).collect();
    let codes = || Exit::ALL.iter().map(|exit| series(family, "exit_code", &u8::from(*exit).to_string())).collect();
    match family {
        ATTACHES => each("source", &["store", "lockbox", "already"]),
        FAILURES | BOOT_FAILURES => codes(),
        DURATION => ["store", "lockbox"]
            .into_iter()
            .flat_map(|source| {
                let rest = ["sum", "count"].map(|of| series(&format!("{DURATION}_{of}"), "source", source));
                BOUNDS.iter().map(move |bound| bucket(source, bound)).chain(rest)
            })
            .collect(),
        LOCKBOX_ENTRIES => each("state", &["valid", "closed", "unusable"]),
        ROTATIONS => each("state", &["running", "paused", "absent"]),
        BOOT_VOLUMES => each("result", &boot::RESULTS),
        _ => vec![family.to_owned()],
    }
}

impl Metrics {
    /// What a file says; nothing of it has to be right.
    fn parse(text: &str) -> Self {
        let known: Vec<_> = FAMILIES.iter().flat_map(|(family, ..)| all(family)).collect();
        let number = |text: &str| text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
        let lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        let told = lines.filter(|(name, _)| known.iter().any(|known| known == name));
        Self(told.filter_map(|(name, value)| Some((name.to_owned(), number(value)?))).collect())
    }

    fn add(&mut self, name: String, value: f64) {
        *self.0.entry(name).or_default() += value;
    }

    /// Forgets all of a family, and says 0 for each of its series.
    fn begin(&mut self, family: &str) {
        self.0.extend(all(family).into_iter().map(|name| (name, 0.0)));
    }

    /// An attach that ended so.
    fn attached(&mut self, source: Option<Source>, seconds: f64, failed: Option<Exit>) {
        if let Some(exit) = failed {
            return self.add(series(FAILURES, "exit_code", &u8::from(exit).to_string()), 1.0);
        }
        let word = match source {
            Some(Source::Store) => "store",
            Some(Source::Lockbox) => "lockbox",
            None => return self.add(series(ATTACHES, "source", "already"), 1.0),
        };
        self.add(series(ATTACHES, "source", word), 1.0);
        for bound in BOUNDS.iter().filter(|bound| bound.parse().is_ok_and(|bound: f64| seconds <= bound)) {
            self.add(bucket(word, bound), 1.0);
        }
        self.add(series(&format!("{DURATION}_sum"), "source", word), seconds);
        self.add(series(&format!("{DURATION}_count"), "source", word), 1.0);
    }

    /// Forgets what is told of the host as it was.
    fn forget_gauges(&mut self) {
        self.0.retain(|name, _| [ATTACHES, FAILURES, DURATION].iter().any(|counter| name.starts_with(counter)));
    }

    /// What the lockbox, the rotations and the boot's record say now.
    fn look(&mut self, config: &Config) {
        if let Some(Ok(status)) = Lockbox::of(config).map(|lockbox| lockbox.status(config)) {
            let now = now() as f64;
            self.add(LOCKBOX_OPEN.to_owned(), u8::from(status.open).into());
            self.begin(LOCKBOX_ENTRIES);
            for entry in &status.entries {
                let state = match entry.state {
                    State::Valid => "valid",
                    State::Closed => "closed",
                    State::Unusable => "unusable",
                };
                self.add(series(LOCKBOX_ENTRIES, "state", state), 1.0);
            }
            let oldest = status.entries.iter().filter_map(|entry| entry.age_seconds).max();
            let expires = status.entries.iter().filter_map(|entry| entry.expires_in_seconds).min();
            self.0.extend(oldest.map(|seconds| (LOCKBOX_OLDEST.to_owned(), now - seconds as f64)));
            self.0.extend(expires.map(|seconds| (LOCKBOX_EXPIRES.to_owned(), now + seconds as f64)));
        }
        self.begin(ROTATIONS);
        self.begin(ROTATION_LEFT);
        for standing::Rotation { state, done_bytes, all_bytes, .. } in
            standing::all(config).into_iter().map(|standing| standing.rotation)
        {
            let state = match state {
                Worker::Running => "running",
                Worker::Paused => "paused",
                Worker::Absent => "absent",
            };
            self.add(series(ROTATIONS, "state", state), 1.0);
            let left = all_bytes.zip(done_bytes).map_or(0, |(all, done)| all.saturating_sub(done));
            self.add(ROTATION_LEFT.to_owned(), left as f64);
        }
        let Some(boot) = boot::numbers() else { return };
        self.0.extend(boot.seconds.map(|seconds| (BOOT_SECONDS.to_owned(), seconds)));
        self.begin(BOOT_VOLUMES);
        self.begin(BOOT_FAILURES);
        boot.results.iter().for_each(|result| self.add(series(BOOT_VOLUMES, "result", result), 1.0));
        for reason in boot.reasons {
            let name = series(BOOT_FAILURES, "exit_code", &reason.to_string());
            // A code of another version's is none that is told.
            self.0.entry(name).and_modify(|value| *value += 1.0);
        }
    }

    /// The file. A counter that has not counted is there as well: a rise from nothing is seen by nobody.
    fn text(&self) -> String {
        let mut text = OURS.to_owned();
        for (family, kind, help) in FAMILIES {
            let value = |name: String| match (self.0.get(&name), kind) {
                (None, "gauge") => None,
                (value, _) => Some((value.copied().unwrap_or_default(), name)),
            };
            let lines: Vec<_> = all(family).into_iter().filter_map(value).collect();
            if !lines.is_empty() {
                let _ = writeln!(text, "# HELP {family} {help}\n# TYPE {family} {kind}");
            }
            for (value, name) in lines {
                let _ = writeln!(text, "{name} {value}");
            }
        }
        text
    }
}

/// Does an attach, and counts it. What gave the key is known once it has succeeded.
pub(super) fn counted(
    config: &Config,
    attach: impl FnOnce(&mut Option<Source>) -> Result<Mapping, Error>,
) -> Result<Mapping, Error> {
    let (begin, mut source) = (Instant::now(), None);
    let attached = attach(&mut source);
    if let Some(path) = config.metrics.as_deref() {
        let source = source.filter(|_| attached.as_ref().is_ok_and(|mapping| !mapping.already_active));
        let failed = attached.as_ref().err().map(failure::exit);
        let seconds = begin.elapsed().as_secs_f64();
        if let Err(error) = change(config, path, |metrics| metrics.attached(source, seconds, failed)) {
            tracing::warn!("cannot count this in the metrics file {}: {}", path.display(), chain(&error));
        }
    }
    attached
}

/// Writes the file anew, with what is to be told of the host now.
pub fn renew(config: &Config) -> Result<(), Error> {
    let none = || Error::Usage(format!("{} names no metrics file: metrics = \"FILE\"", config.path.display()));
    let path = config.metrics.as_deref().ok_or_else(none)?;
    // A disk may keep it waiting for long, so it looks before it has others wait.
    let mut now = Metrics::default();
    now.look(config);
    let renewed = change(config, path, |metrics| {
        metrics.forget_gauges();
        metrics.0.extend(now.0);
    });
    renewed.map_err(Error::io(format!("write the metrics file {}", path.display())))
}

/// Changes the file, one process after the other.
fn change(config: &Config, path: &Path, change: impl FnOnce(&mut Metrics)) -> io::Result<()> {
    let _alone = alone(&config.state)?;
    let mut metrics = Metrics::parse(&written(path)?);
    change(&mut metrics);
    durable::replace_as(path, metrics.text().as_bytes(), Permissions::from_mode(0o644))
}

/// Not by a lock beside the file: whoever may read that folder could hold it.
fn alone(state: &Path) -> io::Result<Flock<File>> {
    DirBuilder::new().recursive(true).mode(0o700).create(state)?;
    lock::lock(&state.join(".metrics"), PATIENCE)
}

/// What the file says; nothing if there is none, or an empty one.
fn written(path: &Path) -> io::Result<String> {
    let bytes = match durable::read_bounded(path, MOST_BYTES) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        bytes => bytes?,
    };
    match bytes.is_empty() || bytes.starts_with(OURS.as_bytes()) {
        true => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        false => Err(io::Error::other("it is not a file of cryptattach's; remove it, or name another one")),
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink, thread};

    use super::*;
    use crate::{
        unlock::testing::Site,
        verbs::tests::{attached, formatted},
    };

    /// What a file says that is as the text format wants it; else the line that is not.
    fn read(text: &str) -> Result<BTreeMap<&str, f64>, &str> {
        let (mut family, mut series) = ("", BTreeMap::new());
        for line in text.lines().filter(|line| !line.starts_with("# HELP ")) {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                family = kind.split(' ').next().unwrap_or_default();
            } else if !line.starts_with('#') {
                let (name, value) = line.rsplit_once(' ').ok_or(line)?;
                let of = name.split('{').next().unwrap_or_default();
                let is_of_it = !family.is_empty() && of.starts_with(family);
                let value = value.parse().ok().filter(|_| is_of_it && !series.contains_key(name)).ok_or(line)?;
                series.insert(name, value);
            }
        }
        Ok(series)
    }

    #[test]
    fn counts_go_on_and_a_hostile_file_adds_nothing() {
        let mut metrics = Metrics::default();
        metrics.attached(Some(Source::Store), 0.3, None);
        metrics.attached(Some(Source::Lockbox), 700.0, None);
        metrics.attached(None, 1.0, None);
        metrics.attached(None, 1.0, Some(Exit::StoreUnavailable));
        let mut metrics = Metrics::parse(&metrics.text());
        metrics.attached(Some(Source::Store), 0.5, None);
        let text = metrics.text();
        let told = read(&text).unwrap();
        for (name, value) in [
            ("cryptattach_attaches_total{source=\"store\"}", 2.0),
            ("cryptattach_attaches_total{source=\"already\"}", 1.0),
            ("cryptattach_attach_failures_total{exit_code=\"69\"}", 1.0),
            ("cryptattach_attach_failures_total{exit_code=\"72\"}", 0.0),
            ("cryptattach_attach_duration_seconds_bucket{source=\"store\",le=\"0.25\"}", 0.0),
            ("cryptattach_attach_duration_seconds_bucket{source=\"store\",le=\"0.5\"}", 2.0),
            ("cryptattach_attach_duration_seconds_bucket{source=\"lockbox\",le=\"120\"}", 0.0),
            ("cryptattach_attach_duration_seconds_bucket{source=\"lockbox\",le=\"+Inf\"}", 1.0),
            ("cryptattach_attach_duration_seconds_sum{source=\"store\"}", 0.8),
            ("cryptattach_attach_duration_seconds_count{source=\"store\"}", 2.0),
        ] {
            assert_eq!(told.get(name), Some(&value), "{name}: {text}");
        }
        assert!(!text.contains("lockbox_open"), "a gauge that nobody has looked at is not told: {text}");

        let hostile = "cryptattach_attaches_total{source=\"store\"} NaN\ncryptattach_attaches_total{source=\"x\"} 1\n\
                       cryptattach_lockbox_open -1\nother 3\n\u{0}\u{0}\ncryptattach_rotation_left_bytes inf\nno\n\
                       cryptattach_attaches_total{source=\"already\"} 7\ncryptattach_attaches_total{source=\"already\"} 8";
        let text = Metrics::parse(hostile).text();
        assert_eq!(read(&text).unwrap().values().sum::<f64>(), 8.0, "{text}");
    }

    #[test]
    fn the_page_names_what_there_is() {
        let page = include_str!("../../docs/metrics.md");
        let words = page.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let named: std::collections::BTreeSet<_> = words.filter(|word| word.starts_with("cryptattach_")).collect();
        let are: std::collections::BTreeSet<_> = FAMILIES.iter().map(|(family, ..)| *family).collect();
        assert_eq!(named, are);
    }

    #[test]
    fn attaches_of_many_processes_at_once_are_all_counted() {
        let folder = tempfile::tempdir().unwrap();
        let (path, state) = (folder.path().join("a.prom"), folder.path().join("state"));
        let mut site = Site::with("");
        site.config.state = state.as_path().into();
        let config = &site.config;
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        change(config, &path, |metrics| metrics.attached(None, 0.0, None)).unwrap();
                    }
                });
            }
        });
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(read(&text).unwrap()["cryptattach_attaches_total{source=\"already\"}"], 40.0);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o644);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            2,
            "nothing is left beside it but the state directory"
        );
    }

    #[test]
    fn nobody_elses_file_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let site = Site::with("");
        let count = |path: &Path| change(&site.config, path, |metrics| metrics.attached(None, 0.0, None));
        fs::write(at("shadow"), "root:x:\n").unwrap();
        symlink(at("shadow"), at("link.prom")).unwrap();
        fs::write(at("long.prom"), [OURS.as_bytes(), &vec![b'\n'; 2 * MOST_BYTES]].concat()).unwrap();
        nix::unistd::mkfifo(&at("pipe.prom"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::write(at("nul.prom"), [0; 4096]).unwrap();
        for name in ["shadow", "link.prom", "pipe.prom", "nul.prom", "none/a.prom", ""] {
            assert!(count(&at(name)).is_err(), "{name}");
        }
        assert_eq!(fs::read_to_string(at("shadow")).unwrap(), "root:x:\n");
        // These are ours.
        fs::write(at("empty.prom"), "").unwrap();
        fs::write(at("torn.prom"), &OURS.repeat(2)[..OURS.len() + 9]).unwrap();
        for name in ["long.prom", "empty.prom", "torn.prom"] {
            count(&at(name)).unwrap();
            assert!(read(&fs::read_to_string(at(name)).unwrap()).is_ok());
        }
    }

    #[test]
    fn an_attach_is_counted_and_never_fails_for_it() {
        let mut site = Site::with("");
        let path = site.beside_the_keys("a.prom");
        site.config.metrics = Some(path.as_path().into());
        let (device, _) = formatted(&site, "one", false);
        attached(&site, &device).unwrap();
        attached(&site, &device).unwrap();
        attached(&site, &site.path("none")).unwrap_err();
        renew(&site.config).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let told = read(&text).unwrap();
        assert_eq!(told["cryptattach_attaches_total{source=\"store\"}"], 1.0, "{text}");
        assert_eq!(told["cryptattach_attaches_total{source=\"already\"}"], 1.0, "{text}");
        assert_eq!(told["cryptattach_attach_failures_total{exit_code=\"66\"}"], 1.0, "{text}");
        assert_eq!(told["cryptattach_rotations{state=\"running\"}"], 0.0, "{text}");
        for name in [site.name.as_str(), "one", device.to_str().unwrap()] {
            assert!(!text.contains(&format!("\"{name}\"")), "{text}");
        }

        site.config.metrics = Some(site.path("none/a.prom").as_path().into());
        attached(&site, &device).unwrap();
        assert!(renew(&site.config).is_err());
        site.config.metrics = None;
        assert!(matches!(renew(&site.config), Err(Error::Usage(_))));
    }
}
