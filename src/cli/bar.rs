//! How far work on many keys is: a bar for people, a line of JSON a second for programs. What a key has failed by is told at once.

use std::{sync::Mutex, time::Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::{output, pace::Pace};
use crate::{
    unlock::container::{Progress, Step, lock},
    verbs::error::Error,
};

/// Shows how far it is.
pub(super) fn with_bar<T>(json: bool, work: impl FnOnce(&Progress<'_>) -> Result<T, Error>) -> Result<T, Error> {
    let bar = if json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} keys, {eta} left");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let pace = Mutex::new(Pace::default());
    let done = work(&|step| match step {
        Step::Done(done, all) if !json => {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        }
        Step::Done(done, all) => {
            let (mut pace, now) = (lock(&pace), Instant::now());
            if pace.is_due(now, done >= all) {
                let left = pace.at(now, done as u64, all as u64).map(|(_, left)| left);
                output::say_json(&json!({"event": "progress", "done": done, "all": all, "seconds_left": left}));
            }
        }
        Step::Not(what, key, why) if json => {
            output::say_json(&json!({"event": "key", "key": key, "is": what, "why": why}));
        }
        Step::Not(what, key, why) => bar.suspend(|| output::say(format!("{what}: {key}: {why}"))),
    })?;
    bar.finish_and_clear();
    Ok(done)
}
