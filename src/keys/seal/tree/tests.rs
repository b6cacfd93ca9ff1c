//! Policies of keys only: what opens them, what a store may not ask for, and what each part says.

use std::{
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::{Duration, Instant},
};

use super::*;
use crate::keys::seal::{Identities, OwnerKey, TYPE, seal_node};

fn owners<const N: usize>() -> [OwnerKey; N] {
    std::array::from_fn(|_| OwnerKey::generate().unwrap())
}

fn of(owner: &OwnerKey) -> Box<dyn Recipient> {
    Box::new(owner.recipient().unwrap())
}

fn threshold(least: usize, of: Vec<Vec<Box<dyn Recipient>>>) -> Box<dyn Recipient> {
    Box::new(Threshold::of(least, of).unwrap())
}

fn sealed(recipients: &[Box<dyn Recipient>]) -> SealedKey {
    let protected = json!({"typ": TYPE, "enc": content::ENC}).to_string();
    let sealed = seal_node(&protected, &SecretBytes::copy_of(b"the content").unwrap(), recipients).unwrap();
    SealedKey::from_json(&sealed.to_json()).unwrap()
}

fn with(owners: &[&OwnerKey]) -> Identities {
    let copy = |owner: &&OwnerKey| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        std::fs::write(&path, owner.private_pem().unwrap().expose()).unwrap();
        Box::new(OwnerKey::read(&path).unwrap()) as Box<dyn Identity>
    };
    Identities::of(owners.iter().map(copy).collect())
}

fn opens(sealed: &SealedKey, owners: &[&OwnerKey]) -> bool {
    match with(owners).decrypt(sealed) {
        Ok(content) => {
            assert_eq!(content.expose(), b"the content");
            true
        }
        Err(error) => {
            assert!(matches!(error, SealError::PolicyNotMet(_)), "{error}");
            false
        }
    }
}

#[test]
fn each_subset_of_holders_opens_exactly_when_the_policy_says_so() {
    let keys: [OwnerKey; 5] = owners();
    let [escrow, tpm, t1, t2, t3] = &keys;
    let inner = threshold(2, vec![vec![of(t1)], vec![of(t2)], vec![of(t3)]]);
    let sealed = sealed(&[of(escrow), threshold(2, vec![vec![of(tpm)], vec![inner]])]);
    let policy: crate::config::Policy = "any(escrow, all(tpm, 2 of (t1, t2, t3)))".parse().unwrap();
    let names = ["escrow", "tpm", "t1", "t2", "t3"];
    for subset in 0..1_u32 << keys.len() {
        let here = |at: usize| subset >> at & 1 == 1;
        let held: Vec<_> = (0..keys.len()).filter(|at| here(*at)).map(|at| &keys[at]).collect();
        let met = policy.is_met_by(&|leaf| names.iter().position(|name| *name == leaf.as_str()).is_some_and(here));
        assert_eq!(opens(&sealed, &held), met, "{subset:05b}");
    }
}

#[test]
fn what_does_not_open_says_what_each_part_said() {
    let keys: [OwnerKey; 3] = owners();
    let sealed = sealed(&[of(&keys[0]), threshold(2, vec![vec![of(&keys[1])], vec![of(&keys[2])]])]);
    let names = [("escrow", 0), ("a", 1), ("b", 2)];
    let names = names.map(|(name, at)| (keys[at].kid().to_owned(), name.to_owned()));
    let identities = with(&[&keys[1]]).with_leaves(Vec::new(), names.into());
    let error = identities.decrypt(&sealed).err().unwrap();
    assert_eq!(error.exit(), Exit::KeyRefused);
    assert_eq!(
        error.to_string(),
        "its policy is not met: any (none of them opened it: escrow (this host has no key for it), 2 of 2 (1 of the 2 shares \
         that it takes could be had: a (opened), b (this host has no key for it)))"
    );
    let (content, told) = with(&[&keys[0]]).decrypt_and_tell(&sealed);
    assert!(content.is_ok());
    let lines = told.unwrap().lines();
    assert!(
        lines[0].ends_with("any: opened") && lines[1].ends_with(": opened") && lines[2].ends_with("2 of 2: not needed")
    );
}

#[test]
fn the_shape_tells_another_policy_from_the_same() {
    let keys: [OwnerKey; 3] = owners();
    let share = |at: usize| vec![of(&keys[at])];
    let one = [of(&keys[0]), threshold(2, vec![share(0), share(1), share(2)])];
    let same = [threshold(2, vec![share(2), share(0), share(1)]), of(&keys[0])];
    let other = [of(&keys[0]), threshold(3, vec![share(0), share(1), share(2)])];
    let wanted = |recipients: &[Box<dyn Recipient>]| recipients.iter().map(|one| one.shape()).collect::<BTreeSet<_>>();
    let shape = Node::of(&sealed(&one)).unwrap().shape();
    assert!(shape == wanted(&one) && shape == wanted(&same) && shape != wanted(&other));
    // A share that nobody holds is left out, and a threshold that nobody can meet.
    assert!(Threshold::of(2, vec![share(0), Vec::new()]).is_none());
    assert!(Threshold::of(1, vec![share(0), Vec::new()]).is_some());
}

/// A sealed key whose first recipient has this in place of its `sss`.
fn forged(sealed: &SealedKey, change: impl FnOnce(&mut Value)) -> SealedKey {
    let mut forged = sealed.clone();
    change(&mut forged.recipients[0].header[MEMBER]);
    forged
}

#[test]
fn a_hostile_node_is_refused_before_anything_is_opened() {
    let keys: [OwnerKey; 2] = owners();
    let sealed = sealed(&[threshold(2, vec![vec![of(&keys[0])], vec![of(&keys[1])]])]);
    let refused = |key: SealedKey, why: &str| {
        let error = with(&[&keys[0], &keys[1]]).decrypt(&key).err().expect(why).to_string();
        assert!(error.contains(why), "{error}");
    };
    assert!(opens(&sealed, &[&keys[0], &keys[1]]));
    for t in [json!(0), json!(3), json!(-1), json!(1e300), json!("2"), json!(u64::MAX), json!(null)] {
        refused(forged(&sealed, |sss| sss["t"] = t), "'t'");
    }
    for p in [json!("Aw"), json!(""), json!(7), json!("_".repeat(100))] {
        refused(forged(&sealed, |sss| sss["p"] = p), "prime");
    }
    refused(forged(&sealed, |sss| sss["shares"] = json!({})), "'shares'");
    refused(forged(&sealed, |sss| *sss = json!([])), "no members");
    refused(forged(&sealed, |sss| sss["shares"] = json!([1, 2])), "malformed");
    refused(
        forged(&sealed, |sss| {
            let share = sss["shares"][0].clone();
            sss["shares"] = vec![share; 129].into();
        }),
        "more than 64 leaves",
    );
    // A whole key in the place of a share, and a share in the place of a key.
    refused(forged(&sealed, |sss| sss["shares"][0]["protected"] = json!(sealed.protected)), "another type");
    let share = sealed.recipients[0].header[MEMBER]["shares"][0].clone();
    let mut share = SealedKey::from_value(share).unwrap();
    share.recipients[0].header.insert("sss".to_owned(), json!({}));
    refused(share, "type");
    // Deeper than any policy.
    let mut deep = sealed.clone();
    for _ in 0..5 {
        let inner = forged(&sealed, |sss| sss["shares"][0]["recipients"] = json!(deep.recipients));
        deep = inner;
    }
    refused(deep, "more than 4 levels");
    let mut asking = sealed.clone();
    let mut entry = asking.recipients[0].clone();
    entry.header.insert("tang".to_owned(), json!({"url": "http://127.0.0.1:1"}));
    asking.recipients = vec![entry; 65];
    refused(asking, "more than 64 leaves");
    // Shares that are swapped or changed give another secret, which unwraps nothing.
    let other = super::tests::sealed(&[threshold(2, vec![vec![of(&keys[0])], vec![of(&keys[1])]])]);
    let share = other.recipients[0].header[MEMBER]["shares"][0].clone();
    refused(forged(&sealed, |sss| sss["shares"][0] = share), "has been changed");
    let first = sealed.recipients[0].header[MEMBER]["shares"][0].clone();
    refused(forged(&sealed, |sss| sss["shares"][1] = first), "wrong form");
}

fn told(part: &str) -> Told {
    Told { part: part.to_owned(), said: Said::Opened, of: Vec::new() }
}

#[test]
fn a_race_ends_with_the_last_share_or_when_there_cannot_be_enough() {
    let running = AtomicUsize::new(0);
    let job = |delay: u64, good: bool| {
        let running = &running;
        Box::new(move |cancel: &Cancel| {
            running.fetch_add(1, SeqCst);
            let end = Instant::now() + Duration::from_millis(delay);
            while Instant::now() < end && !cancel.is_cancelled() {
                std::thread::sleep(Duration::from_millis(2));
            }
            running.fetch_sub(1, SeqCst);
            (if good { Ok(delay) } else { Err(SealError::Tampered) }, told("job"))
        }) as Job<'_, u64>
    };
    let cases = [
        (vec![(10, true), (20, true), (10_000, true)], 2, 2),
        (vec![(10, false), (20, false), (10_000, true)], 2, 0),
        (vec![(10, false), (20, true), (10, true)], 2, 2),
        (vec![(10, true)], 1, 1),
        (vec![], 1, 0),
    ];
    for (jobs, need, had) in cases {
        let started = Instant::now();
        let jobs: Vec<_> = jobs.into_iter().map(|(delay, good)| job(delay, good)).collect();
        let number = jobs.len();
        let (values, said) = race(jobs, need, &Cancel::never());
        assert!(values.len() >= had && (had > 0 || values.len() < need), "{values:?}");
        assert_eq!(said.len(), number);
        assert!(started.elapsed() < Duration::from_secs(8), "the slow one is not waited for");
        assert_eq!(running.load(SeqCst), 0, "nobody is left behind");
    }
}

/// A key of a TPM, or so it says; it counts how often it is asked.
struct Slow(OwnerKey, std::sync::Arc<AtomicUsize>);

impl Identity for Slow {
    fn kid(&self) -> &str {
        self.0.kid()
    }

    fn alg(&self) -> &str {
        self.0.alg()
    }

    fn takes_time(&self) -> bool {
        true
    }

    fn unwrap(&self, encrypted_key: &[u8], header: &JoseHeader) -> Result<Option<ContentKey>, SealError> {
        self.1.fetch_add(1, SeqCst);
        self.0.unwrap(encrypted_key, header)
    }
}

#[test]
fn a_store_cannot_have_a_tpm_asked_again_and_again_nor_a_server_that_is_not_configured() {
    let keys: [OwnerKey; 3] = owners();
    let asked = std::sync::Arc::new(AtomicUsize::new(0));
    let whole = sealed(&[of(&keys[0]), threshold(2, vec![vec![of(&keys[1])], vec![of(&keys[2])]])]);
    let mut hostile = whole.clone();
    let mut entry = hostile.recipients[0].clone();
    entry.encrypted_key = "A".repeat(54);
    let mut stranger = entry.clone();
    stranger.header.insert("tang".to_owned(), json!({"url": "http://10.0.0.5/\u{1b}"}));
    stranger.header.insert("kid".to_owned(), json!("other"));
    hostile.recipients.extend([entry.clone(), stranger]);
    hostile.recipients.splice(0..0, vec![entry; 200]);
    let [tpm, ..] = keys;
    let identities = Identities::of(vec![Box::new(Slow(tpm, asked.clone()))]);
    assert!(identities.decrypt(&whole).is_ok());
    assert_eq!(asked.swap(0, SeqCst), 1);
    let error = chain(&identities.decrypt(&hostile).err().unwrap());
    assert_eq!(asked.load(SeqCst), 1);
    assert!(error.contains("no [leaves.NAME] of the configuration has tang = \"http://10.0.0.5/\u{fffd}\""), "{error}");
}

/// As another program may seal it: with more than the protected header authenticated (RFC 7516, section 5.1).
#[test]
fn what_else_is_authenticated_counts_in_a_policy_too() {
    let keys: [OwnerKey; 2] = owners();
    let all = threshold(2, vec![vec![of(&keys[0])], vec![of(&keys[1])]]);
    let mut sealed = sealed(&[all]);
    let key = ContentKey::random().unwrap();
    let again = threshold(2, vec![vec![of(&keys[0])], vec![of(&keys[1])]]);
    sealed.recipients = vec![again.seal(&key).unwrap()];
    sealed.aad = Some(Base64UrlUnpadded::encode_string(b"more"));
    let content = SecretBytes::copy_of(b"the content").unwrap();
    let encrypted = content::encrypt(&key, &sealed.authenticated(), &content).unwrap();
    let encode = |bytes: &[u8]| Base64UrlUnpadded::encode_string(bytes);
    (sealed.iv, sealed.ciphertext, sealed.tag) =
        (encode(&encrypted.iv), encode(&encrypted.ciphertext), encode(&encrypted.tag));
    let sealed = SealedKey::from_json(&sealed.to_json()).unwrap();
    assert!(opens(&sealed, &[&keys[0], &keys[1]]));
    for aad in [None, Some(encode(b"less"))] {
        let changed = SealedKey { aad, ..sealed.clone() };
        let refused = with(&[&keys[0], &keys[1]]).decrypt(&changed).err();
        assert!(matches!(refused, Some(SealError::Tampered)), "{refused:?}");
    }
}
