//! `cryptattach bind`, `cryptattach unbind`

use std::{fs, path::PathBuf};

use clap::Args;
use serde::Deserialize;
use serde_json::json;

use super::{AnswerOption, Global, key, leaf, output, paper};
use crate::{
    base::{
        key::{SecretBytes, StoreName},
        mapping_name::MappingName,
        pcr_set::PcrSet,
    },
    config::Policy,
    sys::terminal,
    verbs::{
        bind::{self, Bound, Request, Unbound, plan::Wishes},
        error::Error,
        leaf::Hands,
    },
};

/// Have an encrypted volume unlock by itself from now on: the whole job in one command
///
/// Looks at the machine and proposes the store and what opens it; a machine with a TPM and no store gets one in the TPM's memory.
/// Asks for a passphrase of the LUKS2 volume, which goes on to open it. Makes what is missing (this host's key in the TPM, the
/// store, a recovery key), seals and stores the volume's key, has the boot know the volume, makes the initramfs anew, and tries
/// it as a boot would. 'cryptattach unbind' takes it all back.
#[derive(Args)]
#[command(after_help = "Resumes if interrupted. On a volume that is bound already it changes nothing.

Examples:
  cryptattach bind /dev/vda3
  cryptattach bind /dev/vda3 --dry-run
  cryptattach bind /dev/vda3 --tang http://tang.example.org    opens in the network of that server only
  cryptattach bind /dev/vdb --store stick --key-file passphrase.txt
  cryptattach bind /dev/vda3 --replace                         in place of clevis or systemd-cryptenroll
  cryptattach bind /dev/vda3 --answers bind.toml               for many machines

A file of answers:
  key-file = \"/run/passphrase\"
  no-recovery = true
  escrow = \"/etc/cryptattach/site-escrow.pem\"")]
pub struct Bind {
    /// The encrypted block device or file
    device: PathBuf,
    /// Show what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// TOML file with these options by their names, for many machines; an option that is given here counts more
    #[arg(long, value_name = "FILE")]
    answers: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
    #[command(flatten)]
    answer: AnswerOption,
}

/// What a file of answers may say as well.
#[derive(Args, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Options {
    /// File with a passphrase of the volume, with or without a newline at its end; '-' is standard input [default: the terminal
    /// asks]
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,
    /// The store for the key [default: default_store of the configuration, or its only store, or a new one in the TPM]
    #[arg(long)]
    store: Option<StoreName>,
    /// The mapping's name, if neither crypttab nor the configuration has one [default: luks-UUID]
    #[arg(long)]
    name: Option<MappingName>,
    /// A new store opens by the TPM together with this Tang server only
    #[arg(long, value_name = "URL")]
    tang: Option<String>,
    /// The thumbprint of the Tang server's signing key, so that nobody is asked
    #[arg(long, value_name = "THUMBPRINT", allow_hyphen_values = true, requires = "tang")]
    thumbprint: Option<String>,
    /// What opens a new store, as in docs/policies.md; its leaves are in the configuration
    #[arg(long, value_name = "POLICY", conflicts_with = "tang")]
    opens: Option<String>,
    /// What a new key in the TPM is bound to [default: as [tpm] says, or PCRs that a new kernel or initramfs does not change]
    #[arg(long, value_name = "PCRS")]
    pcrs: Option<PcrSet>,
    /// Public key or X.509 certificate (PEM) that opens a new store, too; its private key is kept elsewhere
    #[arg(long, value_name = "FILE")]
    escrow: Option<PathBuf>,
    /// Make no recovery key (14 words, shown once) for a new store
    #[arg(long)]
    no_recovery: bool,
    /// Leave the initramfs as it is
    #[arg(long)]
    no_initramfs: bool,
    /// Remove what clevis and systemd-cryptenroll's TPM have bound, once the new way was tried
    #[arg(long)]
    replace: bool,
}

impl Options {
    /// With the answers of a file where the command line says nothing.
    fn or(self, answers: Self) -> Self {
        Self {
            key_file: self.key_file.or(answers.key_file),
            store: self.store.or(answers.store),
            name: self.name.or(answers.name),
            tang: self.tang.or(answers.tang),
            thumbprint: self.thumbprint.or(answers.thumbprint),
            opens: self.opens.or(answers.opens),
            pcrs: self.pcrs.or(answers.pcrs),
            escrow: self.escrow.or(answers.escrow),
            no_recovery: self.no_recovery || answers.no_recovery,
            no_initramfs: self.no_initramfs || answers.no_initramfs,
            replace: self.replace || answers.replace,
        }
    }

    fn wishes(&self) -> Result<Wishes, Error> {
        let policy =
            |text: &String| text.parse::<Policy>().map_err(|why| Error::Usage(format!("--opens '{text}': {why}")));
        let opens = self.opens.as_ref().map(policy).transpose()?;
        let Self { store, name, tang, pcrs, escrow, no_recovery, no_initramfs, replace, .. } = self.clone();
        Ok(Wishes { store, name, pcrs, tang, opens, escrow, no_recovery, no_initramfs, replace })
    }
}

impl Bind {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let options = self.options.clone().or(self.answers()?);
        let wishes = options.wishes()?;
        let tell = told(global);
        let mut request = Request {
            config: &global.config,
            device: &self.device,
            wishes: &wishes,
            key_file: None,
            ask: &ask,
            hands: None,
            thumbprint: options.thumbprint.as_deref(),
            choose: &leaf::confirmed,
            attendant: self.answer.attendant()?,
            tell: &tell,
        };
        let (plan, lines) = bind::propose(&request)?;
        if self.dry_run {
            return output::print(global.json, &json!({"plan": plan}), || lines);
        }
        let hands = paper::at_terminal(plan.recovery).map_err(|_| {
            Error::Usage(
                "a recovery key is shown at a terminal only: run this at one, or with --no-recovery".to_owned(),
            )
        })?;
        request.hands = hands.as_ref().map(|hands| hands as &dyn Hands);
        let read = options.key_file.as_ref().map(|file| || key::read_secret("the key file", file));
        request.key_file = read.as_ref().map(|read| read as _);
        let bound = bind::bind(&request)?;
        output::print(global.json, &bound, || text(&bound))
    }

    fn answers(&self) -> Result<Options, Error> {
        let Some(path) = &self.answers else { return Ok(Options::default()) };
        let text = fs::read_to_string(path).map_err(Error::io(format!("read {}", path.display())))?;
        toml::from_str(&text).map_err(|error| Error::Usage(format!("{}: {error}", path.display())))
    }
}

/// Tells people what is being done; a program gets the result.
fn told(global: &Global) -> impl Fn(Vec<String>) {
    let json = global.json;
    move |lines| {
        if !json {
            output::say(lines);
        }
    }
}

fn ask(question: &str) -> Result<SecretBytes, Error> {
    let nobody = |_| {
        Error::Usage("nobody can be asked for a passphrase of the volume here: name a file with --key-file".to_owned())
    };
    let answer = terminal::ask(question, &|| false).map_err(nobody)?;
    answer.ok_or_else(|| Error::Usage("nothing was changed".to_owned()))
}

fn text(bound: &Bound) -> Vec<String> {
    let Bound { device, key, already, tried, lacks, replaced, thieves, .. } = bound;
    let device = device.display();
    let done = match (already, tried) {
        (true, _) => format!("{device} is bound already; nothing was changed"),
        (false, true) => format!("{device} is bound, and opened as a boot would open it"),
        (false, false) => format!("{device} is bound, and could NOT be tried in this boot"),
    };
    let mut lines = vec![done, format!("  its key                    {key}")];
    lines.extend(replaced.iter().map(|binding| format!("  removed                    {binding}")));
    lines.extend(lacks.iter().map(|lack| format!("  the initramfs              {lack}")));
    lines.push(format!("  a thief of the disk gets   {}", thieves.disk));
    lines.push(format!("  a thief of the machine     {}", thieves.machine));
    lines.push(format!("  somebody with a stick      {}", thieves.stick));
    lines.push("  a passphrase opens it as before: keep one".to_owned());
    lines
}

/// Take back what 'cryptattach bind' has made for a volume: token, key, entries for the boot, and what nothing else needs
///
/// The volume's passphrase opens it as before. Refused if no keyslot is left: the data would be lost.
#[derive(Args)]
#[command(after_help = "Resumes if interrupted.

Examples:
  cryptattach unbind /dev/vda3")]
pub struct Unbind {
    /// The encrypted block device or file
    device: PathBuf,
    /// Leave the initramfs as it is
    #[arg(long)]
    no_initramfs: bool,
}

impl Unbind {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let unbound = bind::unbind(&global.config, &self.device, self.no_initramfs, &told(global))?;
        output::print(global.json, &unbound, || {
            let Unbound { device, key, stays, .. } = &unbound;
            let mut lines = vec![format!("{} is not bound any more; a passphrase opens it", device.display())];
            lines.extend(key.iter().map(|key| format!("  deleted  {key}")));
            lines.extend(stays.iter().map(|stays| format!("  note     {stays}")));
            lines
        })
    }
}
