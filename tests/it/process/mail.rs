//! Mails of the program as a process of its own: what a kill leaves of them, and what shows from outside.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::time::sleep;
use tollkeeper::proto::tollkeeper::auth::v1::{
    RegisterRequest, VerifyEmailRequest, auth_service_client::AuthServiceClient,
};
use tonic::{Status, transport::Channel};

use super::home::Home;
use crate::harness::{Letter, PASSWORD, Protection, SmtpServer, cluster, eventually};

async fn register(channel: &Channel, name: &str) -> Result<(), Status> {
    let request = RegisterRequest {
        email: format!("{name}@example.com"),
        username: name.to_owned(),
        full_name: String::new(),
        password: PASSWORD.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    auth.register(request).await.map(drop)
}

/// The production server, which mails to `smtp` in the clear.
fn mailing(home: &Home, smtp: &SmtpServer, args: &[&str]) -> Command {
    let mut command = home.production(args);
    command
        .env("TOLLKEEPER_MAIL_SERVER", format!("127.0.0.1:{}", smtp.port))
        .env("TOLLKEEPER_MAIL_TLS", "none")
        .env("TOLLKEEPER_MAIL_FROM", "no-reply@example.com")
        .env("TOLLKEEPER_MAIL_LINK_BASE", "https://app.example.com")
        .env("TOLLKEEPER_THROTTLE_ADDRESS_FAILURES", "0");
    command
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dozen_kills_lose_no_mail() {
    const KILLS: usize = 12;
    /// Sent at a time: no more go twice for one kill.
    const AT_ONCE: usize = 8;
    let smtp = SmtpServer::start(Protection::None);
    let home = Home::with_database();
    let acknowledged: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let number = Arc::new(AtomicUsize::new(0));
    for round in 0..KILLS {
        let mut service = home.start(mailing(&home, &smtp, &["serve"]));
        let channel = service.serving().await;
        let clients = (0..4).map(|_| {
            let (channel, acknowledged, number) =
                (channel.clone(), acknowledged.clone(), number.clone());
            tokio::spawn(async move {
                loop {
                    let name = format!("person{}", number.fetch_add(1, Ordering::Relaxed));
                    if register(&channel, &name).await.is_err() {
                        return;
                    }
                    acknowledged.lock().unwrap().insert(name);
                }
            })
        });
        let clients: Vec<_> = clients.collect();
        let before = smtp.taken().len();
        eventually("mails are sent", async || smtp.taken().len() > before).await;
        // At odd moments.
        sleep(Duration::from_millis(
            u64::try_from(37 * round % 200).unwrap(),
        ))
        .await;
        service.stop(Signal::SIGKILL);
        for client in clients {
            client.await.unwrap();
        }
    }
    // What the killed ones had claimed is anybody's again, sooner than it would be.
    let client = cluster::connect(home.database_url()).await;
    let free = "UPDATE outbox SET available_at = now() WHERE delivered_at IS NULL";
    client.batch_execute(free).await.unwrap();
    let mut service = home.start(mailing(&home, &smtp, &["serve"]));
    let channel = service.serving().await;
    let pending = "SELECT count(*) FROM outbox WHERE delivered_at IS NULL";
    eventually("all are sent", async || {
        client
            .query_one(pending, &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
            == 0
    })
    .await;

    let mut by_name: BTreeMap<String, Vec<Letter>> = BTreeMap::new();
    for letter in smtp.letters() {
        let name = letter.to.split('@').next().unwrap().to_owned();
        by_name.entry(name).or_default().push(letter);
    }
    let acknowledged = acknowledged.lock().unwrap().clone();
    let lost: Vec<_> = acknowledged
        .iter()
        .filter(|name| !by_name.contains_key(*name))
        .collect();
    assert!(lost.is_empty(), "{lost:?}");
    let twice: Vec<_> = by_name
        .values()
        .filter(|letters| letters.len() > 1)
        .collect();
    assert!(twice.len() <= KILLS * AT_ONCE, "{}", twice.len());
    for letters in &twice {
        // Whoever receives it can tell.
        assert!(
            letters
                .iter()
                .all(|one| message_id(one) == message_id(&letters[0]))
        );
    }
    println!("{} mails, {} of them twice", by_name.len(), twice.len());
    let mut auth = AuthServiceClient::new(channel);
    for letters in twice.into_iter().chain(by_name.values().take(3)) {
        let token = letters[0].token();
        // Some are both.
        let _ = auth.verify_email(VerifyEmailRequest { token }).await;
    }
    let verified = "SELECT count(*) FROM users WHERE email_verified_at IS NOT NULL";
    let verified: i64 = client.query_one(verified, &[]).await.unwrap().get(0);
    assert!(verified >= 3);
}

fn message_id(letter: &Letter) -> &str {
    let lines = letter.text.lines();
    let mut found = lines.filter_map(|line| line.strip_prefix("Message-ID: "));
    found.next().expect("each has one")
}

#[tokio::test(flavor = "multi_thread")]
async fn in_dev_mode_mails_are_files_that_the_log_names() {
    let home = Home::with_database();
    let mut service = home.start(home.command(&["serve", "--set", "dev=true"]));
    let channel = service.serving().await;
    register(&channel, "ada").await.unwrap();
    service.wait_until("it is written", |service| service.log().contains(".eml"));
    let log = service.log();
    let folder = home.data_dir().join("mail");
    let file = std::fs::read_dir(&folder).unwrap().next().unwrap().unwrap();
    let path = file.path();
    assert!(log.contains(path.to_str().unwrap()), "{log}");
    let letter = Letter::read(&std::fs::read_to_string(&path).unwrap());
    assert_eq!(letter.to, "ada@example.com");
    assert!(
        !log.contains("ada@example.com") && !log.contains(&letter.token()),
        "{log}"
    );
    use std::os::unix::fs::PermissionsExt as _;
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "for nobody else to read");
}

#[tokio::test(flavor = "multi_thread")]
async fn neither_the_log_nor_the_settings_show_secrets_or_addresses() {
    const SECRET: &str = "the-password-of-the-mail-server";
    let smtp = SmtpServer::start(Protection::None);
    let home = Home::with_database();
    let command = |args: &[&str]| {
        let mut command = mailing(&home, &smtp, args);
        command
            .env("TOLLKEEPER_MAIL_USER", "somebody")
            .env("TOLLKEEPER_MAIL_PASSWORD", SECRET);
        command
    };
    let config = home.finish(command(&["config"]), "");
    assert!(config.stdout.contains("mail.password"), "{}", config.stdout);
    // The server knows no names and passwords, so nothing is sent.
    let mut service = home.start(command(&["serve", "--set", "log.filter=trace"]));
    let channel = service.serving().await;
    register(&channel, "refused-ada").await.unwrap();
    service.wait_until("it is told", |service| {
        service.log().contains("mails cannot be sent")
    });
    service.stop(Signal::SIGTERM);
    let mut other = home.start(mailing(
        &home,
        &smtp,
        &["serve", "--set", "log.filter=trace"],
    ));
    other.serving().await;
    let client = cluster::connect(home.database_url()).await;
    let free = "UPDATE outbox SET available_at = now() WHERE delivered_at IS NULL";
    client.batch_execute(free).await.unwrap();
    other.wait_until("it is given up", |service| {
        service.log().contains("a mail is given up")
    });
    for text in [&config.stdout, &service.log(), &other.log()] {
        assert!(!text.contains(SECRET), "{text}");
        assert!(!text.contains("refused-ada@"), "{text}");
        assert!(!text.contains("tko_"), "{text}");
    }
}

#[test]
fn mails_that_could_not_be_sent_or_not_safely_are_refused_by_name() {
    let home = Home::with_database();
    let good = [
        ("SERVER", "smtp.example.com"),
        ("FROM", "no-reply@example.com"),
        ("LINK_BASE", "https://app.example.com"),
    ];
    for (name, value, named) in [
        ("FROM", "", "mail.from"),
        ("LINK_BASE", "http://app.example.com", "mail.link_base"),
        ("TLS", "none", "mail.tls"),
        ("TLS", "maybe", "mail.tls"),
        ("DIRECTORY", "/tmp", "mail.directory"),
        ("USER", "me", "mail.password"),
        ("CA_FILE", "/nowhere.pem", "mail.ca_file"),
        ("TEMPLATES", "/nowhere", "mail.templates"),
    ] {
        let mut command = home.production(&["serve"]);
        for (name, value) in good.into_iter().chain([(name, value)]) {
            command.env(format!("TOLLKEEPER_MAIL_{name}"), value);
        }
        let refused = home.finish(command, "");
        assert_ne!(refused.code, Some(0), "{named}");
        assert!(refused.stderr.contains(named), "{}", refused.stderr);
    }
    let mut command = home.production(&["serve"]);
    command.env("TOLLKEEPER_AUTH_REQUIRE_VERIFIED_EMAIL", "true");
    let refused = home.finish(command, "");
    let named = "auth.require_verified_email";
    assert!(refused.stderr.contains(named), "{}", refused.stderr);
}
