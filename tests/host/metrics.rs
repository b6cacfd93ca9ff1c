//! What Prometheus is told of a host, as its own tools read it.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
};

use crate::site::Site;

/// A site that counts in `metrics/a.prom`, beside its volumes.
fn counting() -> (Site, String) {
    let site = Site::new();
    let file = site.path("metrics/a.prom");
    fs::create_dir(file.parent().unwrap()).unwrap();
    let config = site.keys("cryptattach.toml");
    let text = fs::read_to_string(config).unwrap();
    fs::write(config, format!("metrics = '{}'\n{text}", file.display())).unwrap();
    (site, file.into_os_string().into_string().unwrap())
}

fn value(file: &str, series: &str) -> f64 {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{series} ")));
    line.unwrap_or_else(|| panic!("no {series} in {text}")).parse().unwrap()
}

/// The file as Prometheus' own parser reads it; the names of what is in it.
fn parsed(file: &str) -> Vec<String> {
    let program = "import sys; from prometheus_client.parser import text_string_to_metric_families as read
for family in read(open(sys.argv[1]).read()):
    assert family.documentation and family.type in ('counter', 'gauge', 'histogram'), family
    [print(sample.name) for sample in family.samples]";
    let output = Command::new("/usr/bin/python3").args(["-c", program, file]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn what_prometheus_reads_is_counted_by_many_processes_at_once() {
    let (site, file) = counting();
    let (volume, _) = site.volume("one", &[]);
    let name = site.name("one");
    site.attach(&volume, &name, &[]);
    let missing = site.path("missing").into_os_string().into_string().unwrap();
    // They end at once, the half of them in failure; and one that is killed in the middle leaves the file whole.
    let spawned = |volume: &str| {
        let mut command = site.command();
        command.args(["attach", volume, &name, "--backend", "userspace"]);
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    let mut all: Vec<_> = (0..10).flat_map(|_| [spawned(&volume), spawned(&missing)]).collect();
    all.iter_mut().for_each(|child| drop(child.wait()));
    let (already, failed) =
        ("cryptattach_attaches_total{source=\"already\"}", "cryptattach_attach_failures_total{exit_code=\"66\"}");
    assert_eq!((value(&file, already), value(&file, failed)), (10.0, 10.0));
    assert_eq!(value(&file, "cryptattach_attaches_total{source=\"store\"}"), 1.0);
    for _ in 0..10 {
        let mut child = spawned(&missing);
        std::thread::sleep(std::time::Duration::from_millis(5));
        let _ = child.kill();
        let _ = child.wait();
    }
    assert!((10.0..=20.0).contains(&value(&file, failed)));
    site.ok(&["detach", &name]);

    site.ok(&["status", "--metrics"]);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o644);
    let names = parsed(&file);
    assert!(names.contains(&"cryptattach_attach_duration_seconds_bucket".to_owned()), "{names:?}");
    let text = fs::read_to_string(&file).unwrap();
    for secret in ["cinder", "one", &name, &*volume] {
        assert!(!text.contains(&format!("\"{secret}\"")), "{secret}: {text}");
    }
}

#[test]
fn a_metrics_file_that_cannot_be_written_is_a_warning_and_the_volume_is_attached() {
    let (site, file) = counting();
    let (volume, _) = site.volume("one", &[]);
    let attach_warns = |why: &str| {
        let name = site.name("one");
        let output = site.run(&["attach", &volume, &name, "--backend", "userspace"]);
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.contains("cannot count this") && told.contains(why), "{told}");
        site.ok(&["detach", &name]);
    };
    fs::write(&file, "node_load1 3\n").unwrap();
    attach_warns("it is not a file of cryptattach's");
    assert_eq!(fs::read_to_string(&file).unwrap(), "node_load1 3\n");
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    attach_warns("it is not a regular file");
    fs::remove_dir_all(Path::new(&file).parent().unwrap()).unwrap();
    attach_warns("No such file or directory");
    let told = site.fails(66, &["status", "--metrics"]);
    assert!(told.contains("write the metrics file"), "{told}");
}

#[test]
fn the_page_and_its_alerts_speak_of_what_is_told() {
    let (site, file) = counting();
    site.ok(&["status", "--metrics"]);
    let page = include_str!("../../docs/metrics.md");
    for name in parsed(&file) {
        let name = ["_bucket", "_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
        assert!(page.contains(&format!("| `{name}` |")), "{name}");
    }
    let table: Vec<&str> =
        page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`')).map(|it| it.0).collect();
    let rules = page.split_once("<!-- rules: begin -->").unwrap().1.split_once("<!-- rules: end -->").unwrap().0;
    let words: Vec<&str> = rules.split(|letter: char| !(letter.is_ascii_alphanumeric() || letter == '_')).collect();
    let meant: Vec<_> = words.into_iter().filter(|word| word.starts_with("cryptattach_")).collect();
    assert!(meant.len() > 4 && meant.iter().all(|name| table.contains(name)), "{meant:?}");
}
