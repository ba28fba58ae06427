//! Schema migrations, embedded in the binary.

use std::time::Duration;

use diesel::{migration::MigrationSource, pg::Pg};
use diesel_async::{AsyncConnection as _, AsyncMigrationHarness, AsyncPgConnection, RunQueryDsl};
use diesel_migrations::{EmbeddedMigrations, MigrationHarness as _, embed_migrations};
use tokio::time::{sleep, timeout};

use crate::error::{Error, Result};

const MIGRATIONS: EmbeddedMigrations = embed_migrations!("migrations");

/// Longest a connection may take to be made: a host that drops packets answers after minutes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Held while the schema changes.
const LOCK: i64 = 0x746f_6c6c_0001;

/// A dedicated connection that holds the migration lock until it is dropped.
///
/// The lock belongs to the session: it does not work through a pooler in transaction mode.
pub struct Migrator {
    harness: AsyncMigrationHarness<AsyncPgConnection>,
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
        let mut conn = timeout(CONNECT_TIMEOUT, AsyncPgConnection::establish(url))
            .await
            .map_err(|_| Error::Unavailable("no answer in time".into()))?
            .map_err(|error| Error::Unavailable(error.into()))?;
        // Polled, not awaited in the server: a session that waits inside a statement holds a
        // snapshot, and CREATE INDEX CONCURRENTLY in the winner's migration would wait for it.
        while !try_lock(&mut conn).await? {
            sleep(Duration::from_millis(50)).await;
        }
        Ok(Self {
            harness: AsyncMigrationHarness::new(conn),
        })
    }

    /// Applies what is pending; returns its names. Needs the multi-threaded runtime.
    ///
    /// # Errors
    /// `Internal` when a migration fails; those before it stay applied.
    pub fn up(&mut self) -> Result<Vec<String>> {
        let mut pending = self.status()?;
        pending.retain(|migration| !migration.applied);
        self.harness
            .run_pending_migrations(MIGRATIONS)
            .map_err(Error::Internal)?;
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
        self.harness
            .revert_last_migration(MIGRATIONS)
            .map_err(Error::Internal)?;
        Ok(newest.map(|migration| migration.name))
    }

    /// Every migration of this binary, oldest first.
    ///
    /// # Errors
    /// `Internal`
    pub fn status(&mut self) -> Result<Vec<MigrationStatus>> {
        let applied = self.harness.applied_migrations().map_err(Error::Internal)?;
        let mut all: Vec<MigrationStatus> = MigrationSource::<Pg>::migrations(&MIGRATIONS)
            .map_err(Error::Internal)?
            .iter()
            .map(|migration| MigrationStatus {
                name: migration.name().to_string(),
                applied: applied.contains(&migration.name().version().as_owned()),
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }
}

async fn try_lock(conn: &mut AsyncPgConnection) -> Result<bool> {
    diesel::define_sql_function! {
        fn pg_try_advisory_lock(key: diesel::sql_types::BigInt) -> diesel::sql_types::Bool;
    }
    Ok(diesel::select(pg_try_advisory_lock(LOCK))
        .get_result(conn)
        .await?)
}
