//! People's accounts: creation, look-up, tier and kill switch.

use uuid::Uuid;

use super::{Auth, BootTime, ImportedHash};
use crate::{
    error::{Error, Result},
    model::{
        Change, Identifier, Origin, Page, PageRequest, Person, Role, TierName, Tiers, User,
        UserFilter, UserId, UserStanding, Violation,
    },
    store::NewUser,
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
    /// Whether a password may be set; asked ahead to name it beside the other wrong fields.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_password(&self, password: &str) -> Result<(), Violation> {
        self.passwords.check(password)
    }

    /// Creates an account. The password is hashed before the database is asked, so that a taken
    /// address answers no sooner than a free one.
    ///
    /// # Errors
    /// `Invalid` (password) · `AccountExists` · `Overloaded` · `Unavailable`
    pub async fn create_account(&self, new: NewAccount, origin: &Origin) -> Result<User> {
        let password_hash = match new.credential {
            InitialCredential::Password(password) => {
                self.passwords
                    .check(&password)
                    .map_err(|violation| Error::invalid("password", violation))?;
                Some(self.passwords.hash(password).await?)
            }
            InitialCredential::Hash(hash) => Some(hash.into_string()),
            InitialCredential::None => None,
        };
        let new = NewUser {
            person: new.person,
            password_hash,
            role: new.role,
            tier: new.tier,
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

    /// What `look` makes of what [`Auth::user_standing`] would answer, if memory alone can say so.
    pub fn recall_user<T>(
        &self,
        id: UserId,
        clock: BootTime,
        look: impl FnOnce(&UserStanding) -> Option<T>,
    ) -> Option<T> {
        let known = self.cache.known_user(id, clock)?;
        look(known.value.as_ref()?)
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
    /// `UserNotFound` · `Unavailable`
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
