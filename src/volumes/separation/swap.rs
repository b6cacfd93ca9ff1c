//! Swap: where the kernel may write memory, and with it what programs know.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::Serialize;

use super::lineage::Lineage;
use crate::sys::{
    block::DeviceNumber,
    mounts::decoded,
    sysfs::{Sysfs, attribute},
};

/// A device or file that the kernel may write memory to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    pub path: PathBuf,
    /// What is written there.
    pub kind: SwapKind,
    /// What it rests on.
    pub lineage: Lineage,
}

/// What is written to a swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SwapKind {
    /// Pages of memory, while the host runs; it may be the place of a hibernation image as well.
    Pages,
    /// All memory, when the host hibernates.
    Hibernation,
}

impl Swap {
    /// All swap in use (proc_swaps(5)), and the device that the kernel resumes from.
    pub(crate) fn on(sysfs: &Sysfs) -> Vec<Self> {
        let table = fs::read(sysfs.at("proc/swaps")).unwrap_or_default();
        let lines = table.split(|byte| *byte == b'\n').skip(1);
        let paths = lines.filter_map(|line| line.split(u8::is_ascii_whitespace).next().filter(|path| !path.is_empty()));
        let mut swaps: Vec<_> = paths.map(|path| Self::in_use(sysfs, PathBuf::from(decoded(path)))).collect();
        swaps.extend(Self::resumed_from(sysfs, &swaps));
        swaps
    }

    fn in_use(sysfs: &Sysfs, path: PathBuf) -> Self {
        Self { lineage: Lineage::of_existing(sysfs, &path), kind: SwapKind::Pages, path }
    }

    /// `/sys/power/resume` (Documentation/ABI/testing/sysfs-power): a hibernation image is written there.
    fn resumed_from(sysfs: &Sysfs, swaps: &[Self]) -> Option<Self> {
        let number: DeviceNumber = attribute(&sysfs.at("sys/power/resume"))?.parse().ok()?;
        if number.0 == 0 {
            return None;
        }
        let lineage = Lineage::of_number(sysfs, number);
        let path = Path::new("/dev/block").join(number.to_string());
        let known = swaps.iter().any(|swap| swap.lineage.tree.below.contains(&lineage.tree));
        (!known).then_some(Self { path, kind: SwapKind::Hibernation, lineage })
    }
}
