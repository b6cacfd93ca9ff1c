//! The pages for persons, followed by their own commands on one machine: a volume from its making to its removal.

use std::{fs, path::PathBuf};

use crate::{
    page,
    site::{LoopDevice, Site},
};

const ONE_MACHINE: &str = include_str!("../../docs/one-machine.md");
const BACKUP: &str = include_str!("../../docs/backup.md");
const RECOVERY: &str = include_str!("../../docs/recovery.md");
const SYSADMIN: &str = include_str!("../../docs/sysadmin.md");
const REMOVAL: &str = include_str!("../../docs/removal.md");

/// Whoever types what pages say, with this site's places for theirs.
struct Reader {
    device: LoopDevice,
    site: Site,
    /// Where they type it.
    folder: PathBuf,
}

impl Reader {
    /// What is under a heading, but for commands of another case.
    fn types(&self, page: &str, heading: &str, is_meant: impl Fn(&str) -> bool) -> String {
        let (name, sticks) = (self.site.name("data"), self.site.keys(""));
        let commands = page::commands(page, heading);
        let meant: String = commands.lines().filter(|line| is_meant(line)).map(|line| format!("{line}\n")).collect();
        let script = meant
            .replace("/dev/vdb", self.device.path())
            .replace("/dev/mapper/data", &format!("/dev/disk/by-cryptattach/{name}"))
            .replace(" data\n", &format!(" {name}\n"))
            // A stick has more room than this site's memory.
            .replace("/media/usb/vdb.header", self.site.path("vdb.header").to_str().unwrap())
            .replace("/media/safe/", sticks)
            .replace("plain.img", self.site.path("plain.img").to_str().unwrap())
            .replace("FILE NAME", &format!("{} {name}", self.device.path()))
            .replace(" NAME\n", &format!(" {name}\n"))
            .replace("/media/usb/", sticks)
            .replace("/mnt/keys/", sticks)
            .replace("cinder", "stick");
        assert!(script.contains("cryptattach "), "{heading}: {commands}");
        let program = PathBuf::from(env!("CARGO_BIN_EXE_cryptattach"));
        let path = format!("{}:{}", program.parent().unwrap().display(), std::env::var("PATH").unwrap());
        let config = self.site.keys("cryptattach.toml");
        page::run(&self.folder, &script, &[("PATH", &path), ("CRYPTATTACH_CONFIG", config)])
    }
}

#[test]
fn an_owner_makes_backs_up_rehearses_restores_and_removes_a_volume_by_the_pages() {
    let site = Site::bare();
    let file = site.file("disk", 64 << 20);
    let reader = Reader { device: LoopDevice::new(&file, ""), folder: site.path(""), site };
    let all = |_: &str| true;

    // The words on paper are the page's other case.
    let done =
        reader.types(ONE_MACHINE, "## A data disk, with the key on a stick", |line| !line.contains("--recovery"));
    assert!(done.contains("\napart: "), "{done}");
    reader.types(ONE_MACHINE, "## When something goes wrong", all);

    let kept = reader.types(BACKUP, "## A container", all);
    assert!(kept.contains("would save 1 of 1 keys"), "{kept}");
    reader.types(BACKUP, "## A header", |line| !line.contains("--key"));
    fs::remove_dir_all(reader.site.keys("stick")).unwrap();
    let back = reader.types(BACKUP, "## Restore a container", |line| line.contains("--create"));
    assert!(back.contains("written          2"), "{back}");
    let rehearsed = reader.types(RECOVERY, "## Rehearse", |line| line.contains("--identity"));
    assert!(rehearsed.contains("would save 1 of 1 keys"), "{rehearsed}");
    reader.site.attaches(reader.device.path());

    // A terminal would be asked.
    let removal = REMOVAL.replace("key erase /dev/vdb", "key erase /dev/vdb --yes");
    let erased = reader.types(&removal, "## A volume", |line| line.contains("erase"));
    assert!(erased.contains("deleted by its store"), "{erased}");
    assert!(reader.site.fails(65, &["test", reader.device.path()]).contains("has no LUKS header"));
}

#[test]
fn a_system_administrator_makes_a_store_and_copies_a_volume_by_the_page() {
    let site = Site::bare();
    let file = site.file("disk", 32 << 20);
    let reader = Reader { device: LoopDevice::new(&file, ""), folder: site.keys("").into(), site };
    let all = |_: &str| true;
    let made = reader.types(SYSADMIN, "## 1. Choose a store", all);
    assert!(made.contains("container key    logs/kek/1"), "{made}");
    reader.site.ok(&["format", reader.device.path()]);
    reader.types(SYSADMIN, "## 4. Attach them", all);
    assert!(reader.site.path("plain.img").metadata().unwrap().len() > 0);
    let told = reader.types(SYSADMIN, "## 5. Prove that key and data are apart", all);
    assert!(told.contains("\napart: "), "{told}");
}
