//! `cryptattach host ...`

mod admit;
mod join;
mod register;

use clap::Subcommand;

use super::Global;
use crate::verbs::error::Error;

/// Join hosts by their TPMs, admit them to stores, and remove them
#[derive(Subcommand)]
#[command(after_help = "Examples:
  cryptattach host join                                            # on the host: writes compute-7.request
  cryptattach host admit compute-7.request --ca /etc/tpm-makers    # the administrator: writes compute-7.answer
  cryptattach host join compute-7.answer                           # on the host
  cryptattach lockbox open                                         # on the host, once per boot")]
pub enum Host {
    Join(join::Join),
    Admit(admit::Admit),
    List(register::List),
    Remove(register::Remove),
}

impl Host {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Join(join) => join.run(global),
            Self::Admit(admit) => admit.run(global),
            Self::List(list) => list.run(global),
            Self::Remove(remove) => remove.run(global),
        }
    }
}
