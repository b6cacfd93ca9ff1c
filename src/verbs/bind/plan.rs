//! What `bind` is going to do, out of what the machine has and what the person wants. Nothing is asked or changed here.

use std::path::PathBuf;

use super::{
    boot::Maker,
    machine::{Machine, TpmFound, TpmKey},
};
use crate::{
    base::{key::StoreName, mapping_name::MappingName, pcr_set::PcrSet},
    config::Policy,
    keys::tpm::BootChain,
    verbs::error::Error,
    volumes::header::Binding,
};
use serde::Serialize;

/// The store that is made in the TPM unless another name is given.
const IN_TPM: &str = "disk";

/// What the person wants, where the default will not do.
#[derive(Clone, Debug, Default)]
pub struct Wishes {
    pub store: Option<StoreName>,
    /// The mapping's name, if nothing names the volume yet.
    pub name: Option<MappingName>,
    /// What a new key in the TPM is bound to.
    pub pcrs: Option<PcrSet>,
    /// A Tang server that a new store needs besides the TPM.
    pub tang: Option<String>,
    /// What opens a new store.
    pub opens: Option<Policy>,
    /// The escrow of a new store.
    pub escrow: Option<PathBuf>,
    pub no_recovery: bool,
    pub no_initramfs: bool,
    /// Take the place of what clevis and systemd have bound.
    pub replace: bool,
}

/// What is going to be done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Plan {
    pub store: StoreName,
    /// It is made, in the TPM.
    pub new_store: bool,
    /// The TPM opens it.
    pub by_tpm: bool,
    /// A key in the TPM is made.
    pub new_tpm_key: bool,
    /// It is bound to these PCRs; as the configuration says, if there are none.
    pub pcrs: Option<PcrSet>,
    /// A recovery key is made.
    pub recovery: bool,
    pub boot: Boot,
    pub initramfs: Option<Maker>,
    /// What others have bound.
    pub others: Vec<Binding>,
}

/// How a boot gets to know the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Boot {
    /// It is a file: no boot opens it.
    File,
    /// It does: the root, or `[[boot.volumes]]`.
    Known,
    /// crypttab is to have the initramfs open it, before the TPM is latched.
    Crypttab,
    /// A section `[volumes.NAME]`: the system attaches it.
    Section,
}

/// PCRs that stay as they are when the initramfs or the kernel is made anew. PCR 7 alone does not tell whether another boot loader
/// runs where Secure Boot is off.
fn lasting(tpm: TpmFound) -> PcrSet {
    match tpm.chain {
        BootChain::UnifiedKernelImage => PcrSet::of(&[7, 12, 13]),
        BootChain::Grub if tpm.secure_boot != Some(true) => PcrSet::of(&[4, 7]),
        _ => PcrSet::of(&[7]),
    }
}

/// PCRs that a new initramfs changes.
fn changing(chain: BootChain) -> PcrSet {
    match chain {
        BootChain::UnifiedKernelImage => PcrSet::of(&[11]),
        _ => PcrSet::of(&[9]),
    }
}

/// Proposes.
pub fn plan(machine: &Machine, wishes: &Wishes) -> Result<Plan, Error> {
    let usage = |why: String| Err(Error::Usage(why));
    let device = machine.device.display();
    let in_tpm = || IN_TPM.parse::<StoreName>().ok();
    let bound = machine.bound.as_ref().map(|key| key.store.clone());
    if let Some((bound, wanted)) = bound.as_ref().zip(wishes.store.as_ref()).filter(|(bound, wanted)| bound != wanted) {
        return usage(format!(
            "the key of {device} is in the store '{bound}': 'cryptattach key move' moves it to '{wanted}', and 'cryptattach unbind' \
             takes it back"
        ));
    }
    let store = bound.or(wishes.store.clone()).or(machine.default_store.clone());
    let store = match store.or_else(|| in_tpm().filter(|_| machine.stores.is_empty() && machine.tpm.is_some())) {
        Some(store) => store,
        None if machine.stores.is_empty() => {
            return usage(format!(
                "this machine has no TPM ({}), and no store is configured: make one on another device with 'cryptattach init', or \
                 bind the volume where there is a TPM",
                machine.no_tpm.as_deref().unwrap_or_default()
            ));
        }
        None => return usage("there are several stores and no default_store: choose one with --store".to_owned()),
    };
    let known = machine.stores.iter().find(|(name, _)| *name == store);
    // A run that was stopped may have got no further than that.
    let new_store = known.is_none();
    let is_ours = new_store || machine.made.as_ref() == Some(&store);
    if new_store && machine.bound.is_some() {
        return usage(format!("the token of {device} names the store '{store}', which is not configured here"));
    }
    let Some(tpm) = machine.tpm.or_else(|| (!new_store).then_some(NO_TPM)) else {
        return usage(format!("the store '{store}' is not configured, and this machine has no TPM to make it in"));
    };
    if !is_ours && (wishes.tang.is_some() || wishes.opens.is_some() || wishes.escrow.is_some()) {
        return usage(format!(
            "the store '{store}' is there already: 'cryptattach container policy {store}' changes what opens it, and 'cryptattach \
             container escrow replace' its escrow"
        ));
    }
    let by_tpm = known.is_none_or(|(_, by_tpm)| *by_tpm);
    let new_tpm_key = new_store && machine.key.is_none();
    if wishes.pcrs.is_some() && !new_tpm_key {
        return usage(
            "--pcrs is for a new key in the TPM, and none is made: 'cryptattach host join --replace' makes one"
                .to_owned(),
        );
    }
    let pcrs = wishes.pcrs.or_else(|| (!tpm.configured).then(|| lasting(tpm))).filter(|_| new_tpm_key);
    let boot = match machine.boot_lists {
        _ if !machine.is_node => Boot::File,
        Some(true) => Boot::Known,
        Some(false) => {
            return usage(format!(
                "the boot opens what [[boot.volumes]] in the configuration lists, and {device} is not there: add it with device = \
                 \"UUID={}\", and run this again",
                machine.volume
            ));
        }
        // Without a line in crypttab the kernel's command line names it.
        None if machine.is_root => Boot::Known,
        None if by_tpm || machine.is_listed => Boot::Crypttab,
        None => Boot::Section,
    };
    let is_in_image = matches!(boot, Boot::Known | Boot::Crypttab);
    Ok(Plan {
        store,
        new_store,
        by_tpm,
        new_tpm_key,
        pcrs,
        recovery: new_store && !wishes.no_recovery,
        boot,
        initramfs: machine.maker.filter(|_| is_in_image && !wishes.no_initramfs),
        others: machine.others.clone(),
    })
}

/// Stands for the boot of a machine where no key in a TPM is made.
const NO_TPM: TpmFound = TpmFound { chain: BootChain::Unmeasured, secure_boot: None, configured: true };

impl Plan {
    /// In three lines, and one more for each thing that the person should know before.
    pub fn lines(&self, machine: &Machine, wishes: &Wishes) -> Vec<String> {
        let disks = match machine.disks {
            1 => "one disk".to_owned(),
            disks => format!("{disks} disks"),
        };
        let is = match (machine.is_root, machine.is_node) {
            (true, _) => "the root's",
            (false, true) => "a data volume",
            (false, false) => "a volume in a file",
        };
        let sealed = match (self.new_store, machine.key, self.pcrs) {
            (true, None, Some(pcrs)) => {
                format!("made in the TPM's memory, opened by a new key in the TPM (PCR {pcrs})")
            }
            (true, None, None) => "made in the TPM's memory, opened by a new key in the TPM".to_owned(),
            (true, Some(key), _) => format!("made in the TPM's memory, opened by this host's key in the TPM ({key})"),
            (false, Some(key), _) if self.by_tpm => format!("opened by this host's key in the TPM ({key})"),
            (false, ..) => "as it is configured".to_owned(),
        };
        let besides = [
            wishes.tang.as_ref().filter(|_| self.new_store).map(|url| format!(" together with the Tang server {url}")),
            wishes.opens.as_ref().filter(|_| self.new_store).map(|policy| format!(" as {policy} says")),
            self.recovery.then(|| ", or by 14 words on paper".to_owned()),
        ];
        let boot = match self.boot {
            Boot::File => "a file: no boot opens it".to_owned(),
            Boot::Known => "opens it already, and finds the key by the volume's token".to_owned(),
            Boot::Crypttab => "opens it in the initramfs (/etc/crypttab)".to_owned(),
            Boot::Section => "the system attaches it ([volumes] in the configuration)".to_owned(),
        };
        let image = match (self.initramfs, self.boot) {
            (Some(maker), _) => format!("; initramfs by '{}'", maker.command().join(" ")),
            (None, Boot::Known | Boot::Crypttab) if !wishes.no_initramfs => {
                "; NO initramfs-tools or dracut here: make the initramfs anew yourself, by mkinitcpio as docs/boot.md says"
                    .to_owned()
            }
            _ => String::new(),
        };
        let mut lines = vec![
            format!("volume  {}  {is}, LUKS2 {}, on a machine with {disks}", machine.device.display(), machine.volume),
            format!("store   '{}'  {sealed}{}", self.store, besides.into_iter().flatten().collect::<String>()),
            format!("boot    {boot}{image}"),
        ];
        lines.extend(self.notes(machine).into_iter().map(|note| format!("note    {note}")));
        if !self.others.is_empty() {
            let others = self.others.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let then =
                if wishes.replace { "removed once the new way was tried" } else { "they stay; --replace removes them" };
            lines.push(format!("others  {others}: {then}"));
        }
        lines
    }

    /// What the TPM's key does not keep out.
    fn notes(&self, machine: &Machine) -> Vec<String> {
        let bound_to = |pcrs| TpmKey { pcrs, is_signed: false, has_pin: false };
        let key = self.pcrs.map(bound_to).or(machine.key).filter(|_| self.by_tpm);
        let (Some(tpm), Some(key)) = (machine.tpm, key) else { return Vec::new() };
        let changed = key.pcrs.common(changing(tpm.chain));
        let is_at_boot = matches!(self.boot, Boot::Known | Boot::Crypttab);
        let is_open = is_at_boot && !key.has_pin && !key.covers_image();
        let mut notes = Vec::new();
        if self.initramfs.is_some() && !changed.is_empty() {
            notes.push(format!(
                "the new initramfs changes PCR {changed}, which the key in the TPM is bound to: the next boot asks for the passphrase"
            ));
        }
        if is_open && tpm.secure_boot != Some(true) {
            notes
                .push("Secure Boot is not on: firmware starts whatever boot loader a stick or the disk has".to_owned());
        }
        if is_open && machine.is_root && !machine.is_boot_encrypted && tpm.chain != BootChain::UnifiedKernelImage {
            notes.push(format!(
                "/boot is not encrypted, and its initramfs is not measured into PCR {}: whoever changes it gets the key; a PIN \
                 prevents that (docs/one-machine.md)",
                key.pcrs
            ));
        }
        if !machine.strangers.is_empty() {
            let who = machine.strangers.join(", ");
            let then = if is_open { "whoever starts it may get the key, and its setup" } else { "its setup" };
            notes.push(format!("{who} may be another system: {then} may clear the TPM; keep the passphrase"));
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::base::key::KeyReference;

    const GRUB: TpmFound = TpmFound { chain: BootChain::Grub, secure_boot: Some(true), configured: false };

    /// One disk, a TPM, no store: an installed Debian.
    fn laptop() -> Machine {
        Machine {
            device: "/dev/vda3".into(),
            volume: Uuid::nil(),
            bound: None,
            others: Vec::new(),
            is_node: true,
            is_root: true,
            boot_lists: None,
            is_listed: true,
            disks: 1,
            strangers: Vec::new(),
            is_boot_encrypted: true,
            tpm: Some(GRUB),
            no_tpm: None,
            key: None,
            stores: Vec::new(),
            default_store: None,
            made: None,
            maker: Some(Maker::InitramfsTools),
        }
    }

    fn store(name: &str, by_tpm: bool) -> (StoreName, bool) {
        (name.parse().unwrap(), by_tpm)
    }

    fn refused(machine: &Machine, wishes: &Wishes) -> String {
        plan(machine, wishes).unwrap_err().to_string()
    }

    #[test]
    fn a_laptop_gets_a_store_in_its_tpm() {
        let (machine, wishes) = (laptop(), Wishes::default());
        let made = plan(&machine, &wishes).unwrap();
        assert!(made.new_store && made.new_tpm_key && made.recovery && made.by_tpm);
        assert_eq!((made.store.as_str(), made.boot, made.initramfs), ("disk", Boot::Known, machine.maker));
        assert_eq!(made.pcrs, Some(PcrSet::of(&[7])), "a new initramfs changes PCR 9");
        let lines = made.lines(&machine, &wishes);
        assert_eq!(lines.len(), 3);
        assert!(lines[1].contains("PCR 7") && lines[1].contains("14 words"), "{lines:?}");
        let wishes = Wishes { pcrs: Some(PcrSet::of(&[7, 9])), ..wishes };
        let lines = plan(&machine, &wishes).unwrap().lines(&machine, &wishes);
        assert!(lines[3].contains("changes PCR 9"), "{lines:?}");
        let wishes = Wishes::default();
        let off = Machine { tpm: Some(TpmFound { secure_boot: Some(false), ..GRUB }), ..laptop() };
        assert_eq!(plan(&off, &wishes).unwrap().pcrs, Some(PcrSet::of(&[4, 7])));
        let site = Machine { tpm: Some(TpmFound { configured: true, ..GRUB }), ..laptop() };
        assert_eq!(plan(&site, &wishes).unwrap().pcrs, None, "as the site says");
        let wishes = Wishes { no_recovery: true, no_initramfs: true, ..Wishes::default() };
        let made = plan(&machine, &wishes).unwrap();
        assert!(!made.recovery && made.initramfs.is_none());
    }

    #[test]
    fn a_data_volume_goes_into_the_store_that_there_is() {
        let data = Machine { is_root: false, is_listed: false, tpm: None, ..laptop() };
        let on_stick =
            Machine { stores: vec![store("stick", false)], default_store: "stick".parse().ok(), ..data.clone() };
        let made = plan(&on_stick, &Wishes::default()).unwrap();
        assert!(!made.new_store && !made.recovery && !made.new_tpm_key && made.initramfs.is_none());
        assert_eq!((made.store.as_str(), made.boot), ("stick", Boot::Section));
        // What the TPM opens has to be opened before it is latched.
        let in_tpm = Machine { stores: vec![store("disk", true)], default_store: "disk".parse().ok(), ..data.clone() };
        assert_eq!(plan(&in_tpm, &Wishes::default()).unwrap().boot, Boot::Crypttab);
        let file = Machine { is_node: false, ..on_stick };
        assert_eq!(plan(&file, &Wishes::default()).unwrap().boot, Boot::File);
        assert!(refused(&data, &Wishes::default()).contains("no TPM"));
        let two = Machine { stores: vec![store("a", true), store("b", true)], ..data };
        assert!(refused(&two, &Wishes::default()).contains("--store"));
    }

    #[test]
    fn what_does_not_fit_is_refused_before_anything_is_made() {
        let wish = |store: &str| Wishes { store: store.parse().ok(), ..Wishes::default() };
        let reference = KeyReference {
            store: "stick".parse().unwrap(),
            key: "3f2a9c1e-7d44-4c1b-9d0a-52b1a6f0c3de".parse().unwrap(),
        };
        let stores = vec![store("stick", false)];
        let bound = Machine { bound: Some(reference.clone()), stores, ..laptop() };
        assert!(refused(&bound, &wish("disk")).contains("key move"));
        assert_eq!(plan(&bound, &Wishes::default()).unwrap().store.as_str(), "stick");
        let foreign = Machine { bound: Some(reference), ..laptop() };
        assert!(refused(&foreign, &Wishes::default()).contains("not configured here"));
        let tang = Wishes { tang: Some("http://t1".to_owned()), ..wish("stick") };
        assert!(refused(&Machine { bound: None, ..bound }, &tang).contains("container policy"));
        assert!(refused(&Machine { tpm: None, ..laptop() }, &wish("disk")).contains("no TPM to make it in"));
        assert!(
            refused(&Machine { boot_lists: Some(false), ..laptop() }, &Wishes::default()).contains("[[boot.volumes]]")
        );
    }

    #[test]
    fn what_the_key_does_not_keep_out_is_said_before() {
        let notes = |machine: &Machine| {
            let wishes = Wishes::default();
            plan(machine, &wishes).unwrap().lines(machine, &wishes).split_off(3).join("\n")
        };
        assert_eq!(notes(&laptop()), "");
        let off = TpmFound { secure_boot: Some(false), ..GRUB };
        assert!(notes(&Machine { tpm: Some(off), ..laptop() }).starts_with("note    Secure Boot is not on"));
        let usual = Machine { is_boot_encrypted: false, ..laptop() };
        assert!(notes(&usual).contains("/boot is not encrypted, and its initramfs is not measured into PCR 7: "));
        // Whoever makes the initramfs.
        let by_hand = Machine { maker: None, ..usual.clone() };
        assert!(notes(&by_hand).contains("/boot is not encrypted"), "{}", notes(&by_hand));
        let two = Machine { strangers: vec!["/dev/vda4 (ntfs)".to_owned()], ..laptop() };
        assert!(notes(&two).contains("/dev/vda4 (ntfs) may be another system: whoever starts it"));
        let pin = Some(TpmKey { pcrs: PcrSet::of(&[7]), is_signed: false, has_pin: true });
        let kept = Machine { key: pin, tpm: Some(off), is_boot_encrypted: false, ..two };
        assert!(notes(&kept).contains("another system: its setup may clear"), "{}", notes(&kept));
        assert_eq!(notes(&kept).lines().count(), 1);
    }

    #[test]
    fn a_run_that_was_stopped_goes_on_with_its_own_store() {
        let stores = vec![store("disk", true), store("stick", false)];
        let key = Some(TpmKey { pcrs: PcrSet::of(&[7]), is_signed: false, has_pin: false });
        let begun = Machine { made: "disk".parse().ok(), default_store: "disk".parse().ok(), stores, key, ..laptop() };
        let tang = Wishes { tang: Some("http://t1".to_owned()), ..Wishes::default() };
        let made = plan(&begun, &tang).unwrap();
        assert!(made.store.as_str() == "disk" && !made.new_store && !made.recovery);
    }
}
