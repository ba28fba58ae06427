use chrono::{DateTime, Utc};
use diesel::{
    dsl::{exists, now, sql},
    prelude::*,
    sql_types::Text,
};
use diesel_async::{AsyncConnection as _, AsyncPgConnection, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    administrators::another_admin_in_txn,
    audit::audit_insert_in_txn,
    errors::{on_unique, stored},
    one_time_tokens::{NewToken, tokens_delete_in_txn, verification_in_txn},
    quota::{quota_settle_in_txn, record_in_txn},
    schema::users,
    throttle::throttle_clear_passwords_in_txn,
};
use crate::{
    error::{Error, Result},
    model::{
        Actor, AuditAction, AuditEvent, Identifier, NamePrefix, Origin, Page, PageRequest, Person,
        Role, TierName, Tiers, User, UserFilter, UserId, UserStanding,
    },
};

/// A user to create. Not `Debug`, as nothing that holds a hash, a token or a key.
pub struct NewUser {
    pub person: Person,
    /// `None`: cannot log in by password.
    pub password_hash: Option<String>,
    pub role: Role,
    pub tier: TierName,
    /// Whether the address counts as proven.
    pub is_verified: bool,
    /// Is mailed to prove the address.
    pub verification: Option<NewToken>,
}

/// A user and what a login is checked against.
pub struct Credentials {
    pub user: User,
    pub password_hash: Option<String>,
}

impl Store {
    /// Creates a user.
    ///
    /// # Errors
    /// `AccountExists` · `Unavailable`
    pub async fn user_insert(&self, new: &NewUser, origin: &Origin) -> Result<User> {
        let row = NewUserRow {
            id: UserId::new().0,
            email: new.person.email.as_str(),
            username: new.person.username.as_str(),
            full_name: new.person.full_name.as_str(),
            password_hash: new.password_hash.as_deref(),
            role: new.role.as_str(),
            tier: new.tier.as_str(),
        };
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let verified_at = sql(if new.is_verified { "now()" } else { "NULL" });
            let user = diesel::insert_into(users::table)
                .values((row, users::email_verified_at.eq(verified_at)))
                .returning(UserRow::as_returning())
                .get_result(conn)
                .await
                .map_err(on_unique(|| Error::AccountExists))?;
            let details = json!({"tier": user.tier, "role": user.role});
            let event = AuditEvent::of_user(AuditAction::UserCreated, UserId(user.id), origin);
            audit_insert_in_txn(&event.with_details(details), conn).await?;
            if let Some(token) = &new.verification {
                // Should it be too soon for this address, there are other ways to ask for a mail.
                verification_in_txn(UserId(user.id), &user.email, token, conn).await?;
            }
            user.try_into()
        })
        .await
    }

    /// Reads a user.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn user_by_id(&self, id: UserId) -> Result<User> {
        let mut conn = self.conn().await?;
        user_by_id_in_txn(id, &mut conn).await
    }

    /// Reads what decides about a user's usage; `None` for nobody's id.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn user_standing(&self, id: UserId) -> Result<Option<UserStanding>> {
        let mut conn = self.conn().await?;
        let found: Option<(String, bool)> = users::table
            .find(id.0)
            .select((users::tier, users::is_active))
            .first(&mut conn)
            .await
            .optional()?;
        found
            .map(|(tier, is_active)| {
                let tier = stored("users.tier", &tier)?;
                Ok(UserStanding {
                    id,
                    tier,
                    is_active,
                })
            })
            .transpose()
    }

    /// Finds a user, in any case of the name.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn user_by_identifier(&self, identifier: &Identifier) -> Result<User> {
        let by = match identifier {
            Identifier::Email(_) => sql::<Text>(LOWER_EMAIL),
            Identifier::Username(_) => sql::<Text>(LOWER_USERNAME),
        };
        let name = match identifier {
            Identifier::Email(email) => email.as_str(),
            Identifier::Username(username) => username.as_str(),
        };
        let mut conn = self.conn().await?;
        users::table
            .filter(by.eq(name.to_ascii_lowercase()))
            .select(UserRow::as_select())
            .first(&mut conn)
            .await
            .optional()?
            .ok_or(Error::UserNotFound)?
            .try_into()
    }

    /// What a known user's password is checked against.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn credentials_by_id(&self, id: UserId) -> Result<Credentials> {
        let mut conn = self.conn().await?;
        let found: Option<(UserRow, Option<String>)> = users::table
            .find(id.0)
            .select((UserRow::as_select(), users::password_hash))
            .first(&mut conn)
            .await
            .optional()?;
        let (row, password_hash) = found.ok_or(Error::UserNotFound)?;
        Ok(Credentials {
            user: row.try_into()?,
            password_hash,
        })
    }

    /// Whether there is any administrator.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn user_any_admin(&self) -> Result<bool> {
        let mut conn = self.conn().await?;
        let admins = users::table.filter(users::role.eq(Role::Admin.as_str()));
        Ok(diesel::select(exists(admins.select(users::id)))
            .get_result(&mut conn)
            .await?)
    }

    /// Lists users, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn user_list(
        &self,
        filter: &UserFilter,
        page: &PageRequest<Uuid>,
    ) -> Result<Page<User>> {
        let mut query = users::table
            .select(UserRow::as_select())
            .order(users::id.desc())
            .limit(page.size + 1)
            .into_boxed();
        if let Some(tier) = &filter.tier {
            query = query.filter(users::tier.eq(tier.as_str()));
        }
        if let Some(is_active) = filter.is_active {
            query = query.filter(users::is_active.eq(is_active));
        }
        if let Some(role) = filter.role {
            query = query.filter(users::role.eq(role.as_str()));
        }
        let names = [
            (LOWER_EMAIL, &filter.email),
            (LOWER_USERNAME, &filter.username),
        ];
        for (name, prefix) in names {
            if let Some(prefix) = prefix {
                let (from, to) = beginning_with(prefix);
                query = query
                    .filter(sql::<Text>(name).ge(from))
                    .filter(sql::<Text>(name).lt(to));
            }
        }
        if let Some(after) = page.after {
            query = query.filter(users::id.lt(after));
        }
        let mut conn = self.conn().await?;
        let rows: Vec<UserRow> = query.load(&mut conn).await?;
        let users = rows
            .into_iter()
            .map(User::try_from)
            .collect::<Result<Vec<_>>>()?;
        Ok(Page::from_rows(users, page, |user| user.id.0))
    }

    /// Which of these tiers any user is in.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn user_tiers_among(&self, tiers: &[TierName]) -> Result<Vec<String>> {
        let mut conn = self.conn().await?;
        let mut used = Vec::new();
        for tier in tiers {
            let of_tier = users::table.filter(users::tier.eq(tier.as_str()));
            if diesel::select(exists(of_tier.select(users::id)))
                .get_result(&mut conn)
                .await?
            {
                used.push(tier.to_string());
            }
        }
        Ok(used)
    }

    /// Which tiers users are in beside these.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn user_tiers_beside(&self, tiers: &[&TierName]) -> Result<Vec<String>> {
        let known: Vec<&str> = tiers.iter().map(|tier| tier.as_str()).collect();
        let mut conn = self.conn().await?;
        let mut found: Vec<String> = Vec::new();
        // From one name in the index to the next: there are few tiers and many users.
        loop {
            let next: Option<String> = users::table
                .filter(users::tier.gt(found.last().map_or("", String::as_str)))
                .order(users::tier)
                .select(users::tier)
                .first(&mut conn)
                .await
                .optional()?;
            match next {
                Some(tier) => found.push(tier),
                None => break,
            }
        }
        found.retain(|tier| !known.contains(&tier.as_str()));
        Ok(found)
    }

    /// Moves a user to another of the `tiers`. Naming the present one changes nothing. What was used
    /// before under a larger limit stays paid for.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn user_set_tier(
        &self,
        id: UserId,
        tier: &TierName,
        tiers: &Tiers,
        origin: &Origin,
    ) -> Result<User> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let (mut facts, _) = quota_settle_in_txn(id, tiers, conn).await?;
            let changed: Option<UserRow> = diesel::update(users::table)
                .filter(users::id.eq(id.0).and(users::tier.ne(tier.as_str())))
                .set((
                    users::tier.eq(tier.as_str()),
                    users::tier_updated_at.eq(now),
                    users::updated_at.eq(now),
                ))
                .returning(UserRow::as_returning())
                .get_result(conn)
                .await
                .optional()?;
            let Some(row) = changed else {
                return user_by_id_in_txn(id, conn).await;
            };
            let event = AuditEvent::of_user(AuditAction::UserTierSet, id, origin)
                .with_details(json!({"tier": row.tier}));
            audit_insert_in_txn(&event, conn).await?;
            facts.tier = tier.clone();
            record_in_txn(&facts, &facts.limit(tiers), conn).await?;
            row.try_into()
        })
        .await
    }

    /// Turns a user on or off; `reason` is for the audit trail. Repeating it changes nothing. What was mailed
    /// before is good no more: whoever asked for it may be why. Who is
    /// turned on by somebody else may log in at once, whatever failed before.
    ///
    /// # Errors
    /// `UserNotFound` · `LastAdmin` · `Unavailable`
    pub async fn user_set_active(
        &self,
        id: UserId,
        is_active: bool,
        reason: &str,
        origin: &Origin,
    ) -> Result<User> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let changed: Option<UserRow> = diesel::update(users::table)
                .filter(users::id.eq(id.0).and(users::is_active.ne(is_active)))
                .set((users::is_active.eq(is_active), users::updated_at.eq(now)))
                .returning(UserRow::as_returning())
                .get_result(conn)
                .await
                .optional()?;
            if is_active && origin.actor != Actor::User(id) {
                throttle_clear_passwords_in_txn(id, conn).await?;
            }
            let Some(row) = changed else {
                return user_by_id_in_txn(id, conn).await;
            };
            if !is_active && row.role == Role::Admin.as_str() {
                another_admin_in_txn(id, conn).await?;
            }
            tokens_delete_in_txn(id, conn).await?;
            let action = if is_active {
                AuditAction::UserEnabled
            } else {
                AuditAction::UserDisabled
            };
            let event =
                AuditEvent::of_user(action, id, origin).with_details(json!({"reason": reason}));
            audit_insert_in_txn(&event, conn).await?;
            row.try_into()
        })
        .await
    }
}

/// As the unique indexes have them, and [`str::to_ascii_lowercase`]: in some locales the database's own
/// `lower()` takes I for another letter than i. It orders by bytes, so that names of one prefix stand
/// together.
pub(super) const LOWER_EMAIL: &str = "lower(email COLLATE \"C\")";
pub(super) const LOWER_USERNAME: &str = "lower(username COLLATE \"C\")";

/// From where to where names begin so, in the order of bytes.
fn beginning_with(prefix: &NamePrefix) -> (String, String) {
    let from = prefix.as_str().to_ascii_lowercase();
    let mut to = from.clone();
    // Visible ASCII: there is a next character.
    let next = to.pop().map_or('\u{7f}', |last| char::from(last as u8 + 1));
    to.push(next);
    (from, to)
}

async fn user_by_id_in_txn(id: UserId, conn: &mut AsyncPgConnection) -> Result<User> {
    users::table
        .find(id.0)
        .select(UserRow::as_select())
        .first(conn)
        .await
        .optional()?
        .ok_or(Error::UserNotFound)?
        .try_into()
}

#[derive(Insertable)]
#[diesel(table_name = users, treat_none_as_default_value = false)]
struct NewUserRow<'a> {
    id: Uuid,
    email: &'a str,
    username: &'a str,
    full_name: &'a str,
    password_hash: Option<&'a str>,
    role: &'a str,
    tier: &'a str,
}

/// A user as stored, without the password hash.
#[derive(Queryable, Selectable)]
#[diesel(table_name = users, check_for_backend(diesel::pg::Pg))]
pub(super) struct UserRow {
    id: Uuid,
    email: String,
    username: String,
    full_name: String,
    role: String,
    tier: String,
    tier_updated_at: DateTime<Utc>,
    is_active: bool,
    auth_epoch: i64,
    email_verified_at: Option<DateTime<Utc>>,
    created_at: DateTime<Utc>,
    updated_at: DateTime<Utc>,
    last_login_at: Option<DateTime<Utc>>,
    mfa_enabled: bool,
}

impl TryFrom<UserRow> for User {
    type Error = Error;

    fn try_from(row: UserRow) -> Result<Self> {
        Ok(Self {
            id: UserId(row.id),
            email: stored("users.email", &row.email)?,
            username: stored("users.username", &row.username)?,
            full_name: stored("users.full_name", &row.full_name)?,
            role: stored("users.role", &row.role)?,
            tier: stored("users.tier", &row.tier)?,
            tier_updated_at: row.tier_updated_at,
            is_active: row.is_active,
            auth_epoch: row.auth_epoch,
            email_verified_at: row.email_verified_at,
            created_at: row.created_at,
            updated_at: row.updated_at,
            last_login_at: row.last_login_at,
            mfa_enabled: row.mfa_enabled,
        })
    }
}
