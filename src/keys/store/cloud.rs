//! What the stores of a cloud have in common: where they log in, and what that takes.

use std::path::{Path, PathBuf};

use super::{Server, StoreError};
use crate::{
    base::key::Place,
    config::CloudConfig,
    keys::net::{
        AuthError,
        clouds::{self, Cloud},
        http,
    },
};

/// What servers are trusted by unless clouds.yaml names an authority (Debian's ca-certificates).
pub const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A service of a cloud, as the configuration names it.
pub struct Service<'a> {
    pub cloud: &'a CloudConfig,
    /// Its URLs, in place of the catalogue's.
    pub urls: &'a [String],
    /// What logs in there may get unsealed keys.
    pub releases: bool,
}

impl<'a> Service<'a> {
    /// Where it logs in, and the service.
    pub fn servers(&self) -> Result<Vec<Server>, StoreError> {
        let auth_url = Cloud::find(self.cloud, None).map_err(AuthError::from)?.auth_url;
        let server = |url: &String| Ok(Server::of(&http::url(url).map_err(AuthError::from)?));
        [&auth_url].into_iter().chain(self.urls).map(server).collect()
    }

    /// The files that logging in and trusting the servers take.
    pub fn files(&self) -> Result<Vec<PathBuf>, StoreError> {
        let found = Cloud::find(self.cloud, None).map_err(AuthError::from)?;
        let authorities = found.authorities.unwrap_or_else(|| SYSTEM_AUTHORITIES.into());
        let client = found.client.into_iter().flat_map(|client| [client.certificate, client.key]);
        let own = clouds::files(self.cloud).map_err(AuthError::from)?;
        let mut files: Vec<PathBuf> = own.into_iter().chain([authorities]).chain(client).collect();
        files.dedup();
        Ok(files)
    }

    /// The files that the configuration names.
    pub fn paths(&self) -> Vec<&'a Path> {
        self.cloud.clouds.iter().chain(&self.cloud.secret).map(AsRef::as_ref).collect()
    }

    /// Where the credentials are.
    pub fn places(&self) -> Vec<Place> {
        // Of a cloud that cannot be read, what the configuration names.
        let named = || self.paths().into_iter().map(Path::to_owned).collect();
        let client = Cloud::find(self.cloud, None).ok().and_then(|found| found.client).map(|client| client.key);
        let files = clouds::files(self.cloud).unwrap_or_else(|_| named()).into_iter().chain(client);
        files.map(|path| Place::path("credential", path, self.releases)).collect()
    }
}
