//! `bench-attach`: attach of a strict volume next to `cryptsetup open` of a LUKS2 volume with a fast keyslot.

use std::fmt::Write;

use crate::machine::{DiskOptions, Machine};

const ROUNDS: usize = 25;

/// Runs both in turn in one machine and prints medians and ratios.
pub fn compare(machine: &mut Machine) {
    let (ours, theirs) =
        (machine.plug(64 << 20, DiskOptions::default()), machine.plug(64 << 20, DiskOptions::default()));
    machine.ok("head -c 64 /dev/urandom >/keys/pass");
    machine.ok(&format!("cryptattach format {}", ours.path()));
    machine.ok(&format!(
        "cryptsetup luksFormat -q --type luks2 --sector-size 4096 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 \
         --key-file /keys/pass {}",
        theirs.path()
    ));
    let commands = [
        (
            "cryptattach attach",
            format!("cryptattach attach {} ours >/dev/null", ours.path()),
            "cryptattach detach ours",
        ),
        (
            "cryptsetup open",
            format!("cryptsetup open --key-file /keys/pass {} theirs", theirs.path()),
            "cryptsetup close theirs",
        ),
    ];
    // Wall and CPU seconds of each round: [program][wall, cpu].
    let mut times = [const { [const { Vec::new() }; 2] }; 2];
    for _ in 0..ROUNDS {
        for (program, (_, start, stop)) in commands.iter().enumerate() {
            // times(1p) of the shell: user and system seconds of its children.
            let text = machine.ok(&format!(
                "s=$(date +%s%N); {start}; e=$(date +%s%N); times >/tmp/times; {stop}; udevadm settle; echo $((e - s)); tail -1 /tmp/times"
            ));
            let (nanoseconds, cpu) = text.split_once('\n').unwrap();
            times[program][0].push(nanoseconds.parse::<f64>().unwrap() / 1e6);
            times[program][1].push(cpu.split(' ').map(|part| seconds(part) * 1e3).sum());
        }
    }
    let median = |values: &Vec<f64>| {
        let mut sorted = values.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[sorted.len() / 2]
    };
    let mut table = String::new();
    let medians = times.map(|program| program.each_ref().map(median));
    for ((name, ..), [wall, cpu]) in commands.iter().zip(medians) {
        writeln!(table, "{name:<22} {wall:>8.1} ms wall {cpu:>8.1} ms CPU").unwrap();
    }
    let ratio = |index: usize| medians[0][index] / medians[1][index];
    writeln!(table, "{:<22} {:>8.2}         {:>8.2}", "ratio", ratio(0), ratio(1)).unwrap();
    println!("medians of {ROUNDS} rounds, interleaved, in one virtual machine (emulated processor):\n{table}");
}

/// "0m0.030000s", as the shell prints it.
fn seconds(text: &str) -> f64 {
    let (minutes, seconds) = text.trim_end_matches('s').split_once('m').unwrap();
    minutes.parse::<f64>().unwrap() * 60.0 + seconds.parse::<f64>().unwrap()
}
