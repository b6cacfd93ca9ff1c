//! An audit record, which somebody may have changed, with its anchors; and what journalctl prints.
#![no_main]
use cryptattach::{
    unlock::audit::{
        MOST_BYTES,
        verify::{Anchor, Verifier},
    },
    verbs::audit::anchors_in_journal,
};
use cryptattach_fuzz::check_text;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let anchors = anchors_in_journal(data, "/var/log/cryptattach.jsonl");
    let own = Anchor { kept_in: "the state directory".to_owned(), seq: 2, hash: [0; 32] };
    let (first, second) = data.split_at(data.len() / 2);
    let mut verifier = Verifier::new(anchors.into_iter().chain([own]).collect(), Some(Some([0; 32])));
    for mut file in [first, second] {
        verifier.read("a".as_ref(), &mut file).expect("it is in memory");
    }
    let verdict = verifier.end();
    assert!(verdict.faults() > 0, "nothing has a hash of zeros");
    let remarks = verdict.faults.iter().chain(&verdict.torn);
    remarks.for_each(|remark| check_text(&remark.what));
    verdict.not_compared.iter().for_each(|what| check_text(what));
    assert!(verdict.records <= data.len() as u64 && verdict.faults.len() <= MOST_BYTES);
});
