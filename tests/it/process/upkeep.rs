use chrono::Utc;
use serde_json::Value;
use tollkeeper::model::Period;

use super::{Service, home::Home};
use crate::harness::cluster;

/// The line of the log with this message.
fn told(service: &Service, message: &str) -> Option<Value> {
    let log = service.log();
    let mut lines = log.lines().filter(|line| line.contains(message));
    lines.next().map(|line| serde_json::from_str(line).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_tells_what_retention_dropped_and_of_rows_without_a_partition() {
    let home = Home::with_database();
    let mut first = home.start(home.production(&["serve"]));
    first.serving().await;
    let client = cluster::connect(home.database_url()).await;
    let current = Period::containing(Utc::now());
    let (old, far) = (current.minus_months(30), current.plus_months(30));
    let name = format!("usage_records_{}", old.to_string().replace('-', "_"));
    let insert = |month: Period, rows: u32| {
        format!(
            "INSERT INTO usage_records SELECT '{month}', gen_random_uuid(), gen_random_uuid(),
                 '{month}-01', 'gpt-x', 1, 0, 0, 0, 0 FROM generate_series(1, {rows})"
        )
    };
    for statement in [
        format!("CREATE TABLE {name} PARTITION OF usage_records FOR VALUES IN ('{old}')"),
        insert(old, 500),
        format!("ANALYZE {name}"),
        insert(far, 3),
    ] {
        client.batch_execute(&statement).await.unwrap();
    }

    let keep = ["serve", "--set", "usage.retention_months=3"];
    let mut second = home.start(home.production(&keep));
    let dropped = "dropped usage records past their retention";
    let stray = "rows in a default partition";
    second.wait_until("both are told", |service| {
        told(service, dropped).is_some() && told(service, stray).is_some()
    });
    let line = told(&second, dropped).unwrap();
    assert_eq!(line["level"], "INFO");
    assert_eq!(line["month"], old.to_string());
    assert_eq!(line["rows_about"], 500);
    let line = told(&second, stray).unwrap();
    assert_eq!(line["level"], "ERROR");
    assert_eq!(line["stray"], 3);
    let left = client.query_one("SELECT count(*) FROM usage_records", &[]);
    assert_eq!(left.await.unwrap().get::<_, i64>(0), 3);
    assert!(told(&first, dropped).is_none());
}

#[test]
fn a_retention_shorter_than_events_may_be_late_is_refused() {
    let home = Home::with_database();
    let short = ["serve", "--set", "usage.retention_months=2"];
    let refused = home.finish(home.production(&short), "");
    assert_ne!(refused.code, Some(0));
    let told = &refused.stderr;
    assert!(told.contains("usage.retention_months"), "{told}");
    assert!(told.contains("must be 0 (keep all) or 3"), "{told}");
}
