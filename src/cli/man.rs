//! `cryptattach man`: the man pages, from the same definitions as the help texts, and those of sections 5 and 7 from their pages.

use std::{
    fs,
    io::{self, Write},
    path::PathBuf,
};

use clap::{Arg, ArgAction, Args, Command, CommandFactory};
use clap_mangen::{
    Man as Page,
    roff::{Roff, bold, roman},
};

use super::{Cli, failure};
use crate::{base::exit, verbs::error::Error};

/// Write the man pages into a directory
#[derive(Args)]
pub struct Man {
    /// The directory
    directory: PathBuf,
    /// docs/configuration.md, for cryptattach.toml(5), and docs/boot.md, for cryptattach-boot(7)
    pages: Vec<PathBuf>,
}

/// What is made of a page of docs/: its name, section and one line on it.
const OF_PAGES: [(&str, &str, &str, &str); 2] = [
    ("configuration.md", "cryptattach.toml", "5", "configuration of cryptattach"),
    ("boot.md", "cryptattach-boot", "7", "how volumes are unlocked at boot"),
];

impl Man {
    pub(super) fn run(&self) -> Result<(), Error> {
        let mut cli = Cli::command().disable_help_subcommand(true);
        cli.build();
        let action = format!("write man pages to {}", self.directory.display());
        self.pages(&cli, None).map_err(Error::io(action))?;
        for page in &self.pages {
            let of = OF_PAGES.iter().find(|(file, ..)| page.ends_with(file));
            let Some((_, name, section, about)) = of else {
                return Err(Error::Usage(format!("no man page is made of {}", page.display())));
            };
            let text = fs::read_to_string(page).map_err(Error::io(format!("read {}", page.display())))?;
            let file = self.directory.join(format!("{name}.{section}"));
            let made = of_markdown(&text, name, section, about).to_roff();
            fs::write(&file, made).map_err(Error::io(format!("write {}", file.display())))?;
        }
        Ok(())
    }

    fn pages(&self, command: &Command, above: Option<&Command>) -> io::Result<()> {
        for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
            self.pages(below, Some(command))?;
        }
        let mut text = Vec::new();
        write_page(command, above, &mut text)?;
        let name = Page::new(command.clone()).get_filename();
        fs::write(self.directory.join(name), text)
    }
}

fn write_page(command: &Command, above: Option<&Command>, out: &mut dyn Write) -> io::Result<()> {
    // An empty date would have the other words of the title take its place.
    let page = Page::new(command.clone().override_usage(synopsis(command)));
    let page = page.date(" ").source("cryptattach").manual("cryptattach");
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    page.render_options_section(out)?;
    if command.has_subcommands() {
        page.render_subcommands_section(out)?;
    }
    let mut rest = Roff::new();
    let after = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    match (above, after.strip_prefix("Examples:\n")) {
        (None, _) => {}
        (Some(_), Some(examples)) => literally(rest.control("SH", ["EXAMPLES"]), examples.lines()),
        (Some(_), None) if after.is_empty() => {}
        (Some(_), None) => drop(rest.control("SH", ["NOTES"]).text([roman(after)])),
    }
    rest.control("SH", ["EXIT STATUS"]);
    match above {
        Some(_) => drop(rest.text([
            roman("0 if it was done, or was done already. Each failure has a code of its own: see "),
            bold("cryptattach"),
            roman("(1)."),
        ])),
        None => {
            for (code, meaning) in exit::table() {
                rest.control("TP", ["6"]).text([bold(code.to_string())]).text([roman(meaning)]);
            }
        }
    }
    literally(rest.control("SH", ["FILES"]), failure::FILES.lines().skip(1));
    rest.control("SH", ["SEE ALSO"]);
    let see = |name: &str, section| [bold(name.to_owned()), roman(section)];
    let mut also = Vec::new();
    for other in above.into_iter().chain(command.get_subcommands()).filter(|other| !other.is_hide_set()) {
        also.extend(see(other.get_display_name().unwrap_or("cryptattach"), "(1), "));
    }
    also.extend(above.is_none().then(|| see("cryptattach-boot", "(7), ")).into_iter().flatten());
    also.extend(see("cryptattach.toml", "(5), ").into_iter().chain(see("cryptsetup", "(8)")));
    rest.text(also);
    rest.to_writer(out)
}

/// Each option with its value. Those of all commands are in a section of their own.
fn synopsis(command: &Command) -> String {
    let name = command.get_bin_name().unwrap_or("cryptattach");
    let is_own =
        |arg: &&Arg| !arg.is_hide_set() && !arg.is_global_set() && !matches!(arg.get_id().as_str(), "help" | "version");
    let mut words = vec![name.to_owned()];
    for arg in command.get_arguments().filter(is_own) {
        let value = arg.get_value_names().map(|names| names.join(" ")).unwrap_or_default();
        let word = match arg.get_long() {
            Some(long) if matches!(arg.get_action(), ArgAction::SetTrue | ArgAction::Count) => format!("--{long}"),
            Some(long) => format!("--{long} {value}"),
            None => value,
        };
        let many = if matches!(arg.get_action(), ArgAction::Append) { "..." } else { "" };
        words.push(if arg.is_required_set() { word + many } else { format!("[{word}]{many}") });
    }
    words.extend(command.has_subcommands().then(|| "COMMAND ...".to_owned()));
    words.join(" ")
}

fn literally<'a>(page: &mut Roff, lines: impl Iterator<Item = &'a str>) {
    page.control("nf", []);
    for line in lines {
        page.text([roman(line)]);
    }
    page.control("fi", []);
}

/// What our own pages have of Markdown: headings, paragraphs, lists, indented text, tables of a term, perhaps a default, and
/// its meaning.
fn of_markdown(text: &str, name: &str, section: &str, about: &str) -> Roff {
    let mut page = Roff::new();
    page.control("TH", [name, section, " ", "cryptattach", "cryptattach"]);
    page.control("SH", ["NAME"]).text([roman(format!("{name} - {about}"))]);
    page.control("SH", ["DESCRIPTION"]);
    let mut is_literal = false;
    let mut lines = text.lines().skip(1).peekable();
    while let Some(line) = lines.next() {
        if is_literal != line.starts_with("    ") {
            is_literal = !is_literal;
            page.control(if is_literal { "nf" } else { "fi" }, []);
        }
        if is_literal {
            page.text([roman(line)]);
            continue;
        }
        let cells: Vec<_> = line.trim_matches('|').split(" | ").map(|cell| plain(cell.trim())).collect();
        let is_head = lines.peek().is_some_and(|next| next.starts_with("|---"));
        match line.split_once(' ') {
            _ if is_head || line.starts_with("|---") => {}
            _ if line.is_empty() => drop(page.control("PP", [])),
            Some(("##", title)) => drop(page.control("SH", [title.to_uppercase().as_str()])),
            Some(("###", title)) => drop(page.control("SS", [title])),
            Some(("-", item)) => drop(page.control("IP", ["\\(bu", "2"]).text([roman(plain(item))])),
            Some((number, item)) if number.strip_suffix('.').is_some_and(|number| number.parse::<u8>().is_ok()) => {
                page.control("IP", [number, "4"]).text([roman(plain(item))]);
            }
            Some(("|", _)) => {
                page.control("TP", []).text([bold(cells[0].clone())]);
                let default = cells.get(1).filter(|_| cells.len() > 2).map(|default| format!(" (default: {default})"));
                page.text([roman(cells.last().cloned().unwrap_or_default() + &default.unwrap_or_default())]);
            }
            _ => drop(page.text([roman(plain(line.trim_start()))])),
        }
    }
    let example = "(1), /etc/cryptattach/cryptattach.toml.example, pages in /usr/share/doc/cryptattach";
    let also = [bold("cryptattach"), roman(example)];
    page.control("SH", ["SEE ALSO"]).text(also);
    page
}

/// Without marks; of a link the text, and in brackets the page where it leads, unless the text says that.
fn plain(line: &str) -> String {
    let mut rest = line.replace('`', "").replace("**", "");
    let mut told = String::new();
    while let Some((before, after)) = rest.split_once("](") {
        let (target, after) = after.split_once(')').unwrap_or((after, ""));
        let page = target.split('#').next().unwrap_or_default();
        let (start, text) = before.split_at(opening(before));
        let text = text.strip_prefix('[').unwrap_or(text);
        told = told + start + text;
        if !page.is_empty() && page != text {
            told += &format!(" ({page})");
        }
        rest = after.to_owned();
    }
    told + &rest
}

/// Where the bracket is that the end of the text closes; a text may have brackets of its own.
fn opening(text: &str) -> usize {
    let mut open = 1;
    let is_it = |letter| {
        open += i32::from(letter == ']') - i32::from(letter == '[');
        open == 0
    };
    text.rfind(is_it).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn written(folder: &Path) -> impl Fn(&str) -> String {
        let pages = OF_PAGES.map(|(file, ..)| Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(file)).to_vec();
        Man { directory: folder.to_owned(), pages }.run().unwrap();
        let folder = folder.to_owned();
        move |name| fs::read_to_string(folder.join(name)).unwrap()
    }

    #[test]
    fn each_page_says_what_its_readers_look_for() {
        let folder = tempfile::tempdir().unwrap();
        let page = written(folder.path());
        let attach = page("cryptattach-attach.1");
        for part in ["SYNOPSIS", "\"PLAIN DM-CRYPT\"", "EXAMPLES", "\"EXIT STATUS\"", "FILES", "\"SEE ALSO\""] {
            assert!(attach.contains(&format!(".SH {part}")), "{part}: {attach}");
        }
        assert!(attach.contains("[\\-\\-header FILE]") && attach.contains("[DEVICE] [NAME]"), "{attach}");
        assert!(!attach.contains(".SH EXTRA") && !attach.contains("udev"));
        let whole = page("cryptattach.1");
        assert!(
            whole.contains("key and data are on the same device") && whole.contains("cryptattach\\-key"),
            "{whole}"
        );
        // None of a verb that is not for people.
        assert!(!folder.path().join("cryptattach-udev-probe.1").exists());
        let toml = page("cryptattach.toml.5");
        for part in ["default_store", ".SH STORES", "no_escrow", "(default: false)"] {
            assert!(toml.contains(part), "{part}: {toml}");
        }
        let boot = page("cryptattach-boot.7");
        for part in [".SH \"WHAT HAPPENS\"", ".IP 1. 4", "luks.uuid=UUID", "boot.json"] {
            assert!(boot.contains(part), "{part}: {boot}");
        }
        for text in [&toml, &boot] {
            assert!(!text.contains("|---") && !text.contains("**"), "{text}");
        }
        assert_eq!(plain("`a` is a [policy](policies.md#x) of [b] [c](d)"), "a is a policy (policies.md) of [b] c (d)");
        assert_eq!(
            plain("[boot.md](boot.md), [tpm.md](tpm.md#x); [below](#y), a [`[servers.NAME]`](#servers)"),
            "boot.md, tpm.md; below, a [servers.NAME]"
        );
        for text in [&toml, &boot] {
            let words: Vec<&str> = text.split_whitespace().collect();
            let twice = words.windows(2).find(|pair| pair[0].ends_with(".md") && pair[1].contains(pair[0]));
            assert!(twice.is_none(), "{twice:?}: {text}");
        }
    }
}
