//! A failure as it is told: what failed, why, what to do next, and the exit code. Kept for `explain`, and in the record of a boot.

use std::{error::Error as StdError, io};

use serde::{Deserialize, Serialize};

use crate::{
    base::{
        advice::{Advice, is_permission_denied},
        chain::{causes, message},
        exit::Exit,
    },
    verbs::error::Error,
};

/// A failure as it is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    causes: Vec<String>,
    error: String,
    /// See [`Exit`].
    pub exit_code: u8,
    /// What the user can do about it.
    pub next: Option<String>,
}

impl Failure {
    /// A command line that is wrong.
    pub fn usage(error: String, next: String) -> Self {
        Self { causes: Vec::new(), error, exit_code: Exit::Usage.into(), next: Some(next) }
    }

    /// The error with its causes and its advice.
    pub fn of(error: &Error) -> Self {
        let told = causes(error).skip(1).map(|cause| message(cause).trim_end().to_owned()).collect();
        Self {
            causes: distinct(message(error), told),
            error: message(error),
            exit_code: exit(error).into(),
            next: next_step(error),
        }
    }
}

/// The exit code for an error.
pub fn exit(error: &Error) -> Exit {
    match error.exit() {
        _ if is_permission_denied(error) => Exit::PermissionDenied,
        Exit::Io if is_not_there(error) => Exit::Missing,
        exit => exit,
    }
}

/// Whether a file that was named does not exist, as any of the causes.
fn is_not_there(error: &Error) -> bool {
    let mut io = causes(error).filter_map(|cause| cause.downcast_ref::<io::Error>());
    io.any(|cause| cause.kind() == io::ErrorKind::NotFound)
}

fn next_step(error: &Error) -> Option<String> {
    let is_root = nix::unistd::geteuid().is_root();
    if is_permission_denied(error as &(dyn StdError + 'static)) && !is_root {
        return Some("run it as root".to_owned());
    }
    let step = error.next_step();
    let missing = || (exit(error) == Exit::Missing).then(|| "check the path: there is nothing".into());
    step.or_else(missing).map(Into::into)
}

impl Failure {
    /// What failed, without its causes.
    pub fn error(&self) -> &str {
        &self.error
    }

    /// As people read it.
    pub fn lines(&self) -> Vec<String> {
        let error = [format!("cryptattach: {}", self.error)].into_iter();
        let causes = self.causes.iter().map(|cause| format!("  because {cause}"));
        let next = self.next.iter().map(|next| format!("  next: {next}"));
        let texts = error.chain(causes).chain(next);
        texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    }
}

/// Transparent variants repeat their cause's text.
fn distinct(first: String, causes: Vec<String>) -> Vec<String> {
    let mut last = first;
    causes.into_iter().filter(|cause| std::mem::replace(&mut last, cause.clone()) != *cause).collect()
}
