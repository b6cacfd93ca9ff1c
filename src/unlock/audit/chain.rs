//! The writer's side of the chain. A writer holds a lock, takes the record before from the last line, and appends in one write(2).
//!
//! The head is kept in the state directory, too, in the file that is the lock. So a chain goes on after logrotate has put the record
//! elsewhere, and the end of a record cannot be cut unnoticed. It is written once the record is on disk: it is never ahead of that.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::Flock;
use openssl::sha::sha256;
use serde::{Deserialize, Serialize};

use super::{AuditError, Digest, Event, line, line::Link};
use crate::{
    base::{chain::chain, clock, hex},
    config::Config,
    sys::{durable::folder_of, lock},
};

/// How much of the end of a file is looked at: some lines.
const WINDOW: usize = 4 * line::MOST_BYTES;
/// How long a writer waits for one with another state directory. Whoever may read the record could hold this lock, so it is not
/// waited for long.
const SHORT_PATIENCE: Duration = Duration::from_millis(500);

/// The latest record of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Its number.
    pub seq: u64,
    /// Its hash: SHA-256 of the line without its end.
    #[serde(with = "hex")]
    pub hash: Digest,
    /// Seconds since 1970-01-01 UTC.
    pub time: u64,
}

impl Head {
    /// Of a line, which has been read as this link.
    pub(super) fn of(line: &[u8], link: &Link) -> Self {
        Self { seq: link.seq, hash: sha256(line), time: link.time }
    }
}

/// The record of this host, to which nobody else appends while this is held.
pub struct Chain {
    path: PathBuf,
    log: File,
    /// The head, in the state directory; `None` where that cannot be written.
    kept: Option<Flock<File>>,
    _log_lock: Option<Flock<File>>,
    head: Option<Head>,
    end: End,
}

/// How a file ends.
#[derive(Clone, Copy, Default)]
struct End {
    is_empty: bool,
    /// There is no newline after the last line.
    is_open: bool,
    /// And that line is not a record: a write that was not finished.
    is_torn: bool,
}

impl Chain {
    /// Opens the record, and makes it if there is none.
    pub fn open(config: &Config) -> Result<Self, AuditError> {
        let path = &*config.audit.file;
        Self::open_at(config, path).map_err(|source| AuditError { action: "write", path: path.to_owned(), source })
    }

    fn open_at(config: &Config, path: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder_of(path))?;
        let kept = hold(config)?;
        let log = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let log_lock = lock::lock_open(log.try_clone()?, path, SHORT_PATIENCE).ok();
        let (mut last, mut end) = last(&log)?;
        if end.is_empty {
            (last, end.is_torn) = newest_rotated(path);
        }
        let head = latest(kept.as_deref().and_then(read_head), last);
        Ok(Self { path: path.to_owned(), log, kept, _log_lock: log_lock, head, end })
    }

    /// The latest record, if there is one.
    pub fn head(&self) -> Option<Head> {
        self.head
    }

    /// Appends a record.
    pub fn append(&mut self, event: &Event<'_>) -> Result<Head, AuditError> {
        self.write(event).map_err(|source| AuditError { action: "write", path: self.path.clone(), source })
    }

    fn write(&mut self, event: &Event<'_>) -> io::Result<Head> {
        let (seq, prev) = self.head.map_or((1, Digest::default()), |head| (head.seq.saturating_add(1), head.hash));
        let by = (clock::now(), nix::unistd::getuid().as_raw());
        let line = line::line(seq, &prev, by, self.end.is_torn, event)?;
        let start = if self.end.is_open { "\n" } else { "" };
        self.log.write_all(format!("{start}{line}").as_bytes())?;
        // What is no file, /dev/null for one, has nothing to flush.
        if self.log.metadata()?.is_file() {
            self.log.sync_data()?;
        }
        let head = Head { seq, hash: sha256(line.trim_end_matches('\n').as_bytes()), time: by.0 };
        (self.head, self.end) = (Some(head), End::default());
        self.keep(&head);
        Ok(head)
    }

    /// The record is written: that its head is not kept is a warning.
    fn keep(&self, head: &Head) {
        let Some(file) = &self.kept else { return };
        let keep = || {
            let line = serde_json::to_string(head)? + "\n";
            file.write_all_at(line.as_bytes(), 0)?;
            file.set_len(line.len() as u64)
        };
        keep().unwrap_or_else(not_kept);
    }
}

fn not_kept(error: io::Error) {
    tracing::warn!("the state directory does not keep the head of the audit record: {}", chain(&error));
}

/// The head that the state directory keeps, and the lock that goes with it; none if nothing was recorded yet.
pub(super) fn kept(config: &Config) -> Result<(Option<Flock<File>>, Option<Head>), AuditError> {
    let Some(path) = head_file(config).filter(|path| path.exists()) else { return Ok((None, None)) };
    let failed = |source| AuditError { action: "read the head of", path: config.audit.file.to_path_buf(), source };
    let held = lock::lock(&path, lock::PATIENCE).map_err(failed)?;
    let head = read_head(&held);
    Ok((Some(held), head))
}

/// Waits for other writers, with an end. A record is worth more than its head: without a state directory it is written, too.
fn hold(config: &Config) -> io::Result<Option<Flock<File>>> {
    let hold = || {
        let path = head_file(config).ok_or(io::ErrorKind::NotFound)?;
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder_of(&path))?;
        lock::lock(&path, lock::PATIENCE)
    };
    match hold() {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err(error),
        Err(error) => {
            not_kept(error);
            Ok(None)
        }
        held => held.map(Some),
    }
}

/// Named after the record, since several configurations may share a state directory.
fn head_file(config: &Config) -> Option<PathBuf> {
    let file = &config.audit.file;
    let path = folder_of(file).canonicalize().ok()?.join(file.file_name()?);
    let name = hex::encode(&sha256(path.as_os_str().as_encoded_bytes())[..8]);
    Some(config.state.join("audit").join(name))
}

/// `None` if the file is new, or was damaged.
fn read_head(file: &File) -> Option<Head> {
    let mut bytes = [0; 256];
    let read = file.read_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(bytes[..read].split(|byte| *byte == b'\n').next()?).ok()
}

/// The later one; the kept one if a line with the same number says something else, so that an edit is found.
fn latest(kept: Option<Head>, last: Option<Head>) -> Option<Head> {
    match (kept, last) {
        (Some(kept), Some(last)) if last.seq > kept.seq => Some(last),
        (kept, last) => kept.or(last),
    }
}

/// The last record in a file, and how the file ends. Only the end of the file is read.
fn last(file: &File) -> io::Result<(Option<Head>, End)> {
    let size = file.metadata()?;
    let size = if size.is_file() { size.len() } else { 0 };
    let mut bytes = vec![0; WINDOW.min(usize::try_from(size).unwrap_or(WINDOW))];
    let from = size - bytes.len() as u64;
    // logrotate may have truncated it meanwhile.
    let read = file.read_at(&mut bytes, from)?;
    bytes.truncate(read);
    let mut lines = bytes.split(|byte| *byte == b'\n').rev();
    let record = |line: &[u8]| Link::of(line).map(|link| Head::of(line, &link));
    // After the last newline.
    let rest = lines.next().unwrap_or_default();
    let of_rest = record(rest);
    let is_open = !rest.is_empty();
    let end = End { is_empty: read == 0, is_open, is_torn: is_open && of_rest.is_none() };
    Ok((of_rest.or_else(|| lines.find_map(record)), end))
}

/// The last record of those that logrotate has put elsewhere, and whether a torn line follows it.
fn newest_rotated(path: &Path) -> (Option<Head>, bool) {
    let ends = rotated(path).into_iter().filter_map(|path| last(&File::open(path).ok()?).ok());
    let newest = ends.max_by_key(|(head, _)| head.map(|head| head.seq));
    newest.map_or((None, false), |(head, end)| (head, end.is_torn))
}

/// Files that logrotate has made of a record: its name with `.1` or `-20261127`, and not compressed.
pub fn rotated(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    let is_rotated = |path: &PathBuf| {
        let rest = path.file_name().and_then(|other| other.as_encoded_bytes().strip_prefix(name)).unwrap_or_default();
        let is_number = |rest: &[u8]| rest.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'-' | b'.'));
        matches!(rest, [b'.' | b'-', number @ ..] if !number.is_empty() && is_number(number)) && path.is_file()
    };
    let entries = fs::read_dir(folder_of(path)).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(is_rotated).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::unlock::audit::verify::{Files, Verdict, Verifier};

    struct Host {
        folder: tempfile::TempDir,
        config: Config,
    }

    impl Host {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let mut config = Config::parse("", "c.toml".as_ref()).unwrap();
            config.audit.file = folder.path().join("audit").into();
            config.state = folder.path().join("state").into();
            Self { folder, config }
        }

        fn log(&self) -> PathBuf {
            self.folder.path().join("audit")
        }

        fn append(&self) -> Head {
            Chain::open(&self.config).unwrap().append(&Event { action: "test", ..Event::default() }).unwrap()
        }

        fn verdict(&self) -> Verdict {
            let files = Files::of(&self.config, &[]).unwrap();
            let anchor =
                |head: Head| super::super::verify::Anchor { kept_in: "s".to_owned(), seq: head.seq, hash: head.hash };
            let anchors = files.head.map(anchor).into_iter().collect();
            files.verify(Verifier::new(anchors, None)).unwrap()
        }
    }

    #[test]
    fn the_chain_goes_on_in_the_next_file_with_or_without_the_state_directory() {
        let host = Host::new();
        for seq in 1..=3 {
            assert_eq!(host.append().seq, seq);
        }
        fs::rename(host.log(), host.log().with_extension("1")).unwrap();
        assert_eq!(host.append().seq, 4, "by the state directory");
        fs::rename(host.log().with_extension("1"), host.log().with_extension("2")).unwrap();
        fs::rename(host.log(), host.log().with_extension("1")).unwrap();
        fs::remove_dir_all(&*host.config.state).unwrap();
        for other in ["3.gz", "bak", ""] {
            fs::write(format!("{}.{other}", host.log().display()), "no record\n").unwrap();
        }
        File::create(host.log()).unwrap();
        assert_eq!(host.append().seq, 5, "by the newest file");
        let verdict = host.verdict();
        assert_eq!((verdict.faults(), verdict.records), (0, 5), "{verdict:?}");
        assert_eq!(verdict.fit[0].seq, 5);
    }

    #[test]
    fn what_was_cut_or_changed_is_not_taken_up_into_the_chain() {
        for change in [|text: &str| text[..text.len() / 2].to_owned(), |text: &str| text.replace("test", "rest")] {
            let host = Host::new();
            host.append();
            let head = host.append();
            fs::write(host.log(), change(&fs::read_to_string(host.log()).unwrap())).unwrap();
            assert!(host.verdict().faults() > 0);
            assert_eq!(host.append().seq, head.seq + 1);
            assert!(host.verdict().faults() > 0);
        }
    }

    #[test]
    fn a_torn_line_is_left_behind_and_told() {
        let host = Host::new();
        host.append();
        let mut text = fs::read(host.log()).unwrap();
        text.extend(b"{\"seq\":2,\"prev\":\"ab");
        fs::write(host.log(), text).unwrap();
        assert_eq!((host.append().seq, host.append().seq), (2, 3));
        let verdict = host.verdict();
        assert_eq!((verdict.faults(), verdict.torn.len(), verdict.records), (0, 1, 3), "{verdict:?}");
        // A record of which only the newline is missing is one.
        let text = fs::read(host.log()).unwrap();
        fs::write(host.log(), &text[..text.len() - 1]).unwrap();
        assert_eq!(host.append().seq, 4);
        let verdict = host.verdict();
        assert_eq!((verdict.faults(), verdict.torn.len(), verdict.records), (0, 1, 4), "{verdict:?}");
    }

    /// kill -9 between the record and its head: the head is one behind.
    #[test]
    fn a_head_that_was_not_kept_in_time_or_is_damaged_is_caught_up() {
        let host = Host::new();
        host.append();
        let kept = head_file(&host.config).unwrap();
        let behind = fs::read(&kept).unwrap();
        host.append();
        for head in [&behind[..], b"", &[0; 300], b"{\"seq\":"] {
            fs::write(&kept, head).unwrap();
            host.append();
            assert_eq!(host.verdict().faults(), 0);
        }
        // And logrotate in between.
        fs::write(&kept, &behind).unwrap();
        fs::rename(host.log(), host.log().with_extension("1")).unwrap();
        assert_eq!(host.append().seq, 7);
        assert_eq!(host.verdict().faults(), 0);
    }

    #[test]
    fn a_state_directory_that_cannot_be_written_does_not_keep_a_record_from_being_written() {
        let host = Host::new();
        fs::write(&*host.config.state, "a file").unwrap();
        assert_eq!((host.append().seq, host.append().seq), (1, 2));
        assert_eq!((host.verdict().faults(), host.verdict().records), (0, 2));
    }

    #[test]
    fn a_writer_waits_for_the_other_and_threads_make_one_chain() {
        let host = Host::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10).for_each(|_| assert!(host.append().seq > 0)));
            }
        });
        let verdict = host.verdict();
        assert_eq!((verdict.faults(), verdict.records), (0, 40), "{verdict:?}");
    }
}
