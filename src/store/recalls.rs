//! How replicas ask each other for what is free, on a channel of its own: it happens close to a limit
//! only, and never in a transaction that books.

use diesel::{
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, Text},
};
use diesel_async::RunQueryDsl;
use tokio::time::timeout;

use super::{Store, listening::Listening, prepared::prepared};
use crate::{
    error::Result,
    model::{MeterName, ReplicaId},
};

const CHANNEL: &str = "tollkeeper_recalls";

/// A connection of its own that hears what other replicas need.
pub struct RecallListener {
    replica: ReplicaId,
    listening: Listening,
}

impl Store {
    /// Asks the other replicas to give back what is free of these meters.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn recall(&self, replica: ReplicaId, meters: &[MeterName]) -> Result<()> {
        let mut conn = self.conn().await?;
        let recall = Recall(meters.iter().map(|meter| payload(replica, meter)).collect());
        let told = timeout(self.patience(), async {
            Ok(recall.execute(&mut conn).await?)
        });
        let told = told.await;
        self.answered(conn, told)?;
        Ok(())
    }

    /// Connects and listens to what others than `replica` need.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn recalls(&self, replica: ReplicaId) -> Result<RecallListener> {
        Ok(RecallListener {
            replica,
            listening: self.listen("tollkeeper recalls", CHANNEL).await?,
        })
    }
}

impl RecallListener {
    /// The next meter of which somebody needs what is free. Cancel-safe.
    ///
    /// # Errors
    /// `Unavailable` when the connection is lost.
    pub async fn next(&mut self) -> Result<MeterName> {
        loop {
            let payload = self.listening.next().await?;
            if let Some((from, meter)) = parse(&payload)
                && from != self.replica
            {
                return Ok(meter);
            }
        }
    }
}

fn payload(from: ReplicaId, meter: &MeterName) -> String {
    let model = meter.model.as_ref().map(ToString::to_string);
    // The model comes last: it may have spaces.
    format!(
        "{from} {} {} {}",
        meter.user_id,
        meter.period,
        model.unwrap_or_default()
    )
}

/// `None` for what a later version says.
fn parse(payload: &str) -> Option<(ReplicaId, MeterName)> {
    let mut words = payload.splitn(4, ' ');
    let from = words.next()?.parse().ok()?;
    let user_id = words.next()?.parse().ok()?;
    let period = words.next()?.parse().ok()?;
    let model = match words.next()? {
        "" => None,
        name => Some(name.parse().ok()?),
    };
    let meter = MeterName {
        user_id,
        period,
        model,
    };
    Some((from, meter))
}

/// Prepared once.
struct Recall(Vec<String>);

impl QueryFragment<Pg> for Recall {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("SELECT pg_notify('");
        out.push_sql(CHANNEL);
        out.push_sql("', payload) FROM unnest(");
        out.push_bind_param::<Array<Text>, _>(&self.0)?;
        out.push_sql(") AS payload");
        Ok(())
    }
}

prepared! {
    Recall => Text = Self;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::UserId;

    #[test]
    fn what_is_told_is_read() {
        let from = ReplicaId::new();
        for model in [None, Some("gpt-5"), Some("a model")] {
            let meter = MeterName {
                user_id: UserId::new(),
                period: "2026-11".parse().expect("valid"),
                model: model.and_then(|name| name.parse().ok()),
            };
            assert_eq!(parse(&payload(from, &meter)), Some((from, meter)));
        }
        assert_eq!(parse("planet mars"), None);
    }
}
