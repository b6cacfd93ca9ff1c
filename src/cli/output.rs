//! What goes to standard output: a line for people, or JSON for machines.

use std::{
    fmt,
    io::{self, Write},
};

use serde::Serialize;

use crate::verbs::error::Error;

/// Prints `value` as one line of JSON if `json`, else `text`, with a newline.
pub fn print(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    let line = if json { serde_json::to_string(value).map_err(io::Error::from) } else { Ok(text()) };
    line.and_then(|line| writeln!(out, "{line}")).map_err(Error::io("write to standard output"))
}

/// Says something to people on standard error. Nobody may be listening, which is no failure of what was done.
pub fn say(what: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "{what}");
}

/// 1073741824 -> "1 GiB"; rounded down to three digits.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let power = (bytes.max(1).ilog2() / 10) as usize;
    let unit = 1_u64 << (10 * power);
    let (whole, rest) = (bytes / unit, bytes % unit);
    let tenths = rest / (unit / 10).max(1);
    match (power, tenths) {
        (0, _) | (_, 0) => format!("{whole} {}", units[power]),
        (_, 10..) => format!("{whole}.9 {}", units[power]),
        _ => format!("{whole}.{tenths} {}", units[power]),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn prints_sizes() {
        let sizes = [(0, "0 B"), (511, "511 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 30, "1 GiB")];
        for (bytes, text) in sizes {
            assert_eq!(super::size(bytes), text);
        }
        assert_eq!(super::size(u64::MAX), "15.9 EiB");
    }
}
