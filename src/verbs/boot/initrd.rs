//! What is in an image, as the program of its maker lists it: `lsinitramfs` (initramfs-tools), `lsinitrd` (dracut) or
//! `lsinitcpio` (mkinitcpio).
//!
//! All print what `cpio --list --verbose` prints, so links and sizes are known; contents are not read.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsStr,
    fs::File,
    io,
    path::{Component, Path, PathBuf},
    process::{Command, Stdio},
};

/// Links are followed at most this often, as path_resolution(7) has it.
const MOST_LINKS: usize = 40;
/// Programs that list an image, each with its options.
const PROGRAMS: [(&str, &[&str]); 3] = [("lsinitramfs", &["-l"]), ("lsinitrd", &[]), ("lsinitcpio", &["-v"])];
/// Seconds that such a program may take.
const PATIENCE: &str = "120";
/// What timeout(1) exits with when the time is up.
const TOO_LATE: i32 = 124;

/// What is in an image.
#[derive(Default)]
pub struct Initrd {
    files: BTreeMap<PathBuf, Size>,
    links: BTreeMap<PathBuf, PathBuf>,
}

/// The size of a file in bytes; `None` if the list does not tell: an archive has the content of hard links only once.
pub type Size = Option<u64>;

impl Initrd {
    /// Has an image listed by one of the programs that are on this machine.
    pub fn list(image: &Path) -> io::Result<Self> {
        Self::list_by(image, &env::var_os("PATH").unwrap_or_default())
    }

    fn list_by(image: &Path, search: &OsStr) -> io::Result<Self> {
        // Its error is clearer than those of the programs.
        File::open(image)?;
        let find = |program| env::split_paths(search).map(|folder| folder.join(program)).find(|path| path.is_file());
        let found = PROGRAMS.into_iter().find_map(|(program, options)| Some((program, find(program)?, options)));
        let Some((program, path, options)) = found else {
            let why = "none of lsinitramfs, lsinitrd, lsinitcpio is installed";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        };
        let listed = Command::new("timeout")
            .args(["--kill-after=5", PATIENCE])
            .arg(path)
            .args(options)
            .arg(std::path::absolute(image)?)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output()
            .map_err(|error| io::Error::new(error.kind(), format!("cannot run timeout {program}: {error}")))?;
        if listed.status.code() == Some(TOO_LATE) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{program} took longer than {PATIENCE} s")));
        }
        let initrd = Self::parse(&String::from_utf8_lossy(&listed.stdout));
        if !listed.status.success() || initrd.files.is_empty() {
            let said = String::from_utf8_lossy(&listed.stderr);
            let said = said.lines().last().unwrap_or("it lists no file");
            return Err(io::Error::other(format!("{program} cannot list it: {said}")));
        }
        Ok(initrd)
    }

    /// The size of the file at a path, links followed; `None` if there is none.
    pub fn find(&self, path: &Path) -> Option<Size> {
        self.files.get(&self.resolve(path, &mut 0)?).copied()
    }

    /// All files, by their own paths.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.keys().map(PathBuf::as_path)
    }

    /// Other lines, such as dracut's list of its modules, are skipped.
    fn parse(list: &str) -> Self {
        let mut initrd = Self::default();
        for (path, entry) in list.lines().filter_map(entry) {
            match entry {
                Entry::File(size) => drop(initrd.files.insert(path, size)),
                Entry::Link(target) => drop(initrd.links.insert(path, target)),
            }
        }
        initrd
    }

    fn resolve(&self, path: &Path, links: &mut usize) -> Option<PathBuf> {
        let mut resolved = PathBuf::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => {
                    resolved.push(name);
                    if let Some(target) = self.links.get(&resolved) {
                        *links += 1;
                        if *links > MOST_LINKS {
                            return None;
                        }
                        resolved.pop();
                        resolved = self.resolve(&resolved.join(target), links)?;
                    }
                }
                Component::ParentDir => {
                    resolved.pop();
                }
                _ => {}
            }
        }
        Some(resolved)
    }
}

/// A line of the list that matters.
enum Entry {
    File(Size),
    Link(PathBuf),
}

/// `-rw-r--r--   1 root     root         1234 Nov 26  2026 etc/crypttab`
fn entry(line: &str) -> Option<(PathBuf, Entry)> {
    fn word<'a>(line: &mut &'a str) -> Option<&'a str> {
        let (word, rest) = line.trim_start().split_once(' ')?;
        *line = rest;
        Some(word)
    }
    let mut rest = line;
    let (mode, links) = (word(&mut rest)?, word(&mut rest)?.parse::<u64>().ok()?);
    let (_owner, _group, bytes) = (word(&mut rest)?, word(&mut rest)?, word(&mut rest)?.parse::<u64>().ok()?);
    let _date = (word(&mut rest)?, word(&mut rest)?, word(&mut rest)?);
    let own = |name: &str| Path::new(name).components().filter(|part| matches!(part, Component::Normal(_))).collect();
    match mode.chars().next()? {
        '-' => Some((own(rest), Entry::File((links == 1 || bytes > 0).then_some(bytes)))),
        'l' => rest.split_once(" -> ").map(|(name, target)| (own(name), Entry::Link(target.into()))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn reads_the_list_of_the_real_cpio_and_follows_links() {
        let folder = tempfile::tempdir().unwrap();
        let script = "mkdir -p a/usr/lib a/etc && cd a && ln -s usr/lib lib && echo library >usr/lib/a.so && \
            ln -s /etc/b etc/link && ln -s ../up/down etc/loop && ln -s etc/loop up && echo 'with a blank' >'etc/c d' && \
            echo one >etc/b && ln etc/b etc/hard && : >etc/none && \
            find . | cpio --quiet -o -H newc | LC_ALL=C cpio --quiet --list --verbose";
        let listed = Command::new("sh").args(["-ec", script]).current_dir(folder.path()).output().unwrap();
        assert!(listed.status.success(), "needs cpio");
        let initrd = Initrd::parse(&String::from_utf8(listed.stdout).unwrap());
        let find = |path: &str| initrd.find(Path::new(path));
        assert_eq!(
            (find("/lib/a.so"), find("/etc/c d"), find("/etc/none")),
            (Some(Some(8)), Some(Some(13)), Some(Some(0)))
        );
        assert_eq!(find("/etc/link"), find("/etc/b"));
        let mut hard = [find("/etc/b"), find("/etc/hard")];
        hard.sort_unstable();
        assert_eq!(hard, [Some(None), Some(Some(4))], "the content is there once");
        assert_eq!([find("/etc/x"), find("/lib"), find("/up")], [None; 3]);
    }

    #[test]
    fn says_why_there_is_no_list() {
        let folder = tempfile::tempdir().unwrap();
        let (image, program) = (folder.path().join("image"), folder.path().join("lsinitrd"));
        let list = || Initrd::list_by(&image, folder.path().as_os_str());
        let why = || list().err().unwrap().to_string();
        assert!(why().contains("No such file"), "{}", why());
        fs::write(&image, "").unwrap();
        assert_eq!(why(), "none of lsinitramfs, lsinitrd, lsinitcpio is installed");
        let script = |text: &str| {
            fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
            fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        };
        script("echo Version: dracut-059");
        assert_eq!(why(), "lsinitrd cannot list it: it lists no file");
        script("echo '-r--r--r-- 1 root root 4 Jan 1 1970 a'; echo damaged >&2; exit 2");
        assert_eq!(why(), "lsinitrd cannot list it: damaged");
        script("echo '-r--r--r-- 1 root root 4 Jan 1 1970 a'; [ $1 = \"$(dirname $0)/image\" ]");
        assert_eq!(list().unwrap().find(Path::new("/a")), Some(Some(4)));
    }

    #[test]
    fn skips_what_else_dracut_prints() {
        let initrd = Initrd::parse(
            "Image: /boot/initrd.img: 41M\n========\nVersion: dracut-059\n\nArguments: --zstd --kver 6.1.0\n\ndracut modules:\n\
             systemd\n- odd - a b c d e f g\n========\ndrwxr-xr-x   3 root     root            0 Jan  1  1970 .\n\
             crw-r--r--   1 root     root       1,   3 Jan  1  1970 dev/null\n\
             lrwxrwxrwx   1 root     root            7 Jan  1  1970 bin -> usr/bin\n\
             -rwxr-xr-x   1 root     root       123456 Jan  1 12:00 usr/bin/cryptattach\n========\n",
        );
        assert_eq!(initrd.files().collect::<Vec<_>>(), [Path::new("usr/bin/cryptattach")]);
        assert_eq!(initrd.find(Path::new("/bin/cryptattach")), Some(Some(123_456)));
    }
}
