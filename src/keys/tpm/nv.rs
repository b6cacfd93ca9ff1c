//! The TPM's NV memory: indices that belong to the owner, who writes them, and that anybody reads.
//!
//! Nothing rests on an answer of a read: what is kept here is sealed, and is verified when it is opened. What the owner does is
//! authenticated, lest the owner's password is on the wires; and so is the lock at the end of a boot, lest somebody there
//! swallows it.

use std::ops::RangeInclusive;

use tss_esapi::constants::tss;

use super::{Handle, Name, Tpm, TpmError, commands::NvPublic, error::if_there};
use crate::base::key::SecretBytes;

/// Anyone reads, by the empty password; the owner writes. No dictionary attack protection, for there is nothing to guess. Bits
/// of TPMA_NV (TPM 2.0 Part 2, section 13.4).
pub(super) const OWNERS_TO_READ: u32 = OWNER_WRITE | OWNER_READ | AUTH_READ | NO_DA;
pub(super) const OWNER_WRITE: u32 = 1 << 1;
const OWNER_READ: u32 = 1 << 17;
const AUTH_READ: u32 = 1 << 18;
const NO_DA: u32 = 1 << 25;
/// The TPM sets it at the first write; it is part of the name.
pub(super) const WRITTEN: u32 = 1 << 29;
/// Nobody reads until the next reset.
const READ_LOCKED: u32 = 1 << 28;
/// It may be locked so.
const READ_ST_CLEAR: u32 = 1 << 31;
/// Those of an index that holds bytes.
const ATTRIBUTES: u32 = OWNERS_TO_READ | READ_ST_CLEAR;

/// What a TPM takes that does not tell (PC Client Platform TPM Profile 1.05, sections 4.6 and 4.7).
const LEAST_PART: u16 = 512;
const LEAST_INDEX: u16 = 1664;
/// The most that libtss2's structures hold.
const MOST_PART: u16 = 2048;

/// NV memory, with what the chip says of its limits.
pub struct NvMemory<'t> {
    tpm: &'t Tpm,
    /// The most bytes of one command.
    part: u16,
    largest: u16,
}

/// An NV index, as it was when it was looked at.
pub struct NvIndex {
    number: u32,
    public: NvPublic,
    head: Vec<u8>,
}

/// The owner, who may write, in an authenticated session.
pub struct NvOwner<'t> {
    session: Handle<'t>,
}

impl NvOwner<'_> {
    pub(super) fn session(&self) -> &Handle<'_> {
        &self.session
    }
}

impl NvIndex {
    /// Its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Its size.
    pub fn bytes(&self) -> u16 {
        self.public.bytes
    }

    /// Its first bytes; none if nobody reads it now, or it is not ours.
    pub fn head(&self) -> &[u8] {
        &self.head
    }

    /// Whether it was made as we make them. What others have made is left alone.
    pub fn is_ours(&self) -> bool {
        self.public.attributes & !(WRITTEN | READ_LOCKED) == ATTRIBUTES
    }

    /// Whether something was written to it.
    pub fn is_written(&self) -> bool {
        self.public.attributes & WRITTEN != 0
    }

    /// Whether nobody reads it until the next reset.
    pub fn is_locked(&self) -> bool {
        self.public.attributes & READ_LOCKED != 0
    }
}

impl<'t> NvMemory<'t> {
    /// The NV memory of a TPM.
    pub fn of(tpm: &'t Tpm) -> Result<Self, TpmError> {
        let property = |property, unless_told: u16| {
            let told = tpm.esys().property(property)?;
            Ok::<_, TpmError>(u16::try_from(told).ok().filter(|told| *told > 0).unwrap_or(unless_told))
        };
        let part = property(tss::TPM2_PT_NV_BUFFER_MAX, LEAST_PART)?.min(MOST_PART);
        Ok(Self { tpm, part, largest: property(tss::TPM2_PT_NV_INDEX_MAX, LEAST_INDEX)? })
    }

    /// The most bytes of an index.
    pub fn largest(&self) -> u16 {
        self.largest
    }

    /// The numbers of the indices in a range, in order.
    pub fn numbers(&self, range: &RangeInclusive<u32>) -> Result<Vec<u32>, TpmError> {
        let (mut numbers, mut from) = (Vec::new(), *range.start());
        loop {
            let (told, more) = self.tpm.esys().nv_indices(from)?;
            let last = told.last().copied();
            numbers.extend(told.into_iter().filter(|number| *number >= from && range.contains(number)));
            match last {
                Some(last) if more && last >= from && last < *range.end() => from = last + 1,
                _ => return Ok(numbers),
            }
        }
    }

    /// An index, and its first bytes, up to so many; `None` if it is not there, or not any more.
    pub fn look(&self, number: u32, head: u16) -> Result<Option<NvIndex>, TpmError> {
        if_there(|| {
            let handle = self.handle(number)?;
            // Others may have made one in our range whose name is not under SHA-256.
            let (public, _) = self.tpm.esys().nv_public_of_any(&handle, None)?;
            let mut index = NvIndex { number, public, head: Vec::new() };
            if index.is_ours() && index.is_written() && !index.is_locked() {
                index.head = self.tpm.esys().nv_read(&handle, head.min(index.bytes()), 0)?;
            }
            Ok(index)
        })
    }

    /// All bytes of an index; `None` if it is not there any more.
    pub fn read(&self, index: &NvIndex) -> Result<Option<Vec<u8>>, TpmError> {
        if_there(|| self.tpm.esys().nv_read_all(&self.handle(index.number)?, index.bytes(), self.part))
    }

    /// Held for one step only: libtss2 has one record of an index, which the first handle to go takes with it.
    fn handle(&self, number: u32) -> Result<Handle<'_>, TpmError> {
        self.tpm.esys().resident_at(number)
    }

    /// The owner, with this password if one is set.
    pub fn owner(&self, password: Option<&SecretBytes>, root: Option<Name>) -> Result<NvOwner<'t>, TpmError> {
        let session = self.tpm.audit_session(root)?;
        if let Some(password) = password {
            self.tpm.esys().set_owner_password(password)?;
        }
        Ok(NvOwner { session })
    }

    /// Makes an index.
    pub fn define(&self, owner: &NvOwner<'_>, number: u32, bytes: u16) -> Result<(), TpmError> {
        self.tpm.esys().nv_define(number, ATTRIBUTES, bytes, Some(&owner.session)).map(drop)
    }

    /// Writes all of an index, its parts from the last to the first: whoever sees the first bytes sees all. Then reads it back.
    pub fn fill(&self, owner: &NvOwner<'_>, number: u32, bytes: &[u8]) -> Result<(), TpmError> {
        let handle = self.handle(number)?;
        for (number, part) in bytes.chunks(self.part.into()).enumerate().rev() {
            let offset = (number * usize::from(self.part)) as u16;
            self.tpm.esys().nv_write(&handle, part, offset, &owner.session)?;
        }
        let is_there = self.tpm.esys().nv_read_all(&handle, bytes.len() as u16, self.part)? == bytes;
        if is_there { Ok(()) } else { Err(TpmError::Answer { command: "NV_Read" }) }
    }

    /// Removes an index.
    pub fn undefine(&self, owner: &NvOwner<'_>, number: u32) -> Result<(), TpmError> {
        self.tpm.esys().nv_undefine(self.handle(number)?, &owner.session)
    }

    /// Lets nobody read an index until the next reset, by the TPM's own word where the storage root key is pinned.
    pub fn lock_reads(&self, index: &NvIndex, root: Option<Name>) -> Result<(), TpmError> {
        let (esys, session) = (self.tpm.esys(), self.tpm.audit_session(root)?);
        let handle = self.handle(index.number)?;
        if !index.is_locked() {
            esys.nv_read_lock(&handle, &session)?;
        }
        let (public, _) = esys.nv_public(&handle, Some(&session))?;
        if public.attributes & READ_LOCKED != 0 { Ok(()) } else { Err(TpmError::Answer { command: "NV_ReadLock" }) }
    }
}
