//! Commands that read and change what the TPM remembers: PCRs, NV counters, and its own properties.
#![allow(unsafe_code)] // calls into libtss2, and the fields of its unions

use std::ptr::null_mut;

use tss_esapi::{constants::tss, tss2_esys as sys};

use super::{
    super::{
        Digest, Name, PcrValues, TpmError,
        esys::{Esys, Handle, NONE, OWNER, PASSWORD, SHA256, TpmAnswer, buffer, command, sized},
        pcr,
    },
    take,
};
use crate::base::pcr_set::PcrSet;

/// The most handles of one answer: what libtss2's structure holds (TPM2_MAX_CAP_HANDLES).
const MOST_HANDLES: u32 = 254;

/// What the TPM says of an NV index.
pub struct NvPublic {
    /// TPMA_NV (TPM 2.0 Part 2, section 13.4).
    pub attributes: u32,
    pub bytes: u16,
}

impl Esys {
    /// Extends a PCR by a SHA-256 digest. With a session nobody can answer in the TPM's place.
    pub fn pcr_extend(&self, pcr: u8, digest: &Digest, session: Option<&Handle<'_>>) -> Result<(), TpmError> {
        let mut values = sys::TPML_DIGEST_VALUES { count: 1, ..Default::default() };
        values.digests[0] = sys::TPMT_HA { hashAlg: SHA256, digest: sys::TPMU_HA { sha256: *digest } };
        let authorization = session.map_or(PASSWORD, Handle::tr);
        command!(
            self,
            Esys_PCR_Extend_Async(u32::from(pcr), authorization, NONE, NONE, &values),
            Esys_PCR_Extend_Finish()
        )
    }

    /// The values of PCRs in the SHA-256 bank. Those that the bank does not have are left out. With a session the answer is
    /// the TPM's own; without one anybody between could have given it.
    pub fn pcr_read(&self, pcrs: PcrSet, session: Option<&Handle<'_>>) -> Result<PcrValues, TpmError> {
        let authentic = session.map_or(NONE, Handle::tr);
        let (mut left, mut values) = (pcrs, PcrValues::default());
        // The TPM answers with eight values at most.
        while !left.is_empty() {
            let selection = pcr::selection(left);
            let (mut counter, mut read, mut digests) = (0, null_mut(), null_mut());
            command!(
                self,
                Esys_PCR_Read_Async(authentic, NONE, NONE, &selection),
                Esys_PCR_Read_Finish(&mut counter, &mut read, &mut digests)
            )?;
            let (read, digests) = (take!(self, "PCR_Read", read)?, take!(self, "PCR_Read", digests)?);
            let read = pcr::of_selection(&read);
            if read.is_empty() {
                break;
            }
            if !read.without(left).is_empty() {
                return Err(TpmError::Answer { command: "PCR_Read" });
            }
            for (pcr, digest) in read.iter().zip(&digests.digests) {
                let value = sized(digest.size, &digest.buffer).try_into();
                values.insert(pcr, value.map_err(|_| TpmError::Answer { command: "PCR_Read" })?);
            }
            left = left.without(read);
        }
        Ok(values)
    }

    /// Makes an NV index of the owner's, of so many bytes. With a session whoever listens does not learn the owner's password.
    pub fn nv_define(
        &self,
        index: u32,
        attributes: u32,
        bytes: u16,
        session: Option<&Handle<'_>>,
    ) -> Result<Handle<'_>, TpmError> {
        let (authorization, mut tr) = (buffer(&[])?, NONE);
        let (owner, auth_policy) = (session.map_or(PASSWORD, Handle::tr), buffer(&[])?);
        let nv_public = sys::TPMS_NV_PUBLIC {
            nvIndex: index,
            nameAlg: SHA256,
            attributes,
            authPolicy: auth_policy,
            dataSize: bytes,
        };
        let public = sys::TPM2B_NV_PUBLIC { size: 0, nvPublic: nv_public };
        command!(
            self,
            Esys_NV_DefineSpace_Async(OWNER, owner, NONE, NONE, &authorization, &public),
            Esys_NV_DefineSpace_Finish(&mut tr)
        )?;
        Ok(self.resident(tr))
    }

    /// Removes an NV index, and what is in it; `owner` is a session.
    pub fn nv_undefine(&self, index: Handle<'_>, owner: &Handle<'_>) -> Result<(), TpmError> {
        command!(
            self,
            Esys_NV_UndefineSpace_Async(OWNER, index.tr(), owner.tr(), NONE, NONE),
            Esys_NV_UndefineSpace_Finish()
        )?;
        // libtss2 has closed its record, which other handles of the same index may share.
        std::mem::forget(index);
        Ok(())
    }

    /// What the TPM says of an NV index, and its name, computed from that. With a session the answer is the TPM's own.
    pub fn nv_public(&self, index: &Handle<'_>, session: Option<&Handle<'_>>) -> Result<(NvPublic, Name), TpmError> {
        let (public, name) = self.nv_public_of_any(index, session)?;
        Ok((public, name.ok_or(TpmError::Answer { command: "NV_ReadPublic" })?))
    }

    /// The same of an index that others may have made: `None` for a name that is not under SHA-256.
    pub fn nv_public_of_any(
        &self,
        index: &Handle<'_>,
        session: Option<&Handle<'_>>,
    ) -> Result<(NvPublic, Option<Name>), TpmError> {
        let (mut nv_public, mut name) = (null_mut(), null_mut());
        let authentic = session.map_or(NONE, Handle::tr);
        command!(
            self,
            Esys_NV_ReadPublic_Async(index.tr(), authentic, NONE, NONE),
            Esys_NV_ReadPublic_Finish(&mut nv_public, &mut name)
        )?;
        let (public, name) = (take!(self, "NV_ReadPublic", nv_public)?, take!(self, "NV_ReadPublic", name)?);
        let public = NvPublic { attributes: public.nvPublic.attributes, bytes: public.nvPublic.dataSize };
        Ok((public, Name::from_bytes(sized(name.size, &name.name))))
    }

    /// The NV indices from `first` on, in order, as many as the TPM tells at once; and whether there are more.
    pub fn nv_indices(&self, first: u32) -> Result<(Vec<u32>, bool), TpmError> {
        let (mut more, mut data) = (0, null_mut());
        command!(
            self,
            Esys_GetCapability_Async(NONE, NONE, NONE, tss::TPM2_CAP_HANDLES, first, MOST_HANDLES),
            Esys_GetCapability_Finish(&mut more, &mut data)
        )?;
        let data = take!(self, "GetCapability", data)?;
        // SAFETY: the member of the capability that was asked for; all are plain numbers.
        let handles = unsafe { data.data.handles };
        Ok((handles.handle.iter().take(handles.count as usize).copied().collect(), more != 0))
    }

    /// Writes a part of an NV index of the owner's; `owner` is a session.
    pub fn nv_write(&self, index: &Handle<'_>, part: &[u8], offset: u16, owner: &Handle<'_>) -> Result<(), TpmError> {
        let mut data = sys::TPM2B_MAX_NV_BUFFER { size: part.len() as u16, ..Default::default() };
        data.buffer.get_mut(..part.len()).ok_or(TpmError::TooLong)?.copy_from_slice(part);
        command!(
            self,
            Esys_NV_Write_Async(OWNER, index.tr(), owner.tr(), NONE, NONE, &data, offset),
            Esys_NV_Write_Finish()
        )
    }

    /// Reads a part of an NV index, by the empty password of the index itself.
    pub fn nv_read(&self, index: &Handle<'_>, bytes: u16, offset: u16) -> Result<Vec<u8>, TpmError> {
        let mut data = null_mut();
        command!(
            self,
            Esys_NV_Read_Async(index.tr(), index.tr(), PASSWORD, NONE, NONE, bytes, offset),
            Esys_NV_Read_Finish(&mut data)
        )?;
        let data = take!(self, "NV_Read", data)?;
        let part = sized(data.size, &data.buffer);
        if part.len() == usize::from(bytes) { Ok(part.to_vec()) } else { Err(TpmError::Answer { command: "NV_Read" }) }
    }

    /// Reads an NV index of this size from its beginning, `part` bytes at once.
    pub fn nv_read_all(&self, index: &Handle<'_>, bytes: u16, part: u16) -> Result<Vec<u8>, TpmError> {
        let mut all = Vec::new();
        while all.len() < usize::from(bytes) {
            let read = all.len() as u16;
            all.extend(self.nv_read(index, part.min(bytes - read), read)?);
        }
        Ok(all)
    }

    /// From now on nobody reads an NV index until the TPM is reset, if it has READ_STCLEAR.
    pub fn nv_read_lock(&self, index: &Handle<'_>, session: &Handle<'_>) -> Result<(), TpmError> {
        command!(
            self,
            Esys_NV_ReadLock_Async(index.tr(), index.tr(), session.tr(), NONE, NONE),
            Esys_NV_ReadLock_Finish()
        )
    }

    /// Extends an NV index that can be, by the empty password of the index itself; `session` authenticates the answer.
    pub fn nv_extend(&self, index: &Handle<'_>, digest: &Digest, session: &Handle<'_>) -> Result<(), TpmError> {
        let mut data = sys::TPM2B_MAX_NV_BUFFER { size: digest.len() as u16, ..Default::default() };
        data.buffer[..digest.len()].copy_from_slice(digest);
        command!(
            self,
            Esys_NV_Extend_Async(index.tr(), index.tr(), session.tr(), NONE, NONE, &data),
            Esys_NV_Extend_Finish()
        )
    }

    /// Raises a counter by one.
    pub fn nv_increment(&self, counter: &Handle<'_>) -> Result<(), TpmError> {
        command!(self, Esys_NV_Increment_Async(OWNER, counter.tr(), PASSWORD, NONE, NONE), Esys_NV_Increment_Finish())
    }

    /// A counter's value.
    pub fn nv_read_counter(&self, counter: &Handle<'_>) -> Result<u64, TpmError> {
        let bytes = self.nv_read(counter, 8, 0)?.try_into();
        Ok(u64::from_be_bytes(bytes.map_err(|_| TpmError::Answer { command: "NV_Read" })?))
    }

    /// A property of the TPM (TPM 2.0 Part 2, TPM_PT), zero if it does not have it.
    pub fn property(&self, property: u32) -> Result<u32, TpmError> {
        let (mut more, mut data) = (0, null_mut());
        command!(
            self,
            Esys_GetCapability_Async(NONE, NONE, NONE, tss::TPM2_CAP_TPM_PROPERTIES, property, 1),
            Esys_GetCapability_Finish(&mut more, &mut data)
        )?;
        let data = take!(self, "GetCapability", data)?;
        // SAFETY: the member of the capability that was asked for; all are plain numbers.
        let properties = unsafe { data.data.tpmProperties };
        let first = properties.tpmProperty.iter().take(properties.count as usize).next();
        Ok(first.filter(|found| found.property == property).map_or(0, |found| found.value))
    }

    /// Whether the TPM has this curve (TPM 2.0 Part 4 of the TCG Algorithm Registry, TPM_ECC_CURVE).
    pub fn has_curve(&self, curve: u16) -> Result<bool, TpmError> {
        let (mut more, mut data) = (0, null_mut());
        command!(
            self,
            Esys_GetCapability_Async(NONE, NONE, NONE, tss::TPM2_CAP_ECC_CURVES, u32::from(curve), 1),
            Esys_GetCapability_Finish(&mut more, &mut data)
        )?;
        let data = take!(self, "GetCapability", data)?;
        // SAFETY: the member of the capability that was asked for; all are plain numbers.
        let curves = unsafe { data.data.eccCurves };
        Ok(curves.count > 0 && curves.eccCurves[0] == curve)
    }
}
