//! Schema migrations, embedded in the binary.

use std::{collections::BTreeSet, time::Duration};

use diesel::{
    QueryableByName,
    migration::MigrationSource,
    pg::Pg,
    sql_query,
    sql_types::{Bool, Text},
};
use diesel_async::{AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness as _, embed_migrations};
use tokio::{
    runtime::Handle,
    task::block_in_place,
    time::{sleep, timeout},
};

use super::{
    connecting::{IN_ENGLISH, connect},
    indexes::indexes_ensure,
};
use crate::error::{Error, Result};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");

/// Longest a connection, or a mere look, may take: a host that drops packets answers after minutes.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Held while the schema changes.
const LOCK: i64 = 0x746f_6c6c_0001;

/// How often a migration is tried that others are in the way of, and how long they are left alone in
/// between.
const LOCK_ATTEMPTS: u32 = 10;
const LOCK_RETRY: Duration = Duration::from_secs(1);

type Harness = AsyncMigrationHarness<AsyncPgConnection>;

/// A dedicated connection that holds the migration lock until it is dropped.
///
/// The lock belongs to the session: it does not work through a pooler in transaction mode.
pub struct Migrator {
    harness: Harness,
    url: String,
}

/// One migration of this binary and whether the database has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationStatus {
    pub name: String,
    pub applied: bool,
}

impl Migrator {
    /// Connects and waits for the lock: of many replicas starting together, one migrates and the
    /// others wait for it.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn connect(url: &str) -> Result<Self> {
        let mut conn = establish(url).await?;
        // Polled, not awaited in the server: a session that waits inside a statement holds a
        // snapshot, and CREATE INDEX CONCURRENTLY in the winner's migration would wait for it.
        while !try_lock(&mut conn).await? {
            sleep(Duration::from_millis(50)).await;
        }
        Ok(Self {
            harness: AsyncMigrationHarness::new(conn),
            url: url.to_owned(),
        })
    }

    /// Applies what is pending; returns its names. Then builds the indexes that are missing, beside
    /// those who read and write: with large tables that takes a while. Needs the multi-threaded runtime.
    ///
    /// # Errors
    /// `Internal` when a migration fails; those before it stay applied · those of building
    pub fn up(&mut self) -> Result<Vec<String>> {
        let mut pending = self.status()?;
        pending.retain(|migration| !migration.applied);
        self.patiently(|harness| harness.run_pending_migrations(MIGRATIONS).map(drop))?;
        // Over a connection of its own: the harness keeps its to itself.
        block_in_place(|| {
            Handle::current()
                .block_on(async { indexes_ensure(&mut establish(&self.url).await?).await })
        })?;
        Ok(pending
            .into_iter()
            .map(|migration| migration.name)
            .collect())
    }

    /// Reverts the newest applied migration; returns its name, or `None` when none is applied.
    ///
    /// # Errors
    /// `Internal` when it fails, or when this binary does not have it.
    pub fn down(&mut self) -> Result<Option<String>> {
        let applied = self.harness.applied_migrations().map_err(Error::Internal)?;
        if applied.is_empty() {
            return Ok(None);
        }
        let newest = self.status()?.into_iter().rfind(|known| known.applied);
        self.patiently(|harness| harness.revert_last_migration(MIGRATIONS).map(drop))?;
        Ok(newest.map(|migration| migration.name))
    }

    /// Does it again for a while when somebody was in the way: a migration that waits for a table in
    /// use gives up soon, since all who come later wait behind it.
    fn patiently(
        &mut self,
        work: impl Fn(&mut Harness) -> diesel::migration::Result<()>,
    ) -> Result<()> {
        let mut attempts = 0;
        while let Err(error) = work(&mut self.harness) {
            attempts += 1;
            // The second: whoever was in the way waits for the migration as well. Undone, like the first.
            let error_text = error.to_string();
            let is_locked = ["due to lock timeout", "deadlock detected"]
                .iter()
                .any(|why| error_text.contains(why));
            if !is_locked || attempts == LOCK_ATTEMPTS {
                return Err(Error::Internal(error));
            }
            block_in_place(|| std::thread::sleep(LOCK_RETRY));
        }
        Ok(())
    }

    fn status(&mut self) -> Result<Vec<MigrationStatus>> {
        let applied = self.harness.applied_migrations().map_err(Error::Internal)?;
        let applied = applied.iter().map(ToString::to_string).collect();
        all(&applied)
    }
}

/// Every migration of this binary, oldest first. Only reads, and waits for nobody who migrates.
///
/// # Errors
/// `Unavailable` · `Internal`
pub async fn migration_status(url: &str) -> Result<Vec<MigrationStatus>> {
    all(&in_time(applied_versions(url)).await?)
}

async fn applied_versions(url: &str) -> Result<BTreeSet<String>> {
    #[derive(QueryableByName)]
    struct Version {
        #[diesel(sql_type = Text)]
        version: String,
    }
    #[derive(QueryableByName)]
    struct Found {
        #[diesel(sql_type = Bool)]
        found: bool,
    }
    let conn = connect(url, IN_ENGLISH).await;
    let mut conn = conn.map_err(|error| Error::Unavailable(error.into()))?;
    // Of diesel, which makes it with the first migration.
    let table = sql_query("SELECT to_regclass('__diesel_schema_migrations') IS NOT NULL AS found");
    if !table.get_result::<Found>(&mut conn).await?.found {
        return Ok(BTreeSet::new());
    }
    let versions = sql_query("SELECT version FROM __diesel_schema_migrations");
    let versions: Vec<Version> = versions.load(&mut conn).await?;
    Ok(versions.into_iter().map(|row| row.version).collect())
}

/// Every migration of this binary, oldest first, and whether it is among the `applied` versions.
fn all(applied: &BTreeSet<String>) -> Result<Vec<MigrationStatus>> {
    let mut all: Vec<MigrationStatus> = MigrationSource::<Pg>::migrations(&MIGRATIONS)
        .map_err(Error::Internal)?
        .iter()
        .map(|migration| MigrationStatus {
            name: migration.name().to_string(),
            applied: applied.contains(&migration.name().version().to_string()),
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

/// Whatever role and database have set: building an index takes as long as it takes, while the session that has
/// the lock does nothing.
const UNHURRIED: &str = "
    SELECT set_config(name, '0', false) FROM pg_settings
    WHERE name IN ('statement_timeout', 'lock_timeout', 'idle_session_timeout')";

async fn establish(url: &str) -> Result<AsyncPgConnection> {
    let session = [IN_ENGLISH, UNHURRIED].concat();
    in_time(async {
        let conn = connect(url, &session).await;
        conn.map_err(|error| Error::Unavailable(error.into()))
    })
    .await
}

async fn in_time<T>(asked: impl Future<Output = Result<T>>) -> Result<T> {
    let answer = timeout(ANSWER_TIMEOUT, asked).await;
    answer.map_err(|_| Error::Unavailable("no answer in time".into()))?
}

async fn try_lock(conn: &mut AsyncPgConnection) -> Result<bool> {
    diesel::define_sql_function! {
        fn pg_try_advisory_lock(key: diesel::sql_types::BigInt) -> diesel::sql_types::Bool;
    }
    Ok(diesel::select(pg_try_advisory_lock(LOCK))
        .get_result(conn)
        .await?)
}
