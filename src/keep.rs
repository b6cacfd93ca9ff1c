//! Keep: seal a volume's key, store it, and make sure that it can be had back.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::{
    attach,
    config::StoreConfig,
    error::Error,
    key::{BoundContext, KeyReference, SecretBytes, SecretMemoryError, VolumeKey},
    seal::{self, Payload},
    store::KeyStore,
    volume::{CIPHER, Volume},
};

/// Seals and stores a new key. One that cannot be had back is removed again: nothing depends on it yet.
pub fn keep(
    reference: &KeyReference,
    store_config: &StoreConfig,
    store: &dyn KeyStore,
    volume: &Volume,
    volume_key: VolumeKey,
    passphrase: Option<SecretBytes>,
) -> Result<(), Error> {
    let payload = Payload {
        volume_key,
        cipher: CIPHER.to_owned(),
        sector_size_bytes: volume.geometry.sector_size.bytes(),
        data_offset_bytes: volume.geometry.data_offset_bytes,
        iv_offset_sectors: volume.geometry.iv_offset_sectors,
        digest: volume.luks().map(|header| header.digest.clone()),
        passphrase,
    };
    let recipients = seal::recipients(&store_config.owner, store_config.escrow.as_deref())?;
    store.create(&reference.key, &seal::seal(&context(reference, volume), &payload, &recipients)?)?;
    let read_back = attach::open(reference, store_config, store, volume).and_then(|opened| {
        let same = opened.payload.volume_key == payload.volume_key;
        if same { Ok(volume.verify_key(&opened.payload.volume_key)?) } else { Err(Error::ReadBack(reference.clone())) }
    });
    read_back.inspect_err(|_| {
        if let Err(error) = store.delete(&reference.key) {
            tracing::warn!("the unused key {reference} stays in the store: {error}");
        }
    })
}

/// What the first sealing of a volume's key is bound to.
fn context(reference: &KeyReference, volume: &Volume) -> BoundContext {
    BoundContext {
        version: 1,
        key_id: reference.key,
        container: reference.store.clone(),
        volume: volume.uuid(),
        generation: 1,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map(|age| age.as_secs()).unwrap_or(0),
    }
}

/// A passphrase of 256 random bits, in the form that os-brick makes of a key's bytes: 64 lower-case hex digits.
pub fn random_passphrase() -> Result<SecretBytes, SecretMemoryError> {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let bits = SecretBytes::random(32)?;
    let mut passphrase = SecretBytes::zeroed(64)?;
    for (byte, digits) in bits.expose().iter().zip(passphrase.expose_mut().chunks_exact_mut(2)) {
        digits[0] = DIGITS[usize::from(byte >> 4)];
        digits[1] = DIGITS[usize::from(byte & 15)];
    }
    Ok(passphrase)
}
