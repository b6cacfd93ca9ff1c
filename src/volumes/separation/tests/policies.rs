//! Servers that give shares of a key: the policy is judged as the tree that it is.

use super::replicas::{Case, STORAGE};
use crate::base::key::{Location, Place};

fn server(host: &str) -> Place {
    Place { what: format!("leaf {host}"), at: Location::Server { host: host.to_owned(), port: 80 }, opens: true }
}

fn of(least: usize, of: Vec<Place>) -> Place {
    Place { what: "the policy".to_owned(), at: Location::Threshold { least, of }, opens: true }
}

fn word(case: &Case, place: Place) -> String {
    case.verdict(&[place]).split(':').next().unwrap().to_owned()
}

#[test]
fn one_server_of_three_on_the_storage_host_is_too_near_only_where_one_is_enough() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260").known(STORAGE);
    let three = || vec![server("10.0.0.5"), server("10.0.0.6"), server("10.0.0.7")];
    assert_eq!(word(&case, of(1, three())), "shared");
    assert_eq!(word(&case, of(2, three())), "apart");
    assert_eq!(word(&case, of(3, three())), "apart");
    // The same host by another address.
    assert_eq!(word(&case, of(2, vec![server("10.1.0.5"), server("fd00::5"), server("10.0.0.7")])), "shared");
}

#[test]
fn what_is_not_known_counts_where_it_would_be_enough() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260").known(STORAGE);
    // Nobody says where that one is.
    let unknown = || server("tang.example");
    assert_eq!(word(&case, of(2, vec![server("10.0.0.5"), unknown(), server("10.0.0.7")])), "unproven");
    assert_eq!(word(&case, of(2, vec![unknown(), server("10.0.0.6"), server("10.0.0.7")])), "apart");
    assert_eq!(word(&case, of(1, vec![unknown(), server("10.0.0.6")])), "unproven");
}

#[test]
fn thresholds_nest() {
    let case = Case::new().served_by_iscsi("10.0.0.5:3260").known(STORAGE);
    let near = || of(1, vec![server("10.0.0.5"), server("10.0.0.6")]);
    let apart = || of(2, vec![server("10.0.0.5"), server("10.0.0.6")]);
    assert_eq!(word(&case, of(2, vec![near(), apart()])), "apart");
    assert_eq!(word(&case, of(1, vec![near(), apart()])), "shared");
    assert_eq!(word(&case, of(2, vec![near(), near(), apart()])), "shared");
}

#[test]
fn a_server_elsewhere_is_apart_from_a_disk_of_this_host_and_one_here_is_not() {
    let case = Case::new();
    assert_eq!(word(&case, server("10.0.0.5")), "apart");
    assert_eq!(word(&case, server("10.0.0.9")), "shared");
    assert_eq!(word(&case, server("127.0.0.1")), "shared");
    assert_eq!(word(&case, server("tang.example")), "unproven");
}
