//! Tokens that are mailed, and what is done with them. Whoever makes one queues its mail; their secret is
//! in neither table.

use std::time::Duration;

use chrono::{DateTime, Utc};
use diesel::{
    dsl::{exists, now, sql},
    prelude::*,
    sql_types::{BigInt, Binary, Text, Timestamptz, Uuid as SqlUuid},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    api_keys::api_key_revoke_all_in_txn,
    audit::audit_insert_in_txn,
    errors::on_unique,
    mails::{mail_in_txn, notice_in_txn, notice_to_in_txn},
    mfa::totp_forget_unconfirmed_in_txn,
    schema::{one_time_tokens, users},
    sessions::session_revoke_all_in_txn,
    throttle::throttle_take_in_txn,
    users::{LOWER_EMAIL, UserRow},
};
use crate::{
    error::{Error, Result},
    model::{
        AuditAction, AuditEvent, Email, MailKind, MailNote, OneTimeTokenId, Origin, ThrottleRule,
        TokenPurpose, User, UserId,
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
    /// `InvalidCredentials` · `AccountDisabled` · `Unavailable`
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
            if !user.is_active {
                // Since this moment: the wish must not wait for the account to be enabled.
                return Err(Error::AccountDisabled);
            }
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

    /// Sets a password with a token, ends all sessions and other tokens of the user and counts the address
    /// that the token was mailed to as proven; if it was not before, the user's API keys end too. Whose
    /// password it is, and how many sessions ended; `None`: the token is not good, or not any more. With
    /// `tell`, a mail says so.
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
            totp_forget_unconfirmed_in_txn(user.id, conn).await?;
            let ended = session_revoke_all_in_txn(user.id, None, at, conn).await?;
            tokens_delete_in_txn(user.id, conn).await?;
            let mut details = json!({"sessions_ended": ended});
            if user.email_verified_at.is_none() {
                // Nobody had proven the address: whoever had the account before need not be who reads there.
                details["api_keys_revoked"] =
                    api_key_revoke_all_in_txn(user.id, conn).await?.into();
            }
            let event = AuditEvent::of_user(AuditAction::PasswordReset, user.id, origin)
                .with_details(details);
            audit_insert_in_txn(&event, conn).await?;
            if tell {
                // It is proven now.
                notice_to_in_txn(MailKind::PasswordChanged, &user, conn).await?;
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
                tokens_delete_in_txn(user.id, conn).await?;
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

    /// Takes back the wish for another address, if there is one.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn email_change_cancel(&self, id: UserId, origin: &Origin) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            if token_delete_in_txn(id, TokenPurpose::ChangeEmail, conn).await? {
                let event = AuditEvent::of_user(AuditAction::EmailChangeCancelled, id, origin);
                audit_insert_in_txn(&event, conn).await?;
            }
            Ok(())
        })
        .await
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

/// Ends the token of a purpose that a user may have; whether there was one.
pub(super) async fn token_delete_in_txn(
    id: UserId,
    purpose: TokenPurpose,
    conn: &mut AsyncPgConnection,
) -> Result<bool> {
    let token = one_time_tokens::table
        .filter(one_time_tokens::user_id.eq(id.0))
        .filter(one_time_tokens::purpose.eq(purpose.as_str()));
    Ok(diesel::delete(token).execute(conn).await? > 0)
}

/// Ends all tokens of a user: what somebody asked for before must not undo what is done now. To be called
/// behind the lock of the user's row, and before those of sessions.
pub(super) async fn tokens_delete_in_txn(id: UserId, conn: &mut AsyncPgConnection) -> Result<()> {
    let all = one_time_tokens::table.filter(one_time_tokens::user_id.eq(id.0));
    diesel::delete(all).execute(conn).await?;
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
