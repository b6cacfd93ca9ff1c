//! The token: found, logged in to, asked.

use std::io::Write;

use base64ct::{Base64UrlUnpadded, Encoding};
use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    error::{Error, RvError},
    mechanism::{
        Mechanism, MechanismType,
        elliptic_curve::{EcKdf, Ecdh1DeriveParams},
        rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource},
    },
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
    session::{Session, UserType},
    slot::{Slot, TokenInfo},
    types::RawAuthPin,
};
use openssl::{bn::BigNum, error::ErrorStack, pkey::PKey, rsa::Rsa, x509::X509};
use serde_json::json;
use zeroize::Zeroizing;

use crate::{
    oaep,
    refusal::{Refusal, Wanting, Why},
    request::{Ask, Data, Pin, Request},
};
use cryptattach_pkcs11::Uri;

/// A key agreement's result on P-256.
const Z_BYTES: usize = 32;
/// The most tokens or keys that are named in an error.
const MOST_NAMED: usize = 8;
/// SubjectPublicKeyInfo of a key on P-256, up to the point (RFC 5480).
const P256_HEAD: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
/// Where the curve's name stands in it.
const P256_NAME: std::ops::Range<usize> = 13..23;

/// What is asked for.
pub fn answer(request: &Request, pin: Option<Pin>, out: &mut impl Write) -> Result<Zeroizing<Vec<u8>>, Refusal> {
    let module = load(request)?;
    let (slot, info) = find(&module, &request.uri)?;
    let session = module.open_ro_session(slot).map_err(|error| failed("open a session", &error))?;
    let token = Token { uri: &request.uri, info, session };
    match &request.ask {
        Ask::Public => token.public(is_hardware(&module, slot)),
        Ask::Decrypt(Data(encrypted)) => {
            token.log_in(pin, request.attended, out)?;
            token.decrypt(token.private_key()?, encrypted)
        }
        Ask::Agree(Data(point)) => {
            token.log_in(pin, request.attended, out)?;
            token.agree(token.private_key()?, point)
        }
    }
}

fn load(request: &Request) -> Result<Pkcs11, Refusal> {
    let module = request.module.display();
    let load = || {
        let loaded = Pkcs11::new(&request.module)?;
        // A module that another one has loaded in this process may say that it is initialized.
        match loaded.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) | Err(Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(loaded),
            Err(error) => Err(error),
        }
    };
    load().map_err(|error| match error {
        Error::LibraryLoading(_) | Error::MissingSymbol(_) | Error::NullFunctionPointer => {
            let next = "check 'module' of the leaf, or 'module-path' of its URI";
            Refusal::new(
                Why::Config,
                format!("{module} is no PKCS#11 module that can be loaded: {}", told(&error)),
                next,
            )
        }
        error => failed(&format!("start the module {module}"), &error),
    })
}

fn failed(what: &str, error: &Error) -> Refusal {
    let next = "check the token with 'pkcs11-tool --list-slots'";
    Refusal::new(Why::Token, format!("cannot {what}: {}", told(error)), next)
}

/// cryptoki quotes paragraphs of the standard: the names are enough.
fn told(error: &Error) -> String {
    match error {
        Error::Pkcs11(value, function) => format!("C_{function:?} returns {value:?}"),
        error => error.to_string(),
    }
}

/// The key would not do it, whatever it was given.
fn is_unfit(error: &Error) -> bool {
    use RvError::{
        AttributeValueInvalid, KeyFunctionNotPermitted, KeyTypeInconsistent, MechanismInvalid, TemplateIncomplete,
        TemplateInconsistent, UserNotLoggedIn,
    };
    // Logged in as we are, the last one is of a key that wants the PIN at each use.
    let unfit = |value: &RvError| {
        matches!(
            value,
            AttributeValueInvalid
                | KeyFunctionNotPermitted
                | KeyTypeInconsistent
                | MechanismInvalid
                | TemplateIncomplete
                | TemplateInconsistent
                | UserNotLoggedIn
        )
    };
    matches!(error, Error::Pkcs11(value, _) if unfit(value))
}

/// What is decrypted may be wrong; anything else is of the token.
fn is_of_data(error: &Error) -> bool {
    use RvError::{
        DataInvalid, DataLenRange, EncryptedDataInvalid, EncryptedDataLenRange, FunctionFailed, GeneralError,
    };
    let of_data = |value: &RvError| {
        let invalid = matches!(value, DataInvalid | DataLenRange | EncryptedDataInvalid | EncryptedDataLenRange);
        invalid || matches!(value, FunctionFailed | GeneralError)
    };
    matches!(error, Error::Pkcs11(value, _) if of_data(value))
}

/// The token is gone, or what leads to it: it has tried no PIN.
fn is_of_connection(error: &Error) -> bool {
    use RvError::{
        CryptokiNotInitialized, DeviceRemoved, SessionClosed, SessionHandleInvalid, TokenNotPresent, TokenNotRecognized,
    };
    let of_connection = |value: &RvError| {
        matches!(
            value,
            CryptokiNotInitialized
                | DeviceRemoved
                | SessionClosed
                | SessionHandleInvalid
                | TokenNotPresent
                | TokenNotRecognized
        )
    };
    matches!(error, Error::Pkcs11(value, _) if of_connection(value))
}

fn unfit(what: &str, error: &Error) -> Refusal {
    let next = "use a key of the token that may derive (on P-256) or decrypt (RSA), without a PIN for each use";
    Refusal::new(Why::Config, format!("the token's key cannot {what}: {}", told(error)), next)
}

/// The only token that fits.
fn find(module: &Pkcs11, uri: &Uri) -> Result<(Slot, TokenInfo), Refusal> {
    let slots = module.get_slots_with_token().map_err(|error| failed("list the tokens", &error))?;
    let tokens = slots.into_iter().filter_map(|slot| Some((slot, module.get_token_info(slot).ok()?)));
    // One that was never initialized has neither keys nor a name.
    let all: Vec<_> = tokens.filter(|(_, info)| info.token_initialized()).collect();
    let names = |tokens: &[(Slot, TokenInfo)]| named(tokens, |(_, info)| name(info));
    let (mut fitting, others): (Vec<_>, Vec<_>) = all.into_iter().partition(|(slot, info)| fits(uri, *slot, info));
    match fitting.len() {
        1 => Ok(fitting.remove(0)),
        0 if others.is_empty() => Err(Refusal::new(Why::Token, "no token is there", "insert it")),
        0 => {
            let text = format!("no token fits the URI; there are: {}", names(&others));
            Err(Refusal::new(Why::Token, text, "insert the token, or correct the URI"))
        }
        number => {
            let text = format!("{number} tokens fit the URI: {}", names(&fitting));
            Err(Refusal::new(Why::Config, text, "name one by its serial: 'serial=...' in the URI"))
        }
    }
}

fn fits(uri: &Uri, slot: Slot, info: &TokenInfo) -> bool {
    let is = |wanted: &Option<String>, has: &str| wanted.as_ref().is_none_or(|wanted| wanted == has);
    is(&uri.token, info.label())
        && is(&uri.serial, info.serial_number())
        && is(&uri.manufacturer, info.manufacturer_id())
        && is(&uri.model, info.model())
        && uri.slot.is_none_or(|wanted| wanted == slot.id())
}

fn name(info: &TokenInfo) -> String {
    format!("'{}' (serial {})", info.label(), info.serial_number())
}

fn named<T>(all: &[T], name: impl Fn(&T) -> String) -> String {
    let mut names: Vec<_> = all.iter().take(MOST_NAMED).map(name).collect();
    if all.len() > MOST_NAMED {
        names.push("...".to_owned());
    }
    names.join(", ")
}

/// A module that does not say is taken for software.
fn is_hardware(module: &Pkcs11, slot: Slot) -> bool {
    module.get_slot_info(slot).is_ok_and(|info| info.hardware_slot())
}

struct Token<'a> {
    uri: &'a Uri,
    info: TokenInfo,
    session: Session,
}

impl Token<'_> {
    fn log_in(&self, pin: Option<Pin>, attended: bool, out: &mut impl Write) -> Result<(), Refusal> {
        let info = &self.info;
        let refused = |why, what: &str, next: &str| {
            Err(Refusal::new(why, format!("the PIN of the token {} {what}", name(info)), next))
        };
        if !info.login_required() {
            return Ok(());
        }
        if info.user_pin_locked() {
            return refused(Why::Locked, "is locked", "unlock it with the token's own tool");
        }
        let keypad = info.protected_authentication_path();
        if pin.is_none() && !(keypad && attended) {
            let is = format!("{}\0{}\0{}", info.manufacturer_id(), info.model(), info.serial_number());
            let (count_low, final_try) = (info.user_pin_count_low(), info.user_pin_final_try());
            let wanting = Wanting { label: info.label().to_owned(), is, count_low, final_try, keypad };
            let refusal = Refusal::new(Why::NeedsPin, format!("the token {} wants its PIN", name(info)), "");
            return Err(Refusal { token: Some(wanting), ..refusal });
        }
        if !attended && (info.user_pin_count_low() || info.user_pin_final_try()) {
            let next = "type it once at a terminal: 'cryptattach test DEVICE'";
            return refused(Why::Locked, "is not tried unattended: a wrong one was tried before", next);
        }
        let logged_in = match pin {
            Some(mut pin) => {
                let pin = RawAuthPin::new(Box::new(std::mem::take(&mut *pin)));
                self.session.login_with_raw(UserType::User, &pin)
            }
            None => self.session.login(UserType::User, None),
        };
        match logged_in {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {
                let told = out.write_all(b"login\n");
                told.map_err(|error| Refusal::new(Why::System, error.to_string(), ""))
            }
            Err(Error::Pkcs11(RvError::PinIncorrect | RvError::PinInvalid | RvError::PinLenRange, _)) => {
                refused(Why::WrongPin, "is wrong", "check the PIN before the token locks it")
            }
            Err(Error::Pkcs11(RvError::PinLocked, _)) => {
                refused(Why::Locked, "is locked", "unlock it with the token's own tool")
            }
            Err(error) if is_of_connection(&error) => Err(failed("log in to the token", &error)),
            // Some tokens say no more of a wrong PIN.
            Err(error) => {
                let what = format!("may be wrong: {}", told(&error));
                refused(Why::WrongPin, &what, "check the PIN before the token locks it")
            }
        }
    }

    fn objects(&self, class: ObjectClass) -> Result<Vec<ObjectHandle>, Refusal> {
        let label = self.uri.object.as_ref().map(|label| Attribute::Label(label.clone().into_bytes()));
        let id = self.uri.id.clone().map(Attribute::Id);
        let template: Vec<_> = [Attribute::Class(class)].into_iter().chain(label).chain(id).collect();
        self.session.find_objects(&template).map_err(|error| failed("look for the key", &error))
    }

    /// The only one that fits.
    fn one(&self, what: &str, objects: &[ObjectHandle]) -> Result<ObjectHandle, Refusal> {
        if let [object] = objects {
            return Ok(*object);
        }
        let keys = named(objects, |object| self.object_name(*object));
        let (text, next) = match objects.len() {
            0 => (format!("no {what} fits the URI"), "'pkcs11-tool --login --list-objects' shows what there is"),
            number => (format!("{number} {what}s fit the URI: {keys}"), "name one by its id: 'id=%..' in the URI"),
        };
        Err(Refusal::new(Why::Config, format!("{text} (token {})", name(&self.info)), next))
    }

    fn object_name(&self, object: ObjectHandle) -> String {
        let (mut label, mut id) = (String::new(), String::new());
        let wanted = [AttributeType::Label, AttributeType::Id];
        for attribute in self.session.get_attributes(object, &wanted).unwrap_or_default() {
            match attribute {
                Attribute::Label(bytes) => label = String::from_utf8_lossy(&bytes).into_owned(),
                Attribute::Id(bytes) => id = bytes.iter().map(|byte| format!("%{byte:02x}")).collect(),
                _ => {}
            }
        }
        format!("'{label}' (id {id})")
    }

    fn private_key(&self) -> Result<ObjectHandle, Refusal> {
        self.one("private key", &self.objects(ObjectClass::PRIVATE_KEY)?)
    }

    fn decrypt(&self, key: ObjectHandle, encrypted: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let empty = PkcsOaepSource::empty();
        let oaep = PkcsOaepParams::new(MechanismType::SHA256, PkcsMgfType::MGF1_SHA256, empty);
        let opened = match self.session.decrypt(&Mechanism::RsaPkcsOaep(oaep), key, encrypted) {
            Ok(message) => Some(Zeroizing::new(message)),
            Err(Error::Pkcs11(
                RvError::ArgumentsBad | RvError::MechanismParamInvalid | RvError::MechanismInvalid,
                _,
            )) => self.decrypt_raw(key, encrypted)?,
            Err(error) => return Err(self.not_decrypted(&error)),
        };
        opened.filter(|message| message.len() == oaep::MESSAGE).ok_or_else(not_opened)
    }

    /// SoftHSM before 2.7 and others know OAEP with SHA-1 only: the padding is then ours to take off.
    fn decrypt_raw(&self, key: ObjectHandle, encrypted: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, Refusal> {
        let block = self.session.decrypt(&Mechanism::RsaX509, key, encrypted);
        let block = Zeroizing::new(block.map_err(|error| self.not_decrypted(&error))?);
        // Some leave zeros out in front.
        let mut padded = Zeroizing::new(Vec::with_capacity(encrypted.len()));
        padded.resize(encrypted.len().saturating_sub(block.len()), 0);
        padded.extend_from_slice(&block);
        Ok(oaep::unpad(&padded))
    }

    fn not_decrypted(&self, error: &Error) -> Refusal {
        match error {
            error if is_unfit(error) => unfit("decrypt", error),
            // The same for all that is wrong with the data: whoever writes them learns nothing.
            error if is_of_data(error) => not_opened(),
            error => failed("decrypt", error),
        }
    }

    fn agree(&self, key: ObjectHandle, point: &[u8]) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let mechanism = Mechanism::Ecdh1Derive(Ecdh1DeriveParams::new(EcKdf::null(), point));
        let readable = [
            Attribute::Class(ObjectClass::SECRET_KEY),
            Attribute::KeyType(KeyType::GENERIC_SECRET),
            Attribute::ValueLen(32.into()),
            Attribute::Sensitive(false),
            Attribute::Extractable(true),
            Attribute::Token(false),
        ];
        let derived = self.session.derive_key(&mechanism, key, &readable);
        let z = derived.and_then(|z| self.session.get_attributes(z, &[AttributeType::Value]));
        let what = "agree on a key by ECDH";
        let z = z.map_err(|error| if is_unfit(&error) { unfit(what, &error) } else { failed(what, &error) })?;
        let z = z.into_iter().find_map(|attribute| match attribute {
            Attribute::Value(value) => Some(Zeroizing::new(value)),
            _ => None,
        });
        z.filter(|z| z.len() == Z_BYTES).ok_or_else(not_opened)
    }

    /// `{"key": SubjectPublicKeyInfo as base64url, "hardware", "token"}`
    fn public(&self, hardware: bool) -> Result<Zeroizing<Vec<u8>>, Refusal> {
        let keys = self.objects(ObjectClass::PUBLIC_KEY)?;
        let certificates = if keys.is_empty() { self.objects(ObjectClass::CERTIFICATE)? } else { Vec::new() };
        let key = match certificates.is_empty() {
            true => self.public_key(self.one("public key", &keys)?)?,
            false => self.of_certificate(self.one("certificate", &certificates)?)?,
        };
        let key = key.ok_or_else(|| {
            let text = format!("the public key is neither RSA nor on P-256 (token {})", name(&self.info));
            Refusal::new(Why::Config, text, "use another key")
        })?;
        let key = Base64UrlUnpadded::encode_string(&key);
        let answer = json!({"key": key, "hardware": hardware, "token": self.info.label()});
        Ok(Zeroizing::new(answer.to_string().into_bytes()))
    }

    fn attributes(&self, object: ObjectHandle, wanted: &[AttributeType]) -> Result<Vec<Attribute>, Refusal> {
        self.session.get_attributes(object, wanted).map_err(|error| failed("read the public key", &error))
    }

    fn public_key(&self, object: ObjectHandle) -> Result<Option<Vec<u8>>, Refusal> {
        use AttributeType::{EcParams, EcPoint, Modulus, PublicExponent};
        let kind = self.attributes(object, &[AttributeType::KeyType])?;
        let (mut first, mut second) = (Vec::new(), Vec::new());
        let wanted = match kind.first() {
            Some(Attribute::KeyType(KeyType::RSA)) => [Modulus, PublicExponent],
            Some(Attribute::KeyType(KeyType::EC)) => [EcParams, EcPoint],
            _ => return Ok(None),
        };
        for attribute in self.attributes(object, &wanted)? {
            match attribute {
                Attribute::Modulus(bytes) | Attribute::EcParams(bytes) => first = bytes,
                Attribute::PublicExponent(bytes) | Attribute::EcPoint(bytes) => second = bytes,
                _ => {}
            }
        }
        Ok(if wanted[0] == Modulus { rsa(&first, &second).ok() } else { p256(&first, &second) })
    }

    fn of_certificate(&self, object: ObjectHandle) -> Result<Option<Vec<u8>>, Refusal> {
        let value = self.attributes(object, &[AttributeType::Value])?;
        Ok(value.iter().find_map(|attribute| match attribute {
            Attribute::Value(der) => X509::from_der(der).and_then(|of| of.public_key()?.public_key_to_der()).ok(),
            _ => None,
        }))
    }
}

fn not_opened() -> Refusal {
    let next = "check that the URI names the private key of the leaf's public key";
    Refusal::new(Why::Key, "the token's key does not open the leaf", next)
}

fn rsa(modulus: &[u8], exponent: &[u8]) -> Result<Vec<u8>, ErrorStack> {
    let key = Rsa::from_public_components(BigNum::from_slice(modulus)?, BigNum::from_slice(exponent)?)?;
    PKey::from_rsa(key)?.public_key_to_der()
}

/// The point is in an OCTET STRING (PKCS#11 v2.40, section 2.3.3); some tokens give it bare.
fn p256(curve: &[u8], point: &[u8]) -> Option<Vec<u8>> {
    let point = match point {
        [0x04, 65, bare @ ..] if bare.len() == 65 => bare,
        bare => bare,
    };
    let fits = curve == &P256_HEAD[P256_NAME] && point.len() == 65 && point[0] == 0x04;
    fits.then(|| [&P256_HEAD, point].concat())
}

#[cfg(test)]
mod tests {
    use openssl::{
        bn::BigNumContext,
        ec::{EcGroup, EcKey, PointConversionForm},
        nid::Nid,
    };

    use super::*;

    #[test]
    fn a_public_key_is_what_libcrypto_says() {
        let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
        let key = EcKey::generate(&group).unwrap();
        let mut context = BigNumContext::new().unwrap();
        let point = key.public_key().to_bytes(&group, PointConversionForm::UNCOMPRESSED, &mut context).unwrap();
        let der = PKey::from_ec_key(key).unwrap().public_key_to_der().unwrap();
        let curve = &P256_HEAD[P256_NAME];
        assert_eq!(p256(curve, &point), Some(der.clone()));
        assert_eq!(p256(curve, &[&[4, 65], &point[..]].concat()), Some(der));
        assert_eq!((p256(&curve[1..], &point), p256(curve, &point[1..]), p256(curve, &[])), (None, None, None));

        let key = Rsa::generate(2048).unwrap();
        let der = rsa(&key.n().to_vec(), &key.e().to_vec()).unwrap();
        assert_eq!(der, PKey::from_rsa(key).unwrap().public_key_to_der().unwrap());
    }
}
