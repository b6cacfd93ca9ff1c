//! Names, ids, addresses and devices, as people and other programs write them.
#![no_main]
use cryptattach::{
    base::address::{Endpoint, HostAddress},
    base::key::{ContainerKeyId, HostName, KeyId, KeyReference, LockboxKeyId, StoreName},
    base::mapping_name::MappingName,
    base::pcr_set::PcrSet,
    config::DeviceSpec,
    keys::tpm::Name,
};
use cryptattach_fuzz::check_word;

libfuzzer_sys::fuzz_target!(|text: &str| {
    check_word::<ContainerKeyId>(text);
    check_word::<DeviceSpec>(text);
    check_word::<Endpoint>(text);
    check_word::<HostAddress>(text);
    check_word::<HostName>(text);
    check_word::<KeyId>(text);
    check_word::<KeyReference>(text);
    check_word::<LockboxKeyId>(text);
    check_word::<MappingName>(text);
    check_word::<Name>(text);
    check_word::<PcrSet>(text);
    check_word::<StoreName>(text);
});
