//! How long until the root is there, and what the initramfs weighs: ours next to clevis and systemd-cryptenroll, in the same
//! machine with the same kernel and disk, in turn.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    machine::{Machine, Parts, STATIC},
    site::{PASSPHRASE, Site, UUID, tree},
    stories::{self, NET},
};

/// Boots of each; more would say little more on a machine that others use as well.
const ROUNDS: usize = 3;

struct Row {
    name: &'static str,
    parts: Parts,
    /// The initramfs of the same maker that only asks for a passphrase.
    base: PathBuf,
}

/// Prints the table.
pub fn compare(site: &Site) {
    let peers = tree(&[
        "clevis",
        "clevis-luks",
        "clevis-tpm2",
        "clevis-initramfs",
        "tang",
        "tpm2-tools",
        "curl",
        "libtss2-tcti-swtpm0",
        "libtss2-rc0",
    ]);
    let mkinitramfs = initrd(site, &site.tree(""), "mkinitramfs", "base", "", "none luks,initramfs");
    let dracut = initrd(site, &site.tree(""), "dracut", "base-dracut", "", "none luks");
    let rows = [
        floor(site, &mkinitramfs),
        lockbox(site, &mkinitramfs),
        network(site, &mkinitramfs),
        tang(site, &peers, &mkinitramfs),
        clevis_tpm2(site, &peers, &mkinitramfs),
        cryptenroll(site, &peers, &dracut),
    ];
    let mut seconds = vec![Vec::new(); rows.len()];
    for _ in 0..ROUNDS {
        for (row, seconds) in rows.iter().zip(&mut seconds) {
            seconds.push(boot(site, row));
        }
    }
    println!("{:<44} {:>8} {:>8} {:>12}", "", "best s", "median s", "growth MB");
    for (row, mut seconds) in rows.iter().zip(seconds) {
        seconds.sort_by(f64::total_cmp);
        let size = |path: &Path| fs::metadata(path).unwrap().len() as f64 / 1e6;
        let growth = size(&row.parts.initrd) - size(&row.base);
        println!("{:<44} {:>8.1} {:>8.1} {:>12.1}", row.name, seconds[0], seconds[ROUNDS / 2], growth);
    }
}

/// Seconds since the kernel's start when the root's init runs.
fn boot(site: &Site, row: &Row) -> f64 {
    // Each boot finds the TPM as it was when its key was made.
    let tpm = row.parts.tpm.as_ref().map(|state| {
        site.sh(&format!("rm -rf tpm.now; cp -r {} tpm.now", state.display()));
        site.file("tpm.now")
    });
    let mut machine: Machine = site.start(&format!("bench {}", row.name), &Parts { tpm, ..row.parts.clone() });
    machine.see("BOOTED from /dev/mapper/root up ");
    let rest = machine.shown.rsplit_once(" up ").unwrap().1.to_owned();
    machine.see("\n");
    let line = machine.shown.rsplit_once(" up ").map_or(rest, |(_, line)| line.to_owned());
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// cryptsetup with a passphrase that needs nobody: no way of unlocking is faster than that.
fn floor(site: &Site, base: &Path) -> Row {
    let script = format!("#!/bin/sh\nprintf {PASSPHRASE}\n");
    site.add("floor", "usr/local/sbin/passphrase", &script);
    let key = "none luks,initramfs,keyscript=/usr/local/sbin/passphrase";
    let initrd = initrd(site, &site.tree(""), "mkinitramfs", "floor", "", key);
    Row { name: "cryptsetup, passphrase in the image (floor)", parts: parts(site, initrd), base: base.into() }
}

fn lockbox(site: &Site, base: &Path) -> Row {
    let (parts, _) = stories::lockbox_parts(site, "lockbox", &stories::values(site));
    Row { name: "cryptattach, TPM lockbox", parts, base: base.into() }
}

fn network(site: &Site, base: &Path) -> Row {
    let initrd = site.initrd("net", &format!("[boot]\nsecrets_in_image = true\n{NET}"));
    Row {
        name: "cryptattach, network store",
        parts: stories::with_network(site, &initrd, &site.server()),
        base: base.into(),
    }
}

fn tang(site: &Site, peers: &Path, base: &Path) -> Row {
    site.sh(&format!(
        "mkdir -p tang && chroot {0}/root /usr/libexec/tangd-keygen /mnt && mv {0}/root/mnt/* {0}/root/mnt/.[!.]* tang/ 2>/dev/null || true",
        peers.display()
    ));
    let server = site.file("tang-connection");
    let command = format!(
        "#!/bin/sh\nexec unshare -m sh -c 'mount --bind {1} {0}/root/mnt && exec chroot {0}/root /usr/libexec/tangd /mnt' 2>/dev/null\n",
        peers.display(),
        site.file("tang").display()
    );
    fs::write(&server, command).unwrap();
    site.sh(
        "chmod +x tang-connection; printf 'GET /adv HTTP/1.0\\r\\n\\r\\n' | ./tang-connection | sed '1,/^\\r*$/d' >adv",
    );
    bind(
        site,
        peers,
        "tang.img",
        "clevis luks bind -y -k /mnt/passphrase -d /mnt/root.img tang '{\"url\":\"http://10.0.2.100\",\"adv\":\"/mnt/adv\"}'",
        None,
    );
    let initrd = initrd(site, peers, "mkinitramfs", "tang", "", "none luks,initramfs");
    let mut parts =
        Parts { append: STATIC.to_owned(), disks: vec![("root".into(), site.file("tang.img"))], ..parts(site, initrd) };
    parts.qemu = vec![
        "-netdev".into(),
        format!("user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:80-cmd:{}", server.display()),
        "-device".into(),
        "virtio-net-pci,netdev=net,romfile=".into(),
    ];
    Row { name: "clevis, tang", parts, base: base.into() }
}

fn clevis_tpm2(site: &Site, peers: &Path, base: &Path) -> Row {
    let bind_to =
        "clevis luks bind -y -k /mnt/passphrase -d /mnt/root.img tpm2 '{\"pcr_bank\":\"sha256\",\"pcr_ids\":\"15\"}'";
    bind(site, peers, "clevis-tpm2.img", bind_to, Some("tpm.clevis"));
    let initrd = initrd(site, peers, "mkinitramfs", "clevis-tpm2", "", "none luks,initramfs");
    let parts = Parts {
        tpm: Some(site.file("tpm.clevis")),
        disks: vec![("root".into(), site.file("clevis-tpm2.img"))],
        ..parts(site, initrd)
    };
    Row { name: "clevis, tpm2", parts, base: base.into() }
}

fn cryptenroll(site: &Site, peers: &Path, base: &Path) -> Row {
    let enrol = format!(
        "PASSWORD={PASSPHRASE} systemd-cryptenroll --tpm2-device=swtpm:path=/mnt/tpm --tpm2-pcrs=15 /mnt/root.img"
    );
    bind(site, peers, "cryptenroll.img", &enrol, Some("tpm.cryptenroll"));
    let initrd = initrd(site, peers, "dracut", "cryptenroll", "--add tpm2-tss", "none luks,tpm2-device=auto");
    let append = format!("rd.luks.name={UUID}=root rd.luks.options=tpm2-device=auto rd.shell=0");
    let parts = Parts {
        append,
        tpm: Some(site.file("tpm.cryptenroll")),
        disks: vec![("root".into(), site.file("cryptenroll.img"))],
        ..parts(site, initrd)
    };
    Row { name: "systemd-cryptenroll, tpm2 (dracut)", parts, base: base.into() }
}

fn parts(site: &Site, initrd: PathBuf) -> Parts {
    Parts {
        kernel: site.tree("kernel"),
        initrd,
        disks: vec![("root".to_owned(), site.tree("root.img"))],
        ..Parts::default()
    }
}

/// An initramfs without ours in it.
fn initrd(site: &Site, tree: &Path, maker: &str, name: &str, dracut: &str, key: &str) -> PathBuf {
    site.add(name, "etc/crypttab", &format!("root UUID={UUID} {key}\n"));
    let out = site.file(&format!("{name}.initrd"));
    let made = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/boot/make-initrd"))
        .args([maker.as_ref(), tree.as_os_str(), site.file(&format!("{name}.files")).as_os_str(), out.as_os_str()])
        .env("DRACUT", dracut)
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(made.success());
    out
}

/// Has a peer add its keyslot to a copy of the root disk, in its own system, perhaps with a TPM.
fn bind(site: &Site, peers: &Path, image: &str, command: &str, tpm: Option<&str>) {
    let swtpm = tpm.map_or(String::new(), |state| {
        format!(
            "mkdir -p {state}; swtpm socket --tpm2 --tpmstate dir={state} --server type=unixio,path=bind/tpm \
             --ctrl type=unixio,path=bind/tpm.ctrl --flags not-need-init,startup-clear & tpm=$!;
             for i in $(seq 100); do [ -e bind/tpm ] && break; sleep 0.1; done;"
        )
    });
    site.sh(&format!(
        "rm -rf bind; mkdir bind; cp --sparse=always $TREE/root.img bind/root.img; cp $TREE/passphrase bind/; cp adv bind/ 2>/dev/null || true
         tpm=; {swtpm}
         unshare -m sh -ec 'mount --bind bind {root}/mnt; mount -t proc proc {root}/proc; mount --bind /dev {root}/dev
             TPM2TOOLS_TCTI=swtpm:path=/mnt/tpm chroot {root} sh -c \"$1\"' sh '{command}' >&2
         [ -z \"$tpm\" ] || kill $tpm; mv bind/root.img {image}",
        root = peers.join("root").display(),
        command = command.replace('\'', "'\\''"),
    ));
}
