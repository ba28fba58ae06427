use std::fs;

use nix::sys::signal::Signal;
use tollkeeper::proto::tollkeeper::usage::v1::{
    ListTiersRequest, Tier, usage_service_client::UsageServiceClient,
};
use tonic::transport::Channel;

use super::{Service, home::Home};
use crate::harness::{cluster, with_bearer};

const TIERS: &str = r#"default = "small"

[[tier]]
name = "small"
monthly_tokens = 1000
thresholds = [50, 100]

[tier.models]
"gpt-5" = 12345

[[tier]]
name = "large"
requests_per_minute = 600
on_outage = "open"
open_tokens = 70_000
"#;

#[test]
fn a_tiers_file_is_shown_as_a_table() {
    let home = Home::new();
    let path = home.path().join("my.toml");
    fs::write(&path, TIERS).unwrap();
    let shown = home.run(&["tiers", "validate", "my.toml"]);
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    let expected = "\
tier             tokens/month  requests/min  tokens/request  on outage     notices at
small (default)         1,000     unlimited       unlimited  closed        50% 100%
  gpt-5                12,345
large               unlimited           600       unlimited  open: 70,000  80% 100%
";
    assert_eq!(shown.stdout, expected);
    // The file of the settings, and the built-in tiers.
    let setting = format!("usage.tiers_file={}", path.display());
    let shown = home.run(&["tiers", "validate", "--set", &setting]);
    assert_eq!(shown.stdout, expected, "{}", shown.stderr);
    let shown = home.run(&["tiers", "validate"]);
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    assert!(shown.stdout.contains("free (default)"), "{}", shown.stdout);
}

#[test]
fn a_wrong_tiers_file_is_refused_with_its_line() {
    let home = Home::new();
    let wrong = TIERS.replace("[50, 100]", "[100, 50]");
    fs::write(home.path().join("my.toml"), wrong).unwrap();
    let refused = home.run(&["tiers", "validate", "my.toml"]);
    assert_eq!(refused.code, Some(1), "{}", refused.stdout);
    assert_eq!(
        refused.stderr,
        "tollkeeper: my.toml, line 6: thresholds must ascend, each there once\n"
    );
    let missing = home.run(&["tiers", "validate", "other.toml"]);
    assert_eq!(missing.code, Some(1));
    assert!(missing.stderr.contains("other.toml"), "{}", missing.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reads_the_tiers_again_and_keeps_the_old_ones_when_they_are_wrong() {
    let home = Home::with_database();
    let path = home.path().join("my.toml");
    fs::write(&path, TIERS).unwrap();
    let mut command = home.production(&["serve"]);
    command.env("TOLLKEEPER_USAGE_TIERS_FILE", &path);
    let mut service = home.start(command);
    let channel = service.serving().await;
    let made = home.finish(
        home.production(&[
            "services",
            "create",
            "--name",
            "reader",
            "--scope",
            "usage.read",
        ]),
        "",
    );
    let key = made.stdout.split_whitespace().last().unwrap().to_owned();
    let before = tiers(&channel, &key).await;
    assert_eq!(names(&before), ["small", "large"]);

    let hang_up = |service: &mut Service, text: &str, says: &str| {
        fs::write(&path, text).unwrap();
        let seen = service.log().matches(says).count();
        service.signal(Signal::SIGHUP);
        service.wait_until("it says so", |service| {
            service.log().matches(says).count() > seen
        });
    };
    let wrong = TIERS.replace("open_tokens = 70_000", "open_tokens = 0");
    hang_up(&mut service, &wrong, "the old tiers stay");
    assert!(service.log().contains("line 15"), "{}", service.log());
    assert_eq!(tiers(&channel, &key).await, before);

    // Nobody is in the tier that goes, or somebody is.
    let renamed = TIERS.replace("\"large\"", "\"huge\"");
    hang_up(&mut service, &renamed, "read the tiers again");
    assert_eq!(names(&tiers(&channel, &key).await), ["small", "huge"]);
    let client = cluster::connect(home.database_url()).await;
    let user = "INSERT INTO users (id, email, username, tier)
        VALUES (gen_random_uuid(), 'a@example.com', 'ada', 'huge')";
    client.batch_execute(user).await.unwrap();
    hang_up(&mut service, TIERS, "the old tiers stay");
    assert!(
        service.log().contains("the file does not have: huge"),
        "{}",
        service.log()
    );
    assert_eq!(names(&tiers(&channel, &key).await), ["small", "huge"]);

    // What was used under a larger limit stays paid for, and no more than that.
    let used = "WITH one AS (
            INSERT INTO users (id, email, username, tier)
            VALUES (gen_random_uuid(), 'b@example.com', 'bob', 'small') RETURNING id
        ), credits AS (
            INSERT INTO credit_grants
                (id, user_id, tokens, priority, reason, request_id, actor_kind)
            SELECT gen_random_uuid(), id, 5, 0, '', gen_random_uuid(), 'operator' FROM one
        ), base AS (
            INSERT INTO quota_balances (user_id, month, model, base_limit)
            SELECT id, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), '', 1000 FROM one
        )
        INSERT INTO monthly_model_usage
        SELECT id, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), 'm', 700, 0, 0, 0, 0, 1 FROM one";
    client.batch_execute(used).await.unwrap();
    let smaller = renamed.replace("monthly_tokens = 1000", "monthly_tokens = 100");
    hang_up(&mut service, &smaller, "read the tiers again");
    let base = "SELECT base_limit FROM quota_balances";
    let base: i64 = client.query_one(base, &[]).await.unwrap().get(0);
    assert_eq!(base, 700);
    assert_eq!(service.stop(Signal::SIGTERM).code(), Some(0));

    // A start does not wait for the operator, but says it.
    fs::write(&path, TIERS).unwrap();
    let mut command = home.production(&["serve"]);
    command.env("TOLLKEEPER_USAGE_TIERS_FILE", &path);
    let mut service = home.start(command);
    service.serving().await;
    let says = "users are in tiers that are not configured";
    assert!(service.log().contains(says), "{}", service.log());
    assert!(service.log().contains("huge"), "{}", service.log());
}

async fn tiers(channel: &Channel, key: &str) -> Vec<Tier> {
    let mut usage = UsageServiceClient::new(channel.clone());
    let listed = usage
        .list_tiers(with_bearer(ListTiersRequest {}, key))
        .await;
    listed.expect("answered").into_inner().tiers
}

fn names(tiers: &[Tier]) -> Vec<&str> {
    tiers.iter().map(|tier| tier.name.as_str()).collect()
}
