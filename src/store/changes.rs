//! How replicas hear of changes: triggers tell them in the transaction that makes the change, one
//! connection per replica listens.
//!
//! Postgres delivers notifications in the order of their commits. So a heartbeat that comes back
//! proves that every change committed before it was sent has been delivered.

use std::{future::poll_fn, time::Duration};

use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::BigInt,
};
use diesel_async::RunQueryDsl;
use tokio::{sync::mpsc, task::JoinSet, time::timeout};
use tokio_postgres::{AsyncMessage, Client, Config, NoTls};
use uuid::Uuid;

use super::Store;
use crate::{
    error::{Error, Result},
    model::{Change, Revision, UserId},
};

/// Named in the triggers as well.
const CHANNEL: &str = "tollkeeper_changes";

/// A position of the write-ahead log beyond every commit so far, as a number.
const POSITION: &str = "(pg_current_wal_insert_lsn() - '0/0')::bigint";

/// What comes through the channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notification {
    Changed(Change),
    /// A heartbeat of this listener, by its number: every change up to the revision was told.
    Heartbeat(u64, Revision),
}

/// A connection of its own, outside the pool, that hears of every change from now on.
pub struct ChangeListener {
    id: Uuid,
    client: Client,
    notifications: mpsc::UnboundedReceiver<String>,
    /// Reads the connection; ends with the listener.
    _reader: JoinSet<()>,
}

impl Store {
    /// Connects and listens. Changes committed before this returns may have been missed.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn changes(&self) -> Result<ChangeListener> {
        let connect = ChangeListener::connect(&self.url, self.connect_timeout);
        timeout(self.connect_timeout, connect)
            .await
            .map_err(|elapsed| Error::Unavailable(elapsed.into()))?
    }
}

impl Store {
    /// The state of now: holds the effects of every transaction that has committed.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn revision(&self) -> Result<Revision> {
        let mut conn = self.conn().await?;
        let position: i64 = Position.get_result(&mut conn).await?;
        Ok(Revision(position.cast_unsigned()))
    }
}

/// Prepared once: `diesel::sql_query` would be prepared on every call.
struct Position;

impl QueryFragment<Pg> for Position {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT ");
        out.push_sql(POSITION);
        Ok(())
    }
}

impl QueryId for Position {
    type QueryId = Self;
    const HAS_STATIC_QUERY_ID: bool = true;
}

impl Query for Position {
    type SqlType = BigInt;
}

impl ChangeListener {
    /// The next notification that concerns this listener.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// `Unavailable` when the connection is lost: changes may have been missed.
    pub async fn next(&mut self) -> Result<Notification> {
        loop {
            let payload = self.notifications.recv().await.ok_or_else(lost)?;
            if let Some(notification) = parse(&payload, self.id) {
                return Ok(notification);
            }
        }
    }

    /// Sends heartbeat `number` through the channel; it comes back by [`Self::next`].
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn heartbeat(&self, number: u64) -> Result<()> {
        // Read in the transaction that tells it: whatever has committed before that position was
        // told before it.
        let statement = format!(
            "SELECT pg_notify('{CHANNEL}', 'beat {} {number} ' || {POSITION})",
            self.id
        );
        let sent = self.client.batch_execute(&statement).await;
        sent.map_err(|error| Error::Unavailable(error.into()))
    }

    async fn connect(url: &str, connect_timeout: Duration) -> Result<Self> {
        let unavailable = |error: tokio_postgres::Error| Error::Unavailable(error.into());
        let mut config: Config = url.parse().map_err(unavailable)?;
        config
            .application_name("tollkeeper changes")
            .connect_timeout(connect_timeout);
        let (client, mut connection) = config.connect(NoTls).await.map_err(unavailable)?;
        // Unbounded, but read at once: the reader of the other end does no I/O between messages.
        let (sender, notifications) = mpsc::unbounded_channel();
        let mut reader = JoinSet::new();
        reader.spawn(async move {
            while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
                if let AsyncMessage::Notification(notification) = message
                    && sender.send(notification.payload().to_owned()).is_err()
                {
                    break;
                }
            }
        });
        // A connection hears nothing while a statement of its own runs, and heartbeats have nothing to
        // keep: they need not wait for a disk that stalls.
        client
            .batch_execute(&format!("SET synchronous_commit = off; LISTEN {CHANNEL}"))
            .await
            .map_err(unavailable)?;
        Ok(Self {
            id: Uuid::now_v7(),
            client,
            notifications,
            _reader: reader,
        })
    }
}

/// `None` for another replica's heartbeat, or what a later version says.
fn parse(payload: &str, listener: Uuid) -> Option<Notification> {
    let mut words = payload.split(' ');
    match (words.next()?, words.next(), words.next()) {
        ("beat", Some(id), Some(number)) => {
            let ours = id.parse::<Uuid>() == Ok(listener);
            ours.then_some(())?;
            let revision = Revision(words.next()?.parse().ok()?);
            Some(Notification::Heartbeat(number.parse().ok()?, revision))
        }
        ("user", Some(id), None) => {
            let change = Change::User(id.parse::<UserId>().ok()?);
            Some(Notification::Changed(change))
        }
        ("quota", Some(id), None) => {
            let change = Change::Quota(id.parse::<UserId>().ok()?);
            Some(Notification::Changed(change))
        }
        ("api_keys", None, None) => Some(Notification::Changed(Change::NewApiKey)),
        ("services", None, None) => Some(Notification::Changed(Change::Services)),
        ("all", None, None) => Some(Notification::Changed(Change::All)),
        _ => None,
    }
}

fn lost() -> Error {
    Error::Unavailable("the listening connection was lost".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_are_read_and_strangers_passed_over() {
        let (me, user) = (Uuid::now_v7(), UserId::new());
        assert_eq!(
            parse(&format!("beat {me} 7 99"), me),
            Some(Notification::Heartbeat(7, Revision(99)))
        );
        assert_eq!(parse(&format!("beat {} 7 99", Uuid::now_v7()), me), None);
        let changed = |change| Some(Notification::Changed(change));
        assert_eq!(
            parse(&format!("user {user}"), me),
            changed(Change::User(user))
        );
        assert_eq!(
            parse(&format!("quota {user}"), me),
            changed(Change::Quota(user))
        );
        assert_eq!(parse("services", me), changed(Change::Services));
        assert_eq!(parse("api_keys", me), changed(Change::NewApiKey));
        assert_eq!(parse("all", me), changed(Change::All));
        for strange in [
            "",
            "user",
            "user x",
            "quota",
            "services 3",
            "planet mars",
            "beat x y z",
        ] {
            assert_eq!(parse(strange, me), None, "{strange}");
        }
    }
}
