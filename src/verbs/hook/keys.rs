//! The key manager's half of the hooks: castellan's managed objects, sealed; or, in a Barbican without owner, as it keeps them.

use openssl::{error::ErrorStack, pkey::PKey, rsa::Rsa};
use zeroize::Zeroizing;

use crate::{
    base::{
        chain::chain,
        key::{Consumer, KeyReference, ManagedObject, ObjectFacts, ObjectKind, SecretBytes},
    },
    config::Config,
    keys::{seal::SealError, store::pem},
    unlock::{
        self,
        audit::{self, Event},
        container::{Listed, TenantKeys},
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
pub fn create_key(config: &Config, of: &TenantKeys, facts: ObjectFacts) -> Result<KeyReference, Error> {
    let bits = facts.bit_length.unwrap_or(256);
    if !bits.is_multiple_of(8) || !(128..=4096).contains(&bits) {
        return Err(Error::Usage(format!("a key of {bits} bits is not supported (128 to 4096, in steps of 8)")));
    }
    if let Some(key) = of.order(&facts)? {
        record(config, of, "key create", &key);
        return Ok(key);
    }
    let value = SecretBytes::random(bits as usize / 8)?;
    keep(config, of, ManagedObject { facts: ObjectFacts { fresh: true, ..facts }, value })
}

/// Makes an RSA key pair: the private key (PKCS #8) and the public key (SubjectPublicKeyInfo), both DER.
pub fn create_pair(
    config: &Config,
    of: &TenantKeys,
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
        store_key(config, of, ManagedObject { facts, value: SecretBytes::copy_of(der)? })
    };
    Ok((keep(ObjectKind::Private, &private)?, keep(ObjectKind::Public, &public)?))
}

/// Keeps an object that comes from outside: whoever gave it may have used it.
pub fn store_key(config: &Config, of: &TenantKeys, object: ManagedObject) -> Result<KeyReference, Error> {
    let facts = ObjectFacts { fresh: false, filling: None, ..object.facts };
    // castellan's objects are DER, in each kind of store.
    let value = pem::from_pem(facts.kind, object.value).map_err(|error| Error::Usage(chain(&error)))?;
    keep(config, of, ManagedObject { facts, value })
}

fn keep(config: &Config, of: &TenantKeys, object: ManagedObject) -> Result<KeyReference, Error> {
    let key = of.keep(object)?;
    record(config, of, "key create", &key);
    Ok(key)
}

/// Gives an object out. Whoever gets a key may use it, so that it no longer counts as unused.
pub fn get_key(config: &Config, of: &TenantKeys, key: &KeyReference, with_value: bool) -> Result<Described, Error> {
    if !with_value {
        return Ok(Described { key: key.clone(), facts: of.facts(&key.key)?, value: None });
    }
    let ManagedObject { facts, value } = of.give_out(&key.key)?;
    record(config, of, "key get", key);
    // As they are from now on.
    let facts = ObjectFacts { fresh: false, filling: None, ..facts };
    Ok(Described { key: key.clone(), facts, value: Some(value) })
}

/// Keeps a copy of an object, for `to`. Its value is not given out: a copy of an unused key is one, and the key remains so.
pub fn copy_key(config: &Config, of: &TenantKeys, key: &KeyReference, to: &TenantKeys) -> Result<KeyReference, Error> {
    let copy = of.copy(&key.key, to)?;
    record(config, of, "key copy", key);
    record(config, to, "key create", &copy);
    Ok(copy)
}

/// Deletes an object for ever. One that others need is deleted only if that is forced.
pub fn delete_key(config: &Config, of: &TenantKeys, key: &KeyReference, force: bool) -> Result<(), Error> {
    of.delete(&key.key, force)?;
    keys::deleted(config, key, of.acting());
    Ok(())
}

/// Who needs an object.
pub fn consumers(of: &TenantKeys, key: &KeyReference) -> Result<Vec<Consumer>, Error> {
    Ok(of.consumers(&key.key)?)
}

/// Notes who needs an object: it is not deleted under them.
pub fn add_consumer(config: &Config, of: &TenantKeys, key: &KeyReference, consumer: &Consumer) -> Result<(), Error> {
    if !consumer.is_valid() {
        let most = Consumer::MOST_BYTES;
        return Err(Error::Usage(format!("each member of 'consumer' must have 1 to {most} bytes")));
    }
    of.add_consumer(&key.key, consumer)?;
    record(config, of, "key add-consumer", key);
    Ok(())
}

/// Notes who does not need an object any more.
pub fn remove_consumer(config: &Config, of: &TenantKeys, key: &KeyReference, consumer: &Consumer) -> Result<(), Error> {
    of.remove_consumer(&key.key, consumer)?;
    record(config, of, "key remove-consumer", key);
    Ok(())
}

/// All objects of a kind; keys of volumes are not among them.
pub fn list_keys(
    config: &Config,
    of: &TenantKeys,
    kind: Option<ObjectKind>,
    with_values: bool,
) -> Result<Vec<Described>, Error> {
    let mut found = Vec::new();
    for Listed { key, facts } in of.list()? {
        let object = match facts {
            Ok(facts) if kind.is_some_and(|kind| kind != facts.kind) => continue,
            // Only what is asked for is given out.
            Ok(_) if with_values => get_key(config, of, &key, true),
            Ok(facts) => Ok(Described { key: key.clone(), facts, value: None }),
            Err(unlock::Error::NoPassphrase(_)) => continue,
            Err(error) => Err(error.into()),
        };
        match object {
            Ok(object) => found.push(object),
            // One that cannot be read must not hide the others.
            Err(error) => tracing::warn!("the list omits {key}: {}", chain(&error)),
        }
    }
    Ok(found)
}

fn record(config: &Config, of: &TenantKeys, action: &str, key: &KeyReference) {
    audit::done(config, &Event { action, key: Some(key.to_string()), caller: of.acting(), ..Event::default() });
}
