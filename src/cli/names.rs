//! `cryptattach names`: what a word of a command line may be, for the completions of shells. Which kind of name an argument takes, its
//! type says, and nobody has to keep a list of them.

use std::{any::TypeId, path::PathBuf};

use clap::{Arg, Args, Command, CommandFactory};

use super::{Cli, Global, output};
use crate::{
    base::{
        key::{HostName, KeyReference, StoreName},
        mapping_name::MappingName,
    },
    config::{Config, LeafName},
    keys::store,
    unlock::{
        container::{Container, Use},
        enrol::Administrator,
    },
    verbs::{detach, error::Error, setup},
    volumes::backend::ThisHost,
};

/// Print the names that may come next on a command line
#[derive(Args)]
pub struct Names {
    /// The words of the command line up to there, without the program
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    words: Vec<String>,
}

impl Names {
    /// Whoever presses Tab is not to read of errors.
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let mut cli = Cli::command();
        cli.build();
        let asked = asked(&cli, &self.words);
        let Some(arg) = asked.arg else { return Ok(()) };
        let config = setup::configuration(asked.config.as_ref().unwrap_or(&global.config)).ok();
        let mut names = names(arg, config.as_ref());
        names.sort();
        names.dedup();
        if names.is_empty() { Ok(()) } else { output::print(false, &(), || names) }
    }
}

/// What comes next.
struct Asked<'a> {
    arg: Option<&'a Arg>,
    config: Option<PathBuf>,
}

fn asked<'a>(cli: &'a Command, words: &[String]) -> Asked<'a> {
    let (mut command, mut position, mut option, mut config) = (cli, 1, None::<&Arg>, None);
    for word in words {
        if let Some(arg) = option.take() {
            if arg.get_id() == "config" {
                config = Some(PathBuf::from(word));
            }
        } else if let Some(long) = word.strip_prefix("--") {
            let mut options = command.get_arguments();
            option = options.find(|arg| arg.get_long() == Some(long) && arg.get_action().takes_values());
        } else if let Some(below) = command.find_subcommand(word).filter(|_| position == 1) {
            command = below;
        } else if !word.starts_with('-') {
            position += 1;
        }
    }
    let last =
        command.get_positionals().last().filter(|arg| arg.get_num_args().is_some_and(|number| number.max_values() > 1));
    let positional = || command.get_positionals().find(|arg| arg.get_index() == Some(position)).or(last);
    Asked { arg: option.or_else(positional), config }
}

fn names(arg: &Arg, config: Option<&Config>) -> Vec<String> {
    let kind = arg.get_value_parser().type_id();
    let is = |other: TypeId| kind == other;
    let words: Vec<&str> = arg.get_value_names().iter().copied().flatten().flat_map(|name| name.split('|')).collect();
    let mut names = Vec::new();
    if is(TypeId::of::<StoreName>()) {
        names.extend(config.iter().flat_map(|config| config.stores.keys()).map(ToString::to_string));
    } else if is(TypeId::of::<LeafName>()) {
        names.extend(config.iter().flat_map(|config| config.leaves.keys()).map(ToString::to_string));
    } else if is(TypeId::of::<HostName>()) {
        let all = config.map(|config| Administrator::of(&config.state).register().all());
        names.extend(all.and_then(Result::ok).into_iter().flatten().map(|host| host.host.to_string()));
    } else if is(TypeId::of::<MappingName>()) || words.contains(&"NAME") {
        names.extend(config.iter().flat_map(|config| config.volumes.keys()).map(ToString::to_string));
        names.extend(detach::list(&ThisHost).into_iter().flatten().map(|mapping| mapping.name.to_string()));
    }
    if is(TypeId::of::<KeyReference>()) || words.contains(&"KEY") {
        names.extend(config.iter().flat_map(|config| keys(config)));
    }
    names
}

/// The keys of all stores but those on the network: nobody waits for a server at each Tab.
fn keys(config: &Config) -> Vec<String> {
    let keys = |(name, store): (&StoreName, _)| {
        store::kind(store).ok().filter(|kind| !kind.needs_network())?;
        let container = Container::open(config, name, None, Use::Keys).ok()?;
        let keys = container.store().list().ok()?;
        Some(keys.into_iter().map(|key| container.reference(key).to_string()).collect::<Vec<_>>())
    };
    config.stores.iter().filter_map(keys).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_word_that_comes_next_is_found_by_the_definitions() {
        let mut cli = Cli::command();
        cli.build();
        let next = |line: &str| {
            let words: Vec<_> = line.split_whitespace().map(str::to_owned).collect();
            let asked = asked(&cli, &words);
            (asked.arg.map(|arg| arg.get_id().to_string()), asked.config)
        };
        for (line, id) in [
            ("", None),
            ("detach", Some("mapping")),
            ("attach /dev/vdb", Some("name")),
            ("attach --read-only --volume", Some("volume")),
            ("container show", Some("name")),
            ("container owner replace cinder", Some("file")),
            ("key move --to", Some("to")),
            ("lockbox add a/b c/d", Some("keys")),
            ("key show x", None),
        ] {
            assert_eq!(next(line), (id.map(str::to_owned), None), "{line}");
        }
        assert_eq!(next("--config c.toml format --store"), (Some("store".to_owned()), Some("c.toml".into())));
    }
}
