//! Trying a volume out, and asking why it was not attached.

use std::fs;

use crate::site::{LoopDevice, Site};

#[test]
fn a_volume_that_would_unlock_says_from_where() {
    let site = Site::new();
    let (strict, reference) = site.volume("strict", &[]);
    let (compatible, _) = site.volume("compatible", &["--keyslot"]);
    let told = site.ok(&["test", &strict]);
    for part in ["would unlock in", &reference, "store 'cinder' (the directory", "matches the header's digest"] {
        assert!(told.contains(part), "{part}: {told}");
    }
    let told = site.json(&["test", &compatible]);
    let steps: Vec<&str> =
        told["steps"].as_array().unwrap().iter().map(|step| step["step"].as_str().unwrap()).collect();
    assert_eq!(steps, ["header", "separation", "key", "volume key"]);
    assert!(told["steps"][2]["found"].as_str().unwrap().contains("its passphrase opens the keyslot"), "{told}");
    assert!(fs::read_to_string(site.keys("audit")).unwrap().contains("\"action\":\"test\""));

    // Attached or not makes no difference.
    let name = site.name("x");
    site.attach(&strict, &name, &[]);
    site.ok(&["test", &strict]);
    site.ok(&["detach", &name]);
}

#[test]
fn a_boot_has_no_environment_and_mounts_first() {
    let site = Site::new();
    let (volume, _) = site.volume("v", &[]);
    // The site's configuration is known from the environment only.
    let refused = site.fails(78, &["test", &volume, "--as-boot"]);
    assert!(refused.contains("/etc/cryptattach/cryptattach.toml"), "{refused}");
    let told = site.ok(&["--config", site.keys("cryptattach.toml"), "test", &volume, "--as-boot"]);
    let keys = site.keys("").trim_end_matches('/');
    assert!(told.contains(&format!("is on the file system at {keys}, which has to be mounted first")), "{told}");
}

#[test]
fn a_volume_that_would_not_unlock_fails_as_attach_does() {
    let site = Site::new();
    let (volume, reference) = site.volume("v", &[]);
    fs::rename(site.sealed(&reference), site.keys("gone")).unwrap();
    let test = site.fails(67, &["test", &volume]);
    let name = site.name("x");
    let attach = ["attach", &volume, &name, "--backend", "userspace"];
    assert_eq!(site.fails(67, &attach), test);

    // The failure is remembered under both names until the volume is attached.
    let explained = site.ok(&["explain", &volume]);
    assert!(
        explained.contains(&format!("as '{name}': exit code 67")) && explained.ends_with(test.trim_end()),
        "{explained}"
    );
    assert_eq!(site.ok(&["explain", &name]), explained);
    fs::rename(site.keys("gone"), site.sealed(&reference)).unwrap();
    site.ok(&attach);
    site.ok(&["detach", &name]);
    assert_eq!(site.ok(&["explain", &name]), format!("no failure of '{name}' is recorded since the last boot"));
}

#[test]
fn what_a_boot_could_not_attach_is_explained() {
    let site = Site::new();
    let (volume, reference) = site.volume("v", &[]);
    let device = LoopDevice::new(volume.as_ref(), "");
    let name = site.name("root");
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    let boot = format!("{config}\n[[boot.volumes]]\nname = '{name}'\ndevice = '{}'\n", device.path());
    fs::write(site.keys("cryptattach.toml"), boot).unwrap();
    fs::rename(site.sealed(&reference), site.keys("gone")).unwrap();
    let id = reference.split_once('/').unwrap().1;
    let told = site.fails(81, &["boot"]);
    let explained = site.ok(&["explain", &name]);
    assert!(explained.contains(&format!("attach at boot {} as '{name}': exit code 67", device.path())), "{explained}");
    assert!(explained.contains("next: ") && told.contains(id) && explained.contains(id), "{told}{explained}");

    fs::rename(site.keys("gone"), site.sealed(&reference)).unwrap();
    site.ok(&["boot"]);
    assert_eq!(site.ok(&["explain", &name]), format!("no failure of '{name}' is recorded since the last boot"));
    site.ok(&["detach", &name]);
}

#[test]
fn a_disk_that_a_boot_has_waited_for_in_vain_is_explained() {
    let site = Site::new();
    let name = site.name("root");
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    let missing = format!("[boot]\ntotal_seconds = 1\n[[boot.volumes]]\nname = '{name}'\ndevice = 'LABEL={name}'\n");
    fs::write(site.keys("cryptattach.toml"), format!("{config}\n{missing}")).unwrap();
    site.fails(81, &["boot"]);
    let explained = site.ok(&["explain", &name]);
    assert!(explained.contains(&format!("the disk LABEL={name} did not appear within 1 s")), "{explained}");
}

#[test]
fn a_disk_that_may_be_absent_is_not_waited_for() {
    let site = Site::new();
    let (volume, _) = site.volume("v", &[]);
    let device = LoopDevice::new(volume.as_ref(), "");
    let (name, absent) = (site.name("root"), site.name("absent"));
    let crypttab = site.path("crypttab");
    let lines = format!("{absent} LABEL={absent} none luks,nofail\n{name} {} none luks\n", device.path());
    fs::write(&crypttab, lines).unwrap();
    let output = site.run(&["boot", "--crypttab", &crypttab.display().to_string()]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.success() && said.contains(&format!("{name} is attached")) && !said.contains(&absent),
        "{said}"
    );
    site.ok(&["detach", &name]);
}

#[test]
fn a_boot_refuses_keys_on_the_volumes_own_disk() {
    let site = Site::new();
    let same = site.path("same").display().to_string();
    site.ok(&["init", "--store", "same", "--path", &same, "--no-escrow"]);
    let (volume, reference) = site.volume("v", &["--store", "same", "--allow-shared"]);
    let device = LoopDevice::new(volume.as_ref(), "");
    let name = site.name("root");
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    let (with_volume, cinder) = (
        format!("[[boot.volumes]]\nname = '{name}'\ndevice = '{}'\n", device.path()),
        "cinder/3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de",
    );
    fs::write(site.keys("cryptattach.toml"), format!("{config}\n{with_volume}")).unwrap();
    let told = site.fails(81, &["boot"]);
    assert!(told.contains("key and data are on the same device: sealed key"), "{told}");
    assert!(told.contains("a boot does not have it"), "{told}");

    // Before the boot one learns of it as well, and of each key that the boot has and what it lacks.
    site.fails(72, &["--config", site.keys("cryptattach.toml"), "test", device.path(), "--as-boot"]);
    let keys = format!("{with_volume}keys = ['{reference}', '{cinder}']\n");
    fs::write(site.keys("cryptattach.toml"), format!("{config}\n{keys}")).unwrap();
    let told = site.fails(67, &["--config", site.keys("cryptattach.toml"), "test", device.path(), "--as-boot"]);
    for part in
        [&format!("with {reference}, one of 2 keys:"), "same device", &format!("with {cinder}"), "there is no key"]
    {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn the_boot_lacks_a_private_key_that_is_kept_out_of_the_initramfs() {
    let site = Site::new();
    let (volume, reference) = site.volume("v", &[]);
    let device = LoopDevice::new(volume.as_ref(), "");
    let config = fs::read_to_string(site.keys("cryptattach.toml")).unwrap();
    let listed = format!("{config}\n[[boot.volumes]]\nname = '{}'\ndevice = '{}'\n", site.name("root"), device.path());
    fs::write(site.keys("cryptattach.toml"), listed).unwrap();
    let told = site.fails(78, &["--config", site.keys("cryptattach.toml"), "test", device.path(), "--as-boot"]);
    assert!(told.contains(&format!("a boot cannot open the volume with {reference}\n  because ")), "{told}");
    assert!(told.contains("is not put into the initramfs: it is a private key"), "{told}");
    site.ok(&["test", device.path()]);
}

#[test]
fn a_passphrase_is_released_for_its_own_volume_only() {
    let site = Site::new();
    let (volume, reference) = site.volume("v", &["--keyslot"]);
    let (other, _) = site.volume("other", &["--keyslot"]);
    let passphrase = site.ok(&["key", "passphrase", "--for", &volume]);
    assert_eq!(passphrase, site.ok(&["key", "passphrase", &reference]));
    assert_eq!(passphrase.len(), 64);
    let refused = site.fails(68, &["key", "passphrase", &reference, "--for", &other]);
    assert!(refused.contains("it is for the volume"), "{refused}");
    let (strict, _) = site.volume("strict", &[]);
    assert!(site.fails(68, &["key", "passphrase", "--for", &strict]).contains("without --keyslot"));
}
