//! How replicas hear of changes: triggers tell them in the transaction that makes the change, one
//! connection per replica listens.
//!
//! Postgres delivers notifications in the order of their commits. So a heartbeat that comes back
//! proves that every change committed before it was sent has been delivered.

use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::BigInt,
};
use diesel_async::RunQueryDsl;
use uuid::Uuid;

use super::{Store, listening::Listening, prepared::prepared};
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
    listening: Listening,
}

impl Store {
    /// Connects and listens. Changes committed before this returns may have been missed.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn changes(&self) -> Result<ChangeListener> {
        Ok(ChangeListener {
            id: Uuid::now_v7(),
            listening: self.listen("tollkeeper changes", CHANNEL).await?,
        })
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

prepared! {
    Position => BigInt = Self;
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
            let payload = self.listening.next().await?;
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
        let sent = self.listening.client.batch_execute(&statement).await;
        sent.map_err(|error| Error::Unavailable(error.into()))
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
