//! Lockbox keys: what a host opens once per boot, and everything else with.
//!
//! Two keys are derived from a lockbox key (HKDF-SHA256, RFC 5869): one that closes the entries of the host's local cache
//! (`A256KW`), and a key pair on P-256 whose public half is the recipient that container keys are sealed to for this host. So
//! one operation of the host's identity, which may be a TPM, opens whatever the host needs until it is switched off.

use std::sync::Arc;

use openssl::{
    bn::{BigNum, BigNumContext},
    ec::{EcGroup, EcKey, EcPoint},
    error::ErrorStack,
    md::Md,
    nid::Nid,
    pkey::{Id, PKey, Private},
    pkey_ctx::PkeyCtx,
};
use serde::{Deserialize, Serialize};

use super::{Identity, OwnerKey, OwnerRecipient};
use crate::{
    base::key::{
        BoundContext, HostName, JoseHeader, JweRecipient, LockboxKeyId, MalformedSealedKey, Place, SealedKey,
        SecretBytes,
    },
    keys::seal::{
        Content, ContentKey, Expected, Identities, Opened, Recipient, SealError, Shape, VERSION, check_context,
        encrypt, key_wrap,
        payload::{Base64, decode_bytes, read_json, write_json},
    },
};

const KEY_BYTES: usize = 32;
/// Bits of a P-256 private key and 128 more, so that reducing them leaves no bias (FIPS 186-5 appendix A.2.1).
const SCALAR_BYTES: usize = 48;

/// An opened lockbox key.
pub struct LockboxKey {
    id: LockboxKeyId,
    kid: String,
    key: SecretBytes,
    wrapping_key: SecretBytes,
    pair: OwnerKey,
}

/// The `cryptattach` member of a sealed lockbox key's protected header.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Context {
    version: u32,
    host: HostName,
    generation: u64,
}

#[derive(Serialize)]
struct Written<'a> {
    lockbox_key: Base64<'a>,
}

#[derive(Deserialize)]
struct Read<'a> {
    lockbox_key: &'a str,
}

/// The `cryptattach` member of a cache entry's protected header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntryContext {
    /// Version of this member: 1.
    pub version: u32,
    /// Seconds since 1970-01-01 UTC at which the store gave the key.
    pub added: u64,
    /// From then on the entry is not used; likewise.
    pub expires: u64,
    /// What the key is bound to, as the store's sealed key said.
    pub key: BoundContext,
    /// Where the key rested in the store at that time.
    pub places: Vec<Place>,
}

/// An opened entry of the cache.
pub struct Entry {
    pub context: EntryContext,
    /// The key, as if it had come from the store.
    pub opened: Opened,
}

impl LockboxKey {
    /// Number of bytes.
    pub const BYTES: usize = KEY_BYTES;

    /// A new random key for a host, made `now` (milliseconds since 1970-01-01 UTC); its generation is later than that of `previous`.
    pub fn random(host: &HostName, previous: Option<u64>, now: u64) -> Result<Self, SealError> {
        let generation = now.max(previous.map_or(1, |previous| previous.saturating_add(1)));
        Self::of(LockboxKeyId { host: host.clone(), generation }, SecretBytes::random(KEY_BYTES)?)
    }

    /// The key of these bytes: [`LockboxKey::BYTES`].
    pub fn of(id: LockboxKeyId, key: SecretBytes) -> Result<Self, SealError> {
        let kid = id.to_string();
        let wrapping_key = hkdf(&key, &format!("cryptattach wrapping key of {kid}"), KEY_BYTES)?;
        let pair =
            OwnerKey::of_p256(key_pair(&hkdf(&key, &format!("cryptattach P-256 key of {kid}"), SCALAR_BYTES)?)?)?;
        Ok(Self { id, kid, key, wrapping_key, pair })
    }

    /// Its host and generation.
    pub fn id(&self) -> &LockboxKeyId {
        &self.id
    }

    /// The bytes, for the kernel's keyring.
    pub fn secret(&self) -> &SecretBytes {
        &self.key
    }

    /// What people and hosts tell it from others by: the RFC 7638 thumbprint of [`LockboxKey::recipient`].
    pub fn fingerprint(&self) -> &str {
        self.pair.kid()
    }

    /// Whom container keys are sealed to for this host.
    pub fn recipient(&self) -> Result<OwnerRecipient, SealError> {
        self.pair.recipient()
    }

    /// Seals it, to the host's identity and to the escrow.
    pub fn seal_to(&self, recipients: &[Box<dyn Recipient>]) -> Result<SealedKey, SealError> {
        let LockboxKeyId { host, generation } = self.id.clone();
        let written = Written { lockbox_key: Base64(&self.key) };
        encrypt(&Context { version: VERSION, host, generation }, &write_json(&written, 1024)?, recipients)
    }

    /// Opens one and checks that it is this host's.
    pub fn open(sealed: &SealedKey, identities: &Identities, host: &HostName) -> Result<Self, SealError> {
        let context: Context = member(sealed)?;
        check_version(context.version)?;
        if context.host != *host {
            return Err(other("host", &context.host, host));
        }
        let content = identities.decrypt(sealed)?;
        let read: Read<'_> = read_json(&content)?;
        let key = decode_bytes(read.lockbox_key)?.filter(|key| key.len() == KEY_BYTES);
        let key = key.ok_or_else(|| SealError::Payload(format!("expected a lockbox key of {KEY_BYTES} bytes")))?;
        Self::of(LockboxKeyId { host: context.host, generation: context.generation }, key)
    }

    /// Closes a key under this lockbox key.
    pub fn close_entry(self: &Arc<Self>, context: &EntryContext, content: &Content) -> Result<SealedKey, SealError> {
        encrypt(context, &content.to_json()?, &[Box::new(self.clone())])
    }

    /// Opens an entry of the cache and checks that it is for what was asked; whether it has expired is the caller's question.
    pub fn open_entry(self: &Arc<Self>, entry: &SealedKey, expected: &Expected) -> Result<Entry, SealError> {
        let context = EntryContext::claimed(entry)?;
        check_version(context.version)?;
        check_context(&context.key, expected)?;
        if let Some(kid) = entry.recipient_kids().find(|kid| *kid != self.kid) {
            return Err(other("lockbox key", &kid, &self.kid));
        }
        let content = Identities::of(vec![Box::new(self.clone())]).decrypt(entry)?;
        let opened = Opened { context: context.key.clone(), content: Content::from_json(&content)? };
        opened.check_volume(expected)?;
        Ok(Entry { context, opened })
    }
}

impl EntryContext {
    /// What an entry claims. Authentic only after it was opened.
    pub fn claimed(entry: &SealedKey) -> Result<Self, MalformedSealedKey> {
        member(entry)
    }
}

fn member<T: for<'de> Deserialize<'de>>(sealed: &SealedKey) -> Result<T, MalformedSealedKey> {
    let member = sealed.protected_header()?.remove("cryptattach").unwrap_or_default();
    serde_json::from_value(member).map_err(|error| MalformedSealedKey::Context(error.to_string()))
}

fn check_version(version: u32) -> Result<(), SealError> {
    match version {
        VERSION => Ok(()),
        _ => Err(SealError::Unsupported(format!("it has version {version}"))),
    }
}

fn other(what: &'static str, is: &impl ToString, asked: &impl ToString) -> SealError {
    SealError::Other { what, is: is.to_string(), asked: asked.to_string() }
}

impl Recipient for Arc<LockboxKey> {
    fn seal(&self, key: &ContentKey) -> Result<JweRecipient, SealError> {
        key_wrap::seal(&self.kid, &self.wrapping_key, key)
    }

    fn shape(&self) -> Shape {
        Shape::Key(self.kid.clone())
    }
}

/// What the key pair opens, and what is closed under the wrapping key.
impl Identity for Arc<LockboxKey> {
    fn alg(&self) -> &str {
        self.pair.alg()
    }

    fn unwrap(&self, encrypted_key: &[u8], header: &JoseHeader) -> Result<Option<ContentKey>, SealError> {
        self.pair.unwrap(encrypted_key, header)
    }

    fn open(&self, entry: &JweRecipient, header: &JoseHeader) -> Option<Result<ContentKey, SealError>> {
        key_wrap::open(&self.kid, &self.wrapping_key, entry, header).or_else(|| self.pair.open(entry, header))
    }

    fn kid(&self) -> &str {
        self.pair.kid()
    }
}

fn hkdf(key: &SecretBytes, info: &str, len: usize) -> Result<SecretBytes, SealError> {
    let mut derived = SecretBytes::zeroed(len)?;
    let mut derive = || -> Result<(), ErrorStack> {
        let mut context = PkeyCtx::new_id(Id::HKDF)?;
        context.derive_init()?;
        context.set_hkdf_md(Md::sha256())?;
        context.set_hkdf_key(key.expose())?;
        context.add_hkdf_info(info.as_bytes())?;
        context.derive(Some(derived.expose_mut())).map(drop)
    };
    derive()?;
    Ok(derived)
}

/// The key pair of random bits, as in FIPS 186-5 appendix A.2.1: d = bits mod (n - 1) + 1.
fn key_pair(bits: &SecretBytes) -> Result<PKey<Private>, ErrorStack> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?;
    let (mut order, mut context) = (BigNum::new()?, BigNumContext::new_secure()?);
    group.order(&mut order, &mut context)?;
    order.sub_word(1)?;
    let (mut bits, mut d) = (BigNum::from_slice(bits.expose())?, BigNum::new_secure()?);
    bits.set_const_time();
    d.set_const_time();
    d.nnmod(&bits, &order, &mut context)?;
    d.add_word(1)?;
    let mut public = EcPoint::new(&group)?;
    public.mul_generator2(&group, &d, &mut context)?;
    let key = EcKey::from_private_components(&group, &d, &public)?;
    bits.clear();
    d.clear();
    PKey::from_ec_key(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::seal::For;
    use crate::{
        base::key::{KeyId, StoreName},
        keys::seal::{ContainerKey, Payload},
    };

    fn host(name: &str) -> HostName {
        name.parse().unwrap()
    }

    fn key(name: &str) -> Arc<LockboxKey> {
        Arc::new(LockboxKey::random(&host(name), None, 1_700_000_000).unwrap())
    }

    fn content() -> Content {
        Content::VolumeKey(Payload { sector_size_bytes: 4096, data_offset_bytes: 16 << 20, ..Payload::random() })
    }

    fn context() -> EntryContext {
        let key = BoundContext {
            version: 1,
            key_id: KeyId::random(),
            container: "cinder".parse().unwrap(),
            volume: None,
            project: None,
            generation: 3,
            created: 0,
        };
        EntryContext { version: 1, added: 10, expires: 20, key, places: vec![Place::path("sealed keys", "/k", true)] }
    }

    fn expected(context: &EntryContext) -> Expected {
        Expected { key_id: context.key.key_id, container: context.key.container.clone(), volume: For::Plain }
    }

    #[test]
    fn opens_on_its_host_only() {
        let (identity, escrow) = (OwnerKey::generate().unwrap(), OwnerKey::generate().unwrap());
        let recipients: [Box<dyn Recipient>; 2] =
            [Box::new(identity.recipient().unwrap()), Box::new(escrow.recipient().unwrap())];
        let made = key("compute-7");
        let sealed = made.seal_to(&recipients).unwrap();
        let ring = Identities::of(vec![Box::new(identity)]);
        let opened = LockboxKey::open(&sealed, &ring, &host("compute-7")).unwrap();
        assert!(opened.id() == made.id() && opened.secret() == made.secret());
        assert_eq!(opened.fingerprint(), made.fingerprint());
        let wrong = LockboxKey::open(&sealed, &ring, &host("compute-8"));
        assert!(matches!(wrong, Err(SealError::Other { what: "host", .. })));
        let stranger = Identities::of(vec![Box::new(OwnerKey::generate().unwrap())]);
        assert!(matches!(LockboxKey::open(&sealed, &stranger, &host("compute-7")), Err(SealError::NotForUs { .. })));
        let saved = Identities::of(vec![Box::new(escrow)]);
        assert!(LockboxKey::open(&sealed, &saved, &host("compute-7")).is_ok());
    }

    #[test]
    fn generations_grow_even_if_the_clock_goes_back() {
        let name = host("a");
        let first = LockboxKey::random(&name, None, 500).unwrap();
        assert_eq!(first.id().generation, 500);
        assert_eq!(LockboxKey::random(&name, Some(500), 400).unwrap().id().generation, 501);
    }

    #[test]
    fn container_keys_open_with_it() {
        let (lockbox, container) = (key("compute-7"), "cinder".parse::<StoreName>().unwrap());
        let kek = ContainerKey::random(&container, None).unwrap();
        let kek = kek.with_host(&host("compute-7"), &lockbox.recipient().unwrap()).unwrap();
        let sealed = kek.seal_to(kek.host_recipients().unwrap(), 0).unwrap();
        assert_eq!(sealed.recipient_kids().collect::<Vec<_>>(), [lockbox.fingerprint()]);
        let id = crate::base::key::ContainerKeyId { container, epoch: kek.epoch() };
        let ring = Identities::of(vec![Box::new(lockbox)]);
        let opened = ContainerKey::open(&sealed, &ring, &id).unwrap();
        assert_eq!(opened.fingerprint().unwrap(), kek.fingerprint().unwrap());
        let other = Identities::of(vec![Box::new(key("compute-8"))]);
        assert!(matches!(ContainerKey::open(&sealed, &other, &id), Err(SealError::NotForUs { .. })));
    }

    #[test]
    fn the_two_derived_keys_are_fixed_by_the_key_and_its_id() {
        let of = |generation, byte| {
            let id = LockboxKeyId { host: host("a"), generation };
            LockboxKey::of(id, SecretBytes::copy_of(&[byte; 32]).unwrap()).unwrap()
        };
        let (one, same, later, other) = (of(1, 7), of(1, 7), of(2, 7), of(1, 8));
        assert!(one.wrapping_key == same.wrapping_key && one.fingerprint() == same.fingerprint());
        for different in [&later, &other] {
            assert!(one.wrapping_key != different.wrapping_key && one.fingerprint() != different.fingerprint());
        }
        // Two implementations of RFC 5869 agree: openssl kdf -keylen 32 -kdfopt digest:SHA256 -kdfopt hexkey:0707...
        // -kdfopt 'info:cryptattach wrapping key of lockbox/a/1' HKDF
        let made = std::process::Command::new("openssl")
            .args(["kdf", "-keylen", "32", "-kdfopt", "digest:SHA256", "-kdfopt"])
            .arg(format!("hexkey:{}", "07".repeat(32)))
            .args(["-kdfopt", "info:cryptattach wrapping key of lockbox/a/1", "HKDF"])
            .output()
            .unwrap();
        let hex: String = one.wrapping_key.expose().iter().map(|byte| format!("{byte:02X}")).collect();
        assert_eq!(String::from_utf8(made.stdout).unwrap().trim().replace(':', ""), hex);
    }

    #[test]
    fn entries_open_for_what_they_say_and_no_other_lockbox() {
        let (lockbox, context, content) = (key("a"), context(), content());
        let entry = SealedKey::from_json(&lockbox.close_entry(&context, &content).unwrap().to_json()).unwrap();
        let opened = lockbox.open_entry(&entry, &expected(&context)).unwrap();
        assert_eq!(opened.context, context);
        let (Content::VolumeKey(is), Content::VolumeKey(was)) = (&opened.opened.content, &content) else { panic!() };
        assert!(is.volume_key == was.volume_key);

        let volume = Expected { volume: For::Luks(uuid::Uuid::new_v4()), ..expected(&context) };
        let key_id = Expected { key_id: KeyId::random(), ..expected(&context) };
        let container = Expected { container: "glance".parse().unwrap(), ..expected(&context) };
        let refused = lockbox.open_entry(&entry, &volume).err();
        assert!(matches!(refused, Some(SealError::OtherVolume { .. })), "{refused:?}");
        for (which, asked) in [("key", key_id), ("container", container)] {
            let refused = lockbox.open_entry(&entry, &asked).err();
            assert!(matches!(refused, Some(SealError::Other { what, .. }) if what == which), "{which}");
        }
        for other in [key("b"), Arc::new(LockboxKey::random(&host("a"), Some(lockbox.id().generation), 0).unwrap())] {
            let refused = other.open_entry(&entry, &expected(&context)).err();
            assert!(matches!(refused, Some(SealError::Other { what: "lockbox key", .. })));
        }
        // A sealed key of the store's is no entry, nor the other way round.
        let plain = crate::keys::seal::seal(&context.key, &content, &[Box::new(lockbox.clone())]).unwrap();
        assert!(matches!(lockbox.open_entry(&plain, &expected(&context)), Err(SealError::Malformed(_))));
    }

    #[test]
    fn a_longer_life_cannot_be_written_into_an_entry() {
        use base64ct::{Base64UrlUnpadded, Encoding};
        let (lockbox, context) = (key("a"), context());
        let mut entry = lockbox.close_entry(&context, &content()).unwrap();
        let header = String::from_utf8(Base64UrlUnpadded::decode_vec(&entry.protected).unwrap()).unwrap();
        let longer = header.replace("\"expires\":20", "\"expires\":99");
        assert_ne!(header, longer);
        entry.protected = Base64UrlUnpadded::encode_string(longer.as_bytes());
        assert!(matches!(lockbox.open_entry(&entry, &expected(&context)), Err(SealError::Tampered)));
    }
}
