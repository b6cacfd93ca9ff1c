//! What happens when a machine boots, and what a person sees of it.

use crate::{
    Story,
    machine::STATIC,
    site::{PASSPHRASE, Site, UUID},
};

pub const STORIES: &[Story] = &[("the network store opens the root", network)];

const NET: &str = "[stores.net]\ntype = \"swift\"\ncloud = \"net\"\nclouds = \"clouds.yaml\"\nowner = \"net.owner.pem\"\n\
    no_escrow = true\nidentities = [\"net.owner.key\"]\n";

fn network(site: &Site, story: &str) {
    let initrd = site.initrd("net", &format!("[boot]\nsecrets_in_image = true\n{NET}"), true);
    println!("{}\n{}", initrd.warnings, initrd.doctor);
    let mut parts = site.parts(&initrd);
    parts.server = Some(site.server());
    parts.append = STATIC.to_owned();
    let mut machine = site.start(story, &parts);
    machine.see(&format!("root is attached, by {}", site.net));
    machine.see("BOOTED from /dev/mapper/root");
    let record = machine.record();
    assert_eq!(record["volumes"][0]["result"], "attached", "{record}");
}
