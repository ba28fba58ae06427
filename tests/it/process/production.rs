use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;

use super::{
    home::{Home, MASTER_KEY},
    jwks,
};
use crate::harness::cluster;

#[tokio::test(flavor = "multi_thread")]
async fn ten_processes_starting_at_once_on_an_empty_database_all_serve() {
    let home = Home::with_database();
    let mut services: Vec<_> = (0..10)
        .map(|_| home.start(home.production(&["serve", "--set", "database.pool_size=4"])))
        .collect();
    let mut keys = Vec::new();
    for service in &mut services {
        let channel = service.serving().await;
        keys.push(jwks(channel).await.json);
        assert_eq!(service.output(), "");
    }
    keys.dedup();
    assert_eq!(keys.len(), 1);
    let migrated = services
        .iter()
        .map(|service| service.log().matches("applied migration").count());
    assert_eq!(migrated.filter(|count| *count > 0).count(), 1);
    for service in &services {
        service.signal(Signal::SIGTERM);
    }
    for service in &mut services {
        assert_eq!(service.ended().code(), Some(0));
    }
}

#[test]
fn missing_and_weak_secrets_are_refused_by_name_and_never_shown() {
    let home = Home::with_database();
    let short = &MASTER_KEY[..31];
    let placeholder = "your-secret-key-change-in-production";
    let (master, folder, secret) = (
        "TOLLKEEPER_AUTH_MASTER_KEY",
        "TOLLKEEPER_AUTH_KEY_DIR",
        "TOLLKEEPER_AUTH_JWT_SECRET",
    );
    let cases = [
        (&[][..], master, None, "must be set in production"),
        (&[], master, Some(""), "must be set in production"),
        (&[], master, Some(short), "holds 248 bits"),
        (&[], master, Some(placeholder), "looks like a placeholder"),
        (&[], folder, None, "must name a folder of PEM keys"),
        (&["HS256"], secret, None, "must be set in production"),
        (&["HS256"], secret, Some(short), "holds 248 bits"),
        (
            &["HS256"],
            secret,
            Some(placeholder),
            "looks like a placeholder",
        ),
    ];
    for (algorithm, variable, value, reason) in cases {
        let mut command = home.production(&["serve"]);
        if let [algorithm] = algorithm {
            command.env("TOLLKEEPER_AUTH_ALGORITHM", algorithm);
        }
        match value {
            Some(value) => command.env(variable, value),
            None => command.env_remove(variable),
        };
        let refused = home.finish(command, "");
        let case = format!("{variable}={value:?}: {}", refused.stderr);
        assert_eq!(refused.code, Some(1), "{case}");
        let setting = variable
            .trim_start_matches("TOLLKEEPER_AUTH_")
            .to_lowercase();
        for part in [&format!("setting auth.{setting}"), variable, reason] {
            assert!(refused.stderr.contains(part), "no {part:?} in {case}");
        }
        for hidden in [MASTER_KEY, short, placeholder] {
            assert!(!refused.stderr.contains(hidden), "{case}");
        }
    }
}

#[test]
fn a_key_folder_without_a_key_of_the_algorithm_is_refused() {
    let home = Home::with_database();
    let mut command = home.production(&["serve"]);
    command.env("TOLLKEEPER_AUTH_ALGORITHM", "RS256");
    let refused = home.finish(command, "");
    assert_eq!(refused.code, Some(1));
    for part in ["auth.key_dir", "holds no RS256 key", "keys generate"] {
        assert!(refused.stderr.contains(part), "{}", refused.stderr);
    }
}

#[test]
fn a_database_that_cannot_be_used_is_reported_within_seconds() {
    let home = Home::with_database();
    // Accepts connections, as far as the kernel goes, and never says a word.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap();
    let missing = home.database_url().replace("/template0_", "/missing_");
    let me = "postgresql://me:hunter22@";
    let cases = [
        ("not a url".to_owned(), "invalid connection string"),
        ("mysql://root:hunter22@db/db".to_owned(), "invalid"),
        (format!("{me}127.0.0.1:x/db"), "invalid"),
        (
            "postgresql://me@db/db?hunter22=on".to_owned(),
            "invalid connection string",
        ),
        // Nobody listens there.
        (format!("{me}127.0.0.2:1/db"), "Connection refused"),
        (format!("{me}{silent}/db"), "no answer in time"),
        (missing, "does not exist"),
    ];
    for (url, reason) in cases {
        let mut command = home.production(&["serve"]);
        command.env("DATABASE_URL", &url);
        let begun = Instant::now();
        let refused = home.finish(command, "");
        assert_eq!(refused.code, Some(1), "{url}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{url}");
        let last = refused.stderr.lines().last().unwrap_or_default();
        assert!(last.starts_with("tollkeeper: "), "{url}: {last}");
        for part in ["setting database.url", reason] {
            assert!(last.contains(part), "{url}: {last}");
        }
        assert!(!refused.stderr.contains("hunter22"), "{url}: {last}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_came_before_their_partition_do_not_block_the_start() {
    let home = Home::with_database();
    let migrated = home.run(&["migrate", "up"]);
    assert_eq!(migrated.code, Some(0), "{}", migrated.stderr);
    let url = home.database_url();
    let client = cluster::connect(url).await;
    let rows = "
        INSERT INTO audit_events (id, action, actor_kind, target_id, request_id)
        VALUES (gen_random_uuid(), 'user.create', 'operator', gen_random_uuid(), '');
        INSERT INTO usage_records (usage_month, user_id, event_id, occurred_at, model,
            input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
            reasoning_tokens)
        SELECT to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), gen_random_uuid(),
            gen_random_uuid(), now(), 'a-model', 1, 2, 3, 4, 5";
    client.batch_execute(rows).await.unwrap();

    let mut service = home.start(home.production(&["serve"]));
    service.serving().await;
    for table in ["audit_events", "usage_records"] {
        let query = format!("SELECT count(*), (SELECT count(*) FROM {table}_default) FROM {table}");
        let row = client.query_one(&query, &[]).await.unwrap();
        let counts: (i64, i64) = (row.get(0), row.get(1));
        assert_eq!(counts, (1, 0), "{table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hs256_serves_with_a_strong_secret() {
    let home = Home::with_database();
    let mut command = home.production(&["serve"]);
    let secret: String = MASTER_KEY.chars().rev().collect();
    command
        .env("TOLLKEEPER_AUTH_ALGORITHM", "HS256")
        .env("TOLLKEEPER_AUTH_JWT_SECRET", &secret)
        // The gateway beside it is given the same environment.
        .env("TOLLKEEPER_GATEWAY_KEY", "tks_of_the_gateway")
        .env_remove("TOLLKEEPER_AUTH_KEY_DIR");
    let mut service = home.start(command);
    service.serving().await;
    service.signal(Signal::SIGHUP);
    service.wait_until("it has read what can be read again", |service| {
        service.log().contains("read the tiers again")
    });
    assert!(!service.log().contains("signing keys"));
    assert!(!service.log().contains(&secret));
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reads_the_keys_again_and_keeps_the_old_ones_when_they_are_broken() {
    let home = Home::with_database();
    let mut service = home.start(home.production(&["serve"]));
    let channel = service.serving().await;
    let folder = home.path().join("keys");
    let before = jwks(channel.clone()).await;

    let broken = folder.join("broken.pem");
    std::fs::write(&broken, "no key").unwrap();
    service.signal(Signal::SIGHUP);
    service.wait_until("it complains", |service| {
        service.log().contains("the old signing keys stay")
    });
    assert!(service.log().contains("broken.pem"));
    assert_eq!(jwks(channel.clone()).await, before);

    std::fs::remove_file(&broken).unwrap();
    let made = home.run(&[
        "keys",
        "generate",
        "--next",
        "--dir",
        folder.to_str().unwrap(),
    ]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    assert!(made.stdout.trim().ends_with(".next.pem"), "{}", made.stdout);
    service.signal(Signal::SIGHUP);
    service.wait_until("it has read them", |service| {
        service.log().contains("read the signing keys again")
    });
    assert_eq!(jwks(channel).await.keys.len(), 2);
    assert_eq!(service.stop(Signal::SIGTERM).code(), Some(0));
}
