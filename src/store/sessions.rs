use chrono::{DateTime, Utc};
use diesel::prelude::*;
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    audit::audit_insert_in_txn,
    mfa::totp_forget_unconfirmed_in_txn,
    one_time_tokens::token_delete_in_txn,
    schema::{sessions, users},
    users::UserRow,
};
use crate::{
    error::{Error, Result},
    model::{
        AuditAction, AuditEvent, Origin, Page, PageRequest, RefreshStep, Session, SessionDetails,
        SessionId, SessionStanding, TokenPurpose, UserId,
    },
};

/// A session after a refresh token was presented, and what that did.
pub struct RefreshOutcome {
    pub standing: SessionStanding,
    pub step: RefreshStep,
}

impl Store {
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
                    diesel::update(sessions::table.find(id.0))
                        .set(sessions::revoked_at.eq(now))
                        .execute(conn)
                        .await?;
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

    /// Lists a user's sessions that can still be refreshed, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn session_list(
        &self,
        user_id: UserId,
        page: &PageRequest<Uuid>,
        now: DateTime<Utc>,
    ) -> Result<Page<SessionDetails>> {
        let mut query = sessions::table
            .filter(sessions::user_id.eq(user_id.0))
            .filter(sessions::revoked_at.is_null())
            .filter(sessions::idle_expires_at.gt(now))
            .select(DetailsRow::as_select())
            .order(sessions::id.desc())
            .limit(page.size + 1)
            .into_boxed();
        if let Some(after) = page.after {
            query = query.filter(sessions::id.lt(after));
        }
        let mut conn = self.conn().await?;
        let rows: Vec<DetailsRow> = query.load(&mut conn).await?;
        let rows = rows.into_iter().map(SessionDetails::from).collect();
        Ok(Page::from_rows(rows, page, |row| row.session.id.0))
    }

    /// Ends a session of a user, and says whether it could still have been refreshed. One that had been ended
    /// before stays as it is.
    ///
    /// # Errors
    /// `SessionNotFound`, also when it is somebody else's · `Unavailable`
    pub async fn session_revoke(
        &self,
        id: SessionId,
        user_id: UserId,
        reason: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<(SessionDetails, bool)> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let own = sessions::table
                .filter(sessions::id.eq(id.0))
                .filter(sessions::user_id.eq(user_id.0));
            let revoked: Option<DetailsRow> = diesel::update(own)
                .filter(sessions::revoked_at.is_null())
                .set(sessions::revoked_at.eq(now))
                .returning(DetailsRow::as_returning())
                .get_result(conn)
                .await
                .optional()?;
            if let Some(row) = revoked {
                let mut details = json!({"user_id": user_id.to_string()});
                if !reason.is_empty() {
                    details["reason"] = reason.into();
                }
                let event = AuditEvent::new(AuditAction::SessionEnded, id.0, origin).about(user_id);
                audit_insert_in_txn(&event.with_details(details), conn).await?;
                let ends_at = row
                    .session
                    .idle_expires_at
                    .min(row.session.absolute_expires_at);
                let could_refresh = ends_at > now;
                return Ok((row.into(), could_refresh));
            }
            let ended: Option<DetailsRow> = own
                .select(DetailsRow::as_select())
                .first(conn)
                .await
                .optional()?;
            Ok((ended.ok_or(Error::SessionNotFound)?.into(), false))
        })
        .await
    }

    /// Ends all sessions of a user but `kept`; returns how many could still have been refreshed.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn session_revoke_all(
        &self,
        user_id: UserId,
        kept: Option<SessionId>,
        reason: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<usize> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            totp_forget_unconfirmed_in_txn(user_id, conn).await?;
            let ended = session_revoke_all_in_txn(user_id, kept, now, conn).await?;
            if ended > 0 {
                let details = json!({
                    "count": ended,
                    "kept": kept.map(|id| id.to_string()),
                    "reason": reason,
                });
                let event = AuditEvent::of_user(AuditAction::SessionsEnded, user_id, origin);
                audit_insert_in_txn(&event.with_details(details), conn).await?;
            }
            Ok(ended)
        })
        .await
    }
}

/// See [`Store::session_revoke_all`]; writes no event. The wish for another address ends as well: whoever
/// asked for it may be who is to be kept out.
pub(super) async fn session_revoke_all_in_txn(
    user_id: UserId,
    kept: Option<SessionId>,
    now: DateTime<Utc>,
    conn: &mut AsyncPgConnection,
) -> Result<usize> {
    token_delete_in_txn(user_id, TokenPurpose::ChangeEmail, conn).await?;
    // Locked in the order of their ids, so that racing calls do not wait for each other in a circle.
    let live: Vec<(Uuid, DateTime<Utc>)> = sessions::table
        .filter(sessions::user_id.eq(user_id.0))
        .filter(sessions::revoked_at.is_null())
        .filter(sessions::absolute_expires_at.gt(now))
        .select((sessions::id, sessions::idle_expires_at))
        .order(sessions::id)
        .for_no_key_update()
        .load(conn)
        .await?;
    let doomed = live
        .into_iter()
        .filter(|(id, _)| kept.is_none_or(|kept| kept.0 != *id));
    let (ids, lapses): (Vec<Uuid>, Vec<DateTime<Utc>>) = doomed.unzip();
    diesel::update(sessions::table.filter(sessions::id.eq_any(ids)))
        .set(sessions::revoked_at.eq(now))
        .execute(conn)
        .await?;
    Ok(lapses.iter().filter(|lapses| **lapses > now).count())
}

/// Names the user too: the trail outlives the session's row.
async fn session_audit_in_txn(
    action: AuditAction,
    id: SessionId,
    user: UserId,
    origin: &Origin,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let event = AuditEvent::new(action, id.0, origin)
        .about(user)
        .with_details(json!({"user_id": user.to_string()}));
    audit_insert_in_txn(&event, conn).await
}

/// A session with its user.
pub(super) fn standing(session: SessionRow, user: UserRow) -> Result<SessionStanding> {
    Ok(SessionStanding {
        session: session.into(),
        user: user.try_into()?,
    })
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = sessions, check_for_backend(diesel::pg::Pg))]
pub(super) struct SessionRow {
    id: Uuid,
    user_id: Uuid,
    counter: i64,
    rotated_at: DateTime<Utc>,
    idle_expires_at: DateTime<Utc>,
    absolute_expires_at: DateTime<Utc>,
    revoked_at: Option<DateTime<Utc>>,
    mfa: bool,
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
            mfa: row.mfa,
        }
    }
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = sessions, check_for_backend(diesel::pg::Pg))]
struct DetailsRow {
    #[diesel(embed)]
    session: SessionRow,
    created_at: DateTime<Utc>,
    last_used_at: DateTime<Utc>,
    user_agent: String,
    address: Option<String>,
}

impl From<DetailsRow> for SessionDetails {
    fn from(row: DetailsRow) -> Self {
        Self {
            session: row.session.into(),
            created_at: row.created_at,
            last_used_at: row.last_used_at,
            user_agent: row.user_agent,
            address: row.address.and_then(|address| address.parse().ok()),
        }
    }
}
