use tokio_postgres::{Client, NoTls};

use super::{TestApp, TestUser, eventually};

/// A session past the pool that holds a table, or a user, so that calls writing to it hang.
pub(crate) struct Blocker {
    client: Client,
}

impl Blocker {
    pub(crate) async fn lock(app: &TestApp, table: &str) -> Self {
        Self::lock_in(app, table, "ACCESS EXCLUSIVE").await
    }

    /// Holds a user's row, so that every change of it waits.
    pub(crate) async fn lock_user(app: &TestApp, user: &TestUser) -> Self {
        let row = format!("SELECT FROM users WHERE id = '{}' FOR UPDATE", user.id);
        Self::begin(app, &row).await
    }

    /// Lets calls read the table.
    pub(crate) async fn lock_writes(app: &TestApp, table: &str) -> Self {
        Self::lock_in(app, table, "SHARE").await
    }

    async fn lock_in(app: &TestApp, table: &str, mode: &str) -> Self {
        Self::begin(app, &format!("LOCK TABLE {table} IN {mode} MODE")).await
    }

    /// Holds what this statement locks.
    pub(crate) async fn begin(app: &TestApp, lock: &str) -> Self {
        let connected = tokio_postgres::connect(&app.database_url, NoTls).await;
        let (client, connection) = connected.unwrap();
        tokio::spawn(connection);
        client
            .batch_execute(&format!("BEGIN; {lock}"))
            .await
            .unwrap();
        Self { client }
    }

    /// Waits until `calls` calls hang.
    pub(crate) async fn hold_up(&self, app: &TestApp, calls: i64) {
        eventually("calls hang", async || waiting(app).await >= calls).await;
    }

    /// Waits until none hangs any more.
    pub(crate) async fn let_go(&self, app: &TestApp) {
        eventually("calls end", async || waiting(app).await == 0).await;
    }

    /// Does something in the transaction that holds it.
    pub(crate) async fn sql(&self, statement: &str) {
        self.client.batch_execute(statement).await.unwrap();
    }

    pub(crate) async fn release(self) {
        self.client.batch_execute("COMMIT").await.unwrap();
    }
}

/// How many statements wait for a lock.
async fn waiting(app: &TestApp) -> i64 {
    // Over another session: inside a transaction, this view never changes.
    let waiting = "SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND wait_event_type = 'Lock'";
    app.count(waiting).await
}
