//! The end of users: what goes at once, and what is looked for afterwards.
//!
//! A trail and usage records can be long, and more may still come: what was under way, reservations that
//! are committed late, acts of replicas from before. So the deletion leaves a note, and upkeep looks all
//! of it through, part by part, again and again until nothing can come any more.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::{
    dsl::now,
    prelude::*,
    sql_types::{BigInt, Nullable, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    administrators::another_admin_in_txn,
    audit::audit_insert_in_txn,
    errors::stored,
    mails::mails_forget_in_txn,
    schema::{api_keys, sessions, user_erasures, users},
    throttle::throttle_clear_user_in_txn,
};
use crate::{
    error::{Error, Result},
    model::{AuditAction, AuditEvent, ErasureStep, Origin, Role, UserId},
};

/// Users whose traces are looked for in one transaction.
const USERS_AT_ONCE: i64 = 100;

/// Sessions that are deleted in one transaction: each is told to all replicas.
const SESSIONS_AT_ONCE: i64 = 5000;

impl Store {
    /// Deletes a user with all that belongs to the account, and notes that traces are to be looked for by
    /// [`Store::user_erase`]. More sessions than go in one transaction go before, of a user who is turned
    /// off first: should it end halfway, it is to be called again, and goes on from there. What was used stays, under an id that means nobody. `reason` is for the
    /// audit trail, which stays too.
    ///
    /// # Errors
    /// `UserNotFound` · `LastAdmin` · `Unavailable`
    pub async fn user_delete(&self, id: UserId, reason: &str, origin: &Origin) -> Result<()> {
        while self.user_thin_out(id, reason, origin).await? {}
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            lock_in_txn(id, conn).await?;
            // Sessions, keys, override and credits go along.
            diesel::delete(users::table.find(id.0))
                .execute(conn)
                .await?;
            throttle_clear_user_in_txn(id, conn).await?;
            mails_forget_in_txn(id, conn).await?;
            diesel::insert_into(user_erasures::table)
                .values(user_erasures::user_id.eq(id.0))
                .execute(conn)
                .await?;
            let unseen;
            let origin = match origin.actor.id() {
                Some(actor) if actor == id.0 => {
                    unseen = origin.unseen();
                    &unseen
                }
                _ => origin,
            };
            let event = AuditEvent::of_user(AuditAction::UserDeleted, id, origin)
                .with_details(json!({"reason": reason}));
            audit_insert_in_txn(&event, conn).await
        })
        .await
    }

    /// Deletes some sessions of a user who has too many to be deleted with; whether there may be more.
    async fn user_thin_out(&self, id: UserId, reason: &str, origin: &Origin) -> Result<bool> {
        let of_user = sessions::table.filter(sessions::user_id.eq(id.0));
        let some = of_user
            .select(sessions::id)
            .order(sessions::id)
            .limit(SESSIONS_AT_ONCE);
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let is_active = lock_user_in_txn(id, conn).await?;
            let seen: Vec<Uuid> = some.load(conn).await?;
            if i64::try_from(seen.len()).is_ok_and(|seen| seen < SESSIONS_AT_ONCE) {
                return Ok(false);
            }
            if is_active {
                diesel::update(users::table.find(id.0))
                    .set((users::is_active.eq(false), users::updated_at.eq(now)))
                    .execute(conn)
                    .await?;
                let event = AuditEvent::of_user(AuditAction::UserDisabled, id, origin)
                    .with_details(json!({"reason": reason}));
                audit_insert_in_txn(&event, conn).await?;
            }
            // In the order that others lock them in.
            let locked: Vec<Uuid> = some.for_update().load(conn).await?;
            diesel::delete(sessions::table.filter(sessions::id.eq_any(locked)))
                .execute(conn)
                .await?;
            Ok(true)
        })
        .await
    }

    /// Looks through about `limit` rows in search of deleted users: blanks from where they acted and how
    /// they named their keys in the trail, and the request ids and labels of their usage records. Each
    /// user is looked for again after as long as the deletion is ago, an hour at least and a day at most;
    /// once it is `keep` ago, their usage records are deleted, and the note of the deletion with them.
    /// Returns how much was done; 0: nothing is due. Replicas share the work.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn user_erase(&self, keep: TimeDelta, limit: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let due: Vec<(Erasure, DateTime<Utc>)> = user_erasures::table
                .filter(user_erasures::due_at.le(now))
                .select((Erasure::as_select(), now.into_sql::<Timestamptz>()))
                .order(user_erasures::due_at)
                .limit(USERS_AT_ONCE)
                .for_update()
                .skip_locked()
                .load(conn)
                .await?;
            let mut left = limit;
            let mut done = 0;
            for (erasure, at) in due {
                if left <= 0 {
                    break;
                }
                done += 1;
                left = erasure.go_on(keep, left, at, conn).await?;
            }
            Ok(done)
        })
        .await
    }
}

/// Locks a user, unless that is the last administrator; whether they are active.
async fn lock_user_in_txn(id: UserId, conn: &mut AsyncPgConnection) -> Result<bool> {
    let (role, is_active): (String, bool) = users::table
        .find(id.0)
        .select((users::role, users::is_active))
        .for_update()
        .first(conn)
        .await
        .optional()?
        .ok_or(Error::UserNotFound)?;
    if is_active && role == Role::Admin.as_str() {
        another_admin_in_txn(id, conn).await?;
    }
    Ok(is_active)
}

/// Locks a user, unless that is the last administrator, and what refers to them, each in the order that
/// others lock it in, so that nobody waits in a circle. Whoever comes later finds nobody.
async fn lock_in_txn(id: UserId, conn: &mut AsyncPgConnection) -> Result<()> {
    lock_user_in_txn(id, conn).await?;
    sessions::table
        .filter(sessions::user_id.eq(id.0))
        .select(sessions::id)
        .order(sessions::id)
        .for_update()
        .load::<Uuid>(conn)
        .await?;
    api_keys::table
        .filter(api_keys::user_id.eq(id.0))
        .select(api_keys::id)
        .order(api_keys::id)
        .for_update()
        .load::<Uuid>(conn)
        .await?;
    Ok(())
}

/// How far the search for a user's traces is.
#[derive(Queryable, Selectable)]
#[diesel(table_name = user_erasures, check_for_backend(diesel::pg::Pg))]
struct Erasure {
    user_id: Uuid,
    deleted_at: DateTime<Utc>,
    step: String,
    after_at: Option<DateTime<Utc>>,
    after_id: Option<Uuid>,
}

/// What a statement looked through.
#[derive(QueryableByName)]
struct Seen {
    #[diesel(sql_type = BigInt)]
    rows: i64,
    #[diesel(sql_type = Nullable<Timestamptz>)]
    last_at: Option<DateTime<Utc>>,
    #[diesel(sql_type = Nullable<SqlUuid>)]
    last_id: Option<Uuid>,
}

impl Erasure {
    /// Goes on until the search is over or `limit` rows are looked through; returns how many of those
    /// are left.
    async fn go_on(
        self,
        keep: TimeDelta,
        limit: i64,
        at: DateTime<Utc>,
        conn: &mut AsyncPgConnection,
    ) -> Result<i64> {
        let is_last = self.deleted_at + keep < at;
        let mut step: ErasureStep = stored("user_erasures.step", &self.step)?;
        let mut after = self.after_at.zip(self.after_id);
        let mut left = limit;
        loop {
            let seen = self.look(step, after, left, conn).await?;
            if seen.rows >= left {
                let note = user_erasures::table.find(self.user_id);
                diesel::update(note)
                    .set((
                        user_erasures::step.eq(step.as_str()),
                        user_erasures::after_at.eq(seen.last_at),
                        user_erasures::after_id.eq(seen.last_id),
                    ))
                    .execute(conn)
                    .await?;
                return Ok(0);
            }
            left -= seen.rows;
            after = None;
            match step.next(is_last) {
                Some(next) => step = next,
                None => break,
            }
        }
        // Some of what counts against a user holds an address.
        throttle_clear_user_in_txn(UserId(self.user_id), conn).await?;
        // Asked for beside the deletion.
        mails_forget_in_txn(UserId(self.user_id), conn).await?;
        let note = user_erasures::table.find(self.user_id);
        if is_last {
            diesel::delete(note).execute(conn).await?;
            return Ok(left);
        }
        let again = ErasureStep::again_in(at - self.deleted_at);
        diesel::update(note)
            .set((
                user_erasures::due_at.eq(at + again),
                user_erasures::step.eq(ErasureStep::FIRST.as_str()),
                user_erasures::after_at.eq(None::<DateTime<Utc>>),
                user_erasures::after_id.eq(None::<Uuid>),
            ))
            .execute(conn)
            .await?;
        Ok(left)
    }

    /// Looks through up to `limit` rows behind `after`, in the order of their times.
    async fn look(
        &self,
        step: ErasureStep,
        after: Option<(DateTime<Utc>, Uuid)>,
        limit: i64,
        conn: &mut AsyncPgConnection,
    ) -> Result<Seen> {
        let first = (DateTime::UNIX_EPOCH, Uuid::nil());
        let statement = match step {
            ErasureStep::TrailAbout => BLANK_TRAIL_ABOUT,
            ErasureStep::TrailBy => BLANK_TRAIL_BY,
            ErasureStep::Usage => BLANK_USAGE,
            ErasureStep::UsageEnd => DELETE_USAGE,
        };
        let (at, id) = after.unwrap_or(first);
        let seen = diesel::sql_query(statement)
            .bind::<SqlUuid, _>(self.user_id)
            .bind::<BigInt, _>(limit)
            .bind::<Timestamptz, _>(at)
            .bind::<SqlUuid, _>(id);
        Ok(seen.get_result(conn).await?)
    }
}

/// Logins and the registration are the acts of somebody anonymous; who else acted is somebody else, or
/// found by [`BLANK_TRAIL_BY`].
const BLANK_TRAIL_ABOUT: &str = "
    WITH seen AS (
        SELECT occurred_at, id FROM audit_events
        WHERE user_id = $1 AND (occurred_at, id) > ($3, $4)
        ORDER BY occurred_at, id LIMIT $2
    ), blanked AS (
        UPDATE audit_events AS e SET
            address = CASE WHEN actor_kind <> 'anonymous' THEN address END,
            user_agent = CASE WHEN actor_kind <> 'anonymous' THEN user_agent ELSE '' END,
            details = CASE WHEN action LIKE 'api\\_key.%' THEN details - 'name' ELSE details END
        FROM seen
        WHERE e.user_id = $1 AND e.occurred_at = seen.occurred_at AND e.id = seen.id
            AND (actor_kind = 'anonymous' AND (address IS NOT NULL OR user_agent <> '')
                OR action LIKE 'api\\_key.%' AND details ? 'name')
    )
    SELECT count(*) AS rows, max(occurred_at) AS last_at,
        (array_agg(id ORDER BY occurred_at DESC, id DESC))[1] AS last_id
    FROM seen";

const BLANK_TRAIL_BY: &str = "
    WITH seen AS (
        SELECT occurred_at, id FROM audit_events
        WHERE actor_id = $1 AND (occurred_at, id) > ($3, $4)
        ORDER BY occurred_at, id LIMIT $2
    ), blanked AS (
        UPDATE audit_events AS e SET address = NULL, user_agent = ''
        FROM seen
        WHERE e.actor_id = $1 AND e.occurred_at = seen.occurred_at AND e.id = seen.id
            AND (address IS NOT NULL OR user_agent <> '')
    )
    SELECT count(*) AS rows, max(occurred_at) AS last_at,
        (array_agg(id ORDER BY occurred_at DESC, id DESC))[1] AS last_id
    FROM seen";

/// The rows stay for a while: what is sent again is known by their keys.
const BLANK_USAGE: &str = "
    WITH seen AS (
        SELECT usage_month, event_id, occurred_at FROM usage_records
        WHERE usage_bucket(user_id) = usage_bucket($1) AND user_id = $1
            AND (occurred_at, event_id) > ($3, $4)
        ORDER BY occurred_at, event_id LIMIT $2
    ), blanked AS (
        UPDATE usage_records AS r SET request_id = '', labels = '{}'
        FROM seen
        WHERE usage_bucket(r.user_id) = usage_bucket($1) AND r.user_id = $1
            AND r.usage_month = seen.usage_month AND r.event_id = seen.event_id
            AND (request_id <> '' OR labels <> '{}')
    )
    SELECT count(*) AS rows, max(occurred_at) AS last_at,
        (array_agg(event_id ORDER BY occurred_at DESC, event_id DESC))[1] AS last_id
    FROM seen";

const DELETE_USAGE: &str = "
    WITH seen AS (
        SELECT usage_month, event_id, occurred_at FROM usage_records
        WHERE usage_bucket(user_id) = usage_bucket($1) AND user_id = $1
            AND (occurred_at, event_id) > ($3, $4)
        ORDER BY occurred_at, event_id LIMIT $2
    ), deleted AS (
        DELETE FROM usage_records AS r USING seen
        WHERE usage_bucket(r.user_id) = usage_bucket($1) AND r.user_id = $1
            AND r.usage_month = seen.usage_month AND r.event_id = seen.event_id
    )
    SELECT count(*) AS rows, max(occurred_at) AS last_at,
        (array_agg(event_id ORDER BY occurred_at DESC, event_id DESC))[1] AS last_id
    FROM seen";
