//! Has a PKCS#11 token open a key for cryptattach.
//!
//! A module is foreign code: it may never return, crash, or write anywhere. So it runs in this process of its own, which
//! cryptattach bounds and kills, and which sees one request and one PIN.
//!
//! Standard input has one line of JSON, a [`Request`], and then the PIN until the end. Standard output has `login` once the
//! token has taken the PIN, and then `done` and the answer's bytes, or `failed` and a [`Refusal`] in JSON, each on a new line.

mod oaep;
mod refusal;
mod request;
mod token;

use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    process::ExitCode,
};

use nix::{
    sys::{
        mman::{MlockAllFlags, mlockall},
        prctl,
        resource::{Resource, setrlimit},
        signal::Signal,
    },
    unistd,
};
use zeroize::Zeroizing;

use refusal::{Refusal, Why};
use request::Request;

fn main() -> ExitCode {
    let mut out = match own_output() {
        Ok(out) => out,
        Err(_) => return ExitCode::from(2),
    };
    let answer = harden().and_then(|()| Request::read(io::stdin())).and_then(|(request, pin)| {
        // Whoever started this kills it in time; this is for when they are gone.
        unistd::alarm::set(request.seconds);
        token::answer(&request, pin, &mut out)
    });
    let (head, bytes) = match answer {
        Ok(bytes) => ("done\n", bytes),
        Err(refusal) => ("failed\n", Zeroizing::new(refusal.to_json())),
    };
    let written = out.write_all(head.as_bytes()).and_then(|()| out.write_all(&bytes));
    // The module's own end may take its time: the answer is not kept waiting by it.
    drop(out);
    ExitCode::from(u8::from(written.is_err() || head != "done\n"))
}

/// Standard output for the answer only. A module that prints would be taken for it.
fn own_output() -> io::Result<File> {
    let out = io::stdout().as_fd().try_clone_to_owned()?;
    let nowhere = File::options().write(true).open("/dev/null")?;
    unistd::dup2_stdout(&nowhere)?;
    unistd::dup2_stderr(&nowhere)?;
    Ok(out.into())
}

/// Libraries copy keys and PINs into memory of theirs: none of it is swapped or dumped, and none outlives cryptattach.
fn harden() -> Result<(), Refusal> {
    let failed = |errno: nix::Error| Refusal::new(Why::System, format!("cannot shield itself: {}", errno.desc()), "");
    prctl::set_pdeathsig(Signal::SIGKILL).map_err(failed)?;
    prctl::set_dumpable(false).map_err(failed)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(failed)?;
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).map_err(|errno| {
        let next = "raise the limit of locked memory ('ulimit -l', LimitMEMLOCK= in a unit)";
        Refusal::new(Why::System, format!("cannot lock memory for secrets: {}", errno.desc()), next)
    })
}
