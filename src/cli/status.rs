//! `cryptattach status`

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::{
    Global,
    list::{self, Line},
    lockbox::{self as lockbox_lines, duration},
    output,
};
use crate::{
    base::clock::date,
    unlock::lockbox,
    verbs::{
        detach,
        error::Error,
        metrics,
        overview::{self, Latch, Overview},
        rotate::standing::{self, Rotation, Standing},
    },
    volumes::backend::{MappingStatus, ThisHost},
};

/// Show the state of this host, or of one volume: mapping, rotation of its key
///
/// Without a name, shows on one screen which volumes are attached, which stores answer, the lockbox and what of it
/// expires, whether the TPM's keys are shut until the next boot, and which timers run next.
#[derive(Args)]
#[command(after_help = "Examples:
  cryptattach status
  cryptattach status data
  cryptattach status data --json
  cryptattach status --metrics        write the metrics file of the configuration anew")]
pub struct Status {
    /// The mapping's name, its plaintext device, or the encrypted device
    #[arg(value_name = "NAME|DEVICE")]
    mapping: Option<String>,
    /// Write the metrics file for Prometheus anew, and print nothing
    #[arg(long, conflicts_with_all = ["mapping", "json"])]
    metrics: bool,
}

impl Status {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        if self.metrics {
            return metrics::renew(&global.config()?);
        }
        let Some(mapping) = &self.mapping else { return of_host(global) };
        let config = global.config().ok();
        let name = detach::named(&ThisHost, mapping)?;
        let status = match detach::status(&ThisHost, &name) {
            Ok(status) => status,
            Err(error @ Error::NotAttached(_)) => {
                let mut standings = config.iter().flat_map(standing::all);
                let standing = standings.find(|standing| standing.name.as_ref() == Some(&name));
                let standing = standing.ok_or(error)?;
                return output::print(global.json, &standing, || detached(&standing));
            }
            Err(error) => return Err(error),
        };
        let standing = config.and_then(|config| standing::of(&config, &status.source));
        let rotation = standing.map(|standing| standing.rotation.of_mapping(&status));
        let shown = Shown { status, rotation };
        output::print(global.json, &shown, || {
            let mut lines = text(&shown.status);
            lines.extend(shown.rotation.iter().map(|rotation| format!("  rotation     {rotation}")));
            lines
        })
    }
}

/// The whole host.
#[derive(Serialize)]
struct HostStatus {
    /// Version of what '--json' prints: docs/json.md.
    schema: u32,
    version: &'static str,
    configuration: PathBuf,
    volumes: Vec<Line>,
    #[serde(flatten)]
    overview: Overview,
}

fn of_host(global: &Global) -> Result<(), Error> {
    let config = global.config()?;
    let shown = HostStatus {
        schema: output::SCHEMA,
        version: env!("CARGO_PKG_VERSION"),
        configuration: config.path.clone(),
        volumes: list::lines(Some(&config))?,
        overview: overview::overview(&config),
    };
    output::print(global.json, &shown, || host_lines(&shown))
}

fn host_lines(shown: &HostStatus) -> Vec<String> {
    let HostStatus { version, configuration, volumes, overview, .. } = shown;
    let mut lines = vec![format!("cryptattach {version}, configured in {}", configuration.display()), String::new()];
    match volumes.is_empty() {
        true => lines.push("no volume is attached".to_owned()),
        false => lines.extend(list::table(volumes)),
    }
    lines.push(String::new());
    let stores = overview.stores.iter().map(|store| {
        let answer = match &store.why {
            None => format!("answers, in {:.0} ms", store.seconds * 1000.0),
            Some(why) => format!("DOES NOT ANSWER: {why}"),
        };
        [store.store.to_string(), store.place.clone(), answer]
    });
    lines.extend(output::table(["STORE", "PLACE", "STATE"], stores));
    lines.push(String::new());
    lines.push(format!("lockbox    {}", overview.lockbox.as_ref().map_or_else(|| "none".to_owned(), lockbox)));
    lines.extend(overview.lockbox.iter().flat_map(soonest));
    let latch = match &overview.latch {
        None => "no key of this host is in a TPM".to_owned(),
        Some(Latch::Latched) => "PCR 15 is extended: the TPM opens no key of this host until the next boot".to_owned(),
        Some(Latch::Open) => "PCR 15 is NOT extended: whoever is root may use the key in the TPM".to_owned(),
        Some(Latch::Unknown(why)) => format!("not known: {why}"),
    };
    lines.push(format!("TPM latch  {latch}"));
    lines.extend(overview.timers.iter().map(|timer| {
        let next = timer.next.map_or_else(|| "not planned".to_owned(), |next| format!("next on {}", date(next)));
        format!("timer      {} starts {}, {next}", timer.unit, timer.activates)
    }));
    lines.push(match overview.failures {
        0 => "failures   none since the last boot".to_owned(),
        failures => format!("failures   {failures} since the last boot: 'cryptattach explain' tells them"),
    });
    lines
}

fn lockbox(lockbox: &lockbox::Status) -> String {
    let state = if lockbox.open { "open" } else { "closed" };
    let soon = lockbox.entries.iter().filter_map(|entry| entry.expires_in_seconds).min();
    let soon = soon.map(|seconds| format!(", the first expires in {}", duration(seconds))).unwrap_or_default();
    let unusable = lockbox.entries.iter().filter(|entry| entry.why.is_some()).count();
    let unusable = if unusable > 0 { format!(", {unusable} of them NOT usable") } else { String::new() };
    format!("of '{}' {state}, {} entries{unusable}{soon}", lockbox.host, lockbox.entries.len())
}

/// The entries that expire first, as many as a screen has room for.
fn soonest(lockbox: &lockbox::Status) -> Vec<String> {
    const ROOM: usize = 5;
    let mut entries: Vec<_> = lockbox.entries.iter().collect();
    entries.sort_by_key(|entry| entry.expires_in_seconds);
    let mut lines: Vec<_> = entries.iter().take(ROOM).map(|entry| lockbox_lines::entry(entry)).collect();
    let more = entries.len().saturating_sub(ROOM);
    lines.extend((more > 0).then(|| format!("    and {more} more: 'cryptattach lockbox status' shows them")));
    lines
}

/// A mapping, and where the rotation of its volume's key stands.
#[derive(Serialize)]
pub struct Shown {
    #[serde(flatten)]
    pub status: MappingStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotation: Option<Rotation>,
}

fn detached(standing: &Standing) -> Vec<String> {
    vec![
        standing.name.as_ref().map_or_else(String::new, ToString::to_string) + "  (not attached)",
        format!("  source       {}", standing.source.display()),
        format!("  volume       LUKS {}", standing.volume),
        format!("  rotation     {}", standing.rotation),
    ]
}

fn text(status: &MappingStatus) -> Vec<String> {
    let volume = status.volume.map_or_else(|| "plain dm-crypt, no header".to_owned(), |uuid| format!("LUKS {uuid}"));
    let mut lines = vec![
        status.name.to_string(),
        format!("  device       {}", status.device.display()),
        format!("  source       {}", status.source.display()),
        format!("  volume       {volume}"),
        format!("  backend      {}", status.backend),
        format!(
            "  cipher       {}, {} bit key, {} byte sectors",
            status.cipher, status.key_size_bits, status.sector_size_bytes
        ),
        format!("  size         {} ({} bytes)", output::size(status.size_bytes), status.size_bytes),
        format!("  mode         {}", if status.read_only { "read-only" } else { "read and write" }),
    ];
    lines.extend(status.holders.iter().map(|holder| format!("  in use       {holder}")));
    lines.extend(status.trouble.iter().map(|trouble| format!("  trouble      {trouble}")));
    lines
}
