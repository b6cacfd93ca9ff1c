//! The values in a TPM's NV memory: found, made, replaced and removed, so that a kill at any moment leaves either form whole.
//!
//! | step | killed after it |
//! |---|---|
//! | define a free index | *unwritten* |
//! | write its parts, from the last to the first | *not whole*, until the first part is there |
//! | read it back | there are two of one name: the later generation counts |
//! | undefine the index before it | done |
//!
//! What a kill leaves, the next writer removes. Writers of this host take turns; readers wait for nobody.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
    fs, io,
    ops::RangeInclusive,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::Flock;

use super::{
    NvError,
    value::{HEAD_BYTES, Head, Label, Value},
};
use crate::{
    base::key::{MalformedSealedKey, SecretBytes},
    keys::{
        store::StoreError,
        tpm::{Code, Name, NvIndex, NvMemory, NvOwner, TpmError},
    },
    sys::lock,
};

/// In the owner's range (TCG Registry of Reserved TPM 2.0 Handles and Localities, section 2.2).
const NUMBERS: RangeInclusive<u32> = 0x0180_CA80..=0x0180_CAFF;
/// Where the store is, in words.
pub(super) const AT: &str = "the TPM's NV memory";
/// Where writers of this host lock a TPM, each a file.
const LOCKS: &str = "/run/cryptattach";
/// How long the workers of a rotation wait for each other: each change locks for itself, and takes a chip a second.
const MOST_PATIENCE: Duration = Duration::from_secs(60);
/// How often a reader looks again for what was changed meanwhile.
const TRIES: usize = 5;

/// Locks the file as a writer, or as a reader.
type Take = fn(&Path, Duration) -> io::Result<Flock<fs::File>>;

/// The values in a TPM.
pub struct Values<'t> {
    memory: NvMemory<'t>,
    /// What writers lock.
    lock: PathBuf,
    /// It is locked by its own writer.
    is_writing: Cell<bool>,
}

/// What is at an index of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A value.
    Whole(Label),
    /// What a killed writer has left.
    Leftover,
    /// Something else.
    Foreign,
}

impl State {
    fn of(index: &NvIndex) -> Result<Self, StoreError> {
        if !index.is_ours() {
            return Ok(Self::Foreign);
        }
        if !index.is_written() {
            return Ok(Self::Leftover);
        }
        if index.is_locked() {
            return Err(NvError::ReadLocked.into());
        }
        Ok(match Head::of(index.head()) {
            Head::Whole(label) => Self::Whole(label),
            Head::NotWhole => Self::Leftover,
            Head::Foreign => Self::Foreign,
        })
    }
}

/// What stands at an index under a name.
pub struct Found {
    number: u32,
    /// As it stands there: unpacked, what a foreign writer has left could be 128 times as much as a sealed key.
    packed: Vec<u8>,
    /// What says nothing of it is earlier than anything that does.
    generation: Option<u64>,
}

/// What NV memory has, for people.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Indices in our range.
    pub indices: usize,
    /// Their bytes.
    pub bytes: usize,
    /// Leftovers of writers that were killed.
    pub leftovers: usize,
}

impl<'t> Values<'t> {
    /// The values in the NV memory of the TPM that is reached so.
    pub fn of(memory: NvMemory<'t>, tcti: &str) -> Self {
        let letters = tcti.replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
        Self { memory, lock: Path::new(LOCKS).join(format!("tpm-nv-{letters}.lock")), is_writing: Cell::default() }
    }

    /// The most bytes of a value.
    pub fn largest(&self) -> usize {
        self.memory.largest().into()
    }

    /// Reads the indices of our range, whosever they are, while nothing changes there. What a writer of this host does is waited
    /// for: a key that is being replaced must not look as if it were gone.
    fn settled<T>(&self, read: impl Fn(Vec<NvIndex>) -> Result<Option<T>, StoreError>) -> Result<T, StoreError> {
        let mut held = None;
        for _ in 0..TRIES {
            let numbers = self.memory.numbers(&NUMBERS)?;
            let looked = numbers.iter().map(|number| self.memory.look(*number, HEAD_BYTES));
            if let Some(indices) = looked.collect::<Result<Option<Vec<_>>, _>>()?
                && let Some(found) = read(indices)?
                && self.memory.numbers(&NUMBERS)? == numbers
            {
                return Ok(found);
            }
            if held.is_none() && !self.is_writing.get() {
                held = turn(&self.lock, lock::share, MOST_PATIENCE).ok();
            }
        }
        let what = "its keys are being changed all the time".to_owned();
        Err(StoreError::Answer { action: "read from", at: AT.to_owned(), what })
    }

    /// The indices of our range.
    fn indices(&self) -> Result<Vec<NvIndex>, StoreError> {
        self.settled(|indices| Ok(Some(indices)))
    }

    /// The names of all values, each once, in order.
    pub fn labels(&self) -> Result<BTreeSet<Label>, StoreError> {
        let mut labels = BTreeSet::new();
        for index in self.indices()? {
            if let State::Whole(label) = State::of(&index)? {
                labels.insert(label);
            }
        }
        Ok(labels)
    }

    /// Whether there is no value at all.
    pub fn is_empty(&self) -> Result<bool, StoreError> {
        Ok(self.labels()?.is_empty())
    }

    /// What is used.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let mut usage = Usage::default();
        for index in self.indices()? {
            usage.indices += 1;
            usage.bytes += usize::from(index.bytes());
            usage.leftovers += usize::from(State::of(&index)? == State::Leftover);
        }
        Ok(usage)
    }

    /// The latest value of a name.
    pub fn get(&self, label: Label) -> Result<Option<Found>, StoreError> {
        Ok(self.latest(|other| (*other == label).then_some(()))?.remove(&()))
    }

    /// The latest value of each name that `wanted` makes something of, by that. A chip takes its time to tell all of its indices,
    /// so whoever wants several values does not ask for each.
    pub fn latest<T: Ord>(&self, wanted: impl Fn(&Label) -> Option<T>) -> Result<BTreeMap<T, Found>, StoreError> {
        let mut all = self.settled(|indices| {
            let mut all = Vec::new();
            for index in indices {
                if let State::Whole(label) = State::of(&index)?
                    && let Some(name) = wanted(&label)
                {
                    let Some(bytes) = self.memory.read(&index)? else { return Ok(None) };
                    all.push((name, Found::read(index.number(), bytes)));
                }
            }
            Ok(Some(all))
        })?;
        // Of several of one name the last one stays.
        all.sort_by_key(|(_, found)| found.generation);
        Ok(all.into_iter().collect())
    }

    /// Whoever may write, once no other program of this host writes. What killed writers have left is removed first.
    pub fn writer(&self, password: Option<&SecretBytes>, root: Option<Name>) -> Result<Writer<'_, 't>, StoreError> {
        let lock = turn(&self.lock, lock::lock, MOST_PATIENCE)?;
        self.is_writing.set(true);
        let owner = self.memory.owner(password, root)?;
        let writer = Writer { values: self, owner, has_password: password.is_some(), _lock: lock };
        writer.tidy()?;
        Ok(writer)
    }

    /// Lets nobody read them until the TPM's next reset.
    pub fn lock_reads(&self, root: Option<Name>) -> Result<(), StoreError> {
        for index in self.indices()?.iter().filter(|index| index.is_ours() && index.is_written()) {
            self.memory.lock_reads(index, root)?;
        }
        Ok(())
    }
}

impl Found {
    fn read(number: u32, packed: Vec<u8>) -> Self {
        let generation = Value::unpack(&packed).ok().and_then(|value| value.generation().ok());
        Self { number, packed, generation }
    }

    /// What was stored, as JSON.
    pub fn json(&self) -> Result<Vec<u8>, StoreError> {
        let value = Value::unpack(&self.packed).map_err(|source| self.malformed(source))?;
        Ok(value.json)
    }

    /// Its generation.
    pub fn generation(&self) -> Option<u64> {
        self.generation
    }

    /// What stands here is not what should.
    pub fn malformed(&self, source: MalformedSealedKey) -> StoreError {
        StoreError::Malformed { what: named(self.number), source }
    }
}

fn named(number: u32) -> String {
    format!("the NV index 0x{number:08x}")
}

/// Whoever may write.
pub struct Writer<'v, 't> {
    values: &'v Values<'t>,
    owner: NvOwner<'t>,
    has_password: bool,
    _lock: Flock<fs::File>,
}

impl Writer<'_, '_> {
    /// Makes a value; `false` if there is one of its name. A number and as many bytes as the largest value has stay free, so that
    /// every value can be replaced at any time.
    pub fn create(&self, value: &Value) -> Result<bool, StoreError> {
        if self.values.get(value.label)?.is_some() {
            return Ok(false);
        }
        let packed = self.packed(value)?;
        let indices = self.values.indices()?;
        let ours = indices.iter().filter(|index| index.is_ours()).map(NvIndex::bytes);
        let largest = ours.chain([packed.len() as u16]).max();
        let Some(made) = self.define(packed.len() as u16)? else { return Err(self.full(&packed, true)?) };
        match self.define(largest.unwrap_or_default())? {
            Some(spare) => self.undefine(spare)?,
            None => {
                self.undefine(made)?;
                return Err(self.full(&packed, true)?);
            }
        }
        self.fill(made, &packed)?;
        Ok(true)
    }

    /// Replaces a value by a later one.
    pub fn replace(&self, value: &Value) -> Result<(), StoreError> {
        let packed = self.packed(value)?;
        let Some(made) = self.define(packed.len() as u16)? else { return Err(self.full(&packed, false)?) };
        self.fill(made, &packed)?;
        self.remove_but(value.label, Some(made))
    }

    /// Removes all values of a name.
    pub fn remove(&self, label: Label) -> Result<(), StoreError> {
        self.remove_but(label, None)
    }

    fn remove_but(&self, label: Label, kept: Option<u32>) -> Result<(), StoreError> {
        for index in self.values.indices()? {
            if Some(index.number()) != kept && State::of(&index)? == State::Whole(label) {
                self.undefine(index.number())?;
            }
        }
        Ok(())
    }

    /// Removes what killed writers have left: what was not finished, and of two values of one name the earlier one.
    fn tidy(&self) -> Result<(), StoreError> {
        let mut seen = BTreeSet::new();
        for index in self.values.indices()? {
            match State::of(&index)? {
                State::Leftover => {
                    tracing::info!("{} was not finished by whoever made it; it is removed", named(index.number()));
                    self.undefine(index.number())?;
                }
                State::Whole(label) if !seen.insert(label) => {
                    let latest = self.values.get(label)?;
                    self.remove_but(label, latest.map(|latest| latest.number))?;
                }
                State::Whole(_) | State::Foreign => {}
            }
        }
        Ok(())
    }

    fn packed(&self, value: &Value) -> Result<Vec<u8>, StoreError> {
        let (packed, most) = (value.pack(), self.values.largest());
        if packed.len() <= most {
            return Ok(packed);
        }
        Err(NvError::TooLong { bytes: packed.len(), most }.into())
    }

    /// The number of a new index; `None` if there is no room for it.
    fn define(&self, bytes: u16) -> Result<Option<u32>, StoreError> {
        let taken: BTreeSet<u32> = self.values.memory.numbers(&NUMBERS)?.into_iter().collect();
        for number in NUMBERS.filter(|number| !taken.contains(number)) {
            match self.values.memory.define(&self.owner, number, bytes) {
                Ok(()) => return Ok(Some(number)),
                // Another system on this machine was faster.
                Err(error) if error.code().is_some_and(Code::is_defined) => {}
                Err(error) if error.code().is_some_and(Code::is_no_space) => return Ok(None),
                Err(error) => return Err(self.refused(error)),
            }
        }
        Ok(None)
    }

    /// There is no room for a value; `kept` if there would be, but for what stays free.
    fn full(&self, packed: &[u8], kept: bool) -> Result<StoreError, StoreError> {
        let Usage { indices, bytes: taken, .. } = self.values.usage()?;
        Ok(NvError::Full { bytes: packed.len(), taken, indices, most: NUMBERS.count(), kept }.into())
    }

    /// Writes all of a new index. One that fails is removed.
    fn fill(&self, number: u32, packed: &[u8]) -> Result<(), StoreError> {
        self.values.memory.fill(&self.owner, number, packed).map_err(|error| {
            let removed = self.undefine(number);
            tracing::debug!("{} was not written; it is removed: {}", named(number), removed.is_ok());
            self.refused(error)
        })
    }

    fn undefine(&self, number: u32) -> Result<(), StoreError> {
        self.values.memory.undefine(&self.owner, number).map_err(|error| self.refused(error))
    }

    fn refused(&self, error: TpmError) -> StoreError {
        match error.code() {
            Some(code) if code.is_auth() => NvError::OwnerPassword { given: self.has_password }.into(),
            _ => error.into(),
        }
    }
}

/// Waits for a turn, but not for ever.
fn turn(path: &Path, take: Take, patience: Duration) -> Result<Flock<fs::File>, StoreError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::TimedOut => NvError::Busy { lock: path.to_owned() }.into(),
        _ => StoreError::Io { action: "lock", path: path.to_owned(), source },
    };
    let folder = path.parent().unwrap_or(Path::new("/run"));
    fs::DirBuilder::new().recursive(true).mode(0o755).create(folder).map_err(failed)?;
    take(path, patience).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::key::MAX_SEALED_BYTES;

    #[test]
    fn what_is_found_is_kept_as_it_stands_there() {
        let id = crate::base::key::KeyId::random();
        let value = Value { label: Label::key(&id), json: vec![b' '; MAX_SEALED_BYTES] };
        let found = Found::read(1, value.pack());
        assert!(found.packed.len() < 2048, "{}", found.packed.len());
        assert_eq!(found.json().unwrap(), value.json);
        let cut = Found::read(1, found.packed[..found.packed.len() - 1].to_vec()).json().unwrap_err();
        assert!(matches!(cut, StoreError::Malformed { source: MalformedSealedKey::Packed, .. }), "{cut:?}");
    }

    #[test]
    fn writers_take_turns_and_none_waits_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/lock");
        let (writer, reader): (Take, Take) = (lock::lock, lock::share);
        let first = turn(&path, writer, Duration::ZERO).unwrap();
        for how in [writer, reader] {
            let late = turn(&path, how, Duration::from_millis(50)).unwrap_err();
            assert!(matches!(late, StoreError::Nv(NvError::Busy { .. })), "{late:?}");
        }
        drop(first);
        let _readers = [(); 2].map(|()| turn(&path, reader, Duration::ZERO).unwrap());
        turn(&path, writer, Duration::ZERO).unwrap_err();
    }
}
