//! The trail of security-relevant acts, written in the transaction that does them.

use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::{AsyncPgConnection, RunQueryDsl};
use serde_json::Value;
use uuid::Uuid;

use super::{Store, errors::stored, schema::audit_events};
use crate::{
    error::{Error, Result},
    model::{
        ActionFilter, AuditCursor, AuditEvent, AuditFilter, AuditRecord, Page, PageRequest, UserId,
    },
};

impl Store {
    /// Lists acts, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn audit_list(
        &self,
        filter: &AuditFilter,
        page: &PageRequest<AuditCursor>,
    ) -> Result<Page<AuditRecord>> {
        use audit_events as e;
        let mut query = e::table
            .select(AuditRow::as_select())
            .order((e::occurred_at.desc(), e::id.desc()))
            .limit(page.size + 1)
            .into_boxed();
        if let Some(UserId(id)) = filter.user_id {
            query = query.filter(e::user_id.eq(id));
        }
        if let Some(id) = filter.actor_id {
            query = query.filter(e::actor_id.eq(id));
        }
        if let Some(id) = filter.target_id {
            query = query.filter(e::target_id.eq(id));
        }
        match &filter.action {
            Some(ActionFilter::Exactly(action)) => query = query.filter(e::action.eq(action)),
            Some(ActionFilter::Beginning(start)) => {
                let pattern = format!("{}%", start.replace('_', "\\_"));
                query = query.filter(e::action.like(pattern));
            }
            None => {}
        }
        if let Some(start) = filter.start {
            query = query.filter(e::occurred_at.ge(start));
        }
        if let Some(end) = filter.end {
            query = query.filter(e::occurred_at.lt(end));
        }
        if let Some(AuditCursor { occurred_at, id }) = page.after {
            let earlier = e::occurred_at.lt(occurred_at);
            let same_time = e::occurred_at.eq(occurred_at).and(e::id.lt(id));
            query = query
                .filter(earlier.or(same_time))
                // Implied by the line above; said so that indexes are entered at the right place.
                .filter(e::occurred_at.le(occurred_at));
        }
        // For an action that is rare, or of long ago, much may be looked through.
        let _turn = self.bulk_read().await?;
        let mut conn = self.conn().await?;
        let rows: Vec<AuditRow> = query.load(&mut conn).await?;
        let records = rows
            .into_iter()
            .map(AuditRecord::try_from)
            .collect::<Result<Vec<_>>>()?;
        Ok(Page::from_rows(records, page, |record| AuditCursor {
            occurred_at: record.occurred_at,
            id: record.id,
        }))
    }
}

#[derive(Insertable)]
#[diesel(table_name = audit_events, treat_none_as_default_value = false)]
struct NewAuditEvent<'a> {
    id: Uuid,
    action: &'static str,
    actor_kind: &'static str,
    actor_id: Option<Uuid>,
    target_id: Uuid,
    user_id: Option<Uuid>,
    request_id: &'a str,
    address: Option<String>,
    user_agent: &'a str,
    details: &'a Value,
}

pub(super) async fn audit_insert_in_txn(
    event: &AuditEvent<'_>,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let row = NewAuditEvent {
        id: Uuid::now_v7(),
        action: event.action.as_str(),
        actor_kind: event.origin.actor.kind().as_str(),
        actor_id: event.origin.actor.id(),
        target_id: event.target,
        user_id: event.user.map(|id| id.0),
        request_id: &event.origin.request_id,
        address: event.origin.address.map(|address| address.to_string()),
        user_agent: &event.origin.user_agent,
        details: &event.details,
    };
    diesel::insert_into(audit_events::table)
        .values(row)
        .execute(conn)
        .await?;
    Ok(())
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = audit_events, check_for_backend(diesel::pg::Pg))]
struct AuditRow {
    id: Uuid,
    occurred_at: DateTime<Utc>,
    action: String,
    actor_kind: String,
    actor_id: Option<Uuid>,
    target_id: Uuid,
    user_id: Option<Uuid>,
    request_id: String,
    address: Option<String>,
    user_agent: String,
    details: Value,
}

impl TryFrom<AuditRow> for AuditRecord {
    type Error = Error;

    fn try_from(row: AuditRow) -> Result<Self> {
        Ok(Self {
            id: row.id,
            occurred_at: row.occurred_at,
            action: row.action,
            actor_kind: stored("audit_events.actor_kind", &row.actor_kind)?,
            actor_id: row.actor_id,
            target_id: row.target_id,
            user_id: row.user_id.map(UserId),
            request_id: row.request_id,
            address: row.address.and_then(|address| address.parse().ok()),
            user_agent: row.user_agent,
            details: row.details,
        })
    }
}
