//! The keyslots that our token claims, whose passphrase is sealed with the key, and that token itself: what is changed of them
//! on the device.
//!
//! libcryptsetup does it under its lock, both copies; and only if the header on the device is the one that was checked. So the
//! volume may be attached meanwhile.

use either::Either;
use libcryptsetup_rs::{
    CryptDevice, CryptInit, LibcryptErr, TokenInput,
    consts::{flags::CryptVolumeKey, vals::EncryptionFormat},
};
use serde::Serialize;
use serde_json::Value;

use super::{
    CIPHER, Volume, VolumeError,
    copies::Copies,
    library,
    luks::{least_pbkdf, load_header},
    reencryption::{self, State},
    token::{TYPE, Token},
};
use crate::{
    base::key::{KeyReference, KeySize, SecretBytes, VolumeKey},
    sys::device::DeviceError,
};

/// A token of another program: what opens which keyslots. The header's word alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Binding {
    /// "clevis", "systemd-tpm2", ...
    pub kind: String,
    /// Its number.
    pub token: u32,
    pub keyslots: Vec<u32>,
}

impl std::fmt::Display for Binding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let keyslots = self.keyslots.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let keyslots = if keyslots.is_empty() { "none" } else { &keyslots };
        write!(f, "{} (token {}, keyslot {keyslots})", self.kind, self.token)
    }
}

impl Binding {
    fn all(json: &Value) -> Vec<Self> {
        let tokens = json.get("tokens").and_then(Value::as_object).into_iter().flatten();
        let binding = |(number, token): (&String, &Value)| {
            let kind = token.get("type")?.as_str().filter(|kind| *kind != TYPE)?.to_owned();
            let keyslots = token.get("keyslots").and_then(Value::as_array).into_iter().flatten();
            let keyslots = keyslots.filter_map(|keyslot| keyslot.as_str()?.parse().ok()).collect();
            Some(Self { kind, token: number.parse().ok()?, keyslots })
        };
        tokens.filter_map(binding).collect()
    }
}

/// Our token on the device, as libcryptsetup is about to change it.
struct Ours<'a> {
    context: &'a mut CryptDevice,
    number: u32,
    token: Token,
}

impl Ours<'_> {
    fn replace(&mut self, token: Token) -> Result<(), LibcryptErr> {
        let token = serde_json::to_value(token).map_err(LibcryptErr::JsonError)?;
        self.context.token_handle().json_set(TokenInput::ReplaceToken(self.number, &token)).map(drop)
    }
}

impl Volume {
    /// The numbers of the keyslots that our token claims.
    pub fn claimed_keyslots(&self) -> Result<Vec<u32>, VolumeError> {
        let (_, token) = self.our_token()?;
        Ok(token.keyslots.iter().filter_map(|number| number.parse().ok()).collect())
    }

    /// Has the token name another place of the same key. Nothing else is written.
    pub fn move_token(&self, from: &KeyReference, to: &KeyReference) -> Result<(), VolumeError> {
        self.change("write the token to", |ours| {
            let is_from = ours.token.old_reference() == *from;
            let token = ours.token.clone().moved(to);
            is_from.then(|| ours.replace(token)).transpose()
        })
    }

    /// Adds a keyslot for a passphrase of 256 random bits, and has the token claim it, too.
    pub fn add_claimed_keyslot(&self, key: &VolumeKey, passphrase: &SecretBytes) -> Result<(), VolumeError> {
        self.change("add a keyslot to", |ours| {
            ours.context.settings_handle().set_pbkdf_type(&least_pbkdf())?;
            let mut keyslots = ours.context.keyslot_handle();
            keyslots.set_encryption(CIPHER, KeySize::Bits512.bytes())?;
            let (key, flags) = (Some(Either::Left(key.expose())), CryptVolumeKey::empty());
            let number = keyslots.add_by_key(None, key, passphrase.expose(), flags)?;
            let token = ours.token.clone().claiming(number);
            ours.replace(token).map(Some)
        })
    }

    /// Has the token claim a keyslot that is there.
    pub fn claim_keyslot(&self, number: u32) -> Result<(), VolumeError> {
        self.change("write the token to", |ours| {
            let token = ours.token.clone().claiming(number);
            ours.replace(token).map(Some)
        })
    }

    /// Wipes and removes what the token claims but for this keyslot. One that was wiped and not removed is wiped again.
    pub fn keep_claimed_keyslot(&self, kept: u32) -> Result<(), VolumeError> {
        self.change("remove a keyslot from", |ours| {
            let others = ours.token.keyslots.iter().filter_map(|number| number.parse().ok());
            for number in others.filter(|number: &u32| *number != kept).collect::<Vec<_>>() {
                ours.context.keyslot_handle().destroy(number)?;
            }
            Ok(Some(()))
        })
    }

    /// What other programs have bound to it.
    pub fn bindings(&self) -> Result<Vec<Binding>, VolumeError> {
        Ok(self.json()?.map_or_else(Vec::new, |json| Binding::all(&json)))
    }

    /// Removes what another program has bound: its keyslots, wiped, and its token. One that has changed meanwhile stays.
    pub fn remove_binding(&self, binding: &Binding) -> Result<(), VolumeError> {
        self.change("remove a keyslot from", |ours| {
            for number in &binding.keyslots {
                ours.context.keyslot_handle().destroy(*number)?;
            }
            ours.context.token_handle().json_set(TokenInput::RemoveToken(binding.token)).map(|_| Some(()))
        })
    }

    /// Removes our token, and the keyslots that it claims: nobody has their passphrase once its key is deleted.
    pub fn remove_token(&self, reference: &KeyReference) -> Result<(), VolumeError> {
        self.change("remove the token from", |ours| {
            if ours.token.old_reference() != *reference {
                return Ok(None);
            }
            for number in ours.token.keyslots.iter().filter_map(|number| number.parse().ok()) {
                ours.context.keyslot_handle().destroy(number)?;
            }
            ours.context.token_handle().json_set(TokenInput::RemoveToken(ours.number)).map(|_| Some(()))
        })
    }

    /// The header's JSON as it was checked; none if it has none.
    fn json(&self) -> Result<Option<Value>, VolumeError> {
        let Some(luks) = self.luks() else { return Ok(None) };
        let copies =
            Copies::read(luks.image.file()).map_err(DeviceError::io("read the header of", &self.device.path))?;
        Ok(copies.map(|copies| copies.json))
    }

    /// Our token as it was checked, and the whole header.
    fn our_token(&self) -> Result<(Value, Token), VolumeError> {
        let none = || self.no_token("it has none of ours".to_owned());
        let json = self.json()?.ok_or_else(none)?;
        if reencryption::is_rotation(&json) {
            return Err(self.no_token("a rotation of its key has begun".to_owned()));
        }
        let token = reencryption::our_token(&json).map(|(_, token)| token).ok_or_else(none)?;
        Ok((json, token))
    }

    /// Changes the header on the device; `None` says that it is not as expected.
    fn change(
        &self,
        action: &'static str,
        change: impl FnOnce(&mut Ours<'_>) -> Result<Option<()>, LibcryptErr>,
    ) -> Result<(), VolumeError> {
        self.our_token()?;
        let luks = self.luks().ok_or_else(|| self.no_token("it has no header".to_owned()))?;
        let path = luks.detached.as_deref().unwrap_or(&self.device.path);
        let mut is_unfinished = false;
        let changed = library::call(|| {
            let mut context = CryptInit::init(path)?;
            context.context_handle().load::<()>(Some(EncryptionFormat::Luks2), None)?;
            let json = context.status_handle().dump_json()?;
            is_unfinished = reencryption::state(&json) != State::None;
            if is_unfinished || json != load_header(&luks.image)?.status_handle().dump_json()? {
                return Ok(None);
            }
            let Some((number, token)) = reencryption::our_token(&json) else { return Ok(None) };
            let number = number.parse().map_err(|_| LibcryptErr::InvalidConversion)?;
            change(&mut Ours { context: &mut context, number, token })
        });
        let path = path.to_owned();
        match changed {
            Ok(Some(())) => Ok(()),
            // In memory it is finished.
            Ok(None) if is_unfinished => Err(self.no_token("its re-encryption is not finished".to_owned())),
            Ok(None) => Err(VolumeError::HeaderChanged { path }),
            Err(source) if source.errno() == Some(nix::libc::ENOSPC) => {
                Err(self.no_token("its header has no room for it".to_owned()))
            }
            Err(source) => Err(VolumeError::Library { action, path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_others_have_bound_is_told_whatever_is_in_it() {
        let tokens = json!({
            "0": {"type": "cryptattach", "keyslots": ["0"]},
            "1": {"type": "clevis", "keyslots": ["1", "x", 2, "-3", "99999999999"]},
            "2": {"type": "systemd-tpm2", "keyslots": "1"},
            "x": {"type": "other", "keyslots": ["4"]},
            "4": {"keyslots": ["4"]},
            "5": [],
        });
        let found: Vec<_> = Binding::all(&json!({ "tokens": tokens })).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["clevis (token 1, keyslot 1)", "systemd-tpm2 (token 2, keyslot none)"]);
        assert!(Binding::all(&json!({"tokens": []})).is_empty() && Binding::all(&json!(null)).is_empty());
    }
}
