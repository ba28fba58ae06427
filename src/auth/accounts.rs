//! People's accounts: creation, look-up, tier and kill switch.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Auth, ImportedHash, LoginPassword};
use crate::{
    clock::BootTime,
    error::{Error, Result},
    model::{
        Actor, AuditCursor, AuditFilter, AuditRecord, Change, Identifier, Origin, Page,
        PageRequest, Person, Role, SessionId, TierName, Tiers, User, UserChanges, UserFilter,
        UserId, UserStanding, Violation,
    },
    store::{NewToken, NewUser},
};

/// An account to create.
pub struct NewAccount {
    pub person: Person,
    pub credential: InitialCredential,
    pub role: Role,
    pub tier: TierName,
}

/// How a new account will log in.
pub enum InitialCredential {
    /// A password to set, not checked yet.
    Password(String),
    /// A hash from another system; a login replaces it when a new one would be stronger.
    Hash(ImportedHash),
    /// Not by password.
    None,
}

impl Auth {
    /// Whether a password has a length that may be set; asked ahead to name it beside the other wrong
    /// fields. How hard it is to guess is judged when it is set.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_password_length(&self, password: &str) -> Result<(), Violation> {
        self.passwords.check_length(password)
    }

    /// Creates an account for somebody who asks for it, and mails them what proves their address: each
    /// network may do so a number of times.
    ///
    /// # Errors
    /// `Throttled`, and as [`Auth::create_account`]
    pub async fn register(
        &self,
        new: NewAccount,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<User> {
        self.admit_registration(origin, now).await?;
        let verification = self.mails.first_verification(&new.person.email, origin);
        self.insert_account(new, verification, origin).await
    }

    /// Creates an account. The password is hashed before the database is asked, so that a taken
    /// address answers no sooner than a free one. An address that an operator names counts as proven.
    ///
    /// # Errors
    /// `Invalid` (password) · `AccountExists` · `Overloaded` · `Unavailable`
    pub async fn create_account(&self, new: NewAccount, origin: &Origin) -> Result<User> {
        self.insert_account(new, None, origin).await
    }

    async fn insert_account(
        &self,
        new: NewAccount,
        verification: Option<NewToken>,
        origin: &Origin,
    ) -> Result<User> {
        let password_hash = match new.credential {
            InitialCredential::Password(password) => {
                let hashed = self.passwords.hash_new("password", password, &new.person);
                Some(hashed.await?)
            }
            InitialCredential::Hash(hash) => Some(hash.into_string()),
            InitialCredential::None => None,
        };
        let new = NewUser {
            // Whoever runs this knows whose it is; nobody must have to let the first administrator in.
            is_verified: origin.actor == Actor::Operator,
            person: new.person,
            password_hash,
            role: new.role,
            tier: new.tier,
            verification,
        };
        self.store.user_insert(&new, origin).await
    }

    /// A user as the database has them now.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn user(&self, id: UserId) -> Result<User> {
        self.store.user_by_id(id).await
    }

    /// What decides about a user's usage, from memory as [`Auth::validate`] answers.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn user_standing(&self, id: UserId) -> Result<UserStanding> {
        let answer = self.cache.user(id, BootTime::now()).await?;
        answer.value.clone().ok_or(Error::UserNotFound)
    }

    /// What [`Auth::user_standing`] would answer, if memory alone can say so.
    pub fn recall_user(&self, id: UserId, clock: BootTime) -> Option<UserStanding> {
        self.cache.known_user(id, clock)
    }

    /// Has what [`Auth::recall_user`] looks at first on its way from memory.
    pub fn prefetch_user(&self, id: UserId) {
        self.cache.prefetch_user(id);
    }

    /// A user by e-mail address or username, in any case.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn user_by_identifier(&self, identifier: &Identifier) -> Result<User> {
        self.store.user_by_identifier(identifier).await
    }

    /// Lists users, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn users(&self, filter: &UserFilter, page: &PageRequest<Uuid>) -> Result<Page<User>> {
        self.store.user_list(filter, page).await
    }

    /// Changes what an account says of its user.
    ///
    /// # Errors
    /// `UserNotFound` · `AccountExists` · `LastAdmin` · `Unavailable`
    pub async fn update_user(
        &self,
        id: UserId,
        changes: &UserChanges,
        origin: &Origin,
    ) -> Result<User> {
        let user = self.store.user_update(id, changes, origin).await?;
        self.apply(Change::User(id));
        Ok(user)
    }

    /// Erases a user; `reason` is for the audit trail. What was used stays in the sums.
    ///
    /// # Errors
    /// `UserNotFound` · `LastAdmin` · `Unavailable`
    pub async fn delete_user(&self, id: UserId, reason: &str, origin: &Origin) -> Result<()> {
        self.store.user_delete(id, reason, origin).await?;
        self.apply(Change::User(id));
        Ok(())
    }

    /// Lists the audit trail, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn audit_events(
        &self,
        filter: &AuditFilter,
        page: &PageRequest<AuditCursor>,
    ) -> Result<Page<AuditRecord>> {
        self.store.audit_list(filter, page).await
    }

    /// Gives a user another password, and ends their sessions but `keep_only`, if that is given;
    /// returns how many ended.
    ///
    /// # Errors
    /// `InvalidCredentials` when `current` is wrong · `Invalid` (`new_password`) · `Throttled` ·
    /// `Overloaded` · `Unavailable`
    pub async fn change_password(
        &self,
        id: UserId,
        current: LoginPassword,
        new: String,
        keep_only: Option<SessionId>,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<usize> {
        let known = self.store.credentials_by_id(id).await?;
        let checked = known.password_hash;
        let attempt = self.admit_own(id, now).await?;
        let verdict = self.passwords.verify(current, checked.clone()).await?;
        let (Some(checked), true) = (checked, verdict.matches) else {
            self.attempt_failed(attempt).await?;
            return Err(Error::InvalidCredentials);
        };
        self.attempt_succeeded(attempt).await;
        let person = known.user.person();
        let hashed = self
            .passwords
            .hash_new("new_password", new, &person)
            .await?;
        let ended = self
            .store
            .user_set_password(
                id,
                &checked,
                &hashed,
                keep_only,
                origin,
                self.mails.tells(),
                now,
            )
            .await?;
        self.apply(Change::User(id));
        Ok(ended)
    }

    /// Moves a user to another of the `tiers`; tokens already issued see it at once. Naming the present
    /// tier changes nothing.
    ///
    /// # Errors
    /// `UserNotFound` · `Unavailable`
    pub async fn set_tier(
        &self,
        id: UserId,
        tier: &TierName,
        tiers: &Tiers,
        origin: &Origin,
    ) -> Result<User> {
        let user = self.store.user_set_tier(id, tier, tiers, origin).await?;
        self.apply(Change::User(id));
        Ok(user)
    }

    /// Turns the kill switch: while off, every token and login of the user is refused. `reason` is for
    /// the audit trail. Repeating it changes nothing.
    ///
    /// # Errors
    /// `UserNotFound` · `LastAdmin` · `Unavailable`
    pub async fn set_active(
        &self,
        id: UserId,
        is_active: bool,
        reason: &str,
        origin: &Origin,
    ) -> Result<User> {
        let user = self
            .store
            .user_set_active(id, is_active, reason, origin)
            .await?;
        self.apply(Change::User(id));
        Ok(user)
    }
}
