//! What goes to standard output: a line for people, or JSON for machines.

use std::io::{self, Write};

use serde::Serialize;

use crate::{base::chain::printable, sys::terminal, verbs::error::Error};

/// Version of what `--json` prints (docs/json.md). It grows when a member goes or means something else, not when one comes.
pub const SCHEMA: u32 = 1;

/// What people read. A line may quote a store, a disk or another host: nothing in it begins another line or moves a cursor.
pub struct Lines(Vec<String>);

/// One line.
impl From<String> for Lines {
    fn from(line: String) -> Self {
        Self(vec![line])
    }
}

impl From<Vec<String>> for Lines {
    fn from(lines: Vec<String>) -> Self {
        Self(lines)
    }
}

impl Lines {
    fn text(self) -> String {
        // A tab parts the columns of a list.
        let line = |line: String| line.split('\t').map(printable).collect::<Vec<_>>().join("\t") + "\n";
        self.0.into_iter().map(line).collect()
    }
}

/// Prints `value` as one line of JSON if `json`, else `text`.
pub fn print<L: Into<Lines>>(json: bool, value: &impl Serialize, text: impl FnOnce() -> L) -> Result<(), Error> {
    let text = if json { line_of_json(value).map_err(io::Error::from) } else { Ok(text().into().text()) };
    match text.and_then(|text| io::stdout().lock().write_all(text.as_bytes())) {
        // Whoever read has what they wanted: `cryptattach key list | head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(Error::io("write to standard output")),
    }
}

/// Says something to people on standard error. Nobody may be listening, which is no failure of what was done.
pub fn say(what: impl Into<Lines>) {
    let _ = io::stderr().write_all(what.into().text().as_bytes());
}

/// Likewise, to programs.
pub fn say_json(value: &impl Serialize) {
    let _ = line_of_json(value).map(|line| io::stderr().write_all(line.as_bytes()));
}

/// JSON without what moves a cursor: serde_json escapes the control characters of ASCII only.
fn line_of_json(value: &impl Serialize) -> serde_json::Result<String> {
    let json = serde_json::to_string(value)?;
    let escaped = json.chars().map(|letter| match letter.is_control() {
        true => format!("\\u{:04x}", u32::from(letter)),
        false => letter.to_string(),
    });
    Ok(escaped.collect::<String>() + "\n")
}

/// Rows in columns below their names, as wide as they must be. A cell may quote anything, too. What a terminal has no room for
/// would break in the middle of its cells: there each row is a paragraph.
pub fn table<const N: usize>(names: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> Vec<String> {
    table_in(terminal::columns(), names, rows)
}

fn table_in<const N: usize>(
    columns: Option<usize>,
    names: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Vec<String> {
    let rows: Vec<_> =
        [names.map(str::to_owned)].into_iter().chain(rows).map(|row| row.map(|cell| printable(&cell))).collect();
    let len = |cell: &str| cell.chars().count();
    let width = |column: usize| rows.iter().map(|row| len(&row[column])).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let lines: Vec<_> = rows.iter().map(line).collect();
    // Whoever shows it may indent it.
    let is_too_wide = |columns| lines.iter().any(|line| len(line) + 2 > columns);
    if !columns.is_some_and(is_too_wide) {
        return lines;
    }
    let name = names.iter().map(|name| len(name)).max().unwrap_or_default();
    let paragraph = |(at, row): (usize, &[String; N])| {
        let cells = names.iter().zip(row).filter(|(_, cell)| !cell.is_empty());
        let cells = cells.map(|(of, cell)| format!("{of:name$}  {cell}"));
        (at > 0).then(String::new).into_iter().chain(cells).collect::<Vec<_>>()
    };
    rows[1..].iter().enumerate().flat_map(paragraph).collect()
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
    use super::*;

    #[test]
    fn nothing_in_a_line_begins_another_or_moves_a_cursor() {
        let lines = Lines::from(vec!["a\tb".to_owned(), "\u{1b}[2J\nWARN all is well".to_owned()]);
        assert_eq!(lines.text(), "a\tb\n\u{fffd}[2J\u{fffd}WARN all is well\n");
        let json = line_of_json(&"\u{9b}2J\n").unwrap();
        assert_eq!(json, "\"\\u009b2J\\n\"\n");
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), "\u{9b}2J\n");
    }

    #[test]
    fn columns_are_as_wide_as_they_must_be() {
        let rows = [["a".to_owned(), "b\tc".to_owned()], ["long\n".to_owned(), String::new()]];
        for columns in [None, Some(14)] {
            let table = table_in(columns, ["NAME", "X"], rows.clone());
            assert_eq!(table, ["NAME   X", "a      b\u{fffd}c", "long\u{fffd}"]);
        }
        assert_eq!(table_in(Some(11), ["NAME", "X"], rows), ["NAME  a", "X     b\u{fffd}c", "", "NAME  long\u{fffd}"]);
    }

    #[test]
    fn prints_sizes() {
        let sizes = [(0, "0 B"), (511, "511 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 30, "1 GiB")];
        for (bytes, text) in sizes {
            assert_eq!(super::size(bytes), text);
        }
        assert_eq!(super::size(u64::MAX), "15.9 EiB");
    }
}
