//! The ceremony of a new recovery key or passphrase: words and a QR code on the terminal, and typed back.

use std::io::{self, IsTerminal};

use qrcodegen_no_heap::{Mask, QrCode, QrCodeEcc, Version};

use super::{key, output};
use crate::{
    base::{
        clock::{date, now},
        key::SecretBytes,
    },
    config::LeafName,
    keys::seal::leaves::person::By,
    sys::terminal,
    verbs::{error::Error, leaf::Hands},
};

/// How often a person may type a new secret back.
const TRIES: usize = 3;
/// Room for the page: the QR code takes the most of it.
const PAGE_BYTES: usize = 16 * 1024;
/// The largest QR code that the words take.
const LARGEST: Version = Version::new(8);
/// Light modules around it (ISO/IEC 18004 wants four).
const MARGIN: i32 = 4;
/// Black on white, whatever the terminal's colours are; and these again.
const INK: (&str, &str) = ("\x1b[30;107m", "\x1b[0m");

/// How a secret is handed over.
#[derive(Default)]
pub struct Paper {
    /// Standard output may be anything.
    pub to_pipe: bool,
    /// With what a person needs who finds the page in ten years.
    pub page: bool,
    pub no_confirm: bool,
    /// The passphrase, in place of the person at the terminal.
    pub answer: Option<SecretBytes>,
}

/// The ceremony at the terminal, if there is to be one; that there is a terminal is known before anything is made.
pub fn at_terminal(wanted: bool) -> Result<Option<Paper>, Error> {
    if wanted && !io::stdout().is_terminal() {
        return Err(no_terminal("run this at one"));
    }
    Ok(wanted.then(Paper::default))
}

fn no_terminal(step: &str) -> Error {
    Error::Usage(format!("a recovery key is shown on a terminal only, and standard output is none; {step}"))
}

fn ask(question: &str) -> Result<SecretBytes, Error> {
    let answer = terminal::ask(question, &|| false).map_err(Error::io("ask at the terminal"))?;
    answer.ok_or_else(|| Error::Usage("nothing was made".to_owned()))
}

impl Hands for Paper {
    fn choose(&self) -> Result<SecretBytes, Error> {
        if let Some(answer) = &self.answer {
            return Ok(SecretBytes::copy_of(answer.expose())?);
        }
        for _ in 0..TRIES {
            let passphrase = ask("New passphrase: ")?;
            if passphrase == ask("Again: ")? {
                return Ok(passphrase);
            }
            output::say("these are two different passphrases".to_owned());
        }
        Err(Error::Usage("nothing was made".to_owned()))
    }

    fn hand_over(&self, name: &LeafName, words: &SecretBytes) -> Result<(), Error> {
        let out = io::stdout();
        if !self.to_pipe && !out.is_terminal() {
            return Err(no_terminal("--to-pipe writes it there all the same, for a printer"));
        }
        let page = Page::of(name, words, self.page, out.is_terminal())?;
        key::write(&out, &page.text, "the recovery key")?;
        if self.no_confirm {
            return Ok(());
        }
        let mut question = "Type the words back, from the paper (nothing is shown): ".to_owned();
        for _ in 0..TRIES {
            match By::Recovery.read(&ask(&question)?) {
                Ok(typed) if typed == *words => return Ok(()),
                Ok(_) => question = "That is another recovery key. Again: ".to_owned(),
                Err(error) => question = format!("{error}. Again: "),
            }
        }
        Err(Error::Usage(
            "the words were not typed back, so nothing was made; this recovery key opens nothing".to_owned(),
        ))
    }
}

/// Text with a secret in it.
struct Page {
    text: SecretBytes,
    len: usize,
}

impl Page {
    fn of(name: &LeafName, words: &SecretBytes, is_whole: bool, has_colours: bool) -> Result<Self, Error> {
        let mut page = Self { text: SecretBytes::zeroed(PAGE_BYTES)?, len: 0 };
        page.add(format!("\nRecovery key of the leaf '{name}', made on {}\n", date(now())).as_bytes());
        page.add(
            "It is shown this once and kept nowhere. Whoever has it opens what is sealed to the leaf.\n".as_bytes(),
        );
        if is_whole {
            page.add(WHOLE.as_bytes());
        }
        for (at, word) in words.expose().split(|letter| *letter == b' ').enumerate() {
            page.add(if at % 4 == 0 { b"\n" } else { b"" });
            page.add(format!("  {:>2} ", at + 1).as_bytes());
            page.add(word);
            page.add(&b"          "[word.len()..]);
        }
        page.add(b"\n\n");
        page.add_code(words, has_colours)?;
        page.add(b"\n");
        page.text.truncate(page.len);
        Ok(page)
    }

    /// What does not fit is left out: the room is more than enough.
    fn add(&mut self, bytes: &[u8]) {
        if let Some(room) = self.text.expose_mut().get_mut(self.len..self.len + bytes.len()) {
            room.copy_from_slice(bytes);
            self.len += bytes.len();
        }
    }

    /// The words as QR code, two modules to a letter.
    fn add_code(&mut self, words: &SecretBytes, has_colours: bool) -> Result<(), Error> {
        let (mut data, mut out) =
            (SecretBytes::zeroed(LARGEST.buffer_len())?, SecretBytes::zeroed(LARGEST.buffer_len())?);
        data.expose_mut()[..words.len()].copy_from_slice(words.expose());
        let mask = Some(Mask::new(0));
        let code = QrCode::encode_binary(
            data.expose_mut(),
            words.len(),
            out.expose_mut(),
            QrCodeEcc::Low,
            Version::MIN,
            LARGEST,
            mask,
            false,
        );
        let code = code.map_err(|_| Error::Usage("the recovery key fits no QR code".to_owned()))?;
        let (ink, plain) = if has_colours { INK } else { ("", "") };
        for y in (-MARGIN..code.size() + MARGIN).step_by(2) {
            self.add(b"  ");
            self.add(ink.as_bytes());
            for x in -MARGIN..code.size() + MARGIN {
                self.add(
                    match (code.get_module(x, y), code.get_module(x, y + 1)) {
                        (true, true) => "█",
                        (true, false) => "▀",
                        (false, true) => "▄",
                        (false, false) => " ",
                    }
                    .as_bytes(),
                );
            }
            self.add(plain.as_bytes());
            self.add(b"\n");
        }
        Ok(())
    }
}

const WHOLE: &str = "
Keep this page apart from the disks, the hosts and the key store.
Use:    'cryptattach attach DEVICE' asks for the words if nothing else opens the key.
Try:    'cryptattach container rehearse STORE', once a year.
Type:   the words in this order; four letters of each are enough, capitals and signs say nothing.
By hand, without cryptattach: docs/recovery.md, \"With a recovery key\".
";
