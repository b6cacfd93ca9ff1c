//! The reader's side of the chain: finds what was cut, edited, taken out or put elsewhere, and compares the chain with its anchors.

use std::{
    fs::{self, OpenOptions},
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{fcntl::Flock, libc};
use serde::{Deserialize, Serialize};

use super::{AuditError, Digest, Head, MOST_BYTES, chain, line::Link, rotated};
use crate::{base::hex, config::Config};

/// The most faults that are told one by one.
const MOST_TOLD: usize = 100;

/// A head that is kept elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anchor {
    /// "the state directory", "the journal", a file.
    pub kept_in: String,
    pub seq: u64,
    pub hash: Digest,
}

/// A line of a file of anchors: what `audit anchor --json` prints, which has more members.
#[derive(Deserialize)]
struct AnchorLine {
    seq: u64,
    #[serde(with = "hex")]
    hash: Digest,
}

/// Something about a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Remark {
    /// The file.
    pub file: String,
    /// Its line, from 1 on.
    pub line: u64,
    /// "record 7 is missing before this one", ...
    pub what: String,
}

/// An anchor's latest record that is in the files, as it was when it was anchored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Confirmed {
    /// As in [`Anchor`].
    pub kept_in: String,
    /// The record: it and all before it are what they were.
    pub seq: u64,
}

/// What is to be said of a record.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verdict {
    /// How many records there are.
    pub records: u64,
    /// The number of the first one.
    pub first: Option<u64>,
    /// The last one.
    pub last: Option<Head>,
    /// What is wrong.
    pub faults: Vec<Remark>,
    /// How many more faults there are.
    pub more_faults: u64,
    /// Lines that a loss of power left unfinished.
    pub torn: Vec<Remark>,
    /// Which anchors fit.
    pub confirmed: Vec<Confirmed>,
    /// What was not compared, and why.
    pub not_compared: Vec<String>,
}

impl Verdict {
    /// How many faults there are.
    pub fn faults(&self) -> u64 {
        self.faults.len() as u64 + self.more_faults
    }

    fn fault(&mut self, at: &Position, what: String) {
        if self.faults.len() < MOST_TOLD {
            self.faults.push(at.remark(what));
        } else {
            self.more_faults += 1;
        }
    }
}

#[derive(Clone, Default)]
struct Position {
    file: String,
    line: u64,
}

impl Position {
    fn remark(&self, what: String) -> Remark {
        Remark { file: self.file.clone(), line: self.line, what }
    }
}

/// Reads files of one chain, in order.
#[derive(Default)]
pub struct Verifier {
    verdict: Verdict,
    at: Position,
    /// The last record that stands where it should, and where that is.
    last: Option<(Head, Position)>,
    /// The last one that does not.
    stray: Option<Head>,
    /// Lines that are no records; whether they are torn ones tells the record that follows.
    pending: Vec<Position>,
    /// There is no newline after the last line.
    is_open: bool,
    /// By number.
    anchors: Vec<(Anchor, Found)>,
    /// What the TPM's index has.
    tpm: Option<Digest>,
    tpm_record: Option<u64>,
}

#[derive(Clone, PartialEq)]
enum Found {
    Not,
    Same,
    Other(String, u64),
}

impl Verifier {
    /// Compares with these anchors, and with what the TPM's index has.
    pub fn new(mut anchors: Vec<Anchor>, tpm: Option<Digest>) -> Self {
        anchors.sort_by_key(|anchor| anchor.seq);
        let anchors = anchors.into_iter().map(|anchor| (anchor, Found::Not)).collect();
        Self { anchors, tpm, ..Self::default() }
    }

    /// Reads the next file.
    pub fn read(&mut self, name: &Path, from: &mut dyn BufRead) -> io::Result<()> {
        self.at = Position { file: name.display().to_string(), line: 0 };
        let mut line = Vec::new();
        loop {
            line.clear();
            // One byte more than a line has, so that a longer one is told from it.
            if (&mut *from).take(MOST_BYTES as u64 + 1).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            self.is_open = line.pop_if(|end| *end == b'\n').is_none();
            self.at.line += 1;
            if self.is_open && line.len() > MOST_BYTES {
                skip_line(from)?;
            }
            match Link::of(&line) {
                Some(link) => self.record(Head::of(&line, &link), &link),
                None => self.no_record(),
            }
        }
    }

    fn no_record(&mut self) {
        if self.pending.len() < MOST_TOLD {
            self.pending.push(self.at.clone());
        } else {
            self.verdict.more_faults += 1;
        }
    }

    fn record(&mut self, head: Head, link: &Link) {
        self.judge_pending(link.torn);
        self.verdict.records += 1;
        self.verdict.first.get_or_insert(head.seq);
        self.compare(&head, link);
        let before = self.last.take();
        let follows = |before: &Head| before.seq.checked_add(1) == Some(head.seq);
        let links = |before: &Head| follows(before) && before.hash == link.prev;
        let is_on_stray = self.stray.as_ref().is_some_and(links);
        let is_later = before.as_ref().is_none_or(|(before, _)| head.seq > before.seq);
        match &before {
            _ if is_on_stray => {}
            None if head.seq == 1 && link.prev != Digest::default() => {
                self.verdict.fault(&self.at, "the first record carries the hash of one before it".to_owned());
            }
            None => {}
            Some((before, _)) if links(before) => {}
            Some((before, at)) if follows(before) => {
                let what = format!("record {} is not what it was when record {} was written", before.seq, head.seq);
                self.verdict.fault(at, what);
            }
            Some((before, _)) if is_later => {
                let what = match (before.seq + 1, head.seq - 1) {
                    (first, last) if first == last => format!("record {first} is missing before this one"),
                    (first, last) => format!("records {first} to {last} are missing before this one"),
                };
                self.verdict.fault(&self.at, what);
            }
            Some((before, _)) => {
                let what = format!("record {} stands after record {}", head.seq, before.seq);
                self.verdict.fault(&self.at, what);
            }
        }
        if is_later {
            (self.last, self.stray) = (Some((head, self.at.clone())), None);
        } else {
            (self.last, self.stray) = (before, Some(head));
        }
    }

    fn judge_pending(&mut self, are_torn: bool) {
        for at in std::mem::take(&mut self.pending) {
            if are_torn {
                self.verdict.torn.push(at.remark("an unfinished line: the chain goes on after it".to_owned()));
            } else {
                self.verdict.fault(&at, "this line is not a record".to_owned());
            }
        }
    }

    fn compare(&mut self, head: &Head, link: &Link) {
        let from = self.anchors.partition_point(|(anchor, _)| anchor.seq < head.seq);
        for (anchor, found) in self.anchors[from..].iter_mut().take_while(|(anchor, _)| anchor.seq == head.seq) {
            if anchor.hash == head.hash {
                *found = Found::Same;
            } else if *found == Found::Not {
                *found = Found::Other(self.at.file.clone(), self.at.line);
            }
        }
        if self.tpm.is_some() && link.extended(&head.hash) == self.tpm {
            self.tpm_record = Some(head.seq);
        }
    }

    /// What is to be said. A line that the last write has not finished is no fault: the next record tells of it.
    pub fn end(mut self) -> Verdict {
        let unfinished = if self.is_open { self.pending.pop() } else { None };
        self.judge_pending(false);
        self.pending.extend(unfinished);
        self.judge_pending(true);
        self.verdict.last = self.last.as_ref().map(|(head, _)| *head);
        let end = self.last.take().map_or(self.at.clone(), |(_, at)| at);
        for (anchor, found) in std::mem::take(&mut self.anchors) {
            self.judge(anchor, found, &end);
        }
        match (self.tpm, self.tpm_record) {
            (Some(_), Some(seq)) => {
                self.verdict.confirmed.push(Confirmed { kept_in: "the TPM".to_owned(), seq });
            }
            (Some(_), None) => {
                let what = "no record up to this one is that of the TPM's last anchor, as it was then".to_owned();
                self.verdict.fault(&end, what);
            }
            (None, _) => {}
        }
        self.verdict
    }

    fn judge(&mut self, anchor: Anchor, found: Found, end: &Position) {
        let Anchor { kept_in, seq, .. } = anchor;
        let (first, last) = (self.verdict.first, self.verdict.last.map(|last| last.seq));
        match found {
            Found::Same => {
                let known = self.verdict.confirmed.iter_mut().find(|known| known.kept_in == kept_in);
                match known {
                    // They come by number.
                    Some(known) => known.seq = seq,
                    None => self.verdict.confirmed.push(Confirmed { kept_in, seq }),
                }
            }
            Found::Other(file, line) => {
                let what = format!("record {seq} is not the one that {kept_in} has");
                self.verdict.fault(&Position { file, line }, what);
            }
            Found::Not if last.is_none_or(|last| seq > last) => {
                self.verdict.fault(end, format!("the end is missing: {kept_in} has record {seq}"));
            }
            Found::Not if first.is_some_and(|first| seq < first) => {
                let what = format!("{kept_in} has record {seq}, which is in a file before these");
                // One for each place is enough.
                if !self.verdict.not_compared.iter().any(|told| told.starts_with(&kept_in)) {
                    self.verdict.not_compared.push(what);
                }
            }
            // That a record is missing has been told.
            Found::Not => {}
        }
    }
}

/// Reads on to the end of the line, which is longer than any record.
fn skip_line(from: &mut dyn BufRead) -> io::Result<()> {
    loop {
        let bytes = from.fill_buf()?;
        let (end, skipped) = match bytes.iter().position(|byte| *byte == b'\n') {
            Some(at) => (true, at + 1),
            None => (bytes.is_empty(), bytes.len()),
        };
        from.consume(skipped);
        if end {
            return Ok(());
        }
    }
}

/// The files to verify, in order.
pub struct Files {
    paths: Vec<PathBuf>,
    /// The record of the configuration is the last of them, so all anchors of this host have to fit.
    pub end_here: bool,
    /// What the state directory has, if they end here.
    pub head: Option<Head>,
    /// Nobody appends meanwhile.
    _lock: Option<Flock<fs::File>>,
}

impl Files {
    /// Those that are named; without any, the record of the configuration and what logrotate has made of it before.
    pub fn of(config: &Config, named: &[PathBuf]) -> Result<Self, AuditError> {
        let own = &*config.audit.file;
        let end_here = named.last().is_none_or(|last| is_same(last, own));
        let (lock, head) = if end_here { chain::kept(config) } else { (None, None) };
        let paths = if named.is_empty() { with_rotated(own) } else { named.to_vec() };
        Ok(Self { paths, end_here, head, _lock: lock })
    }

    /// Reads them all.
    pub fn verify(&self, mut verifier: Verifier) -> Result<Verdict, AuditError> {
        for path in &self.paths {
            let failed = |source| AuditError { action: "read", path: path.clone(), source };
            match open(path) {
                // Nothing was recorded yet; or else an anchor says so.
                Err(error) if self.end_here && self.paths.len() == 1 && error.kind() == io::ErrorKind::NotFound => {
                    verifier.at.file = path.display().to_string();
                }
                opened => verifier.read(path, &mut opened.map_err(failed)?).map_err(failed)?,
            }
        }
        Ok(verifier.end())
    }
}

/// A file as it is now: what is appended meanwhile is not read.
fn open(path: &Path) -> io::Result<BufReader<io::Take<fs::File>>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let size = file.metadata()?;
    if size.is_file() {
        Ok(BufReader::new(file.take(size.len())))
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a file"))
    }
}

fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    one == other || identity(one).is_some_and(|one| Some(one) == identity(other))
}

/// By the number of their first record. Empty ones have none to tell.
fn with_rotated(own: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = rotated(own).into_iter().map(|path| (first(&path), path)).collect();
    files.sort();
    let is_there = own.exists() || files.is_empty();
    let own = is_there.then(|| own.to_owned());
    files.into_iter().filter(|(first, _)| first.is_some()).map(|(_, path)| path).chain(own).collect()
}

fn first(path: &Path) -> Option<u64> {
    let mut line = Vec::new();
    open(path).ok()?.take(MOST_BYTES as u64).read_until(b'\n', &mut line).ok()?;
    // One whose beginning was damaged comes first, so that it is told.
    let record = line.strip_suffix(b"\n").unwrap_or(&line);
    if record.is_empty() { None } else { Some(Link::of(record).map_or(0, |link| link.seq)) }
}

/// The anchors in a file: lines that `audit anchor --json` has printed.
pub fn anchors_in(path: &Path) -> Result<Vec<Anchor>, AuditError> {
    let failed = |source| AuditError { action: "read the anchors of", path: path.to_owned(), source };
    let mut anchors = Vec::new();
    for line in open(path).map_err(failed)?.take(MOST_ANCHOR_BYTES).lines() {
        let line: AnchorLine = serde_json::from_str(&line.map_err(failed)?).map_err(|error| failed(error.into()))?;
        anchors.push(Anchor { kept_in: path.display().to_string(), seq: line.seq, hash: line.hash });
    }
    Ok(anchors)
}

/// The most that is read of a file of anchors.
const MOST_ANCHOR_BYTES: u64 = 16 << 20;
