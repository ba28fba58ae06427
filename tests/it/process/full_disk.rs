use std::{
    fs,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    process::Command,
};

use chrono::Utc;
use tollkeeper::{
    model::Period,
    proto::tollkeeper::usage::v1::{
        BatchRecordUsageRequest, GetMonthlyUsageRequest, UsageEvent,
        record_usage_response::Outcome, usage_result, usage_service_client::UsageServiceClient,
    },
};
use tonic::{Status, transport::Channel};

use super::{
    home::Home,
    ledger_load::{Load, serve, service_key},
    own_postgres::{Postgres, processes_in},
};
use crate::{
    harness::{cluster, with_bearer},
    outage::assert_database_unavailable,
    usage::event,
};

/// What a file of the write-ahead log needs, so that no other is refused.
const MOST_BYTES: u64 = 16 << 20;

/// Lets no file of this Postgres grow beyond so much: to those who write, the disk is full.
fn limit_files(postgres: &Postgres, bytes: &str) {
    let data_dir = postgres.data_dir.canonicalize().unwrap();
    let pids = processes_in(&data_dir);
    assert!(!pids.is_empty());
    for pid in pids {
        let Ok(process) = fs::metadata(format!("/proc/{pid}")) else {
            continue;
        };
        let limit = Command::new("prlimit")
            .args(["--pid", &pid.to_string(), &format!("--fsize={bytes}:")])
            // Its own account may do so, root not everywhere.
            .uid(process.uid())
            .gid(process.gid())
            .output()
            .expect("prlimit, of util-linux");
        // One that has just ended needs no limit; new ones take that of the postmaster.
        let told = String::from_utf8_lossy(&limit.stderr);
        assert!(
            limit.status.success() || told.contains("No such process"),
            "{told}"
        );
    }
}

async fn record(
    channel: &Channel,
    key: &str,
    events: &[UsageEvent],
) -> Result<Vec<Outcome>, Status> {
    let events = events.to_vec();
    let request = with_bearer(BatchRecordUsageRequest { events }, key);
    let mut usage = UsageServiceClient::new(channel.clone());
    let results = usage
        .batch_record_usage(request)
        .await?
        .into_inner()
        .results;
    let outcomes = results.into_iter().map(|one| match one.result {
        Some(usage_result::Result::Outcome(outcome)) => outcome.try_into().unwrap(),
        other => panic!("{other:?}"),
    });
    Ok(outcomes.collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_postgres_cannot_write_callers_are_told_and_afterwards_all_goes_on() {
    let outside = Home::new();
    let postgres = Postgres::start(outside.path().join("cluster")).await;
    let url = postgres.running.database_url().to_owned();
    let home = Home::with_database_at(&url);
    let key = service_key(&home);
    let (mut service, channel) = serve(&home).await;
    let load = Load::new(key.clone(), vec![channel.clone()]).await;
    let user_id = load.users[0].clone();
    let client = cluster::connect(&url).await;
    let month = Period::containing(Utc::now());
    // Of somebody else, up to a little less than what a file may hold.
    let fill = format!(
        "INSERT INTO usage_records SELECT '{month}', gen_random_uuid(), gen_random_uuid(),
             '{month}-01', repeat('m', 100), 1, 0, 0, 0, 0, repeat('r', 100)
         FROM generate_series(1, 44000)"
    );
    client.batch_execute(&fill).await.unwrap();
    let size =
        "SELECT pg_relation_size('usage_records_' || to_char(now() AT TIME ZONE 'UTC', 'YYYY_MM'))";
    let size: i64 = client.query_one(size, &[]).await.unwrap().get(0);
    assert!(u64::try_from(size).unwrap() < MOST_BYTES, "{size}");
    limit_files(&postgres, &MOST_BYTES.to_string());

    let mut acknowledged = 0;
    let (refused, status) = loop {
        let events: Vec<_> = (0..1000).map(|_| event(&user_id)).collect();
        match record(&channel, &key, &events).await {
            Ok(outcomes) => {
                assert_eq!(outcomes, [Outcome::Recorded; 1000]);
                acknowledged += outcomes.len();
            }
            Err(status) => break (events, status),
        }
        assert!(acknowledged < 100_000, "the disk is never full");
    };
    assert_database_unavailable(&status);
    assert!(
        service.log().contains("could not extend file"),
        "the log says why"
    );
    let used = async || {
        let request = GetMonthlyUsageRequest {
            user_id: user_id.clone(),
            month: String::new(),
        };
        let mut usage = UsageServiceClient::new(channel.clone());
        let month = usage.get_monthly_usage(with_bearer(request, &key)).await;
        let requests = month.unwrap().into_inner().totals.unwrap().request_count;
        usize::try_from(requests).unwrap()
    };
    assert_eq!(used().await, acknowledged, "it can still be read");
    let again = record(&channel, &key, &refused).await;
    assert_database_unavailable(&again.unwrap_err());

    limit_files(&postgres, "unlimited");
    let outcomes = record(&channel, &key, &refused).await.unwrap();
    assert_eq!(outcomes, [Outcome::Recorded; 1000]);
    let present = format!("SELECT count(*) FROM usage_records WHERE user_id = '{user_id}'");
    let present: i64 = client.query_one(&present, &[]).await.unwrap().get(0);
    assert_eq!(present, i64::try_from(acknowledged + 1000).unwrap());
    assert_eq!(used().await, acknowledged + 1000);
    assert_eq!(
        service.child.try_wait().unwrap(),
        None,
        "the service stayed"
    );
    println!("full after {acknowledged} events were acknowledged, all of them present");
    drop(service);
    postgres.running.stop().await.unwrap();
}
