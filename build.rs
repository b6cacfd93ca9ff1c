//! How the program is linked.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=no-unwind.ld");
    // Relative relocations in their packed form (glibc 2.36, so Debian 12): 200 kB less in each initramfs.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    // Of the profiles, those that inherit from `release` have `panic = "abort"`.
    if env::var_os("PROFILE").is_some_and(|profile| profile == "release") {
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{}/no-unwind.ld", env!("CARGO_MANIFEST_DIR"));
        println!("cargo:rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
    }
}
