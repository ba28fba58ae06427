use tokio_postgres::{NoTls, SimpleQueryMessage};

use super::{TestApp, eventually};

impl TestApp {
    /// How Postgres carries out the statement that `call` makes a server send it, which holds all of
    /// `marks`, with these values for its parameters.
    pub(crate) async fn plan(
        &self,
        marks: &[&str],
        values: &[&str],
        mut call: impl AsyncFnMut(),
    ) -> String {
        let holds: Vec<String> = marks
            .iter()
            .map(|mark| format!("position($mark${mark}$mark$ in query) > 0"))
            .collect();
        let sent = format!(
            "SELECT query FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid() AND state = 'idle'
                 AND {} ORDER BY query_start DESC LIMIT 1",
            holds.join(" AND ")
        );
        let mut statement = String::new();
        let what = format!("{marks:?} has been sent");
        eventually(&what, async || {
            // Each time: what its connection sends next, for whomever, hides it.
            call().await;
            let rows = self.sql(&sent).await;
            statement = rows.first().map(|row| row.get(0)).unwrap_or_default();
            !statement.is_empty()
        })
        .await;
        let (client, connection) = tokio_postgres::connect(&self.database_url, NoTls)
            .await
            .expect("connected");
        tokio::spawn(connection);
        let prepare = format!("PREPARE sent AS {statement}");
        client.batch_execute(&prepare).await.expect(&prepare);
        let explain = format!("EXPLAIN EXECUTE sent ({})", values.join(", "));
        let lines = client.simple_query(&explain).await.expect(&explain);
        let line = |message: &SimpleQueryMessage| match message {
            SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
            _ => None,
        };
        let lines: Vec<String> = lines.iter().filter_map(line).collect();
        lines.join("\n")
    }
}
