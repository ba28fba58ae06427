use std::str::FromStr;

use chrono::{DateTime, Utc};

use super::{Email, FullName, NamePrefix, TierName, UserId, Username, Violation};

/// A person's account, without the means to log in.
#[derive(Clone, Debug, PartialEq)]
pub struct User {
    pub id: UserId,
    pub email: Email,
    pub username: Username,
    pub full_name: FullName,
    pub role: Role,
    pub tier: TierName,
    pub tier_updated_at: DateTime<Utc>,
    /// The kill switch.
    pub is_active: bool,
    /// Access tokens of an earlier epoch are refused.
    pub auth_epoch: i64,
    pub email_verified_at: Option<DateTime<Utc>>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    pub last_login_at: Option<DateTime<Utc>>,
    /// Whether a login asks for a second factor. It is not in the change feed: a user from a cache may say
    /// otherwise, so it decides nothing unless it was read for that.
    pub mfa_enabled: bool,
}

impl User {
    /// The names by which the user is known.
    pub fn person(&self) -> Person {
        Person {
            email: self.email.clone(),
            username: self.username.clone(),
            full_name: self.full_name.clone(),
        }
    }
}

/// What of a user decides about their usage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserStanding {
    pub id: UserId,
    pub tier: TierName,
    pub is_active: bool,
}

/// Who an account is for, by the names that they chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    pub email: Email,
    pub username: Username,
    pub full_name: FullName,
}

/// What to change of an account; `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserChanges {
    pub email: Option<Email>,
    pub username: Option<Username>,
    pub full_name: Option<FullName>,
    pub role: Option<Role>,
}

/// What a user may do beside their own affairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    User,
    Admin,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Admin => "admin",
        }
    }
}

impl FromStr for Role {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        match text {
            "user" => Ok(Self::User),
            "admin" => Ok(Self::Admin),
            _ => Err("must be user or admin".into()),
        }
    }
}

/// Which users to list; `None` means any.
#[derive(Clone, Debug)]
pub struct UserFilter {
    pub tier: Option<TierName>,
    pub is_active: Option<bool>,
    pub email: Option<NamePrefix>,
    pub username: Option<NamePrefix>,
    pub role: Option<Role>,
}
