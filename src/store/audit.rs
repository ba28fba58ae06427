//! The trail of security-relevant acts, written in the transaction that does them.

use std::cmp::Reverse;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{AsSelect, Select, sql},
    helper_types::IntoBoxed,
    pg::Pg,
    prelude::*,
    query_builder::AstPass,
    sql_types::{BigInt, Jsonb, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
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
        // For an action of long ago, beside a filter of another kind, much may be looked through.
        let mut conn = self.bulk_conn().await?;
        let mut rows: Vec<AuditRow> = Vec::new();
        match &filter.action {
            // Each action by its index: together they do not stand in the order of time.
            Some(ActionFilter::Beginning(start)) if filter.is_of_nobody() => {
                for action in actions_beginning(start, &mut conn).await? {
                    let of_one = query(filter, page).filter(sql::<Text>(ACTION).eq(action));
                    rows.extend(of_one.load::<AuditRow>(&mut conn).await?);
                }
                rows.sort_by_key(|row| Reverse((row.occurred_at, row.id)));
                rows.truncate(usize::try_from(page.size + 1).unwrap_or(usize::MAX));
            }
            Some(ActionFilter::Beginning(start)) => {
                let (from, to) = range_of(start);
                let of_some = query(filter, page)
                    .filter(sql::<Text>(ACTION).ge(from))
                    .filter(sql::<Text>(ACTION).lt(to));
                rows = of_some.load(&mut conn).await?;
            }
            Some(ActionFilter::Exactly(action)) => {
                let of_one = query(filter, page).filter(sql::<Text>(ACTION).eq(action));
                rows = of_one.load(&mut conn).await?;
            }
            None => rows = query(filter, page).load(&mut conn).await?,
        }
        conn.done();
        let records = rows
            .into_iter()
            .map(AuditRecord::try_from)
            .collect::<Result<Vec<_>>>()?;
        Ok(Page::from_rows(records, page, |record| AuditCursor {
            occurred_at: record.occurred_at,
            id: record.id,
        }))
    }

    /// Writes down whom acts concerned of which that was not written down, up to `limit` of them from a
    /// time on; returns how many, and the time of the last. They are of before there was a place for
    /// it, or of replicas that do not know of it.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn audit_attribute(
        &self,
        from: DateTime<Utc>,
        limit: i64,
    ) -> Result<(usize, Option<DateTime<Utc>>)> {
        #[derive(QueryableByName)]
        struct Attributed {
            #[diesel(sql_type = BigInt)]
            count: i64,
            #[diesel(sql_type = Nullable<Timestamptz>)]
            last: Option<DateTime<Utc>>,
        }
        let mut conn = self.conn().await?;
        // The condition is that of an index. Its dead entries are many after a while: each batch begins
        // behind those of the batches before.
        let Attributed { count, last } = diesel::sql_query(
            "WITH behind AS (
                 SELECT occurred_at, id FROM audit_events
                 WHERE user_id IS NULL AND audit_user(action, target_id, details) IS NOT NULL
                     AND occurred_at >= $1
                 ORDER BY occurred_at LIMIT $2 FOR UPDATE SKIP LOCKED
             ), attributed AS (
                 UPDATE audit_events AS e SET user_id = audit_user(e.action, e.target_id, e.details)
                 FROM behind WHERE e.occurred_at = behind.occurred_at AND e.id = behind.id
             )
             SELECT count(*) AS count, max(occurred_at) AS last FROM behind",
        )
        .bind::<Timestamptz, _>(from)
        .bind::<BigInt, _>(limit)
        .get_result(&mut conn)
        .await?;
        Ok((usize::try_from(count).unwrap_or(0), last))
    }
}

/// As the index has it: names that begin alike stand together in no other collation.
const ACTION: &str = "action COLLATE \"C\"";

/// All filters but that of the action.
fn query<'a>(
    filter: &'a AuditFilter,
    page: &PageRequest<AuditCursor>,
) -> IntoBoxed<'a, Select<audit_events::table, AsSelect<AuditRow, Pg>>, Pg> {
    use audit_events as e;
    let mut query = e::table.select(AuditRow::as_select()).into_boxed();
    if let Some(UserId(id)) = filter.user_id {
        query = query.filter(e::user_id.eq(id));
    }
    if let Some(id) = filter.actor_id {
        query = query.filter(e::actor_id.eq(id));
    }
    if let Some(id) = filter.target_id {
        query = query.filter(e::target_id.eq(id));
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
    query
        .order((e::occurred_at.desc(), e::id.desc()))
        .limit(page.size + 1)
}

/// The actions of the trail that begin so, from one in the index to the next: there are few.
async fn actions_beginning(start: &str, conn: &mut AsyncPgConnection) -> Result<Vec<String>> {
    let (from, to) = range_of(start);
    let mut found: Vec<String> = Vec::new();
    loop {
        let after = found.last().unwrap_or(&from);
        let next: Option<String> = audit_events::table
            .filter(sql::<Text>(ACTION).gt(after))
            .filter(sql::<Text>(ACTION).lt(&to))
            .order(sql::<Text>(ACTION))
            .select(audit_events::action)
            .first(conn)
            .await
            .optional()?;
        match next {
            Some(action) => found.push(action),
            None => return Ok(found),
        }
    }
}

/// From where to where actions begin so, in the order of bytes. No action is as short as `start`.
fn range_of(start: &str) -> (String, String) {
    let mut to = start.to_owned();
    to.pop();
    // What comes after a full stop.
    to.push('/');
    (start.to_owned(), to)
}

#[derive(Insertable)]
#[diesel(table_name = audit_events, treat_none_as_default_value = false)]
pub(super) struct NewAuditEvent<'a> {
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

impl<'a> NewAuditEvent<'a> {
    pub(super) fn of(event: &'a AuditEvent<'_>) -> Self {
        Self {
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
        }
    }

    /// The same as part of a statement, which goes on with `FROM` what it happens with.
    pub(super) fn walk_insert<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        // All of them: a column that is added does not compile without its place here.
        let Self {
            id,
            action,
            actor_kind,
            actor_id,
            target_id,
            user_id,
            request_id,
            address,
            user_agent,
            details,
        } = self;
        out.push_sql(
            "INSERT INTO audit_events (id, action, actor_kind, actor_id, target_id, user_id,
                 request_id, address, user_agent, details)
             SELECT ",
        );
        out.push_bind_param::<SqlUuid, _>(id)?;
        for text in [action, actor_kind] {
            out.push_sql(", ");
            out.push_bind_param::<Text, _>(text)?;
        }
        out.push_sql(", ");
        out.push_bind_param::<Nullable<SqlUuid>, _>(actor_id)?;
        out.push_sql(", ");
        out.push_bind_param::<SqlUuid, _>(target_id)?;
        out.push_sql(", ");
        out.push_bind_param::<Nullable<SqlUuid>, _>(user_id)?;
        out.push_sql(", ");
        out.push_bind_param::<Text, _>(request_id)?;
        out.push_sql(", ");
        out.push_bind_param::<Nullable<Text>, _>(address)?;
        out.push_sql(", ");
        out.push_bind_param::<Text, _>(user_agent)?;
        out.push_sql(", ");
        out.push_bind_param::<Jsonb, _>(*details)
    }
}

pub(super) async fn audit_insert_in_txn(
    event: &AuditEvent<'_>,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    diesel::insert_into(audit_events::table)
        .values(NewAuditEvent::of(event))
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
