//! Volumes of a host whose identity is in its TPM, by the command.

use std::process::Output;

use crate::{site::Site, tpm::Host};

/// A site with a store `tpm` in the folder `sealed`, whose owner is the host's key.
pub fn site(host: &Host) -> Site {
    let site = host.site();
    let (keys, owner, identity) =
        (site.keys("sealed"), site.keys("host.pem"), format!("tpm:{}", site.keys("host.tpm.pem")));
    site.ok(&[
        "init",
        "--store",
        "tpm",
        "--path",
        keys,
        "--escrow",
        site.keys("escrow.pem"),
        "--owner",
        owner,
        "--identity",
        &identity,
    ]);
    site
}

fn run(site: &Site, host: &Host, arguments: &[&str]) -> Output {
    site.command().args(arguments).env("CRYPTATTACH_TCTI", host.swtpm.tcti()).output().unwrap()
}

#[test]
fn a_volume_is_attached_in_the_trusted_boot_state_only() {
    let mut host = Host::new();
    let site = site(&host);
    let volume = site.file("volume", 64 << 20).into_os_string().into_string().unwrap();
    let name = site.name("tpm");
    let ok = |output: Output| {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let attach = ["attach", &volume, &name, "--backend", "userspace"];
    ok(run(&site, &host, &["format", &volume, "--store", "tpm"]));
    let evidence = ok(run(&site, &host, &["separation", &volume]));
    assert!(evidence.contains("TPM key"), "{evidence}");
    ok(run(&site, &host, &attach));
    ok(run(&site, &host, &["detach", &name]));

    host.swtpm.extend(7, 'a');
    let refused = run(&site, &host, &attach);
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("{told}");
    assert_eq!(refused.status.code(), Some(79), "{told}");
    assert!(told.contains("PCR 7 is") && told.contains("policy show"), "{told}");
    assert_eq!(host.swtpm.leftovers(), "");

    host.reboot();
    ok(run(&site, &host, &attach));
    ok(run(&site, &host, &["detach", &name]));
}

#[test]
fn without_its_tpm_it_says_so() {
    let host = Host::new();
    let site = site(&host);
    let volume = site.file("volume", 64 << 20).into_os_string().into_string().unwrap();
    let refused =
        site.command().args(["format", &volume, "--store", "tpm"]).env("CRYPTATTACH_TCTI", "device:/dev/none").output();
    let refused = refused.unwrap();
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    println!("{told}");
    assert_eq!(refused.status.code(), Some(79), "{told}");
    assert!(told.contains("cannot use a TPM at 'device:/dev/none'") && told.contains("No such file"), "{told}");
}
