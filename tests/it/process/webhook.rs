use std::net::TcpListener;

use super::home::Home;
use crate::harness::cluster;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

#[tokio::test(flavor = "multi_thread")]
async fn the_log_says_that_events_cannot_be_delivered_and_no_secret_of_the_webhook() {
    let home = Home::with_database();
    // Nobody listens there.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let url = format!("http://{address}/hooks/token-in-the-path");
    let production = |args: &[&str]| {
        let mut command = home.production(args);
        command
            .env("TOLLKEEPER_WEBHOOK_URL", &url)
            .env("TOLLKEEPER_WEBHOOK_SECRET", SECRET);
        command
    };
    let mut service = home.start(production(&[
        "serve",
        "--set",
        "log.filter=info,tollkeeper=trace",
    ]));
    service.serving().await;
    let client = cluster::connect(home.database_url()).await;
    let insert = "INSERT INTO outbox (id, kind, payload)
        VALUES (gen_random_uuid(), 'quota.threshold_reached', '{\"data\": \"of-the-payload\"}')";
    client.batch_execute(insert).await.unwrap();
    service.wait_until("it is told", |service| {
        service.log().contains("events cannot be delivered")
    });
    let log = service.log();
    assert!(log.contains("no connection"), "{log}");
    let config = home.finish(production(&["config"]), "");
    assert!(config.stdout.contains("webhook.secret"));
    for text in [&log, &config.stdout, &config.stderr] {
        assert!(!text.contains(&SECRET[6..18]), "{text}");
    }
    for hidden in ["token-in-the-path", "of-the-payload"] {
        assert!(!log.contains(hidden), "{log}");
    }
    let error = "SELECT last_error FROM outbox";
    let error: String = client.query_one(error, &[]).await.unwrap().get(0);
    assert_eq!(error, "no connection");
}

#[test]
fn a_webhook_that_cannot_work_is_refused_by_name() {
    let home = Home::with_database();
    for (url, secret, named) in [
        ("https://notices.example", SECRET, "webhook.url"),
        ("notices.example", SECRET, "webhook.url"),
        ("http://notices.example", "", "webhook.secret"),
        ("http://notices.example", "whsec_c2hvcnQ=", "webhook.secret"),
    ] {
        let mut command = home.production(&["serve"]);
        command
            .env("TOLLKEEPER_WEBHOOK_URL", url)
            .env("TOLLKEEPER_WEBHOOK_SECRET", secret);
        let refused = home.finish(command, "");
        assert_ne!(refused.code, Some(0));
        assert!(refused.stderr.contains(named), "{}", refused.stderr);
        assert!(!refused.stderr.contains("c2hvcnQ"), "{}", refused.stderr);
    }
}
