//! Another policy for a container: the configuration says it, and the next container key is sealed by it.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use crate::{
    base::{key::StoreName, person::Attendant},
    config::{Config, LeafName, Policy},
    keys::store,
    sys::durable::{Folder, folder_of},
    unlock::container::{Container, Rotation, Use},
    verbs::{as_texts, container::record, error::Error, setup},
};

/// What was changed.
#[derive(serde::Serialize)]
pub struct Changed {
    #[serde(serialize_with = "as_text")]
    pub policy: Policy,
    #[serde(serialize_with = "as_text")]
    pub before: Policy,
    /// Leaves of the former policy that the new one has no more.
    #[serde(serialize_with = "as_texts")]
    pub former: BTreeSet<LeafName>,
    #[serde(flatten)]
    pub rotation: Rotation,
}

fn as_text<S: serde::Serializer>(policy: &Policy, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(policy)
}

/// Changes `opens` of a store and seals all keys anew. Run again after an interruption, it goes on: the configuration has the
/// new policy first, and a rotation that is under way for another one is begun anew.
pub fn change(
    config: &Path,
    name: &StoreName,
    policy: &Policy,
    keep: Duration,
    attendant: &Attendant,
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<Changed, Error> {
    let old = setup::configuration(config)?;
    let before = old.store(name)?.sealing.policy.clone();
    let text = fs::read_to_string(config).map_err(Error::io(format!("read {}", config.display())))?;
    let text = with_policy(&text, name, policy)?;
    let new = Config::parse(&text, config)?;
    store::check(&new)?;
    // Whom it is sealed to has to be known before anything is written.
    Container::open(&new, name, None, Use::Keys)?.can_be_sealed()?;
    if before != *policy {
        write(config, &text)?;
    }
    let mut new = setup::configuration(config)?;
    new.attendant = attendant.clone();
    let rotation = Container::open(&new, name, None, Use::Keys)?.rotate(keep, progress)?;
    record(&new, "container policy", name);
    let leaves = policy.leaves();
    let former = before.leaves().into_iter().filter(|leaf| !leaves.contains(leaf)).cloned().collect();
    Ok(Changed { policy: policy.clone(), before, former, rotation })
}

/// The configuration's text with another policy of a store; all else is as it was, comments included.
fn with_policy(text: &str, name: &StoreName, policy: &Policy) -> Result<String, Error> {
    let by_hand = || {
        Error::Usage(format!(
            "the section of store '{name}' is not written as a table [stores.{name}]: write opens = \"{policy}\" there, and \
             run 'cryptattach container rotate {name}'"
        ))
    };
    let line = format!("opens = \"{policy}\"");
    let is_header = |text: &str| {
        let header = text.split('#').next().unwrap_or_default().trim();
        header == format!("[stores.{name}]") || header == format!("[stores.\"{name}\"]")
    };
    let mut lines: Vec<&str> = text.lines().collect();
    let start = lines.iter().position(|line| is_header(line)).ok_or_else(by_hand)? + 1;
    let end =
        lines[start..].iter().position(|line| line.trim_start().starts_with('[')).map_or(lines.len(), |at| start + at);
    let is_policy =
        |line: &&str| line.trim_start().strip_prefix("opens").is_some_and(|rest| rest.trim_start().starts_with('='));
    match lines[start..end].iter().position(is_policy) {
        Some(at) => lines[start + at] = &line,
        None => lines.insert(start, &line),
    }
    let changed = lines.join("\n") + "\n";
    // Not a guess: nothing else has changed.
    let read = |text: &str| text.parse::<toml::Table>().ok();
    let mut expected = read(text).ok_or_else(by_hand)?;
    let section = expected.get_mut("stores").and_then(|stores| stores.get_mut(name.as_str())?.as_table_mut());
    section.ok_or_else(by_hand)?.insert("opens".to_owned(), toml::Value::String(policy.to_string()));
    if read(&changed) == Some(expected) { Ok(changed) } else { Err(by_hand()) }
}

/// Writes the configuration, whole or not at all, with the mode and the owner that it has.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    let write = || {
        let path = path.canonicalize()?;
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(std::io::ErrorKind::InvalidInput)?;
        Folder::lock(folder_of(&path))?.replace_content(name, text.as_bytes())
    };
    write().map_err(Error::io(format!("write {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_policy_of_the_store_changes_in_the_file() {
        let (name, policy) = ("cinder".parse().unwrap(), "all(a, b)".parse().unwrap());
        let changed = |text: &str| with_policy(text, &name, &policy);
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
    }
}
