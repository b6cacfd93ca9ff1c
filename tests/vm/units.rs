//! Units: volumes at boot and at shutdown, and what units may do.

use crate::{
    Story,
    machine::{DiskOptions, Machine},
};

pub const STORIES: &[Story] = &[
    ("systemd-cryptsetup opens volumes by the key socket and by the token", crypttab),
    ("volumes are attached and mounted at boot, and detached cleanly at shutdown", boot),
    ("a userspace worker has a scope, and writers at their memory limit do not hang", scope),
    ("a rotation that a reboot has ended goes on by itself, below what is mounted", rotation),
    ("units may do little", hardened),
];

const MIB: u64 = 1 << 20;

fn crypttab(machine: &mut Machine) {
    let disk = machine.plug(64 * MIB, DiskOptions::default());
    machine.ok(&format!("cryptattach format --keyslot {}", disk.path()));
    let uuid = machine.ok(&format!("cryptsetup luksUUID {}", disk.path()));
    machine.ok(&format!(
        "printf 'sock UUID={uuid} /run/cryptattach-key.socket luks,noauto,headless=1\\ntok UUID={uuid} none luks,noauto,headless=1\\n' >/etc/crypttab
         systemctl daemon-reload"
    ));
    for name in ["sock", "tok"] {
        machine.ok(&format!("systemctl start systemd-cryptsetup@{name} && test -b /dev/mapper/{name}"));
        machine.ok(&format!("systemctl stop systemd-cryptsetup@{name} && test ! -e /dev/mapper/{name}"));
    }
    machine.ok("mv /keys/cinder /keys/gone");
    machine.fails(1, "systemctl start systemd-cryptsetup@sock");
    let explained = machine.ok("cryptattach explain sock");
    assert!(explained.contains("cannot open the key store /keys/cinder"), "{explained}");
    machine.ok("mv /keys/gone /keys/cinder");
    // Only systemd-cryptsetup is answered, and only for volumes that are listed.
    machine.fails(
        1,
        &format!(
            "$(command -v systemd-cryptsetup || echo /lib/systemd/systemd-cryptsetup) \
             attach other {} /run/cryptattach-key.socket headless=1",
            disk.path()
        ),
    );
    machine.ok("perl -MIO::Socket::UNIX -e 'exit length(readline(IO::Socket::UNIX->new(Peer => q(/run/cryptattach-key.socket))) // q())'");
    let told = machine.ok("journalctl --sync && journalctl -b -o cat -u 'cryptattach-key@*'");
    for reason in
        ["neither /etc/crypttab nor the configuration has a volume 'other'", "only systemd-cryptsetup gets an answer"]
    {
        assert!(told.contains(reason), "{reason}: {told}");
    }
    assert_eq!(machine.ok("stat -c %a /run/cryptattach-key.socket"), "600");
    machine.ok("rm /etc/crypttab && systemctl daemon-reload && systemctl reset-failed");
    machine.unplug(&disk);
}

fn boot(machine: &mut Machine) {
    let disks = [(); 3].map(|()| machine.plug(64 * MIB, DiskOptions::default()));
    let [data, remote, compatible] = &disks;
    machine.ok(&format!(
        "cryptattach format {} && cryptattach format {} && cryptattach format --keyslot {}",
        data.path(),
        remote.path(),
        compatible.path()
    ));
    let uuids = disks.each_ref().map(|disk| machine.ok(&format!("cryptsetup luksUUID {}", disk.path())));
    let [data_uuid, remote_uuid, compatible_uuid] = &uuids;
    machine.ok(&format!(
        "printf '\\n[volumes.my-data]\\ndevice = \"UUID={data_uuid}\"\\n[volumes.remote]\\ndevice = \"UUID={remote_uuid}\"\\nnetwork = true\\n' >>/etc/cryptattach/cryptattach.toml
         echo 'tab UUID={compatible_uuid} none luks' >/etc/crypttab
         systemctl daemon-reload && systemctl start cryptattach@my\\\\x2ddata cryptattach@remote &&
         mkfs.ext4 -q /dev/mapper/my-data && mkfs.ext4 -q /dev/mapper/remote && mkdir -p /data /remote &&
         echo '/dev/mapper/my-data /data ext4 defaults 0 2' >>/etc/fstab
         echo '/dev/mapper/remote /remote ext4 _netdev 0 2' >>/etc/fstab
         systemctl daemon-reload && mount /data && mount /remote && echo before >/data/told"
    ));

    machine.reboot();
    machine.ok("systemctl is-system-running --wait || { systemctl --failed; exit 1; }");
    machine.ok("systemd-run --quiet --unit=cryptattach-renew --on-calendar='*-01-01' true");
    machine.ok("cryptattach status --json | grep -E '\"unit\":\"cryptattach-renew.timer\",\"activates\":\"cryptattach-renew.service\",\"next\":[1-9]'");
    machine.ok("cryptattach status | grep 'cryptattach-renew.timer starts cryptattach-renew.service, next on ' && systemctl stop cryptattach-renew.timer");
    machine.ok("mountpoint -q /data && mountpoint -q /remote");
    assert_eq!(machine.ok("cat /data/told; ls /dev/mapper | xargs"), "before\ncontrol my-data remote tab");
    machine.ok("! journalctl -b | grep -i 'ordering cycle'");
    // Of the shutdown before: file systems went first, then their volumes, and nothing was left to recover.
    let order = machine.ok(
        "journalctl -b -1 -o cat | grep -E '^(Unmounted (data|remote).mount|Stopp(ed|ing) cryptattach@(my|remote))'",
    );
    let at = |line: &str| order.find(line).unwrap_or_else(|| panic!("{line}: {order}"));
    assert!(at("Unmounted data.mount") < at("Stopping cryptattach@my"), "{order}");
    assert!(at("Unmounted remote.mount") < at("Stopping cryptattach@remote"), "{order}");
    machine.ok("journalctl -b -1 -u 'cryptattach@my*' -u cryptattach@remote >/tmp/units
         grep -q Stopped /tmp/units && ! grep 'because\\|Failed' /tmp/units");
    machine.ok("! journalctl -b -k | grep -i 'recovery complete'");

    machine.ok(
        "umount /data /remote && systemctl stop cryptattach@my\\\\x2ddata cryptattach@remote systemd-cryptsetup@tab",
    );
    machine.ok("sed -i '/mapper/d' /etc/fstab && rm /etc/crypttab && systemctl daemon-reload");
    for disk in &disks {
        machine.unplug(disk);
    }
}

/// A rotation that has rewritten some of the data, and is slow enough to be met in the middle.
const AT_WORK: &str = "cryptattach status rotated | grep -E 're-encrypting, [1-9][0-9]* %, running'";

fn rotation(machine: &mut Machine) {
    let disk = machine.plug(80 * MIB, DiskOptions::default());
    let path = disk.path();
    machine.ok(&format!("cryptattach format {path}"));
    let uuid = machine.ok(&format!("cryptsetup luksUUID {path}"));
    let before = machine.ok(&format!(
        "cp /etc/cryptattach/cryptattach.toml /etc/fstab /root
         printf '\\n[volumes.rotated]\\ndevice = \"UUID={uuid}\"\\n' >>/etc/cryptattach/cryptattach.toml
         systemctl daemon-reload && systemctl start cryptattach@rotated && mkfs.ext4 -q /dev/mapper/rotated &&
         mkdir -p /rotated && echo '/dev/mapper/rotated /rotated ext4 defaults 0 2' >>/etc/fstab &&
         systemctl daemon-reload && mount /rotated && head -c 30M /dev/urandom >/rotated/data && sync &&
         systemd-run --quiet cryptattach key rotate {path} --rate 1 --json &&
         sha256sum /rotated/data"
    ));
    machine.eventually(AT_WORK);
    machine.reboot();
    machine.eventually(
        "journalctl --sync; journalctl -b -o cat -u 'cryptattach-rekey@*' | grep '\"attached\":\"rotated\"'",
    );
    let status = machine.ok("cryptattach status rotated --json; ls /dev/mapper | xargs; systemctl --failed");
    assert!(!status.contains("\"rotation\"") && !status.contains("overlay"), "{status}");
    assert_eq!(machine.ok("echo 3 >/proc/sys/vm/drop_caches; sha256sum /rotated/data"), before);

    // A host that knows nothing of the rotation goes on with it where it attaches the volume.
    machine.ok(&format!(
        "systemd-run --quiet --unit=again -p SuccessExitStatus=83 -p RemainAfterExit=yes cryptattach key rotate {path} --rate 1"
    ));
    machine.eventually(AT_WORK);
    machine.ok(
        "systemctl kill again && until [ \"$(systemctl show -P SubState again)\" = exited ]; do sleep 0.1; done &&
         test $(systemctl show -P ExecMainStatus again) = 83 && umount /rotated && systemctl stop again cryptattach@rotated &&
         rm -r /var/lib/cryptattach/rekey && systemctl start cryptattach@rotated && mount /rotated",
    );
    machine.eventually(
        "journalctl --sync; test $(journalctl -b -o cat -u 'cryptattach-rekey@*' | grep -c '\"attached\":\"rotated\"') = 2",
    );
    let status = machine.ok("cryptattach status rotated --json");
    assert!(!status.contains("\"rotation\""), "{status}");
    assert_eq!(machine.ok("echo 3 >/proc/sys/vm/drop_caches; sha256sum /rotated/data"), before);
    machine.ok("umount /rotated && systemctl stop cryptattach@rotated && cp /root/cryptattach.toml /etc/cryptattach && cp /root/fstab /etc &&
         systemctl daemon-reload && systemctl reset-failed");
    machine.unplug(&disk);
}

fn scope(machine: &mut Machine) {
    let disk = machine.plug(160 * MIB, DiskOptions::default());
    machine.ok(&format!("cryptattach format {}", disk.path()));
    // Attached inside of the limit as well: were the worker in there, it would need memory that only it can free.
    let limited = format!(
        "cryptattach attach {} pressed+1 --backend userspace --export fuse && cd /dev/disk/by-cryptattach &&
         mkfs.ext4 -q pressed+1 && mkdir -p /pressed && mount pressed+1 /pressed &&
         for i in 1 2; do dd if=/dev/zero of=/pressed/$i bs=1M count=40 conv=fsync status=none & done && wait &&
         cat /sys/fs/cgroup/system.slice/limited.scope/memory.events",
        disk.path()
    );
    let events = machine.ok(&format!(
        "timeout 600 systemd-run --quiet --scope --slice=system --unit=limited -p MemoryMax=48M -p MemorySwapMax=0 sh -c '{limited}'"
    ));
    assert!(!events.contains("\nmax 0\n"), "the limit was never reached, so that this shows nothing: {events}");
    let group = machine.ok("cat /proc/$(pgrep -f userspace-worker)/cgroup");
    assert_eq!(group, r"0::/system.slice/cryptattach-pressed\x2b1.scope");
    assert_eq!(
        machine.ok(r"systemctl show -P Description 'cryptattach-pressed\x2b1.scope'"),
        "Encrypted volume pressed+1"
    );
    machine.ok(
        "umount /pressed && e2fsck -fn /dev/disk/by-cryptattach/pressed+1 2>/dev/null && cryptattach detach pressed+1",
    );
    machine.ok(r"! systemctl is-active --quiet 'cryptattach-pressed\x2b1.scope'");
    machine.unplug(&disk);
}

pub fn hardened(machine: &mut Machine) {
    // Tenths of systemd's exposure level, 0 to 100: up to 30 passes. systemd-cryptsetup@ itself has 95.
    let units = ["cryptattach@x", "cryptattach-hotplug@x", "cryptattach-key@x"].map(|unit| format!("{unit}.service"));
    let told = machine.ok(&format!("systemd-analyze security --no-pager --threshold=30 {}", units.join(" ")));
    told.lines().filter(|line| line.contains("Overall")).for_each(|line| println!("{line}"));
}
