//! Mails on their way to somebody else's SMTP server.

use std::{collections::BTreeSet, time::Duration};

use tollkeeper::config::MailTls;

use super::mail::{PENDING, ask_reset, forget_intervals, register, register_through, verify};
use crate::{
    harness::{Protection, RunningServer, SmtpServer, TestApp, eventually},
    ops::scrape,
};

/// A server that mails to another one.
async fn mailing_to(smtp: &SmtpServer) -> TestApp {
    TestApp::spawn_with(|settings| smtp.take(settings)).await
}

async fn attempts(app: &TestApp, result: &str) -> f64 {
    let name = format!("tollkeeper_mail_attempts_total{{result=\"{result}\"}}");
    scrape(app.ops_address).await[&name]
}

/// What is known of the one mail that is not sent.
async fn last_error(app: &TestApp) -> Option<String> {
    let rows = app
        .sql("SELECT last_error FROM outbox WHERE kind = 'mail'")
        .await;
    rows.first().and_then(|row| row.get(0))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mail_arrives_in_the_clear_by_starttls_and_by_tls() {
    for protection in [Protection::None, Protection::StartTls, Protection::Tls] {
        let smtp = SmtpServer::start(protection);
        let app = mailing_to(&smtp).await;
        register(&app, "ada").await.unwrap();
        eventually("taken", async || smtp.taken().len() == 1).await;
        let mail = &smtp.taken()[0];
        assert_eq!(mail["from"], "no-reply@example.com");
        assert_eq!(mail["to"], serde_json::json!(["ada@example.com"]));
        let is_encrypted = protection != Protection::None;
        assert_eq!(mail["encrypted"], is_encrypted, "{protection:?}");
        let letter = &smtp.letters()[0];
        assert!(
            letter.text.contains("Content-Type: text/html"),
            "{}",
            letter.text
        );
        let link = format!(
            "https://app.example.com/verify-email?token={}",
            letter.token()
        );
        assert_eq!(letter.text.matches(&link).count(), 3, "{}", letter.text);
        verify(&app, &letter.token()).await.unwrap();
        eventually("written down", async || app.count(PENDING).await == 0).await;
        assert_eq!(last_error(&app).await, None);
        assert_eq!(attempts(&app, "delivered").await, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_sent_to_who_speaks_no_tls_or_is_not_who_they_should_be() {
    // It offers none.
    let smtp = SmtpServer::start(Protection::None);
    let app = TestApp::spawn_with(|settings| {
        smtp.take(settings);
        settings.mail.tls = MailTls::StartTls;
    })
    .await;
    let insecure = "no TLS with a certificate that is trusted";
    register(&app, "ada").await.unwrap();
    eventually("tried", async || {
        last_error(&app).await.as_deref() == Some(insecure)
    })
    .await;
    assert!(smtp.taken().is_empty());
    for protection in [Protection::StartTls, Protection::Tls] {
        let (smtp, other) = (SmtpServer::start(protection), SmtpServer::start(protection));
        let app = TestApp::spawn_with(|settings| {
            // The authority of another one.
            other.take(settings);
            settings.mail.server = format!("localhost:{}", smtp.port);
        })
        .await;
        register(&app, "ada").await.unwrap();
        eventually("tried", async || last_error(&app).await.is_some()).await;
        assert_eq!(
            last_error(&app).await.as_deref(),
            Some(insecure),
            "{protection:?}"
        );
        assert!(smtp.taken().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_at_the_server_loses_no_mail() {
    let smtp = SmtpServer::start(Protection::StartTls);
    // Sends nothing itself, so that one server at a time does.
    let app = TestApp::spawn().await;
    let mut settings = app.settings().clone();
    smtp.take(&mut settings);
    settings.mail.password = tollkeeper::config::Secret::new("another one");
    let wrong = RunningServer::start(&settings).await.unwrap();
    register_through(&wrong.channel(), "ada", "ada@example.com")
        .await
        .unwrap();
    let refused = "the server refuses this sender: 535";
    eventually("tried", async || {
        last_error(&app).await.as_deref() == Some(refused)
    })
    .await;
    wrong.stop().await.unwrap();
    assert_eq!(app.count(PENDING).await, 1);
    smtp.take(&mut settings);
    let _mended = RunningServer::start(&settings).await.unwrap();
    app.sql("UPDATE outbox SET available_at = now()").await;
    eventually("taken", async || smtp.taken().len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_exist_is_given_up_and_who_is_to_come_again_is_mailed() {
    let smtp = SmtpServer::start(Protection::None);
    let app = mailing_to(&smtp).await;
    register(&app, "refused").await.unwrap();
    eventually("given up", async || last_error(&app).await.is_some()).await;
    // The code alone: the server repeats the address.
    assert_eq!(last_error(&app).await.as_deref(), Some("refused: 550"));
    assert_eq!(app.count(PENDING).await, 0);
    assert_eq!(app.count("SELECT attempts::bigint FROM outbox").await, 1);
    assert_eq!(attempts(&app, "refused").await, 1.0);
    app.sql("DELETE FROM outbox").await;

    register(&app, "greylisted").await.unwrap();
    eventually("taken", async || smtp.taken().len() == 1).await;
    eventually("written down", async || app.count(PENDING).await == 0).await;
    assert_eq!(last_error(&app).await, None);
    assert_eq!(app.count("SELECT attempts::bigint FROM outbox").await, 2);
    assert_eq!(attempts(&app, "failed").await, 1.0);
    verify(&app, &smtp.letters()[0].token()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_wanted_any_more_is_not_sent() {
    // Nobody listens there, for now.
    let smtp = SmtpServer::start(Protection::None);
    let app = TestApp::spawn_with(|settings| {
        smtp.take(settings);
        settings.mail.server = "127.0.0.1:1".to_owned();
    })
    .await;
    let user = app.user().create().await;
    for _ in 0..2 {
        ask_reset(&app, &user.email).await.unwrap();
        forget_intervals(&app).await;
    }
    register(&app, "ada").await.unwrap();
    ask_reset(&app, "nobody@example.com").await.unwrap();
    let failed = "SELECT count(*) FROM outbox WHERE last_error = 'no connection'";
    eventually("tried", async || app.count(failed).await >= 2).await;
    app.sql("UPDATE one_time_tokens SET expires_at = now() WHERE purpose = 'verify_email'")
        .await;
    let mut settings = app.settings().clone();
    smtp.take(&mut settings);
    let _other = RunningServer::start(&settings).await.unwrap();
    eventually("none waits", async || {
        app.sql("UPDATE outbox SET available_at = now() WHERE delivered_at IS NULL")
            .await;
        app.count(PENDING).await == 0
    })
    .await;
    // The newer reset alone.
    let letters = smtp.letters();
    assert_eq!(letters.len(), 1, "{letters:?}");
    assert_eq!(letters[0].to, user.email);
    assert_eq!(app.count("SELECT count(*) FROM outbox").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_send_each_mail_once() {
    const MAILS: usize = 60;
    let smtp = SmtpServer::start(Protection::None);
    let app = mailing_to(&smtp).await;
    let replica = app.replica().await;
    for number in 0..MAILS {
        register(&app, &format!("person{number}")).await.unwrap();
    }
    eventually("all are sent", async || app.count(PENDING).await == 0).await;
    let letters = smtp.letters();
    let to: BTreeSet<&str> = letters.iter().map(|letter| &*letter.to).collect();
    assert_eq!((letters.len(), to.len()), (MAILS, MAILS));
    let other = replica.ops_address.unwrap();
    let delivered = "tollkeeper_mail_attempts_total{result=\"delivered\"}";
    let shares = [
        scrape(app.ops_address).await[delivered],
        scrape(other).await[delivered],
    ];
    assert_eq!(shares.iter().sum::<f64>(), MAILS as f64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_waits_for_the_word_on_what_it_sends() {
    let smtp = SmtpServer::start(Protection::None);
    let app = mailing_to(&smtp).await;
    let replica = app.replica().await;
    for number in 0..6 {
        register(&app, &format!("slow{number}")).await.unwrap();
    }
    // The other side has some, and has not said so.
    eventually("under way", async || !smtp.taken().is_empty()).await;
    replica.stop().await.unwrap();
    let url = app.database_url.clone();
    app.stop().await.unwrap();
    let client = crate::harness::cluster::connect(&url).await;
    let sent: i64 = client
        .query_one(
            "SELECT count(*) FROM outbox WHERE delivered_at IS NOT NULL",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(usize::try_from(sent).unwrap(), smtp.taken().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_slow_to_say_so_has_a_mail_once_and_a_silent_one_three_times() {
    let smtp = SmtpServer::start(Protection::None);
    let app = TestApp::spawn_with(|settings| {
        smtp.take(settings);
        settings.mail.deadline = Duration::from_millis(1500);
        settings.mail.reply_deadline = Duration::from_secs(5);
    })
    .await;
    register(&app, "clinging").await.unwrap();
    eventually("written down", async || app.count(PENDING).await == 0).await;
    assert_eq!(last_error(&app).await, None);
    assert_eq!(
        (smtp.taken().len(), attempts(&app, "delivered").await),
        (1, 1.0)
    );
    app.sql("DELETE FROM outbox").await;
    // Its word comes after two seconds.
    register(&app, "slow").await.unwrap();
    eventually("written down", async || app.count(PENDING).await == 0).await;
    assert_eq!(last_error(&app).await, None);
    assert_eq!(smtp.taken().len(), 2);
    app.sql("DELETE FROM outbox").await;
    // Its word does not come.
    register(&app, "silent").await.unwrap();
    for attempt in 1..=3 {
        let tried = format!(
            "SELECT count(*) FROM outbox WHERE attempts = {attempt}
                 AND last_error = 'the server did not say that it has it'
                 AND (payload -> 'unanswered' = '{attempt}' OR delivered_at IS NOT NULL)
                 AND available_at < now() + interval '3 min'"
        );
        eventually("tried", async || app.count(&tried).await == 1).await;
        assert_eq!(app.count(PENDING).await, i64::from(attempt < 3));
        // Not at once.
        let soon = "SELECT count(*) FROM outbox WHERE delivered_at IS NULL
             AND available_at < now() + interval '50 s'";
        assert_eq!(app.count(soon).await, 0);
        app.sql("UPDATE outbox SET available_at = now()").await;
    }
    assert_eq!(smtp.taken().len(), 5);
    let ids: BTreeSet<String> = smtp.letters()[2..]
        .iter()
        .filter_map(|letter| {
            let mut lines = letter.text.lines();
            lines
                .find(|line| line.starts_with("Message-ID: "))
                .map(str::to_owned)
        })
        .collect();
    assert_eq!(ids.len(), 1);
}

/// Postfix says so as late as here.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_us_at_the_recipient_loses_no_mail() {
    let smtp = SmtpServer::start(Protection::None);
    let app = mailing_to(&smtp).await;
    for (name, error) in [
        ("denied-554-5.7.1", "the server refuses this sender: 554"),
        ("denied-550-5.7.1", "the server refuses this sender: 550"),
        ("denied-530-", "the server refuses this sender: 530"),
        ("denied-554-", "the server refuses this sender: 554"),
        ("denied-554-5.1.1", "refused: 554"),
        ("denied-550-", "refused: 550"),
    ] {
        let username = name.trim_end_matches('-').to_owned();
        let email = format!("{name}x@example.com");
        register_through(&app.channel, &username, &email)
            .await
            .unwrap();
        eventually("tried", async || last_error(&app).await.is_some()).await;
        assert_eq!(last_error(&app).await.as_deref(), Some(error), "{name}");
        let waits = error.starts_with("the server refuses");
        assert_eq!(app.count(PENDING).await, i64::from(waits), "{name}");
        app.sql("DELETE FROM outbox").await;
    }
    assert!(smtp.taken().is_empty());
}

/// During a rolling upgrade the next version writes what this one does not know.
#[tokio::test(flavor = "multi_thread")]
async fn a_mail_that_cannot_be_read_is_left_to_others_for_a_day() {
    let smtp = SmtpServer::start(Protection::None);
    let app = mailing_to(&smtp).await;
    let hold = "ALTER TABLE outbox ALTER available_at SET DEFAULT now() + interval '1 h'";
    app.sql(hold).await;
    register(&app, "ada").await.unwrap();
    app.sql("UPDATE one_time_tokens SET email = 'no address'")
        .await;
    app.sql(
        r#"INSERT INTO outbox (id, kind, payload) VALUES (gen_random_uuid(), 'mail',
             '{"mail": "telepathy", "user_id": "00000000-0000-0000-0000-000000000000"}')"#,
    )
    .await;
    app.sql("UPDATE outbox SET available_at = now()").await;
    let waiting = "SELECT count(*) FROM outbox WHERE attempts = 1 AND delivered_at IS NULL
         AND last_error IN ('unknown mail', 'cannot be read')
         AND available_at > now() + interval '20 s'";
    eventually("left", async || app.count(waiting).await == 2).await;
    app.sql("UPDATE outbox SET available_at = now(), created_at = now() - interval '25 h'")
        .await;
    let given_up = "SELECT count(DISTINCT last_error) FROM outbox WHERE delivered_at IS NOT NULL";
    eventually("given up", async || app.count(given_up).await == 2).await;
    assert_eq!(attempts(&app, "failed").await, 2.0);
    assert_eq!(attempts(&app, "refused").await, 2.0);
    assert!(smtp.taken().is_empty());
}
