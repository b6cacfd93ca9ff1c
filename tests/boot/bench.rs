//! How long until the root is there, and what the initramfs weighs: ours next to clevis and systemd-cryptenroll, in the same
//! machine with the same kernel and disk, in turn.
//!
//! Nobody types, and no image but a floor's has the passphrase: a root that is there was unlocked by the row's own means.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{
    machine::{Parts, STATIC},
    site::{Boxed, PASSPHRASE, Site, UUID, tree},
    sources,
    stories::{self, NET},
};

const LOCKBOX: &str = "[tpm]\nsite_key = \"site.pem\"\n[lockbox]\nhost = \"vm\"\nstore = \"box\"\nidentities = [\"tpm:host.tpm.pem\"]\n\
    lifetime_hours = 100\noffline = true\n[stores.box]\ntype = \"directory\"\npath = \"/srv/keys\"\nowner = \"owner.pem\"\n\
    no_escrow = true\n";

/// A store that no volume of the boot needs.
const NOTHING: &str =
    "[stores.a]\ntype = \"directory\"\npath = \"/srv/keys\"\nowner = \"owner.pem\"\nno_escrow = true\n";

/// Boots of each.
const ROUNDS: usize = 3;

/// What makes the images: an image is compared with those of the same maker.
struct Maker {
    name: &'static str,
    /// What is in crypttab where a person is asked.
    crypttab: &'static str,
    /// On the kernel's command line.
    append: String,
}

struct Row<'m> {
    name: &'static str,
    maker: &'m Maker,
    parts: Parts,
    /// What its record has to say of the root, if it is ours.
    by: Option<String>,
}

/// What a boot took until the root's init ran.
#[derive(Clone, Copy)]
struct Took {
    /// Since the kernel's start.
    seconds: f64,
    /// The emulator's processor time: what else the machine does hardly changes it.
    processor_seconds: f64,
}

fn makers() -> [Maker; 2] {
    let tools = Maker { name: "mkinitramfs", crypttab: "none luks,initramfs", append: String::new() };
    let append = format!("rd.luks.name={UUID}=root rd.shell=0");
    [tools, Maker { name: "dracut", crypttab: "none luks", append }]
}

/// Prints what each source of keys adds to an initramfs.
pub fn grow(site: &Site) {
    let makers = makers();
    let bases = makers.each_ref().map(|maker| size(&base(site, maker)));
    println!("\n| growth of the initramfs, MB | {} | {} |\n|---|---:|---:|", makers[0].name, makers[1].name);
    let row = |name: &str, image: &dyn Fn(&Maker) -> PathBuf| {
        let [tools, dracut] = std::array::from_fn(|at| format!("{:.2}", (size(&image(&makers[at])) - bases[at]) / 1e6));
        println!("| {name} | {tools} | {dracut} |");
    };
    row("cryptattach, nothing to attach", &|maker| {
        let name = format!("grow-none-{}", maker.name);
        site.add(&name, "etc/crypttab", "");
        site.initrd_by(maker.name, &name, NOTHING).path
    });
    for (what, name) in sources::KINDS {
        row(what, &|maker| sources::initrd(site, &format!("grow-{name}-{}", maker.name), maker.name, name));
    }
    let binary = env!("CARGO_BIN_EXE_cryptattach");
    println!("\nthe main binary: {} bytes", fs::metadata(binary).unwrap().len());
}

/// Prints the tables.
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
    let [tools, dracut] = makers();
    let groups = [
        vec![
            floor(site, &tools),
            lockbox(site, &tools),
            network(site, &tools),
            clevis_tpm2(site, &peers, &tools),
            tang(site, &peers, &tools),
        ],
        vec![floor(site, &dracut), lockbox(site, &dracut), cryptenroll(site, &peers, &dracut)],
    ];
    let mut took: Vec<Vec<Vec<Took>>> = groups.iter().map(|rows| vec![Vec::new(); rows.len()]).collect();
    for _ in 0..ROUNDS {
        for (rows, took) in groups.iter().zip(&mut took) {
            for (row, took) in rows.iter().zip(took) {
                took.push(boot(site, row));
            }
        }
    }
    println!("\n| | best s | median s | over the floor | CPU s | over the floor | growth MB |");
    println!("|---|---:|---:|---:|---:|---:|---:|");
    for (rows, took) in groups.iter().zip(&took) {
        let base = size(&base(site, rows[0].maker));
        for (row, times) in rows.iter().zip(took) {
            let seconds: Vec<f64> = times.iter().map(|took| took.seconds).collect();
            println!(
                "| {} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} | {:.1} |",
                row.name,
                seconds.iter().copied().fold(f64::INFINITY, f64::min),
                median(seconds),
                over(times, &took[0], |took| took.seconds),
                median(times.iter().map(|took| took.processor_seconds).collect()),
                over(times, &took[0], |took| took.processor_seconds),
                (size(&row.parts.initrd) - base) / 1e6,
            );
        }
    }
    println!();
    weigh(site, &base(site, &tools), &groups[0][1].parts.initrd);
}

/// The median of what it took more than the floor, round by round: what slows a round, slows both.
fn over(times: &[Took], floor: &[Took], of: impl Fn(&Took) -> f64) -> f64 {
    median(times.iter().zip(floor).map(|(row, floor)| of(row) - of(floor)).collect())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn size(path: &Path) -> f64 {
    fs::metadata(path).unwrap().len() as f64
}

/// What an image has that its base does not, by weight: each file, and how it is compressed alone.
fn weigh(site: &Site, base: &Path, image: &Path) {
    println!("| in the image of the TPM lockbox (initramfs-tools) | MB | compressed |");
    println!("|---|---:|---:|");
    let table = site.sh(&format!(
        "unpack() {{ rm -rf weigh.$1; mkdir weigh.$1; (cd weigh.$1; zstdcat $2 | cpio -id --quiet; find . -type f | sort) >weigh.$1.list; }}
        unpack base {}; unpack image {}
        comm -13 weigh.base.list weigh.image.list | while read -r file; do
            echo $(stat -c %s weigh.image/$file) $(zstd -qc9 weigh.image/$file | wc -c) ${{file#.}}
        done | sort -rn | awk '
            {{ all += $1; packed += $2 }}
            $2 < 20000 {{ rest += $1; rest_packed += $2; files++; next }}
            {{ printf \"| `%s` | %.2f | %.2f |\\n\", $3, $1 / 1e6, $2 / 1e6 }}
            END {{ printf \"| %d more files | %.2f | %.2f |\\n| all | %.2f | %.2f |\", files, rest / 1e6, rest_packed / 1e6, all / 1e6, packed / 1e6 }}'",
        base.display(),
        image.display()
    ));
    println!("{table}");
}

/// One boot; a root that is not there in time fails the whole.
fn boot(site: &Site, row: &Row) -> Took {
    // Each boot finds the TPM as it was when its key was made.
    let tpm = row.parts.tpm.as_ref().map(|state| {
        site.sh(&format!("rm -rf tpm/now; cp -r {} tpm/now", state.display()));
        site.file("tpm/now")
    });
    let append = format!("{} {}", row.maker.append, row.parts.append);
    let parts = Parts { tpm, append, ..row.parts.clone() };
    let mut machine = site.start(&format!("bench {} {}", row.maker.name, row.name), &parts);
    machine.see("BOOTED from /dev/mapper/root up ");
    let processor_seconds = machine.processor_seconds();
    let seconds = machine.see_line().trim().parse().unwrap();
    if let Some(by) = &row.by {
        assert_eq!(machine.record()["volumes"][0]["by"], by.as_str());
    }
    Took { seconds, processor_seconds }
}

/// cryptsetup with a passphrase that needs nobody: no way of unlocking is faster than that.
fn floor<'m>(site: &Site, maker: &'m Maker) -> Row<'m> {
    let name = format!("floor-{}", maker.name);
    let path = "usr/local/sbin/passphrase";
    let (content, crypttab) = match maker.name {
        "dracut" => (PASSPHRASE.to_owned(), maker.crypttab.to_owned()),
        _ => (format!("#!/bin/sh\nprintf {PASSPHRASE}\n"), format!("{},keyscript=/{path}", maker.crypttab)),
    };
    site.add(&name, path, &content);
    let include = format!("--include /{path} /{path}");
    let image = initrd(site, &site.tree(""), maker, &name, &include, &crypttab);
    let mut parts = parts(site, image);
    if maker.name == "dracut" {
        parts.append = format!("rd.luks.key={UUID}=/{path}");
    }
    let name = match maker.name {
        "dracut" => "the floor (dracut): cryptsetup, passphrase in the image",
        _ => "the floor: cryptsetup, passphrase in the image",
    };
    Row { name, maker, parts, by: None }
}

/// The image of the same maker that only asks for a passphrase.
fn base(site: &Site, maker: &Maker) -> PathBuf {
    let name = format!("base-{}", maker.name);
    let made = site.file(&format!("{name}.initrd"));
    if made.exists() { made } else { initrd(site, &site.tree(""), maker, &name, "", maker.crypttab) }
}

/// Its store is nowhere near: the copy in the image has to do, and no network is configured, as with the peers.
fn lockbox<'m>(site: &Site, maker: &'m Maker) -> Row<'m> {
    let config = |boxed: &Boxed| LOCKBOX.to_owned() + &stories::volume("root", UUID, &[&boxed.root]);
    let name = format!("lockbox-{}", maker.name);
    let parts = stories::enrolled_parts(site, &name, maker.name, &stories::values(site), config);
    let by = Some(format!("{} with the lockbox", site.enrolled().root));
    let name = match maker.name {
        "dracut" => "cryptattach, TPM lockbox (dracut)",
        _ => "cryptattach, TPM lockbox",
    };
    Row { name, maker, parts, by }
}

fn network<'m>(site: &Site, maker: &'m Maker) -> Row<'m> {
    let initrd = site.initrd("net", &format!("[boot]\nsecrets_in_image = true\n{NET}"));
    Row {
        name: "cryptattach, network store",
        maker,
        parts: stories::with_network(site, &initrd, &site.server()),
        by: Some(site.net.clone()),
    }
}

fn tang<'m>(site: &Site, peers: &Path, maker: &'m Maker) -> Row<'m> {
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
    let initrd = initrd(site, peers, maker, "tang", "", maker.crypttab);
    let mut parts =
        Parts { append: STATIC.to_owned(), disks: vec![("root".into(), site.file("tang.img"))], ..parts(site, initrd) };
    parts.qemu = vec![
        "-netdev".into(),
        format!("user,id=net,restrict=on,guestfwd=tcp:10.0.2.100:80-cmd:{}", server.display()),
        "-device".into(),
        "virtio-net-pci,netdev=net,romfile=".into(),
    ];
    Row { name: "clevis, tang", maker, parts, by: None }
}

fn clevis_tpm2<'m>(site: &Site, peers: &Path, maker: &'m Maker) -> Row<'m> {
    let bind_to =
        "clevis luks bind -y -k /mnt/passphrase -d /mnt/root.img tpm2 '{\"pcr_bank\":\"sha256\",\"pcr_ids\":\"15\"}'";
    bind(site, peers, "clevis-tpm2.img", bind_to, Some("tpm/clevis"));
    let initrd = initrd(site, peers, maker, "clevis-tpm2", "", maker.crypttab);
    let parts = Parts {
        tpm: Some(site.file("tpm/clevis")),
        disks: vec![("root".into(), site.file("clevis-tpm2.img"))],
        ..parts(site, initrd)
    };
    Row { name: "clevis, tpm2", maker, parts, by: None }
}

fn cryptenroll<'m>(site: &Site, peers: &Path, maker: &'m Maker) -> Row<'m> {
    let enrol = format!(
        "PASSWORD={PASSPHRASE} systemd-cryptenroll --tpm2-device=swtpm:path=/mnt/tpm --tpm2-pcrs=15 /mnt/root.img"
    );
    bind(site, peers, "cryptenroll.img", &enrol, Some("tpm/cryptenroll"));
    let initrd = initrd(site, peers, maker, "cryptenroll", "--add tpm2-tss", "none luks,tpm2-device=auto");
    let parts = Parts {
        append: "rd.luks.options=tpm2-device=auto".to_owned(),
        tpm: Some(site.file("tpm/cryptenroll")),
        disks: vec![("root".into(), site.file("cryptenroll.img"))],
        ..parts(site, initrd)
    };
    Row { name: "systemd-cryptenroll, tpm2 (dracut)", maker, parts, by: None }
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
fn initrd(site: &Site, tree: &Path, maker: &Maker, name: &str, dracut: &str, key: &str) -> PathBuf {
    site.add(name, "etc/crypttab", &format!("root UUID={UUID} {key}\n"));
    let out = site.file(&format!("{name}.initrd"));
    let made = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/boot/make-initrd"))
        .args([maker.name.as_ref(), tree.as_os_str(), site.file(&format!("{name}.files")).as_os_str(), out.as_os_str()])
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
             --ctrl type=unixio,path=bind/tpm.ctrl --flags not-need-init,startup-clear & tpm=$!; trap \"kill $tpm\" EXIT;
             for i in $(seq 100); do [ -e bind/tpm ] && break; sleep 0.1; done;"
        )
    });
    site.sh(&format!(
        "rm -rf bind; mkdir bind; cp --sparse=always $TREE/root.img bind/root.img; cp $TREE/passphrase bind/; cp adv bind/ 2>/dev/null || true
         {swtpm}
         unshare -m sh -ec 'mount --bind bind {root}/mnt; mount -t proc proc {root}/proc; mount --bind /dev {root}/dev
             TPM2TOOLS_TCTI=swtpm:path=/mnt/tpm chroot {root} sh -c \"$1\"' sh '{command}' >&2
         mv bind/root.img {image}",
        root = peers.join("root").display(),
        command = command.replace('\'', "'\\''"),
    ));
}
