//! What keeps and opens keys: sealing, stores, the network, the TPM.

pub mod net;
pub mod seal;
pub mod store;
pub mod tpm;
