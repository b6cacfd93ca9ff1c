//! The userspace backend: AES-XTS in a worker process, exported as a loop device over a FUSE file.
