//! Keep: seal a volume's key, store it, and make sure that it can be had back.

use crate::{
    base::key::{KeyReference, SecretBytes, SecretMemoryError, VolumeKey, hex},
    keys::seal::{Content, Payload},
    unlock::{Error, case, container::Container},
    volumes::header::{CIPHER, Volume},
};

/// Seals and stores a new key. One that cannot be had back is removed again: nothing depends on it yet.
pub fn store_key(
    container: &Container,
    reference: &KeyReference,
    volume: &Volume,
    volume_key: VolumeKey,
    passphrase: Option<SecretBytes>,
) -> Result<(), Error> {
    let content = Content::VolumeKey(Payload {
        volume_key,
        cipher: CIPHER.to_owned(),
        sector_size_bytes: volume.geometry.sector_size.bytes(),
        data_offset_bytes: volume.geometry.data_offset_bytes,
        iv_offset_sectors: volume.geometry.iv_offset_sectors,
        digest: volume.luks().map(|header| header.digest.clone()),
        passphrase,
    });
    container.create(&reference.key, volume.uuid(), &content)?;
    let read_back = case::open(container, reference, volume).and_then(|key| match &content {
        Content::VolumeKey(payload) if payload.volume_key == key => Ok(volume.verify_key(&key)?),
        _ => Err(Error::ReadBack(reference.clone())),
    });
    read_back.inspect_err(|_| {
        if let Err(error) = container.store().delete(&reference.key) {
            tracing::warn!("the unused key {reference} stays in the store: {error}");
        }
    })
}

/// A passphrase of 256 random bits, in the form that os-brick makes of a key's bytes: 64 lower-case hex digits.
pub fn random_passphrase() -> Result<SecretBytes, SecretMemoryError> {
    hex(&SecretBytes::random(32)?)
}
