//! Failures as the user sees them: what failed, why, what to do next, and an exit code.

use std::{fmt, path::Path};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::output;
use crate::{
    base::{
        chain::{causes, chain},
        clock::now,
        mapping_name::MappingName,
    },
    config::ConfigError,
    keys::{
        net::{AuthError, HttpError, SendError},
        seal::SealError,
        store::StoreError,
        tpm::TpmError,
    },
    sys::device::DeviceError,
    unlock::{self, container::TrustError, enrol::EnrolError, lockbox::LockboxError},
    verbs::{
        boot::BootError,
        error::Error,
        explain::{self, LastFailure},
    },
    volumes::{backend::BackendError, header::VolumeError},
};

/// The words on the command line make no sense.
pub const USAGE: u8 = 64;
/// cryptattach itself is wrong.
pub const INTERNAL: u8 = 70;

/// The table of exit codes, as `--help` and the man page show it. The numbers follow sysexits(3) where it has a meaning
/// for them.
pub const EXIT_CODES: &str = "Exit codes:
   0  done (also: it was done already)
  64  the command line is wrong
  65  the volume's header is damaged, or says what is not allowed, or does not fit the key
  66  there is no such device, file or mapping
  67  the store has no such key
  68  the sealed key does not open here, or is for something else
  69  the key store cannot be reached or read, or cannot do it now
  70  an error in cryptattach itself
  71  the system refuses: no device-mapper, no FUSE, no locked memory, a worker that died
  72  key and data are on the same device or host, or (strict) nothing proves that they are not
  73  something is in the way: a device that is not blank, a name that is taken, a file that exists
  74  reading or writing a device failed
  75  the device or mapping is in use
  76  the store's answer is no sealed key
  77  permission denied, here or by the key store
  78  the configuration is missing or wrong, or an initramfs does not fit it
  79  the TPM does not open the key: another boot state, another TPM, a wrong PIN, or no TPM at all
  80  a host's proof is refused: a bundle, challenge or answer that is wrong, changed, used already or too old
  81  boot: not all volumes could be attached in time

Files:
  /etc/cryptattach/cryptattach.toml   configuration (--config, CRYPTATTACH_CONFIG)
  /var/log/cryptattach.jsonl          audit record
  /var/lib/cryptattach/               which container keys this host trusts, its enrolment, its lockbox; which hosts were admitted
  /run/cryptattach/                   userspace mappings; boot.json and boot.log of this boot; why volumes were not attached";

/// The exit code for an error.
pub fn exit_code(error: &Error) -> u8 {
    if permission_denied(error) {
        return 77;
    }
    match error {
        Error::Unlock(error) => unlock(error),
        Error::Usage(_) | Error::Name(_) | Error::NoName(_) | Error::ConnectionInfo(_) => USAGE,
        Error::Backend(BackendError::Device(error)) => device(error),
        Error::Backend(BackendError::Volume(error)) => volume(error),
        Error::Enrol(error) => enrol(error),
        Error::UnknownToCrypttab(_) => 78,
        Error::NoSuchKey { .. } => 67,
        Error::Backend(BackendError::NotActive(_)) | Error::NotAttached(_) => 66,
        Error::Backend(BackendError::Foreign { .. }) => 73,
        Error::Backend(BackendError::Busy { .. }) => 75,
        Error::Boot(error) => boot(error),
        Error::Backend(_) => 71,
        Error::Io { .. } => 74,
        Error::NotBlank { .. }
        | Error::KeyUsed { .. }
        | Error::KeyUnproven(_)
        | Error::Exists(_)
        | Error::StoreExists(_) => 73,
        Error::HalfFormatted { source, .. } => exit_code(source),
    }
}

fn unlock(error: &unlock::Error) -> u8 {
    use unlock::Error;
    match error {
        Error::NoReference(_) => USAGE,
        Error::Config(_) | Error::Inventory(_) => 78,
        Error::Device(error) => device(error),
        Error::Volume(error) => volume(error),
        Error::Store(error) => store(error),
        Error::Mismatch { .. } => 65,
        Error::Seal(SealError::Memory(_)) | Error::Memory(_) => 71,
        Error::Seal(error) if error.is_configuration() => 78,
        Error::Trust(TrustError::State(_)) => 74,
        Error::Tpm(error)
        | Error::Seal(SealError::Tpm(error))
        | Error::KeyRefused { source: SealError::Tpm(error), .. }
        | Error::ContainerKeyRefused { source: SealError::Tpm(error), .. } => tpm(error),
        Error::KeyRefused { .. }
        | Error::ContainerKeyRefused { .. }
        | Error::WhileClosed { .. }
        | Error::Trust(_)
        | Error::Seal(_)
        | Error::NoPassphrase(_) => 68,
        Error::NoContainerKeys(_) | Error::NoContainerKey(_) | Error::NoOwner(_) => 78,
        Error::Lockbox(error) => lockbox(error),
        Error::NeitherStoreNorLockbox { source, .. } => store(source),
        Error::Unfinished { .. } => 69,
        Error::ReadBack(_) => 76,
        Error::NotSeparate(_) => 72,
        Error::Audit(_) => 74,
    }
}

fn boot(error: &BootError) -> u8 {
    match error {
        BootError::Unfinished(_) => 81,
        BootError::TooLate { .. } | BootError::LockboxClosed(_) => 69,
        BootError::Mount { .. } | BootError::Image { .. } => 74,
        BootError::Unfit(_) | BootError::KeptOut { .. } => 78,
    }
}

fn enrol(error: &EnrolError) -> u8 {
    match error {
        EnrolError::Tpm(error) => tpm(error),
        EnrolError::File { source, .. } => match source.kind() {
            std::io::ErrorKind::NotFound => 66,
            std::io::ErrorKind::AlreadyExists => 73,
            _ => 74,
        },
        EnrolError::State(_) => 74,
        EnrolError::Authorities { .. } => 78,
        EnrolError::NotEnrolled(_) | EnrolError::NotAdmitted(_) => 66,
        EnrolError::Crypto(_) | EnrolError::Memory(_) => 71,
        EnrolError::Document { .. }
        | EnrolError::Refused { .. }
        | EnrolError::Replayed { .. }
        | EnrolError::OtherTpm { .. }
        | EnrolError::OtherName { .. }
        | EnrolError::Expired { .. }
        | EnrolError::NotForThisHost(_)
        | EnrolError::NotForThisTpm(_)
        | EnrolError::NoChallenge(_)
        | EnrolError::OtherAnswer { .. }
        | EnrolError::WrongAnswer(_)
        | EnrolError::Seal(_) => 80,
    }
}

fn tpm(error: &TpmError) -> u8 {
    match error {
        error if error.is_configuration() => 78,
        TpmError::Crypto(_) | TpmError::Memory(_) => 71,
        _ => 79,
    }
}

fn device(error: &DeviceError) -> u8 {
    match error {
        DeviceError::Missing(_) => 66,
        DeviceError::WrongKind(_) | DeviceError::TooSmall { .. } => 65,
        DeviceError::ReadOnly(_) | DeviceError::Io { .. } => 74,
        DeviceError::Busy { .. } => 75,
    }
}

fn volume(error: &VolumeError) -> u8 {
    match error {
        VolumeError::Device(error) => device(error),
        VolumeError::Memory(_) => 71,
        VolumeError::WrongPassphrase { .. } => 68,
        VolumeError::Signatures { .. } => 74,
        VolumeError::NoHeader { .. }
        | VolumeError::Damaged { .. }
        | VolumeError::Refused { .. }
        | VolumeError::WrongKey { .. }
        | VolumeError::NoKeyslot { .. }
        | VolumeError::NoToken { .. }
        | VolumeError::Library { .. } => 65,
    }
}

fn store(error: &StoreError) -> u8 {
    match error {
        StoreError::NotFound { .. } => 67,
        StoreError::Exists { .. } | StoreError::Outdated { .. } => 73,
        StoreError::Malformed { .. } => 76,
        StoreError::Denied { .. } => 77,
        StoreError::NoContainer { .. } => 78,
        StoreError::Config(_) => 78,
        StoreError::Auth(error) => auth(error),
        StoreError::Unreachable { source, .. } => match &**source {
            SendError::Auth(error) => auth(error),
            SendError::Http(error) => http(error),
        },
        StoreError::Io { .. } | StoreError::Answer { .. } => 69,
        StoreError::Memory(_) => 71,
    }
}

fn lockbox(error: &LockboxError) -> u8 {
    match error {
        LockboxError::NotConfigured(_) | LockboxError::Unsupported(_) => 78,
        LockboxError::Removed { .. } => 67,
        LockboxError::Refused { source: SealError::Tpm(error), .. }
        | LockboxError::Seal(SealError::Tpm(error))
        | LockboxError::NotLatched { source: error, .. } => tpm(error),
        LockboxError::Latched { .. } => 79,
        LockboxError::Seal(error) if error.is_configuration() => 78,
        LockboxError::Closed(_)
        | LockboxError::Refused { .. }
        | LockboxError::Older { .. }
        | LockboxError::Another { .. }
        | LockboxError::Seal(_) => 68,
        LockboxError::ReadBack(_) => 76,
        LockboxError::Unreachable { source, .. } => store(source),
        LockboxError::Store(error) => store(error),
        LockboxError::Foreign(_) | LockboxError::Keyring(_) | LockboxError::Memory(_) => 71,
        LockboxError::State(_) | LockboxError::Io { .. } => 74,
    }
}

fn auth(error: &AuthError) -> u8 {
    match error {
        AuthError::Clouds(_) | AuthError::NoEndpoint { .. } => 78,
        AuthError::Http(error) => http(error),
        AuthError::Refused { .. } | AuthError::CallerToken(_) => 77,
        AuthError::Answer { .. } => 69,
        AuthError::Memory(_) => 71,
    }
}

fn http(error: &HttpError) -> u8 {
    match error {
        HttpError::Insecure(_) | HttpError::Url(_) => 78,
        HttpError::TooLong { .. } => 76,
        HttpError::Client(_) | HttpError::Memory(_) => 71,
        HttpError::Connect { .. }
        | HttpError::TimedOut { .. }
        | HttpError::NoTime { .. }
        | HttpError::Broken { .. } => 69,
    }
}

fn permission_denied(error: &Error) -> bool {
    causes(error).any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        io == Some(std::io::ErrorKind::PermissionDenied)
    })
}

/// What the user can do about it.
pub fn next_step(error: &Error) -> Option<String> {
    if permission_denied(error) && !nix::unistd::geteuid().is_root() {
        return Some("run it as root".to_owned());
    }
    Some(match error {
        Error::Unlock(error) => return unlock_next_step(error),
        Error::NoName(_) => "give the mapping a name: cryptattach attach DEVICE NAME".to_owned(),
        Error::KeyUsed { .. } => {
            "check that this is the right device: the volume's data must be on another one. If its first attach was cut off, nothing is on it yet: make a new volume".to_owned()
        }
        Error::KeyUnproven(_) => {
            "check that this is the right device and that it should be blank; if castellan's own driver makes the keys in Barbican, which leaves no such proof, set format_with_unmarked_keys = true in [hooks] of the configuration: any blank device is then formatted that comes with such a key, even if its data are elsewhere"
                .to_owned()
        }
        Error::NotBlank { .. } => "check that this is the right device; --force overwrites what is there".to_owned(),
        Error::Backend(BackendError::Device(error)) => device_next_step(error)?,
        Error::Backend(BackendError::Volume(error)) => volume_next_step(error)?,
        Error::Enrol(error) => error.next_step()?,
        Error::HalfFormatted { device, reference, .. } => format!(
            "nothing was on {} before; format it again, and remove the unused key: cryptattach key delete {reference} --yes",
            device.display()
        ),
        Error::Backend(BackendError::Busy { name, .. }) => {
            format!("end that use, or: cryptattach detach {name} --deferred")
        }
        Error::Backend(BackendError::Foreign { .. }) => "choose another name".to_owned(),
        Error::Backend(BackendError::Unavailable(_)) => {
            "--backend userspace maps the volume without the kernel's help".to_owned()
        }
        Error::Boot(error) => boot_next_step(error)?.to_owned(),
        Error::NotAttached(_) | Error::Backend(BackendError::NotActive(_)) => {
            "'cryptattach list' shows what is".to_owned()
        }
        _ => return None,
    })
}

fn unlock_next_step(error: &unlock::Error) -> Option<String> {
    use unlock::Error;
    Some(match error {
        Error::Config(ConfigError::Missing(_)) => {
            "'cryptattach init' makes one; --config or CRYPTATTACH_CONFIG names another".to_owned()
        }
        Error::Config(ConfigError::UnknownVolume { name, .. }) => {
            format!("add it: [volumes.{name}] with device = \"UUID=...\" ('blkid' shows it)")
        }
        Error::NoReference(_) => "name the key with --key STORE/KEY-ID ('cryptattach key list' shows them)".to_owned(),
        Error::Device(error) => device_next_step(error)?,
        Error::Volume(error) => volume_next_step(error)?,
        Error::Mismatch { .. } => {
            "do not use this volume until it is clear who changed its header; a backup of the header helps".to_owned()
        }
        Error::Store(error) => store_next_step(error)?.to_owned(),
        Error::KeyRefused { source, .. } | Error::ContainerKeyRefused { source, .. } => source.next_step()?,
        Error::WhileClosed { .. } => "'cryptattach lockbox open' opens it".to_owned(),
        Error::NoOwner(_) => "name the store's owner and escrow in the configuration, or use another store".to_owned(),
        Error::NoContainerKey(name) => format!("'cryptattach container create {name}' makes its first one"),
        Error::Lockbox(error) => lockbox_next_step(error)?,
        Error::NeitherStoreNorLockbox { source, .. } => store_next_step(source)?.to_owned(),
        Error::Unfinished { container, .. } => format!("run 'cryptattach container rotate {container}' again"),
        Error::Trust(TrustError::State(_)) => "check the state directory ('state' in the configuration)".to_owned(),
        Error::Trust(TrustError::OldGeneration { key, .. }) => format!(
            "try again when all of the store's replicas run; if the store was restored from a backup, remove \
             generations/{key} from the state directory"
        ),
        Error::Trust(_) => {
            "if the administrator of the keys says that this key's fingerprint is right ('cryptattach container show'), remove the container's file from the state directory".to_owned()
        }
        Error::Seal(error) => error.next_step()?,
        Error::Tpm(error) => error.next_step()?,
        Error::NotSeparate(refusal) => refusal.next_step().to_owned(),
        _ => return None,
    })
}

fn lockbox_next_step(error: &LockboxError) -> Option<String> {
    Some(match error {
        LockboxError::NotConfigured(_) => {
            "name this host and the store of its lockbox key: [lockbox] host = \"NAME\", store = \"STORE\"".to_owned()
        }
        LockboxError::Closed(_) => "'cryptattach lockbox open' opens it".to_owned(),
        LockboxError::Removed { .. } => {
            "if this host is to open keys again, the administrator of the keys has to admit it".to_owned()
        }
        LockboxError::Unreachable { source, .. } => store_next_step(source)?.to_owned(),
        LockboxError::Store(error) => store_next_step(error)?.to_owned(),
        LockboxError::Refused { source: SealError::NotForUs { .. }, .. } => {
            "check 'identities' in [lockbox]; a host with a new identity has to be admitted anew".to_owned()
        }
        LockboxError::Latched { .. } => {
            "power the machine off and on; until then the owner's or the escrow's key opens this host's volumes"
                .to_owned()
        }
        LockboxError::NotLatched { .. } => {
            "run 'cryptattach lockbox open' again, or 'cryptattach lockbox close' if this host is not to go on so"
                .to_owned()
        }
        LockboxError::Refused { source, .. } => source.next_step()?,
        LockboxError::Seal(error) => error.next_step()?,
        LockboxError::Another { is, .. } => format!(
            "if the administrator who admitted this host says that this fingerprint is right: cryptattach lockbox open \
             --fingerprint {is}"
        ),
        LockboxError::Older { .. } => "try again when all of the store's replicas run; the store may lie".to_owned(),
        LockboxError::State(_) => "check the state directory ('state' in the configuration)".to_owned(),
        LockboxError::Io { .. } => "check 'path' in [lockbox], and that its device is there and has room".to_owned(),
        LockboxError::Unsupported(_) => "name another 'store' in [lockbox]".to_owned(),
        LockboxError::ReadBack(_) | LockboxError::Foreign(_) | LockboxError::Keyring(_) | LockboxError::Memory(_) => {
            return None;
        }
    })
}

fn store_next_step(error: &StoreError) -> Option<&'static str> {
    Some(match error {
        StoreError::NotFound { .. } => {
            "check the store in the configuration; an escrow copy of the key may exist in a backup"
        }
        StoreError::Malformed { .. } => "restore this key from a replica or backup of the key store",
        StoreError::Io { .. } => "check that the key store's device is there, mounted, and has room",
        StoreError::Denied { .. } => {
            "check whom the store's configuration logs in as, and the container's access lists ('cryptattach container show')"
        }
        StoreError::NoContainer { .. } => {
            "'cryptattach container create' makes one; check 'container' and 'cloud' in the configuration"
        }
        StoreError::Auth(error) => return auth_next_step(error),
        StoreError::Unreachable { source, .. } => match &**source {
            SendError::Auth(error) => return auth_next_step(error),
            SendError::Http(error) => return http_next_step(error),
        },
        StoreError::Answer { .. } => "the store's own log says more; -v shows every request",
        StoreError::Outdated { .. } => "run it again: it starts from what is stored now",
        StoreError::Config(_) | StoreError::Exists { .. } | StoreError::Memory(_) => return None,
    })
}

fn auth_next_step(error: &AuthError) -> Option<&'static str> {
    Some(match error {
        AuthError::Http(error) => return http_next_step(error),
        AuthError::Clouds(_) => {
            "check 'cloud', 'clouds' and 'secret' of the store in the configuration, and clouds.yaml"
        }
        AuthError::Refused { .. } => "check user, project and secret in clouds.yaml, and this host's clock",
        AuthError::CallerToken(_) => "repeat the request with a new token",
        AuthError::NoEndpoint { .. } => {
            "check 'region_name' and 'interface' in clouds.yaml, or name the service's 'urls' in the configuration"
        }
        AuthError::Answer { .. } => "check auth_url in clouds.yaml",
        AuthError::Memory(_) => return None,
    })
}

fn http_next_step(error: &HttpError) -> Option<&'static str> {
    Some(match error {
        error if error.is_certificate() => {
            "check the server's certificate, this host's clock, and 'cacert' in clouds.yaml (the authority that signed it)"
        }
        HttpError::Insecure(_) => "use an https URL",
        HttpError::Connect { .. }
        | HttpError::TimedOut { .. }
        | HttpError::NoTime { .. }
        | HttpError::Broken { .. } => "check that the server runs and that this host reaches it; -v shows every try",
        HttpError::TooLong { .. } => "something else than the key store answers there, or it lies; check the URL",
        HttpError::Url(_) => "check the URLs in clouds.yaml and in the configuration",
        HttpError::Client(_) | HttpError::Memory(_) => return None,
    })
}

fn boot_next_step(error: &BootError) -> Option<&'static str> {
    Some(match error {
        BootError::Unfinished(_) => "/run/cryptattach/boot.log says why",
        BootError::TooLate { .. } => {
            "check that it is plugged in, that its server runs, and that the initramfs has its driver ('cryptattach doctor --image')"
        }
        BootError::Mount { .. } => "check the device's file system, and its type in [[boot.mounts]]",
        BootError::Unfit(_) => "change the configuration or make the image anew (update-initramfs -u, dracut -f)",
        BootError::KeptOut { .. } => {
            "let the boot find it on another disk ([[boot.mounts]]), have the TPM open the lockbox, or see 'What is in the initramfs' \
             in docs/boot.md"
        }
        BootError::Image { .. } | BootError::LockboxClosed(_) => return None,
    })
}

fn device_next_step(error: &DeviceError) -> Option<String> {
    Some(match error {
        DeviceError::Missing(_) => "check the path ('lsblk' shows the block devices)".to_owned(),
        DeviceError::Busy { .. } => "unmount or detach it first".to_owned(),
        DeviceError::ReadOnly(_) => "it can be attached with --read-only, but not formatted".to_owned(),
        DeviceError::WrongKind(_) | DeviceError::TooSmall { .. } | DeviceError::Io { .. } => return None,
    })
}

fn volume_next_step(error: &VolumeError) -> Option<String> {
    Some(match error {
        VolumeError::Device(error) => return device_next_step(error),
        VolumeError::NoHeader { .. } => {
            "'cryptattach format' makes a volume; --header names a detached header, --plain says that there is none"
                .into()
        }
        VolumeError::Damaged { .. } => {
            "'cryptsetup repair' may help if one copy of the header is whole; else restore a backup of it".to_owned()
        }
        VolumeError::Refused { .. } => {
            "do not use this volume unless you know why its header says so; 'cryptsetup luksDump' shows it".to_owned()
        }
        VolumeError::NoToken { .. } => {
            "'cryptsetup luksDump' shows the header's tokens; 'cryptsetup token remove' removes one".to_owned()
        }
        VolumeError::WrongKey { .. } => "check that this is the right volume for the key".to_owned(),
        _ => return None,
    })
}

/// A failure as it is told: what failed, its causes, the next step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    causes: Vec<String>,
    error: String,
    /// See [`EXIT_CODES`].
    pub exit_code: u8,
    next: Option<String>,
}

impl Told {
    fn of(error: &Error) -> Self {
        let causes = causes(error).skip(1).map(|cause| cause.to_string().trim_end().to_owned()).collect();
        Self {
            causes: distinct(error.to_string(), causes),
            error: error.to_string(),
            exit_code: exit_code(error),
            next: next_step(error),
        }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cryptattach: {}", self.error)?;
        self.causes.iter().try_for_each(|cause| write!(f, "\n  because {cause}"))?;
        self.next.iter().try_for_each(|next| write!(f, "\n  next: {next}"))
    }
}

/// Prints an error.
pub fn print(error: &Error, json: bool) {
    let told = Told::of(error);
    if json { output::say(json!(told)) } else { output::say(told) }
}

/// Keeps a failure for `cryptattach explain`, or forgets those of a volume that has unlocked.
pub fn note<T>(action: &str, device: Option<&Path>, name: Option<&MappingName>, result: Result<T, &Error>) {
    let folder = Path::new(explain::FOLDER);
    let noted = match result {
        Ok(_) => explain::forget(folder, device, name),
        // Who got the words wrong has been told, and nothing is the matter with the volume.
        Err(error) if exit_code(error) == USAGE => Ok(()),
        Err(error) => {
            let (device, name) = (device.map(Path::to_owned), name.cloned());
            let failure = LastFailure { time: now(), action: action.to_owned(), device, name, told: Told::of(error) };
            explain::keep(folder, &failure)
        }
    };
    if let Err(error) = noted {
        tracing::debug!("no note for 'explain': {}", chain(&error));
    }
}

/// Transparent variants repeat their cause's text.
fn distinct(first: String, causes: Vec<String>) -> Vec<String> {
    let mut last = first;
    causes.into_iter().filter(|cause| std::mem::replace(&mut last, cause.clone()) != *cause).collect()
}
