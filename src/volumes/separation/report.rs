//! The report of a separation check: for people as a small tree, for machines as JSON.

use std::{fmt, path::PathBuf};

use serde::{Serialize, Serializer, ser::SerializeStruct};

use super::{
    disk::Leaf,
    lineage::Lineage,
    swap::{Swap, SwapKind},
    tree::{Node, Step},
    verdict::{Gap, SharedDevice, Verdict},
};
use crate::base::{
    chain::printable,
    key::{Location, Place, Replica},
};

/// What a separation check found.
///
/// As JSON it is `{"device", "verdict": "apart" | "shared" | "unproven", "evidence": [sentence...], "shared": [...],
/// "gaps": [...], "volume": {...}, "header": {...} | null, "places": [...], "swap": [...]}`; `shared` and `gaps` are always
/// there, and `gaps` has all of them, whatever the verdict. The `path` of a place is a path, `swift://HOST:PORT/DEVICE` for a
/// replica, and the service's name for what is elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    pub device: PathBuf,
    /// What the volume rests on.
    pub volume: Lineage,
    /// A detached header and what it rests on. It is shown, but it is a part of the volume, not of its key: it may be on
    /// either side.
    pub header: Option<(PathBuf, Lineage)>,
    /// The places of the key and what they rest on.
    pub places: Vec<(Place, Lineage)>,
    /// Where the kernel may write memory.
    pub swap: Vec<Swap>,
    pub verdict: Verdict,
    /// All that is not known, also if the verdict is `shared` for another reason.
    pub gaps: Vec<Gap>,
}

impl Report {
    /// The places of the key.
    pub fn key_places(&self) -> Vec<Place> {
        self.places.iter().map(|(place, _)| place.clone()).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_lineage(f, "volume", &self.device.display(), &self.volume)?;
        if let Some((path, lineage)) = &self.header {
            write_lineage(f, "detached header", &path.display(), lineage)?;
        }
        write_replicas(f, &self.places)?;
        write_places(f, &self.places)?;
        for swap in &self.swap {
            let what = match swap.kind {
                SwapKind::Pages => "swap",
                SwapKind::Hibernation => "hibernation image",
            };
            write_lineage(f, what, &swap.path.display(), &swap.lineage)?;
        }
        match &self.verdict.sentences()[..] {
            [only] => write!(f, "{}: {}", self.verdict.word(), printable(only)),
            sentences => {
                write!(f, "{}:", self.verdict.word())?;
                sentences.iter().try_for_each(|sentence| write!(f, "\n  {}", printable(sentence)))
            }
        }
    }
}

fn write_lineage(f: &mut fmt::Formatter<'_>, what: &str, at: &dyn fmt::Display, lineage: &Lineage) -> fmt::Result {
    writeln!(f, "{}", heading(what, at, lineage))?;
    write!(f, "{}", Below(lineage))
}

/// The replicas in an object store: each device once, with all that it has.
fn write_replicas(f: &mut fmt::Formatter<'_>, places: &[(Place, Lineage)]) -> fmt::Result {
    let mut devices: Vec<(Vec<String>, String)> = Vec::new();
    for (place, lineage) in places {
        let Location::Replica(Replica { ring, .. }) = &place.at else { continue };
        let (ring, below) = (ring.to_string(), Below(lineage).to_string());
        match devices.iter_mut().find(|(_, told)| *told == below) {
            Some((rings, _)) if rings.contains(&ring) => {}
            Some((rings, _)) => rings.push(ring),
            None => devices.push((vec![ring], below)),
        }
    }
    if !devices.is_empty() {
        writeln!(f, "sealed key  in Swift, whose replicas are")?;
    }
    devices.iter().try_for_each(|(rings, below)| write!(f, "  {}: {}", rings.join(", "), below.trim_start()))
}

/// The other places of the key: what they rest on is told once for all that rest on the same.
fn write_places(f: &mut fmt::Formatter<'_>, places: &[(Place, Lineage)]) -> fmt::Result {
    let mut groups: Vec<(Vec<String>, String)> = Vec::new();
    for (place, lineage) in places.iter().filter(|(place, _)| !matches!(place.at, Location::Replica(_))) {
        let (heading, below) = (heading(&place.what, &place.at, lineage), Below(lineage).to_string());
        match groups.iter_mut().find(|(_, told)| *told == below) {
            Some((headings, _)) if headings.contains(&heading) => {}
            Some((headings, _)) => headings.push(heading),
            None => groups.push((vec![heading], below)),
        }
    }
    for (headings, below) in groups {
        headings.iter().try_for_each(|heading| writeln!(f, "{heading}"))?;
        f.write_str(&below)?;
    }
    Ok(())
}

fn heading(what: &str, at: &dyn fmt::Display, lineage: &Lineage) -> String {
    printable(&match &lineage.tree.step {
        // The path itself is the heading.
        step @ Step::Path { .. } => format!("{what}  {step}"),
        _ => format!("{what}  {at}"),
    })
    .to_string()
}

/// What is written below the heading.
struct Below<'a>(&'a Lineage);

impl fmt::Display for Below<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tree = &self.0.tree;
        match &tree.step {
            Step::Path { .. } => tree.below.iter().try_for_each(|node| node.write(f, 2)),
            _ => tree.write(f, 2),
        }
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let shared: &[SharedDevice] = if let Verdict::Shared(devices) = &self.verdict { devices } else { &[] };
        let places: Vec<_> =
            self.places.iter().map(|(place, lineage)| Resting::new(Some(&place.what), &place.at, lineage)).collect();
        let mut report = serializer.serialize_struct("Report", 9)?;
        report.serialize_field("device", &self.device.display().to_string())?;
        report.serialize_field("verdict", self.verdict.word())?;
        report.serialize_field("evidence", &self.verdict.sentences())?;
        report.serialize_field("shared", shared)?;
        report.serialize_field("gaps", &self.gaps)?;
        report.serialize_field("volume", &Resting::new(None, self.device.display(), &self.volume))?;
        report.serialize_field(
            "header",
            &self.header.as_ref().map(|(path, lineage)| Resting::new(None, path.display(), lineage)),
        )?;
        report.serialize_field("places", &places)?;
        report.serialize_field("swap", &self.swap.iter().map(SwapEntry::from).collect::<Vec<_>>())?;
        report.end()
    }
}

/// A path and what it rests on, as JSON.
#[derive(Serialize)]
struct Resting<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    what: Option<&'a str>,
    path: String,
    devices: Vec<&'a Leaf>,
    tree: &'a Node,
}

impl<'a> Resting<'a> {
    fn new(what: Option<&'a str>, at: impl fmt::Display, lineage: &'a Lineage) -> Self {
        Self { what, path: at.to_string(), devices: lineage.leaves(), tree: &lineage.tree }
    }
}

/// A swap, as JSON.
#[derive(Serialize)]
struct SwapEntry<'a> {
    kind: SwapKind,
    encrypted: bool,
    #[serde(flatten)]
    resting: Resting<'a>,
}

impl<'a> From<&'a Swap> for SwapEntry<'a> {
    fn from(swap: &'a Swap) -> Self {
        let encrypted = swap.lineage.plain_leaves().is_empty() && swap.lineage.plain_gaps().is_empty();
        Self { kind: swap.kind, encrypted, resting: Resting::new(None, swap.path.display(), &swap.lineage) }
    }
}
