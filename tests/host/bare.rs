//! What `cryptsetup reencrypt` makes of the same crashes: a measurement, for the table in docs/rotation.md.

use std::{fs, path::Path, process::Command};

use crate::{
    rotate::{Counts, DATA, HEADER, record_command, replay, told},
    site::{Site, sh},
};

/// Each of its crashes, then what a person would run: resume, else repair and resume.
#[test]
#[ignore = "a measurement: benches/crashes"]
fn cryptsetup_alone_after_the_same_crashes() {
    let site = Site::new();
    let volume = site.file("v", HEADER + DATA).into_os_string().into_string().unwrap();
    let passphrase = site.path("passphrase");
    let passphrase = passphrase.to_str().unwrap();
    let by = format!("-q --key-file {passphrase}");
    let cheap = format!("{by} --pbkdf pbkdf2 --pbkdf-force-iterations 1000");
    sh(&format!(
        "echo passphrase >{passphrase}; cryptsetup luksFormat --type luks2 {cheap} {volume}; \
         head -c {DATA} /dev/urandom | dd of={volume} bs=1M seek=16 iflag=fullblock conv=notrunc status=none"
    ));
    let data = |image: &[u8]| image[HEADER as usize..].to_vec();
    let before = data(&fs::read(&volume).unwrap());
    let reencrypt = |more: &str| format!("cryptsetup reencrypt {cheap} --force-offline-reencrypt {more} {volume}");
    let line = reencrypt("--resilience checksum --hotzone-size 256K");
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().unwrap());
    command.args(words);
    let recorded = record_command(&site, &volume, &mut command);
    let after = data(&fs::read(&volume).unwrap());
    let trial = |_: &str, image: &[u8], _: &Path| {
        fs::write(&volume, image).unwrap();
        let run = |command: &str| Command::new("sh").args(["-c", command]).output().unwrap().status.success();
        let is_under_way = || sh(&format!("cryptsetup luksDump {volume}")).contains("online-reencrypt");
        let resumed = match is_under_way() {
            false => true,
            true => {
                run(&reencrypt("--resume-only"))
                    || run(&format!("cryptsetup repair {by} {volume}")) && run(&reencrypt("--resume-only"))
            }
        };
        let now = data(&fs::read(&volume).unwrap());
        let opens = run(&format!("cryptsetup open --test-passphrase --key-file {passphrase} {volume}"));
        match (now == before || now == after, resumed, opens && !is_under_way()) {
            (true, true, true) => "fine",
            (true, ..) => "it never opens again",
            (false, true, _) => "DATA LOST, exit code 0",
            (false, false, _) => "it stays in the middle",
        }
    };
    let mut counts = Counts::new();
    replay(recorded, "cryptsetup reencrypt", (true, 0), &mut counts, &trial);
    told(&counts);
}
