//! What the PCRs will be at the next boot, if only files change that GRUB reads: an initramfs that was made anew, a kernel
//! under the same name, a grub.cfg.
//!
//! The event log is gone through again, with the files' present content. It cannot be foretold what only a boot shows: other
//! commands of GRUB (PCR 8, a kernel under another name), another EFI application (PCR 4).

use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use openssl::sha::Sha256;

use super::{Digest, Event, PcrValues, Tpm, TpmError};
use crate::base::pcr_set::PcrSet;

/// The PCR into which GRUB measures files.
const FILES: u8 = 9;
/// Where the file systems that GRUB reads from may be mounted.
const ROOTS: [&str; 3] = ["/", "/boot", "/boot/efi"];

/// The PCRs of the next boot.
pub struct Foretold {
    /// Their values.
    pub values: PcrValues,
    /// The files that have changed since this boot.
    pub changed: Vec<PathBuf>,
}

impl Tpm {
    /// What these PCRs will be at the next boot; `None` if the event log does not explain what GRUB's files are now.
    pub fn foretell(&self, pcrs: PcrSet) -> Result<Option<Foretold>, TpmError> {
        let mut values = self.pcr_values(pcrs)?;
        if values.get(FILES).is_some_and(|value| self.event_log().replay(FILES).unwrap_or_default() != *value) {
            return Ok(None);
        }
        let mut changed = Vec::new();
        if pcrs.contains(FILES) {
            let mut running = [0; 32];
            for event in self.event_log().events().unwrap_or_default().iter().filter(|event| event.pcr == FILES) {
                let digest = match present(event)? {
                    Some((file, digest)) if digest != event.digest => {
                        changed.push(file);
                        digest
                    }
                    _ => event.digest,
                };
                running = openssl::sha::sha256(&[running, digest].concat());
            }
            values.insert(FILES, running);
        }
        Ok(Some(Foretold { values, changed }))
    }
}

/// The file that an event of GRUB is about, and the digest of what is in it now.
fn present(event: &Event) -> Result<Option<(PathBuf, Digest)>, TpmError> {
    // GRUB's name for it may have the device in front: (hd0,gpt2)/grub/grub.cfg.
    let name = event.description.rsplit_once(')').map_or(event.description.as_str(), |(_, name)| name);
    if event.kind != "IPL" || !name.starts_with('/') {
        return Ok(None);
    }
    let found = ROOTS.iter().map(|root| Path::new(root).join(name.trim_start_matches('/'))).find(|path| path.is_file());
    let Some(path) = found else { return Ok(None) };
    let digest = digest_of(&path).map_err(|source| TpmError::File { action: "read", path: path.clone(), source })?;
    Ok(Some((path, digest)))
}

fn digest_of(path: &Path) -> io::Result<Digest> {
    let (mut file, mut hash, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finish()),
            len => hash.update(&buffer[..len]),
        }
    }
}
