//! Postgres: the only room with SQL. One file per aggregate; rows never leave it.
//!
//! Every public operation writes by one statement or one transaction, so a dropped future leaves all of it
//! or nothing: the pool discards a connection whose transaction was cut short.

mod administrators;
mod api_keys;
mod audit;
mod changes;
mod conn;
mod connecting;
mod erasures;
mod errors;
mod indexes;
mod leases;
mod ledger;
mod listening;
mod logins;
mod mails;
mod mfa;
mod migrations;
mod one_time_tokens;
mod outbox;
mod partitions;
mod prepared;
mod quota;
mod quota_facts;
mod recalls;
mod replicas;
#[rustfmt::skip]
mod schema;
mod service_accounts;
mod sessions;
mod settlements;
mod throttle;
mod usage;
mod usage_cells;
mod usage_export;
mod usage_report;
mod user_changes;
mod user_import;
mod users;

use std::{sync::Arc, time::Duration};

use deadpool::{
    Runtime, Status,
    managed::{QueueMode, WeakPool},
};
use diesel::ConnectionError;
use diesel_async::{
    AsyncPgConnection, SimpleAsyncConnection as _,
    pooled_connection::{
        AsyncDieselConnectionManager, ManagerConfig, RecyclingMethod, deadpool::Pool,
    },
};
use tokio::{
    runtime::Handle,
    sync::{Mutex, Semaphore, SemaphorePermit},
    task::JoinSet,
    time::{error::Elapsed, sleep, timeout},
};

use conn::Conn;
use connecting::{LEASE_SESSION, LEDGER_SESSION, connect, session};
use ledger::Replays;

pub use api_keys::NewApiKey;
pub use changes::{ChangeListener, Notification};
pub use leases::Operated;
pub use ledger::UsageInsert;
pub use logins::{LoginStanding, LoginSubjects, NewSession};
pub use mfa::{MfaReset, NewTotp};
pub use migrations::{MigrationStatus, Migrator, migration_status};
pub use one_time_tokens::{Mailing, NewToken};
pub use outbox::OutboxEvent;
pub use partitions::Partitioned;
pub use recalls::RecallListener;
pub use replicas::Heard;
pub use service_accounts::{NewServiceAccount, ServiceStanding};
pub use sessions::RefreshOutcome;
pub use users::{Credentials, NewUser};

use crate::{
    config::DatabaseSettings,
    error::{Error, Result},
};

type Manager = AsyncDieselConnectionManager<AsyncPgConnection>;

/// The database, through a bounded pool of connections. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    pool: Pool<AsyncPgConnection>,
    /// For connections outside the pool.
    url: Arc<str>,
    connect_timeout: Duration,
    /// Where connections live.
    runtime: Handle,
    /// Of its own, so that a busy pool is not taken for a dead database.
    ping: Arc<Mutex<Option<AsyncPgConnection>>>,
    statement_timeout: Duration,
    /// Anybody can make a key up that has to be looked for: that takes a part of the pool only.
    key_lookups: Arc<Semaphore>,
    /// Reads of many rows take a part of the pool only, so that they do not hold up the calls that
    /// read one.
    bulk_reads: Arc<Semaphore>,
    /// Shared by all pools of a process.
    replays: Arc<Replays>,
}

impl Store {
    /// Sets the pool up; connects on first use.
    ///
    /// Connections live on the runtime that this is called in, whichever runtime uses them: a busy
    /// one that serves does not delay the others' queries.
    ///
    /// # Errors
    /// `Internal` when the URL cannot be read.
    pub fn new(settings: &DatabaseSettings) -> Result<Self> {
        let url = settings.url.expose();
        Ok(Self {
            pool: pool(
                settings.pool_size,
                // A call that was cut short may have left a statement behind.
                RecyclingMethod::Verified,
                url,
                settings.acquire_timeout,
                session(settings.statement_timeout),
            )?,
            url: url.into(),
            connect_timeout: settings.acquire_timeout,
            runtime: Handle::current(),
            ping: Arc::default(),
            statement_timeout: settings.statement_timeout,
            key_lookups: Arc::new(Semaphore::new(settings.pool_size.div_ceil(4))),
            bulk_reads: Arc::new(Semaphore::new(settings.pool_size.div_ceil(4))),
            replays: Arc::default(),
        })
    }

    /// The same database through connections of their own for the ledger, which live on the current
    /// runtime. A connection is taken as it is, without asking Postgres whether it is there.
    ///
    /// # Errors
    /// `Internal` when the URL cannot be read.
    pub fn with_ledger_connections(&self, connections: usize) -> Result<Self> {
        self.with_connections(connections, LEDGER_SESSION.to_owned())
    }

    /// As [`Store::with_ledger_connections`], for leases.
    ///
    /// # Errors
    /// `Internal` when the URL cannot be read.
    pub fn with_lease_connections(&self, connections: usize) -> Result<Self> {
        self.with_connections(connections, format!("{LEASE_SESSION}{LEDGER_SESSION}"))
    }

    fn with_connections(&self, connections: usize, further: String) -> Result<Self> {
        let pool = pool(
            connections,
            RecyclingMethod::Fast,
            &self.url,
            self.connect_timeout,
            session(self.statement_timeout) + &further,
        )?;
        tokio::spawn(tick(pool.weak(), self.patience() / 2));
        Ok(Self {
            pool,
            ..self.clone()
        })
    }

    /// How long a statement is waited for: beyond the time that Postgres gives it nobody is there.
    fn patience(&self) -> Duration {
        self.statement_timeout + SILENCE
    }

    /// What work over a connection brought. One that is not answered ends, and so do those that idle:
    /// they are likely to be no better.
    fn answered<T>(&self, conn: Conn, done: Result<Result<T>, Elapsed>) -> Result<T> {
        done.unwrap_or_else(|silence| {
            conn.give_up();
            self.pool.retain(|_, _| false);
            Err(Error::Unavailable(silence.into()))
        })
    }

    /// Asks the database for a sign of life.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn ping(&self) -> Result<()> {
        let mut held = self.ping.lock().await;
        // Taken: a connection that did not answer in time is not asked again.
        if let Some(mut conn) = held.take()
            && conn.batch_execute("SELECT 1").await.is_ok()
        {
            *held = Some(conn);
            return Ok(());
        }
        let session = session(self.statement_timeout);
        let connecting = connect(&self.url, &session);
        let mut conn = timeout(self.connect_timeout, connecting)
            .await
            .map_err(|silence| Error::Unavailable(silence.into()))?
            .map_err(|error| Error::Unavailable(error.into()))?;
        conn.batch_execute("SELECT 1").await?;
        *held = Some(conn);
        Ok(())
    }

    /// How the pool stands.
    pub fn pool_status(&self) -> Status {
        self.pool.status()
    }

    /// Closes every connection that is idle and refuses new work.
    pub fn close(&self) {
        self.pool.close();
    }

    /// A turn to look for a key, unless it `is_known` to have been one: those are not held up.
    async fn key_lookup(&self, is_known: bool) -> Result<Option<SemaphorePermit<'_>>> {
        if is_known {
            return Ok(None);
        }
        let turn = self.key_lookups.acquire().await;
        turn.map(Some).map_err(Error::internal)
    }

    async fn conn(&self) -> Result<Conn> {
        let pooled = self.pool.get().await?;
        Ok(Conn::new(
            pooled,
            self.runtime.clone(),
            self.connect_timeout,
        ))
    }
}

/// Connections, made on first use; the one used last is taken first, for it is warm on both sides.
fn pool(
    size: usize,
    recycling: RecyclingMethod<AsyncPgConnection>,
    url: &str,
    acquire_timeout: Duration,
    session: String,
) -> Result<Pool<AsyncPgConnection>> {
    let mut config = ManagerConfig::default();
    config.recycling_method = recycling;
    let runtime = Handle::current();
    let session: Arc<str> = session.into();
    config.custom_setup = Box::new(move |url| {
        let url = url.to_owned();
        let (runtime, session) = (runtime.clone(), session.clone());
        Box::pin(async move {
            // The set ends the attempt when the caller has stopped waiting for it.
            let mut attempt = JoinSet::new();
            attempt.spawn_on(async move { connect(&url, &session).await }, &runtime);
            match attempt.join_next().await {
                Some(Ok(connected)) => connected,
                Some(Err(error)) => Err(ConnectionError::BadConnection(error.to_string())),
                None => Err(ConnectionError::BadConnection(
                    "no attempt was made".to_owned(),
                )),
            }
        })
    });
    let manager = AsyncDieselConnectionManager::new_with_config(url, config);
    Pool::builder(manager)
        .max_size(size)
        .wait_timeout(Some(acquire_timeout))
        .create_timeout(Some(acquire_timeout))
        .recycle_timeout(Some(acquire_timeout))
        .queue_mode(QueueMode::Lifo)
        .runtime(Runtime::Tokio1)
        .build()
        .map_err(Error::internal)
}

/// Sleeps again and again while there is a pool. A runtime makes a system call, and goes once more around
/// its loop, for each timer that is to end before all others. Of statements on a thread that does little
/// else each would bring one: the end of its patience is later than the end of this sleep.
async fn tick(pool: WeakPool<Manager>, period: Duration) {
    while pool.upgrade().is_some_and(|pool| !pool.is_closed()) {
        sleep(period).await;
    }
}

/// See [`Store::patience`].
const SILENCE: Duration = Duration::from_secs(2);
