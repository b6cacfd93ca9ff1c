//! The commands of a page of docs/, as a reader finds them there.

use std::{path::Path, process::Command};

/// What is to be typed under this heading (`## By hand`), down to the next one that is not below it.
pub fn commands(page: &str, heading: &str) -> String {
    let level =
        |line: &str| line.find(|letter| letter != '#').filter(|&level| level > 0 && line[level..].starts_with(' '));
    let below = level(heading).expect("a heading");
    let mut lines = page.lines().skip_while(|line| *line != heading);
    lines.next().unwrap_or_else(|| panic!("no heading '{heading}'"));
    let section = lines.take_while(|line| level(line).is_none_or(|level| level > below));
    section.filter_map(|line| line.strip_prefix("    ")).map(|line| format!("{line}\n")).collect()
}

/// Has a reader's shell run them in this folder, and returns what they print.
pub fn run(folder: &Path, script: &str, environment: &[(&str, &str)]) -> String {
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", script]).current_dir(folder).envs(environment.iter().copied());
    let output = bash.output().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
