//! The userspace backend: AES-XTS in a worker process, exported as a loop device over a FUSE file.
#![allow(missing_docs)]
use super::*;
pub const WORKER_VERB: &str = "userspace-worker";
pub fn worker_main() -> std::process::ExitCode {
    todo!()
}
pub struct Userspace;
impl Userspace {
    pub fn new() -> Self {
        Self
    }
}
impl Backend for Userspace {
    fn active(&self, _: &Volume, _: &MappingName) -> Result<Option<Mapping>, BackendError> {
        Ok(None)
    }
    fn activate(&self, _: &Volume, _: &VolumeKey, _: &Activate) -> Result<Mapping, BackendError> {
        todo!()
    }
    fn deactivate(&self, n: &MappingName, _: Deferred) -> Result<(), BackendError> {
        Err(BackendError::NotActive(n.clone()))
    }
    fn status(&self, _: &MappingName) -> Result<Option<MappingStatus>, BackendError> {
        Ok(None)
    }
    fn list(&self) -> Result<Vec<MappingName>, BackendError> {
        Ok(vec![])
    }
}
