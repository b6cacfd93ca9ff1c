//! The end of this process.
#![allow(unsafe_code)] // _exit(2)

use std::io::{self, Write};

/// Ends the process while its threads may still run. The functions that exit(3) calls are not called: they free what other
/// threads may still read through libcrypto.
pub fn leave(code: u8) -> ! {
    let _ = io::stdout().flush();
    let _ = io::stderr().flush();
    // SAFETY: it takes any number, and does not return.
    unsafe { nix::libc::_exit(code.into()) }
}

#[cfg(test)]
mod tests {
    use std::{env, process::Command, thread, time::Duration};

    use super::*;

    /// This test again, in a process of its own, which is to be left.
    const LEAVES: &str = "CRYPTATTACH_TEST_LEAVES";

    extern "C" fn at_exit() {
        println!("exit(3) was called");
    }

    #[test]
    fn a_process_is_left_with_its_code_and_without_what_exit_calls() {
        if env::var_os(LEAVES).is_some() {
            // SAFETY: the function stays where it is.
            unsafe { nix::libc::atexit(at_exit) };
            thread::spawn(|| thread::sleep(Duration::from_secs(60)));
            print!("written before");
            leave(7);
        }
        let name = "sys::process::tests::a_process_is_left_with_its_code_and_without_what_exit_calls";
        let mut again = Command::new(env::current_exe().unwrap());
        let again = again.args(["--exact", name, "--nocapture"]).env(LEAVES, "").output().unwrap();
        let said = String::from_utf8_lossy(&again.stdout);
        assert_eq!(again.status.code(), Some(7));
        assert!(said.contains("written before") && !said.contains("exit(3)"), "{said}");
    }
}
