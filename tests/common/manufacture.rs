//! Makers of TPMs.

use std::{path::Path, process::Command};

/// The state of a new TPM with an endorsement key that an authority, whose folder this is, has certified; it makes the
/// authority if there is none.
pub fn manufacture(folder: &Path, authority: &Path) {
    let at = authority.display();
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    write(
        "localca.conf",
        format!(
            "statedir = {at}\nsigningkey = {at}/signkey.pem\nissuercert = {at}/issuercert.pem\n\
             certserial = {at}/certserial\n"
        ),
    );
    let path = folder.display();
    write(
        "setup.conf",
        format!(
            "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {path}/localca.conf\n\
             create_certs_tool_options = /etc/swtpm-localca.options\nactive_pcr_banks = sha256\n"
        ),
    );
    let made = Command::new("swtpm_setup")
        .args(["--tpm2", "--create-ek-cert", "--config"])
        .arg(folder.join("setup.conf"))
        .arg("--tpm-state")
        .arg(folder)
        .output()
        .expect("swtpm-tools are missing: scripts/prerequisites host");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}
