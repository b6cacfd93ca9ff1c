//! Members of a store's section in the configuration, and whole tables, changed by a program: all else in the file stays as it is,
//! comments included.

use std::{fs, io, path::Path};

use toml::Value;

use super::{error::Error, setup};
use crate::{base::key::StoreName, config::Config, keys::store};

/// A configuration that is not written yet, and of which every part is understood.
pub struct Edited {
    pub config: Config,
    text: String,
}

/// The configuration in this file with other members of a store.
pub fn edited(path: &Path, name: &StoreName, members: &[(&str, Value)]) -> Result<Edited, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(format!("read {}", path.display())))?;
    understood(path, with_members(&text, name, members)?)
}

/// The configuration in this file, or an empty one, with one more table at its end.
pub fn with_table(path: &Path, table: &str) -> Result<Edited, Error> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text.map_err(Error::io(format!("read {}", path.display())))?,
    };
    understood(path, format!("{text}\n{table}"))
}

/// The configuration in this file without these tables, each the name of a part and a name in it; nor is a store the default one
/// that is gone.
pub fn without_tables(path: &Path, tables: &[(&str, &str)]) -> Result<Edited, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(format!("read {}", path.display())))?;
    let by_hand = || {
        let names = tables.iter().map(|(part, name)| format!("[{part}.{name}]")).collect::<Vec<_>>();
        let (path, names) = (path.display(), names.join(" and "));
        Error::Usage(format!(
            "{path} is not written as tables of single lines: remove {names} there, and run this again"
        ))
    };
    understood(path, without(&text, tables).ok_or_else(by_hand)?)
}

fn understood(path: &Path, text: String) -> Result<Edited, Error> {
    let config = Config::parse(&text, path)?;
    store::check(&config)?;
    Ok(Edited { config, text })
}

fn without(text: &str, tables: &[(&str, &str)]) -> Option<String> {
    let is_gone = |header: &str| {
        let header = header.split('#').next().unwrap_or_default().trim();
        let is = |(part, name): &(&str, &str)| {
            header == format!("[{part}.{name}]") || header == format!("[{part}.\"{name}\"]")
        };
        tables.iter().any(is)
    };
    // Not a guess: at the end nothing else has changed.
    let mut expected = text.parse::<toml::Table>().ok()?;
    let is_store = |value: &Value| tables.iter().any(|(part, name)| *part == "stores" && value.as_str() == Some(name));
    let default = expected.get("default_store").is_some_and(is_store).then(|| expected.remove("default_store"));
    let (mut kept, mut is_kept) = (String::new(), true);
    let mut lines = text.split_inclusive('\n');
    if default.is_some() {
        let is_default = |line: &str| line.trim_start().starts_with("default_store");
        kept = lines.by_ref().take_while(|line| !is_default(line)).collect();
    }
    for line in lines {
        if line.trim_start().starts_with('[') {
            is_kept = !is_gone(line);
            // The blank line before a table is the table's.
            if !is_kept && (kept.ends_with("\n\n") || kept == "\n") {
                kept.pop();
            }
        }
        if is_kept {
            kept.push_str(line);
        }
    }
    for (part, name) in tables {
        let table = expected.get_mut(*part).and_then(Value::as_table_mut);
        let is_last = table.is_some_and(|table| table.remove(*name).is_some() && table.is_empty());
        if is_last {
            expected.remove(*part);
        }
    }
    (kept.parse::<toml::Table>().ok()? == expected).then_some(kept)
}

/// A member of a store's section, as the file has it.
pub fn member(path: &Path, name: &StoreName, member: &str) -> Result<Option<Value>, Error> {
    let text = fs::read_to_string(path).map_err(Error::io(format!("read {}", path.display())))?;
    let table = text.parse::<toml::Table>().ok();
    Ok(table.and_then(|table| table.get("stores")?.get(name.as_str())?.get(member).cloned()))
}

impl Edited {
    /// Whether nothing is left in it.
    pub fn is_empty(&self) -> bool {
        self.text.trim().is_empty()
    }

    /// Writes it, whole or not at all, with the mode and the owner that the file has.
    pub fn write(self) -> Result<Config, Error> {
        let path = &self.config.path;
        setup::replace(path, &self.text)?;
        Ok(setup::configuration(path)?)
    }
}

fn with_members(text: &str, name: &StoreName, members: &[(&str, Value)]) -> Result<String, Error> {
    let new: Vec<_> = members.iter().map(|(member, value)| format!("{member} = {value}")).collect();
    let by_hand = || {
        Error::Usage(format!(
            "the section of store '{name}' is not written as a table [stores.{name}] of single lines: write {} there, and run \
             'cryptattach container rotate {name}'",
            new.join(" and ")
        ))
    };
    let is_header = |text: &str| {
        let header = text.split('#').next().unwrap_or_default().trim();
        header == format!("[stores.{name}]") || header == format!("[stores.\"{name}\"]")
    };
    let mut lines: Vec<&str> = text.lines().collect();
    let start = lines.iter().position(|line| is_header(line)).ok_or_else(by_hand)? + 1;
    for ((member, _), new) in members.iter().zip(&new) {
        let end = lines[start..].iter().position(|line| line.trim_start().starts_with('['));
        let end = end.map_or(lines.len(), |at| start + at);
        let is_it =
            |line: &&str| line.trim_start().strip_prefix(member).is_some_and(|rest| rest.trim_start().starts_with('='));
        match lines[start..end].iter().position(is_it) {
            Some(at) => lines[start + at] = new,
            None => lines.insert(start, new),
        }
    }
    let changed = lines.join("\n") + "\n";
    // Not a guess: nothing else has changed.
    let read = |text: &str| text.parse::<toml::Table>().ok();
    let mut expected = read(text).ok_or_else(by_hand)?;
    let section = expected.get_mut("stores").and_then(|stores| stores.get_mut(name.as_str())?.as_table_mut());
    let section = section.ok_or_else(by_hand)?;
    members.iter().for_each(|(member, value)| drop(section.insert((*member).to_owned(), value.clone())));
    if read(&changed) == Some(expected) { Ok(changed) } else { Err(by_hand()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_was_added_is_removed_and_nothing_else() {
        let before = "# mine\n[stores.b]\nopens = \"x\" # y\n";
        let added = format!("{before}\n[stores.a]\ntype = 't'\n\n[leaves.paper]\nrecovery = 'f'\n\n");
        let tables = [("stores", "a"), ("leaves", "paper")];
        assert_eq!(without(&added, &tables).as_deref(), Some(before));
        assert_eq!(without("\n[stores.a]\ntype = 't'\n", &tables[..1]).as_deref(), Some(""));
        assert_eq!(without(before, &tables).as_deref(), Some(before));
        let default = |name| format!("# a\ndefault_store = '{name}' # b\n{added}");
        assert_eq!(without(&default("a"), &tables).unwrap(), format!("# a\n{before}"));
        assert_eq!(without(&default("b"), &tables).unwrap(), format!("# a\ndefault_store = 'b' # b\n{before}"));
        assert_eq!(without("[stores]\na.type = 't'\n", &tables), None);
        assert_eq!(without("a = \"\"\"\n[stores.a]\n\"\"\"\n", &tables), None);
    }

    #[test]
    fn only_these_members_of_the_store_change_in_the_file() {
        let name = "cinder".parse().unwrap();
        let changed = |text: &str| with_members(text, &name, &[("opens", "all(a, b)".into())]);
        let others = "# mine\n[stores.b]\nopens = \"x\"\n\n[leaves.a] # one\n";
        let cases = [
            (
                format!("[stores.cinder]\ntype = 't'\n{others}"),
                format!("[stores.cinder]\nopens = \"all(a, b)\"\ntype = 't'\n{others}"),
            ),
            (
                format!("{others}[stores.cinder] # two\ntype = 't'\n  opens='y' # old\n"),
                format!("{others}[stores.cinder] # two\ntype = 't'\nopens = \"all(a, b)\"\n"),
            ),
        ];
        for (text, expected) in cases {
            assert_eq!(changed(&text).unwrap(), expected);
        }
        for by_hand in [
            "stores = { cinder = { type = 't' } }\n",
            "[stores]\ncinder.type = 't'\n",
            "[stores.cinder]\nopens = \"\"\"\nx\"\"\"\n",
            "note = \"\"\"\n[stores.cinder]\n\"\"\"\n[stores.\"cinder\"]\ntype = 't'\n",
        ] {
            assert!(changed(by_hand).unwrap_err().to_string().contains("container rotate"), "{by_hand}");
        }
        let two = [("owner", "new".into()), ("identities", vec!["a", "b"].into())];
        assert_eq!(
            with_members("[stores.cinder]\nowner = 'old'\nidentities = [] # none\n[x]\n", &name, &two).unwrap(),
            "[stores.cinder]\nowner = \"new\"\nidentities = [\"a\", \"b\"]\n[x]\n"
        );
    }
}
