//! The NBD export, as qemu, nbdcopy and libnbd see it.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    busy::{wait_until, worker},
    site::{Site, sh},
};

/// Runs qemu-io's commands on an NBD export; its output if one of them fails.
pub fn qemu_io(uri: &str, commands: &[&str]) -> Result<String, String> {
    let mut qemu = Command::new("qemu-io");
    qemu.args(["-f", "raw", "-t", "none"]).args(commands.iter().flat_map(|command| ["-c", *command])).arg(uri);
    let output = qemu.output().unwrap();
    let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    let failed = !output.status.success() || text.contains("failed");
    if failed { Err(text) } else { Ok(text) }
}

/// Runs a Python script with libnbd.
#[track_caller]
fn libnbd(uri: &str, script: &str) -> String {
    let output = Command::new("/usr/bin/python3")
        .args(["-c", &format!("import nbd\nuri = '{uri}'\n{script}")])
        .output()
        .unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn nbdcopy_and_qemu_read_what_each_other_and_the_block_device_wrote() {
    let site = Site::new();
    let (volume, _) = site.volume("copied", &[]);
    let name = site.name("copied");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let status = site.json(&["status", &name]);
    assert_eq!((status["export"].as_str(), status["trouble"].as_str()), (Some("nbd"), None), "{status}");
    let random = site.path("random");
    sh(&format!("head -c {} /dev/urandom > {}", status["size_bytes"], random.display()));
    sh(&format!("nbdcopy --connections=4 --flush {} '{uri}'", random.display()));
    sh(&format!("qemu-img compare -f raw -F raw {} '{uri}'", random.display()));
    sh(&format!("nbdcopy --connections=4 '{uri}' - | cmp - {}", random.display()));
    let again = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    assert_eq!(again, uri, "attached already");
    let refused = site.fails(73, &["attach", &volume, &name, "--export", "fuse"]);
    assert!(refused.contains("exported by nbd"), "{refused}");
    site.ok(&["detach", &name]);

    let device = site.attach(&volume, &name, &["--export", "fuse"]);
    sh(&format!("cmp {} {}", device.display(), random.display()));
    site.ok(&["detach", &name]);
    let refused = site.fails(64, &["attach", &volume, &name, "--export", "nbd", "--backend", "dm-crypt"]);
    assert!(refused.contains("--export"), "{refused}");
}

#[test]
fn any_byte_range_can_be_written_zeroed_and_discarded() {
    let site = Site::new();
    let (volume, _) = site.volume("ranges", &[]);
    let name = site.name("ranges");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd", "--allow-discards"]);
    let commands = [
        "write -P 1 0 8M",
        "write -P 2 1000 5000",
        "read -P 1 0 1000",
        "read -P 2 1000 5000",
        "read -P 1 6000 2192",
        "write -z 4097 1M",
        "read -P 2 1000 3097",
        "read -P 0 4097 1M",
        "read -P 1 1052673 1M",
        "flush",
    ];
    qemu_io(&uri, &commands).unwrap();
    let blocks = || sh(&format!("stat -c %b {volume}")).parse::<u64>().unwrap();
    let before = blocks();
    qemu_io(&uri, &["discard 2M 4M", "read -P 1 6M 2M", "flush"]).unwrap();
    assert!(before - blocks() >= 4 << 11, "the volume has a hole of 4 MiB");
    site.ok(&["detach", &name]);

    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let before = blocks();
    qemu_io(&uri, &["write -P 3 6M 1M", "discard 6M 1M", "read -P 3 6M 1M"]).unwrap();
    assert_eq!(blocks(), before, "discards are passed on only where that is allowed");
    site.ok(&["detach", &name]);
}

#[test]
fn libnbd_asks_what_is_allocated_and_what_is_unknown_is_refused() {
    let site = Site::new();
    let (volume, _) = site.volume("asked", &[]);
    let name = site.name("asked");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let map = sh(&format!("nbdinfo --map '{uri}'"));
    assert!(map.split_ascii_whitespace().eq(["0", &(48 << 20).to_string(), "0", "data"]), "{map}");
    let script = r"
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context('base:allocation')
h.connect_uri(uri)
size = h.get_size()
def errno(f):
    try: f()
    except nbd.Error as e: return e.errno
odd = 1 << 9
print(errno(lambda: h.trim(512, size)), errno(lambda: h.trim(512, size - 4)),
      errno(lambda: h.pread(1, 0, odd)), errno(lambda: h.pwrite(b'xyz', 0, odd)), errno(lambda: h.trim(512, 0, odd)),
      errno(lambda: h.zero(512, 0, odd)), errno(lambda: h.flush(odd)),
      errno(lambda: h.block_status(512, size, lambda *all: 0)))
assert bytes(h.pread(3, 0)) != b'xyz'
h.pwrite(b'abc', 0)
assert bytes(h.pread(3, 0)) == b'abc'
";
    assert_eq!(libnbd(&uri, script), "EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL EINVAL\n");
    site.ok(&["detach", &name]);
}

#[test]
fn a_client_too_many_waits_until_another_goes() {
    let site = Site::new();
    let (volume, _) = site.volume("many", &[]);
    let name = site.name("many");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let script = r"
import threading
all = [nbd.NBD() for n in range(64)]
for h in all: h.connect_uri(uri)
late, done = nbd.NBD(), threading.Event()
def connect():
    late.connect_uri(uri)
    late.pread(512, 0)
    done.set()
threading.Thread(target=connect, daemon=True).start()
assert not done.wait(0.5)
all[17].shutdown()
print(done.wait(20))
";
    assert_eq!(libnbd(&uri, script), "True\n");
    site.ok(&["detach", &name]);
}

#[test]
fn libnbd_finds_what_the_export_says_it_has() {
    let site = Site::new();
    let (volume, _) = site.volume("said", &[]);
    let name = site.name("said");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let script = r"
a, b = nbd.NBD(), nbd.NBD()
for h in (a, b):
    h.set_strict_mode(0)
    h.connect_uri(uri)
assert a.get_protocol() == 'newstyle-fixed' and a.get_structured_replies_negotiated()
assert a.can_flush() and a.can_fua() and a.can_trim() and a.can_zero() and a.can_df() and a.can_fast_zero()
assert a.can_multi_conn() and not a.is_read_only() and not a.is_rotational()
assert a.get_block_size(nbd.SIZE_MINIMUM) == 1
size = a.get_size()
a.pwrite(b'over a', 4090)
b.flush()
assert bytes(b.pread(6, 4090)) == b'over a'
assert bytes(a.pread(32 << 20, 0, nbd.CMD_FLAG_DF))[4090:4096] == b'over a'
big = bytes(range(256)) * (33 << 12 >> 8 << 8)
big = big[:(20 << 20) + 5]
a.pwrite(big, 3, nbd.CMD_FLAG_FUA)
assert bytes(b.pread(len(big), 3)) == big
def errno(f):
    try: f()
    except nbd.Error as e: return e.errno
print(errno(lambda: a.pread(1, size)), errno(lambda: a.pwrite(b'x', size)), errno(lambda: a.zero(512, size)),
      errno(lambda: a.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO)), errno(lambda: a.pread(33 << 20, 0)))
c = nbd.NBD()
c.set_request_structured_replies(False)
c.set_strict_mode(0)
c.connect_uri(uri)
assert not c.get_structured_replies_negotiated() and bytes(c.pread(5, 3)) == big[:5]
print(errno(lambda: c.pread(1, size)))
c.shutdown()
d = nbd.NBD()
d.set_opt_mode(True)
d.connect_uri(uri)
names = []
d.opt_list(lambda name, text: names.append(name))
d.set_export_name('other')
print(names, errno(d.opt_info))
d.opt_abort()
";
    let told = libnbd(&uri, script);
    assert_eq!(told, "EINVAL ENOSPC ENOSPC ENOTSUP EINVAL\nEINVAL\n[''] ENOENT\n");
    site.ok(&["detach", &name]);

    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd", "--read-only"]);
    let script = r"
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(uri)
assert h.is_read_only() and bytes(h.pread(4, 3)) == b'\0\1\2\3'
for f in (lambda: h.pwrite(b'x', 0), lambda: h.zero(1, 0), lambda: h.trim(1, 0)):
    try: f()
    except nbd.Error as e: print(e.errno)
";
    assert_eq!(libnbd(&uri, script), "EPERM\nEPERM\nEPERM\n");
    site.ok(&["detach", &name]);
}

#[test]
fn what_does_not_speak_nbd_does_no_harm() {
    let site = Site::new();
    let (volume, _) = site.volume("noise", &[]);
    let name = site.name("noise");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let option =
        |option: u32, length: u32| [&b"\0\0\0\x03IHAVEOPT"[..], &option.to_be_bytes(), &length.to_be_bytes()].concat();
    let go = [&option(7, 6)[..], &[0; 6]].concat();
    let long_write = [&go[..], b"\x25\x60\x95\x13\0\0\0\x01", &[0; 16], &[0xff; 4]].concat();
    let hostile: [&[u8]; 7] = [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\0\0\0\x03GARBAGE!\0\0\0\x07\0\0\0\0",
        &option(7, u32::MAX),
        &[&option(7, 6)[..], &[0xff; 6]].concat(),
        &[&go[..], &[0; 28]].concat(),
        &long_write,
        b"",
    ];
    for bytes in hostile {
        let mut socket = UnixStream::connect(Path::new("/run/cryptattach").join(&name).join("nbd.sock")).unwrap();
        socket.write_all(bytes).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        // Until the server has closed it.
        socket.read_to_end(&mut Vec::new()).ok();
        qemu_io(&uri, &["read 0 4k"]).unwrap();
    }
    site.ok(&["detach", &name]);
}

#[test]
fn clients_beyond_what_the_worker_can_open_do_not_shut_out_later_ones() {
    let site = Site::new();
    let (volume, _) = site.volume("many", &[]);
    let name = site.name("many");
    let attach = format!("ulimit -n 40; exec \"$0\" attach {volume} {name} --export nbd");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", &attach])
        .arg(site.command().get_program())
        .env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml"));
    let uri = String::from_utf8(shell.output().unwrap().stdout).unwrap();
    let connect = |_| UnixStream::connect(Path::new("/run/cryptattach").join(&name).join("nbd.sock")).unwrap();
    let clients: Vec<_> = (0..40).map(connect).collect();
    // It is out of files by now.
    std::thread::sleep(std::time::Duration::from_millis(300));
    drop(clients);
    let read = Command::new("timeout").args(["10", "qemu-io", "-f", "raw", "-c", "read 0 4k", uri.trim_end()]).status();
    assert!(read.unwrap().success());
    site.ok(&["detach", &name]);
}

#[test]
fn a_mapping_that_cannot_be_written_down_is_an_error_and_leaves_nothing() {
    let site = Site::new();
    let (volume, _) = site.volume("full", &[]);
    let name = site.name("full");
    // As many files as there are before the worker's last word about itself.
    let script = format!(
        "mount -t tmpfs -o nr_inodes=9 run /run/cryptattach
         timeout 20 \"$0\" attach {volume} {name} --export nbd
         echo $?; ls /run/cryptattach"
    );
    let mut shell = Command::new("unshare");
    shell.args(["-m", "sh", "-c", &script]).arg(site.command().get_program());
    let output = shell.env("CRYPTATTACH_CONFIG", site.keys("cryptattach.toml")).output().unwrap();
    let told = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(told[1].contains("cannot announce") && told[1].contains("No space left"), "{told:?}");
    assert_eq!(told[0], "71\n", "{told:?}");
}

#[test]
fn detach_says_who_is_connected_and_can_wait() {
    let site = Site::new();
    let (volume, _) = site.volume("client", &[]);
    let name = site.name("client");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    let mut client = Command::new("/usr/bin/python3")
        .args([
            "-c",
            &format!("import nbd\nh = nbd.NBD()\nh.connect_uri('{uri}')\nprint('connected', flush=True)\ninput()"),
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = String::new();
    BufReader::new(client.stdout.take().unwrap()).read_line(&mut told).unwrap();
    assert_eq!(told, "connected\n");
    let status = site.json(&["status", &name]);
    assert!(status["holders"][0].as_str().unwrap().contains(&client.id().to_string()), "{status}");
    let refused = site.fails(75, &["detach", &name]);
    assert!(refused.contains("python3") && refused.contains(&client.id().to_string()), "{refused}");
    site.ok(&["detach", &name, "--deferred"]);
    let status = site.json(&["status", &name]);
    assert!(status["trouble"].as_str().unwrap().contains("last user"), "{status}");
    client.kill().unwrap();
    client.wait().unwrap();
    wait_until("the mapping is gone", || !site.run(&["status", &name]).status.success());
    assert!(!Path::new("/run/cryptattach").join(&name).exists());
}

#[test]
fn a_killed_nbd_worker_is_reported_and_cleaned_up() {
    let site = Site::new();
    let (volume, _) = site.volume("killed", &[]);
    let name = site.name("killed");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    qemu_io(&uri, &["write -P 5 0 1M", "flush"]).unwrap();
    sh(&format!("kill -9 {}", worker(&name)));
    wait_until("the worker's death shows", || !site.json(&["status", &name])["trouble"].is_null());
    assert!(qemu_io(&uri, &["read 0 4k"]).is_err());
    // The next attach takes its place.
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    qemu_io(&uri, &["read -P 5 0 1M"]).unwrap();
    sh(&format!("kill -9 {}", worker(&name)));
    wait_until("the worker's death shows", || !site.json(&["status", &name])["trouble"].is_null());
    site.ok(&["detach", &name]);
    assert!(!Path::new("/run/cryptattach").join(&name).exists());
    // A signal that asks for an end gets one.
    site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    sh(&format!("kill -TERM {}", worker(&name)));
    wait_until("the mapping is gone", || !site.run(&["status", &name]).status.success());
}

#[test]
fn an_nbd_export_grows() {
    let site = Site::new();
    let (volume, _) = site.volume("grown", &[]);
    let name = site.name("grown");
    let uri = site.ok(&["attach", &volume, &name, "--export", "nbd"]);
    fs::File::options().write(true).open(&volume).unwrap().set_len(80 << 20).unwrap();
    site.ok(&["resize", &name]);
    assert_eq!(sh(&format!("nbdinfo --size '{uri}'")), (64_u64 << 20).to_string());
    assert_eq!(site.json(&["status", &name])["size_bytes"], 64 << 20);
    qemu_io(&uri, &["write -P 9 63M 1M", "read -P 9 63M 1M"]).unwrap();
    site.ok(&["detach", &name]);
}

#[test]
fn ublk_without_its_driver_says_what_is_missing() {
    if Path::new("/dev/ublk-control").exists() {
        return;
    }
    let site = Site::new();
    let (volume, _) = site.volume("ublk", &[]);
    let refused = site.fails(71, &["attach", &volume, &site.name("ublk"), "--export", "ublk"]);
    assert!(refused.contains("ublk_drv"), "{refused}");
}
