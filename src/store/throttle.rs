//! Failed attempts to log in or register, by what they count against.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, SubsecRound as _, Utc};
use diesel::{
    dsl::{self, exists, sql},
    prelude::*,
    sql_types::{Array, Bool, Nullable, Text, Timestamptz},
    upsert::excluded,
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};

use super::{
    Store,
    schema::{login_throttle, sessions},
};
use crate::{
    error::{Error, Result},
    model::{ThrottleCharge, ThrottleRule, ThrottleState, UserId},
};

impl Store {
    /// What is known of each of these, if anything is.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn throttle_states(
        &self,
        subjects: &[String],
    ) -> Result<HashMap<String, ThrottleState>> {
        let mut conn = self.conn().await?;
        let rows: Vec<ThrottleRow> = login_throttle::table
            .filter(login_throttle::subject.eq_any(subjects))
            .select(ThrottleRow::as_select())
            .load(&mut conn)
            .await?;
        let states = rows
            .into_iter()
            .map(|row| (row.subject.clone(), row.into()));
        Ok(states.collect())
    }

    /// Takes the one attempt that may be made now: nothing more is tried before `until`. Whether it was
    /// free to take; what is blocked beyond `latest` is.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn throttle_claim(
        &self,
        subject: &str,
        until: DateTime<Utc>,
        latest: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> Result<bool> {
        let blocked_until = login_throttle::blocked_until;
        let mut conn = self.conn().await?;
        let claimed = diesel::update(login_throttle::table.find(subject))
            .filter(blocked_until.le(now).or(blocked_until.gt(latest)))
            .set(blocked_until.eq(until))
            .execute(&mut conn)
            .await?;
        Ok(claimed == 1)
    }

    /// Gives back what [`Store::throttle_claim`] took, as long as nothing came after it.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn throttle_unclaim(
        &self,
        subject: &str,
        until: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> Result<()> {
        let mut conn = self.conn().await?;
        diesel::update(login_throttle::table.find(subject))
            .filter(login_throttle::blocked_until.eq(until))
            .set(login_throttle::blocked_until.eq(now))
            .execute(&mut conn)
            .await?;
        Ok(())
    }

    /// Counts a failure against each of these, by their rules.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn throttle_fail(
        &self,
        subjects: &[(String, ThrottleRule)],
        now: DateTime<Utc>,
    ) -> Result<()> {
        let mut subjects: Vec<_> = subjects.iter().collect();
        // Locked in one order by all, so that none wait for each other in a circle.
        subjects.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            for (subject, rule) in subjects {
                let first = ThrottleRow::new(subject, rule.after_failure(None, now));
                let is_first = diesel::insert_into(login_throttle::table)
                    .values(&first)
                    .on_conflict_do_nothing()
                    .execute(conn)
                    .await?;
                if is_first == 1 {
                    continue;
                }
                let row = login_throttle::table.find(subject);
                let known: Option<ThrottleRow> = row
                    .select(ThrottleRow::as_select())
                    .for_update()
                    .first(conn)
                    .await
                    .optional()?;
                // Swept or cleared this moment: nothing was known that mattered.
                let Some(known) = known else { continue };
                let next = rule.after_failure(Some(&known.into()), now);
                diesel::update(row)
                    .set(ThrottleRow::new(subject, next))
                    .execute(conn)
                    .await?;
            }
            Ok(())
        })
        .await
    }

    /// Counts an attempt against each of these before it is made, unless one of them waits: whoever races
    /// finds it counted, wherever they come from and on whichever replica.
    ///
    /// # Errors
    /// `Throttled`: nothing was counted · `Unavailable`
    pub async fn throttle_charge(
        &self,
        subjects: &[(String, ThrottleRule)],
        now: DateTime<Utc>,
    ) -> Result<Vec<(String, ThrottleCharge)>> {
        // As it will be read again.
        let now = now.trunc_subsecs(6);
        let mut subjects: Vec<_> = subjects.iter().collect();
        subjects.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let mut charges = Vec::new();
            for (subject, rule) in subjects {
                let nothing = ThrottleState {
                    failures: 0,
                    last_failed_at: now,
                    blocked_until: now,
                };
                // Locked, whether it was there or not.
                let row: ThrottleRow = diesel::insert_into(login_throttle::table)
                    .values(ThrottleRow::new(subject, nothing))
                    .on_conflict(login_throttle::subject)
                    .do_update()
                    .set(login_throttle::subject.eq(excluded(login_throttle::subject)))
                    .returning(ThrottleRow::as_returning())
                    .get_result(conn)
                    .await?;
                let before = row.into();
                // While some are free, a clock that is a little behind is no reason to wait.
                if rule.is_spent(&before, now)
                    && let Some(retry_after) = rule.wait(&before, now)
                {
                    return Err(Error::Throttled { retry_after });
                }
                let after = rule.after_failure(Some(&before), now);
                diesel::update(login_throttle::table.find(subject))
                    .set(ThrottleRow::new(subject, after))
                    .execute(conn)
                    .await?;
                charges.push((subject.clone(), ThrottleCharge { before, after }));
            }
            Ok(charges)
        })
        .await
    }

    /// Gives back what [`Store::throttle_charge`] counted, for it did not fail. What failed before and since
    /// still counts.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn throttle_give_back(&self, charges: &[(String, ThrottleCharge)]) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            // In the order in which they were locked before.
            for (subject, charge) in charges {
                let row = login_throttle::table.find(subject);
                let known: Option<ThrottleRow> = row
                    .select(ThrottleRow::as_select())
                    .for_update()
                    .first(conn)
                    .await
                    .optional()?;
                let Some(known) = known else { continue };
                let next = charge.given_back(&known.into());
                if next.failures == 0 {
                    diesel::delete(row).execute(conn).await?;
                } else {
                    let next = ThrottleRow::new(subject, next);
                    diesel::update(row).set(next).execute(conn).await?;
                }
            }
            Ok(())
        })
        .await
    }

    /// Forgets all failures against something.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn throttle_clear(&self, subject: &str) -> Result<()> {
        let mut conn = self.conn().await?;
        diesel::delete(login_throttle::table.find(subject))
            .execute(&mut conn)
            .await?;
        Ok(())
    }

    /// Forgets up to `limit` of those against which nothing failed since `before`; returns how many.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn throttle_sweep(&self, before: DateTime<Utc>, limit: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        let old: Vec<String> = login_throttle::table
            .filter(login_throttle::blocked_until.lt(before))
            .select(login_throttle::subject)
            .limit(limit)
            .load(&mut conn)
            .await?;
        let old = login_throttle::table
            .filter(login_throttle::subject.eq_any(old))
            // What failed meanwhile stays.
            .filter(login_throttle::blocked_until.lt(before));
        Ok(diesel::delete(old).execute(&mut conn).await?)
    }

    /// Whether a user has logged in from one of these networks, `by_mfa` if that is to be so: some session
    /// of theirs says so.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn session_any_from(
        &self,
        user_id: UserId,
        networks: &[String],
        by_mfa: bool,
    ) -> Result<bool> {
        let by_what: &[bool] = if by_mfa { &[true] } else { &[true, false] };
        let is_from = sql::<Nullable<Bool>>("address::inet <<= ANY(")
            .bind::<Array<Text>, _>(networks)
            .sql("::inet[])");
        let from = sessions::table
            .filter(sessions::user_id.eq(user_id.0))
            .filter(sessions::mfa.eq_any(by_what))
            .filter(is_from);
        let mut conn = self.conn().await?;
        Ok(diesel::select(exists(from.select(sessions::id)))
            .get_result(&mut conn)
            .await?)
    }
}

/// Counts once against each of these by their rules, unless it is too soon for one of them: how long that
/// goes on is the answer, and nothing is counted then. They are locked until the end of the transaction.
pub(super) async fn throttle_take_in_txn(
    subjects: &[(String, ThrottleRule)],
    conn: &mut AsyncPgConnection,
) -> Result<Option<Duration>> {
    let mut subjects: Vec<_> = subjects.iter().collect();
    // Locked in one order by all, so that none wait for each other in a circle.
    subjects.sort_by(|(one, _), (other, _)| one.cmp(other));
    let at: DateTime<Utc> = diesel::select(dsl::now.into_sql::<Timestamptz>())
        .get_result(conn)
        .await?;
    let (mut states, mut wait) = (Vec::new(), None);
    for (subject, rule) in subjects {
        let nothing = ThrottleState {
            failures: 0,
            last_failed_at: at,
            blocked_until: at,
        };
        diesel::insert_into(login_throttle::table)
            .values(&ThrottleRow::new(subject, nothing))
            .on_conflict_do_nothing()
            .execute(conn)
            .await?;
        let known: Option<ThrottleRow> = login_throttle::table
            .find(subject)
            .select(ThrottleRow::as_select())
            .for_update()
            .first(conn)
            .await
            .optional()?;
        // Swept this moment: nothing was known that mattered.
        let state = known.map_or(nothing, ThrottleState::from);
        wait = wait.max(rule.wait(&state, at));
        states.push((subject, rule.after_failure(Some(&state), at)));
    }
    if wait.is_some() {
        return Ok(wait);
    }
    for (subject, state) in states {
        diesel::update(login_throttle::table.find(subject))
            .set(ThrottleRow::new(subject, state))
            .execute(conn)
            .await?;
    }
    Ok(None)
}

/// Forgets all failures against a user, wherever they were made.
pub(super) async fn throttle_clear_user_in_txn(
    id: UserId,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    clear_in_txn(
        id,
        &[
            "own",
            "user",
            "mail",
            "mfa",
            "own mfa",
            "recovery",
            "own recovery",
        ],
        conn,
    )
    .await
}

/// Forgets wrong passwords of a user and the mails that went, and not wrong codes: those are many guesses of few, and whoever may
/// change a user must not buy more of them.
pub(super) async fn throttle_clear_passwords_in_txn(
    id: UserId,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    clear_in_txn(id, &["own", "user", "mail"], conn).await
}

async fn clear_in_txn(id: UserId, kinds: &[&str], conn: &mut AsyncPgConnection) -> Result<()> {
    let subjects: Vec<_> = kinds.iter().map(|kind| format!("{kind} {id}")).collect();
    let patterns: Vec<_> = subjects.iter().map(|one| format!("{one} %")).collect();
    // Locked in the order in which attempts are counted.
    diesel::sql_query(
        "WITH known AS MATERIALIZED (
             SELECT subject FROM login_throttle WHERE subject = ANY($1) OR subject LIKE ANY($2)
             ORDER BY subject FOR UPDATE
         )
         DELETE FROM login_throttle WHERE subject IN (SELECT subject FROM known)",
    )
    .bind::<Array<Text>, _>(subjects)
    .bind::<Array<Text>, _>(patterns)
    .execute(conn)
    .await?;
    Ok(())
}

#[derive(Queryable, Selectable, Insertable, AsChangeset)]
#[diesel(table_name = login_throttle, check_for_backend(diesel::pg::Pg))]
pub(super) struct ThrottleRow {
    pub(super) subject: String,
    failures: i32,
    last_failed_at: DateTime<Utc>,
    blocked_until: DateTime<Utc>,
}

impl ThrottleRow {
    fn new(subject: &str, state: ThrottleState) -> Self {
        Self {
            subject: subject.to_owned(),
            failures: i32::try_from(state.failures).unwrap_or(i32::MAX),
            last_failed_at: state.last_failed_at,
            blocked_until: state.blocked_until,
        }
    }
}

impl From<ThrottleRow> for ThrottleState {
    fn from(row: ThrottleRow) -> Self {
        Self {
            failures: u32::try_from(row.failures).unwrap_or(0),
            last_failed_at: row.last_failed_at,
            blocked_until: row.blocked_until,
        }
    }
}
