//! Which cloud it is, of those that clouds.yaml has.

use serde::Deserialize;

use super::ConfigPath;

/// How to reach a cloud and to log in; the same for all OpenStack services.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CloudConfig {
    /// Entry of clouds.yaml; the environment's `OS_CLOUD` unless given.
    pub cloud: Option<String>,
    /// The clouds.yaml; searched where OpenStack's own clients do unless given.
    pub clouds: Option<ConfigPath>,
    /// File with the password, application credential secret or token, in place of the one in clouds.yaml.
    pub secret: Option<ConfigPath>,
}

impl CloudConfig {
    /// The names of its members.
    pub const MEMBERS: [&str; 3] = ["cloud", "clouds", "secret"];
}
