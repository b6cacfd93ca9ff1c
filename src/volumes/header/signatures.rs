//! What libblkid knows a device to hold: file systems, RAID members, partition tables, LUKS, ...

use std::path::Path;

use libblkid_rs::{BlkidErr, BlkidProbe, BlkidProbeRet, BlkidSublks, BlkidSublksFlags};

/// The signatures on a device, in words; `None` if libblkid finds none. All of them, so that a RAID member with a file
/// system in it is named in full.
pub fn find(path: &Path) -> Result<Option<String>, BlkidErr> {
    let mut probe = BlkidProbe::new_from_filename(path)?;
    probe.enable_superblocks(true)?;
    probe.set_superblock_flags(BlkidSublksFlags::new(vec![BlkidSublks::Type, BlkidSublks::Magic]))?;
    probe.enable_partitions(true)?;
    let mut found = Vec::new();
    while let BlkidProbeRet::Success = probe.do_probe()? {
        let name = probe
            .lookup_value("TYPE")
            .or_else(|_| probe.lookup_value("PTTYPE").map(|kind| format!("{kind} partition table")))
            .unwrap_or_else(|_| "an unnamed signature".to_owned());
        found.push(match probe.lookup_value("SBMAGIC_OFFSET") {
            Ok(at) => format!("{name} (at byte {at})"),
            Err(_) => name,
        });
    }
    Ok((!found.is_empty()).then(|| found.join(", ")))
}
