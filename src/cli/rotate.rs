//! `cryptattach key rotate ...`

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::{ArgGroup, Args};
use indicatif::{FormattedDuration, ProgressBar, ProgressStyle};
use serde_json::json;

use super::{AnswerOption, SeparationOptions, key::device_of, output, pace::Pace, words};
use crate::{
    base::{clock::date, key::StoreName},
    config::Config,
    verbs::{
        error::Error,
        new_passphrase,
        rotate::{
            self, How,
            container::{Event, Report, Undone},
        },
    },
    volumes::header::rekey,
};

/// Give a volume, or all of a container, new volume keys: encrypts all data anew, in place
///
/// The old and the new key are both stored until the end, and the header names both. SIGTERM or Ctrl-C pauses it (exit
/// code 83); the same command goes on, also after a crash and on another host. The old key stays in its store unless
/// --delete-old is given; it opens snapshots and copies from before. Discarded sectors become random data: run fstrim
/// afterwards.
///
/// A volume that dm-crypt has stays attached, and is used meanwhile. One that is mapped in userspace has to be detached.
///
/// With --passphrase the volume key stays: the keyslot of a volume formatted with --keyslot gets a new passphrase. The
/// volume may be attached. Whoever has an old header and the old passphrase still has the volume key.
#[derive(Args)]
#[command(group(ArgGroup::new("what").required(true).args(["device", "container"])))]
#[command(after_help = "Examples:
  cryptattach key rotate /dev/vdb
  cryptattach key rotate /dev/vdb --passphrase      a new passphrase for its keyslot
  cryptattach key rotate data --delete-old          the volume 'data' of the configuration
  cryptattach key rotate /dev/vdb --rate 50         leaves the disk to others: at most 50 MiB/s
  cryptattach key rotate --container keys           all volumes on this host whose keys are in the store 'keys'
  cryptattach key rotate --container keys --because-leaked")]
pub struct Rotate {
    /// The encrypted block device or file, or a name of [volumes.NAME]
    #[arg(value_name = "DEVICE|NAME", value_parser = words::device())]
    device: Option<PathBuf>,
    /// All volumes on this host whose headers name a key of this store, one after the other, the oldest key first. Those
    /// that are attached in userspace are left
    #[arg(long, value_name = "NAME")]
    container: Option<StoreName>,
    /// The keys may be known to others: delete each old key as soon as its volume has a new one, and begin with the most
    /// exposed volumes (those with a passphrase, which other programs are given)
    #[arg(long, conflicts_with = "device")]
    because_leaked: bool,
    /// Begin again: volumes that an unfinished rotation of the container has done get new keys once more
    #[arg(long, conflicts_with = "device")]
    anew: bool,
    /// Rotate the passphrase of the keyslot, and not the volume key
    #[arg(long, requires = "device", conflicts_with_all = ["delete_old", "drop_others", "hotzone", "rate"])]
    passphrase: bool,
    /// A detached LUKS header
    #[arg(long, value_name = "FILE", requires = "passphrase")]
    header: Option<PathBuf>,
    /// Delete the old key at the end: snapshots and copies from before cannot be opened any more
    #[arg(long)]
    delete_old: bool,
    /// Rotate although other keyslots and tokens become useless: a person's passphrase, clevis, systemd
    #[arg(long)]
    drop_others: bool,
    /// Re-encrypt no more than this many MiB in a second, for those who use the same disk
    #[arg(long, value_name = "MIB/S", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    rate: Option<u64>,
    /// Re-encrypt this many KiB between two updates of the header
    #[arg(long, value_name = "KIB", default_value_t = rekey::HOTZONE_BYTES / 1024, hide = true, value_parser = clap::value_parser!(u64).range(64..=1 << 20))]
    hotzone: u64,
    #[command(flatten)]
    pub(super) answer: AnswerOption,
    #[command(flatten)]
    separation: SeparationOptions,
}

impl Rotate {
    pub(super) fn run(&self, config: &Config, json: bool) -> Result<(), Error> {
        let how = How {
            drop_others: self.drop_others,
            delete_old: self.delete_old,
            hotzone_bytes: self.hotzone * 1024,
            bytes_per_second: self.rate.map(|mib| mib << 20),
            separation: self.separation.strictness(),
        };
        match (&self.device, &self.container) {
            (Some(device), _) if self.passphrase => self.passphrase(config, device, json),
            (Some(device), _) => Self::one(config, device, &how, json),
            (None, Some(container)) => self.all(config, container, how, json),
            (None, None) => Err(Error::Usage("name a volume, or a container with --container".to_owned())),
        }
    }

    fn one(config: &Config, given: &Path, how: &How, json: bool) -> Result<(), Error> {
        let (device, detached) = device_of(config, given);
        if detached.is_some() {
            return Err(Error::detached_header());
        }
        let rotated = with_progress(json, |tell| {
            rotate::rotate(config, &device, how, &mut |done, all| tell(Event::Bytes(done, all)))
        })?;
        output::print(json, &rotated, || {
            let mut lines = vec![rotated.key.to_string()];
            lines.extend(rotated.old.as_ref().map(|old| match rotated.deleted {
                true => format!("  deleted          {old}"),
                false => format!("  old key          {old} (delete it: cryptattach key delete {old} --yes)"),
            }));
            lines
        })
    }

    fn passphrase(&self, config: &Config, given: &Path, json: bool) -> Result<(), Error> {
        let (device, configured) = device_of(config, given);
        let (header, separation) = (self.header.clone().or(configured), self.separation.strictness());
        let request = new_passphrase::Request { device: &device, header: header.as_deref(), separation };
        let rotated = new_passphrase::rotate(config, &request)?;
        output::print(json, &rotated, || {
            vec![rotated.key.to_string(), format!("  new passphrase   opens keyslot {}", rotated.keyslot)]
        })
    }

    fn all(&self, config: &Config, container: &StoreName, how: How, json: bool) -> Result<(), Error> {
        let Self { because_leaked, anew, .. } = *self;
        let request = rotate::container::Request { container, because_leaked, anew, how };
        let report = with_progress(json, |tell| rotate::container::rotate(config, &request, tell))?;
        output::print(json, &report, || report_lines(&report))?;
        match (report.left.len(), report.failed.len()) {
            (0, 0) => Ok(()),
            (left, failed) => Err(Error::NotAllRotated { container: container.clone(), left, failed }),
        }
    }
}

fn report_lines(report: &Report) -> Vec<String> {
    let Report { container, begun, done_before, done, left, failed } = report;
    let (now, left_over, failures) = (done.len(), left.len(), failed.len());
    let mut lines = vec![format!("container '{container}': {now} done, {left_over} left, {failures} failed")];
    if *done_before > 0 {
        lines.push(format!("  done before      {done_before}, since {}", date(*begun)));
    }
    for done in done {
        let old = done.old.as_ref().map(|old| match done.deleted {
            true => format!(", deleted {old}"),
            false => format!(", old key {old}"),
        });
        let attached = done.attached.as_ref().map(|name| format!(", attached as '{name}'")).unwrap_or_default();
        let (device, old) = (done.device.display(), old.unwrap_or_default());
        lines.push(format!("  done             {device}: {}{old}{attached}", done.key));
    }
    for (what, undone) in left.iter().map(|one| ("left  ", one)).chain(failed.iter().map(|one| ("FAILED", one))) {
        let Undone { device, why, next, .. } = undone;
        lines.push(format!("  {what}           {}: {why}", device.display()));
        lines.extend(next.as_ref().map(|next| format!("    next: {next}")));
    }
    lines
}

/// Shows how far it is: to people with a bar, to programs with a line a second on standard error. What becomes of a volume is
/// told at once.
pub(super) fn with_progress<T>(json: bool, work: impl FnOnce(&mut dyn FnMut(Event<'_>)) -> T) -> T {
    let mut pace = Pace::default();
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = ProgressStyle::with_template("{bar:40} {percent} %{msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let done = work(&mut |event| match event {
        Event::Bytes(done, all) => {
            let now = Instant::now();
            let (is_due, pace) = (pace.is_due(now, done >= all), pace.at(now, done, all));
            if !json {
                bar.set_length(all);
                bar.set_position(done);
                let left = |seconds| FormattedDuration(Duration::from_secs(seconds));
                bar.set_message(pace.map_or_else(String::new, |(rate, seconds)| {
                    format!(", {}/s, {} left", output::size(rate), left(seconds))
                }));
            } else if is_due {
                let (rate, left) = pace.unzip();
                output::say_json(&json!({
                    "event": "progress", "done_bytes": done, "all_bytes": all, "bytes_per_second": rate, "seconds_left": left,
                }));
            }
        }
        Event::Volume(what, device, undone) if json => {
            let why = undone.map(|undone| &undone.why);
            output::say_json(&json!({"event": "volume", "device": device, "is": what, "why": why}));
        }
        Event::Volume(what, device, undone) => {
            let why = undone.map(|undone| format!(": {}", undone.why)).unwrap_or_default();
            bar.suspend(|| output::say(format!("{what}: {}{why}", device.display())));
        }
    });
    bar.finish_and_clear();
    done
}
