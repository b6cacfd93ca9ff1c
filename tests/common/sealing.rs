//! What is sealed where its content does not matter.

use cryptattach::{
    base::key::{BoundContext, KeyId, SecretBytes, VolumeKey},
    keys::seal::Payload,
};

/// A new key of the container `cinder`, for any volume.
pub fn context() -> BoundContext {
    BoundContext {
        version: 1,
        key_id: KeyId::random(),
        container: "cinder".parse().unwrap(),
        volume: None,
        project: None,
        generation: 1,
        created: 1_700_000_000,
    }
}

/// A copy of the volume key, with a volume's usual facts.
pub fn payload(volume_key: &VolumeKey) -> Payload {
    Payload {
        volume_key: VolumeKey::from_secret(SecretBytes::copy_of(volume_key.expose()).unwrap()).unwrap(),
        cipher: "aes-xts-plain64".to_owned(),
        sector_size_bytes: 4096,
        data_offset_bytes: 16 << 20,
        iv_offset_sectors: 0,
        digest: None,
        passphrase: None,
        passphrase_next: None,
        replaces: None,
    }
}
