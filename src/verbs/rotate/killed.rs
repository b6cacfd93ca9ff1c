//! A rotation that was killed in a stretch: what is in that is partly old, partly new, until it is recovered.

use super::{Containers, How, Job};
use crate::{
    base::key::{SecretBytes, VolumeKey},
    config::Config,
    sys::device::DeviceError,
    unlock::case::Strictness,
    verbs::error::Error,
    volumes::{
        Unlocked,
        header::{
            self, VolumeError,
            copies::Copies,
            rekey::{self, Hotzone, Run},
        },
    },
};

/// A volume that may be mapped: the stretch is recovered in which a run was killed, if one was. It takes both keys, and the
/// device for itself.
pub(in crate::verbs) fn recovered(config: &Config, unlocked: Unlocked, read_only: bool) -> Result<Unlocked, Error> {
    let volume = unlocked.volume();
    let (Err(half_written), Some(rest), Some((old, passphrase))) = (volume.midway(), &volume.rest, unlocked.rest())
    else {
        return Ok(unlocked);
    };
    if read_only {
        return Err(half_written.into());
    }
    let (containers, device) = (Containers::of(config), volume.device.clone());
    let how = How {
        drop_others: false,
        delete_old: false,
        hotzone_bytes: rekey::HOTZONE_BYTES,
        bytes_per_second: None,
        separation: Strictness::default(),
    };
    let job = Job::claim(&containers, device.clone(), None, &how)?;
    if !rekey::read(&device)?.is(&rest.header) {
        return Err(VolumeError::HeaderChanged { path: device.path }.into());
    }
    job.recover(&rest.header, [old, unlocked.key()], passphrase)?;
    job.note_newest()?;
    Ok(unlocked.recovered(header::find_to_map(&device.path, None, None)?)?)
}

impl Job<'_> {
    /// Brings the stretch in order: each block of it is proved old or new, then libcryptsetup writes it whole.
    pub(super) fn recover(
        &self,
        copies: &Copies,
        keys: [&VolumeKey; 2],
        passphrase: &SecretBytes,
    ) -> Result<(), Error> {
        let path = &self.device.path;
        tracing::warn!(
            "a rotation of the key of {} was killed while it wrote: recovering that stretch",
            path.display()
        );
        match rekey::mend(&self.file()?, copies, keys).map_err(DeviceError::io("read", path))? {
            Hotzone::Sound => {}
            Hotzone::Mended => tracing::warn!("the checksums of {} had not reached the disk: mended", path.display()),
            Hotzone::Torn { blocks } => return Err(VolumeError::Torn { path: path.clone(), blocks }.into()),
        }
        Ok(rekey::run(&self.device, None, passphrase, Run::Recover, self.how.hotzone_bytes, &mut |_, _| true)?)
    }
}
