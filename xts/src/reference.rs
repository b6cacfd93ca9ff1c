//! The reference: the `xts-mode` crate over the `aes` crate, one block at a time.

use aes::{
    Aes128, Aes256,
    cipher::{BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16},
};
use xts_mode::Xts128;

use super::{Direction, Engine, Key, Sectors};

pub(super) struct Reference<C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt>(
    pub(super) Xts128<C>,
);

/// Expands the key. It stays in its box, and the `aes` crate wipes it on drop.
pub fn new(key: Key<'_>) -> Box<dyn Engine> {
    if key.is_of_aes_128() { Box::new(expand::<Aes128>(key)) } else { Box::new(expand::<Aes256>(key)) }
}

pub(super) fn expand<C>(key: Key<'_>) -> Reference<C>
where
    C: KeyInit + BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt,
{
    let expand = |half| C::new_from_slice(half).expect("the caller names the cipher whose keys are half as long");
    Reference(Xts128::new(expand(key.data), expand(key.tweak)))
}

impl<C> Engine for Reference<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn name(&self) -> &'static str {
        "xts-mode"
    }

    fn apply(&self, direction: Direction, from: Option<&[u8]>, to: &mut [u8], sectors: Sectors) {
        if let Some(from) = from {
            to.copy_from_slice(from);
        }
        for (index, sector) in to.chunks_exact_mut(sectors.bytes).enumerate() {
            let tweak = sectors.tweak(index).into();
            match direction {
                Direction::Encrypt => self.0.encrypt_sector(sector, tweak),
                Direction::Decrypt => self.0.decrypt_sector(sector, tweak),
            }
        }
    }
}
