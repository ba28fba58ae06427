//! Part `login`: what logins reach of what the hash allows, and what they leave to other calls.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use argon2::{
    Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _, Version,
    password_hash::phc::PasswordHash,
};
use prost::Message as _;
use serde_json::json;
use tollkeeper::{
    config::PasswordSettings,
    proto::tollkeeper::auth::v1::{LoginRequest, ValidateTokenRequest},
};
use tonic::Code;

use crate::{
    Options, cores,
    fixture::Fixture,
    load::{self, Calls, InFlight, Slice, Until},
    process::Server,
    report::{self, Row},
    runtime,
};

const LOGIN: &str = "/tollkeeper.auth.v1.AuthService/Login";
const VALIDATE: &str = "/tollkeeper.auth.v1.AuthService/ValidateToken";
const PASSWORD: &str = "correct horse battery staple";
const PEOPLE: usize = 1_000;
const VALIDATE_IN_FLIGHT: usize = 32;

/// Enough that no core waits for the next login while others commit.
fn logins_in_flight() -> usize {
    cores() * 4
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let hash = Hash::new()?;
    let runtime = runtime()?;
    let fixture = Fixture::start(&options.service, PEOPLE, Some(&hash.text));
    let fixture = runtime.block_on(fixture)?;
    let measured = fixture
        .serve("service", &[])
        .and_then(|server| measure(options, &fixture, &server, &hash));
    runtime.block_on(fixture.close())?;
    let [hashes, logins, idle, busy] = measured?;

    let postgres_us = |slice: &Slice| slice.postgres_cpu_us / slice.calls as f64;
    let share = logins.ratio(&hashes, Slice::per_second);
    let left = busy.ratio(&idle, Slice::per_second);
    println!();
    println!(
        "  {:<48} {:>10} {:>14} {:>14} {:>9} {:>9}",
        "", "per second", "all CPU µs", "of it Postgres", "p50 µs", "p99 µs"
    );
    for row in [&hashes, &logins, &idle, &busy] {
        println!(
            "  {:<48} {:>10.1} {:>14.1} {:>14.1} {:>9.0} {:>9.0}",
            row.title,
            row.spread(Slice::per_second).median,
            row.spread(Slice::cpu_us_per_call).median,
            row.spread(postgres_us).median,
            row.spread(|s| s.p50_us).median,
            row.spread(|s| s.p99_us).median,
        );
    }
    println!(
        "\nlogins reach {:.2} ({:.2}–{:.2}) of what the hash alone allows; \
         under them ValidateToken keeps {:.2} ({:.2}–{:.2}) of its throughput",
        share.median, share.min, share.max, left.median, left.min, left.max
    );
    let row = |row: &Row| {
        json!({
            "part": row.part, "title": row.title,
            "per_second": row.spread(Slice::per_second).json(),
            "cpu_us": row.spread(Slice::cpu_us_per_call).json(),
            "of_it_postgres_us": row.spread(postgres_us).json(),
            "p50_us": row.spread(|s| s.p50_us).json(),
            "p99_us": row.spread(|s| s.p99_us).json(),
        })
    };
    let result = json!({
        "cores": cores(), "rounds": options.rounds(), "slice_seconds": options.slice().as_secs_f64(),
        "rows": [row(&hashes), row(&logins), row(&idle), row(&busy)],
        "logins_of_hashes": share.json(), "validate_busy_of_idle": left.json(),
    });
    report::write_json(&options.results, "login", &result)?;
    println!("written to {}/login.json", options.results.display());
    report::ensure_expected([&logins, &idle, &busy])
}

fn measure(
    options: &Options,
    fixture: &Fixture,
    server: &Server,
    hash: &Hash,
) -> anyhow::Result<[Row; 4]> {
    let logins = (1..=PEOPLE).map(|number| {
        let request = LoginRequest {
            identifier: format!("person-{number}"),
            password: PASSWORD.to_owned(),
        };
        request.encode_to_vec()
    });
    let logins = Calls::new(LOGIN, None, logins, Code::Ok);
    let tokens = fixture
        .people
        .iter()
        .map(|person| {
            let request = ValidateTokenRequest {
                token: fixture.token(person)?,
                ..ValidateTokenRequest::default()
            };
            Ok(request.encode_to_vec())
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    let caller = Some(fixture.service_key.as_str());
    let validate = Calls::new(VALIDATE, caller, tokens, Code::Ok);

    let slice = options.slice();
    let many = InFlight::new(logins_in_flight(), cores() * 2);
    let some = InFlight::new(VALIDATE_IN_FLIGHT, 8);
    let postgres = fixture.postgres()?;
    // What Postgres uses is a part of what a login costs.
    let login = || -> anyhow::Result<Slice> {
        let before = postgres.cpu()?;
        let slice = load::run(server, &logins, many, 1, Until::time(slice))?;
        let cpu = postgres.cpu()? - before;
        Ok(Slice {
            postgres_cpu_us: cpu.as_secs_f64() * 1e6,
            ..slice
        })
    };
    let validating = || {
        load::run(
            server,
            &validate,
            some,
            options.threads(),
            Until::time(slice),
        )
    };
    let busy = || {
        thread::scope(|scope| {
            let flood = scope.spawn(login);
            let slice = validating();
            flood.join().expect("the generator does not panic")?;
            slice
        })
    };
    let mut rows = [
        Row::new("hash", format!("argon2id alone, {} threads", cores())),
        Row::new("login", format!("Login, {} in flight", logins_in_flight())),
        Row::new(
            "idle",
            format!("ValidateToken, {VALIDATE_IN_FLIGHT} in flight"),
        ),
        Row::new(
            "busy",
            "ValidateToken, the same, while logins saturate".to_owned(),
        ),
    ];
    validating()?;
    for round in 0..options.rounds() {
        for turn in 0..rows.len() {
            let index = (turn + round) % rows.len();
            let slice = match index {
                0 => hash.alone(slice),
                1 => login(),
                2 => validating(),
                _ => busy(),
            };
            rows[index].rounds.push(slice?);
        }
    }
    Ok(rows)
}

/// The hash as the service computes it by default.
struct Hash {
    argon2: Argon2<'static>,
    text: String,
}

impl Hash {
    fn new() -> anyhow::Result<Self> {
        let settings = PasswordSettings::default();
        let (memory, passes) = (settings.argon2_memory_kib, settings.argon2_iterations);
        let params = Params::new(memory, passes, 1, None);
        let params = params.map_err(|error| anyhow::anyhow!("{error}"))?;
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let salt = uuid::Uuid::now_v7().into_bytes();
        let text = argon2
            .hash_password_with_salt(PASSWORD.as_bytes(), &salt)
            .map_err(|error| anyhow::anyhow!("{error}"))?
            .to_string();
        Ok(Self { argon2, text })
    }

    /// Verifies on every core for `time`, with nothing around it.
    fn alone(&self, time: Duration) -> anyhow::Result<Slice> {
        let stop = Instant::now() + time;
        let count = AtomicU64::new(0);
        let begun = Instant::now();
        let cpu = crate::process::cpu_of("/proc/self/stat")?;
        thread::scope(|scope| {
            for _ in 0..cores() {
                scope.spawn(|| {
                    let hash = PasswordHash::new(&self.text).expect("just made");
                    while Instant::now() < stop {
                        let checked = self.argon2.verify_password(PASSWORD.as_bytes(), &hash);
                        checked.expect("the password is right");
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        let calls = count.into_inner();
        let cpu = crate::process::cpu_of("/proc/self/stat")? - cpu;
        let first = (calls > 0).then_some(calls).context("no hash in time")?;
        Ok(Slice {
            calls: first,
            seconds: begun.elapsed().as_secs_f64(),
            server_cpu_us: cpu.as_secs_f64() * 1e6,
            ..Slice::default()
        })
    }
}
