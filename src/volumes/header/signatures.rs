//! What libblkid knows a device to hold: file systems, RAID members, partition tables, LUKS, ...

use std::path::Path;

use libblkid_rs::{BlkidErr, BlkidProbe, BlkidProbeRet};

use super::VolumeError;

/// The signatures on a device, in words; `None` if libblkid finds none.
pub fn find(path: &Path) -> Result<Option<String>, VolumeError> {
    let found = probe(path).map_err(|source| VolumeError::Signatures { path: path.to_owned(), source })?;
    Ok((!found.is_empty()).then(|| found.join(", ")))
}

/// All signatures, not only the first, so that a RAID member with a file system in it is named in full.
fn probe(path: &Path) -> Result<Vec<String>, BlkidErr> {
    let mut probe = BlkidProbe::new_from_filename(path)?;
    probe.enable_superblocks(true)?;
    probe.enable_partitions(true)?;
    let mut found = Vec::new();
    while let BlkidProbeRet::Success = probe.do_probe()? {
        if let Ok(name) = probe.lookup_value("TYPE") {
            found.push(name);
        } else if let Ok(name) = probe.lookup_value("PTTYPE") {
            found.push(format!("{name} partition table"));
        } else {
            found.push("an unnamed signature".to_owned());
        }
    }
    Ok(found)
}
