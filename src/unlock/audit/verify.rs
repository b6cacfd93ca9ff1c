//! The reader's side of the chain: finds what was cut, edited, taken out or put elsewhere, and compares the chain with its anchors.

use std::{
    fs::{self, OpenOptions},
    io::{self, BufRead, BufReader, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::libc;
use serde::{Deserialize, Serialize};

use super::{AuditError, Digest, Head, MOST_BYTES, chain, line::Link, rotated};
use crate::{base::hex, config::Config};

/// The most faults, and the most unfinished lines, that are told one by one.
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

/// The latest of the records that anchors in one place are of, and which are as they were then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fit {
    /// As in [`Anchor`].
    pub kept_in: String,
    /// The record. Where the chain is unbroken, all before it are what they were, too.
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
    pub fit: Vec<Fit>,
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
    /// What the TPM's index has, if it was asked.
    tpm: Option<Option<Digest>>,
    /// The last record that was anchored there: what the index had before and since then.
    tpm_said: Option<(u64, [Digest; 2])>,
    /// The one that the index fits.
    tpm_fits: Option<u64>,
}

#[derive(Clone, PartialEq)]
enum Found {
    Not,
    Same,
    Other(String, u64),
}

impl Verifier {
    /// Compares with these anchors; and with what the TPM's index has, if it was asked.
    pub fn new(mut anchors: Vec<Anchor>, tpm: Option<Option<Digest>>) -> Self {
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
            if are_torn && self.verdict.torn.len() < MOST_TOLD {
                self.verdict.torn.push(at.remark("an unfinished line: the chain goes on after it".to_owned()));
            } else if !are_torn {
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
        if let Some(extended) = link.extended(&head.hash) {
            self.follow_tpm(head.seq, extended);
        }
    }

    /// Whoever writes the record anew can anchor it anew, too; but what the index had before is then of no record.
    fn follow_tpm(&mut self, seq: u64, [before, since]: [Digest; 2]) {
        let is_known = match self.tpm_said {
            // An anchor that did not reach the TPM has changed nothing there.
            Some((_, last)) => last.contains(&before),
            None => before == Digest::default(),
        };
        let starts_later = self.tpm_said.is_none() && self.verdict.first.is_some_and(|first| first > 1);
        if !is_known && before == Digest::default() {
            self.verdict.not_compared.truncate(MOST_TOLD);
            let what = format!("what the TPM had before record {seq}: its index was made anew then");
            self.verdict.not_compared.push(what);
        } else if !is_known && !starts_later {
            let what = format!("when record {seq} was anchored, the TPM had the anchor of a record that is not here");
            self.verdict.fault(&self.at, what);
        }
        self.tpm_said = Some((seq, [before, since]));
        if self.tpm == Some(Some(since)) {
            self.tpm_fits = Some(seq);
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
        match (self.tpm, self.tpm_fits, self.tpm_said) {
            (Some(Some(_)), Some(seq), _) => self.verdict.fit.push(Fit { kept_in: "the TPM".to_owned(), seq }),
            (Some(Some(_)), None, _) => {
                let what = "no record up to this one is that of the TPM's last anchor, as it was then".to_owned();
                self.verdict.fault(&end, what);
            }
            (Some(None), _, Some((seq, _))) => {
                let what = format!("record {seq} was anchored in the TPM, which has no anchor now");
                self.verdict.fault(&end, what);
            }
            (Some(None), _, None) | (None, _, _) => {}
        }
        if let Some(first) = self.verdict.first.filter(|first| *first > 1) {
            self.verdict.not_compared.push(format!("the records before {first}, which are not in these files"));
        }
        self.verdict
    }

    fn judge(&mut self, anchor: Anchor, found: Found, end: &Position) {
        let Anchor { kept_in, seq, .. } = anchor;
        let (first, last) = (self.verdict.first, self.verdict.last.map(|last| last.seq));
        match found {
            Found::Same => {
                let known = self.verdict.fit.iter_mut().find(|known| known.kept_in == kept_in);
                match known {
                    // They come by number.
                    Some(known) => known.seq = seq,
                    None => self.verdict.fit.push(Fit { kept_in, seq }),
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
                let what = format!("{kept_in}, which has record {seq} and others before these");
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

/// The files to verify, in order, as they are when they are opened.
pub struct Files {
    opened: Vec<(PathBuf, Option<Opened>)>,
    /// The record of the configuration is the last of them, so all anchors of this host have to fit.
    pub end_here: bool,
    /// What the state directory has, if they end here.
    pub head: Option<Head>,
}

type Opened = BufReader<io::Take<fs::File>>;

impl Files {
    /// Those that are named; without any, the record of the configuration and what logrotate has made of it before. Nobody
    /// appends until all are opened.
    pub fn of(config: &Config, named: &[PathBuf]) -> Result<Self, AuditError> {
        let own = &*config.audit.file;
        let end_here = named.last().is_none_or(|last| is_same(last, own));
        let (_lock, head) = if end_here { chain::kept(config)? } else { (None, None) };
        let paths = if named.is_empty() { with_rotated(own) } else { named.to_vec() };
        let mut opened = Vec::new();
        for path in paths {
            let file = match open(&path) {
                // Nothing was recorded yet; or else an anchor says so.
                Err(error) if named.is_empty() && error.kind() == io::ErrorKind::NotFound => None,
                file => Some(file.map_err(|source| AuditError { action: "read", path: path.clone(), source })?),
            };
            opened.push((path, file));
        }
        Ok(Self { opened, end_here, head })
    }

    /// Reads them all.
    pub fn verify(self, mut verifier: Verifier) -> Result<Verdict, AuditError> {
        for (path, file) in self.opened {
            let failed = |source| AuditError { action: "read", path: path.clone(), source };
            match file {
                Some(mut file) => verifier.read(&path, &mut file).map_err(failed)?,
                None => verifier.at.file = path.display().to_string(),
            }
        }
        Ok(verifier.end())
    }
}

/// A file as it is now: what is appended meanwhile is not read.
fn open(path: &Path) -> io::Result<Opened> {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::Event, *};
    use crate::unlock::audit::line::line;

    /// Records from number 1 on.
    fn written(count: u64) -> Vec<String> {
        let (mut lines, mut prev) = (Vec::new(), Digest::default());
        for seq in 1..=count {
            let line =
                line(seq, &prev, (1000 + seq, 0), false, &Event { action: "attach", ..Event::default() }).unwrap();
            prev = openssl::sha::sha256(line.trim_end().as_bytes());
            lines.push(line);
        }
        lines
    }

    fn anchor_of(lines: &[String], seq: u64) -> Anchor {
        let hash = openssl::sha::sha256(lines[seq as usize - 1].trim_end().as_bytes());
        Anchor { kept_in: "a".to_owned(), seq, hash }
    }

    fn verdict(anchors: Vec<Anchor>, files: &[&[u8]]) -> Verdict {
        let mut verifier = Verifier::new(anchors, None);
        for (number, &(mut file)) in files.iter().enumerate() {
            verifier.read(number.to_string().as_ref(), &mut file).unwrap();
        }
        verifier.end()
    }

    fn faults(anchors: Vec<Anchor>, lines: &[String]) -> Vec<String> {
        let verdict = verdict(anchors, &[lines.concat().as_bytes()]);
        verdict.faults.into_iter().map(|fault| format!("{}: {}", fault.line, fault.what)).collect()
    }

    #[test]
    fn finds_what_was_done_to_the_lines_and_says_where() {
        let good = written(6);
        assert!(faults(vec![anchor_of(&good, 6), anchor_of(&good, 2)], &good).is_empty());
        let changed = |change: &dyn Fn(&mut Vec<String>)| {
            let mut lines = good.clone();
            change(&mut lines);
            faults(vec![anchor_of(&good, 6)], &lines)
        };
        let edited = |lines: &mut Vec<String>, at: usize| lines[at] = lines[at].replace("attach", "detach");
        assert_eq!(changed(&|lines| edited(lines, 2)), ["3: record 3 is not what it was when record 4 was written"]);
        assert_eq!(changed(&|lines| edited(lines, 5)), ["6: record 6 is not the one that a has"]);
        assert_eq!(changed(&|lines| drop(lines.remove(1))), ["2: record 2 is missing before this one"]);
        assert_eq!(changed(&|lines| drop(lines.drain(1..4))), ["2: records 2 to 4 are missing before this one"]);
        assert_eq!(changed(&|lines| drop(lines.pop())), ["5: the end is missing: a has record 6"]);
        assert_eq!(changed(&|lines| lines.clear()), ["0: the end is missing: a has record 6"]);
        assert_eq!(
            changed(&|lines| lines.swap(2, 3)),
            ["3: record 3 is missing before this one", "4: record 3 stands after record 4"]
        );
        assert_eq!(changed(&|lines| lines.insert(2, lines[0].clone())), ["3: record 1 stands after record 2"]);
        assert_eq!(changed(&|lines| lines.insert(2, "{}\n".to_owned())), ["3: this line is not a record"]);
        assert_eq!(changed(&|lines| lines.insert(2, "x".repeat(5000) + "\n")), ["3: this line is not a record"]);
        assert_eq!(changed(&|lines| lines[0] = lines[0].replace("prev\":\"0", "prev\":\"1")).len(), 2);
    }

    #[test]
    fn files_follow_each_other_and_the_first_may_be_gone() {
        let lines = written(9);
        let parts = [lines[..3].concat(), lines[3..6].concat(), lines[6..].concat()];
        let [a, b, c] = [parts[0].as_bytes(), parts[1].as_bytes(), parts[2].as_bytes()];
        assert_eq!(verdict(vec![anchor_of(&lines, 2)], &[a, b, c]).fit, [Fit { kept_in: "a".to_owned(), seq: 2 }]);
        let later = verdict(vec![anchor_of(&lines, 2)], &[b, c]);
        assert_eq!((later.faults(), later.first, later.records), (0, Some(4), 6));
        assert_eq!(later.not_compared.len(), 2, "{later:?}");
        assert_eq!(verdict(vec![], &[a, c]).faults[0].what, "records 4 to 6 are missing before this one");
        assert_eq!(verdict(vec![], &[b, a, c]).faults.len(), 1, "a file in the wrong place is one fault");
    }

    #[test]
    fn an_unfinished_line_is_one_only_where_the_next_record_says_so() {
        let good = written(2);
        let hash = openssl::sha::sha256(good[1].trim_end().as_bytes());
        let third = |torn| line(3, &hash, (0, 0), torn, &Event { action: "attach", ..Event::default() }).unwrap();
        for (next, faults) in [(third(true), 0), (third(false), 1)] {
            let verdict = verdict(vec![], &[format!("{}{{\"seq\":3,\n{next}", good.concat()).as_bytes()]);
            assert_eq!((verdict.faults(), verdict.torn.len(), verdict.records), (faults, 1 - faults as usize, 3));
        }
        let at_the_end = |rest: &str| verdict(vec![], &[(good.concat() + rest).as_bytes()]);
        assert_eq!((at_the_end("{\"seq\":3,").faults(), at_the_end("{\"seq\":3,\n").faults()), (0, 1));
        assert_eq!(at_the_end("x\n{\"seq\":3,").faults(), 1);
        assert_eq!(at_the_end(third(false).trim_end()).records, 3, "only its end is missing");
    }

    #[test]
    fn the_tpm_knows_the_records_that_it_was_extended_by() {
        // Three lines, of which the last two are anchored in an index that has this.
        let anchored = |mut value: Digest| {
            let mut lines = written(1);
            for seq in 2..=3 {
                let prev = openssl::sha::sha256(lines[seq - 2].trim_end().as_bytes());
                let event = Event { action: "anchor", tpm: Some(hex::encode(&value)), ..Event::default() };
                lines.push(line(seq as u64, &prev, (0, 0), false, &event).unwrap());
                let hash = openssl::sha::sha256(lines[seq - 1].trim_end().as_bytes());
                value = openssl::sha::sha256(&[value, hash].concat());
            }
            (lines, value)
        };
        let verdict = |lines: &[String], tpm| {
            let mut verifier = Verifier::new(vec![], tpm);
            verifier.read("f".as_ref(), &mut lines.concat().as_bytes()).unwrap();
            verifier.end()
        };
        let (lines, value) = anchored(Digest::default());
        let good = verdict(&lines, Some(Some(value)));
        assert_eq!((good.faults(), good.fit), (0, vec![Fit { kept_in: "the TPM".to_owned(), seq: 3 }]));
        assert_eq!(verdict(&lines, None).faults(), 0);
        assert!(verdict(&lines, Some(None)).faults[0].what.contains("has no anchor now"));
        assert!(verdict(&lines[..2], Some(Some(value))).faults[0].what.contains("the TPM's last anchor"));
        // The first anchors are gone with their files, or were never there.
        assert_eq!(verdict(&lines[2..], Some(Some(value))).faults(), 0);
        let (forged, forged_value) = anchored(value);
        let told = verdict(&forged, Some(Some(forged_value)));
        assert_eq!(told.faults.len(), 1);
        assert!(told.faults[0].what.contains("of a record that is not here"), "{told:?}");
        // The owner has removed the index and made it anew.
        let again: Vec<_> = [lines.clone(), {
            let prev = openssl::sha::sha256(lines[2].trim_end().as_bytes());
            let event = Event { action: "anchor", tpm: Some(hex::encode(&[0; 32])), ..Event::default() };
            vec![line(4, &prev, (0, 0), false, &event).unwrap()]
        }]
        .concat();
        let told = verdict(&again, None);
        assert_eq!((told.faults(), told.not_compared.len()), (0, 1), "{told:?}");
    }

    proptest! {
        /// One byte that is another one is found, wherever it is: an anchor is of the last record.
        #[test]
        fn no_change_of_a_byte_goes_unnoticed(at in 0_usize..800, other in 0_u8..=255) {
            let lines = written(5);
            let mut bytes = lines.concat().into_bytes();
            let at = at % bytes.len();
            prop_assume!(bytes[at] != other);
            bytes[at] = other;
            prop_assert!(verdict(vec![anchor_of(&lines, 5)], &[&bytes]).faults() > 0 || at == bytes.len() - 1);
        }
    }
}
