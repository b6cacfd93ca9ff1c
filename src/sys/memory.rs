//! How much memory this host has left.

use std::{fs, path::Path};

/// What can be had without swapping, in KiB (proc_meminfo(5)); `None` if the kernel does not say.
pub fn available_kib() -> Option<u64> {
    available_in(&fs::read_to_string(Path::new("/proc/meminfo")).ok()?)
}

fn available_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_read_as_the_kernel_writes_it() {
        let meminfo = "MemTotal:       24689764 kB\nMemFree:         3324108 kB\nMemAvailable:   23061412 kB\n";
        assert_eq!(available_in(meminfo), Some(23_061_412));
        assert_eq!(available_in("MemTotal: 1 kB\n"), None);
    }
}
