//! `cryptattach host ...`

mod admission;
mod enrolment;
mod register;

use clap::Subcommand;

use super::Global;
use crate::{
    base::key::{HostName, StoreName},
    config::Config,
    keys::store::StoreError,
    unlock::{
        audit::{self, Event},
        container::{Container, Use},
        lockbox::{self, LockboxError},
    },
    verbs::error::Error,
};

/// Enrol hosts by their TPMs, admit them to stores, and remove them
#[derive(Subcommand)]
#[command(after_help = "Examples:
  cryptattach host enrol --output compute-7.bundle                       # on the host
  cryptattach host challenge compute-7.bundle --ca /etc/tpm-makers --output compute-7.challenge   # the administrator
  cryptattach host answer compute-7.challenge --output compute-7.answer  # on the host
  cryptattach host admit compute-7.answer --store cinder                 # the administrator
  cryptattach lockbox open                                               # on the host, once per boot")]
pub enum Host {
    Enrol(enrolment::Enrol),
    Challenge(admission::Challenge),
    Answer(enrolment::AnswerVerb),
    Admit(admission::Admit),
    List(register::List),
    Remove(register::Remove),
}

impl Host {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        match self {
            Self::Enrol(enrol) => enrol.run(global),
            Self::Challenge(challenge) => challenge.run(global),
            Self::Answer(answer) => answer.run(global),
            Self::Admit(admit) => admit.run(global),
            Self::List(list) => list.run(global),
            Self::Remove(remove) => remove.run(global),
        }
    }
}

/// Deletes a host's lockbox key; whether there was one.
fn withdraw(config: &Config, store: &StoreName, host: &HostName) -> Result<bool, Error> {
    match lockbox::withdraw(Container::open(config, store, None, Use::Keys)?.host_keys()?, host) {
        Ok(()) => Ok(true),
        Err(LockboxError::Store(StoreError::NotFound { .. })) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn names(stores: &[StoreName]) -> String {
    stores.iter().map(StoreName::as_str).collect::<Vec<_>>().join(", ")
}

fn record(config: &Config, action: &str, host: &HostName, stores: Option<String>) {
    let name = Some(host.to_string());
    let event = Event { action, key: stores, name, ..Event::default() };
    audit::done(config, &event);
}
