use tokio_postgres::{Client, NoTls};

use super::{TestApp, eventually};

/// A session past the pool that holds a table, so that calls writing to it hang.
pub(crate) struct Blocker {
    client: Client,
}

impl Blocker {
    pub(crate) async fn lock(app: &TestApp, table: &str) -> Self {
        Self::lock_in(app, table, "ACCESS EXCLUSIVE").await
    }

    /// Lets calls read the table.
    pub(crate) async fn lock_writes(app: &TestApp, table: &str) -> Self {
        Self::lock_in(app, table, "SHARE").await
    }

    async fn lock_in(app: &TestApp, table: &str, mode: &str) -> Self {
        let connected = tokio_postgres::connect(&app.database_url, NoTls).await;
        let (client, connection) = connected.unwrap();
        tokio::spawn(connection);
        let lock = format!("BEGIN; LOCK TABLE {table} IN {mode} MODE");
        client.batch_execute(&lock).await.unwrap();
        Self { client }
    }

    /// Waits until `calls` calls hang.
    pub(crate) async fn hold_up(&self, app: &TestApp, calls: i64) {
        // Over another session: inside a transaction, this view never changes.
        let waiting = "SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND wait_event_type = 'Lock'";
        eventually("calls hang", async || app.count(waiting).await >= calls).await;
    }

    pub(crate) async fn release(self) {
        self.client.batch_execute("COMMIT").await.unwrap();
    }
}
