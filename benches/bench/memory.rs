//! Part `memory`: more live tokens than memory may hold, and what that costs.

use std::{sync::Mutex, thread, time::Duration};

use anyhow::ensure;
use prost::Message as _;
use serde_json::json;
use tollkeeper::proto::tollkeeper::auth::v1::ValidateTokenRequest;
use tonic::Code;

use crate::{
    Options, cores,
    fixture::{Fixture, Person},
    load::{self, Calls, InFlight, Slice, Until},
    process::Server,
    report::{self, Row, Spread},
    runtime,
};

const VALIDATE: &str = "/tollkeeper.auth.v1.AuthService/ValidateToken";
const MIB: f64 = 1024.0 * 1024.0;
/// Of each session, as refreshing makes them.
const TOKENS_PER_SESSION: usize = 4;
const IN_FLIGHT: usize = 128;
/// What the allocator may add to the bound.
const ALLOWANCE: f64 = 1.15;

/// What one setting of the bound gave.
struct Outcome {
    bound_bytes: f64,
    grown_bytes: f64,
    entries: f64,
    hit_ratio: f64,
    row: Row,
}

pub(crate) fn run(options: &Options, tokens: usize, bounds_mib: &[u64]) -> anyhow::Result<()> {
    let runtime = runtime()?;
    let sessions = tokens.div_ceil(TOKENS_PER_SESSION);
    eprintln!("==> filling a database with {sessions} sessions");
    let fixture = runtime.block_on(Fixture::start(&options.service, sessions, None))?;
    let measured = measure(options, &fixture, tokens, bounds_mib);
    runtime.block_on(fixture.close())?;
    let (echo, outcomes) = measured?;

    println!("\n{tokens} live tokens drawn evenly, {IN_FLIGHT} in flight");
    println!(
        "  {:>9} {:>9} {:>10} {:>9} {:>9} {:>9} {:>7} {:>9}",
        "bound MiB", "grown MiB", "entries", "bytes/tok", "hits", "calls/s", "× echo", "p99 µs"
    );
    for outcome in &outcomes {
        println!(
            "  {:>9.0} {:>9.0} {:>10.0} {:>9.0} {:>8.1}% {:>9.0} {:>7.2} {:>9.0}",
            outcome.bound_bytes / MIB,
            outcome.grown_bytes / MIB,
            outcome.entries,
            outcome.grown_bytes / outcome.entries,
            outcome.hit_ratio * 100.0,
            outcome.row.spread(Slice::per_second).median,
            outcome.row.ratio(&echo, Slice::per_second).median,
            outcome.row.spread(|slice| slice.p99_us).median,
        );
    }
    let result = json!({
        "cores": cores(), "tokens": tokens, "sessions": sessions, "rounds": options.rounds(),
        "echo_per_second": echo.spread(Slice::per_second).json(),
        "bounds": outcomes.iter().map(|outcome| json!({
            "bound_bytes": outcome.bound_bytes, "grown_bytes": outcome.grown_bytes,
            "entries": outcome.entries, "hit_ratio": outcome.hit_ratio,
            "per_second": outcome.row.spread(Slice::per_second).json(),
            "per_second_ratio": outcome.row.ratio(&echo, Slice::per_second).json(),
        })).collect::<Vec<_>>(),
    });
    report::write_json(&options.results, "memory", &result)?;
    println!("written to {}/memory.json", options.results.display());
    for outcome in &outcomes {
        ensure!(
            outcome.grown_bytes <= outcome.bound_bytes * ALLOWANCE,
            "memory grew by {:.0} MiB beyond its bound of {:.0} MiB",
            outcome.grown_bytes / MIB,
            outcome.bound_bytes / MIB,
        );
    }
    Ok(())
}

fn measure(
    options: &Options,
    fixture: &Fixture,
    tokens: usize,
    bounds_mib: &[u64],
) -> anyhow::Result<(Row, Vec<Outcome>)> {
    eprintln!("==> signing {tokens} tokens");
    let messages = sign(fixture, tokens)?;
    let calls = Calls::new(VALIDATE, Some(&fixture.service_key), messages, Code::Ok);
    let calls = calls.drawn_at_random();
    let echo = Server::echo(&std::env::current_exe()?, &["echo", "--shape", "workers"])?;
    let in_flight = InFlight::new(IN_FLIGHT, 8);
    let turn = |server: &Server, until| {
        let slice = load::run(server, &calls, in_flight, options.threads(), until)?;
        ensure!(
            slice.wrong == 0,
            "{} calls failed: {:?}",
            slice.wrong,
            slice.first_wrong
        );
        Ok(slice)
    };
    let mut echo_row = Row::new("echo", "no-op echo".to_owned());
    let mut outcomes = Vec::new();
    for &bound_mib in bounds_mib {
        eprintln!("==> with a bound of {bound_mib} MiB");
        let bound = (bound_mib << 20).to_string();
        let name = format!("memory-{bound_mib}");
        let server = fixture.serve(&name, &[("TOLLKEEPER_AUTH_CACHE_BYTES", &bound)])?;
        // Connections, pool and threads are there before what is measured.
        let few = Until {
            time: Duration::from_secs(10),
            calls: 2_000,
        };
        turn(&server, few)?;
        let before = server.resident_bytes()?;
        let all = Until {
            time: Duration::from_secs(600),
            calls: tokens * 3,
        };
        turn(&server, all)?;
        let looked_up = |result: &str| {
            server.metric(&format!("credential_lookups_total{{result=\"{result}\"}}"))
        };
        let (hits, misses) = (looked_up("hit")?, looked_up("miss")?);
        let mut row = Row::new("many", name);
        for _ in 0..options.rounds() {
            echo_row
                .rounds
                .push(turn(&echo, Until::time(options.slice()))?);
            row.rounds
                .push(turn(&server, Until::time(options.slice()))?);
        }
        let (hits, misses) = (looked_up("hit")? - hits, looked_up("miss")? - misses);
        outcomes.push(Outcome {
            bound_bytes: bound_mib as f64 * MIB,
            grown_bytes: server.resident_bytes()? - before,
            entries: server.metric("credential_entries")?,
            hit_ratio: hits / (hits + misses),
            row,
        });
    }
    // Each bound was measured beside its own turns of the echo.
    let rounds = echo_row.rounds.len() / outcomes.len().max(1);
    let rate = Spread::of(echo_row.rounds.iter().map(Slice::per_second));
    eprintln!(
        "==> the echo: {:.0} calls/s in {rounds} rounds each",
        rate.median
    );
    Ok((echo_row, outcomes))
}

/// Tokens of all sessions in turn, signed on all cores.
fn sign(fixture: &Fixture, count: usize) -> anyhow::Result<Vec<Vec<u8>>> {
    let parts = cores();
    let signed = Mutex::new(Vec::with_capacity(count));
    thread::scope(|scope| {
        let threads: Vec<_> = (0..parts)
            .map(|part| {
                let signed = &signed;
                scope.spawn(move || -> anyhow::Result<()> {
                    let mut own = Vec::new();
                    for index in (part..count).step_by(parts) {
                        let person: &Person = &fixture.people[index % fixture.people.len()];
                        let request = ValidateTokenRequest {
                            token: fixture.token(person)?,
                            ..ValidateTokenRequest::default()
                        };
                        own.push(request.encode_to_vec());
                    }
                    signed.lock().expect("no panic").extend(own);
                    Ok(())
                })
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    Ok(signed.into_inner().expect("no panic"))
}
