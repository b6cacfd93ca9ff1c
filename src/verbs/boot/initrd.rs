//! Images as the kernel reads them: cpio archives one after another, each perhaps compressed (Linux, "initramfs buffer
//! format").
//!
//! Read here and not unpacked by `unmkinitramfs` or `lsinitrd`: only one of them is on a machine, and both write what they
//! find, secrets as well, to a file system. Decompressing is left to the programs that have compressed.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom},
    path::{Component, Path, PathBuf},
    process::{Command, Stdio},
};

use openssl::sha::sha256;
use zeroize::Zeroizing;

/// Links are followed at most this often, as path_resolution(7) has it.
const MOST_LINKS: usize = 40;
/// No file in an image is larger; a length beyond it is no cpio archive.
const MOST_FILE_BYTES: u64 = 1 << 30;

/// Where an image has its crypttab: initramfs-tools, dracut.
const CRYPTTABS: [&str; 2] = ["cryptroot/crypttab", "etc/crypttab"];

/// What is in an image.
#[derive(Default)]
pub struct Initrd {
    entries: BTreeMap<PathBuf, Entry>,
    crypttab: Option<String>,
}

/// A file or link of an image.
pub enum Entry {
    /// A file.
    File(Contents),
    /// A symbolic link.
    Link(PathBuf),
    /// A directory or device.
    Other,
}

/// What is known of a file; not the bytes, for they may be a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// SHA-256 of the bytes.
    pub digest: [u8; 32],
    /// It holds a private key that is not bound to a TPM.
    pub private_key: bool,
}

impl Contents {
    /// Of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        // RFC 7468 section 10 and 11, and OpenSSL's older labels: all end so.
        const LABEL: &[u8] = b"PRIVATE KEY-----";
        let labels = bytes.windows(LABEL.len()).enumerate().filter(|(_, window)| *window == LABEL);
        let begins = |at: usize, label: &[u8]| bytes[..at].ends_with(label);
        // The word alone, as in programs that know the format, is no key.
        let kinds: [&[u8]; 5] =
            [b"-----BEGIN ", b"-----BEGIN EC ", b"-----BEGIN RSA ", b"-----BEGIN ENCRYPTED ", b"-----BEGIN OPENSSH "];
        let keys = labels.filter(|(at, _)| kinds.iter().any(|kind| begins(*at, kind)));
        let has_body = |at: usize| {
            bytes.get(at + LABEL.len()..).is_some_and(|rest| rest.starts_with(b"\n") || rest.starts_with(b"\r\n"))
        };
        Self { digest: sha256(bytes), private_key: keys.into_iter().any(|(at, _)| has_body(at) && is_text(bytes)) }
    }
}

/// A PEM file is text; a program that can read one is not.
fn is_text(bytes: &[u8]) -> bool {
    !bytes.contains(&0)
}

impl Initrd {
    /// Reads an image.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut image = Self::default();
        let mut file = BufReader::new(File::open(path)?);
        loop {
            let start = skip_zeroes(&mut file)?;
            let mut magic = [0; 6];
            let length = fill(&mut file, &mut magic)?;
            file.seek(SeekFrom::Start(start))?;
            match &magic[..length] {
                [] => break,
                b"070701" | b"070702" => image.archive(&mut file)?,
                magic => {
                    image.compressed(program(magic)?, path, start)?;
                    // How long the compressed archive is, only its program knows; it is the last.
                    break;
                }
            }
        }
        if image.entries.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is no initramfs: there is no cpio archive in it",
            ));
        }
        Ok(image)
    }

    /// What is at a path, links followed.
    pub fn find(&self, path: &Path) -> Option<&Entry> {
        self.entries.get(&self.resolve(path, &mut 0)?)
    }

    /// All files, by their own paths.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &Contents)> {
        self.entries.iter().filter_map(|(path, entry)| match entry {
            Entry::File(contents) => Some((path.as_path(), contents)),
            _ => None,
        })
    }

    /// The text of its crypttab, if it has one.
    pub fn crypttab(&self) -> Option<&str> {
        self.crypttab.as_deref()
    }

    fn resolve(&self, path: &Path, links: &mut usize) -> Option<PathBuf> {
        let mut resolved = PathBuf::new();
        for component in path.components() {
            match component {
                Component::Normal(name) => {
                    resolved.push(name);
                    if let Some(Entry::Link(target)) = self.entries.get(&resolved) {
                        *links += 1;
                        if *links > MOST_LINKS {
                            return None;
                        }
                        resolved.pop();
                        let target = if target.is_absolute() { target.clone() } else { resolved.join(target) };
                        resolved = self.resolve(&target, links)?;
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

    fn compressed(&mut self, (program, options): (&str, &[&str]), path: &Path, start: u64) -> io::Result<()> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(start))?;
        let failed =
            |error: io::Error| io::Error::new(error.kind(), format!("it is compressed, and {program} fails: {error}"));
        let mut child = Command::new(program)
            .args(options)
            .stdin(file)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed)?;
        let mut stream = BufReader::new(child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?);
        let read = self.archive(&mut stream);
        drop(stream);
        child.wait()?;
        read.map_err(failed)
    }

    /// One archive, to its trailer.
    fn archive(&mut self, stream: &mut impl Read) -> io::Result<()> {
        loop {
            let mut header = [0; 110];
            stream.read_exact(&mut header)?;
            let invalid = || io::Error::new(io::ErrorKind::InvalidData, "a header of its cpio archive is damaged");
            let number = |field: usize| -> io::Result<u64> {
                let digits = &header[6 + 8 * field..14 + 8 * field];
                std::str::from_utf8(digits)
                    .ok()
                    .and_then(|digits| u64::from_str_radix(digits, 16).ok())
                    .ok_or_else(invalid)
            };
            let (mode, bytes, name_bytes) = (number(1)?, number(6)?, number(11)?);
            if !header.starts_with(b"07070") || bytes > MOST_FILE_BYTES || !(1..=4096).contains(&name_bytes) {
                return Err(invalid());
            }
            let name = take(stream, name_bytes, header.len() as u64)?;
            let name = std::str::from_utf8(name.strip_suffix(&[0]).unwrap_or(&name)).map_err(|_| invalid())?.to_owned();
            let contents = take(stream, bytes, 0)?;
            if name == "TRAILER!!!" {
                return Ok(());
            }
            // S_IFMT of stat(2)
            let entry = match mode & 0o170_000 {
                0o100_000 => Entry::File(Contents::of(&contents)),
                0o120_000 => Entry::Link(String::from_utf8_lossy(&contents).into_owned().into()),
                _ => Entry::Other,
            };
            let path: PathBuf =
                Path::new(&name).components().filter(|part| matches!(part, Component::Normal(_))).collect();
            if CRYPTTABS.iter().any(|crypttab| path == Path::new(crypttab)) {
                self.crypttab = Some(String::from_utf8_lossy(&contents).into_owned());
            }
            self.entries.insert(path, entry);
        }
    }
}

/// So many bytes, and those that fill up to a multiple of four behind `before` others.
fn take(stream: &mut impl Read, bytes: u64, before: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut taken = Zeroizing::new(vec![0; usize::try_from(bytes).map_err(io::Error::other)?]);
    stream.read_exact(&mut taken)?;
    let mut padding = [0; 3];
    let rest = (before + bytes).next_multiple_of(4) - (before + bytes);
    stream.read_exact(&mut padding[..usize::try_from(rest).map_err(io::Error::other)?])?;
    Ok(taken)
}

fn fill(file: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..])? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

/// Goes to the first byte that is not zero, as archives are padded; where that is.
fn skip_zeroes(file: &mut (impl Read + Seek)) -> io::Result<u64> {
    let mut byte = [0];
    loop {
        if file.read(&mut byte)? == 0 {
            return file.stream_position();
        }
        if byte[0] != 0 {
            return file.seek(SeekFrom::Current(-1));
        }
    }
}

/// What decompresses (Linux, lib/decompress.c).
fn program(magic: &[u8]) -> io::Result<(&'static str, &'static [&'static str])> {
    Ok(match magic {
        [0x1f, 0x8b | 0x9e, ..] => ("gzip", &["-dc"]),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", &["-dcq"]),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => ("xz", &["-dc"]),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", &["-dcq"]),
        [b'B', b'Z', b'h', ..] => ("bzip2", &["-dc"]),
        [0x5d, 0, 0, ..] => ("lzma", &["-dc"]),
        [0x89, b'L', b'Z', b'O', ..] => ("lzop", &["-dc"]),
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it is neither a cpio archive nor compressed as one may be",
            ));
        }
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    /// Two archives as the real cpio makes them, the second compressed: as microcode and main archive are.
    fn image(folder: &Path) -> PathBuf {
        let script = "mkdir -p early/kernel main/usr/lib main/etc && cd early && echo microcode >kernel/x && \
            find . | cpio --quiet -o -H newc >../image && cd ../main && ln -s usr/lib lib && echo library >usr/lib/a.so && \
            ln -s /etc/b etc/link && printf -- '-----BEGIN PRIVATE KEY-----\\nAAAA\\n' >etc/b && \
            find . | cpio --quiet -o -H newc | gzip >>../image";
        let made = Command::new("sh").args(["-ec", script]).current_dir(folder).status().unwrap();
        assert!(made.success(), "needs cpio and gzip");
        folder.join("image")
    }

    #[test]
    fn reads_archives_behind_each_other_and_follows_links() {
        let folder = tempfile::tempdir().unwrap();
        let initrd = Initrd::read(&image(folder.path())).unwrap();
        let digest = |path: &str| match initrd.find(Path::new(path)) {
            Some(Entry::File(contents)) => Some(contents.digest),
            _ => None,
        };
        assert_eq!(digest("/kernel/x"), Some(sha256(b"microcode\n")));
        assert_eq!(digest("/lib/a.so"), Some(sha256(b"library\n")));
        assert_eq!(digest("/etc/link"), digest("/etc/b"));
        assert_eq!(digest("/etc/c"), None);
        let keys: Vec<_> = initrd.files().filter(|(_, contents)| contents.private_key).map(|(path, _)| path).collect();
        assert_eq!(keys, [Path::new("etc/b")]);
    }

    #[test]
    fn says_what_is_no_image() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let whole = fs::read(image(folder.path())).unwrap();
        for (bytes, why) in [
            (&b""[..], "no cpio archive"),
            (b"ELF, or something else", "neither a cpio archive"),
            (&whole[..200], "fill whole buffer"),
            (&whole[..whole.len() - 60], "gzip fails"),
        ] {
            fs::File::create(&path).unwrap().write_all(bytes).unwrap();
            let error = Initrd::read(&path).err().unwrap().to_string();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn knows_keys_from_programs_and_from_keys_of_a_tpm() {
        let is_key = |bytes: &[u8]| Contents::of(bytes).private_key;
        assert!(is_key(b"# mine\n-----BEGIN EC PRIVATE KEY-----\nMHcC"));
        assert!(!is_key(b"-----BEGIN TSS2 PRIVATE KEY-----\nMHcC"));
        assert!(!is_key(b"\x7fELF\0-----BEGIN PRIVATE KEY-----\n\0"));
        assert!(!is_key(b"-----BEGIN PUBLIC KEY-----\n"));
    }
}
