//! A site for unit tests: a store in memory, a backend in memory, volumes in files. It needs no root.

use std::{
    fs::{self, File},
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
};

use tempfile::TempDir;

use super::{
    container::{Container, TenantKeys, Use},
    tenant::Tenant,
};
use crate::{
    base::key::{KeyReference, Place, StoreName},
    config::Config,
    keys::{seal::OwnerKey, store::memory},
    volumes::backend,
};

/// The configuration of one store, what is in that, and what is mapped.
pub struct Site {
    keys: TempDir,
    volumes: TempDir,
    /// Its own state directory and audit record.
    pub config: Config,
    pub name: StoreName,
    /// What the store has.
    pub store: memory::Memory,
    /// What is mapped.
    pub backend: backend::memory::Memory,
}

impl Site {
    /// A store whose keys are sealed to an owner; the private key is here. `more` follows the store in the configuration.
    pub fn with(more: &str) -> Self {
        static SITES: AtomicU32 = AtomicU32::new(0);
        // Keys and volumes have to be apart here, too: memory is no disk.
        let (keys, volumes) = (TempDir::new_in("/dev/shm").unwrap(), tempfile::tempdir().unwrap());
        let path = |name: &str| keys.path().join(name);
        let owner = OwnerKey::generate().unwrap();
        fs::write(path("owner.pem"), owner.public_pem().unwrap()).unwrap();
        fs::write(path("owner.key"), owner.private_pem().unwrap().expose()).unwrap();
        let name = format!("site{}", SITES.fetch_add(1, Ordering::Relaxed));
        let text = format!(
            "[audit]\nfile = 'audit'\n[stores.{name}]\ntype = 'directory'\npath = 'none'\nowner = 'owner.pem'\n\
             no_escrow = true\nidentities = ['owner.key']\n{more}"
        );
        fs::write(path("c.toml"), text.replace("SITE", &name)).unwrap();
        let mut config = Config::read(&path("c.toml")).unwrap();
        config.state = path("state").into();
        let (name, store): (StoreName, _) = (name.parse().unwrap(), memory::Memory::default());
        store.hand_in(&name);
        store.set_places(vec![Place::path("sealed key", path("c.toml"), true)]);
        Self { keys, volumes, config, name, store, backend: backend::memory::Memory::default() }
    }

    /// A path beside the configuration.
    pub fn beside_the_keys(&self, name: &str) -> PathBuf {
        self.keys.path().join(name)
    }

    /// A path beside the volumes.
    pub fn path(&self, name: &str) -> PathBuf {
        self.volumes.path().join(name)
    }

    /// A blank file of 32 MiB that stands for a device.
    pub fn blank(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(32 << 20).unwrap();
        path
    }

    /// The store's container.
    pub fn container(&self) -> Container {
        Container::open(&self.config, &self.name, None, Use::Keys).unwrap()
    }

    /// The store's keys that a tenant may use.
    pub fn keys_of(&self, tenant: &Tenant) -> TenantKeys {
        TenantKeys::open(&self.config, tenant).unwrap()
    }

    /// From now on the store's keys rest on the disk of the site's files.
    pub fn keys_beside_the_volumes(&self) {
        self.store.set_places(vec![Place::path("sealed key", self.volumes.path(), true)]);
    }

    /// The audit record.
    pub fn audit(&self) -> String {
        fs::read_to_string(self.beside_the_keys("audit")).unwrap_or_default()
    }

    /// The keys that are stored.
    pub fn keys(&self) -> Vec<KeyReference> {
        let container = self.container();
        container.store().list().unwrap().into_iter().map(|id| container.reference(id)).collect()
    }
}
