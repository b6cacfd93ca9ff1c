//! The house in seven floors: an import goes down, never up, and `keys` and `volumes` do not know each other.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// From the ground up; two rooms on one floor do not know each other.
const FLOORS: [&[&str]; 7] =
    [&["base"], &["sys"], &["config"], &["keys", "volumes"], &["unlock"], &["verbs"], &["cli"]];

fn floor(room: &str) -> Option<usize> {
    FLOORS.iter().position(|rooms| rooms.contains(&room))
}

fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|end| end == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The code of a file without comments and unit tests: a test may look at the house from above.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let lines = text.lines().map(|line| if line.trim_start().starts_with("//") { "" } else { line });
    lines.collect::<Vec<_>>().join("\n")
}

/// The rooms that the code names: `crate::ROOM` and the first words of `crate::{ROOM, ROOM::...}`.
fn rooms_named(code: &str) -> BTreeSet<String> {
    let mut rooms = BTreeSet::new();
    for part in code.split("crate::").skip(1) {
        let Some(group) = part.strip_prefix('{') else {
            rooms.insert(word(part));
            continue;
        };
        let (mut depth, mut at_start) = (0, true);
        for (at, letter) in group.char_indices() {
            match letter {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => at_start = true,
                letter if at_start && letter.is_alphanumeric() => {
                    rooms.insert(word(&group[at..]));
                    at_start = false;
                }
                _ => {}
            }
        }
    }
    rooms.retain(|room| floor(room).is_some());
    rooms
}

fn word(text: &str) -> String {
    text.chars().take_while(|letter| letter.is_alphanumeric() || *letter == '_').collect()
}

/// What leads to a volume key or to a mapping, and the only files that name it. Across crates private members see to that;
/// within the crate, this does.
const DOORS: [(&str, &[&str]); 8] = [
    ("separation::prove(", &["unlock/case.rs"]),
    (".overridden(", &["unlock/case.rs"]),
    ("Unlocked::by_stored_key(", &["unlock/case.rs"]),
    ("Unlocked::by_passphrase(", &["verbs/boot/mod.rs"]),
    ("Identities::", &["keys/", "unlock/"]),
    // A token of clevis is opened by a person's command only.
    ("Means {", &["keys/seal/clevis/", "verbs/clevis.rs"]),
    ("clevis::open(", &["verbs/import.rs"]),
    ("clevis::passphrase(", &["cli/key.rs"]),
];

#[test]
fn nobody_comes_to_a_key_but_through_the_case() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (door, allowed) in DOORS {
        let names = |file: &&PathBuf| code(&fs::read_to_string(file).unwrap()).contains(door);
        let files = sources(&src);
        let named: Vec<_> = files.iter().filter(names).map(|file| file.strip_prefix(&src).unwrap()).collect();
        let strangers: Vec<_> = named
            .iter()
            .filter(|file| !allowed.iter().any(|allowed| file.to_str().unwrap().starts_with(allowed)))
            .collect();
        assert!(strangers.is_empty(), "{door} is named by {strangers:?}");
        assert!(!named.is_empty(), "nobody names {door}: the rule is out of date");
    }
}

#[test]
fn imports_go_down_only() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut files, mut arrows, mut wrong) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for file in sources(&src) {
        let path = file.strip_prefix(&src).unwrap();
        let Some(room) = path.iter().next().filter(|_| path.iter().count() > 1).and_then(|room| room.to_str()) else {
            assert!(matches!(path.to_str(), Some("lib.rs" | "main.rs")), "{} lies beside the floors", path.display());
            continue;
        };
        let own = floor(room).unwrap_or_else(|| panic!("{room} is on no floor"));
        *files.entry(room.to_owned()).or_insert(0) += 1;
        for named in rooms_named(&code(&fs::read_to_string(&file).unwrap())) {
            if named == room {
                continue;
            }
            if floor(&named) >= Some(own) {
                wrong.push(format!("{} -> {named}", path.display()));
            }
            *arrows.entry((room.to_owned(), named)).or_insert(0) += 1;
        }
    }
    for rooms in FLOORS.iter().rev() {
        for room in *rooms {
            let down = arrows.iter().filter(|((from, _), _)| from == room);
            let down: Vec<_> = down.map(|((_, to), count)| format!("{to} ({count})")).collect();
            println!("{room:8} {:3} files -> {}", files.get(*room).unwrap_or(&0), down.join(", "));
        }
    }
    assert!(wrong.is_empty(), "{} arrows go up:\n{}", wrong.len(), wrong.join("\n"));
}
