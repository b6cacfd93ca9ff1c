//! The log of a boot: what stores and the TPM warn of reaches the boot as values. It tells them as its own lines: in its
//! record, in the kernel's log, and not where a person is typing.

use std::{
    fmt,
    sync::mpsc::{self, Receiver, Sender},
};

use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{Layer, layer::Context};

use super::Report;
use crate::base::chain::printable;

/// What the log and the threads of a boot report to it.
pub struct Reports {
    pub(super) sender: Sender<Report>,
    pub(super) receiver: Receiver<Report>,
}

impl Default for Reports {
    fn default() -> Self {
        let (sender, receiver) = mpsc::channel();
        Self { sender, receiver }
    }
}

impl Reports {
    /// The layer of the log that reports to the boot.
    pub fn log(&self) -> Log {
        Log(self.sender.clone())
    }
}

/// Sends each event of the log to the boot.
pub struct Log(Sender<Report>);

/// An event of the log.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Logged {
    /// It is said once for each problem.
    pub is_warning: bool,
    pub text: String,
    /// The problem alone, in the same words each time; none if the message is that.
    pub problem: Option<String>,
}

impl<S: Subscriber> Layer<S> for Log {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut logged = Logged::default();
        event.record(&mut logged);
        let level = *event.metadata().level();
        logged.is_warning = level == Level::WARN;
        if !logged.is_warning {
            logged.text = format!("{level} {}", logged.text);
        }
        // After its end a boot hears nothing.
        let _ = self.0.send(Report::Logged(logged));
    }
}

impl Visit for Logged {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.text = printable(&format!("{value:?}")),
            "problem" => self.problem = Some(printable(&format!("{value:?}"))),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn an_event_reaches_the_boot_with_its_problem_apart() {
        let reports = Reports::default();
        let subscriber = tracing_subscriber::registry().with(reports.log());
        tracing::subscriber::with_default(subscriber, || {
            let (why, left) = ("https://keys answers 503", 90);
            tracing::warn!(problem = %why, "{why}; trying again for up to {left} s");
            tracing::debug!("asked");
        });
        let logged: Vec<Logged> = reports.receiver.try_iter().filter_map(Report::logged).collect();
        let text = "https://keys answers 503; trying again for up to 90 s".to_owned();
        let problem = Some("https://keys answers 503".to_owned());
        let asked = Logged { text: "DEBUG asked".to_owned(), ..Logged::default() };
        assert_eq!(logged, [Logged { is_warning: true, text, problem }, asked]);
    }
}
