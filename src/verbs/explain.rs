//! The last failure of each device, kept in /run until it attaches: a unit or a hot-plug has nobody to tell at the time.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::{
    base::{chain::chain, clock::now, exit::Exit, mapping_name::MappingName},
    sys::{device::resolved, state, systemd},
    verbs::{
        error::Error,
        failure::{self, Failure},
    },
};

/// Where they are. Its name begins with a dot, which no mapping's does.
pub const FOLDER: &str = "/run/cryptattach/.failed";

/// A failure, as it was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastFailure {
    /// Seconds since 1970-01-01 UTC.
    pub time: u64,
    /// "attach", "release".
    pub action: String,
    /// The encrypted device, as it was named, if it came to that.
    pub device: Option<PathBuf>,
    /// The mapping's name, if one was given.
    pub name: Option<MappingName>,
    /// What the user was told.
    pub told: Failure,
}

/// Keeps a failure for `cryptattach explain`, or forgets those of a volume that has unlocked.
pub fn note<T>(action: &str, device: Option<&Path>, name: Option<&MappingName>, result: Result<T, &Error>) {
    let folder = Path::new(FOLDER);
    let noted = match result {
        Ok(_) => forget(folder, device, name),
        // A usage error says nothing about the volume, so it is not recorded.
        Err(error) if failure::exit(error) == Exit::Usage => Ok(()),
        Err(error) => {
            let (device, name) = (device.map(Path::to_owned), name.cloned());
            keep(
                folder,
                &LastFailure { time: now(), action: action.to_owned(), device, name, told: Failure::of(error) },
            )
        }
    };
    if let Err(error) = noted {
        tracing::debug!("cannot keep the failure for 'explain': {}", chain(&error));
    }
}

/// Keeps a failure in place of the device's last one.
pub fn keep(folder: &Path, failure: &LastFailure) -> io::Result<()> {
    state::put(&folder.join(file_name(failure)), &serde_json::to_vec(failure)?)
}

/// Forgets the failures of a volume that has unlocked.
pub fn forget(folder: &Path, device: Option<&Path>, name: Option<&MappingName>) -> io::Result<()> {
    let words = device.and_then(Path::to_str).into_iter().chain(name.map(MappingName::as_str));
    let words: Vec<&str> = words.collect();
    let is_meant = about(&words);
    // All files are read, whatever they are called: the device may have been another, or none, when one was kept.
    for (path, failure) in files(folder)? {
        if is_meant(&failure) {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// All that are kept, the latest first.
pub fn all(folder: &Path) -> io::Result<Vec<LastFailure>> {
    let mut failures: Vec<_> = files(folder)?.into_iter().map(|(_, failure)| failure).collect();
    failures.sort_by_key(|failure: &LastFailure| std::cmp::Reverse(failure.time));
    Ok(failures)
}

/// Each with its file.
fn files(folder: &Path) -> io::Result<Vec<(PathBuf, LastFailure)>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut failures = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            // One that another unit has just forgotten, or that another version wrote, hides no other.
            let failure = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
            failures.extend(failure.map(|failure| (path, failure)));
        }
    }
    Ok(failures)
}

/// Whether one of the words names a failure's device or mapping. There may be many failures, so the words are resolved once.
pub fn about(words: &[&str]) -> impl Fn(&LastFailure) -> bool {
    let paths: Vec<_> = words.iter().map(|word| resolved(Path::new(word))).collect();
    move |failure| {
        failure.name.as_ref().is_some_and(|name| words.contains(&name.as_str()))
            || failure.device.as_deref().is_some_and(|device| paths.contains(&resolved(device)))
    }
}

/// One file per device, whichever of its names was used.
fn file_name(failure: &LastFailure) -> String {
    let name = failure.name.as_ref().map(|name| Path::new("name").join(name.as_str()));
    let about = failure.device.as_deref().map(resolved).or(name).unwrap_or_default();
    format!("{}.json", systemd::escape_path(&about))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(time: u64, device: &str, name: Option<&str>) -> LastFailure {
        let name = name.map(|name| name.parse().unwrap());
        LastFailure {
            time,
            action: "attach".to_owned(),
            device: Some(device.into()),
            name,
            told: Failure::of(&Error::Usage("no store".to_owned())),
        }
    }

    #[test]
    fn keeps_the_last_one_of_each_device_until_it_attaches() {
        let folder = tempfile::tempdir().unwrap();
        let folder = &folder.path().join("new");
        assert!(all(folder).unwrap().is_empty());
        for failure in
            [failure(1, "/dev/null", None), failure(3, "/dev/zero", Some("data")), failure(2, "/dev/null", None)]
        {
            keep(folder, &failure).unwrap();
        }
        let kept = all(folder).unwrap();
        assert_eq!(kept, [failure(3, "/dev/zero", Some("data")), failure(2, "/dev/null", None)]);
        let is_about = |failure: &LastFailure, word: &str| about(&[word])(failure);
        assert!(
            is_about(&kept[0], "data") && is_about(&kept[0], "/dev/../dev/zero") && !is_about(&kept[0], "/dev/null")
        );
        forget(folder, Some(Path::new("/dev/../dev/zero")), None).unwrap();
        assert_eq!(all(folder).unwrap(), [failure(2, "/dev/null", None)]);
    }

    #[test]
    fn forgets_what_was_kept_while_the_device_was_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let (device, notes) = (folder.path().join("link"), folder.path().join("notes"));
        keep(&notes, &failure(1, device.to_str().unwrap(), Some("data"))).unwrap();
        std::os::unix::fs::symlink("/dev/null", &device).unwrap();
        forget(&notes, Some(&device), None).unwrap();
        assert!(all(&notes).unwrap().is_empty());
    }

    #[test]
    fn one_that_cannot_be_read_hides_no_other() {
        let folder = tempfile::tempdir().unwrap();
        keep(folder.path(), &failure(1, "/dev/null", None)).unwrap();
        fs::write(folder.path().join("old.json"), "{}").unwrap();
        std::os::unix::fs::symlink("gone", folder.path().join("gone.json")).unwrap();
        assert_eq!(all(folder.path()).unwrap(), [failure(1, "/dev/null", None)]);
    }
}
