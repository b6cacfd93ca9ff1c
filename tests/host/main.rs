//! The host layer: the built binary on real loop devices and FUSE. Needs root; run by `scripts/test host`.

#[path = "../common/bao.rs"]
mod bao;
#[path = "../common/container_key.rs"]
mod container_key;
#[path = "../common/luks2.rs"]
mod luks2;
#[path = "../common/manufacture.rs"]
mod manufacture;
#[path = "../common/opens.rs"]
mod opens;
#[path = "../common/page_words.rs"]
mod page_words;
#[path = "../common/sealing.rs"]
mod sealing;
#[path = "../common/shell.rs"]
mod shell;
mod site;
#[path = "../common/softhsm.rs"]
mod softhsm;
#[path = "../common/swtpm.rs"]
mod swtpm;
#[path = "../common/tangd.rs"]
mod tangd;
#[path = "../common/token_program.rs"]
mod token_program;
#[path = "../common/tpm_process.rs"]
mod tpm_process;
#[path = "../common/wiretap.rs"]
mod wiretap;

mod attach;
mod audit;
mod backup;
#[path = "bao.rs"]
mod bao_stories;
mod bare;
mod bind;
mod busy;
mod clevis;
mod container;
mod disk;
mod encrypt;
mod enrol;
mod erase;
mod exports;
mod foreign;
mod format;
mod header;
mod holder;
mod json;
mod lockbox;
mod loops;
mod metrics;
#[path = "move.rs"]
mod moving;
mod page;
mod pages;
mod passphrase;
mod person;
mod pkcs11;
mod policy;
mod refusals;
mod rotate;
mod rotate_container;
mod safety;
mod secrets;
mod separation;
mod speed;
#[path = "../common/store_suite.rs"]
mod store_suite;
mod subsets;
mod tpm;
mod tpm_attach;
mod tpm_bus;
mod tpm_interop;
mod tpm_measured;
mod tpm_nv;
mod trial;
mod words;
