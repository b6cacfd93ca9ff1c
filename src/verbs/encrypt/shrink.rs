//! Makes room behind an ext4 file system, with its own tools.

use std::{os::unix::process::CommandExt, path::Path, time::Duration};

use super::error::EncryptError;
use crate::{
    sys::{
        device::{Device, DeviceError, DeviceKind},
        programs,
    },
    verbs::error::Error,
    volumes::{
        filesystem::{self, Kind},
        in_place,
    },
};

/// It is not killed while it writes, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Shrinks the file system if it has to be. Any other one is left for the checks to refuse.
pub(super) fn shrink(device: &Device) -> Result<(), Error> {
    // Nobody has it now. The tools claim it themselves.
    let claimed = device.open_exclusive()?;
    let most = in_place::most_bytes(device.size_bytes);
    match filesystem::find(&device.path, &claimed)? {
        Ok(found) if found.kind == Kind::Ext && found.size_bytes > most => {}
        _ => return Ok(()),
    }
    drop(claimed);
    // 1: errors were corrected (e2fsck(8)).
    run(&device.path, "e2fsck", &["-f", "-p"], None, 1)?;
    run(&device.path, "resize2fs", &[], Some(format!("{}K", most / 1024)), 0)?;
    // resize2fs cuts a file off behind the file system.
    if device.kind == DeviceKind::File {
        let file = device.open_exclusive()?;
        file.set_len(device.size_bytes).map_err(DeviceError::io("make room in", &device.path))?;
    }
    Ok(())
}

fn run(device: &Path, program: &'static str, options: &[&str], size: Option<String>, most: i32) -> Result<(), Error> {
    let mut command = programs::bare(program);
    // Ctrl-C is for us: a half-shrunk file system is none.
    command.args(options).arg(device).args(size).process_group(0);
    let output = programs::output_of(&mut command, PATIENCE).map_err(Error::io(format!("run {program}")))?;
    if output.status.code().is_some_and(|code| code <= most) {
        return Ok(());
    }
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let said = String::from_utf8_lossy(&said);
    let words = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("nothing").trim().to_owned();
    Err(EncryptError::Shrink { path: device.to_owned(), program, words }.into())
}
