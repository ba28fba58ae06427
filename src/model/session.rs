use std::net::IpAddr;

use chrono::{DateTime, Utc};

use super::{SessionId, User, UserId};

/// A login, from the first token to the last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    pub id: SessionId,
    pub user_id: UserId,
    /// Generation of the newest refresh token; the one before it is its predecessor.
    pub counter: i64,
    /// When `counter` last advanced.
    pub rotated_at: DateTime<Utc>,
    /// When the session lapses if its refresh token is not used.
    pub idle_expires_at: DateTime<Utc>,
    /// When it ends however much it is used.
    pub absolute_expires_at: DateTime<Utc>,
    pub revoked_at: Option<DateTime<Utc>>,
    /// Whether a second factor opened it.
    pub mfa: bool,
}

impl Session {
    /// Whether it may still give and back tokens.
    pub fn is_live(&self, now: DateTime<Utc>) -> bool {
        self.revoked_at.is_none() && now < self.absolute_expires_at
    }
}

/// A session as shown to its user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionDetails {
    pub session: Session,
    pub created_at: DateTime<Utc>,
    /// When it last gave tokens.
    pub last_used_at: DateTime<Utc>,
    /// Of the client that logged in.
    pub user_agent: String,
    pub address: Option<IpAddr>,
}

/// A session and its user as they stand now: what a token is checked against.
#[derive(Clone, Debug)]
pub struct SessionStanding {
    pub session: Session,
    pub user: User,
}

/// What a presented refresh token does to its session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefreshStep {
    /// The newest token: the session moves on to the next generation.
    Advance { idle_expires_at: DateTime<Utc> },
    /// The one before the newest, whose successor was not used yet: the same successor again.
    Repeat,
    /// An older one: two parties hold the session, so it ends.
    Revoke,
    /// The session may not give tokens any more; nothing changes.
    Refuse(RefreshRefusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefreshRefusal {
    /// Not a generation this session ever issued.
    Unknown,
    /// Not used in time.
    Expired,
    /// Logged out, revoked or past its limit.
    SessionEnded,
    AccountDisabled,
    /// Of a user whose address nobody has proven, where that is asked for.
    EmailUnverified,
}
