//! `[hooks]`: whom the hooks serve, and what they take.

use serde::Deserialize;

use super::CloudConfig;
use crate::base::plain_hash::PlainHash;

/// `[hooks]`
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hooks {
    /// What the cryptsetup that made os-brick's plain volumes hashed passphrases with.
    pub plain_hash: PlainHash,
    /// Format blank devices also with keys of a Barbican of which nothing proves that they were never used: those that
    /// castellan's own driver makes.
    pub format_with_unmarked_keys: bool,
    /// Whether those who call hooks have to be told apart.
    pub tenants: Tenants,
    /// The Keystone that says whose a caller's token is, and the login of a user who may ask it.
    pub keystone: Option<CloudConfig>,
    /// Users with one of these roles may use the keys of all projects.
    pub admin_roles: Vec<String>,
    /// Likewise, for services that act for their users.
    pub service_roles: Vec<String>,
}

/// How many tenants there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tenants {
    /// Several: each reaches its own keys only.
    #[default]
    Many,
    /// One: whoever may call hooks may use all keys.
    One,
}

impl Default for Hooks {
    fn default() -> Self {
        Self {
            plain_hash: PlainHash::default(),
            format_with_unmarked_keys: false,
            tenants: Tenants::default(),
            keystone: None,
            // As the policies of OpenStack's own services have them.
            admin_roles: vec!["admin".to_owned()],
            service_roles: vec!["service".to_owned()],
        }
    }
}
