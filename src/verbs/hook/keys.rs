//! The key manager's half of the hooks: castellan's managed objects, sealed; or, in a Barbican without owner, as it keeps them.

use openssl::{error::ErrorStack, pkey::PKey, rsa::Rsa};
use zeroize::Zeroizing;

use crate::{
    base::{
        chain::chain,
        key::{KeyReference, ManagedObject, ObjectFacts, ObjectKind, SecretBytes},
    },
    config::Config,
    keys::seal::SealError,
    unlock::{
        self,
        audit::{self, Event},
        container::Container,
    },
    verbs::{error::Error, keys},
};

/// An object, with its value or without.
pub struct Described {
    pub key: KeyReference,
    pub facts: ObjectFacts,
    /// Its value, if it was asked for.
    pub value: Option<SecretBytes>,
}

/// Makes a symmetric key.
pub fn create_key(config: &Config, container: &Container, facts: ObjectFacts) -> Result<KeyReference, Error> {
    let bits = facts.bit_length.unwrap_or(256);
    if !bits.is_multiple_of(8) || !(128..=4096).contains(&bits) {
        return Err(Error::Usage(format!("a key of {bits} bits is not supported (128 to 4096, in steps of 8)")));
    }
    if let Some(objects) = container.store().objects() {
        let key = container.reference(objects.order(&facts)?);
        record(config, "key create", &key);
        return Ok(key);
    }
    let value = SecretBytes::random(bits as usize / 8)?;
    keep(config, container, ManagedObject { facts: ObjectFacts { fresh: true, ..facts }, value })
}

/// Makes an RSA key pair: the private key (PKCS #8) and the public key (SubjectPublicKeyInfo), both DER.
pub fn create_pair(
    config: &Config,
    container: &Container,
    facts: &ObjectFacts,
) -> Result<(KeyReference, KeyReference), Error> {
    let bits = facts.bit_length.unwrap_or(3072);
    if !facts.algorithm.as_deref().is_none_or(|name| name.eq_ignore_ascii_case("rsa")) || !(2048..=8192).contains(&bits)
    {
        return Err(Error::Usage("key pairs are RSA, of 2048 to 8192 bits".to_owned()));
    }
    let pair = || -> Result<_, ErrorStack> {
        let pair = PKey::from_rsa(Rsa::generate(bits)?)?;
        Ok((Zeroizing::new(pair.private_key_to_pkcs8()?), pair.public_key_to_der()?))
    };
    let (private, public) = pair().map_err(SealError::from)?;
    let keep = |kind, der: &[u8]| {
        let facts = ObjectFacts { kind, algorithm: Some("RSA".to_owned()), bit_length: Some(bits), ..facts.clone() };
        store_key(config, container, ManagedObject { facts, value: SecretBytes::copy_of(der)? })
    };
    Ok((keep(ObjectKind::Private, &private)?, keep(ObjectKind::Public, &public)?))
}

/// Keeps an object that comes from outside: whoever gave it may have used it.
pub fn store_key(config: &Config, container: &Container, object: ManagedObject) -> Result<KeyReference, Error> {
    let facts = ObjectFacts { fresh: false, ..object.facts };
    keep(config, container, ManagedObject { facts, value: object.value })
}

fn keep(config: &Config, container: &Container, object: ManagedObject) -> Result<KeyReference, Error> {
    let key = container.keep_object(object)?;
    record(config, "key create", &key);
    Ok(key)
}

/// Gives an object out. Whoever gets a key may use it, so that it no longer counts as unused.
pub fn get_key(
    config: &Config,
    container: &Container,
    key: &KeyReference,
    with_value: bool,
) -> Result<Described, Error> {
    if !with_value && let Some(facts) = container.store().released_facts(&key.key)? {
        return Ok(Described { key: key.clone(), facts, value: None });
    }
    if !with_value {
        return Ok(Described { key: key.clone(), facts: container.object(&key.key)?.facts, value: None });
    }
    let ManagedObject { facts, value } = container.give_out(&key.key)?;
    record(config, "key get", key);
    // As they are from now on.
    let facts = ObjectFacts { fresh: false, ..facts };
    Ok(Described { key: key.clone(), facts, value: Some(value) })
}

/// Deletes an object for ever.
pub fn delete_key(config: &Config, container: &Container, key: &KeyReference) -> Result<(), Error> {
    keys::delete(config, container, key)
}

/// All objects of a kind; keys of volumes are not among them.
pub fn list_keys(
    config: &Config,
    container: &Container,
    kind: Option<ObjectKind>,
    with_values: bool,
) -> Result<Vec<Described>, Error> {
    let look = |key: &KeyReference| -> Result<Option<Described>, Error> {
        let object = get_key(config, container, key, false)?;
        if kind.is_some_and(|kind| kind != object.facts.kind) {
            return Ok(None);
        }
        // Only what is asked for is given out.
        if with_values { get_key(config, container, key, true).map(Some) } else { Ok(Some(object)) }
    };
    let mut found = Vec::new();
    for id in container.store().list()? {
        let key = container.reference(id);
        match look(&key) {
            Ok(object) => found.extend(object),
            Err(Error::Unlock(unlock::Error::NoPassphrase(_))) => {}
            // One that cannot be read must not hide the others.
            Err(error) => tracing::warn!("the list omits {key}: {}", chain(&error)),
        }
    }
    Ok(found)
}

fn record(config: &Config, action: &str, key: &KeyReference) {
    audit::done(config, &Event { action, key: Some(key.to_string()), ..Event::default() });
}
