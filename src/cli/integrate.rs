//! What systemd, udev and shells ask for; no verbs for people.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Global, output};
use crate::{
    config::{Config, ConfigError},
    keys::store,
    verbs::{
        error::Error,
        generator,
        hotplug::{self, Appeared},
    },
};

/// Write shell completions into a directory: cryptattach.bash, _cryptattach (zsh), cryptattach.fish
#[derive(Args)]
pub struct Completions {
    /// The directory
    directory: PathBuf,
}

impl Completions {
    pub(super) fn run(&self) -> Result<(), Error> {
        let action = format!("write completions to {}", self.directory.display());
        self.write().map_err(Error::io(action))
    }

    fn write(&self) -> io::Result<()> {
        let mut cli = for_people(&Cli::command());
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let path = clap_complete::generate_to(shell, &mut cli, "cryptattach", &self.directory)?;
            let text = fs::read_to_string(&path)?;
            fs::write(&path, with_names(shell, &text))?;
        }
        Ok(())
    }
}

/// Without the verbs that units, udev and shells call.
fn for_people(command: &Command) -> Command {
    // A name has to be known for good; this process ends soon.
    let name: &'static str = Box::leak(command.get_name().to_owned().into_boxed_str());
    let below = command.get_subcommands().filter(|below| !below.is_hide_set()).map(for_people);
    let shown = Command::new(name).args(command.get_arguments()).groups(command.get_groups()).subcommands(below);
    let shown = shown.disable_help_subcommand(true);
    command.get_about().cloned().map_or(shown.clone(), |about| shown.about(about))
}

/// A shell's completions, which ask 'cryptattach names' as well. To a shell it is all the same whether there is a configuration.
fn with_names(shell: Shell, text: &str) -> String {
    match shell {
        // Of clap's words those that stand for a value are left out.
        Shell::Bash => {
            text.to_owned()
                + r#"
_cryptattach_named() {
    _cryptattach "$@"
    local word words=()
    for word in "${COMPREPLY[@]}"; do
        case $word in '<'* | '['* | '') ;; *) words+=("$word") ;; esac
    done
    local names=$(cryptattach names -- "${COMP_WORDS[@]:1:COMP_CWORD-1}" 2>/dev/null)
    COMPREPLY=("${words[@]}" $(compgen -W "$names" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -F _cryptattach_named -o nosort -o bashdefault -o default cryptattach
"#
        }
        // The file is the function _cryptattach until that has run for the first time.
        Shell::Zsh => text.replacen("_cryptattach() {", "_cryptattach_words() {", 1).replacen(
            "\nif [ \"$funcstack[1]\"",
            r#"
_cryptattach() {
    local -a names
    names=(${(f)"$(cryptattach names -- ${words[2,CURRENT-1]} 2>/dev/null)"})
    (( $#names )) && compadd -a names
    _cryptattach_words "$@"
}

if [ "$funcstack[1]""#,
            1,
        ),
        _ => {
            text.to_owned()
                + "complete -c cryptattach -a \"(cryptattach names -- (commandline -opc)[2..-1] 2>/dev/null)\"\n"
        }
    }
}

/// Generate systemd units for [volumes] of the configuration
#[derive(Args)]
pub struct Generator {
    /// The directory for units
    normal: PathBuf,
    /// Not used
    early: Option<PathBuf>,
    /// Not used
    late: Option<PathBuf>,
}

impl Generator {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let Some(config) = outline(global)? else { return Ok(()) };
        let action = format!("write units to {}", self.normal.display());
        generator::generate(&config, &self.normal).map_err(Error::io(action))
    }
}

/// Print the udev properties that describe a device
#[derive(Args)]
pub struct Probe {
    /// The device's node
    device: PathBuf,
    /// The device is a mapping: describe the volume below it
    #[arg(long)]
    mapping: bool,
}

impl Probe {
    pub(super) fn run(&self, global: &Global) -> Result<(), Error> {
        let below = || hotplug::below(&self.device).map_err(Error::io(format!("look below {}", self.device.display())));
        let device = if self.mapping { below()? } else { Some(self.device.clone()) };
        let Some(device) = device else { return Ok(()) };
        // A configuration that cannot be read must not hide what the device is.
        let config = outline(global).unwrap_or_else(|error| {
            tracing::warn!("{}", crate::base::chain::chain(&error));
            None
        });
        let links: Vec<PathBuf> =
            env::var("DEVLINKS").unwrap_or_default().split_whitespace().map(PathBuf::from).collect();
        let appeared = hotplug::appeared(config.as_ref(), &device, if self.mapping { &[] } else { &links })?;
        let Appeared { key, unit } = appeared;
        let ours = (key.is_some() || unit.is_some()).then(|| "ID_CRYPTATTACH=1".to_owned());
        let key = key.map(|key| format!("ID_CRYPTATTACH_KEY={key}"));
        let unit = unit.filter(|_| !self.mapping).map(|unit| format!("ID_CRYPTATTACH_UNIT={unit}"));
        let lines: Vec<String> = [ours, key, unit].into_iter().flatten().collect();
        if lines.is_empty() { Ok(()) } else { output::print(false, &(), || lines) }
    }
}

/// The configuration, if there is one.
fn outline(global: &Global) -> Result<Option<Config>, Error> {
    match Config::outline(Path::new(&global.config)) {
        Ok(config) => {
            store::check(&config)?;
            Ok(Some(config))
        }
        Err(ConfigError::Missing(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
