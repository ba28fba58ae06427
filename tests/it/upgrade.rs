//! Migrations of a database that others go on to use.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use tollkeeper::store::Migrator;

use crate::harness::cluster;

async fn count(client: &Client, statement: &str) -> i64 {
    client.query_one(statement, &[]).await.unwrap().get(0)
}

/// Indexes that are of no use.
const BROKEN: &str = "SELECT count(*) FROM pg_index WHERE NOT indisvalid";

/// A database as it was before people were administered, with a trail of some months.
async fn older_database() -> (String, Migrator) {
    let url = cluster::empty_database().await;
    let mut migrator = Migrator::connect(&url).await.unwrap();
    migrator.up().unwrap();
    while migrator.down().unwrap().unwrap() != "2026-11-21-000016_people" {}
    cluster::connect(&url)
        .await
        .batch_execute(
            "CREATE TABLE audit_events_2026_10 PARTITION OF audit_events
                 FOR VALUES FROM ('2026-10-01 00:00:00+00') TO ('2026-11-01 00:00:00+00');
             CREATE TABLE audit_events_2026_11 PARTITION OF audit_events
                 FOR VALUES FROM ('2026-11-01 00:00:00+00') TO ('2026-12-01 00:00:00+00');
             INSERT INTO audit_events (id, occurred_at, action, actor_kind, target_id, request_id)
             SELECT gen_random_uuid(), '2026-09-01'::timestamptz + n * interval '15 minutes',
                 'user.created', 'operator', gen_random_uuid(), ''
             FROM generate_series(1, 5000) n;",
        )
        .await
        .unwrap();
    (url, migrator)
}

/// A database as migrations leave it before the indexes of people's names are built.
async fn unindexed_database() -> (String, Migrator) {
    let url = cluster::empty_database().await;
    let mut migrator = Migrator::connect(&url).await.unwrap();
    migrator.up().unwrap();
    cluster::connect(&url)
        .await
        .batch_execute("DROP INDEX users_email_lower_key, users_username_lower_key")
        .await
        .unwrap();
    (url, migrator)
}

/// The index of events that buckets took the place of.
const REPLACED: &str = "SELECT count(*) FROM pg_class WHERE relname = 'usage_records_user_id_idx'";

/// A database as it was before events were listed by buckets of users.
async fn database_before_buckets() -> (String, Migrator) {
    let url = cluster::empty_database().await;
    let mut migrator = Migrator::connect(&url).await.unwrap();
    migrator.up().unwrap();
    while migrator.down().unwrap().unwrap() != "2026-11-22-000021_usage_buckets" {}
    (url, migrator)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_gives_way_to_whoever_uses_the_table_and_comes_again() {
    let (url, mut migrator) = older_database().await;
    let (user, other) = (cluster::connect(&url).await, cluster::connect(&url).await);
    let act = "INSERT INTO audit_events (id, action, actor_kind, target_id, request_id)
         VALUES (gen_random_uuid(), 'user.created', 'operator', gen_random_uuid(), '')";
    user.batch_execute(&format!("BEGIN; {act}")).await.unwrap();
    let migrating = tokio::spawn(async move { migrator.up() });
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted
         AND mode = 'AccessExclusiveLock' AND relation = 'audit_events'::regclass";
    while count(&other, waiting).await == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    // Whoever writes now stands behind the migration, and not for long.
    let written = timeout(Duration::from_secs(8), other.batch_execute(act)).await;
    written.expect("it gives way").unwrap();
    user.batch_execute("COMMIT").await.unwrap();
    let applied = migrating.await.unwrap().unwrap();
    assert!(!applied.is_empty());
    assert_eq!(count(&other, BROKEN).await, 0);
    let parts = "SELECT count(*) FROM pg_index JOIN pg_inherits ON inhrelid = indexrelid
         JOIN pg_class AS whole ON whole.oid = inhparent
         WHERE whole.relname IN ('audit_events_user_id_idx', 'audit_events_actor_id_idx',
             'audit_events_action_idx', 'audit_events_unattributed_idx')";
    assert_eq!(count(&other, parts).await, 4 * 3);
    // A partition that is made from now on has them at once.
    let partition = "CREATE TABLE audit_events_2026_12 PARTITION OF audit_events
         FOR VALUES FROM ('2026-12-01 00:00:00+00') TO ('2027-01-01 00:00:00+00')";
    other.batch_execute(partition).await.unwrap();
    assert_eq!(count(&other, parts).await, 4 * 4);
    assert_eq!(count(&other, BROKEN).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_index_of_events_is_replaced_beside_those_who_book() {
    let (url, mut migrator) = database_before_buckets().await;
    let (writer, other) = (cluster::connect(&url).await, cluster::connect(&url).await);
    assert_eq!(count(&other, REPLACED).await, 1);
    let book = "INSERT INTO usage_records
         SELECT '2026-11', gen_random_uuid(), gen_random_uuid(), '2026-11-01', 'm', 1, 0, 0, 0, 0
         FROM generate_series(1, 1000)";
    let partition = "CREATE TABLE usage_records_2026_11 PARTITION OF usage_records
         FOR VALUES IN ('2026-11')";
    writer.batch_execute(partition).await.unwrap();
    // The build waits for whoever books when it begins.
    let begin = format!("BEGIN; {book}");
    writer.batch_execute(&begin).await.unwrap();
    let migrating = tokio::spawn(async move { migrator.up() });
    sleep(Duration::from_millis(500)).await;
    assert!(!migrating.is_finished(), "it waits");
    assert_eq!(
        count(&other, REPLACED).await,
        1,
        "whoever reads needs it still"
    );
    let written = timeout(Duration::from_secs(8), other.batch_execute(book)).await;
    written.expect("nobody waits behind it for long").unwrap();
    writer.batch_execute("COMMIT").await.unwrap();
    migrating.await.unwrap().unwrap();
    assert_eq!(count(&other, REPLACED).await, 0);
    assert_eq!(count(&other, BROKEN).await, 0);
    let read = "SELECT count(*) FROM usage_records AS one JOIN usage_records AS same
         ON usage_bucket(same.user_id) = usage_bucket(one.user_id) AND same.user_id = one.user_id";
    assert_eq!(count(&other, read).await, 2_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_replaced_goes_at_the_next_start_if_somebody_reads_for_long() {
    let (url, mut migrator) = database_before_buckets().await;
    let (reader, writer) = (cluster::connect(&url).await, cluster::connect(&url).await);
    // As a dump does.
    let read = "BEGIN; LOCK TABLE usage_records IN ACCESS SHARE MODE";
    reader.batch_execute(read).await.unwrap();
    let migrating = tokio::spawn(async move {
        let applied = migrator.up();
        (migrator, applied)
    });
    while !migrating.is_finished() {
        let book = "INSERT INTO usage_records VALUES
             ('2026-11', gen_random_uuid(), gen_random_uuid(), '2026-11-01', 'm', 1, 0, 0, 0, 0)";
        let booked = timeout(Duration::from_secs(2), writer.batch_execute(book)).await;
        booked.expect("nobody waits for long").unwrap();
        sleep(Duration::from_millis(5)).await;
    }
    let (mut migrator, applied) = migrating.await.unwrap();
    assert_eq!(applied.unwrap(), ["2026-11-22-000021_usage_buckets"]);
    assert_eq!(count(&writer, REPLACED).await, 1);
    assert_eq!(count(&writer, BROKEN).await, 0);
    reader.batch_execute("COMMIT").await.unwrap();
    migrator.up().unwrap();
    assert_eq!(count(&writer, REPLACED).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn indexes_are_built_beside_those_who_write() {
    let (url, mut migrator) = unindexed_database().await;
    let (writer, other) = (cluster::connect(&url).await, cluster::connect(&url).await);
    let user = |name: &str| {
        format!(
            "INSERT INTO users (id, email, username, tier)
             VALUES (gen_random_uuid(), '{name}@example.com', '{name}', 'free')"
        )
    };
    // A build waits for those who write to end.
    let begin = format!("BEGIN; {}", user("ada"));
    writer.batch_execute(&begin).await.unwrap();
    let migrating = tokio::spawn(async move { migrator.up() });
    let building = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
         AND query LIKE 'CREATE%CONCURRENTLY%' AND wait_event_type = 'Lock'";
    while count(&other, building).await == 0 {
        assert!(!migrating.is_finished(), "it waits");
        sleep(Duration::from_millis(5)).await;
    }
    let bea = user("bea");
    let written = timeout(Duration::from_secs(1), other.batch_execute(&bea));
    written.await.expect("nobody waits behind it").unwrap();
    writer.batch_execute("COMMIT").await.unwrap();
    migrating.await.unwrap().unwrap();
    assert_eq!(count(&other, BROKEN).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_was_left_half_built_is_built_anew() {
    let (url, mut migrator) = older_database().await;
    let client = cluster::connect(&url).await;
    // In some locale these were two names.
    client
        .batch_execute(
            "DROP INDEX users_email_key;
             INSERT INTO users (id, email, username, tier) VALUES
                 (gen_random_uuid(), 'info@example.com', 'one', 'free'),
                 (gen_random_uuid(), 'INFO@example.com', 'two', 'free')",
        )
        .await
        .unwrap();
    migrator.up().unwrap_err();
    assert_eq!(count(&client, BROKEN).await, 1 + 5, "and those not begun");
    let index = "SELECT count(*) FROM pg_class WHERE relname = 'users_email_lower_key'";
    assert_eq!(count(&client, index).await, 1);
    client
        .batch_execute("DELETE FROM users WHERE username = 'two'")
        .await
        .unwrap();
    assert_eq!(migrator.up().unwrap(), Vec::<String>::new());
    assert_eq!(count(&client, BROKEN).await, 0);
    // And back, whatever there is: a part that was built and not attached.
    for statement in [
        "DROP INDEX audit_events_unattributed_idx",
        "CREATE INDEX audit_events_unattributed_idx ON ONLY audit_events (occurred_at)
             WHERE user_id IS NULL AND audit_user(action, target_id, details) IS NOT NULL",
        "CREATE INDEX audit_events_default_occurred_at_idx ON audit_events_default (occurred_at)
             WHERE user_id IS NULL AND audit_user(action, target_id, details) IS NOT NULL",
    ] {
        client.batch_execute(statement).await.unwrap();
    }
    client
        .batch_execute("CREATE UNIQUE INDEX users_email_key ON users (lower(email))")
        .await
        .unwrap();
    while migrator.down().unwrap().is_some() {}
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_a_killed_process_left_to_postgres_is_waited_for() {
    let (url, mut migrator) = unindexed_database().await;
    let (writer, builder, other) = (
        cluster::connect(&url).await,
        cluster::connect(&url).await,
        cluster::connect(&url).await,
    );
    let user = "INSERT INTO users (id, email, username, tier)
         VALUES (gen_random_uuid(), 'ada@example.com', 'ada', 'free')";
    writer
        .batch_execute(&format!("BEGIN; {user}"))
        .await
        .unwrap();
    let building = tokio::spawn(async move {
        let build = "CREATE UNIQUE INDEX CONCURRENTLY users_email_lower_key
             ON users (lower(email COLLATE \"C\"))";
        builder.batch_execute(build).await
    });
    let in_progress = "SELECT count(*) FROM pg_stat_progress_create_index
         WHERE datname = current_database()";
    while count(&other, in_progress).await == 0 {
        sleep(Duration::from_millis(5)).await;
    }
    let migrating = tokio::spawn(async move { migrator.up() });
    let asking = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
         AND query LIKE '%is_building%' AND pid <> pg_backend_pid()";
    while count(&other, asking).await == 0 {
        assert!(!migrating.is_finished(), "it waits");
        sleep(Duration::from_millis(5)).await;
    }
    let index = "SELECT 'users_email_lower_key'::regclass::oid::bigint";
    let before = count(&other, index).await;
    writer.batch_execute("COMMIT").await.unwrap();
    building.await.unwrap().unwrap();
    migrating.await.unwrap().unwrap();
    assert_eq!(count(&other, index).await, before, "it is the same");
    assert_eq!(count(&other, BROKEN).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_meets_a_deadlock_comes_again() {
    let (url, mut migrator) = older_database().await;
    let (user, other) = (cluster::connect(&url).await, cluster::connect(&url).await);
    // As a refresh: the session first, its user then. The migration takes them the other way around, and is
    // the one that finds out.
    user.batch_execute("SET deadlock_timeout = '60s'; BEGIN; SELECT FROM sessions FOR UPDATE")
        .await
        .unwrap();
    let migrating = tokio::spawn(async move { migrator.up() });
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted
         AND mode = 'AccessExclusiveLock' AND relation = 'sessions'::regclass";
    while count(&other, waiting).await == 0 {
        assert!(!migrating.is_finished(), "it waits");
        sleep(Duration::from_millis(5)).await;
    }
    user.batch_execute("SELECT FROM users; COMMIT")
        .await
        .unwrap();
    let applied = migrating.await.unwrap().unwrap();
    assert!(applied.contains(&"2026-11-22-000019_mfa".to_owned()));
}
