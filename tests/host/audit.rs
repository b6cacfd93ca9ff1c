//! The audit record: many writers, writers that are killed, disks that are full, logrotate, and whoever changes it afterwards.

use std::{
    fs,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    site::{Site, sh},
    tpm::Host,
};

/// A site with a volume; each `test` of it is one record.
struct Recorded {
    site: Site,
    volume: String,
}

impl Recorded {
    fn new() -> Self {
        let site = Site::new();
        let (volume, _) = site.volume("volume", &[]);
        Self { site, volume }
    }

    fn command(&self) -> Command {
        let mut command = self.site.command();
        command.args(["test", &self.volume]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    fn record(&self) {
        self.site.ok(&["test", &self.volume]);
    }

    fn log(&self) -> &'static str {
        self.site.keys("audit")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.log()).unwrap()
    }

    /// What `audit verify` says of a record without fault.
    #[track_caller]
    fn unbroken(&self) -> Value {
        let verdict = self.site.json(&["audit", "verify"]);
        assert_eq!(verdict["faults"], serde_json::json!([]));
        verdict
    }

    /// What it says of one that is broken.
    #[track_caller]
    fn broken(&self) -> String {
        let output = self.site.run(&["audit", "verify"]);
        let said = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(84), "{said}");
        println!("{said}");
        said
    }
}

#[test]
fn many_writers_at_once_make_one_chain() {
    let recorded = Recorded::new();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..50).for_each(|_| assert!(recorded.command().status().unwrap().success())));
        }
    });
    let verdict = recorded.unbroken();
    assert_eq!((&verdict["records"], &verdict["last"]["seq"]), (&401.into(), &401.into()), "{verdict}");
    assert!(recorded.text().lines().all(|line| line.len() < 1024));
}

#[test]
fn writers_that_are_killed_leave_a_chain_that_goes_on() {
    let recorded = Recorded::new();
    let begun = Instant::now();
    (0..4).for_each(|_| recorded.record());
    let longest = begun.elapsed() / 4;
    for number in 0..120 {
        let mut child = recorded.command().spawn().unwrap();
        // Most kills come near the end, where the record is written.
        thread::sleep(longest * (number % 60 + 40) / 100);
        let _ = child.kill();
        let _ = child.wait();
    }
    let before = recorded.unbroken()["records"].as_u64().unwrap();
    recorded.record();
    assert_eq!(recorded.unbroken()["records"], before + 1);
    println!("120 kills, {before} records");
}

#[test]
fn a_line_that_a_full_disk_cut_off_is_told_and_the_chain_goes_on() {
    let recorded = Recorded::new();
    let folder = recorded.site.path("small");
    fs::create_dir(&folder).unwrap();
    sh(&format!("mount -t tmpfs -o size=8k small {}", folder.display()));
    let config = recorded.site.keys("cryptattach.toml");
    let text = fs::read_to_string(config).unwrap();
    fs::write(config, text.replace("\"audit\"", &format!("\"{}/audit\"", folder.display()))).unwrap();
    let is_full = |_: &u32| {
        let output = recorded.site.run(&["test", &recorded.volume]);
        String::from_utf8_lossy(&output.stderr).contains("'test' is done, but is not on record")
    };
    let written = (0..40).find(is_full).expect("the warning");
    let before = recorded.site.json(&["audit", "verify"]);
    sh(&format!("mount -o remount,size=1m {}", folder.display()));
    recorded.record();
    let verdict = recorded.site.json(&["audit", "verify"]);
    sh(&format!("umount {}", folder.display()));
    assert_eq!(
        (&before["torn"][0]["line"], &verdict["torn"][0]["line"]),
        (&(written + 1).into(), &(written + 1).into())
    );
    assert_eq!(verdict["records"], before["records"].as_u64().unwrap() + 1);
    assert_eq!((&verdict["faults"], &verdict["last"]["seq"]), (&serde_json::json!([]), &verdict["fit"][0]["seq"]));
}

#[test]
fn logrotate_takes_the_files_and_the_chain_goes_on() {
    let packaged = include_str!("../../packaging/cryptattach.logrotate");
    for how in ["", "copytruncate", "dateext\ndateformat -%s"] {
        let recorded = Recorded::new();
        let rules = recorded.site.path("rules");
        let text = packaged.replace("/var/log/cryptattach.jsonl", recorded.log()).replace('}', &format!("{how}\n}}"));
        fs::write(&rules, text).unwrap();
        let rotate = || {
            sh(&format!("logrotate --force --state {} {}", recorded.site.keys("rotated"), rules.display()));
            // A name with the time of day is taken for a second.
            thread::sleep(Duration::from_millis(if how.contains("dateext") { 1100 } else { 0 }));
        };
        for _ in 0..3 {
            recorded.record();
            rotate();
        }
        // Without the head in the state directory, too.
        sh(&format!("rm {}/*", recorded.site.keys("site-state/audit")));
        recorded.record();
        let verdict = recorded.unbroken();
        assert_eq!((&verdict["records"], &verdict["last"]["seq"]), (&5.into(), &5.into()), "{how}: {verdict}");
        assert_eq!(recorded.text().lines().count(), 1, "{how}");
        if how == "copytruncate" {
            let files: Vec<_> = ["audit.3", "audit.2", "audit.1", "audit"].map(|name| recorded.site.keys(name)).into();
            recorded.site.ok(&[&["audit", "verify"], &files[..]].concat());
            let told = recorded.site.fails(84, &["audit", "verify", files[1], files[0]]);
            assert!(told.contains("1 fault found"), "{told}");
            fs::remove_file(files[1]).unwrap();
            assert!(recorded.broken().contains("is missing before this one"));
        }
    }
}

#[test]
fn what_somebody_did_to_the_record_is_found_and_the_line_is_named() {
    let recorded = Recorded::new();
    (0..5).for_each(|_| recorded.record());
    let (log, good) = (recorded.log(), recorded.text());
    recorded.unbroken();
    let head = recorded.site.keys("site-state/audit");
    sh(&format!("cp -r {head} {head}.good"));
    for (script, expected) in [
        ("sed -i '3s/\"uid\":0/\"uid\":1/'", "audit:3: record 3 is not what it was when record 4 was written"),
        ("sed -i '4d'", "audit:4: record 4 is missing before this one"),
        ("sed -i '2,4d'", "audit:2: records 2 to 4 are missing before this one"),
        ("sed -i '2{h;d};3{G}'", "audit:3: record 2 stands after record 3"),
        ("sed -i '$d'", "audit:5: the end is missing: the state directory has record 6"),
        ("sed -i '$s/test/rest/'", "audit:6: record 6 is not the one that the state directory has"),
        ("truncate -s 0", "the end is missing: the state directory has record 6"),
        ("rm", "the end is missing: the state directory has record 6"),
        ("sed -i '2i all is well'", "audit:2: this line is not a record"),
    ] {
        sh(&format!("{script} {log}"));
        let said = recorded.broken();
        assert!(said.contains(expected), "{script}: {said}");
        // The next writer does not mend it. One that finds no line at all goes on as after logrotate, which is told.
        recorded.record();
        if script.starts_with("sed") {
            recorded.broken();
        } else {
            assert!(recorded.unbroken()["not_compared"].to_string().contains("the records before 7, which are not in"));
        }
        fs::write(log, &good).unwrap();
        sh(&format!("rm -r {head} && cp -r {head}.good {head}"));
        assert_eq!(recorded.unbroken()["fit"][0]["seq"], 6);
    }
}

#[test]
fn an_anchor_elsewhere_finds_a_record_that_was_written_anew() {
    let recorded = Recorded::new();
    let site = &recorded.site;
    recorded.record();
    let anchors = site.keys("anchors");
    fs::write(anchors, site.ok(&["audit", "anchor", "--json"])).unwrap();
    recorded.record();
    assert!(site.ok(&["audit", "verify", "--anchor", anchors]).contains("record 2"));
    // Whoever is root can do that.
    sh(&format!("rm -r {} {}", recorded.log(), site.keys("site-state/audit")));
    (0..3).for_each(|_| recorded.record());
    recorded.unbroken();
    site.fails(84, &["audit", "verify", "--anchor", anchors]);
    fs::write(anchors, "no anchor\n").unwrap();
    assert!(site.fails(74, &["audit", "verify", "--anchor", anchors]).contains("cannot read the anchors of"));
}

#[test]
fn an_anchor_in_the_tpm_finds_a_record_that_was_written_and_anchored_anew() {
    let host = Host::new();
    let site = host.site();
    let path = site.keys("cryptattach.toml");
    let text = fs::read_to_string(path).unwrap();
    fs::write(path, format!("{text}[tpm]\ntcti = '{}'\nidentity = 'host.tpm.pem'\n", host.swtpm.tcti())).unwrap();
    site.ok(&["init", "--store", "cinder", "--path", site.keys("cinder"), "--escrow", site.keys("escrow.pem")]);
    let (volume, _) = site.volume("volume", &[]);
    let recorded = Recorded { site, volume };
    let site = &recorded.site;
    let anchor = ["audit", "anchor", "--to", "tpm"];

    host.swtpm.tool(&["tpm2_changeauth", "-c", "owner", "secret"]);
    let password = site.keys("password");
    let with_password = [&anchor[..], &["--owner-password", password]].concat();
    assert!(site.fails(64, &anchor).contains("the owner's password of this TPM is needed"));
    fs::write(password, "guessed\n").unwrap();
    assert!(site.fails(64, &with_password).contains("the owner's password of this TPM is wrong"));
    fs::write(password, "secret\n").unwrap();
    assert_eq!(recorded.unbroken()["records"], 1, "a refused anchor is no record");
    site.ok(&with_password);
    recorded.record();
    // From the second one on nobody needs the password.
    site.ok(&anchor);
    recorded.record();
    let verdict = recorded.unbroken();
    let fits = serde_json::json!({"kept_in": "the TPM", "seq": 4});
    assert!(verdict["fit"].as_array().unwrap().contains(&fits), "{verdict}");
    assert_eq!(host.swtpm.leftovers(), "");

    let good = recorded.text();
    sh(&format!("sed -i '4,$d' {}; rm {}/*", recorded.log(), site.keys("site-state/audit")));
    assert!(recorded.broken().contains("no record up to this one is that of the TPM's last anchor"));
    // All of it anew, the anchor too.
    sh(&format!("rm -r {} {}", recorded.log(), site.keys("site-state/audit")));
    (0..3).for_each(|_| recorded.record());
    assert!(recorded.broken().contains("no record up to this one is that of the TPM's last anchor"));
    site.ok(&anchor);
    assert!(recorded.broken().contains("the TPM had the anchor of a record that is not here"));
    fs::write(recorded.log(), good).unwrap();
    sh(&format!("rm {}/*", site.keys("site-state/audit")));
    recorded.broken();

    // An index of that number that others have made is left alone.
    host.swtpm.tool(&["tpm2_nvundefine", "-C", "o", "-P", "secret", "0x180ca78"]);
    assert!(recorded.broken().contains("was anchored in the TPM, which has no anchor now"));
    host.swtpm.tool(&["tpm2_nvdefine", "-C", "o", "-P", "secret", "-s", "32", "-a", "authread|authwrite", "0x180ca78"]);
    assert!(site.fails(78, &anchor).contains("the NV index 0x0180ca78 is not one that cryptattach has made"));
}

/// A journald of one's own, in a /run of one's own.
#[test]
fn an_anchor_in_the_journal_is_compared() {
    let recorded = Recorded::new();
    let script = recorded.site.path("journal.sh");
    fs::write(
        &script,
        format!(
            r#"set -eu
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/systemd/journal /run/log/journal
[ -s /etc/machine-id ] || {{ mount -t tmpfs etc-id /mnt; echo 0123456789abcdef0123456789abcdef >/mnt/id; mount --bind /mnt/id /etc/machine-id; }}
/lib/systemd/systemd-journald >/dev/null 2>&1 &
journald=$!
trap 'kill $journald' EXIT
for try in $(seq 100); do [ -S /run/systemd/journal/socket ] && break; sleep 0.1; done
program={program}
$program audit anchor --to journal
# journald takes its time.
for try in $(seq 50); do $program audit verify >{out} && grep -q 'the journal: record 1' {out} && break; sleep 0.2; done
grep 'the journal: record 1' {out}
# Somebody who is not root says something else: journald knows who it was.
setpriv --reuid 65534 --regid 65534 --clear-groups logger --journald <<END
MESSAGE_ID=2f0d5c1b6e8a4c7f9b3d1e5a7c9f0b24
CRYPTATTACH_FILE={log}
CRYPTATTACH_SEQ=1
CRYPTATTACH_HASH=0000000000000000000000000000000000000000000000000000000000000000
END
sleep 1
$program audit verify
rm -r {log} {head}
$program test {volume} >/dev/null
! $program audit verify
"#,
            program = env!("CARGO_BIN_EXE_cryptattach"),
            out = recorded.site.keys("out"),
            log = recorded.log(),
            head = recorded.site.keys("site-state/audit"),
            volume = recorded.volume,
        ),
    )
    .unwrap();
    let output = Command::new("unshare")
        .args(["--mount", "sh"])
        .arg(&script)
        .env("CRYPTATTACH_CONFIG", recorded.site.keys("cryptattach.toml"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("audit:1: record 1 is not the one that the journal has"), "{said}");
}
