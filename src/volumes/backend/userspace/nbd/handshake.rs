//! Fixed newstyle negotiation: what the client wants to know, and what both agree on.

use std::io::{self, Read, Write};

use super::protocol::*;

/// Names of exports have at most 4096 bytes; options are not much longer.
const MAX_OPTION_BYTES: u32 = 64 * 1024;

/// What this server has: one export, the default one, whose name is empty.
pub struct Offer {
    size: u64,
    preferred_block_bytes: u32,
    flags: u16,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Agreed {
    /// Reads are answered in chunks, and their errors have a message.
    pub structured_replies: bool,
    /// The client may ask which blocks are allocated.
    pub allocation: bool,
}

impl Offer {
    /// Of an image of that size, which is best written in units of so many bytes.
    pub fn new(size: u64, unit_bytes: u32, read_only: bool) -> Self {
        let always = SEND_HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_DF | CAN_MULTI_CONN;
        let flags = match read_only {
            true => always | SEND_READ_ONLY,
            false => always | SEND_TRIM | SEND_WRITE_ZEROES | SEND_FAST_ZERO,
        };
        Self { size, preferred_block_bytes: unit_bytes.max(4096), flags }
    }
}

/// Talks with the client until it wants to begin, or `None` if it wants to leave.
pub fn negotiate(mut input: impl Read, mut output: impl Write, offer: &Offer) -> io::Result<Option<Agreed>> {
    let mut greeting = [NBDMAGIC, IHAVEOPT].map(u64::to_be_bytes).concat();
    greeting.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    output.write_all(&greeting)?;
    let client_flags = u32::from_be_bytes(array(&mut input)?);
    let known = u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    if client_flags & !known != 0 || client_flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 {
        return Err(io::Error::other(format!("its flags {client_flags:#x} are not those of fixed newstyle")));
    }
    let mut agreed = Agreed { structured_replies: false, allocation: false };
    loop {
        if u64::from_be_bytes(array(&mut input)?) != IHAVEOPT {
            return Err(io::Error::other("an option has the wrong magic number"));
        }
        let (option, length) = (u32::from_be_bytes(array(&mut input)?), u32::from_be_bytes(array(&mut input)?));
        if length > MAX_OPTION_BYTES {
            return Err(io::Error::other(format!("an option of {length} bytes")));
        }
        let mut data = vec![0; length as usize];
        input.read_exact(&mut data)?;
        let mut reply = |kind, data: &[u8]| output.write_all(&option_reply(option, kind, data));
        match option {
            OPT_EXPORT_NAME if data.is_empty() => {
                let zeroes = if client_flags & u32::from(FLAG_NO_ZEROES) == 0 { 124 } else { 0 };
                let mut export = offer.export();
                export.resize(export.len() + zeroes, 0);
                output.write_all(&export)?;
                return Ok(Some(agreed));
            }
            // It has no reply that says no.
            OPT_EXPORT_NAME => return Err(io::Error::other("it asks for an export of another name")),
            OPT_ABORT => {
                // The client need not wait for it.
                reply(REP_ACK, &[]).ok();
                return Ok(None);
            }
            OPT_LIST if data.is_empty() => {
                reply(REP_SERVER, &0_u32.to_be_bytes())?;
                reply(REP_ACK, &[])?;
            }
            OPT_STRUCTURED_REPLY if data.is_empty() => {
                agreed.structured_replies = true;
                reply(REP_ACK, &[])?;
            }
            OPT_INFO | OPT_GO => match asked_name(&data) {
                Some([]) => {
                    reply(REP_INFO, &[&INFO_EXPORT.to_be_bytes()[..], &offer.export()].concat())?;
                    reply(REP_INFO, &offer.block_sizes())?;
                    reply(REP_ACK, &[])?;
                    if option == OPT_GO {
                        return Ok(Some(agreed));
                    }
                }
                Some(_) => reply(REP_ERR_UNKNOWN, b"there is one export, and its name is empty")?,
                None => reply(REP_ERR_INVALID, b"the lengths do not agree")?,
            },
            OPT_LIST_META_CONTEXT | OPT_SET_META_CONTEXT => match asked_contexts(&data) {
                Some(([], _)) if !agreed.structured_replies => {
                    reply(REP_ERR_INVALID, b"structured replies must be negotiated first")?;
                }
                Some(([], queries)) => {
                    let (lists, any) = (option == OPT_LIST_META_CONTEXT, queries.is_empty());
                    let asked = |query: &&[u8]| *query == ALLOCATION || lists && *query == b"base:";
                    let found = lists && any || queries.iter().any(asked);
                    if found {
                        let id = if lists { 0 } else { ALLOCATION_ID };
                        reply(REP_META_CONTEXT, &[&id.to_be_bytes()[..], ALLOCATION].concat())?;
                    }
                    // A later choice is in the place of an earlier one.
                    agreed.allocation = if lists { agreed.allocation } else { found };
                    reply(REP_ACK, &[])?;
                }
                Some(_) => reply(REP_ERR_UNKNOWN, b"there is one export, and its name is empty")?,
                None => reply(REP_ERR_INVALID, b"the lengths do not agree")?,
            },
            OPT_LIST | OPT_STRUCTURED_REPLY => reply(REP_ERR_INVALID, b"this option has no data")?,
            _ => reply(REP_ERR_UNSUP, &[])?,
        }
    }
}

impl Offer {
    fn export(&self) -> Vec<u8> {
        [&self.size.to_be_bytes()[..], &self.flags.to_be_bytes()].concat()
    }

    /// Any byte may be written; whole sectors are faster.
    fn block_sizes(&self) -> Vec<u8> {
        let sizes = [1, self.preferred_block_bytes, MAX_PAYLOAD_BYTES].map(u32::to_be_bytes).concat();
        [&INFO_BLOCK_SIZE.to_be_bytes()[..], &sizes].concat()
    }
}

/// The name in the data of `INFO` and `GO`: its length, itself, the number of information requests, those.
fn asked_name(data: &[u8]) -> Option<&[u8]> {
    let (name, rest) = text(data)?;
    let (count, requests) = rest.split_first_chunk()?;
    (requests.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some(name)
}

/// The export's name and the queries in the data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
fn asked_contexts(data: &[u8]) -> Option<(&[u8], Vec<&[u8]>)> {
    let (name, rest) = text(data)?;
    let (count, mut rest) = rest.split_first_chunk()?;
    let mut queries = Vec::new();
    for _ in 0..u32::from_be_bytes(*count) {
        let (query, behind) = text(rest)?;
        queries.push(query);
        rest = behind;
    }
    rest.is_empty().then_some((name, queries))
}

/// A text behind its length, and what follows.
fn text(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk()?;
    rest.split_at_checked(u32::from_be_bytes(*length) as usize)
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("replies are short");
    let header = [option, kind, length].map(u32::to_be_bytes).concat();
    [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &header, data].concat()
}

fn array<const N: usize>(mut input: impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OFFER: Offer = Offer { size: 1 << 30, preferred_block_bytes: 4096, flags: SEND_HAS_FLAGS | SEND_FLUSH };

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let header = [number, u32::try_from(data.len()).unwrap()].map(u32::to_be_bytes).concat();
        [&IHAVEOPT.to_be_bytes()[..], &header, data].concat()
    }

    /// What the server says after its greeting of 18 bytes, and what was agreed on.
    fn talk(flags: u32, options: &[Vec<u8>]) -> (Vec<u8>, io::Result<Option<Agreed>>) {
        let (mut output, input) = (Vec::new(), [&flags.to_be_bytes()[..], &options.concat()].concat());
        let agreed = negotiate(&input[..], &mut output, &OFFER);
        (output.split_off(18), agreed)
    }

    #[test]
    fn go_begins_after_what_was_asked() {
        let go = option(OPT_GO, &[0, 0, 0, 0, 0, 1, 0, 3]);
        let (said, agreed) = talk(3, &[option(OPT_STRUCTURED_REPLY, &[]), option(99, b"?"), go]);
        assert_eq!(agreed.unwrap(), Some(Agreed { structured_replies: true, allocation: false }));
        let export = [&[0, 0][..], &OFFER.export()].concat();
        let expected = [
            option_reply(OPT_STRUCTURED_REPLY, REP_ACK, &[]),
            option_reply(99, REP_ERR_UNSUP, &[]),
            option_reply(OPT_GO, REP_INFO, &export),
            option_reply(OPT_GO, REP_INFO, &OFFER.block_sizes()),
            option_reply(OPT_GO, REP_ACK, &[]),
        ];
        assert_eq!(said, expected.concat());
    }

    #[test]
    fn allocation_is_the_one_context() {
        let query = |texts: &[&[u8]]| {
            let count = u32::try_from(texts.len()).unwrap().to_be_bytes();
            let texts = texts.iter().map(|text| [&u32::try_from(text.len()).unwrap().to_be_bytes()[..], text].concat());
            [&[0; 4][..], &count, &texts.collect::<Vec<_>>().concat()].concat()
        };
        let ask = |number, texts: &[&[u8]]| option(number, &query(texts));
        let begin = || [option(OPT_STRUCTURED_REPLY, &[])];
        let go = option(OPT_GO, &[0; 6]);
        let chosen = |options: &[Vec<u8>]| {
            talk(3, &[&begin()[..], options, std::slice::from_ref(&go)].concat()).1.unwrap().unwrap()
        };
        assert!(chosen(&[ask(OPT_SET_META_CONTEXT, &[b"qemu:dirty-bitmap:x", ALLOCATION])]).allocation);
        assert!(!chosen(&[ask(OPT_SET_META_CONTEXT, &[b"base:"])]).allocation);
        let twice = [ask(OPT_SET_META_CONTEXT, &[ALLOCATION]), ask(OPT_SET_META_CONTEXT, &[])];
        assert!(!chosen(&twice).allocation, "the later choice counts");
        for texts in [&[][..], &[&b"base:"[..]]] {
            let (said, _) = talk(3, &[&begin()[..], &[ask(OPT_LIST_META_CONTEXT, texts)]].concat());
            assert!(said.windows(ALLOCATION.len()).any(|bytes| bytes == ALLOCATION));
        }
        // Without structured replies there is no way to answer; lengths that do not agree are refused.
        for options in [vec![ask(OPT_SET_META_CONTEXT, &[ALLOCATION])], vec![option(OPT_SET_META_CONTEXT, &[9; 12])]] {
            let (said, _) = talk(3, &options);
            assert!(said.windows(4).any(|bytes| bytes == REP_ERR_INVALID.to_be_bytes()));
        }
    }

    /// `EXPORT_NAME` is answered without a header, and padded for those who have not asked for less.
    #[test]
    fn old_clients_get_zeroes() {
        for (flags, length) in [(1, 10 + 124), (3, 10)] {
            let (said, agreed) = talk(flags, &[option(OPT_EXPORT_NAME, &[])]);
            assert_eq!(
                (said.len(), agreed.unwrap()),
                (length, Some(Agreed { structured_replies: false, allocation: false }))
            );
        }
    }

    #[test]
    fn what_makes_no_sense_ends_the_connection() {
        for (flags, options) in [
            (0, vec![]),
            (7, vec![]),
            (3, vec![b"GET / HTTP/1.0\\r\\n\\r\\n".to_vec()]),
            (3, vec![option(OPT_EXPORT_NAME, b"other")]),
            (3, vec![[&IHAVEOPT.to_be_bytes()[..], &[0, 0, 0, 7], &[0xff; 4]].concat()]),
        ] {
            assert!(talk(flags, &options).1.is_err(), "{flags} {options:?}");
        }
        assert_eq!(talk(3, &[option(OPT_ABORT, &[])]).1.unwrap(), None);
    }

    proptest! {
        #[test]
        fn any_options_are_answered_or_refused(
            options in prop::collection::vec((0_u32..12, prop::collection::vec(any::<u8>(), 0..20)), 0..8)
        ) {
            let options: Vec<_> = options.iter().map(|(number, data)| option(*number, data)).collect();
            // No panic, and no agreement without a word about the export.
            let (said, agreed) = talk(3, &options);
            if let Ok(Some(_)) = agreed {
                prop_assert!(said.windows(8).any(|bytes| bytes == OFFER.size.to_be_bytes()));
            }
        }
    }
}
