//! The same load by another generator, to hold ours against.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context as _, ensure};

use crate::{
    load::{Calls, InFlight, Slice},
    process::{Server, cpu_of_children},
};

/// Whether the program is here.
pub(crate) fn is_installed() -> bool {
    let asked = Command::new("h2load").arg("--version").output();
    asked.is_ok_and(|output| output.status.success())
}

/// Sends the first of `calls` over and over; `body` is a file to put it in. Tells throughput and CPU
/// time only, and checks HTTP statuses only.
pub(crate) fn run(
    server: &Server,
    calls: &Calls,
    in_flight: InFlight,
    threads: usize,
    time: Duration,
    body: &Path,
) -> anyhow::Result<Slice> {
    std::fs::write(body, calls.body(0))?;
    let mut command = Command::new("h2load");
    command
        .arg(format!("--clients={}", in_flight.connections))
        .arg(format!("--max-concurrent-streams={}", in_flight.streams))
        .arg(format!("--threads={}", threads.min(in_flight.connections)))
        .arg(format!("--duration={}ms", time.as_millis()))
        .arg(format!("--data={}", body.display()));
    for (name, value) in calls.headers() {
        command.arg(format!("--header={name}: {value}"));
    }
    let url = format!("http://{}{}", server.address, calls.path());
    let (cpu, own_cpu) = (server.cpu()?, cpu_of_children()?);
    let output = command.arg(url).output().context("cannot run h2load")?;
    let cpu = server.cpu()? - cpu;
    let own_cpu = cpu_of_children()? - own_cpu;
    let said = String::from_utf8_lossy(&output.stdout);
    // "requests: 100 total, 100 started, 100 done, 100 succeeded, 0 failed, …"
    let succeeded: u64 = said
        .lines()
        .find_map(|line| line.strip_prefix("requests: "))
        .and_then(|line| {
            line.split(", ")
                .find_map(|part| part.strip_suffix(" succeeded"))
        })
        .and_then(|count| count.parse().ok())
        .with_context(|| format!("unexpected words of h2load:\n{said}"))?;
    ensure!(succeeded > 0, "no call of h2load succeeded:\n{said}");
    Ok(Slice {
        calls: succeeded,
        seconds: time.as_secs_f64(),
        server_cpu_us: cpu.as_secs_f64() * 1e6,
        client_cpu_us: own_cpu.as_secs_f64() * 1e6,
        ..Slice::default()
    })
}
