//! How the program is linked.

use std::{env, fs, path::Path};

/// What only unwinding reads. A panic of the release ends the program (`panic = "abort"`), so nothing unwinds.
const DISCARD: &str =
    "SECTIONS { /DISCARD/ : { *(.eh_frame .eh_frame.* .gcc_except_table .gcc_except_table.*) } } INSERT AFTER .text;\n";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Relative relocations in their packed form (glibc 2.36, so Debian 12): 200 kB less in each initramfs.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    if env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        let script = Path::new(&env::var("OUT_DIR").expect("cargo sets OUT_DIR")).join("discard.ld");
        fs::write(&script, DISCARD).expect("OUT_DIR can be written");
        println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr,{}", script.display());
    }
}
