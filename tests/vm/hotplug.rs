//! Hot-plug: volumes are attached when they appear, and gone when they go.

use crate::{
    Story,
    machine::{Disk, DiskOptions, Machine},
};

pub const STORIES: &[Story] = &[
    ("a listed volume is attached when it appears, unmounted and detached when it goes", comes_and_goes),
    ("what failed in a unit is explained, and tried again", explained),
    ("where all are wanted, ours are attached, others are not", all),
];

const MIB: u64 = 1 << 20;

/// A volume that the configuration lists as `data`, pulled out.
fn listed(machine: &mut Machine) -> Disk {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path} && cryptattach attach {path} new && mkfs.ext4 -q /dev/mapper/new"));
    machine.ok("cryptattach detach new");
    list(machine, &disk);
    machine.unplug(&disk);
    disk
}

/// Lists the volume on a disk as `data`, and no other.
fn list(machine: &mut Machine, disk: &Disk) {
    let uuid = machine.ok(&format!("cryptsetup luksUUID {}", disk.path()));
    machine.ok(&format!(
        "[ -e /root/unlisted.toml ] || cp /etc/cryptattach/cryptattach.toml /root/unlisted.toml
         {{ cat /root/unlisted.toml; printf '\\n[volumes.data]\\ndevice = \"UUID={uuid}\"\\n'; }} >/etc/cryptattach/cryptattach.toml
         systemctl daemon-reload"
    ));
}

fn unlist(machine: &mut Machine) {
    machine.ok("cp /root/unlisted.toml /etc/cryptattach/cryptattach.toml && systemctl daemon-reload");
}

fn comes_and_goes(machine: &mut Machine) {
    let disk = listed(machine);
    machine.ok("mkdir -p /data && echo '/dev/mapper/data /data ext4 nofail,x-systemd.wanted-by=dev-mapper-data.device' >>/etc/fstab");
    machine.ok("systemctl daemon-reload");
    for _ in 0..2 {
        machine.replug(&disk);
        machine.eventually("mountpoint -q /data && systemctl is-active cryptattach@data.service");
        machine.ok("test $(readlink -f /dev/disk/by-cryptattach/data) = $(readlink -f /dev/mapper/data)");
        let known = machine.ok(&format!("udevadm info {}", disk.path()));
        assert!(known.contains("ID_CRYPTATTACH_KEY=cinder/"), "{known}");
        // What a person stops stays so, whatever happens to the device.
        machine.ok(&format!(
            "systemctl stop data.mount cryptattach@data && udevadm trigger --settle {} && sleep 1 &&
             ! systemctl is-active cryptattach@data && test -z \"$(systemctl list-jobs --no-legend)\" && systemctl start data.mount",
            disk.path()
        ));
        machine.unplug(&disk);
        machine.eventually("! mountpoint -q /data && ! systemctl is-active cryptattach@data.service");
        assert_eq!(machine.eventually("! dmsetup info data 2>/dev/null && ls /dev/mapper"), "control");
        machine.ok("test ! -e /dev/disk/by-cryptattach/data && ! systemctl is-failed cryptattach@data.service");
    }
    machine.ok("sed -i '/mapper.data/d' /etc/fstab");
    unlist(machine);
}

fn explained(machine: &mut Machine) {
    let disk = listed(machine);
    machine.ok("mv /keys/cinder /keys/gone");
    machine.replug(&disk);
    let told = machine.eventually("cryptattach explain data | grep -A9 'exit code 69'");
    assert!(told.contains("because No such file or directory") && told.contains("next: check that"), "{told}");
    let json: serde_json::Value = serde_json::from_str(&machine.ok("cryptattach explain data --json")).unwrap();
    assert_eq!((&json[0]["name"], &json[0]["told"]["exit_code"]), (&"data".into(), &69.into()));
    machine.ok("mv /keys/gone /keys/cinder");
    machine.eventually("systemctl is-active cryptattach@data.service && test -b /dev/mapper/data");
    assert_eq!(machine.ok("cryptattach explain data"), "no failure of 'data' is recorded since the last boot");
    machine.unplug(&disk);
    machine.eventually("! dmsetup info data 2>/dev/null");
    unlist(machine);
}

fn all(machine: &mut Machine) {
    let disks = [(); 3].map(|()| machine.plug(64 * MIB, DiskOptions::default()));
    let [ours, in_crypttab, foreign] = &disks;
    let format = |disk: &Disk| format!("cryptattach format --keyslot {}", disk.path());
    machine.ok(&format!("{} && {}", format(ours), format(in_crypttab)));
    machine.ok(&format!(
        "printf %s x | cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 {} -",
        foreign.path()
    ));
    let [ours_uuid, crypttab_uuid, _] =
        disks.each_ref().map(|disk| machine.ok(&format!("cryptsetup luksUUID {}", disk.path())));
    machine.ok(&format!("echo tab UUID={crypttab_uuid} none luks,noauto >/etc/crypttab"));
    for disk in &disks {
        machine.unplug(disk);
    }
    machine.ok("cp /etc/cryptattach/cryptattach.toml /root/unlisted.toml &&
         { echo 'hotplug = \"all\"'; cat /root/unlisted.toml; } >/etc/cryptattach/cryptattach.toml && systemctl daemon-reload");
    for disk in [foreign, in_crypttab, ours] {
        machine.replug(disk);
    }
    machine.eventually(&format!("test -b /dev/mapper/luks-{ours_uuid}"));
    machine.ok("udevadm settle && systemctl is-system-running --wait >/dev/null || true");
    assert_eq!(machine.ok("ls /dev/mapper"), format!("control\nluks-{ours_uuid}"));
    for disk in &disks {
        machine.unplug(disk);
    }
    machine.eventually("! dmsetup ls | grep -q luks");
    machine.ok("rm /etc/crypttab");
    unlist(machine);
}
