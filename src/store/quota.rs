//! Overrides and credits. Every change of what a user may use takes the lock of the user's month first,
//! which whoever hands tokens out takes too.

use chrono::{DateTime, Utc};
use diesel::{
    dsl,
    prelude::*,
    sql_types::{Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    audit::audit_insert_in_txn,
    errors::stored,
    quota_facts::quota_facts_in_txn,
    schema::{credit_grants, quota_balances, quota_overrides},
};
use crate::{
    error::{Error, Result},
    model::{
        AuditAction, AuditEvent, CreditGrant, CreditId, EffectiveLimit, GrantRequestId, LimitFacts,
        MonthlyOverride, NewCredit, Origin, Page, PageRequest, Period, Tiers, UserId,
    },
};

impl Store {
    /// Records what the user's month stands at under the tier that is about to change: what was used
    /// under a larger limit stays paid for.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn quota_record(&self, user_id: UserId, tiers: &Tiers) -> Result<()> {
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
                quota_overrides::actor_kind.eq(origin.actor.kind()),
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
            let event = AuditEvent::new(AuditAction::QuotaOverrideSet, user_id.0, origin);
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
            let event = AuditEvent::new(AuditAction::QuotaOverrideCleared, user_id.0, origin)
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
                    credit_grants::actor_kind.eq(origin.actor.kind()),
                    credit_grants::actor_id.eq(origin.actor.id()),
                ))
                .on_conflict(credit_grants::request_id)
                .do_nothing()
                .returning(CreditRow::as_returning())
                .get_result(conn)
                .await
                .optional()?;
            let Some(row) = inserted else {
                let row: CreditRow = credit_grants::table
                    .filter(credit_grants::request_id.eq(new.request_id.0))
                    .select(CreditRow::as_select())
                    .first(conn)
                    .await?;
                let same = row.is(new);
                let grant = row.grant(&before);
                return if same {
                    Ok(grant)
                } else {
                    Err(Error::CreditConflict)
                };
            };
            let open = facts.credits.iter().filter(|one| one.closed.is_none());
            let closing = before.closing(facts.now).count();
            if open.count() - closing >= usize::try_from(limit).unwrap_or(usize::MAX) {
                return Err(Error::TooManyCredits { limit });
            }
            let details = json!({
                "user_id": new.user_id.to_string(),
                "tokens": new.tokens,
                "priority": new.priority,
                "expires_at": new.expires_at,
                "reason": new.reason,
            });
            let event = AuditEvent::new(AuditAction::CreditsGranted, row.id, origin);
            audit_insert_in_txn(&event.with_details(details), conn).await?;
            let facts = facts_in_txn(new.user_id, facts.period, tiers, conn).await?;
            Ok(row.grant(&facts.limit(tiers)))
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
        let mut query = credit_grants::table
            .filter(credit_grants::user_id.eq(user_id.0))
            .select(CreditRow::as_select())
            .order(credit_grants::id.desc())
            .limit(page.size + 1)
            .into_boxed();
        if let Some(after) = page.after {
            query = query.filter(credit_grants::id.lt(after));
        }
        let mut conn = self.conn().await?;
        let period = Period::containing(now);
        let facts = facts_in_txn(user_id, period, tiers, &mut conn).await?;
        let rows: Vec<CreditRow> = query.load(&mut conn).await?;
        let limit = facts.limit(tiers);
        let grants = rows.into_iter().map(|row| row.grant(&limit)).collect();
        Ok(Page::from_rows(grants, page, |grant| grant.id.0))
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
            let (facts, before) = quota_settle_in_txn(UserId(user_id), tiers, conn).await?;
            let drawn = before.share(id).map_or(0, |share| share.drawn);
            let open = credit_grants::table
                .find(id.0)
                .filter(credit_grants::closed_at.is_null());
            let voided: Option<CreditRow> = diesel::update(open)
                .set((
                    credit_grants::voided_at.eq(dsl::now),
                    credit_grants::closed_at.eq(dsl::now),
                    credit_grants::drawn_tokens.eq(drawn),
                ))
                .returning(CreditRow::as_returning())
                .get_result(conn)
                .await
                .optional()?;
            let Some(row) = voided else {
                let row = credit_grants::table.find(id.0);
                let row: CreditRow = row.select(CreditRow::as_select()).first(conn).await?;
                return Ok(row.grant(&before));
            };
            let details = json!({
                "user_id": user_id.to_string(),
                "voided_tokens": row.tokens - drawn,
                "reason": reason,
            });
            let event = AuditEvent::new(AuditAction::CreditsVoided, id.0, origin);
            audit_insert_in_txn(&event.with_details(details), conn).await?;
            let facts = facts_in_txn(facts.user_id, facts.period, tiers, conn).await?;
            Ok(row.grant(&facts.limit(tiers)))
        })
        .await
    }

    /// Users with credits that have expired and are not closed; some of them, if there are many.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn credit_expired_users(&self, limit: i64) -> Result<Vec<UserId>> {
        let mut conn = self.conn().await?;
        let mut users: Vec<Uuid> = credit_grants::table
            .filter(credit_grants::closed_at.is_null())
            .filter(credit_grants::expires_at.le(dsl::now.into_sql::<Timestamptz>().nullable()))
            .select(credit_grants::user_id)
            .limit(limit)
            .load(&mut conn)
            .await?;
        users.sort_unstable();
        users.dedup();
        Ok(users.into_iter().map(UserId).collect())
    }
}

/// Locks the user's month of now, closes the credits that have expired and records the base: what has
/// been so far stands, whatever changes next. Answers what it read and the limit that follows.
async fn quota_settle_in_txn(
    user_id: UserId,
    tiers: &Tiers,
    conn: &mut AsyncPgConnection,
) -> Result<(LimitFacts, EffectiveLimit)> {
    // The update that changes nothing takes the lock of a row that is there.
    let month: Month = diesel::sql_query(
        "INSERT INTO quota_balances AS b (user_id, month, model)
         SELECT id, to_char(now() AT TIME ZONE 'UTC', 'YYYY-MM'), '' FROM users WHERE id = $1
         ON CONFLICT (user_id, month, model) DO UPDATE SET leased = b.leased
         RETURNING month",
    )
    .bind::<SqlUuid, _>(user_id.0)
    .get_result(conn)
    .await
    .optional()?
    .ok_or(Error::UserNotFound)?;
    let period = stored("quota_balances.month", &month.month)?;
    let mut facts = facts_in_txn(user_id, period, tiers, conn).await?;
    let limit = facts.limit(tiers);
    record_in_txn(&facts, &limit, conn).await?;
    // What changes next is decided against the base that stands now.
    facts.recorded_base = Some(limit.base_to_record());
    Ok((facts, limit))
}

#[derive(QueryableByName)]
struct Month {
    #[diesel(sql_type = Text)]
    month: String,
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
    for (id, drawn) in limit.closing(facts.now) {
        diesel::update(credit_grants::table.find(id.0))
            .filter(credit_grants::closed_at.is_null())
            .set((
                credit_grants::closed_at.eq(dsl::now),
                credit_grants::drawn_tokens.eq(drawn),
            ))
            .execute(conn)
            .await?;
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
