//! Second factors: secrets of authenticator apps and recovery codes. What changes them locks the row of the
//! user first, as whatever opens a session does, so that none of them misses the other.

use chrono::{DateTime, TimeDelta, Utc};
use diesel::{
    dsl::{now, sql},
    prelude::*,
    sql_types::{Array, BigInt, Bool, Text, Timestamptz},
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Store,
    audit::audit_insert_in_txn,
    schema::{recovery_codes, totp_credentials, users},
    sessions::session_revoke_all_in_txn,
    throttle::throttle_clear_user_in_txn,
    users::UserRow,
};
use crate::{
    error::{Error, Result},
    model::{
        Actor, AuditAction, AuditEvent, FactorId, MfaStanding, Origin, SessionId, TotpCredential,
        UsedCode, UsedFactor, User, UserId,
    },
};

/// How long an enrolment waits for its code. Confirming asks for no password: who knew it once must not leave
/// a secret behind for a session stolen later.
const ENROLMENT_MINUTES: i64 = 15;

/// A secret that an authenticator app is given. Not `Debug`.
pub struct NewTotp {
    pub user_id: UserId,
    pub id: FactorId,
    pub sealed_secret: Vec<u8>,
}

/// What a reset did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MfaReset {
    pub was_enabled: bool,
    pub sessions_ended: usize,
}

impl Store {
    /// Reads what a user is asked for; `None` for nobody's id. An enrolment that has lapsed is none.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mfa_standing(&self, id: UserId) -> Result<Option<MfaStanding>> {
        type Row = (UserRow, Option<String>, Option<TotpRow>, i64, DateTime<Utc>);
        let left = sql::<BigInt>(
            "(SELECT count(*) FROM recovery_codes WHERE recovery_codes.user_id = users.id)",
        );
        let mut conn = self.conn().await?;
        let found: Option<Row> = users::table
            .left_join(totp_credentials::table)
            .filter(users::id.eq(id.0))
            .select((
                UserRow::as_select(),
                users::password_hash,
                Option::<TotpRow>::as_select(),
                left,
                now.into_sql::<Timestamptz>(),
            ))
            .first(&mut conn)
            .await
            .optional()?;
        found
            .map(|(user, password_hash, totp, recovery_codes_left, at)| {
                Ok(MfaStanding {
                    user: user.try_into()?,
                    password_hash,
                    totp: totp
                        .filter(|totp| !totp.has_lapsed(at))
                        .map(TotpCredential::from),
                    recovery_codes_left,
                    at,
                })
            })
            .transpose()
    }

    /// Keeps a secret until it is confirmed, in place of one that was not.
    ///
    /// `checked` is the hash that the password was checked against.
    ///
    /// # Errors
    /// `InvalidCredentials` · `MfaAlreadyEnabled` · `Unavailable`
    pub async fn totp_enroll(&self, new: &NewTotp, checked: &str, origin: &Origin) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            if lock_in_txn(new.user_id, Some(checked), conn).await? {
                return Err(Error::MfaAlreadyEnabled);
            }
            let of_user = totp_credentials::table.find(new.user_id.0);
            diesel::delete(of_user).execute(conn).await?;
            diesel::insert_into(totp_credentials::table)
                .values((
                    totp_credentials::user_id.eq(new.user_id.0),
                    totp_credentials::id.eq(new.id.0),
                    totp_credentials::sealed_secret.eq(&new.sealed_secret),
                ))
                .execute(conn)
                .await?;
            let event = AuditEvent::of_user(AuditAction::MfaEnrolled, new.user_id, origin);
            audit_insert_in_txn(&event, conn).await
        })
        .await
    }

    /// Puts an enrolled factor in force with these recovery codes, uses the code up, and ends the user's
    /// sessions but `keep_only`, if that is given; returns how many ended.
    ///
    /// # Errors
    /// `MfaCodeInvalid`, also when it is of an enrolment that was replaced or has lapsed ·
    /// `MfaAlreadyEnabled` · `Unavailable`
    pub async fn totp_confirm(
        &self,
        used: &UsedCode,
        code_hashes: &[Vec<u8>],
        keep_only: Option<SessionId>,
        origin: &Origin,
        at: DateTime<Utc>,
    ) -> Result<usize> {
        let id = used.user_id;
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            if lock_in_txn(id, None, conn).await? {
                return Err(Error::MfaAlreadyEnabled);
            }
            let at_database: DateTime<Utc> = diesel::select(now.into_sql::<Timestamptz>())
                .get_result(conn)
                .await?;
            let since = at_database - TimeDelta::minutes(ENROLMENT_MINUTES);
            let enrolled = totp_credentials::table
                .find(id.0)
                .filter(totp_credentials::id.eq(used.credential.0))
                .filter(totp_credentials::created_at.gt(since));
            diesel::update(enrolled)
                .set(totp_credentials::confirmed_at.eq(now))
                .execute(conn)
                .await?;
            mfa_code_use_in_txn(used, conn).await?;
            codes_replace_in_txn(id, code_hashes, conn).await?;
            set_enabled_in_txn(id, true, conn).await?;
            let ended = end_others_in_txn(id, keep_only, at, conn).await?;
            let details = json!({"sessions_ended": ended});
            audit_in_txn(AuditAction::MfaEnabled, id, details, origin, conn).await?;
            Ok(ended)
        })
        .await
    }

    /// Takes a user's second factor and recovery codes away, uses the code up, and ends the user's sessions
    /// but `keep_only`, if that is given; returns how many ended.
    ///
    /// # Errors
    /// `InvalidCredentials` · `MfaCodeInvalid` · `MfaNotEnabled` · `Unavailable`
    pub async fn mfa_disable(
        &self,
        used: &UsedCode,
        checked: &str,
        keep_only: Option<SessionId>,
        origin: &Origin,
        at: DateTime<Utc>,
    ) -> Result<usize> {
        let id = used.user_id;
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            if !lock_in_txn(id, Some(checked), conn).await? {
                return Err(Error::MfaNotEnabled);
            }
            mfa_code_use_in_txn(used, conn).await?;
            remove_in_txn(id, conn).await?;
            let ended = end_others_in_txn(id, keep_only, at, conn).await?;
            let details = json!({"by": used.what.factor().as_str(), "sessions_ended": ended});
            audit_in_txn(AuditAction::MfaDisabled, id, details, origin, conn).await?;
            Ok(ended)
        })
        .await
    }

    /// Puts recovery codes in the place of all others, and uses the code up.
    ///
    /// # Errors
    /// `InvalidCredentials` · `MfaCodeInvalid` · `MfaNotEnabled` · `Unavailable`
    pub async fn recovery_codes_replace(
        &self,
        used: &UsedCode,
        checked: &str,
        code_hashes: &[Vec<u8>],
        origin: &Origin,
    ) -> Result<()> {
        let id = used.user_id;
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            if !lock_in_txn(id, Some(checked), conn).await? {
                return Err(Error::MfaNotEnabled);
            }
            mfa_code_use_in_txn(used, conn).await?;
            codes_replace_in_txn(id, code_hashes, conn).await?;
            let details = json!({"by": used.what.factor().as_str()});
            let action = AuditAction::RecoveryCodesRegenerated;
            audit_in_txn(action, id, details, origin, conn).await
        })
        .await
    }

    /// Takes away whatever second factor a user has, ends their sessions if one was in force, and forgets
    /// what failed.
    ///
    /// # Errors
    /// `UserNotFound` · `CallerNotAllowed` when it is the caller's own · `Unavailable`
    pub async fn mfa_reset(
        &self,
        id: UserId,
        reason: &str,
        origin: &Origin,
        at: DateTime<Utc>,
    ) -> Result<(User, MfaReset)> {
        if origin.actor == Actor::User(id) {
            return Err(Error::CallerNotAllowed);
        }
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let was_enabled = lock_in_txn(id, None, conn).await?;
            remove_in_txn(id, conn).await?;
            throttle_clear_user_in_txn(id, conn).await?;
            let mut sessions_ended = 0;
            if was_enabled {
                sessions_ended = session_revoke_all_in_txn(id, None, at, conn).await?;
                let details = json!({"reason": reason, "sessions_ended": sessions_ended});
                audit_in_txn(AuditAction::MfaReset, id, details, origin, conn).await?;
            }
            let row: UserRow = users::table
                .find(id.0)
                .select(UserRow::as_select())
                .first(conn)
                .await?;
            let reset = MfaReset {
                was_enabled,
                sessions_ended,
            };
            Ok((row.try_into()?, reset))
        })
        .await
    }

    /// Whether a recovery code is one of a user's that was not used.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn recovery_code_exists(&self, id: UserId, hash: &[u8]) -> Result<bool> {
        let mut conn = self.conn().await?;
        let one = recovery_codes::table.find((id.0, hash)).count();
        Ok(one.get_result::<i64>(&mut conn).await? > 0)
    }

    /// Writes down that the right password was given and a code asked for: once an hour for those who come
    /// from one of these networks, or it would bury the rest.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mfa_challenged(
        &self,
        id: UserId,
        networks: &[String],
        origin: &Origin,
    ) -> Result<()> {
        let action = AuditAction::MfaChallenged;
        let lately = diesel::sql_query(
            "SELECT EXISTS (SELECT FROM audit_events WHERE user_id = $1 AND action = $2
                 AND occurred_at > now() - interval '1 hour'
                 AND (address::inet <<= ANY($3::inet[])
                     OR address IS NULL AND cardinality($3) = 0)) AS yes",
        )
        .bind::<diesel::sql_types::Uuid, _>(id.0)
        .bind::<Text, _>(action.as_str())
        .bind::<Array<Text>, _>(networks);
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let known: Known = lately.get_result(conn).await?;
            if known.yes {
                return Ok(());
            }
            let event = AuditEvent::of_user(action, id, origin);
            audit_insert_in_txn(&event, conn).await
        })
        .await
    }

    /// Writes down that a code was refused: of somebody who knows the password, or has the session.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn mfa_code_refused(&self, id: UserId, origin: &Origin) -> Result<()> {
        let mut conn = self.conn().await?;
        let event = AuditEvent::of_user(AuditAction::MfaCodeRefused, id, origin);
        conn.transaction::<_, Error, _>(async |conn| audit_insert_in_txn(&event, conn).await)
            .await
    }

    /// Replaces an outdated hash of a password that was right, unless it has changed meanwhile.
    ///
    /// # Errors
    /// `InvalidCredentials` · `Unavailable`
    pub async fn user_rehash(
        &self,
        id: UserId,
        checked: &str,
        hash: &str,
        origin: &Origin,
    ) -> Result<()> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let replaced = diesel::update(users::table.find(id.0))
                .filter(users::password_hash.eq(checked))
                .set(users::password_hash.eq(hash))
                .execute(conn)
                .await?;
            if replaced == 0 {
                return Err(Error::InvalidCredentials);
            }
            let event = AuditEvent::of_user(AuditAction::PasswordRehashed, id, origin);
            audit_insert_in_txn(&event, conn).await
        })
        .await
    }
}

/// Uses a code up: once, whoever else tries. Of an authenticator app, all codes before it are used up with
/// it (RFC 6238 §5.2).
pub(super) async fn mfa_code_use_in_txn(
    code: &UsedCode,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let used = match &code.what {
        UsedFactor::Totp(step) => {
            let credential = totp_credentials::table
                .find(code.user_id.0)
                .filter(totp_credentials::id.eq(code.credential.0))
                .filter(totp_credentials::confirmed_at.is_not_null())
                .filter(totp_credentials::last_step.lt(step));
            diesel::update(credential)
                .set(totp_credentials::last_step.eq(step))
                .execute(conn)
                .await?
        }
        UsedFactor::RecoveryCode(hash) => {
            let one = recovery_codes::table.find((code.user_id.0, hash));
            diesel::delete(one).execute(conn).await?
        }
    };
    if used == 0 {
        return Err(Error::MfaCodeInvalid);
    }
    Ok(())
}

/// Locks a user whose password hash is `checked`, if that is given; whether a second factor is in force.
pub(super) async fn lock_in_txn(
    id: UserId,
    checked: Option<&str>,
    conn: &mut AsyncPgConnection,
) -> Result<bool> {
    let (hash, enabled): (Option<String>, bool) = users::table
        .find(id.0)
        .select((users::password_hash, users::mfa_enabled))
        .for_no_key_update()
        .first(conn)
        .await
        .optional()?
        .ok_or(Error::UserNotFound)?;
    if checked.is_some() && hash.as_deref() != checked {
        return Err(Error::InvalidCredentials);
    }
    Ok(enabled)
}

/// Takes away what is enrolled and not confirmed. Before sessions are locked, as whoever confirms does.
pub(super) async fn totp_forget_unconfirmed_in_txn(
    id: UserId,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let unconfirmed = totp_credentials::table
        .find(id.0)
        .filter(totp_credentials::confirmed_at.is_null());
    diesel::delete(unconfirmed).execute(conn).await?;
    Ok(())
}

async fn remove_in_txn(id: UserId, conn: &mut AsyncPgConnection) -> Result<()> {
    diesel::delete(totp_credentials::table.find(id.0))
        .execute(conn)
        .await?;
    codes_replace_in_txn(id, &[], conn).await?;
    set_enabled_in_txn(id, false, conn).await
}

async fn codes_replace_in_txn(
    id: UserId,
    hashes: &[Vec<u8>],
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let of_user = recovery_codes::table.filter(recovery_codes::user_id.eq(id.0));
    diesel::delete(of_user).execute(conn).await?;
    if hashes.is_empty() {
        return Ok(());
    }
    let rows = hashes.iter().map(|hash| {
        (
            recovery_codes::user_id.eq(id.0),
            recovery_codes::code_hash.eq(hash),
        )
    });
    let rows: Vec<_> = rows.collect();
    diesel::insert_into(recovery_codes::table)
        .values(rows)
        .execute(conn)
        .await?;
    Ok(())
}

async fn set_enabled_in_txn(id: UserId, enabled: bool, conn: &mut AsyncPgConnection) -> Result<()> {
    diesel::update(users::table.find(id.0))
        .filter(users::mfa_enabled.ne(enabled))
        .set((users::mfa_enabled.eq(enabled), users::updated_at.eq(now)))
        .execute(conn)
        .await?;
    Ok(())
}

async fn end_others_in_txn(
    id: UserId,
    keep_only: Option<SessionId>,
    at: DateTime<Utc>,
    conn: &mut AsyncPgConnection,
) -> Result<usize> {
    match keep_only {
        Some(kept) => session_revoke_all_in_txn(id, Some(kept), at, conn).await,
        None => Ok(0),
    }
}

async fn audit_in_txn(
    action: AuditAction,
    id: UserId,
    details: Value,
    origin: &Origin,
    conn: &mut AsyncPgConnection,
) -> Result<()> {
    let event = AuditEvent::of_user(action, id, origin).with_details(details);
    audit_insert_in_txn(&event, conn).await
}

#[derive(QueryableByName)]
struct Known {
    #[diesel(sql_type = Bool)]
    yes: bool,
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = totp_credentials, check_for_backend(diesel::pg::Pg))]
struct TotpRow {
    id: Uuid,
    sealed_secret: Vec<u8>,
    created_at: DateTime<Utc>,
    confirmed_at: Option<DateTime<Utc>>,
    last_step: i64,
}

impl TotpRow {
    fn has_lapsed(&self, at: DateTime<Utc>) -> bool {
        self.confirmed_at.is_none() && self.created_at <= at - TimeDelta::minutes(ENROLMENT_MINUTES)
    }
}

impl From<TotpRow> for TotpCredential {
    fn from(row: TotpRow) -> Self {
        Self {
            id: FactorId(row.id),
            sealed_secret: row.sealed_secret,
            is_confirmed: row.confirmed_at.is_some(),
            last_step: row.last_step,
        }
    }
}
