//! The main job: attach, use, detach, attach again.

use std::fs;

use crate::site::{LoopDevice, Site, sh};

#[test]
fn what_was_written_is_read_back_after_a_second_attach() {
    let site = Site::new();
    for (label, sector_size) in [("small", "512"), ("large", "4096")] {
        let (volume, reference) = site.volume(label, &["--sector-size", sector_size]);
        assert!(reference.starts_with("cinder/"), "{reference}");
        let name = site.name(label);
        let device = site.attach(&volume, &name, &[]);
        sh(&format!("mkfs.ext4 -q {}", device.display()));
        {
            let files = site.mount(&device);
            sh(&format!("seq 1 200000 > {}/numbers", files.path().display()));
        }
        site.ok(&["detach", &name]);
        assert!(!device.exists(), "the mapping is gone when detach returns");
        let raw = fs::read(&volume).unwrap();
        assert!(!raw.windows(12).any(|bytes| bytes == b"123456\n12345"), "plaintext on the volume");

        let device = site.attach(&volume, &name, &["--read-only"]);
        sh(&format!("e2fsck -fn {}", device.display()));
        {
            let files = site.mount(&device);
            assert_eq!(sh(&format!("seq 1 200000 | cmp - {}/numbers && echo same", files.path().display())), "same");
        }
        site.ok(&["detach", &name]);
    }
}

#[test]
fn fio_reads_what_it_wrote() {
    let site = Site::new();
    let (volume, _) = site.volume("fio", &[]);
    let name = site.name("fio");
    let device = site.attach(&volume, &name, &[]);
    for (pattern, block) in [("randwrite", "4k-64k"), ("write", "1m")] {
        sh(&format!(
            "cd {} && fio --name=v --filename={} --rw={pattern} --bsrange={block} --ioengine=libaio --iodepth=8 --direct=1 \
             --size=32m --verify=crc32c --do_verify=1 --verify_fatal=1 --fsync=64 --output-format=terse",
            // fio leaves a file behind where it runs.
            site.path("").display(),
            device.display(),
            block = if block.contains('-') { block.to_owned() } else { format!("{block}-{block}") },
        ));
    }
    site.ok(&["detach", &name]);
}

#[test]
fn attaching_twice_says_so_and_succeeds() {
    let site = Site::new();
    let (volume, reference) = site.volume("twice", &[]);
    let name = site.name("twice");
    let device = site.attach(&volume, &name, &[]);
    let again = site.run(&["attach", &volume, &name, "--backend", "userspace"]);
    assert!(again.status.success());
    assert!(String::from_utf8_lossy(&again.stderr).contains("is attached already as"));
    assert_eq!(String::from_utf8_lossy(&again.stdout).trim_end(), device.to_str().unwrap());

    // It does not take the key for that.
    fs::rename(site.sealed(&reference), site.keys("hidden")).unwrap();
    let json = site.json(&["attach", &volume, &name, "--backend", "userspace"]);
    assert_eq!(json["already_attached"], true);

    let (other, _) = site.volume("other", &[]);
    let refused = site.fails(73, &["attach", &other, &name, "--backend", "userspace"]);
    assert!(refused.contains("is taken"), "{refused}");
}

#[test]
fn without_a_device_mapper_a_loop_device_goes_to_userspace_with_a_notice() {
    let site = Site::new();
    let (volume, _) = site.volume("notice", &[]);
    let device = LoopDevice::new(volume.as_ref(), "");
    let name = site.name("notice");
    let output = site.run(&["attach", device.path(), &name]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    if !std::path::Path::new("/dev/mapper/control").exists() {
        assert!(String::from_utf8_lossy(&output.stderr).contains("in userspace"));
    }
    site.ok(&["detach", &name]);
}

#[test]
fn status_and_list_say_what_is_attached() {
    let site = Site::new();
    let (volume, _) = site.volume("status", &["--sector-size", "512", "--key-size", "256"]);
    let name = site.name("status");
    site.attach(&volume, &name, &["--read-only"]);
    let status = site.json(&["status", &name]);
    assert_eq!(status["source"], volume.as_str());
    assert_eq!(status["backend"], "userspace");
    assert_eq!((&status["key_size_bits"], &status["sector_size_bytes"]), (&256.into(), &512.into()));
    assert_eq!(status["size_bytes"], 48 << 20);
    assert_eq!(status["read_only"], true);
    assert!(site.ok(&["list"]).lines().any(|line| line.starts_with(&name)));
    assert!(site.ok(&["status", &name]).contains("read-only"));
    site.ok(&["detach", &name]);
    assert!(site.fails(66, &["status", &name]).contains("nothing is attached as"));
    assert!(site.fails(66, &["detach", &name]).contains("nothing is attached as"));
}

#[test]
fn a_read_only_mapping_takes_no_writes() {
    let site = Site::new();
    let (volume, _) = site.volume("ro", &[]);
    let before = fs::read(&volume).unwrap();
    let name = site.name("ro");
    let device = site.attach(&volume, &name, &["--read-only"]);
    let written = std::process::Command::new("dd")
        .args(["if=/dev/zero", &format!("of={}", device.display()), "bs=4k", "count=1", "conv=fsync"])
        .output()
        .unwrap();
    assert!(!written.status.success());
    site.ok(&["detach", &name]);
    assert_eq!(fs::read(&volume).unwrap(), before);
}
