//! The lines of the log, wherever they go: the message alone, [`printable`].

use std::fmt;

use tracing::field::Field;
use tracing_subscriber::fmt::format::{FieldFn, Writer, debug_fn};

use super::chain::printable;

/// What a subscriber formats the fields of an event with.
pub fn message_only() -> FieldFn<impl Fn(&mut Writer<'_>, &Field, &dyn fmt::Debug) -> fmt::Result + Clone> {
    debug_fn(|out, field, value| match field.name() {
        "message" => write!(out, "{}", printable(&format!("{value:?}"))),
        _ => Ok(()),
    })
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        sync::Mutex,
    };

    use super::*;

    #[test]
    fn what_is_quoted_begins_no_line_of_the_log() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = tracing_subscriber::fmt().without_time().with_target(false).with_ansi(false);
        let writer = Mutex::new(File::create(file.path()).unwrap());
        let subscriber = lines.with_writer(writer).fmt_fields(message_only()).finish();
        tracing::subscriber::with_default(subscriber, || {
            let quoted = "\u{1b}[2J\nERROR all is lost";
            tracing::warn!(problem = %quoted, "the store says {quoted}");
        });
        let log = fs::read_to_string(file.path()).unwrap();
        assert_eq!(log, " WARN the store says \u{fffd}[2J\u{fffd}ERROR all is lost\n");
    }
}
