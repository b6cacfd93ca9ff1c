//! The words of a command line: names as people give them, what they try first, and what is wrong with them.

use std::{ffi::OsStr, path::PathBuf};

use clap::{
    builder::{PathBufValueParser, StringValueParser, TypedValueParser},
    error::{ContextKind, ContextValue, Error, ErrorKind},
};

use super::output;
use crate::{
    base::mapping_name::{MappingName, ParseMappingNameError},
    config::DeviceSpec,
    verbs::{detach, failure::Failure},
};

/// What people call what a verb of ours does: verbs of cryptsetup, clevis, systemd-cryptenroll and others.
const ELSEWHERE: &[(&[&str], &str)] = &[
    (&["luksFormat", "create", "mkfs"], "format"),
    (&["luksDump", "dump", "show"], "key show"),
    (&["rotate", "reencrypt", "luksChangeKey"], "key rotate"),
    (&["luksErase", "erase", "wipe"], "key erase"),
    (&["import", "luks"], "key import"),
    (&["luksHeaderBackup", "backup"], "header backup' or 'cryptattach container backup"),
    (&["luksHeaderRestore", "restore"], "header restore' or 'cryptattach container restore"),
    (&["enroll", "enrol", "join"], "host join"),
    (&["admit"], "host admit"),
    (&["move"], "key move"),
    (&["logs", "log", "why"], "explain"),
    (&["keys"], "key list"),
    (&["hosts"], "host list"),
];

/// A device or file: its path, or `UUID=`, `LABEL=`, ... as in fstab(5).
pub fn device() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(|given| match given.to_str() {
        Some(text) => DeviceSpec::path_of(text),
        None => Ok(given),
    })
}

/// A mapping's name, or the path of its plaintext device.
pub fn mapping() -> impl TypedValueParser<Value = MappingName> {
    StringValueParser::new()
        .try_map(|text| -> Result<_, ParseMappingNameError> { detach::name_in(&text).unwrap_or(&text).parse() })
}

/// Tells what is wrong with a command line; the words stand in it, as they were given.
pub fn tell_misuse(mut error: Error, words: impl Iterator<Item = impl AsRef<OsStr>>) {
    if let Some(tip) = elsewhere(&error) {
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
        error.remove(ContextKind::SuggestedSubcommand);
    }
    let is_json = |word: &dyn AsRef<OsStr>| word.as_ref() == "--json";
    let json = words.skip(1).take_while(|word| word.as_ref() != "--").any(|word| is_json(&word));
    match error.kind() {
        _ if error.use_stderr() && json => output::say_json(&failure(&error)),
        // clap would name the verbs that are not for people.
        ErrorKind::MissingSubcommand => output::say(failure(&error).lines()),
        _ => drop(error.print()),
    }
}

/// The verb that was meant.
fn elsewhere(error: &Error) -> Option<String> {
    let Some(ContextValue::String(given)) = error.get(ContextKind::InvalidSubcommand) else { return None };
    let (_, ours) = ELSEWHERE.iter().find(|(words, _)| words.iter().any(|word| word.eq_ignore_ascii_case(given)))?;
    Some(format!("'cryptattach {ours}' does that"))
}

/// The same as every other failure is told to programs.
fn failure(error: &Error) -> Failure {
    if matches!(error.kind(), ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand | ErrorKind::MissingSubcommand) {
        return Failure::usage(
            "the command is missing".to_owned(),
            "'cryptattach --help' lists the commands".to_owned(),
        );
    }
    let text = error.render().to_string();
    let mut parts = text.trim_end().split("\n\n");
    let joined = |part: &str| part.split_whitespace().collect::<Vec<_>>().join(" ");
    let what = joined(parts.next().unwrap_or_default().trim_start_matches("error: "));
    let next = parts.map(joined).filter(|part| !part.starts_with("For more information"));
    match next.collect::<Vec<_>>().join("; ") {
        none if none.is_empty() => Failure::usage(what, "'--help' tells the values".to_owned()),
        next => Failure::usage(what, next),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn each_word_leads_to_a_verb_and_is_none_itself() {
        for (words, ours) in ELSEWHERE {
            for way in ours.split("' or 'cryptattach ") {
                let cli = crate::cli::Cli::command();
                let verb = way.split(' ').try_fold(&cli, |command, word| command.find_subcommand(word));
                assert!(verb.is_some(), "{way}");
            }
            for word in *words {
                assert!(crate::cli::Cli::command().find_subcommand(word).is_none(), "{word}");
            }
        }
    }
}
