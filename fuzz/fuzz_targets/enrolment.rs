//! The two documents of an enrolment.
#![no_main]
use std::path::Path;

use cryptattach::unlock::enrol::{Answer, Document, Request};
use cryptattach_fuzz::check_error;
use serde_json::Value;

/// What is parsed is printed, and parsed to the same again.
fn check<T: Document>(data: &[u8]) -> Option<T> {
    let document = T::parse(data).ok()?;
    let mut json = serde_json::to_value(&document).expect("what was read");
    json["type"] = T::TYPE.into();
    json["version"] = 1.into();
    let again = T::parse(&serde_json::to_vec(&json).expect("JSON")).expect("what was written");
    let Value::Object(mut members) = json else { panic!("no object") };
    members.retain(|name, _| name != "type" && name != "version");
    assert_eq!(serde_json::to_value(&again).expect("as before"), Value::Object(members));
    Some(document)
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    check::<Answer>(data);
    if let Some(request) = check::<Request>(data) {
        request.creation.signature().map_or_else(|error| check_error(&error), drop);
        match request.statement(Path::new("request")) {
            Ok(statement) => drop(statement.to_json().expect("what was read")),
            Err(error) => check_error(&error),
        }
    }
});
