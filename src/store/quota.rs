//! Overrides and credits. Every change of what a user may use takes the lock of the user's month first,
//! which whoever hands tokens out takes too.

use chrono::{DateTime, Utc};
use diesel::{
    dsl,
    pg::Pg,
    prelude::*,
    query_builder::{AstPass, Query, QueryFragment, QueryId},
    sql_types::{Array, BigInt, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl, pg::TransactionBuilder};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    audit::audit_insert_in_txn,
    errors::stored,
    prepared::prepared,
    quota_facts::quota_facts_in_txn,
    schema::{credit_grants, quota_balances, quota_overrides},
};
use crate::{
    error::{Error, Result},
    model::{
        AuditAction, AuditEvent, CreditGrant, CreditId, CreditShare, EffectiveLimit,
        GrantRequestId, LimitFacts, MonthlyOverride, NewCredit, Origin, Page, PageRequest, Period,
        Tiers, UserId,
    },
};

impl Store {
    /// Users with something that becomes another by itself: credits that are open, or an override that
    /// is to expire. At most `limit`, by their ids, after `after`.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn quota_users(&self, after: Option<UserId>, limit: i64) -> Result<Vec<UserId>> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = SqlUuid)]
            user_id: Uuid,
        }
        let mut conn = self.conn().await?;
        // Each part by its index, and no further than a page.
        let rows: Vec<Row> = diesel::sql_query(
            "(SELECT DISTINCT user_id FROM credit_grants
                 WHERE closed_at IS NULL AND user_id > $1 ORDER BY user_id LIMIT $2)
             UNION
             (SELECT user_id FROM quota_overrides
                 WHERE expires_at IS NOT NULL AND user_id > $1 ORDER BY user_id LIMIT $2)
             ORDER BY user_id LIMIT $2",
        )
        .bind::<SqlUuid, _>(after.map_or(Uuid::nil(), |user_id| user_id.0))
        .bind::<BigInt, _>(limit)
        .load(&mut conn)
        .await?;
        Ok(rows.into_iter().map(|row| UserId(row.user_id)).collect())
    }

    /// Which of these users' months [`Store::quota_settle`] would change.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn quota_unsettled(
        &self,
        users: &[UserId],
        tiers: &Tiers,
        now: DateTime<Utc>,
    ) -> Result<Vec<UserId>> {
        let mut conn = self.conn().await?;
        let all = quota_facts_in_txn(users, Period::containing(now), tiers, &mut conn).await?;
        let unsettled = all
            .iter()
            .filter(|facts| facts.settled(&facts.limit(tiers)) != **facts);
        Ok(unsettled.map(|facts| facts.user_id).collect())
    }

    /// Writes down how the user's month stands: what has been so far is judged by nothing that comes.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn quota_settle(&self, user_id: UserId, tiers: &Tiers) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            quota_settle_in_txn(user_id, tiers, conn).await.map(drop)
        })
        .await
    }

    /// Gives a user a monthly limit of their own, in place of the tier's and of any before.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn quota_override_set(
        &self,
        user_id: UserId,
        new: &MonthlyOverride,
        reason: &str,
        tiers: &Tiers,
        origin: &Origin,
    ) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let (mut facts, _) = quota_settle_in_txn(user_id, tiers, conn).await?;
            let values = (
                quota_overrides::monthly_tokens.eq(new.monthly_tokens),
                quota_overrides::expires_at.eq(new.expires_at),
                quota_overrides::reason.eq(reason),
                quota_overrides::actor_kind.eq(origin.actor.kind().as_str()),
                quota_overrides::actor_id.eq(origin.actor.id()),
                quota_overrides::set_at.eq(dsl::now),
            );
            diesel::insert_into(quota_overrides::table)
                .values((quota_overrides::user_id.eq(user_id.0), values))
                .on_conflict(quota_overrides::user_id)
                .do_update()
                .set(values)
                .execute(conn)
                .await?;
            let details = json!({
                "monthly_tokens": new.monthly_tokens,
                "expires_at": new.expires_at,
                "reason": reason,
            });
            let event = AuditEvent::of_user(AuditAction::QuotaOverrideSet, user_id, origin);
            audit_insert_in_txn(&event.with_details(details), conn).await?;
            facts.override_ = Some(*new);
            record_in_txn(&facts, &facts.limit(tiers), conn).await
        })
        .await
    }

    /// Takes a user's own limit away. Without one it changes nothing.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn quota_override_clear(
        &self,
        user_id: UserId,
        reason: &str,
        tiers: &Tiers,
        origin: &Origin,
    ) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let (mut facts, _) = quota_settle_in_txn(user_id, tiers, conn).await?;
            let own = quota_overrides::table.find(user_id.0);
            if diesel::delete(own).execute(conn).await? == 0 {
                return Ok(());
            }
            let event = AuditEvent::of_user(AuditAction::QuotaOverrideCleared, user_id, origin)
                .with_details(json!({"reason": reason}));
            audit_insert_in_txn(&event, conn).await?;
            facts.override_ = None;
            record_in_txn(&facts, &facts.limit(tiers), conn).await
        })
        .await
    }

    /// Grants credits, unless the user has `limit` that are not closed. The same request again answers
    /// the grant that it made, as it stands now.
    ///
    /// # Errors
    /// `CreditConflict` when the request made another grant · `TooManyCredits` · `UserNotFound` ·
    /// `Unavailable`
    pub async fn credit_grant(
        &self,
        new: &NewCredit,
        limit: u32,
        tiers: &Tiers,
        origin: &Origin,
    ) -> Result<CreditGrant> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let (facts, before) = quota_settle_in_txn(new.user_id, tiers, conn).await?;
            // First: it waits for a grant of the same request that is under way, for any user.
            let inserted: Option<CreditRow> = diesel::insert_into(credit_grants::table)
                .values((
                    credit_grants::id.eq(CreditId::new().0),
                    credit_grants::user_id.eq(new.user_id.0),
                    credit_grants::tokens.eq(new.tokens),
                    credit_grants::priority.eq(new.priority),
                    credit_grants::expires_at.eq(new.expires_at),
                    credit_grants::reason.eq(&new.reason),
                    credit_grants::request_id.eq(new.request_id.0),
                    credit_grants::actor_kind.eq(origin.actor.kind().as_str()),
                    credit_grants::actor_id.eq(origin.actor.id()),
                ))
                .on_conflict(credit_grants::request_id)
                .do_nothing()
                .returning(CreditRow::as_returning())
                .get_result(conn)
                .await
                .optional()?;
            let Some(row) = inserted else {
                let before = granted_in_txn(new, &before, conn).await?;
                return before.ok_or_else(|| Error::internal("a grant is gone"));
            };
            if facts.credits.len() >= usize::try_from(limit).unwrap_or(usize::MAX) {
                return Err(Error::TooManyCredits { limit });
            }
            let details = json!({
                "user_id": new.user_id.to_string(),
                "tokens": new.tokens,
                "priority": new.priority,
                "expires_at": new.expires_at,
                "reason": new.reason,
            });
            let event =
                AuditEvent::new(AuditAction::CreditsGranted, row.id, origin).about(new.user_id);
            audit_insert_in_txn(&event.with_details(details), conn).await?;
            let facts = facts_in_txn(new.user_id, facts.period, tiers, conn).await?;
            Ok(row.grant(&facts.limit(tiers)))
        })
        .await
    }

    /// The grant that the request made before, as it stands now; `None`: it made none.
    ///
    /// # Errors
    /// `CreditConflict` when it made another grant · `UserNotFound` · `Unavailable`
    pub async fn credit_granted(
        &self,
        new: &NewCredit,
        tiers: &Tiers,
        now: DateTime<Utc>,
    ) -> Result<Option<CreditGrant>> {
        let mut conn = self.conn().await?;
        one_snapshot(&mut conn)
            .run::<_, Error, _>(async |conn| {
                let period = Period::containing(now);
                let facts = facts_in_txn(new.user_id, period, tiers, conn).await?;
                granted_in_txn(new, &facts.limit(tiers), conn).await
            })
            .await
    }

    /// Lists what was granted to a user, newest first.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn credit_list(
        &self,
        user_id: UserId,
        page: &PageRequest<Uuid>,
        tiers: &Tiers,
        now: DateTime<Utc>,
    ) -> Result<Page<CreditGrant>> {
        let mut conn = self.conn().await?;
        one_snapshot(&mut conn)
            .run::<_, Error, _>(async |conn| {
                let period = Period::containing(now);
                let facts = facts_in_txn(user_id, period, tiers, conn).await?;
                let mut query = credit_grants::table
                    .filter(credit_grants::user_id.eq(user_id.0))
                    .select(CreditRow::as_select())
                    .order(credit_grants::id.desc())
                    .limit(page.size + 1)
                    .into_boxed();
                if let Some(after) = page.after {
                    query = query.filter(credit_grants::id.lt(after));
                }
                let rows: Vec<CreditRow> = query.load(conn).await?;
                let limit = facts.limit(tiers);
                let grants = rows.into_iter().map(|row| row.grant(&limit)).collect();
                Ok(Page::from_rows(grants, page, |grant| grant.id.0))
            })
            .await
    }

    /// Takes back what is left of credits. Those that give nothing more stay as they are.
    ///
    /// # Errors
    /// `CreditNotFound` · `Unavailable`
    pub async fn credit_void(
        &self,
        id: CreditId,
        reason: &str,
        tiers: &Tiers,
        origin: &Origin,
    ) -> Result<CreditGrant> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let user_id: Uuid = credit_grants::table
                .find(id.0)
                .select(credit_grants::user_id)
                .first(conn)
                .await
                .optional()?
                .ok_or(Error::CreditNotFound)?;
            let settled = quota_settle_in_txn(UserId(user_id), tiers, conn).await;
            let (mut facts, before) = settled.map_err(|error| match error {
                // Gone meanwhile, and the credits with them.
                Error::UserNotFound => Error::CreditNotFound,
                error => error,
            })?;
            let is_open = facts.credits.iter().any(|credit| credit.id == id);
            if let Some(share) = before.share(id).filter(|_| is_open) {
                close_in_txn(share, facts.now, true, conn).await?;
                let details = json!({
                    "user_id": user_id.to_string(),
                    "voided_tokens": share.credit.tokens - share.drawn,
                    "reason": reason,
                });
                let event = AuditEvent::new(AuditAction::CreditsVoided, id.0, origin)
                    .about(UserId(user_id));
                audit_insert_in_txn(&event.with_details(details), conn).await?;
                facts.close(share);
            }
            let row = credit_grants::table.find(id.0);
            let row: CreditRow = row.select(CreditRow::as_select()).first(conn).await?;
            Ok(row.grant(&facts.limit(tiers)))
        })
        .await
    }
}

/// Reads that belong together.
fn one_snapshot(conn: &mut AsyncPgConnection) -> TransactionBuilder<'_, AsyncPgConnection> {
    conn.build_transaction().read_only().repeatable_read()
}

/// The grant that a request made, if it made one.
async fn granted_in_txn(
    new: &NewCredit,
    limit: &EffectiveLimit,
    conn: &mut AsyncPgConnection,
) -> Result<Option<CreditGrant>> {
    let row: Option<CreditRow> = credit_grants::table
        .filter(credit_grants::request_id.eq(new.request_id.0))
        .select(CreditRow::as_select())
        .first(conn)
        .await
        .optional()?;
    match row {
        Some(row) if !row.is(new) => Err(Error::CreditConflict),
        row => Ok(row.map(|row| row.grant(limit))),
    }
}

/// Locks the user's month of now and writes down how it stands: what has been so far stays as it is,
/// whatever changes next. Answers the facts as they are by then, and the limit that follows.
pub(super) async fn quota_settle_in_txn(
    user_id: UserId,
    tiers: &Tiers,
    conn: &mut AsyncPgConnection,
) -> Result<(LimitFacts, EffectiveLimit)> {
    let month: Option<String> = LockMonth(user_id.0).get_result(conn).await.optional()?;
    let period = stored("quota_balances.month", &month.ok_or(Error::UserNotFound)?)?;
    let facts = facts_in_txn(user_id, period, tiers, conn).await?;
    let limit = facts.limit(tiers);
    record_in_txn(&facts, &limit, conn).await?;
    if let Some(first) = facts.first_open_month() {
        for (id, drawn) in limit.settling(first) {
            diesel::update(credit_grants::table.find(id.0))
                .set((
                    credit_grants::settled_before.eq(first.to_string()),
                    credit_grants::drawn_tokens.eq(drawn),
                ))
                .execute(conn)
                .await?;
        }
    }
    let settled = facts.settled(&limit);
    if settled.override_ != facts.override_ {
        let expired = quota_overrides::table.find(user_id.0);
        diesel::delete(expired).execute(conn).await?;
    }
    let limit = settled.limit(tiers);
    Ok((settled, limit))
}

async fn facts_in_txn(
    user_id: UserId,
    period: Period,
    tiers: &Tiers,
    conn: &mut AsyncPgConnection,
) -> Result<LimitFacts> {
    let facts = quota_facts_in_txn(&[user_id], period, tiers, conn).await?;
    facts.into_iter().next().ok_or(Error::UserNotFound)
}

/// Writes down what was decided. Needs the lock of the user's month.
pub(super) async fn record_in_txn(
    facts: &LimitFacts,
    limit: &EffectiveLimit,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    for share in limit.closing() {
        close_in_txn(share, facts.now, false, conn).await?;
    }
    let base = limit.base_to_record();
    if facts.recorded_base != Some(base) {
        let row = quota_balances::table.find((facts.user_id.0, facts.period.to_string(), ""));
        diesel::update(row)
            .set(quota_balances::base_limit.eq(base))
            .execute(conn)
            .await?;
    }
    Ok(())
}

/// Closes a credit that is open: what each month drew from it stays. Needs the lock of the user's month.
async fn close_in_txn(
    share: &CreditShare,
    at: DateTime<Utc>,
    is_voided: bool,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let (months, tokens) = share
        .draws()
        .map(|(month, n)| (month.to_string(), n))
        .unzip();
    let close = CloseCredit {
        id: share.credit.id.0,
        at,
        voided_at: is_voided.then_some(at),
        drawn_tokens: share.drawn,
        months,
        tokens,
    };
    close.execute(conn).await?;
    Ok(())
}

/// The update that changes nothing takes the lock of a row that is there. The user is locked as well, as
/// foreign keys lock: whoever deletes them waits, or there is nobody to be found.
struct LockMonth(Uuid);

impl QueryFragment<Pg> for LockMonth {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql(
            "INSERT INTO quota_balances AS b (user_id, month, model)
             SELECT id, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), '' FROM users WHERE id = ",
        );
        out.push_bind_param::<SqlUuid, _>(&self.0)?;
        out.push_sql(
            " FOR KEY SHARE
             ON CONFLICT (user_id, month, model) DO UPDATE SET leased = b.leased
             RETURNING month",
        );
        Ok(())
    }
}

prepared! {
    LockMonth => Text = Self;
}

struct CloseCredit {
    id: Uuid,
    at: DateTime<Utc>,
    voided_at: Option<DateTime<Utc>>,
    drawn_tokens: i64,
    /// That are not settled, and what each drew.
    months: Vec<String>,
    tokens: Vec<i64>,
}

impl QueryFragment<Pg> for CloseCredit {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, Pg>) -> QueryResult<()> {
        out.push_sql("WITH closed AS (UPDATE credit_grants SET closed_at = ");
        out.push_bind_param::<Timestamptz, _>(&self.at)?;
        out.push_sql(", voided_at = ");
        out.push_bind_param::<Nullable<Timestamptz>, _>(&self.voided_at)?;
        out.push_sql(", drawn_tokens = ");
        out.push_bind_param::<BigInt, _>(&self.drawn_tokens)?;
        out.push_sql(" WHERE closed_at IS NULL AND id = ");
        out.push_bind_param::<SqlUuid, _>(&self.id)?;
        out.push_sql(
            " RETURNING id, user_id)
             INSERT INTO credit_draws (user_id, month, credit_id, tokens)
             SELECT closed.user_id, drawn.month, closed.id, drawn.tokens
             FROM closed, unnest(",
        );
        out.push_bind_param::<Array<Text>, _>(&self.months)?;
        out.push_sql(", ");
        out.push_bind_param::<Array<BigInt>, _>(&self.tokens)?;
        out.push_sql(") AS drawn (month, tokens)");
        Ok(())
    }
}

prepared! {
    CloseCredit => () = Self;
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = credit_grants, check_for_backend(diesel::pg::Pg))]
struct CreditRow {
    id: Uuid,
    user_id: Uuid,
    tokens: i64,
    priority: i32,
    granted_at: DateTime<Utc>,
    expires_at: Option<DateTime<Utc>>,
    voided_at: Option<DateTime<Utc>>,
    reason: String,
    request_id: Uuid,
}

impl CreditRow {
    fn is(&self, new: &NewCredit) -> bool {
        self.user_id == new.user_id.0
            && self.tokens == new.tokens
            && self.priority == new.priority
            && self.expires_at == new.expires_at
            && self.reason == new.reason
    }

    fn grant(self, limit: &EffectiveLimit) -> CreditGrant {
        let id = CreditId(self.id);
        CreditGrant {
            id,
            user_id: UserId(self.user_id),
            tokens: self.tokens,
            priority: self.priority,
            granted_at: self.granted_at,
            expires_at: self.expires_at,
            voided_at: self.voided_at,
            remaining: limit.share(id).map_or(0, |share| share.remaining),
            reason: self.reason,
            request_id: GrantRequestId(self.request_id),
        }
    }
}
