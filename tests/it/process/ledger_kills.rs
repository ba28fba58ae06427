//! The ledger under load while its service or its Postgres is killed: what was acknowledged is
//! there, and all of it counts once.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::{
    home::Home,
    ledger_load::{Audit, Load, serve, service_key, settle},
    own_postgres::Postgres,
};

#[tokio::test(flavor = "multi_thread")]
async fn fifty_kills_of_the_service_lose_nothing_and_count_nothing_twice() {
    const KILLS: usize = 50;
    let home = Home::with_database();
    let url = home.database_url().to_owned();
    let key = service_key(&home);
    // The one that is left books what the killed one's Postgres session may still be booking.
    let (mut services, mut channels) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let (service, channel) = serve(&home).await;
        services.push(service);
        channels.push(channel);
    }
    let load = Load::new(key, channels).await;
    let clients = load.start();
    let audit = Audit::of(&url).await;
    for round in 0..KILLS {
        load.advance(200).await;
        let replica = round % services.len();
        let killed = services[replica].stop(Signal::SIGKILL);
        assert_eq!(killed.code(), None, "it was alive and was killed");
        let (service, channel) = serve(&home).await;
        services[replica] = service;
        *load.replicas[replica].lock().unwrap() = channel;
        if round % 10 == 9 {
            audit.check(&load).await;
        }
    }
    settle(&load, clients, &url, "50 kills of the service").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_kills_of_postgres_lose_nothing_and_count_nothing_twice() {
    const KILLS: usize = 10;
    let outside = Home::new();
    let mut postgres = Postgres::start(outside.path().join("cluster")).await;
    let url = postgres.running.database_url().to_owned();
    let home = Home::with_database_at(&url);
    let key = service_key(&home);
    let (service, channel) = serve(&home).await;
    let load = Load::new(key, vec![channel]).await;
    let clients = load.start();
    for _ in 0..KILLS {
        load.advance(200).await;
        let data_dir = postgres.kill().await;
        postgres = Postgres::start(data_dir).await;
        Audit::of(&url).await.check(&load).await;
    }
    settle(&load, clients, &url, "10 kills of Postgres").await;
    drop(service);
    postgres.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_thirty_seconds_is_told_and_got_over_without_help() {
    const OUTAGE: Duration = Duration::from_secs(30);
    let outside = Home::new();
    let mut postgres = Postgres::start(outside.path().join("cluster")).await;
    let url = postgres.running.database_url().to_owned();
    let home = Home::with_database_at(&url);
    let key = service_key(&home);
    let (mut service, channel) = serve(&home).await;
    let load = Load::new(key, vec![channel]).await;
    let clients = load.start();
    load.advance(200).await;

    postgres.running.stop().await.unwrap();
    let told = || {
        let failures = load.seen.failures.lock().unwrap();
        failures.get("DATABASE_UNAVAILABLE").copied().unwrap_or(0)
    };
    let mut seen = Vec::new();
    for _ in 0..10 {
        sleep(OUTAGE / 10).await;
        seen.push((told(), load.acknowledged()));
    }
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 == pair[1].1),
        "callers are told all the time, and nothing else: {seen:?}"
    );

    postgres = Postgres::start(postgres.data_dir).await;
    let begun = Instant::now();
    load.advance(200).await;
    println!(
        "200 more events were booked {:?} after its end",
        begun.elapsed()
    );
    assert_eq!(
        service.child.try_wait().unwrap(),
        None,
        "the service stayed"
    );
    settle(&load, clients, &url, "30 s without Postgres").await;
    drop(service);
    postgres.running.stop().await.unwrap();
}
