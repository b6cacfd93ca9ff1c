//! Peers of Debian's packages (libgcrypt20-dev, libgnutls28-dev).
fn main() {
    println!("cargo:rustc-link-lib=gcrypt");
    println!("cargo:rustc-link-lib=gnutls");
}
