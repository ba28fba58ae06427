//! Mails to people and the tokens in them. A mail waits in the outbox, written in the transaction that
//! has it sent, and is composed when it is sent; its secret is in neither table.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{exists, now, sql},
    prelude::*,
    sql_types::{BigInt, Binary, Nullable, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    audit::audit_insert_in_txn,
    errors::{on_unique, stored},
    schema::{one_time_tokens, outbox, sessions, users},
    sessions::session_revoke_all_in_txn,
    throttle::throttle_take_in_txn,
    users::{LOWER_EMAIL, UserRow},
};
use crate::{
    error::{Error, Result},
    model::{
        AuditAction, AuditEvent, Email, MailDetails, MailKind, MailNote, MailedToken,
        OneTimeTokenId, Origin, SessionStanding, ThrottleRule, TokenPurpose, User, UserId,
    },
};

/// A token to mail. Not `Debug`, as nothing that holds a hash.
pub struct NewToken {
    pub id: OneTimeTokenId,
    /// SHA-256 of its text.
    pub hash: Vec<u8>,
    pub purpose: TokenPurpose,
    pub ttl: Duration,
    /// What the mail counts against, and how often one may go.
    pub limits: Vec<(String, ThrottleRule)>,
}

/// What became of the wish for a mail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mailing {
    Queued,
    /// One went a moment ago; another may in so long.
    TooSoon(Duration),
}

impl Store {
    /// Queues the mail with which a password is set, and makes its token. Where nobody is to have one
    /// (an address that nobody has, an account that is disabled or has no password), the same is
    /// written for `nobody`, and sent to nobody. Too soon after another, nothing is.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn reset_request(&self, email: &Email, nobody: UserId, new: &NewToken) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let known: Option<(Uuid, String)> = users::table
                .filter(sql::<Text>(LOWER_EMAIL).eq(email.as_str().to_ascii_lowercase()))
                .filter(users::is_active)
                .filter(users::password_hash.is_not_null())
                .select((users::id, users::email))
                .first(conn)
                .await
                .optional()?;
            if throttle_take_in_txn(&new.limits, conn).await?.is_some() {
                return Ok(());
            }
            // As the account has it: the caller may have spelt it otherwise.
            let (id, address) = known.unwrap_or((nobody.0, email.to_string()));
            mail_token_in_txn(UserId(id), &address, new, MailKind::Reset, conn).await
        })
        .await
    }

    /// Queues the mail with which a user proves the address of the account.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn verification_request(&self, user: &User, new: &NewToken) -> Result<Mailing> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            verification_in_txn(user.id, user.email.as_str(), new, conn).await
        })
        .await
    }

    /// Queues the mail with which a user proves another address, and one to the present address that says
    /// so. Should somebody else have the other one, nothing is mailed, and nobody is told.
    ///
    /// `checked` is the hash that the present password was checked against.
    ///
    /// # Errors
    /// `InvalidCredentials` · `Unavailable`
    pub async fn email_change_request(
        &self,
        id: UserId,
        email: &Email,
        checked: &str,
        new: &NewToken,
        origin: &Origin,
    ) -> Result<Mailing> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let row: UserRow = users::table
                .find(id.0)
                .filter(users::password_hash.eq(checked))
                .select(UserRow::as_select())
                .for_no_key_update()
                .first(conn)
                .await
                .optional()?
                .ok_or(Error::InvalidCredentials)?;
            let user = User::try_from(row)?;
            if let Some(wait) = throttle_take_in_txn(&new.limits, conn).await? {
                return Ok(Mailing::TooSoon(wait));
            }
            let others = users::table
                .filter(sql::<Text>(LOWER_EMAIL).eq(email.as_str().to_ascii_lowercase()))
                .filter(users::id.ne(id.0));
            let is_taken: bool = diesel::select(exists(others.select(users::id)))
                .get_result(conn)
                .await?;
            if is_taken {
                // What was asked for before is not wanted any more either.
                token_delete_in_txn(id, TokenPurpose::ChangeEmail, conn).await?;
            } else {
                mail_token_in_txn(id, email.as_str(), new, MailKind::AddressChange, conn).await?;
            }
            notice_in_txn(MailKind::AddressChangeAsked, &user, conn).await?;
            let event = AuditEvent::of_user(AuditAction::EmailChangeRequested, id, origin);
            audit_insert_in_txn(&event, conn).await?;
            Ok(Mailing::Queued)
        })
        .await
    }

    /// The user who may set a password with a token; `None`: nobody may with it.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn reset_user(&self, id: OneTimeTokenId, hash: &[u8]) -> Result<Option<User>> {
        let mut conn = self.conn().await?;
        let found = token_user_in_txn(id, hash, &[TokenPurpose::ResetPassword], &mut conn).await?;
        Ok(found.map(|(user, _)| user))
    }

    /// Sets a password with a token, ends all sessions of the user and counts the address that the token
    /// was mailed to as proven; whose password it is, and how many sessions ended. `None`: the token is
    /// not good, or not any more. With `tell`, a mail says so.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn password_reset(
        &self,
        id: OneTimeTokenId,
        token_hash: &[u8],
        password_hash: &str,
        origin: &Origin,
        tell: bool,
        at: DateTime<Utc>,
    ) -> Result<Option<(UserId, usize)>> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let purposes = [TokenPurpose::ResetPassword];
            let Some((user, _)) = token_use_in_txn(id, token_hash, &purposes, conn).await? else {
                return Ok(None);
            };
            // Before the sessions: a login with the old password commits before this or fails.
            diesel::update(users::table.find(user.id.0))
                .set((
                    users::password_hash.eq(password_hash),
                    users::email_verified_at.eq(sql("coalesce(email_verified_at, now())")),
                    users::updated_at.eq(now),
                ))
                .execute(conn)
                .await?;
            let ended = session_revoke_all_in_txn(user.id, None, at, conn).await?;
            let event = AuditEvent::of_user(AuditAction::PasswordReset, user.id, origin)
                .with_details(json!({"sessions_ended": ended}));
            audit_insert_in_txn(&event, conn).await?;
            if tell {
                let note = MailNote::new(MailKind::PasswordChanged, user.id);
                mail_in_txn(&note, conn).await?;
            }
            Ok(Some((user.id, ended)))
        })
        .await
    }

    /// Proves an address with a token: that of the account, or another one, which takes its place then;
    /// whose it is. `None`: the token is not good, or not any more.
    ///
    /// # Errors
    /// `AccountExists` · `Unavailable`
    pub async fn email_prove(
        &self,
        id: OneTimeTokenId,
        hash: &[u8],
        origin: &Origin,
    ) -> Result<Option<UserId>> {
        let purposes = [TokenPurpose::VerifyEmail, TokenPurpose::ChangeEmail];
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let Some((user, token)) = token_use_in_txn(id, hash, &purposes, conn).await? else {
                return Ok(None);
            };
            let row = users::table.find(user.id.0);
            let action = if token.purpose == TokenPurpose::ChangeEmail.as_str() {
                diesel::update(row)
                    .set((
                        users::email.eq(&token.email),
                        users::email_verified_at.eq(sql("now()")),
                        users::updated_at.eq(now),
                    ))
                    .execute(conn)
                    .await
                    .map_err(on_unique(|| Error::AccountExists))?;
                // They prove an address that is the user's no more.
                let others = one_time_tokens::table.filter(one_time_tokens::user_id.eq(user.id.0));
                diesel::delete(others).execute(conn).await?;
                notice_in_txn(MailKind::AddressChanged, &user, conn).await?;
                AuditAction::EmailChanged
            } else {
                diesel::update(row)
                    .set((
                        users::email_verified_at.eq(sql("coalesce(email_verified_at, now())")),
                        users::updated_at.eq(now),
                    ))
                    .execute(conn)
                    .await?;
                AuditAction::EmailVerified
            };
            let event = AuditEvent::of_user(action, user.id, origin);
            audit_insert_in_txn(&event, conn).await?;
            Ok(Some(user.id))
        })
        .await
    }

    /// Takes back the wish for another address.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn email_change_cancel(&self, id: UserId) -> Result<()> {
        let mut conn = self.conn().await?;
        token_delete_in_txn(id, TokenPurpose::ChangeEmail, &mut conn).await
    }

    /// What a mail is to say, and to whom; `None` when it is to be sent no more: its token was used or has
    /// ended, or the user is gone.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_details(&self, event: Uuid, note: &MailNote) -> Result<Option<MailDetails>> {
        let mut conn = self.conn().await?;
        let queued_at: Option<DateTime<Utc>> = outbox::table
            .find(event)
            .select(outbox::created_at)
            .first(&mut conn)
            .await
            .optional()?;
        let Some(at) = queued_at else {
            return Ok(None);
        };
        let user: Option<(String, String, bool)> = users::table
            .find(note.user_id.0)
            .select((users::username, users::email, users::is_active))
            .first(&mut conn)
            .await
            .optional()?;
        let Some((username, email, is_active)) = user else {
            return Ok(None);
        };
        let mut details = MailDetails {
            kind: note.kind,
            to: match &note.to {
                Some(to) => to.clone(),
                None => stored("users.email", &email)?,
            },
            username: stored("users.username", &username)?,
            token: None,
            at,
            user_agent: String::new(),
            address: String::new(),
        };
        if let Some(token_id) = note.token_id {
            let token: Option<(String, DateTime<Utc>, DateTime<Utc>)> = one_time_tokens::table
                .find(token_id.0)
                .filter(one_time_tokens::expires_at.gt(now))
                .select((
                    one_time_tokens::email,
                    one_time_tokens::created_at,
                    one_time_tokens::expires_at,
                ))
                .first(&mut conn)
                .await
                .optional()?;
            let Some((email, created_at, expires_at)) = token.filter(|_| is_active) else {
                return Ok(None);
            };
            details.to = stored("one_time_tokens.email", &email)?;
            details.token = Some(MailedToken {
                id: token_id,
                created_at,
                expires_at,
            });
        }
        if let Some(session_id) = note.session_id {
            let session: Option<(String, Option<String>)> = sessions::table
                .find(session_id.0)
                .select((sessions::user_agent, sessions::address))
                .first(&mut conn)
                .await
                .optional()?;
            let Some((user_agent, address)) = session else {
                return Ok(None);
            };
            details.user_agent = user_agent;
            details.address = address.unwrap_or_default();
        }
        Ok(Some(details))
    }

    /// Says that a mail has gone, or, with an error, that it never will. The address goes with it.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_done(&self, event: Uuid, error: Option<&str>) -> Result<()> {
        let mut conn = self.conn().await?;
        diesel::sql_query(
            "UPDATE outbox SET delivered_at = now(), last_error = $2, payload = payload - 'to'
             WHERE id = $1",
        )
        .bind::<SqlUuid, _>(event)
        .bind::<Nullable<Text>, _>(error)
        .execute(&mut conn)
        .await?;
        Ok(())
    }

    /// Forgets a mail that is to be sent no more.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_drop(&self, event: Uuid) -> Result<()> {
        let mut conn = self.conn().await?;
        diesel::delete(outbox::table.find(event))
            .execute(&mut conn)
            .await?;
        Ok(())
    }

    /// How many mails wait (10,000 stand for more), and the age of the oldest.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mail_pending(&self) -> Result<(u64, Option<Duration>)> {
        #[derive(QueryableByName)]
        struct Row {
            #[diesel(sql_type = BigInt)]
            pending: i64,
            #[diesel(sql_type = Nullable<BigInt>)]
            oldest: Option<i64>,
        }
        let mut conn = self.conn().await?;
        let row: Row = diesel::sql_query(
            "SELECT count(*) AS pending,
                 (extract(epoch FROM now() - min(created_at)) * 1000)::bigint AS oldest
             FROM (SELECT created_at FROM outbox
                   WHERE kind = $1 AND delivered_at IS NULL LIMIT 10000) AS counted",
        )
        .bind::<Text, _>(MailNote::KIND)
        .get_result(&mut conn)
        .await?;
        let age = |millis: i64| Duration::from_millis(u64::try_from(millis).unwrap_or(0));
        Ok((u64::try_from(row.pending).unwrap_or(0), row.oldest.map(age)))
    }

    /// Deletes up to `limit` tokens that have expired; returns how many.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn token_sweep(&self, limit: i64) -> Result<usize> {
        let mut conn = self.conn().await?;
        let deleted = diesel::sql_query(
            "DELETE FROM one_time_tokens WHERE expires_at <= now() AND id IN (
                 SELECT id FROM one_time_tokens WHERE expires_at <= now() LIMIT $1)",
        )
        .bind::<BigInt, _>(limit)
        .execute(&mut conn)
        .await?;
        Ok(deleted)
    }
}

/// See [`Store::verification_request`].
pub(super) async fn verification_in_txn(
    id: UserId,
    email: &str,
    new: &NewToken,
    conn: &mut AsyncPgConnection,
) -> Result<Mailing> {
    if let Some(wait) = throttle_take_in_txn(&new.limits, conn).await? {
        return Ok(Mailing::TooSoon(wait));
    }
    mail_token_in_txn(id, email, new, MailKind::Verification, conn).await?;
    Ok(Mailing::Queued)
}

/// Tells a user of something at the address that they have now. To one that nobody has proven nothing is
/// told: it may be a stranger's.
pub(super) async fn notice_in_txn(
    kind: MailKind,
    user: &User,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    if user.email_verified_at.is_none() {
        return Ok(());
    }
    let note = MailNote {
        to: Some(user.email.clone()),
        ..MailNote::new(kind, user.id)
    };
    mail_in_txn(&note, conn).await
}

/// Tells a user of a login, as [`notice_in_txn`] does.
pub(super) async fn login_notice_in_txn(
    standing: &SessionStanding,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    if standing.user.email_verified_at.is_none() {
        return Ok(());
    }
    let note = MailNote {
        session_id: Some(standing.session.id),
        ..MailNote::new(MailKind::NewLogin, standing.user.id)
    };
    mail_in_txn(&note, conn).await
}

/// Puts a mail into the outbox.
pub(super) async fn mail_in_txn(note: &MailNote, conn: &mut AsyncPgConnection) -> Result<()> {
    diesel::insert_into(outbox::table)
        .values((
            outbox::id.eq(Uuid::now_v7()),
            outbox::kind.eq(MailNote::KIND),
            outbox::payload.eq(note.payload()),
        ))
        .execute(conn)
        .await?;
    Ok(())
}

/// Ends the token of a purpose that a user may have.
pub(super) async fn token_delete_in_txn(
    id: UserId,
    purpose: TokenPurpose,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let token = one_time_tokens::table
        .filter(one_time_tokens::user_id.eq(id.0))
        .filter(one_time_tokens::purpose.eq(purpose.as_str()));
    diesel::delete(token).execute(conn).await?;
    Ok(())
}

/// Forgets the tokens of a user and the mails to them.
pub(super) async fn mails_forget_in_txn(id: UserId, conn: &mut AsyncPgConnection) -> Result<()> {
    diesel::delete(one_time_tokens::table.filter(one_time_tokens::user_id.eq(id.0)))
        .execute(conn)
        .await?;
    diesel::sql_query("DELETE FROM outbox WHERE kind = 'mail' AND payload ->> 'user_id' = $1")
        .bind::<Text, _>(id.to_string())
        .execute(conn)
        .await?;
    Ok(())
}

/// Makes a token, in the place of the one of its purpose that there may be, and queues its mail.
async fn mail_token_in_txn(
    id: UserId,
    email: &str,
    new: &NewToken,
    kind: MailKind,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    diesel::sql_query(
        "INSERT INTO one_time_tokens (id, user_id, purpose, token_hash, email, expires_at)
         VALUES ($1, $2, $3, $4, $5, now() + $6 * interval '1 ms')
         ON CONFLICT (user_id, purpose) DO UPDATE SET
             id = excluded.id, token_hash = excluded.token_hash, email = excluded.email,
             created_at = excluded.created_at, expires_at = excluded.expires_at",
    )
    .bind::<SqlUuid, _>(new.id.0)
    .bind::<SqlUuid, _>(id.0)
    .bind::<Text, _>(new.purpose.as_str())
    .bind::<Binary, _>(&new.hash)
    .bind::<Text, _>(email)
    .bind::<BigInt, _>(i64::try_from(new.ttl.as_millis()).unwrap_or(i64::MAX))
    .execute(conn)
    .await?;
    let note = MailNote {
        token_id: Some(new.id),
        ..MailNote::new(kind, id)
    };
    mail_in_txn(&note, conn).await
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = one_time_tokens, check_for_backend(diesel::pg::Pg))]
struct TokenRow {
    user_id: Uuid,
    purpose: String,
    email: String,
}

/// Finds a token that is good, and its user: active, and, unless it is for another address, with the
/// address that it was mailed to.
async fn token_user_in_txn(
    id: OneTimeTokenId,
    hash: &[u8],
    purposes: &[TokenPurpose],
    conn: &mut AsyncPgConnection,
) -> Result<Option<(User, TokenRow)>> {
    let purposes = purposes.iter().map(|purpose| purpose.as_str());
    let token: Option<TokenRow> = one_time_tokens::table
        .find(id.0)
        .filter(one_time_tokens::token_hash.eq(hash))
        .filter(one_time_tokens::purpose.eq_any(purposes.collect::<Vec<_>>()))
        .filter(one_time_tokens::expires_at.gt(sql::<Timestamptz>("clock_timestamp()")))
        .select(TokenRow::as_select())
        .first(conn)
        .await
        .optional()?;
    let Some(token) = token else {
        return Ok(None);
    };
    let user: Option<UserRow> = users::table
        .find(token.user_id)
        .filter(users::is_active)
        .select(UserRow::as_select())
        .for_no_key_update()
        .first(conn)
        .await
        .optional()?;
    let user = user.map(User::try_from).transpose()?;
    let is_meant = |user: &User| {
        token.purpose == TokenPurpose::ChangeEmail.as_str()
            || user.email.as_str().eq_ignore_ascii_case(&token.email)
    };
    Ok(user.filter(is_meant).map(|user| (user, token)))
}

/// Uses a token up: whoever comes later, or at the same time, has none. The user is locked first, as others
/// lock them before anything of theirs.
async fn token_use_in_txn(
    id: OneTimeTokenId,
    hash: &[u8],
    purposes: &[TokenPurpose],
    conn: &mut AsyncPgConnection,
) -> Result<Option<(User, TokenRow)>> {
    let Some(found) = token_user_in_txn(id, hash, purposes, conn).await? else {
        return Ok(None);
    };
    let token = one_time_tokens::table.find(id.0);
    let used = diesel::delete(token).execute(conn).await?;
    Ok((used == 1).then_some(found))
}
