//! A control group for a worker. In the group of whoever attached the volume, writers may have filled the memory limit with
//! dirty pages that only the worker can clean, and its end would be the worker's.

use std::{fs, io, path::Path, process::Command, time::Duration};

use crate::{
    base::mapping_name::MappingName,
    sys::{programs, systemd},
};

/// Longer than busctl's own patience, which begins once it has reached the bus.
const BUS_PATIENCE: Duration = Duration::from_secs(8);

const HIERARCHY: &str = "/sys/fs/cgroup";

/// Moves the process into one of its own: a scope of systemd's, `cryptattach-NAME.scope`, where systemd has the unified
/// hierarchy; elsewhere one that all workers share. Where neither can be had, it stays where it is.
pub fn give_its_own(pid: u32, name: &MappingName) {
    let unified = Path::new(HIERARCHY).join("cgroup.procs").exists();
    if unified && systemd::is_running() {
        match make_scope(pid, name) {
            Ok(()) => return,
            Err(error) => tracing::info!("cannot make a scope for the worker of '{name}': {error}"),
        }
    }
    // The unified hierarchy, or the memory controller's of the older ones.
    let root = if unified { HIERARCHY.into() } else { Path::new(HIERARCHY).join("memory") };
    if let Err(error) = join(pid, &root.join("cryptattach")) {
        tracing::info!("cannot make a control group for the worker of '{name}': {error}");
    }
}

/// org.freedesktop.systemd1(5), `StartTransientUnit`. Without the dependencies that units have by default the scope stays
/// until all units are stopped at shutdown: file systems on the mapping are unmounted before.
fn make_scope(pid: u32, name: &MappingName) -> io::Result<()> {
    let (scope, pid, description) = (systemd::scope(name), pid.to_string(), format!("Encrypted volume {name}"));
    let mut busctl = Command::new("busctl");
    busctl
        .args(["--system", "--quiet", "--timeout=5", "call", "org.freedesktop.systemd1", "/org/freedesktop/systemd1"])
        .args(["org.freedesktop.systemd1.Manager", "StartTransientUnit", "ssa(sv)a(sa(sv))", &scope, "fail", "5"])
        .args(["PIDs", "au", "1", &pid])
        .args(["Description", "s", &description])
        .args(["Slice", "s", "system.slice"])
        .args(["DefaultDependencies", "b", "false"])
        .args(["CollectMode", "s", "inactive-or-failed"])
        .arg("0");
    let called = programs::output_of(&mut busctl, BUS_PATIENCE)?;
    if called.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("busctl: {}", String::from_utf8_lossy(&called.stderr).trim_end())))
}

fn join(pid: u32, group: &Path) -> io::Result<()> {
    match fs::create_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        result => result?,
    }
    fs::write(group.join("cgroup.procs"), pid.to_string())
}
