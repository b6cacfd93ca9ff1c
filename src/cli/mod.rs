//! The command line: one small file per verb.

mod attach;
mod audit;
mod backup;
mod bar;
mod bind;
mod boot;
mod container;
mod detach;
mod doctor;
mod encrypt;
mod erase;
mod explain;
mod failure;
mod format;
mod header;
mod holder;
mod hook;
mod host;
mod init;
mod integrate;
mod key;
mod leaf;
mod list;
mod lockbox;
mod man;
mod r#move;
mod names;
mod output;
mod pace;
mod paper;
mod policy;
mod receipt;
mod resize;
mod rotate;
mod separation;
mod status;
mod test;
mod words;

use std::{
    io::{self, IsTerminal},
    panic,
    path::PathBuf,
    process::ExitCode,
};

pub use hook::{attach_request, stored_object};

use clap::{ArgAction, Args, Parser, Subcommand};
use nix::sys::resource::{Resource, setrlimit};
use tracing_subscriber::{
    Layer,
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use crate::{
    base::{exit::Exit, key::SecretBytes, log::message_only, person::Attendant},
    config::{self, Config, ConfigError, SeparationPolicy},
    keys::tpm,
    sys::{process, terminal::AtTerminal},
    verbs::{
        boot::{self as boots, BootError, Reports},
        error::Error,
        setup,
    },
    volumes::backend::userspace,
};

/// Attach encrypted block devices, with the key on another device.
#[derive(Parser)]
#[command(name = "cryptattach", version, max_term_width = 100, after_help = failure::after_help())]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Options of all verbs.
#[derive(Args)]
#[command(next_help_heading = "All commands")]
struct Global {
    /// The configuration file
    #[arg(long, global = true, env = "CRYPTATTACH_CONFIG", default_value = config::DEFAULT_PATH, value_name = "FILE", hide_env_values = true)]
    config: PathBuf,
    /// Print JSON, for machines
    #[arg(long, global = true)]
    json: bool,
    /// Log more (-v: what cryptattach does, -vv: also what its libraries do)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
}

#[derive(Subcommand)]
enum Verb {
    Bind(bind::Bind),
    Unbind(bind::Unbind),
    Init(init::Init),
    Format(format::Format),
    Encrypt(encrypt::Encrypt),
    #[command(aliases = ["open", "luksOpen", "unlock"])]
    Attach(attach::Attach),
    #[command(aliases = ["close", "luksClose", "lock"])]
    Detach(detach::Detach),
    Resize(resize::Resize),
    Status(status::Status),
    #[command(alias = "ls")]
    List(list::List),
    Separation(separation::Separation),
    Test(test::Test),
    Explain(explain::Explain),
    Boot(boot::Boot),
    Doctor(doctor::Doctor),
    #[command(subcommand)]
    Key(key::Key),
    #[command(subcommand)]
    Container(container::Container),
    #[command(subcommand)]
    Header(header::Header),
    #[command(subcommand)]
    Leaf(leaf::Leaf),
    #[command(subcommand)]
    Policy(policy::Policy),
    #[command(subcommand)]
    Host(host::Host),
    #[command(subcommand)]
    Lockbox(lockbox::LockboxVerb),
    #[command(subcommand)]
    Audit(audit::Audit),
    #[command(subcommand)]
    Receipt(receipt::Receipt),
    #[command(subcommand)]
    Hook(hook::Hook),
    #[command(hide = true)]
    Man(man::Man),
    #[command(hide = true)]
    Completions(integrate::Completions),
    #[command(hide = true)]
    Names(names::Names),
    #[command(name = "systemd-generator", hide = true)]
    Generator(integrate::Generator),
    #[command(name = "udev-probe", hide = true)]
    Probe(integrate::Probe),
    /// The process that holds a userspace mapping; started by attach
    #[command(name = userspace::SUBCOMMAND, hide = true)]
    UserspaceWorker,
}

/// What separation may let through; shared by format and attach.
#[derive(Args)]
#[command(next_help_heading = "Separation of key and data")]
struct SeparationOptions {
    /// What to do if nothing proves that key and data are separate [default: as configured]
    #[arg(long, value_name = "POLICY")]
    separation: Option<SeparationPolicy>,
    /// Continue although key and data are on the same device; the audit record notes it
    #[arg(long)]
    allow_shared: bool,
}

impl SeparationOptions {
    fn strictness(&self) -> crate::unlock::case::Strictness {
        crate::unlock::case::Strictness { policy: self.separation, allow_shared: self.allow_shared }
    }
}

impl Global {
    fn config(&self) -> Result<Config, ConfigError> {
        setup::configuration(&self.config)
    }

    /// The configuration of a boot, which has no other than the default one.
    fn of_boot(&self) -> Result<Config, Error> {
        self.config().map_err(|error| match error {
            ConfigError::Missing(path) if path.as_os_str() == config::DEFAULT_PATH => {
                BootError::NoConfiguration(path).into()
            }
            error => error.into(),
        })
    }

    /// The configuration for a verb that a person watches.
    fn attended(&self, answer: &AnswerOption) -> Result<Config, Error> {
        let mut config = self.config()?;
        config.attendant = answer.attendant()?;
        Ok(config)
    }
}

/// What answers in place of the person at the terminal.
#[derive(Args)]
#[command(next_help_heading = "Leaves that a person opens")]
struct AnswerOption {
    /// File with the recovery key or passphrase; without it the terminal asks, if nothing else opens the key. '-' is
    /// standard input
    #[arg(long, value_name = "FILE")]
    answer: Option<PathBuf>,
}

impl AnswerOption {
    /// Who answers.
    fn attendant(&self) -> Result<Attendant, Error> {
        Ok(self.read()?.map_or_else(|| Attendant::of(AtTerminal::default()), Attendant::answering))
    }

    /// The file without its last newline.
    fn read(&self) -> Result<Option<SecretBytes>, Error> {
        let Some(path) = &self.answer else { return Ok(None) };
        let mut answer = key::read_secret("the answer", path)?;
        let end = answer.expose().iter().rposition(|byte| !matches!(byte, b'\n' | b'\r'));
        answer.truncate(end.map_or(0, |end| end + 1));
        Ok(Some(answer))
    }
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    end_on_panic();
    keep_out_of_core_dumps();
    tpm::silence();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { Exit::Usage.into() } else { 0 };
            words::tell_misuse(error, std::env::args_os());
            return ExitCode::from(code);
        }
    };
    if let Verb::UserspaceWorker = cli.verb {
        return userspace::worker_main();
    }
    // A boot's lines go into its record, too.
    let colours = io::stderr().is_terminal() && !matches!(cli.verb, Verb::Boot(_));
    let reports = Reports::default();
    let boot = matches!(&cli.verb, Verb::Boot(boot) if boot.is_boot()).then(|| reports.log());
    log(cli.global.verbose, colours, boot);
    let code = run(&cli, reports).unwrap_or_else(|error| {
        failure::print(&error, cli.global.json);
        crate::verbs::failure::exit(&error).into()
    });
    // A boot leaves threads behind that wait for a disk or a server.
    if let Verb::Boot(_) = cli.verb { process::leave(code) } else { code.into() }
}

/// A defect ends the program, in whatever thread it shows: what holds keys does not go on in a state that nobody foresaw. It
/// leaves what `kill -9` would leave, and that is nothing half-done.
fn end_on_panic() {
    let tell = panic::take_hook();
    panic::set_hook(Box::new(move |defect| {
        tell(defect);
        process::leave(Exit::Internal.into());
    }));
}

/// The exit code.
fn run(cli: &Cli, reports: Reports) -> Result<u8, Error> {
    let global = &cli.global;
    match &cli.verb {
        Verb::Boot(boot) => return boot.run(global, reports),
        Verb::Bind(bind) => bind.run(global),
        Verb::Unbind(unbind) => unbind.run(global),
        Verb::Init(init) => init.run(global),
        Verb::Format(format) => format.run(global),
        Verb::Encrypt(encrypt) => encrypt.run(global),
        Verb::Attach(attach) => attach.run(global),
        Verb::Detach(detach) => detach.run(global),
        Verb::Resize(resize) => resize.run(global),
        Verb::Status(status) => status.run(global),
        Verb::List(list) => list.run(global),
        Verb::Separation(separation) => separation.run(global),
        Verb::Doctor(doctor) => doctor.run(global),
        Verb::Key(key) => key.run(global),
        Verb::Container(container) => container.run(global),
        Verb::Header(header) => header.run(global),
        Verb::Leaf(leaf) => leaf.run(global),
        Verb::Policy(policy) => policy.run(global),
        Verb::Host(host) => host.run(global),
        Verb::Lockbox(lockbox) => lockbox.run(global),
        Verb::Audit(audit) => audit.run(global),
        Verb::Receipt(receipt) => receipt.run(global),
        Verb::Hook(hook) => hook.run(global),
        Verb::Test(test) => test.run(global),
        Verb::Explain(explain) => explain.run(global),
        Verb::Man(man) => man.run(),
        Verb::Completions(completions) => completions.run(),
        Verb::Names(names) => names.run(global),
        Verb::Generator(generator) => generator.run(global),
        Verb::Probe(probe) => probe.run(global),
        Verb::UserspaceWorker => Ok(()),
    }?;
    Ok(0)
}

/// No core dump and no ptrace(2) by other processes of the same user: what passes through registers and libraries is
/// beyond the reach of locked memory.
fn keep_out_of_core_dumps() {
    let _ = nix::sys::prctl::set_dumpable(false);
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
}

/// Logs to standard error, or to the boot that runs in this process.
fn log(verbose: u8, colours: bool, boot: Option<boots::Log>) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let lines = fmt::layer()
        .with_writer(io::stderr)
        .fmt_fields(message_only())
        // It would panic over a line that cannot be written.
        .log_internal_errors(false)
        .without_time()
        .with_target(false)
        .with_ansi(colours);
    // Ours only: what the HTTP libraries have to say is long, and not ours to vouch for.
    let ours = Targets::new().with_target(env!("CARGO_CRATE_NAME"), level);
    let _ = match boot {
        Some(boot) => tracing_subscriber::registry().with(boot.with_filter(ours)).try_init(),
        None => tracing_subscriber::registry().with(lines.with_filter(ours)).try_init(),
    };
}

#[cfg(test)]
mod tests {
    use std::{env, process::Command, thread};

    use crate::base::exit::Exit;

    /// This test again, in a process of its own, which the panic of a thread is to end.
    const ENDS: &str = "CRYPTATTACH_TEST_ENDS";

    #[test]
    fn a_panic_of_any_thread_ends_the_program() {
        if env::var_os(ENDS).is_some() {
            super::end_on_panic();
            let _ = thread::spawn(|| panic!("a defect")).join();
            return;
        }
        let name = "cli::tests::a_panic_of_any_thread_ends_the_program";
        let again =
            Command::new(env::current_exe().unwrap()).args(["--exact", name, "--nocapture"]).env(ENDS, "").output();
        let again = again.unwrap();
        assert_eq!(again.status.code(), Some(u8::from(Exit::Internal).into()));
        assert!(String::from_utf8_lossy(&again.stderr).contains("a defect"), "{again:?}");
    }
}
