//! On whose behalf a hook acts. A request only claims that; a [`Tenant`] is proven, and no key is reached without one.
//!
//! Either the store judges the caller's token at each request, or Keystone says whose it is, and each key says which project it
//! was made for. Where neither is so, a person must have said that there is only one tenant.

use std::{borrow::Cow, sync::Arc};

use serde::Serialize;

use super::Error;
use crate::{
    base::{
        advice::Advice,
        exit::Exit,
        key::{ProjectId, StoreName},
    },
    config::{Config, Tenants},
    keys::{
        net::{Caller, SendError, TokenOwner, Verifier},
        store,
    },
};

/// What a hook's request says of whom it is for. Nothing of it is believed.
#[derive(Default)]
pub struct Claim {
    pub caller: Option<Caller>,
    /// The project that it names.
    pub project: Option<String>,
}

/// On whose behalf a hook acts in a store. Only [`Tenant::prove`] makes one.
///
/// ```compile_fail,E0423
/// # use cryptattach::unlock::tenant::Tenant;
/// fn proof_out_of_nothing() -> Tenant {
///     Tenant(todo!()) // the member is private
/// }
/// ```
#[derive(Clone)]
pub struct Tenant(Arc<Proof>);

struct Proof {
    store: StoreName,
    scope: Scope,
    /// What the store is used with, if it is used as the caller.
    caller: Option<Arc<Caller>>,
}

enum Scope {
    /// The store judges, each time.
    Store,
    /// Keystone vouches for the owner of the token.
    Keystone {
        /// The project that new keys are made for.
        project: Option<ProjectId>,
        acting: Acting,
    },
    /// There is one tenant.
    One,
}

/// Who acts, as Keystone says; for the audit record.
#[derive(Clone, Debug, Serialize)]
pub struct Acting {
    user: String,
    /// The project of the token.
    #[serde(skip_serializing_if = "Option::is_none")]
    project: Option<ProjectId>,
    /// The role that lets it use keys of all projects.
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<String>,
}

/// A request is not served, since it is not proven whom it is for.
#[derive(Debug, thiserror::Error)]
pub enum TenantError {
    /// Nobody could tell.
    #[error("the store '{0}' cannot tell the keys of one project from another's, so hooks may not use it")]
    NotServed(StoreName),
    /// Nobody is named.
    #[error("the request has no token ('auth.token'), so nobody knows which project's keys it may use")]
    NoToken,
    /// Keystone does not vouch for it.
    #[error("cannot verify whose the request's token is")]
    Unverified(#[source] Box<SendError>),
    /// It is somebody's, but of no project.
    #[error("the request's token is not scoped to a project")]
    NoProject,
    /// The request names a project that is not the token's.
    #[error("the request's token belongs to project {is}, but the request names another project")]
    OtherProject { is: ProjectId },
    /// The project that the request names for a new key.
    #[error("the request's 'auth.project_id' is not the id of a project")]
    MalformedProject,
    /// It is proven for another store.
    #[error("the request is for the store '{asked}', but was verified for '{proven}'")]
    OtherStore { asked: StoreName, proven: StoreName },
}

impl Advice for TenantError {
    fn exit(&self) -> Exit {
        match self {
            Self::NotServed(_) => Exit::Config,
            Self::NoToken | Self::NoProject | Self::OtherProject { .. } => Exit::PermissionDenied,
            Self::Unverified(error) => error.exit(),
            Self::MalformedProject => Exit::Usage,
            Self::OtherStore { .. } => Exit::Internal,
        }
    }

    fn next_step(&self) -> Option<Cow<'static, str>> {
        let step = match self {
            Self::NotServed(_) => {
                "let Keystone tell them apart: keystone = { cloud = \"...\" } in [hooks] of the configuration; a cloud's store can judge the caller itself: caller_token = true; if all who call hooks are one tenant, say so: tenants = \"one\" in [hooks]"
            }
            Self::NoToken => "send the token of the user on whose behalf the request is made",
            Self::Unverified(error) => return error.next_step(),
            Self::NoProject => "use a token that is scoped to the project whose keys are meant",
            Self::OtherProject { .. } => {
                "use a token of that project, or one with a role of admin_roles or service_roles in [hooks]"
            }
            Self::MalformedProject | Self::OtherStore { .. } => return None,
        };
        Some(step.into())
    }
}

impl Tenant {
    /// Finds out on whose behalf a request is made that is about keys of this store.
    pub fn prove(config: &Config, store: &StoreName, claim: Claim) -> Result<Self, Error> {
        let section = config.store(store)?;
        let kind = store::kind(section)?;
        let caller = claim.caller.map(Arc::new);
        // Unsealed keys say nothing of their project.
        let seals = section.sealing.seals() || !kind.may_keep_unsealed_keys();
        let scope = match (config.hooks.tenants, &config.hooks.keystone) {
            (Tenants::One, _) => Scope::One,
            (Tenants::Many, _) if kind.takes_caller_token() => {
                caller.as_ref().ok_or(TenantError::NoToken)?;
                Scope::Store
            }
            (Tenants::Many, Some(keystone)) if seals => {
                let caller = caller.as_ref().ok_or(TenantError::NoToken)?;
                let verified = Verifier::new(keystone, &config.network, &config.hooks.service_roles)
                    .map_err(SendError::from)
                    .and_then(|verifier| verifier.owner(caller));
                let owner = verified.map_err(|error| TenantError::Unverified(Box::new(error)))?;
                Scope::of(config, owner, claim.project)?
            }
            (Tenants::Many, _) => return Err(TenantError::NotServed(store.clone()).into()),
        };
        let caller = caller.filter(|_| kind.takes_caller_token());
        Ok(Self(Arc::new(Proof { store: store.clone(), scope, caller })))
    }

    /// The store that it is proven for.
    pub fn store(&self) -> &StoreName {
        &self.0.store
    }

    /// Refuses another store than the one that it is proven for.
    pub(super) fn check_store(&self, asked: &StoreName) -> Result<(), TenantError> {
        match self.store() {
            proven if proven == asked => Ok(()),
            proven => Err(TenantError::OtherStore { asked: asked.clone(), proven: proven.clone() }),
        }
    }

    /// What the store is used with, if it is used as the caller.
    pub(super) fn caller(&self) -> Option<Arc<Caller>> {
        self.0.caller.clone()
    }

    /// Whether it may use a key that was made for this project.
    pub(super) fn may_use(&self, key: Option<&ProjectId>) -> bool {
        match &self.0.scope {
            Scope::Store | Scope::One => true,
            Scope::Keystone { acting: Acting { role: Some(_), .. }, .. } => true,
            Scope::Keystone { acting: Acting { project, .. }, .. } => key.is_some() && key == project.as_ref(),
        }
    }

    /// The project that its new keys are made for.
    pub(super) fn project(&self) -> Option<&ProjectId> {
        match &self.0.scope {
            Scope::Keystone { project, .. } => project.as_ref(),
            Scope::Store | Scope::One => None,
        }
    }

    /// Who acts, where Keystone says so.
    pub(super) fn acting(&self) -> Option<&Acting> {
        match &self.0.scope {
            Scope::Keystone { acting, .. } => Some(acting),
            Scope::Store | Scope::One => None,
        }
    }
}

impl Scope {
    fn of(config: &Config, owner: TokenOwner, named: Option<String>) -> Result<Self, TenantError> {
        let hooks = &config.hooks;
        let role = owner.role(hooks.admin_roles.iter().chain(&hooks.service_roles)).map(str::to_owned);
        let own = owner.project.as_ref().map(|project| project.id.clone());
        let project = match (named, &owner.project) {
            (None, None) if role.is_none() => return Err(TenantError::NoProject),
            (None, _) => own.clone(),
            // castellan's contexts carry an id; a person who writes a request may write the name.
            (Some(named), Some(project)) if named == project.id.as_str() || named == project.name => own.clone(),
            (Some(named), _) if role.is_some() => Some(named.parse().map_err(|_| TenantError::MalformedProject)?),
            (Some(_), Some(project)) => return Err(TenantError::OtherProject { is: project.id.clone() }),
            (Some(_), None) => return Err(TenantError::NoProject),
        };
        Ok(Self::Keystone { project, acting: Acting { user: owner.user.id, project: own, role } })
    }
}

#[cfg(test)]
impl Tenant {
    /// Whom Keystone would vouch for, with this role that lets it use all keys.
    pub fn vouched_for(store: &StoreName, project: &str, role: Option<&str>) -> Self {
        let project: Option<ProjectId> = Some(project.parse().unwrap());
        let acting = Acting { user: "user".to_owned(), project: project.clone(), role: role.map(str::to_owned) };
        let scope = Scope::Keystone { project, acting };
        Self(Arc::new(Proof { store: store.clone(), scope, caller: None }))
    }

    /// The one that there is.
    pub fn only(store: &StoreName) -> Self {
        Self(Arc::new(Proof { store: store.clone(), scope: Scope::One, caller: None }))
    }
}
