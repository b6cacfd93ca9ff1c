//! What the machines boot with: keys, stores, an encrypted root, and initramfs images made by the distribution's own tools.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, OnceLock},
};

use tempfile::TempDir;

use crate::{
    image,
    machine::{Machine, Parts},
    sources::Sources,
    swift,
};

/// The root volume's UUID and passphrase; make-image has them, too.
pub const UUID: &str = "11111111-2222-3333-4444-555555555555";
pub const PASSPHRASE: &str = "passphrase";
/// Two more volumes, with the same passphrase: `data.img` and `spare.img`.
pub const DATA: &str = "22222222-2222-3333-4444-555555555555";
pub const SPARE: &str = "33333333-2222-3333-4444-555555555555";

/// A tree that machines are made of, with more packages: make-image's folder.
pub fn tree(packages: &[&str]) -> PathBuf {
    image::make("boot", packages)
}

/// Keys in the store `box`.
pub struct Boxed {
    pub root: String,
    pub data: String,
}

/// The files of a run, gone with the value.
pub struct Site {
    tree: PathBuf,
    folder: TempDir,
    /// `tpm` in the folder: Ubuntu's AppArmor lets swtpm have its files in /tmp, and not in /var/tmp.
    _tpm: TempDir,
    initrds: Mutex<BTreeMap<String, Initrd>>,
    boxed: OnceLock<Boxed>,
    /// Once a story takes them.
    pub sources: OnceLock<Sources>,
    /// PCRs 4 and 7 as the machines' firmware leaves them, once a machine has shown them.
    pub values: OnceLock<String>,
    /// The root's key in the network store, and in the directory on the stick.
    pub net: String,
    pub stick: String,
    /// The key of the volume `data` in the network store.
    pub net_data: String,
}

impl Site {
    /// Makes all that does not differ between the stories.
    pub fn make() -> Self {
        let tree = tree(&[]);
        let temporary = |place| tempfile::Builder::new().prefix("cryptattach-site").tempdir_in(place).unwrap();
        let (folder, tpm) = (temporary("/var/tmp"), temporary("/tmp"));
        symlink(tpm.path(), folder.path().join("tpm")).unwrap();
        let (initrds, boxed, sources, values) = (Mutex::default(), OnceLock::new(), OnceLock::new(), OnceLock::new());
        let (net, stick, net_data) = <(String, String, String)>::default();
        let mut site = Self { tree, folder, _tpm: tpm, initrds, boxed, sources, values, net, stick, net_data };
        site.sh("for name in net stick; do
                openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out $name.owner.key
                openssl pkey -in $name.owner.key -pubout -out $name.owner.pem
            done
            mkdir -p served/net keys/stick
            openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout served/server.key \
                -out served/server.pem -subj '/CN=key store' -addext subjectAltName=IP:10.0.2.100 -days 30
            cp --sparse=always $TREE/root.img root.img
            for volume in data:22222222 spare:33333333; do
                truncate -s 24M ${volume%:*}.img
                cryptsetup luksFormat -q --uuid ${volume#*:}-2222-3333-4444-555555555555 --pbkdf pbkdf2 \
                    --pbkdf-force-iterations 1000 --key-file $TREE/passphrase ${volume%:*}.img
            done
            printf 'state = \"state\"\n[audit]\nfile = \"audit\"\n' >host.toml
            store() { printf '[stores.%s]\ntype = \"directory\"\npath = \"%s\"\nowner = \"%s.owner.pem\"\nno_escrow = true\nidentities = [\"%s.owner.key\"]\n' $1 $2 $1 $1 >>host.toml; }
            store net served/net
            store stick keys/stick");
        // On this machine all of it is on one disk, which says nothing about the one that boots.
        let import = "$CRYPTATTACH --config host.toml key import --key-file $TREE/passphrase --allow-shared";
        site.stick = site.sh(&format!("{import} root.img --store stick"));
        site.net = site.sh(&format!("{import} root.img --store net --token"));
        site.net_data = site.sh(&format!("{import} data.img --store net --token"));
        site.sh("cp stick.owner.key keys/ && mke2fs -q -t ext4 -L keys -d keys stick.img 8M");
        site
    }

    /// Runs a shell script in the run's folder, expects success, returns what it prints.
    #[track_caller]
    pub fn sh(&self, script: &str) -> String {
        let output = Command::new("sh")
            .args(["-euc", script])
            .current_dir(self.folder.path())
            .env("TREE", &self.tree)
            .env("CRYPTATTACH", env!("CARGO_BIN_EXE_cryptattach"))
            .output()
            .unwrap();
        assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    /// A file of the run.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of the machines' tree.
    pub fn tree(&self, name: &str) -> PathBuf {
        self.tree.join(name)
    }

    /// One more file on the machine whose initramfs is made under that name.
    pub fn add(&self, name: &str, path: &str, content: &str) {
        let path = self.file(&format!("{name}.files")).join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// An initramfs for a configuration, made by the machine's mkinitramfs with our hook, once; and what the doctor says of it.
    pub fn initrd(&self, name: &str, configuration: &str) -> Initrd {
        self.initrd_by("mkinitramfs", name, configuration)
    }

    /// Likewise, by `mkinitramfs` or `dracut`.
    pub fn initrd_by(&self, maker: &str, name: &str, configuration: &str) -> Initrd {
        if let Some(made) = self.initrds.lock().unwrap().get(name) {
            return made.clone();
        }
        let (files, out) = (self.file(&format!("{name}.files")), self.file(&format!("{name}.initrd")));
        let etc = files.join("etc/cryptattach");
        fs::create_dir_all(&etc).unwrap();
        fs::write(etc.join("cryptattach.toml"), configuration).unwrap();
        let cloud = |address: &str| {
            format!(
                "{{auth_type: v1password, cacert: ca.pem, auth: {{auth_url: 'https://{address}/auth/v1.0', username: '{}', password: {}}}}}",
                swift::USER,
                swift::KEY
            )
        };
        let clouds = format!("clouds: {{net: {}, far: {}}}\n", cloud(swift::ADDRESS), cloud("10.0.2.101"));
        fs::write(etc.join("clouds.yaml"), clouds).unwrap();
        for (from, to) in [("served/server.pem", "ca.pem"), ("net.owner.key", "net.owner.key")] {
            fs::copy(self.file(from), etc.join(to)).unwrap();
        }
        if !files.join("etc/crypttab").exists() {
            fs::write(files.join("etc/crypttab"), format!("root UUID={UUID} none luks,initramfs,discard\n")).unwrap();
        }
        install(&files);
        let made = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/boot/make-initrd"))
            .arg(maker)
            .args([&self.tree, &files, &out])
            .arg("cryptattach doctor --image /boot/initrd.img || echo unfit")
            .output()
            .unwrap();
        let warnings = String::from_utf8_lossy(&made.stderr).into_owned();
        assert!(made.status.success(), "{warnings}");
        let initrd = Initrd { path: out, doctor: String::from_utf8(made.stdout).unwrap(), warnings };
        self.initrds.lock().unwrap().insert(name.to_owned(), initrd.clone());
        initrd
    }

    /// The store `box`, whose keys of `root` and `data` open by the lockbox of the machine with the TPM in `tpm/box` only;
    /// what that machine then has is in `box/host`. Made once.
    pub fn enrolled(&self) -> &Boxed {
        self.boxed.get_or_init(|| {
            let keys = self.sh(
                "mkdir -p box/state box/keys tpm/box && cd box && tpm=$PWD/../tpm/socket
                swtpm socket --tpm2 --tpmstate dir=../tpm/box --server type=unixio,path=$tpm --ctrl type=unixio,path=$tpm.ctrl \
                    --flags not-need-init,startup-clear >/dev/null 2>&1 & swtpm=$!
                trap 'kill $swtpm' EXIT
                for i in $(seq 100); do [ -e $tpm ] && break; sleep 0.1; done
                export CRYPTATTACH_TCTI=swtpm:path=$tpm
                openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out owner.key
                openssl pkey -in owner.key -pubout -out owner.pem
                openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out site.key
                openssl pkey -in site.key -pubout -out site.pem
                store='[stores.box]\ntype = \"directory\"\npath = \"keys\"\nowner = \"owner.pem\"\nno_escrow = true\n'
                printf \"state = 'astate'\n[audit]\nfile = 'audit'\n[tpm]\nsite_key = 'site.pem'\n${store}identities = ['owner.key']\n\" >admin.toml
                printf \"state = 'state'\n[audit]\nfile = 'audit'\n[tpm]\nidentity = 'host.tpm.pem'\nsite_key = 'site.pem'\nsignatures = ['now.json']\n\
[lockbox]\nhost = 'vm'\nstore = 'box'\nidentities = ['tpm:host.tpm.pem']\npath = 'lockbox'\nlifetime_hours = 100\noffline = true\n$store\" >host.toml
                admin=\"$CRYPTATTACH --config admin.toml\" host=\"$CRYPTATTACH --config host.toml\"
                {
                    $admin container create box
                    $host host join --output request
                    $admin host admit request --trust-first-use --store box --output answer
                    $host host join answer
                } >&2
                import=\"$admin key import --key-file $TREE/passphrase --allow-shared --store box\"
                root=$($import $TREE/root.img) data=$($import ../data.img)
                $host policy sign --private-key site.key --current 4+7 >now.json
                { $host lockbox open; $host lockbox add $root $data; } >&2
                mkdir -p host/etc/cryptattach host/var/lib/cryptattach/host
                cp host.tpm.pem site.pem host/etc/cryptattach/
                cp state/host/vm.* host/var/lib/cryptattach/host/
                cp -r lockbox host/var/lib/cryptattach/
                $host lockbox close >&2
                echo $root $data",
            );
            let (root, data) = keys.split_once(' ').unwrap();
            Boxed { root: root.to_owned(), data: data.to_owned() }
        })
    }

    /// An enrolled machine, with a TPM of its own, for which the site has signed the boot state `values`: in no other does its
    /// TPM open the lockbox. Its files are put where its initramfs `name` is made.
    pub fn enrol(&self, name: &str, values: &str) -> &Boxed {
        let boxed = self.enrolled();
        fs::write(self.file("values.json"), values).unwrap();
        self.sh(&format!(
            "mkdir -p {name}.files && cp -r box/host/. {name}.files/ && cp -r tpm/box tpm/{name}
            $CRYPTATTACH --config box/host.toml policy sign --private-key box/site.key --values values.json \
                >{name}.files/etc/cryptattach/tpm2-pcr-signature.json"
        ));
        boxed
    }

    /// A machine with the root disk, this initramfs, and a log of its console.
    pub fn parts(&self, initrd: &Initrd) -> Parts {
        Parts {
            kernel: self.tree.join("kernel"),
            initrd: initrd.path.clone(),
            disks: vec![("root".to_owned(), self.file("root.img"))],
            ..Parts::default()
        }
    }

    /// The server of the network store: this program again.
    pub fn server(&self) -> String {
        format!("{} swift-connection {}", std::env::current_exe().unwrap().display(), self.file("served").display())
    }

    /// Starts a machine; its console is kept in target/boot-logs.
    pub fn start(&self, story: &str, parts: &Parts) -> Machine {
        let name = story.replace(' ', "-");
        Machine::start(parts, &Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/boot-logs/{name}.log")))
    }
}

/// An initramfs, and what was said of it.
#[derive(Clone)]
pub struct Initrd {
    pub path: PathBuf,
    pub doctor: String,
    pub warnings: String,
}

/// As the Debian package puts them.
fn install(files: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let copy = |from: &Path, to: &str| {
        let to = files.join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, &to).unwrap();
    };
    let tools = "usr/share/initramfs-tools";
    for script in [
        "hooks/cryptattach",
        "conf-hooks.d/cryptattach",
        "scripts/local-top/cryptattach",
        "scripts/local-bottom/cryptattach",
        "scripts/init-bottom/cryptattach",
    ] {
        let from = source.join("initramfs/initramfs-tools").join(script);
        copy(&from, &format!("{tools}/{script}"));
    }
    for file in ["module-setup.sh", "cryptattach-boot.service", "cryptattach-root.service", "cryptattach.network"] {
        copy(
            &source.join("initramfs/dracut/90cryptattach").join(file),
            &format!("usr/lib/dracut/modules.d/90cryptattach/{file}"),
        );
    }
    copy(Path::new(env!("CARGO_BIN_EXE_cryptattach")), "usr/bin/cryptattach");
    let binary = files.join("usr/bin/cryptattach");
    // Debug information would make the image ten times as large.
    assert!(Command::new("strip").arg(&binary).status().unwrap().success());
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
}
