//! The host's identity in its TPM (swtpm), by the library: which boot state opens, and which does not.

use cryptattach::{
    config::TpmConfig,
    tpm::{IdentityFile, PcrSet, PcrSignatures, Policy, Tpm, TpmError},
};

use crate::swtpm::Swtpm;

/// Connects to it.
pub fn open(swtpm: &Swtpm) -> Tpm {
    Tpm::open(&config(swtpm)).unwrap()
}

pub fn config(swtpm: &Swtpm) -> TpmConfig {
    TpmConfig { tcti: swtpm.tcti(), signatures: Vec::new(), ..TpmConfig::default() }
}

fn literal(tpm: &Tpm, pcrs: &str) -> Policy {
    let pcrs: PcrSet = pcrs.parse().unwrap();
    Policy { signed: None, pcrs: tpm.pcr_values(pcrs).unwrap(), latch: true, pin: false }
}

#[test]
fn opens_in_its_boot_state_only() {
    let swtpm = Swtpm::start();
    let file = {
        let tpm = open(&swtpm);
        tpm.create_identity(&literal(&tpm, "4+7"), None).unwrap().file
    };
    let file = IdentityFile::parse(file.to_pem().unwrap().as_bytes()).unwrap();
    println!("{}", file.to_pem().unwrap());
    {
        let tpm = open(&swtpm);
        tpm.identity(&file).unwrap().test(&PcrSignatures::default()).unwrap();
        println!("commands: {}", tpm.esys().commands_sent());
    }
    swtpm.extend(7, 'a');
    let tpm = open(&swtpm);
    let refused = tpm.identity(&file).unwrap().test(&PcrSignatures::default()).unwrap_err();
    let TpmError::NotThisState(why) = &refused else { panic!("{refused}") };
    println!("{refused}: {why}");
}
