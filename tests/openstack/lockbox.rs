//! A host whose keys are in Swift, and who has a lockbox: what it can do when the cloud is away.

use cryptattach::{
    base::key::{HostName, StoreName},
    config::Config,
    keys::seal::OwnerRecipient,
    sys::kernel_keyring,
    unlock::{
        container::{Container, Use},
        lockbox,
    },
};

use crate::{
    Story,
    cloud::{Cloud, Site},
    keys::{hook, run_hook},
    shell::sh,
};

pub const STORIES: &[Story] = &[("a_lockbox_attaches_while_the_cloud_is_away", away)];

/// Taken out of the kernel's keyring when the story ends.
pub struct Open(pub String);

impl Drop for Open {
    fn drop(&mut self) {
        let _ = kernel_keyring::remove(&self.0);
    }
}

/// A host that is admitted: its own key is in host.key.
struct Admitted {
    host: HostName,
    container: Container,
    admission: lockbox::Admission,
    _open: Open,
}

fn admit(site: &Site<'_>) -> Admitted {
    let host: HostName = site.name("host").parse().unwrap();
    let _open = Open(format!("cryptattach:lockbox:{host}"));
    sh(&format!(
        "cd {} && openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out host.key 2>/dev/null && \
         openssl pkey -in host.key -pubout -out host.pem && chmod 600 host.key",
        site.path("").display()
    ));
    let config = Config::read(&site.path("cryptattach.toml")).unwrap();
    let container = Container::open(&config, &"cinder".parse::<StoreName>().unwrap(), None, Use::Keys).unwrap();
    let mut recipients = container.escrow().unwrap();
    recipients.push(Box::new(OwnerRecipient::read(&site.path("host.pem")).unwrap()));
    let admission = lockbox::admit(container.host_keys().unwrap(), &host, &recipients).unwrap();
    container.admit_host(&host, &admission.recipient).unwrap();
    site.configure(&format!(
        "[lockbox]\nhost = \"{host}\"\nstore = \"cinder\"\nidentities = [\"host.key\"]\npath = \"lockbox\"\n"
    ));
    Admitted { host, container, admission, _open }
}

/// The host of the site has an open lockbox, until the value goes.
pub fn admitted(site: &Site<'_>) -> Open {
    let Admitted { _open: open, .. } = admit(site);
    site.ok(&["lockbox", "open"]);
    open
}

fn away(cloud: &Cloud) {
    let site = Site::new(cloud);
    let volume = site.file("volume");
    let reference = site.ok(&["format", &volume]);

    // The administrator admits the host; then the owner's key leaves the host.
    let Admitted { host, container, admission, _open } = admit(&site);
    let text = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    let text = text.replace("identities = [\"owner.key\"]", "identities = []");
    site.write("cryptattach.toml", &text);

    let name = site.name("v");
    let attach = ["attach", &volume, &name, "--backend", "userspace"];
    let text = site.fails(68, &attach);
    assert!(text.contains("the container key cinder/kek/1 is refused while the lockbox"), "{text}");
    assert!(site.ok(&["lockbox", "open"]).contains(&admission.fingerprint));
    site.attaches(&volume);
    assert_eq!(site.json(&["lockbox", "status"])["entries"][0]["state"], "valid");

    // Where the store is used as a hook's caller, it is the store that decides: the lockbox has the key, the caller does not.
    let configured = std::fs::read_to_string(site.path("cryptattach.toml")).unwrap();
    site.write("cryptattach.toml", &configured.replace("type = \"swift\"", "type = \"swift\"\ncaller_token = true"));
    let (_, key) = reference.split_once('/').unwrap();
    let request = |auth: &str| format!(r#"{{"version":1,"device":"{volume}","name":"{name}","key_id":"{key}"{auth}}}"#);
    let refused = run_hook(&site, "attach", &request(r#","auth":{"token":"nobodys"}"#));
    let text = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(77) && text.contains("the caller's token"), "{text}");
    hook(&site, "attach", &request(""));
    site.ok(&["detach", &name]);
    site.write("cryptattach.toml", &configured);

    // Down, and then hanging: neither is even asked, and the replicas that the ring named are remembered.
    let asks = || {
        let output = site.run(&[&attach[..], &["--separation", "strict", "-v"]].concat());
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{said}");
        site.ok(&["detach", &name]);
        said.contains("http://")
    };
    for servers in ["proxy", "keystone"] {
        cloud.stop(servers);
    }
    assert!(!asks());
    cloud.repair();
    for servers in ["proxy", "keystone"] {
        cloud.signal(servers, "STOP");
    }
    assert!(!asks());
    cloud.repair();
    site.ok(&["lockbox", "forget", "--all"]);
    assert!(asks(), "-v shows when the cloud is asked");
    let audit = std::fs::read_to_string(site.path("audit")).unwrap();
    let last = audit.lines().rfind(|line| line.contains("\"attach\"")).unwrap();
    assert!(last.contains(" of 127.0.0.11") && last.contains("apart"), "{last}");
    cloud.repair();

    // Removed, it is told so by the store, and has nothing left.
    lockbox::withdraw(container.host_keys().unwrap(), &host).unwrap();
    let rotation = container.remove_host(&host, &|_| {}).unwrap();
    assert!(rotation.failed.is_empty() && rotation.resealed == 1);
    let text = site.fails(67, &["lockbox", "open"]);
    assert!(text.contains("is not admitted, or was removed") && text.contains("1 entry was removed"), "{text}");
    site.fails(68, &attach);
}
