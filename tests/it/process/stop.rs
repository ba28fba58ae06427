use std::{path::Path, process::Command};

use nix::sys::signal::Signal;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

use super::home::Home;
use crate::harness::login_through;

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_and_sigint_end_service_and_postgres_in_order() {
    let home = Home::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut service = home.serve();
        service.serving().await;
        assert!(home.has_postgres());
        assert_eq!(service.stop(signal).code(), Some(0), "{}", service.log());
        // At once: whoever waits for the service may remove the folder.
        assert!(!home.has_postgres(), "{signal}");
        assert!(service.log().contains("stopped"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_watches_health_does_not_hold_up_the_end() {
    let home = Home::with_database();
    let mut service = home.start(home.production(&["serve"]));
    let mut health = HealthClient::new(service.serving().await);
    let whole = HealthCheckRequest::default();
    let mut watched = health.watch(whole).await.unwrap().into_inner();
    let first = watched.message().await.unwrap().unwrap();
    assert_eq!(first.status(), ServingStatus::Serving);

    assert_eq!(service.stop(Signal::SIGTERM).code(), Some(0));
    assert!(!service.log().contains("in flight"), "{}", service.log());
    let last = watched.message().await.unwrap().unwrap();
    assert_eq!(last.status(), ServingStatus::NotServing);
    assert!(watched.message().await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_service_starts_again_at_once() {
    let home = Home::new();
    let mut service = home.serve();
    service.serving().await;
    for _ in 0..4 {
        service.stop(Signal::SIGKILL);
        service = home.serve();
        service.serving().await;
        assert_eq!(service.output(), "");
    }
    let channel = service.serving().await;
    let [email, password] = ["admin_email", "admin_password"].map(|name| home.first_run(name));
    login_through(&channel, &email, &password).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_killed_while_it_makes_postgres_is_made_up_for() {
    killed_when_there_is("postgres.log").await;
    killed_when_there_is("postgres.init/PG_VERSION").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_killed_while_postgres_starts_is_made_up_for() {
    killed_when_there_is("postgres/postmaster.pid").await;
    killed_when_there_is("keys/.lock").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_killed_while_it_makes_secrets_is_made_up_for() {
    killed_when_there_is("keys/master.key").await;
    killed_when_there_is("first-run.txt").await;
}

/// Kills a first start once this is in the data folder, and starts again.
async fn killed_when_there_is(path: &str) {
    let home = Home::new();
    let mut service = home.serve();
    service.wait_until(path, |_| exists(&home, path));
    service.stop(Signal::SIGKILL);

    let mut service = home.serve();
    let channel = service.serving().await;
    let [email, password] = ["admin_email", "admin_password"].map(|name| home.first_run(name));
    let logged_in = login_through(&channel, &email, &password).await;
    assert!(logged_in.is_ok(), "killed at {path}: {logged_in:?}");
}

#[test]
fn a_signal_during_the_start_ends_it_in_order() {
    let stages = [
        "postgres.init/PG_VERSION",
        "postgres/postmaster.pid",
        "keys/.lock",
    ];
    for (stage, signal) in
        stages
            .into_iter()
            .zip([Signal::SIGTERM, Signal::SIGINT, Signal::SIGTERM])
    {
        let home = Home::new();
        let mut service = home.serve();
        service.wait_until(stage, |_| exists(&home, stage));
        assert_eq!(service.stop(signal).code(), Some(0), "{stage}");
        assert!(home.postgres_gone(), "{stage}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_cut_short_is_never_used() {
    let home = Home::with_database();
    let keys = home.data_dir().join("keys");
    let keys = keys.to_str().expect("UTF-8");
    let generate = ["keys", "generate", "--dir", keys];
    // A full disk, say: the first byte written to any file is the end of the process.
    let cut_short = |command: Command| {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -f 0; exec \"$0\" \"$@\""]);
        shell.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        assert_ne!(home.finish(shell, "").code, Some(0));
    };
    cut_short(home.command(&generate));
    let listed = home.run(&["keys", "list", "--dir", keys]);
    assert_eq!((listed.code, listed.stdout.as_str()), (Some(0), ""));

    assert_eq!(home.run(&generate).code, Some(0));
    cut_short(home.command(&["serve", "--dev"]));
    assert!(
        exists(&home, "keys/.master.key.new"),
        "cut at another place"
    );
    assert!(!exists(&home, "keys/master.key"));
    let mut service = home.start(home.command(&["serve", "--dev"]));
    service.serving().await;
    assert!(!exists(&home, "keys/.master.key.new"));
}

fn exists(home: &Home, path: impl AsRef<Path>) -> bool {
    home.data_dir().join(path).exists()
}
