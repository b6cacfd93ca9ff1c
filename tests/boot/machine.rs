//! A machine that boots from an encrypted root: QEMU without KVM, a serial console that is read and typed on.

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    qemu::{self, Qmp},
    tpm_process,
};

/// QEMU emulates the processor, and the machine may be busy: only what hangs takes so long.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a machine is made of.
#[derive(Clone, Default)]
pub struct Parts {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// Disks by serial number; what is written to them is thrown away.
    pub disks: Vec<(String, PathBuf)>,
    /// What answers at 10.0.2.100:443, 10.0.2.101:443, ..., a command for each connection; without any the machine has no network
    /// card.
    pub servers: Vec<String>,
    /// More of QEMU's arguments.
    pub qemu: Vec<String>,
    /// More of the kernel's command line.
    pub append: String,
    /// The state of a TPM.
    pub tpm: Option<PathBuf>,
}

/// A static address: asking for one takes klibc's ipconfig seconds.
pub const STATIC: &str = "ip=10.0.2.15::10.0.2.2:255.255.255.0::eth0:off net.ifnames=0";

/// A machine that runs; it is killed with the value.
pub struct Machine {
    qemu: Child,
    tpm: Option<Child>,
    keyboard: ChildStdin,
    console: Receiver<Vec<u8>>,
    qmp: Option<Qmp>,
    folder: TempDir,
    /// All that the console has shown.
    pub shown: String,
    /// How much of it `see` has passed.
    seen: usize,
    log: File,
    started: Instant,
}

impl Machine {
    /// Starts; the console goes to `log` as well.
    pub fn start(parts: &Parts, log: &Path) -> Self {
        // Ubuntu's AppArmor lets swtpm have a socket here, and not in /var/tmp.
        let folder = tempfile::Builder::new().prefix("cryptattach-boot").tempdir_in("/tmp").unwrap();
        let at = |name: &str| folder.path().join(name).into_os_string().into_string().unwrap();
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "768"])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-device", "virtio-rng-pci"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))])
            .arg("-kernel")
            .arg(&parts.kernel)
            .arg("-initrd")
            .arg(&parts.initrd)
            .args([
                "-append",
                &format!(
                    "console=ttyS0 quiet panic=-1 no_timer_check root=/dev/mapper/root rw init=/sbin/guest-init {}",
                    parts.append
                ),
            ]);
        for (serial, file) in &parts.disks {
            let drive = format!("if=none,id={serial},format=raw,snapshot=on,cache=unsafe,file={}", file.display());
            qemu.args(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive={serial},serial={serial}")]);
        }
        if !parts.servers.is_empty() {
            // The network has nothing but those servers: no DNS, no way out.
            let mut net = "user,id=net,restrict=on".to_owned();
            for (last, server) in (100..).zip(&parts.servers) {
                net.push_str(&format!(",guestfwd=tcp:10.0.2.{last}:443-cmd:{server}"));
            }
            qemu.args(["-netdev", &net, "-device", "virtio-net-pci,netdev=net,romfile="]);
        }
        let tpm = parts.tpm.as_ref().map(|state| {
            let socket = folder.path().join("tpm");
            qemu.args(qemu::tpm(&socket));
            let control = format!("type=unixio,path={}", socket.display());
            tpm_process::start(state, &socket, &["--ctrl", &control, "--flags", "not-need-init,startup-clear"])
        });
        let started = Instant::now();
        let mut qemu = qemu
            .args(&parts.qemu)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-system-x86_64 is missing: scripts/prerequisites vm");
        let keyboard = qemu.stdin.take().unwrap();
        let mut output = qemu.stdout.take().unwrap();
        let (sender, console) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                if sender.send(bytes[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        fs::create_dir_all(log.parent().unwrap()).unwrap();
        let log = File::create(log).unwrap();
        Self { qemu, tpm, keyboard, console, qmp: None, folder, shown: String::new(), seen: 0, log, started }
    }

    /// Waits until the console shows this, after what was seen before; returns the seconds since the start.
    #[track_caller]
    pub fn see(&mut self, text: &str) -> f64 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.shown[self.seen..].find(text) {
                self.seen += at + text.len();
                return self.started.elapsed().as_secs_f64();
            }
            match self.hear(deadline) {
                Ok(()) => {}
                Err(RecvTimeoutError::Timeout) => panic!("'{text}' is not shown; the console:\n{}", self.shown),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("it ended without '{text}'; the console:\n{}", self.shown)
                }
            }
        }
    }

    /// Waits until the machine ends by itself: QEMU takes a reboot for that.
    #[track_caller]
    pub fn ends(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.hear(deadline) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => panic!("it goes on; the console:\n{}", self.shown),
            }
        }
    }

    /// Takes what the console shows next.
    fn hear(&mut self, deadline: Instant) -> Result<(), RecvTimeoutError> {
        let bytes = self.console.recv_timeout(deadline.saturating_duration_since(Instant::now()))?;
        let text = String::from_utf8_lossy(&bytes).replace('\r', "");
        write!(self.log, "{text}").unwrap();
        self.shown.push_str(&text);
        Ok(())
    }

    /// Waits for the end of a line; returns what is left of it.
    #[track_caller]
    pub fn see_line(&mut self) -> String {
        let start = self.seen;
        self.see("\n");
        self.shown[start..self.seen].to_owned()
    }

    /// The processor time that the machine has taken so far.
    pub fn processor_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.qemu.id())).unwrap();
        // proc_pid_stat(5): the name is in parentheses; user and system time are the fields 14 and 15, in ticks of 10 ms.
        let (_, fields) = stat.rsplit_once(')').unwrap();
        fields.split_whitespace().skip(11).take(2).map(|ticks| ticks.parse::<f64>().unwrap() / 100.0).sum()
    }

    /// Whether the console has shown this at any time.
    pub fn has_shown(&self, text: &str) -> bool {
        self.shown.contains(text)
    }

    /// What the boot left in /run, as the booted system shows it.
    #[track_caller]
    pub fn record(&mut self) -> Value {
        self.see("RECORD ");
        serde_json::from_str(self.see_line().trim()).unwrap()
    }

    /// Types a line.
    pub fn type_line(&mut self, text: &str) {
        self.keyboard.write_all(format!("{text}\n").as_bytes()).unwrap();
        self.keyboard.flush().unwrap();
    }

    /// Plugs in a disk.
    pub fn plug(&mut self, serial: &str, file: &Path) {
        let block = json!({"driver": "raw", "node-name": serial, "file": {"driver": "file", "filename": file}});
        self.qmp("blockdev-add", block);
        self.qmp("device_add", json!({"driver": "virtio-blk-pci", "id": serial, "drive": serial, "serial": serial}));
    }

    fn qmp(&mut self, command: &str, arguments: Value) {
        let connect = || Qmp::new(UnixStream::connect(self.folder.path().join("qmp")).unwrap(), PATIENCE);
        self.qmp.get_or_insert_with(connect).run(command, arguments);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for child in [Some(&mut self.qemu), self.tpm.as_mut()].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
