//! A site's hosts: each has a key of its own, is admitted to one container in Swift, and has twelve volumes.

use std::{fs, path::PathBuf, thread};

use cryptattach::base::key::KeyId;

use super::{VOLUMES, hosts::What};
use crate::{
    cloud::{Cloud, Site},
    shell::{LoopDevice, sh},
};

pub struct Fleet<'a> {
    site: Site<'a>,
    hosts: Vec<Host>,
}

struct Host {
    folder: PathBuf,
    volumes: Vec<PathBuf>,
    keys: Vec<KeyId>,
}

impl<'a> Fleet<'a> {
    /// So many hosts with volumes.
    pub fn new(cloud: &'a Cloud, hosts: usize) -> Self {
        let site = Site::bare(cloud);
        let folders: Vec<_> = (0..hosts).map(|number| site.path(&format!("host{number}"))).collect();
        for folder in &folders {
            sh(&format!(
                "mkdir {0} && cd {0} && cp ../clouds.yaml ../inventory.toml . && \
                 openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out host.key 2>/dev/null && \
                 openssl pkey -in host.key -pubout -out host.pem && chmod 600 host.key",
                folder.display()
            ));
        }
        let admitted: Vec<_> = folders.iter().map(|folder| format!("{:?}", folder.join("host.pem"))).collect();
        site.swift("cinder", "keys", &format!("hosts = [{}]", admitted.join(", ")));
        site.ok(&["container", "create", "cinder"]);
        let host = |(number, folder): (usize, PathBuf)| {
            let volumes: Vec<_> = (0..VOLUMES).map(|volume| site.file(&format!("v{number}-{volume}"))).collect();
            let key = |volume: &String| site.ok(&["format", volume])["cinder/".len()..].parse().unwrap();
            let keys = volumes.iter().map(key).collect();
            Host { folder, volumes: volumes.into_iter().map(PathBuf::from).collect(), keys }
        };
        let all: Vec<_> = folders.into_iter().enumerate().collect();
        let hosts = thread::scope(|scope| {
            let halves: Vec<_> = all.chunks(hosts.div_ceil(4)).collect();
            let made =
                halves.into_iter().map(|half| scope.spawn(move || half.iter().cloned().map(host).collect::<Vec<_>>()));
            made.collect::<Vec<_>>().into_iter().flat_map(|half| half.join().unwrap()).collect()
        });
        let fleet = Self { site, hosts };
        fleet.configure("cryptattach.toml", None, None);
        fleet
    }

    pub fn cloud(&self) -> &Cloud {
        self.site.cloud
    }

    pub fn processes(&self) -> usize {
        self.hosts.len()
    }

    /// Writes each host a configuration of this name; Keystone and Swift are what they are, or at these URLs.
    pub fn configure(&self, name: &str, keystone: Option<&str>, swift: Option<&str>) {
        let cloud = self.cloud();
        let account = format!("/v1/AUTH_{}", cloud.var("PROJECT_ID_KEYS"));
        let urls = swift.map(|swift| format!("urls = [\"{swift}{account}\"]\n")).unwrap_or_default();
        for host in &self.hosts {
            let clouds = fs::read_to_string(self.site.path("clouds.yaml")).unwrap();
            let clouds =
                keystone.map_or(clouds.clone(), |url| clouds.replace(cloud.var("AUTH_URL"), &format!("{url}/v3")));
            // With an authority of its own a host need not read all that the system has: hosts in threads are many on one system.
            let clouds = clouds.replace("  keys:\n", &format!("  keys:\n    cacert: {}\n", cloud.var("CA_FILE")));
            fs::write(host.folder.join(format!("{name}.yaml")), clouds).unwrap();
            let boot: String = host
                .volumes
                .iter()
                .enumerate()
                .map(|(number, _)| {
                    format!(
                        "[[boot.volumes]]\nname = \"{}\"\ndevice = \"/dev/fleet-volume-{number}\"\n",
                        self.site.name(&number.to_string())
                    )
                })
                .collect();
            let text = format!(
                "state = \"{folder}/state\"\n[audit]\nfile = \"{folder}/audit\"\n[separation]\ninventory = \"inventory.toml\"\n\
                 [stores.cinder]\ntype = \"swift\"\ncontainer = \"{container}\"\ncloud = \"keys\"\nclouds = \"{name}.yaml\"\n{urls}\
                 owner = \"../owner.pem\"\nescrow = \"../escrow.pem\"\nidentities = [\"host.key\"]\n{boot}",
                folder = host.folder.display(),
                container = self.site.container("cinder"),
            );
            fs::write(host.folder.join(name), text).unwrap();
        }
    }

    /// A host as a process of its own.
    pub fn process(&self, number: usize) -> What {
        let host = &self.hosts[number];
        What::Process { config: host.folder.join("cryptattach.toml"), volumes: host.volumes.clone() }
    }

    /// Hosts as threads, with the configurations of this name.
    pub fn threads(&self, name: &str) -> What {
        let configs = self.hosts.iter().map(|host| host.folder.join(name)).collect();
        What::Threads { configs, keys: self.hosts.iter().map(|host| host.keys.clone()).collect() }
    }

    /// The first host boots: the program, with block devices, a /run of its own, and mappings in userspace.
    pub fn boot(&self, name: &str) {
        let host = &self.hosts[0];
        let devices: Vec<_> = host.volumes.iter().map(|volume| LoopDevice::new(volume, "")).collect();
        let config = host.folder.join(name);
        let mut text = fs::read_to_string(&config).unwrap();
        for (number, device) in devices.iter().enumerate().rev() {
            text = text.replace(&format!("/dev/fleet-volume-{number}\""), &format!("{}\"", device.path()));
        }
        fs::write(&config, text).unwrap();
        let program = env!("CARGO_BIN_EXE_cryptattach");
        let names: Vec<_> = (0..VOLUMES).map(|number| self.site.name(&number.to_string())).collect();
        sh(&format!(
            "export CRYPTATTACH_CONFIG={config}; unshare --mount sh -c 'mount -t tmpfs tmpfs /run; {program} boot; booted=$?; \
             for name in {names}; do {program} detach $name; done; exit $booted'",
            config = config.display(),
            names = names.join(" ")
        ));
    }
}
