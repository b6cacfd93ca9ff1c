//! The cloud layer: a whole small OpenStack on this machine, whose hosts are what docs/openstack.md makes of them. Stories go
//! through the APIs as the users of two projects do. Run by `scripts/test cloud`; its arguments are those of `cargo test`.

#[path = "../openstack/cloud.rs"]
#[allow(dead_code)] // the openstack layer asks it for more
mod cloud;
#[path = "../openstack/operator.rs"]
#[allow(dead_code)] // the openstack layer asks it for more
mod operator;
#[path = "../host/page.rs"]
mod page;
#[path = "../common/shell.rs"]
#[allow(dead_code)] // the openstack layer asks it for more
mod shell;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
    process::{Command, ExitCode, Stdio},
    sync::{Arc, LazyLock},
    thread,
    time::{Duration, Instant},
};

use cloud::Cloud;
use libtest_mimic::{Arguments, Failed, Trial};
use operator::PAGE;
use tempfile::TempDir;

/// Functions of the files in stories/, in the order in which they run.
const STORIES: &[&str] = &[
    "the_operators_page_leads_to_an_attached_volume",
    "a_volume_is_attached_twice_and_grows_while_in_use",
    "a_volume_from_a_snapshot_has_a_key_of_its_own",
    "a_volume_from_an_image_is_ciphertext",
    "a_backup_is_restored_into_another_encrypted_volume",
    "retyping_an_encrypted_volume_to_plain_leaves_its_data",
    "retyping_a_full_plain_volume_to_encrypted_leaves_it_as_it_was",
    "a_deleted_volume_takes_its_key_along",
    "a_hard_reboot_finds_the_volume_again",
    "a_stopped_server_starts_with_its_volume",
    "a_rebuilt_server_finds_the_volume_again",
    "nova_compute_is_restarted_while_the_volume_is_in_use",
    "a_killed_worker_is_replaced_at_a_hard_reboot",
    "a_volume_whose_worker_was_killed_can_be_detached",
    "a_deleted_server_leaves_its_volume_free",
    "after_a_crash_another_volume_gets_the_device_and_not_the_data",
    "an_operator_evacuates_a_server_without_the_tenants_token",
    "a_server_migrates_live_without_the_tenants_token",
    "an_image_that_names_another_projects_key_gets_no_copy_of_it",
    "an_image_that_names_another_projects_key_does_not_delete_it",
    "qemu_opens_a_volume_of_type_luks_with_a_key_from_swift",
    "barbican_keeps_the_keys_through_our_driver",
    "barbican_keeps_the_keys_through_castellans_driver",
    "a_snapshot_before_the_first_attach_costs_neither_volume",
    "a_backup_before_the_first_attach_costs_neither_volume",
    "a_clone_fails_as_documented_and_leaves_the_volume_usable",
    "a_transferred_volume_is_its_new_owners",
    "a_transfer_before_the_first_attach_costs_nothing",
];

const HERE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cloud");
const STATE: &str = "/var/tmp/cryptattach-cloud";
const MEMORY: &str = "/dev/shm/cryptattach-cloud";

/// Running servers; they end with the value.
struct SmallCloud {
    _openstack: Cloud,
    environment: BTreeMap<String, String>,
    _memory: TempDir,
    _one_at_a_time: File,
}

impl SmallCloud {
    fn up() -> Self {
        let start = Instant::now();
        // libvirt's folders, the loop devices' names: a machine has them once.
        let lock = File::create("/run/lock/cryptattach-cloud").unwrap();
        lock.lock().unwrap();
        if Path::new(STATE).exists() {
            eprintln!("an earlier run was killed; removing what it has left");
            servers("down", &["--purge"], &BTreeMap::new());
            let _ = (fs::remove_dir_all(STATE), fs::remove_dir_all(MEMORY));
        }
        let openstack = Cloud::up_in(folder(STATE));
        let memory = folder(MEMORY);

        // The page's first four steps: a project with the keys, and this host. The target of iSCSI is a host of its own.
        let inventory = memory.path().join("inventory.toml");
        let target = "[[host]]\nname = \"target\"\naddresses = [\"127.0.0.20\"]\n";
        fs::write(&inventory, format!("{}{target}", cloud::INVENTORY)).unwrap();
        let file = Path::new(STATE).join("first.img");
        let hosts = operator::hosts(&openstack, memory.path(), &inventory, &file, "cryptattach-cloud-first");

        // The fifth: Nova and Cinder.
        let mut environment = openstack.variables().clone();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let block = page::commands(PAGE, "## 5. Nova and Cinder");
        for (name, value) in [
            ("CRYPTATTACH", env!("CARGO_BIN_EXE_cryptattach").to_owned()),
            ("CRYPTATTACH_CONFIG", text(&hosts.host.config())),
            ("OS_CLIENT_CONFIG_FILE", text(&hosts.host.clouds())),
            ("OPERATORS_CLOUDS", text(&hosts.operator.clouds())),
            ("PAGE", block),
        ] {
            environment.insert(name.to_owned(), value);
        }
        let mut cloud = Self { _openstack: openstack, environment, _memory: memory, _one_at_a_time: lock };
        let told = servers("up", &[], &cloud.environment);
        let told = told.lines().filter_map(|line| line.split_once('='));
        cloud.environment.extend(told.map(|(name, value)| (name.to_owned(), value.to_owned())));
        cloud.tell("prepare").unwrap();
        eprintln!("the cloud is up after {:.0} s", start.elapsed().as_secs_f32());
        cloud
    }

    /// For a person who tries things: `. /dev/shm/cryptattach-cloud/environment`. Ends when that file is removed.
    fn by_hand(&self) {
        let file = Path::new(MEMORY).join("environment");
        let quoted = |(name, value)| format!("export {name}='{value}'\n");
        fs::write(&file, self.environment.iter().map(quoted).collect::<String>()).unwrap();
        eprintln!("variables: {}", file.display());
        while file.exists() {
            thread::sleep(Duration::from_secs(1));
        }
    }

    fn tell(&self, story: &str) -> Result<(), Failed> {
        let start = Instant::now();
        let mut python = Command::new(Path::new(&self.environment["CLOUD_VENV"]).join("bin/python"));
        python.args(["-B", "-W", "ignore", &format!("{HERE}/stories/run.py"), story]).envs(&self.environment);
        let status = python.stdin(Stdio::null()).status().unwrap();
        println!("{story}: {:.0} s", start.elapsed().as_secs_f32());
        status.success().then_some(()).ok_or_else(|| format!("{story} failed; logs: {STATE}/log").into())
    }
}

impl Drop for SmallCloud {
    fn drop(&mut self) {
        servers("down", &[], &self.environment);
    }
}

fn servers(command: &str, arguments: &[&str], environment: &BTreeMap<String, String>) -> String {
    let mut program = Command::new(format!("{HERE}/servers/{command}"));
    program.args(arguments).env("CRYPTATTACH_OS_STATE", STATE).env("CRYPTATTACH", env!("CARGO_BIN_EXE_cryptattach"));
    let output = program.envs(environment).stdin(Stdio::null()).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{command} failed; logs: {STATE}/log");
    String::from_utf8(output.stdout).unwrap()
}

/// A folder of just that name, removed with the value.
fn folder(path: &str) -> TempDir {
    let (parent, name) = path.rsplit_once('/').unwrap();
    tempfile::Builder::new().prefix(name).rand_bytes(0).tempdir_in(parent).unwrap()
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // A story may restart a server.
    arguments.test_threads = Some(1);
    // The first story starts the servers; they end when no story needs them any more.
    let cloud = Arc::new(LazyLock::new(SmallCloud::up));
    let trial = |&story: &&'static str| {
        let cloud = Arc::clone(&cloud);
        Trial::test(story, move || cloud.tell(story))
    };
    let trials = STORIES.iter().map(trial);
    let by_hand = Arc::clone(&cloud);
    let by_hand = Trial::test("by_hand", move || {
        by_hand.by_hand();
        Ok(())
    });
    let trials = trials.chain([by_hand.with_ignored_flag(true)]).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}
