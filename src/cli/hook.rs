//! `cryptattach hook ...`: one JSON request on standard input, one JSON answer on standard output.
//!
//! The request may hold a token or a key, and so is read into locked memory; what serde takes out of it is borrowed.

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
};

use base64ct::{Base64, Encoding};
use clap::Subcommand;
use serde::{Deserialize, Serialize, Serializer, ser};
use serde_json::json;

use super::{Global, key::read_secret};
use crate::{
    base::{
        chain::{chain, printable},
        key::{Consumer, KeyId, KeyReference, KeySize, ManagedObject, ObjectFacts, ObjectKind, SecretBytes, StoreName},
        mapping_name::MappingName,
    },
    config::Config,
    keys::net::Caller,
    unlock::{
        container::TenantKeys,
        tenant::{Claim, Tenant},
    },
    verbs::{
        error::Error,
        hook::{self, Described, Request},
    },
    volumes::{
        backend::ThisHost,
        separation::{ConnectionInfo, Target},
    },
};

/// The version of requests that is understood.
const VERSION: u32 = 1;

/// Attach volumes and keep keys for OpenStack (os-brick, castellan): JSON on standard input and output
///
/// docs/openstack-reference.md describes the requests and answers.
#[derive(Subcommand)]
pub enum Hook {
    /// Attach a volume; format it at its first attach
    Attach,
    /// Remove a mapping
    Detach,
    /// Grow a mapping to the size of its device
    Extend,
    /// Store and release keys
    #[command(subcommand)]
    Key(Key),
}

/// Do an operation of castellan's key manager
#[derive(Subcommand)]
pub enum Key {
    /// Create a symmetric key
    Create,
    /// Create an RSA key pair
    CreatePair,
    /// Store an object
    Store,
    /// Fetch an object
    Get,
    /// Copy an object, whose value is not given out
    Copy,
    /// Delete an object permanently
    Delete,
    /// List objects
    List,
    /// Note that a resource needs an object, which is then not deleted
    AddConsumer,
    /// Note that a resource does not need an object any more
    RemoveConsumer,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Auth<'a> {
    token: Option<&'a str>,
    service_token: Option<&'a str>,
    project_id: Option<String>,
}

/// What is common to all that need a store.
#[derive(Deserialize)]
struct Whose<'a> {
    #[serde(borrow)]
    auth: Option<Auth<'a>>,
    store: Option<StoreName>,
}

#[derive(Deserialize)]
struct Attach {
    device: PathBuf,
    link: Option<PathBuf>,
    name: MappingName,
    key_id: String,
    provider: Option<String>,
    cipher: Option<String>,
    key_size: Option<u32>,
    connection_info: Option<ConnectionInfo>,
    volume_id: Option<String>,
    #[serde(default)]
    fills: bool,
}

#[derive(Deserialize)]
struct Detach {
    name: MappingName,
}

#[derive(Deserialize)]
struct Create {
    algorithm: Option<String>,
    bit_length: Option<u32>,
    name: Option<String>,
}

#[derive(Deserialize)]
struct Store<'a> {
    #[serde(borrow)]
    secret: Secret<'a>,
}

#[derive(Deserialize)]
struct Secret<'a> {
    #[serde(flatten)]
    facts: ObjectFacts,
    value: &'a str,
}

#[derive(Deserialize)]
struct Which {
    key_id: String,
    #[serde(default)]
    metadata_only: bool,
    /// Whether to ask who needs it; asked unless told otherwise.
    consumers: Option<bool>,
}

#[derive(Deserialize)]
struct Copy<'a> {
    key_id: String,
    /// Whose the copy will be; the key's own tenant's unless given.
    #[serde(borrow)]
    to: Option<Auth<'a>>,
}

#[derive(Deserialize)]
struct Deletion {
    key_id: String,
    #[serde(default)]
    force: bool,
}

#[derive(Deserialize)]
struct Consumption {
    key_id: String,
    consumer: Consumer,
}

#[derive(Deserialize)]
struct Listing {
    #[serde(rename = "type")]
    kind: Option<ObjectKind>,
    #[serde(default)]
    metadata_only: bool,
}

#[derive(Serialize)]
struct Given<'a> {
    key_id: String,
    #[serde(flatten)]
    facts: &'a ObjectFacts,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<Value<'a>>,
    /// Who needs it; not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    consumers: Option<Vec<Consumer>>,
}

struct Value<'a>(&'a SecretBytes);

impl Serialize for Value<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = self.0.expose();
        let mut text = SecretBytes::zeroed(Base64::encoded_len(bytes)).map_err(ser::Error::custom)?;
        let text = Base64::encode(bytes, text.expose_mut()).map_err(ser::Error::custom)?;
        serializer.serialize_str(text)
    }
}

impl Hook {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let input = read_secret("the request", Path::new("-"))?;
        let version = parse::<Version>(&input)?.version;
        if version != VERSION {
            return Err(Error::Usage(format!(
                "the request has version {version}; only version {VERSION} is supported"
            )));
        }
        if let Self::Detach = self {
            // By name alone: os-brick detaches without a user, and perhaps when the configuration has changed.
            let detached = hook::detach(&ThisHost, &parse::<Detach>(&input)?.name)?;
            return answer(&json!({"detached": detached}));
        }
        let config = global.config()?;
        let whose: Whose<'_> = parse(&input)?;
        let store = config.store_or_default(whose.store.as_ref())?;
        let tenant =
            Tenant::prove(&config, &store, whose.auth.map_or_else(|| Ok(Claim::default()), Auth::into_claim)?)?;
        match self {
            Self::Attach => {
                let mapping = hook::attach(&config, &ThisHost, &attach_request(&input, store)?, &tenant)?;
                answer(&json!({"device": mapping.device}))
            }
            Self::Extend => {
                let size_bytes = hook::extend(&config, &ThisHost, &attach_request(&input, store)?, &tenant)?;
                answer(&json!({"size_bytes": size_bytes}))
            }
            Self::Key(key) => key.run(&config, &TenantKeys::open(&config, &tenant)?, &input, store),
            Self::Detach => Ok(()),
        }
    }
}

impl Key {
    fn run(&self, config: &Config, of: &TenantKeys, input: &SecretBytes, store: StoreName) -> Result<(), Error> {
        match self {
            Self::Create => {
                let key = hook::create_key(config, of, parse::<Create>(input)?.into_facts())?;
                answer(&json!({"key_id": key.key}))
            }
            Self::CreatePair => {
                let facts = parse::<Create>(input)?.into_facts();
                let (private, public) = hook::create_pair(config, of, &facts)?;
                answer(&json!({"private_key_id": private.key, "public_key_id": public.key}))
            }
            Self::Store => {
                let key = hook::store_key(config, of, stored_object(input)?)?;
                answer(&json!({"key_id": key.key}))
            }
            Self::Get => {
                let Which { key_id, metadata_only, consumers } = parse(input)?;
                let key = reference(store, &key_id)?;
                let object = hook::get_key(config, of, &key, !metadata_only)?;
                let consumers = consumers.unwrap_or(true).then(|| hook::consumers(of, &key)).transpose()?;
                answer(&Given { consumers, ..given(&object) })
            }
            Self::Copy => {
                let Copy { key_id, to } = parse(input)?;
                let tenant = |auth: Auth<'_>| Tenant::prove(config, &store, auth.into_claim()?).map_err(Error::from);
                let to = to.map(|auth| Ok::<_, Error>(TenantKeys::open(config, &tenant(auth)?)?)).transpose()?;
                let copy = hook::copy_key(config, of, &reference(store.clone(), &key_id)?, to.as_ref().unwrap_or(of))?;
                answer(&json!({"key_id": copy.key}))
            }
            Self::Delete => {
                let Deletion { key_id, force } = parse(input)?;
                hook::delete_key(config, of, &reference(store, &key_id)?, force)?;
                answer(&json!({}))
            }
            Self::AddConsumer => {
                let Consumption { key_id, consumer } = parse(input)?;
                hook::add_consumer(config, of, &reference(store, &key_id)?, &consumer)?;
                answer(&json!({}))
            }
            Self::RemoveConsumer => {
                let Consumption { key_id, consumer } = parse(input)?;
                hook::remove_consumer(config, of, &reference(store, &key_id)?, &consumer)?;
                answer(&json!({}))
            }
            Self::List => {
                let Listing { kind, metadata_only } = parse(input)?;
                let objects = hook::list_keys(config, of, kind, !metadata_only)?;
                #[derive(Serialize)]
                struct Listed<'a> {
                    keys: Vec<Given<'a>>,
                }
                answer(&Listed { keys: objects.iter().map(given).collect() })
            }
        }
    }
}

impl Auth<'_> {
    fn into_claim(self) -> Result<Claim, Error> {
        let secret = |text: &str| SecretBytes::copy_of(text.as_bytes());
        let service_token = self.service_token.map(secret).transpose()?;
        let caller =
            self.token.map(|token| Ok::<_, Error>(Caller { token: secret(token)?, service_token })).transpose()?;
        Ok(Claim { caller, project: self.project_id })
    }
}

/// The volume that a request to attach is about, with its key in that store.
pub fn attach_request(input: &SecretBytes, store: StoreName) -> Result<Request, Error> {
    parse::<Attach>(input)?.into_request(store)
}

/// The object that a request to store one brings.
pub fn stored_object(input: &SecretBytes) -> Result<ManagedObject, Error> {
    let Secret { facts, value } = parse::<Store<'_>>(input)?.secret;
    let mut bytes = SecretBytes::zeroed(value.len())?;
    let decoded = Base64::decode(value, bytes.expose_mut()).map(<[u8]>::len);
    let length = decoded.map_err(|_| Error::Usage("the request's value is not base64".to_owned()))?;
    bytes.truncate(length);
    Ok(ManagedObject { facts, value: bytes })
}

impl Create {
    fn into_facts(self) -> ObjectFacts {
        let Self { algorithm, bit_length, name } = self;
        let kind = ObjectKind::Symmetric;
        ObjectFacts { kind, algorithm, bit_length, name, created: None, fresh: false, filling: None }
    }
}

fn given(object: &Described) -> Given<'_> {
    Given {
        key_id: object.key.key.to_string(),
        facts: &object.facts,
        value: object.value.as_ref().map(Value),
        consumers: None,
    }
}

impl Attach {
    fn into_request(self, store: StoreName) -> Result<Request, Error> {
        let key_size = |bits| {
            KeySize::from_bits(bits)
                .ok_or_else(|| Error::Usage(format!("a key size of {bits} bits is not supported (256, 512)")))
        };
        // os-brick's own names for it, short and as a class.
        let plain = self
            .provider
            .as_deref()
            .is_some_and(|provider| provider == "plain" || provider.ends_with(".CryptsetupEncryptor"));
        Ok(Request {
            device: self.device,
            link: self.link,
            name: self.name,
            key: reference(store, &self.key_id)?,
            plain,
            cipher: self.cipher,
            key_size: self.key_size.map(key_size).transpose()?,
            volume_id: self.volume_id,
            fills: self.fills,
            // One that is not understood leaves a gap in the proof; the volume is not refused for it.
            target: self.connection_info.map(|info| {
                Target::from_connection_info(&info).unwrap_or_else(|error| Target::Unknown { why: chain(&error) })
            }),
        })
    }
}

/// No store ever gave out an id of another form, so it is a key that does not exist.
fn reference(store: StoreName, key_id: &str) -> Result<KeyReference, Error> {
    match KeyId::as_told(key_id) {
        Ok(key) => Ok(KeyReference { store, key }),
        Err(_) => Err(Error::NoSuchKey { store, id: key_id.to_owned() }),
    }
}

/// The members whose values may be repeated when they are wrong. Others may be, or have, a token or a key.
const NO_SECRETS: [&str; 16] = [
    "version",
    "store",
    "device",
    "link",
    "name",
    "key_id",
    "provider",
    "cipher",
    "key_size",
    "volume_id",
    "fills",
    "algorithm",
    "bit_length",
    "type",
    "metadata_only",
    "force",
];

fn parse<'a, T: Deserialize<'a>>(input: &'a SecretBytes) -> Result<T, Error> {
    let mut json = serde_json::Deserializer::from_slice(input.expose());
    let parsed =
        serde_path_to_error::deserialize(&mut json).map_err(|error| (error.path().to_string(), error.into_inner()));
    parsed.and_then(|value| json.end().map(|()| value).map_err(|error| (".".to_owned(), error))).map_err(
        |(path, error)| {
            let why = match error.classify() {
                serde_json::error::Category::Data => wrong_member(&path, &error.to_string()),
                _ => "it is not JSON".to_owned(),
            };
            Error::Usage(format!(
                "cannot understand the request: {why} (line {}, column {})",
                error.line(),
                error.column()
            ))
        },
    )
}

/// Which member is wrong, and if that may be said, why.
fn wrong_member(path: &str, why: &str) -> String {
    let why = why.rsplit_once(" at line ").map_or(why, |(why, _)| why);
    let member = if path == "." { String::new() } else { format!("'{}': ", printable(path)) };
    let is_about_names = ["missing field", "duplicate field"].iter().any(|start| why.starts_with(start));
    if is_about_names || NO_SECRETS.contains(&path) {
        format!("{member}{}", printable(why))
    } else {
        format!("{member}it has the wrong type or form")
    }
}

/// Written past the buffer of `Stdout`, which would keep a copy.
fn answer(value: &impl Serialize) -> Result<(), Error> {
    let failed = || "write the answer".to_owned();
    let mut counter = Counter(0);
    serde_json::to_writer(&mut counter, value).map_err(|error| Error::io(failed())(error.into()))?;
    let mut json = SecretBytes::zeroed(counter.0 + 1)?;
    let mut room = json.expose_mut();
    serde_json::to_writer(&mut room, value).map_err(|error| Error::io(failed())(error.into()))?;
    room.write_all(b"\n").map_err(Error::io(failed()))?;
    let out = nix::unistd::dup(io::stdout()).map_err(|errno| Error::io(failed())(errno.into()))?;
    File::from(out).write_all(json.expose()).map_err(Error::io(failed()))
}

struct Counter(usize);

impl Write for Counter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(json: &str) -> String {
        let input = SecretBytes::copy_of(json.as_bytes()).unwrap();
        match parse::<Whose<'_>>(&input).map(drop).and_then(|()| attach_request(&input, "cinder".parse().unwrap())) {
            Err(error) => error.to_string(),
            Ok(_) => String::new(),
        }
    }

    #[test]
    fn the_member_that_is_wrong_is_named_and_no_secret_is_repeated() {
        let id = "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de";
        let request =
            |name: &str, more: &str| format!(r#"{{"device":"/dev/vdb","name":"{name}","key_id":"{id}"{more}}}"#);
        assert_eq!(told(&request("x", "")), "");
        let long = told(&request(&"n".repeat(128), ""));
        assert!(long.contains("'name': 'nnn") && long.contains("1 to 127"), "{long}");
        assert!(told("{}").contains("missing field `device`"));
        assert!(told(&request("x", r#","key_size":"big""#)).contains("'key_size': invalid type: string \"big\""));
        for (json, member) in [
            (request("x", r#","auth":"hunter2""#), "'auth'"),
            (request("x", r#","auth":{"token":["hunter2"]}"#), "'auth.token'"),
            ("\"hunter2\"".to_owned(), "wrong type"),
            (request("x", "} hunter2"), "not JSON"),
        ] {
            let told = told(&json);
            assert!(told.contains(member) && !told.contains("hunter2"), "{told}");
        }
    }

    #[test]
    fn a_keys_id_is_taken_as_openstack_prints_it() {
        let id = "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de";
        let store = || "barbican".parse::<StoreName>().unwrap();
        for told in [id.to_owned(), id.to_uppercase(), format!("https://barbican.example:9311/v1/secrets/{id}")] {
            assert_eq!(reference(store(), &told).unwrap().key.to_string(), id);
            assert_eq!(format!("barbican/{told}").parse::<KeyReference>().unwrap().key.to_string(), id);
        }
        for wrong in ["", "x", "https://barbican.example/v1/secrets/", &format!("../{id}x")] {
            assert!(matches!(reference(store(), wrong), Err(Error::NoSuchKey { .. })), "{wrong}");
        }
    }
}
