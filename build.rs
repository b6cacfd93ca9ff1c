//! How the program is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Relative relocations in their packed form (glibc 2.36, so Debian 12): 200 kB less in each initramfs.
    println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
}
