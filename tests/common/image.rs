//! What virtual machines are made of.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The folder that tests/LAYER/make-image makes, with these arguments, in the cache of this user; made if it is not there yet.
pub fn make(layer: &str, arguments: &[&str]) -> PathBuf {
    make_by(layer, "make-image", arguments)
}

/// Likewise, by another script of that folder.
pub fn make_by(layer: &str, script: &str, arguments: &[&str]) -> PathBuf {
    let home = std::env::var_os("HOME").expect("HOME is not set");
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| Path::new(&home).join(".cache"), PathBuf::from);
    let cache = cache.join("cryptattach").join(layer);
    fs::create_dir_all(&cache).unwrap();
    // Of two runs one makes it, and the other does not replace what is in use by then.
    let made = Command::new("flock")
        .arg(cache.join(".lock"))
        .arg(format!("{}/tests/{layer}/{script}", env!("CARGO_MANIFEST_DIR")))
        .arg(&cache)
        .args(arguments)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(made.status.success(), "what the machines are made of could not be made (see above)");
    String::from_utf8(made.stdout).unwrap().trim_end().into()
}
