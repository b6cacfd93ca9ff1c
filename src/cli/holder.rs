//! `cryptattach container owner replace` and `cryptattach container escrow replace`

use std::path::PathBuf;

use clap::{ArgGroup, Args, Subcommand};

use super::{
    AnswerOption, Global,
    bar::with_bar,
    container::{days, finished, lines_of},
    output,
};
use crate::{
    base::key::StoreName,
    config::IdentitySpec,
    verbs::{
        error::Error,
        holder::{self, Holder, Request},
    },
};

#[derive(Subcommand)]
pub enum HolderVerb {
    Replace(Replace),
}

/// Make another key the holder's: write it to the configuration, and seal all keys under the next container key
///
/// The former key opens the container keys before that until they are deleted, and copies of keys that were made until
/// then. It does not touch the volumes. Resumes if interrupted.
#[derive(Args)]
#[command(
    name = "replace",
    group = ArgGroup::new("proof").required(true).args(["identity", "unproven"]),
    after_help = "Examples:
  cryptattach container owner replace cinder new-owner.pem --identity new-owner.key
  cryptattach container escrow replace cinder new-escrow.pem --identity /media/safe/new-escrow.key"
)]
pub struct Replace {
    /// The store
    name: StoreName,
    /// The new public key or certificate (PEM)
    file: PathBuf,
    /// Its private key, which has to open what is sealed to it: FILE in PEM, or tpm:FILE. An owner's is added to the
    /// identities of the store
    #[arg(long, value_name = "FILE")]
    identity: Option<IdentitySpec>,
    /// Do without the private key: if nobody has it, it opens nothing
    #[arg(long)]
    unproven: bool,
    /// Delete container keys that were replaced more than this many days ago; Swift may list a key up to a week late
    #[arg(long, value_name = "DAYS", default_value_t = 7)]
    keep_days: u32,
    #[command(flatten)]
    answer: AnswerOption,
}

impl HolderVerb {
    pub(super) fn run(&self, global: &Global, holder: Holder) -> Result<(), Error> {
        let Self::Replace(Replace { name, file, identity, keep_days, answer, .. }) = self;
        let attendant = answer.attendant()?;
        let request = Request { name, holder, public: file, private: identity.as_ref(), keep: days(*keep_days) };
        let done = with_bar(global.json, |progress| holder::replace(&global.config, &request, &attendant, progress))?;
        output::print(global.json, &done, || {
            let mut lines = lines_of(name, &done.rotation);
            lines.push(format!("  {holder:<17}{}", done.public.display()));
            lines.extend(done.before.as_ref().map(|before| format!("  before           {}", before.display())));
            if !done.proven {
                lines.push("  NOT PROVEN       that anybody has its private key".to_owned());
            }
            lines.push(format!(
                "  still opened     by the former {holder}: the container keys before {name}/kek/{} until a rotation deletes them \
                 (after {keep_days} days), and copies of keys that were made until now",
                done.rotation.epoch
            ));
            lines.extend(done.lockboxes.iter().map(|host| {
                format!(
                    "  still opened     by the former {holder}: the lockbox key of {host}, until it is admitted anew"
                )
            }));
            lines
        })?;
        finished(name, &done.rotation)
    }
}
