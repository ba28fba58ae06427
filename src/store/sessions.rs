use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    audit::audit_insert_in_txn,
    schema::{sessions, users},
    users::UserRow,
};
use crate::{
    error::{Error, Result},
    model::{
        AuditAction, AuditEvent, Origin, RefreshStep, Session, SessionId, SessionStanding, UserId,
    },
};

/// A login to record.
pub struct NewSession<'a> {
    pub id: SessionId,
    pub user_id: UserId,
    pub idle_expires_at: DateTime<Utc>,
    pub absolute_expires_at: DateTime<Utc>,
    /// Takes the place of the user's hash when that is weaker than the configured scheme.
    pub rehashed_password: Option<String>,
    pub origin: &'a Origin,
}

/// A session after a refresh token was presented, and what that did.
pub struct RefreshOutcome {
    pub standing: SessionStanding,
    pub step: RefreshStep,
}

impl Store {
    /// Opens a session, marks the login and replaces an outdated hash, together.
    ///
    /// `checked_hash` is the hash that the password was checked against: should it have changed
    /// meanwhile, the login does not count.
    ///
    /// # Errors
    /// `InvalidCredentials` · `AccountDisabled` · `Unavailable`
    pub async fn session_open(
        &self,
        new: NewSession<'_>,
        checked_hash: &str,
        now: DateTime<Utc>,
    ) -> Result<SessionStanding> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let rehashed = new.rehashed_password.as_deref();
            let user: UserRow = diesel::update(users::table)
                .filter(
                    users::id
                        .eq(new.user_id.0)
                        .and(users::password_hash.eq(checked_hash)),
                )
                .set((
                    users::last_login_at.eq(now),
                    users::password_hash.eq(rehashed.unwrap_or(checked_hash)),
                ))
                .returning(UserRow::as_returning())
                .get_result(conn)
                .await
                .optional()?
                .ok_or(Error::InvalidCredentials)?;
            let row = NewSessionRow {
                id: new.id.0,
                user_id: new.user_id.0,
                rotated_at: now,
                created_at: now,
                last_used_at: now,
                idle_expires_at: new.idle_expires_at,
                absolute_expires_at: new.absolute_expires_at,
                user_agent: &new.origin.user_agent,
                address: new.origin.address.map(|address| address.to_string()),
            };
            let session: SessionRow = diesel::insert_into(sessions::table)
                .values(row)
                .returning(SessionRow::as_returning())
                .get_result(conn)
                .await?;
            session_audit_in_txn(
                AuditAction::SessionOpened,
                new.id,
                new.user_id,
                new.origin,
                conn,
            )
            .await?;
            if rehashed.is_some() {
                let action = AuditAction::PasswordRehashed;
                let event = AuditEvent::new(action, new.user_id.0, new.origin);
                audit_insert_in_txn(&event, conn).await?;
            }
            let standing = standing(session, user)?;
            if !standing.user.is_active {
                return Err(Error::AccountDisabled);
            }
            Ok(standing)
        })
        .await
    }

    /// The session and its user as they stand now; `None` when there is no such session.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn session_standing(&self, id: SessionId) -> Result<Option<SessionStanding>> {
        let mut conn = self.conn().await?;
        let found: Option<(SessionRow, UserRow)> = sessions::table
            .inner_join(users::table)
            .filter(sessions::id.eq(id.0))
            .select((SessionRow::as_select(), UserRow::as_select()))
            .first(&mut conn)
            .await
            .optional()?;
        found
            .map(|(session, user)| standing(session, user))
            .transpose()
    }

    /// Presents a refresh token: `decide` says, from the session as it stands under a lock, what
    /// that does; it is done. `None` when there is no such session.
    ///
    /// The answer holds the session as it is after the step.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn session_refresh(
        &self,
        id: SessionId,
        origin: &Origin,
        decide: impl FnOnce(&SessionStanding) -> RefreshStep + Send,
        now: DateTime<Utc>,
    ) -> Result<Option<RefreshOutcome>> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let locked: Option<SessionRow> = sessions::table
                .find(id.0)
                .select(SessionRow::as_select())
                .for_update()
                .first(conn)
                .await
                .optional()?;
            let Some(session) = locked else {
                return Ok(None);
            };
            let user: UserRow = users::table
                .find(session.user_id)
                .select(UserRow::as_select())
                .first(conn)
                .await?;
            let mut standing = standing(session, user)?;
            let step = decide(&standing);
            match step {
                RefreshStep::Advance { idle_expires_at } => {
                    // Read back: the database keeps microseconds, and a retry must answer the same.
                    let advanced: SessionRow = diesel::update(sessions::table.find(id.0))
                        .set((
                            sessions::counter.eq(sessions::counter + 1),
                            sessions::rotated_at.eq(now),
                            sessions::last_used_at.eq(now),
                            sessions::idle_expires_at.eq(idle_expires_at),
                        ))
                        .returning(SessionRow::as_returning())
                        .get_result(conn)
                        .await?;
                    standing.session = advanced.into();
                }
                RefreshStep::Revoke => {
                    standing.session.revoked_at = Some(now);
                    session_revoke_in_txn(id, now, conn).await?;
                    let action = AuditAction::RefreshTokenReused;
                    session_audit_in_txn(action, id, standing.user.id, origin, conn).await?;
                }
                RefreshStep::Repeat | RefreshStep::Refuse(_) => {}
            }
            Ok(Some(RefreshOutcome { standing, step }))
        })
        .await
    }

    /// Deletes up to `limit` sessions that ended for good before `before`; returns how many.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn session_sweep(&self, before: DateTime<Utc>, limit: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let ended: Vec<Uuid> = sessions::table
                .filter(sessions::absolute_expires_at.lt(before))
                .select(sessions::id)
                .limit(limit)
                .load(conn)
                .await?;
            let ended = sessions::table.filter(sessions::id.eq_any(ended));
            Ok(diesel::delete(ended).execute(conn).await?)
        })
        .await
    }

    /// Ends a session. Ending it again changes nothing.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn session_revoke(
        &self,
        id: SessionId,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            if let Some(user) = session_revoke_in_txn(id, now, conn).await? {
                let action = AuditAction::SessionEnded;
                session_audit_in_txn(action, id, user, origin, conn).await?;
            }
            Ok(())
        })
        .await
    }
}

/// Whose session it was, if it was not revoked before.
async fn session_revoke_in_txn(
    id: SessionId,
    now: DateTime<Utc>,
    conn: &mut AsyncPgConnection,
) -> Result<Option<UserId>> {
    let user_id: Option<Uuid> = diesel::update(sessions::table.find(id.0))
        .filter(sessions::revoked_at.is_null())
        .set(sessions::revoked_at.eq(now))
        .returning(sessions::user_id)
        .get_result(conn)
        .await
        .optional()?;
    Ok(user_id.map(UserId))
}

/// Names the user too: the trail outlives the session's row.
async fn session_audit_in_txn(
    action: AuditAction,
    id: SessionId,
    user: UserId,
    origin: &Origin,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let event =
        AuditEvent::new(action, id.0, origin).with_details(json!({"user_id": user.to_string()}));
    audit_insert_in_txn(&event, conn).await
}

fn standing(session: SessionRow, user: UserRow) -> Result<SessionStanding> {
    Ok(SessionStanding {
        session: session.into(),
        user: user.try_into()?,
    })
}

#[derive(Insertable)]
#[diesel(table_name = sessions, treat_none_as_default_value = false)]
struct NewSessionRow<'a> {
    id: Uuid,
    user_id: Uuid,
    rotated_at: DateTime<Utc>,
    created_at: DateTime<Utc>,
    last_used_at: DateTime<Utc>,
    idle_expires_at: DateTime<Utc>,
    absolute_expires_at: DateTime<Utc>,
    user_agent: &'a str,
    address: Option<String>,
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = sessions, check_for_backend(diesel::pg::Pg))]
struct SessionRow {
    id: Uuid,
    user_id: Uuid,
    counter: i64,
    rotated_at: DateTime<Utc>,
    idle_expires_at: DateTime<Utc>,
    absolute_expires_at: DateTime<Utc>,
    revoked_at: Option<DateTime<Utc>>,
}

impl From<SessionRow> for Session {
    fn from(row: SessionRow) -> Self {
        Self {
            id: SessionId(row.id),
            user_id: UserId(row.user_id),
            counter: row.counter,
            rotated_at: row.rotated_at,
            idle_expires_at: row.idle_expires_at,
            absolute_expires_at: row.absolute_expires_at,
            revoked_at: row.revoked_at,
        }
    }
}
