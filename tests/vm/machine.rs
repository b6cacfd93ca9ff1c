//! A virtual machine with real dm-crypt: QEMU without KVM, the guest of `make-image`, disks plugged in while it runs.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::LazyLock,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64ct::{Base64, Encoding};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::qemu::Qmp;

/// QEMU emulates the processor; everything takes about ten times as long as on the real one, an initramfs minutes. And the
/// machine may be busy: only what hangs takes so long.
const BOOT_TIMEOUT: Duration = Duration::from_secs(900);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(900);

/// The kernel's command line.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 no_timer_check root=/dev/vda rw init=/sbin/guest-init";

/// A running machine; it is killed with the value.
pub struct Machine {
    qemu: Child,
    keyboard: ChildStdin,
    agent: BufReader<UnixStream>,
    qmp: Qmp,
    folder: TempDir,
    disks: u32,
}

/// What the kernel starts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// The agent, and little else; `cryptattach` is the binary that was just built.
    Plain,
    /// systemd, and the agent as a unit; the Debian package waits on the disk of tools.
    Systemd,
    /// The same on a machine with one disk: the package is on a stick, which is no disk that stays.
    OneDisk,
}

/// A guest without systemd that has just booted, kept as files: it is powered on as it was then, again and again, in a moment.
pub struct Booted {
    kept: TempDir,
    tools: TempDir,
    root: String,
    options: [String; 6],
}

/// A disk of the machine, and the file behind it.
pub struct Disk {
    serial: String,
    /// The file on the host; what the guest has flushed is in it.
    pub file: PathBuf,
    options: DiskOptions,
}

/// How a disk looks to the guest.
#[derive(Clone, Copy)]
pub struct DiskOptions {
    pub block_bytes: u32,
    pub read_only: bool,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { block_bytes: 512, read_only: false }
    }
}

/// What a command in the guest did.
pub struct Output {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Disk {
    /// Its path in the guest.
    pub fn path(&self) -> String {
        format!("/dev/disk/by-id/virtio-{}", self.serial)
    }
}

impl Machine {
    /// Boots the release that this host runs, or another one, by QEMU's own loader; makes the guest's image if it is not there yet.
    pub fn boot_release(init: Init, release: Option<&str>) -> Self {
        let image = image(release);
        Self::start(init, &image, &by_loader(init, &image).each_ref().map(String::as_str))
    }

    /// Boots what these options of QEMU's say, from the root file system of an image.
    pub fn start(init: Init, image: &Path, booted: &[&str]) -> Self {
        let root = format!("format=raw,snapshot=on,file={}", image.join("root.img").display());
        let mut machine = Self::power_on(init, &root, booted);
        machine.wait_for_agent();
        machine
    }

    /// Likewise, from a disk of one's own, as QEMU's `-drive` describes it; and does not wait until it is up.
    pub fn power_on(init: Init, root: &str, booted: &[&str]) -> Self {
        let folder = folder();
        let image = folder.path().join("tools.img");
        tools(init, &folder.path().join("tools"), &image);
        Self::run(init, root, &image, booted, folder)
    }

    fn run(init: Init, root: &str, tools: &Path, booted: &[&str], folder: TempDir) -> Self {
        let at = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
        let reboots: &[&str] = if init == Init::Plain { &["-no-reboot"] } else { &[] };
        let console = File::create(at("console")).unwrap();
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024"])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
            .args(reboots)
            .args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))])
            .args(["-drive", &format!("if=none,id=root,{root}")])
            .args(["-device", "virtio-blk-pci,drive=root,serial=root"])
            .args(["-device", "virtio-scsi-pci"])
            .args(["-drive", &format!("if=none,id=tools,format=raw,snapshot=on,file={}", tools.display())])
            .args(match init {
                Init::OneDisk => ["-device", "scsi-hd,drive=tools,removable=on"],
                _ => ["-device", "virtio-blk-pci,drive=tools,serial=tools"],
            })
            .args(booted)
            .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
            .args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", at("agent"))])
            .args(["-device", "virtserialport,chardev=agent,name=agent"])
            .stdin(Stdio::piped())
            .stdout(console.try_clone().unwrap())
            .stderr(console)
            .spawn()
            .expect("qemu-system-x86_64 is missing: scripts/prerequisites vm");
        let deadline = Instant::now() + BOOT_TIMEOUT;
        let agent = BufReader::new(connect(&at("agent"), deadline, &mut qemu, &at("console")));
        let qmp = Qmp::new(connect(&at("qmp"), deadline, &mut qemu, &at("console")), COMMAND_TIMEOUT);
        let keyboard = qemu.stdin.take().unwrap();
        Self { agent, qmp, keyboard, qemu, folder, disks: 0 }
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) {
        writeln!(self.keyboard, "{line}").unwrap();
    }

    /// Types a line once the console has shown this.
    pub fn answer(&mut self, question: &str, line: &str) {
        let deadline = Instant::now() + BOOT_TIMEOUT;
        while !self.has_shown(question) {
            assert!(Instant::now() < deadline, "'{question}' is not shown; the console:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(100));
        }
        self.type_line(line);
    }

    /// All that the console has shown.
    pub fn shown(&self) -> String {
        let shown = fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&shown).into_owned()
    }

    /// Whether the console has shown this at any time.
    pub fn has_shown(&self, text: &str) -> bool {
        self.shown().contains(text)
    }

    /// Shuts the guest down and boots it again; its disks stay plugged in.
    pub fn reboot(&mut self) {
        // The agent may be ended before it has answered.
        self.request("systemctl --no-block reboot");
        self.wait_for_agent();
    }

    /// Waits until the machine is up.
    pub fn wait_for_agent(&mut self) {
        self.agent.get_ref().set_read_timeout(Some(BOOT_TIMEOUT)).unwrap();
        while self.agent_line() != "ready" {}
        self.agent.get_ref().set_read_timeout(Some(COMMAND_TIMEOUT)).unwrap();
    }

    /// Runs a shell script in the guest.
    pub fn sh(&mut self, script: &str) -> Output {
        self.request(script);
        let line = self.agent_line();
        let code = line.parse().unwrap_or_else(|_| panic!("the guest says {line:?}; its console:\n{}", self.console()));
        let mut text = || String::from_utf8_lossy(&Base64::decode_vec(&self.agent_line()).unwrap()).into_owned();
        let (stdout, stderr) = (text(), text());
        Output { code, stdout, stderr }
    }

    fn request(&mut self, script: &str) {
        let request = Base64::encode_string(script.as_bytes());
        self.agent.get_mut().write_all(format!("{request}\n").as_bytes()).unwrap();
    }

    /// Writes a file in the guest.
    pub fn put(&mut self, path: &str, content: &[u8]) {
        self.ok(&format!("echo {} | base64 -d >{path}", Base64::encode_string(content)));
    }

    /// Switches the machine off by its kernel, which says so to the TPM. File systems of disks must not be mounted any more.
    pub fn power_off(mut self) {
        self.request("echo o >/proc/sysrq-trigger");
        self.wait_for_end();
    }

    /// Shuts the machine down as systemd does, and switches it off.
    pub fn shut_down(mut self) {
        self.request("systemctl --no-block poweroff");
        self.wait_for_end();
    }

    /// Cuts the power: whatever the guest has not given to its disks is gone.
    pub fn cut(mut self) {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }

    /// Writes or reads all that the machine is.
    fn migrate(&mut self, command: &str, to: &str) {
        let events = json!({"capabilities": [{"capability": "events", "state": true}]});
        self.qmp.run("migrate-set-capabilities", events);
        self.qmp.run("migrate-set-parameters", json!({"max-bandwidth": 1_u64 << 40}));
        self.qmp.run(command, json!({"uri": to}));
        let status = |line: &Value| (line["event"] == "MIGRATION").then(|| line["data"]["status"].clone());
        let end = self.qmp.await_line(|line| status(line).is_some_and(|it| it == "completed" || it == "failed"));
        assert_eq!(end["data"]["status"], "completed", "{end}");
    }

    fn wait_for_end(&mut self) {
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        while self.qemu.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the guest does not switch itself off:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs a shell script in the guest, expects success, returns standard output without its last newline.
    #[track_caller]
    pub fn ok(&mut self, script: &str) -> String {
        let output = self.sh(script);
        if output.code != 0 {
            let journal = self.sh("journalctl --sync; journalctl -b -o short-precise --no-pager -n 80").stdout;
            panic!("exit {}: {script}\n{}{}\n{journal}", output.code, output.stdout, output.stderr);
        }
        output.stdout.trim_end().to_owned()
    }

    /// Runs a shell script in the guest, expects this exit code, returns standard error.
    #[track_caller]
    pub fn fails(&mut self, code: i32, script: &str) -> String {
        let output = self.sh(script);
        assert_eq!(output.code, code, "{script}\n{}{}", output.stdout, output.stderr);
        output.stderr
    }

    /// Runs a shell script in the guest until it succeeds; what it waits for comes by itself, or never.
    #[track_caller]
    pub fn eventually(&mut self, script: &str) -> String {
        let deadline = Instant::now() + COMMAND_TIMEOUT;
        loop {
            let output = self.sh(script);
            if output.code == 0 {
                return output.stdout.trim_end().to_owned();
            }
            assert!(Instant::now() < deadline, "{script}\n{}{}", output.stdout, output.stderr);
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Plugs in a new disk of zeroes.
    pub fn plug(&mut self, bytes: u64, options: DiskOptions) -> Disk {
        self.disks += 1;
        let file = self.folder.path().join(format!("disk{}", self.disks));
        File::create(&file).unwrap().set_len(bytes).unwrap();
        self.plug_file(&file, options)
    }

    /// Plugs in a disk with a file's content.
    pub fn plug_file(&mut self, file: &Path, options: DiskOptions) -> Disk {
        self.plug_node(&json!({"driver": "file", "filename": file, "locking": "off"}), file, options)
    }

    /// Plugs in the disk that a server of NBD has at a socket.
    pub fn plug_served(&mut self, socket: &Path, options: DiskOptions) -> Disk {
        self.plug_node(&json!({"driver": "nbd", "server": {"type": "unix", "path": socket}}), socket, options)
    }

    fn plug_node(&mut self, below: &Value, file: &Path, options: DiskOptions) -> Disk {
        self.disks += 1;
        let serial = format!("d{}", self.disks);
        let block = json!({"driver": "raw", "node-name": serial, "read-only": options.read_only, "file": below});
        self.qmp.run("blockdev-add", block);
        let disk = Disk { serial, file: file.to_owned(), options };
        self.replug(&disk);
        disk
    }

    /// Plugs a disk in again that was pulled out.
    pub fn replug(&mut self, disk: &Disk) {
        let Disk { serial, options, .. } = disk;
        self.qmp.run(
            "device_add",
            json!({
                "driver": "virtio-blk-pci", "id": serial, "drive": serial, "serial": serial,
                "logical_block_size": options.block_bytes, "physical_block_size": options.block_bytes,
            }),
        );
        self.ok(&format!("for i in $(seq 600); do [ -e {0} ] && exit 0; sleep 0.1; done; exit 1", disk.path()));
    }

    /// Pulls a disk out, in use or not.
    pub fn unplug(&mut self, disk: &Disk) {
        self.qmp.run("device_del", json!({"id": disk.serial}));
        // The guest lets go of it after its link has gone, and only then another of the same name can be plugged in.
        self.qmp.await_line(|line| line["event"] == "DEVICE_DELETED" && line["data"]["device"] == disk.serial.as_str());
        self.ok(&format!("for i in $(seq 600); do [ -e {0} ] || exit 0; sleep 0.1; done; exit 1", disk.path()));
    }

    fn agent_line(&mut self) -> String {
        let mut line = String::new();
        match self.agent.read_line(&mut line) {
            Ok(0) | Err(_) => panic!("the guest does not answer; its console:\n{}", self.console()),
            Ok(_) => line.trim_end().to_owned(),
        }
    }

    fn console(&self) -> String {
        let text = fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&text[text.len().saturating_sub(4000)..]).into_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Booted {
    /// Boots the release that this host runs, and keeps it after this.
    pub fn new(prepare: impl FnOnce(&mut Machine)) -> Self {
        let (image, kept) = (image(None), folder());
        let root = kept.path().join("root.qcow2");
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&image.join("root.img"), &root])
            .status();
        assert!(made.unwrap().success());
        let options = by_loader(Init::Plain, &image);
        let root = format!("format=qcow2,file={}", root.display());
        let mut machine = Machine::power_on(Init::Plain, &root, &options.each_ref().map(String::as_str));
        machine.wait_for_agent();
        prepare(&mut machine);
        machine.ok("sync");
        machine.qmp.run("stop", json!({}));
        machine.migrate("migrate", &format!("exec:cat >{}", kept.path().join("memory").display()));
        machine.qmp.run("quit", json!({}));
        machine.wait_for_end();
        // Its disk of tools is in there.
        let tools = std::mem::replace(&mut machine.folder, folder());
        Self { kept, tools, root, options }
    }

    /// The machine as it was then, at this time of the day, and as if nobody had drawn the same random numbers before.
    pub fn power_on(&self) -> Machine {
        let options: Vec<_> = self.options.iter().map(String::as_str).chain(["-incoming", "defer"]).collect();
        let (root, tools) = (format!("snapshot=on,{}", self.root), self.tools.path().join("tools.img"));
        let mut machine = Machine::run(Init::Plain, &root, &tools, &options, folder());
        machine.migrate("migrate-incoming", &format!("exec:cat {}", self.kept.path().join("memory").display()));
        machine.qmp.run("cont", json!({}));
        let mut random = [0; 64];
        File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        // RNDRESEEDCRNG
        machine.ok(&format!(
            "date -s @{now} && echo {} >/dev/urandom && perl -e 'ioctl(STDOUT, 0x5207, 0) or die' >/dev/urandom",
            Base64::encode_string(&random)
        ));
        machine
    }
}

/// QEMU's options that boot an image's kernel.
fn by_loader(init: Init, image: &Path) -> [String; 6] {
    let file = |name: &str| image.join(name).into_os_string().into_string().unwrap();
    let append = match init {
        Init::Plain => COMMAND_LINE.to_owned(),
        Init::Systemd | Init::OneDisk => COMMAND_LINE.replace("init=/sbin/guest-init", "systemd.show_status=true"),
    };
    ["-kernel".into(), file("kernel"), "-initrd".into(), file("initrd"), "-append".into(), append]
}

fn folder() -> TempDir {
    tempfile::Builder::new().prefix("cryptattach-vm").tempdir_in("/var/tmp").unwrap()
}

/// The guest of a release, of this host's unless one is named: its kernel, initrd and root file system; made if it is not there yet.
pub fn image(release: Option<&str>) -> PathBuf {
    crate::image::make("vm", release.as_slice())
}

/// A read-only disk with the binary, or the package with it.
fn tools(init: Init, folder: &Path, image: &Path) {
    fs::create_dir(folder).unwrap();
    match init {
        Init::Plain => fs::copy(env!("CARGO_BIN_EXE_cryptattach"), folder.join("cryptattach")).unwrap(),
        Init::Systemd | Init::OneDisk => fs::copy(&*PACKAGE, folder.join("cryptattach.deb")).unwrap(),
    };
    let made =
        Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).args([folder, image]).arg("256M").output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// The Debian package.
pub fn package() -> &'static Path {
    &PACKAGE
}

/// The Debian package of what was just built, or the one that a benchmark has built.
static PACKAGE: LazyLock<PathBuf> = LazyLock::new(|| {
    if let Some(package) = std::env::var_os("CRYPTATTACH_PACKAGE") {
        return package.into();
    }
    let output = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/deb")).arg("--dev").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim_end().into()
});

fn connect(path: &str, deadline: Instant, qemu: &mut Child, console: &str) -> UnixStream {
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{path}: {error}"),
        }
        if let Some(status) = qemu.try_wait().unwrap() {
            panic!("QEMU has ended ({status}):\n{}", fs::read_to_string(console).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
