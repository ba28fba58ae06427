//! Indexes of large tables, built while others go on to read and write, and what Postgres has to know of
//! them.
//!
//! `CREATE INDEX CONCURRENTLY` wants to be alone: outside of a transaction, and one for each partition.
//! So no migration can do it. Whoever migrates does it afterwards, under the same lock; whatever was
//! left half done, by a crash or by a name that is there twice, is begun anew.

use std::time::Duration;

use diesel::{
    OptionalExtension as _, QueryableByName,
    sql_types::{Bool, Nullable, Text},
};
use diesel_async::{AsyncPgConnection, RunQueryDsl, SimpleAsyncConnection as _};
use tokio::time::sleep;
use tracing::{info, warn};

use crate::error::{Error, Result};

/// Name and definition behind `ON`. The older `users_email_key` and `users_username_key` serve replicas
/// from before, and can be dropped once none of those is left.
const WHOLE: [(&str, &str, &str); 4] = [
    (
        "users_email_lower_key",
        "UNIQUE",
        "users (lower(email COLLATE \"C\"))",
    ),
    (
        "users_username_lower_key",
        "UNIQUE",
        "users (lower(username COLLATE \"C\"))",
    ),
    ("users_disabled_idx", "", "users (id) WHERE NOT is_active"),
    ("users_admin_idx", "", "users (id) WHERE role = 'admin'"),
];

/// Of partitioned tables: the index of the parent, which a migration has made, what the names of its
/// parts end with, and their definition behind the name of the partition.
const PARTITIONED: [(&str, &str, &str); 5] = [
    (
        "audit_events_user_id_idx",
        "user_id_occurred_at_id_idx",
        "(user_id, occurred_at DESC, id DESC)",
    ),
    (
        "audit_events_actor_id_idx",
        "actor_id_occurred_at_id_idx",
        "(actor_id, occurred_at DESC, id DESC)",
    ),
    (
        "audit_events_action_idx",
        "action_occurred_at_id_idx",
        "(action COLLATE \"C\", occurred_at DESC, id DESC)",
    ),
    (
        "audit_events_unattributed_idx",
        "occurred_at_idx",
        "(occurred_at) WHERE user_id IS NULL \
             AND audit_user(action, target_id, details) IS NOT NULL",
    ),
    (
        "usage_records_bucket_idx",
        "bucket_idx",
        "(usage_bucket(user_id), occurred_at DESC, event_id DESC, user_id DESC) \
             WITH (deduplicate_items = off)",
    ),
];

/// What one of those is in the place of. A replica from before reads a user's events slowly without it, or
/// not in time, until it is replaced too; with it, every event would be written once more.
const REPLACED: &str = "usage_records_user_id_idx";

/// Partitions come and go meanwhile, and somebody may read one of them for long.
const ATTEMPTS: u32 = 20;
/// Of what can be left to the next start.
const FEW_ATTEMPTS: u32 = 5;
const RETRY: Duration = Duration::from_millis(500);

#[derive(QueryableByName)]
struct Partition {
    #[diesel(sql_type = Text)]
    name: String,
}

/// Builds what is missing.
///
/// # Errors
/// `Unavailable` when others were in the way for long · `Internal`, also when two names that are to be
/// unique differ in case alone; what was built stays
pub(super) async fn indexes_ensure(conn: &mut AsyncPgConnection) -> Result<()> {
    for (name, unique, definition) in WHOLE {
        build(name, unique, definition, conn).await?;
    }
    for (parent, suffix, definition) in PARTITIONED {
        for attempt in 1.. {
            match parts(parent, suffix, definition, conn).await {
                Ok(()) if state(parent, conn).await? == Some(true) => break,
                Err(error) if attempt == ATTEMPTS => return Err(error),
                Ok(()) if attempt == ATTEMPTS => {
                    let message = format!("{parent} is not whole");
                    return Err(Error::Unavailable(message.into()));
                }
                _ => sleep(RETRY).await,
            }
        }
    }
    tidy(conn).await;
    Ok(())
}

/// What is of use, and nothing depends on: who reads or tidies a partition for long keeps nobody from
/// starting.
async fn tidy(conn: &mut AsyncPgConnection) {
    for attempt in 1.. {
        let done = async {
            drop_replaced(conn).await?;
            statistics(conn).await
        };
        match done.await {
            Ok(()) => return,
            Err(error) if attempt == FEW_ATTEMPTS => {
                warn!(
                    error = error.with_causes(),
                    "an index that was replaced, or what Postgres has to know of its successor, is left to the \
                     next start"
                );
                return;
            }
            Err(_) => sleep(RETRY).await,
        }
    }
}

/// Whoever books waits meanwhile, so it waits for nobody for long.
async fn drop_replaced(conn: &mut AsyncPgConnection) -> Result<()> {
    if state(REPLACED, conn).await?.is_none() {
        return Ok(());
    }
    let drop = format!("SET LOCAL lock_timeout = '250ms'; DROP INDEX {REPLACED}");
    Ok(conn.batch_execute(&drop).await?)
}

/// Builds an index, unless it is there and whole.
async fn build(
    name: &str,
    unique: &str,
    definition: &str,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    // Of a process that was killed, Postgres may still go on with it.
    while is_being_built(name, conn).await? {
        sleep(RETRY).await;
    }
    match state(name, conn).await? {
        Some(true) => return Ok(()),
        Some(false) => {
            let drop = format!("DROP INDEX CONCURRENTLY {name}");
            conn.batch_execute(&drop).await?;
        }
        None => {}
    }
    info!(name, "building an index");
    // It waits for those who hold a snapshot, and nobody waits for it: it may take as long as it takes.
    let create = format!("CREATE {unique} INDEX CONCURRENTLY {name} ON {definition}");
    Ok(conn.batch_execute(&create).await?)
}

/// Builds the parts that an index of a partitioned table is missing, and attaches them. The last one
/// makes the index whole.
async fn parts(
    parent: &str,
    suffix: &str,
    definition: &str,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    if state(parent, conn).await? == Some(true) {
        return Ok(());
    }
    let missing: Vec<Partition> = diesel::sql_query(
        "SELECT p.relname::text AS name
         FROM pg_index AS whole
         JOIN pg_inherits AS part ON part.inhparent = whole.indrelid
         JOIN pg_class AS p ON p.oid = part.inhrelid
         WHERE whole.indexrelid = $1::regclass AND NOT EXISTS (
             SELECT FROM pg_index AS i JOIN pg_inherits AS a ON a.inhrelid = i.indexrelid
             WHERE i.indrelid = p.oid AND a.inhparent = whole.indexrelid)
         ORDER BY p.relname",
    )
    .bind::<Text, _>(parent)
    .load(conn)
    .await?;
    for Partition { name } in missing {
        let index = format!("{name}_{suffix}");
        build(&index, "", &format!("{name} {definition}"), conn).await?;
        let attach =
            format!("SET LOCAL lock_timeout = '2s'; ALTER INDEX {parent} ATTACH PARTITION {index}");
        conn.batch_execute(&attach).await?;
    }
    Ok(())
}

/// Statistics of events, see `usage_records_bucket_stats`, for partitions that have none: those from
/// before, and those that replicas from before made.
async fn statistics(conn: &mut AsyncPgConnection) -> Result<()> {
    let missing: Vec<Partition> = diesel::sql_query(
        "SELECT p.relname::text AS name
         FROM pg_inherits AS part JOIN pg_class AS p ON p.oid = part.inhrelid
         WHERE part.inhparent = 'usage_records'::regclass AND NOT EXISTS (
             SELECT FROM pg_statistic_ext WHERE stxrelid = p.oid AND stxexprs IS NOT NULL)
         ORDER BY p.relname",
    )
    .load(conn)
    .await?;
    for Partition { name } in missing {
        // One without rows is not looked at: known to be empty, its indexes would all look alike to plans that
        // are kept.
        let create = format!(
            "SET LOCAL lock_timeout = '2s';
             CREATE STATISTICS {name}_bucket_stats (dependencies)
                 ON usage_bucket(user_id), user_id FROM {name};
             DO $$ BEGIN
                 IF EXISTS (SELECT FROM {name}) THEN
                     ANALYZE {name};
                 END IF;
             END $$"
        );
        conn.batch_execute(&create).await?;
    }
    Ok(())
}

async fn is_being_built(name: &str, conn: &mut AsyncPgConnection) -> Result<bool> {
    #[derive(QueryableByName)]
    struct Building {
        #[diesel(sql_type = Bool)]
        is_building: bool,
    }
    let building: Building = diesel::sql_query(
        "SELECT EXISTS (SELECT FROM pg_stat_progress_create_index
             WHERE datname = current_database() AND index_relid = to_regclass($1)) AS is_building",
    )
    .bind::<Text, _>(name)
    .get_result(conn)
    .await?;
    Ok(building.is_building)
}

/// Whether an index is whole; `None`: there is none of this name.
async fn state(name: &str, conn: &mut AsyncPgConnection) -> Result<Option<bool>> {
    #[derive(QueryableByName)]
    struct State {
        #[diesel(sql_type = Nullable<Bool>)]
        is_valid: Option<bool>,
    }
    let state: Option<State> = diesel::sql_query(
        "SELECT indisvalid AS is_valid FROM pg_index WHERE indexrelid = to_regclass($1)",
    )
    .bind::<Text, _>(name)
    .get_result(conn)
    .await
    .optional()?;
    Ok(state.and_then(|state| state.is_valid))
}
