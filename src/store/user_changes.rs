//! What becomes of a user's account after it was created.

use chrono::{DateTime, Utc};
use diesel::{dsl::now, prelude::*};
use diesel_async::{AsyncConnection as _, RunQueryDsl};
use serde_json::json;

use super::{
    Store,
    administrators::another_admin_in_txn,
    audit::audit_insert_in_txn,
    errors::on_unique,
    mails::notice_in_txn,
    mfa::totp_forget_unconfirmed_in_txn,
    one_time_tokens::{token_delete_in_txn, tokens_delete_in_txn},
    schema::users,
    sessions::session_revoke_all_in_txn,
    throttle::{throttle_clear_passwords_in_txn, throttle_take_in_txn},
    users::UserRow,
};
use crate::{
    error::{Error, Result},
    model::{
        Actor, AuditAction, AuditEvent, Email, FullName, MailKind, Origin, Role, SessionId,
        ThrottleRule, TokenPurpose, User, UserChanges, UserId, Username,
    },
};

impl Store {
    /// Changes what an account says of its user. What is so already changes nothing; a new address
    /// is one that nobody has proven. Whose account somebody else looks after may log in at once,
    /// whatever failed before.
    ///
    /// # Errors
    /// `UserNotFound` · `AccountExists` · `LastAdmin` · `Unavailable`
    pub async fn user_update(
        &self,
        id: UserId,
        changes: &UserChanges,
        origin: &Origin,
    ) -> Result<User> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let row: UserRow = users::table
                .find(id.0)
                .select(UserRow::as_select())
                .for_no_key_update()
                .first(conn)
                .await
                .optional()?
                .ok_or(Error::UserNotFound)?;
            let user = User::try_from(row)?;
            let set = Changeset::between(&user, changes);
            let fields = set.profile_fields();
            if set.role.is_some() && user.is_active && user.role == Role::Admin {
                another_admin_in_txn(id, conn).await?;
            }
            if origin.actor != Actor::User(id) {
                throttle_clear_passwords_in_txn(id, conn).await?;
            }
            if changes.email.is_some() {
                // Also when it is what it was: it is to stay so.
                tokens_delete_in_txn(id, conn).await?;
            }
            if fields.is_empty() && set.role.is_none() {
                return Ok(user);
            }
            let changed: UserRow = diesel::update(users::table.find(id.0))
                .set((&set, users::updated_at.eq(now)))
                .returning(UserRow::as_returning())
                .get_result(conn)
                .await
                .map_err(on_unique(|| Error::AccountExists))?;
            if !fields.is_empty() {
                // Which, and not what: the trail holds no names.
                let event = AuditEvent::of_user(AuditAction::UserUpdated, id, origin)
                    .with_details(json!({"fields": fields}));
                audit_insert_in_txn(&event, conn).await?;
            }
            if let Some(role) = set.role {
                let event = AuditEvent::of_user(AuditAction::UserRoleSet, id, origin)
                    .with_details(json!({"role": role}));
                audit_insert_in_txn(&event, conn).await?;
            }
            changed.try_into()
        })
        .await
    }

    /// Gives a user another hash and ends their sessions but `keep_only`, if that is given; returns
    /// how many ended.
    ///
    /// `checked` is the hash that the present password was checked against: should it have changed
    /// meanwhile, that was not the present one. With `tell`, a mail says so.
    ///
    /// # Errors
    /// `InvalidCredentials` · `Throttled` after some that followed each other · `Unavailable`
    #[expect(clippy::too_many_arguments, reason = "each is of another kind")]
    pub async fn user_set_password(
        &self,
        id: UserId,
        checked: &str,
        hash: &str,
        keep_only: Option<SessionId>,
        origin: &Origin,
        tell: bool,
        at: DateTime<Utc>,
    ) -> Result<usize> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            // Before the sessions: a login with the old password commits before this or fails.
            let changed: Option<UserRow> = diesel::update(users::table.find(id.0))
                .filter(users::password_hash.eq(checked))
                .set((users::password_hash.eq(hash), users::updated_at.eq(now)))
                .returning(UserRow::as_returning())
                .get_result(conn)
                .await
                .optional()?;
            let user = User::try_from(changed.ok_or(Error::InvalidCredentials)?)?;
            // Each ends the reset that its user may have asked for: whoever has the password must not do
            // so for ever.
            let limit = (format!("mail {id} password"), ThrottleRule::REPEATED);
            if let Some(retry_after) = throttle_take_in_txn(&[limit], conn).await? {
                return Err(Error::Throttled { retry_after });
            }
            // Whoever asked for it before may be who the new password is to keep out.
            for purpose in [TokenPurpose::ResetPassword, TokenPurpose::ChangeEmail] {
                token_delete_in_txn(id, purpose, conn).await?;
            }
            if tell {
                notice_in_txn(MailKind::PasswordChanged, &user, conn).await?;
            }
            totp_forget_unconfirmed_in_txn(id, conn).await?;
            let ended = match keep_only {
                Some(kept) => session_revoke_all_in_txn(id, Some(kept), at, conn).await?,
                None => 0,
            };
            let event = AuditEvent::of_user(AuditAction::PasswordChanged, id, origin)
                .with_details(json!({"sessions_ended": ended}));
            audit_insert_in_txn(&event, conn).await?;
            Ok(ended)
        })
        .await
    }
}

/// What is to be written; `None` stays as it is.
#[derive(AsChangeset)]
#[diesel(table_name = users)]
struct Changeset<'a> {
    email: Option<&'a str>,
    email_verified_at: Option<Option<DateTime<Utc>>>,
    username: Option<&'a str>,
    full_name: Option<&'a str>,
    role: Option<&'static str>,
}

impl<'a> Changeset<'a> {
    /// As much of the changes as is not so already.
    fn between(user: &User, changes: &'a UserChanges) -> Self {
        let email = changes.email.as_ref().filter(|new| **new != user.email);
        let another = email.filter(|new| {
            let (new, old) = (new.as_str(), user.email.as_str());
            !new.eq_ignore_ascii_case(old)
        });
        let username = changes.username.as_ref();
        let full_name = changes.full_name.as_ref();
        Self {
            email: email.map(Email::as_str),
            email_verified_at: another.map(|_| None),
            username: username
                .filter(|new| **new != user.username)
                .map(Username::as_str),
            full_name: full_name
                .filter(|new| **new != user.full_name)
                .map(FullName::as_str),
            role: changes
                .role
                .filter(|new| *new != user.role)
                .map(Role::as_str),
        }
    }

    /// The names of the fields that say who the user is.
    fn profile_fields(&self) -> Vec<&'static str> {
        let fields = [
            ("email", self.email),
            ("username", self.username),
            ("full_name", self.full_name),
        ];
        let set = fields.into_iter().filter(|(_, value)| value.is_some());
        set.map(|(name, _)| name).collect()
    }
}
