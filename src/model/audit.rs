use std::{net::IpAddr, str::FromStr};

use chrono::{DateTime, Utc};
use serde_json::Value;
use uuid::Uuid;

use super::{Cursor, ServiceAccountId, UserId, Violation};

/// Where a call came from, for the audit trail.
#[derive(Clone, Debug)]
pub struct Origin {
    pub actor: Actor,
    pub request_id: String,
    pub address: Option<IpAddr>,
    /// At most 256 characters; empty when unknown.
    pub user_agent: String,
}

impl Origin {
    /// The operator at the command line of the service itself.
    pub fn operator() -> Self {
        Self {
            actor: Actor::Operator,
            request_id: Uuid::now_v7().to_string(),
            address: None,
            user_agent: String::new(),
        }
    }

    /// The same without from where.
    pub fn unseen(&self) -> Self {
        Self {
            address: None,
            user_agent: String::new(),
            ..self.clone()
        }
    }
}

/// Who did it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// Somebody without credentials: a login, a registration.
    Anonymous,
    User(UserId),
    Service(ServiceAccountId),
    /// The command line.
    Operator,
}

impl Actor {
    pub fn kind(self) -> ActorKind {
        match self {
            Self::Anonymous => ActorKind::Anonymous,
            Self::User(_) => ActorKind::User,
            Self::Service(_) => ActorKind::Service,
            Self::Operator => ActorKind::Operator,
        }
    }

    pub fn id(self) -> Option<Uuid> {
        match self {
            Self::User(id) => Some(id.0),
            Self::Service(id) => Some(id.0),
            Self::Anonymous | Self::Operator => None,
        }
    }
}

/// What kind of actor it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActorKind {
    Anonymous,
    User,
    Service,
    Operator,
}

impl ActorKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::User => "user",
            Self::Service => "service",
            Self::Operator => "operator",
        }
    }
}

impl FromStr for ActorKind {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        let all = [Self::Anonymous, Self::User, Self::Service, Self::Operator];
        let known = all.into_iter().find(|kind| kind.as_str() == text);
        known.ok_or_else(|| "must be a kind of actor".into())
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditAction {
    UserCreated,
    UserImported,
    UserUpdated,
    UserRoleSet,
    UserDeleted,
    UserTierSet,
    UserEnabled,
    UserDisabled,
    PasswordRehashed,
    PasswordChanged,
    MfaEnrolled,
    MfaEnabled,
    MfaDisabled,
    MfaReset,
    MfaChallenged,
    MfaCodeRefused,
    RecoveryCodesRegenerated,
    RecoveryCodeUsed,
    PasswordReset,
    EmailChangeRequested,
    EmailChangeCancelled,
    EmailChanged,
    EmailVerified,
    SessionOpened,
    SessionEnded,
    SessionsEnded,
    RefreshTokenReused,
    ServiceAccountCreated,
    ServiceAccountDisabled,
    ServiceKeyRotated,
    ApiKeyCreated,
    ApiKeyRevoked,
    QuotaOverrideSet,
    QuotaOverrideCleared,
    CreditsGranted,
    CreditsVoided,
}

impl AuditAction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UserCreated => "user.created",
            Self::UserImported => "user.imported",
            Self::UserUpdated => "user.updated",
            Self::UserRoleSet => "user.role_set",
            Self::UserDeleted => "user.deleted",
            Self::UserTierSet => "user.tier_set",
            Self::UserEnabled => "user.enabled",
            Self::UserDisabled => "user.disabled",
            Self::PasswordRehashed => "password.rehashed",
            Self::PasswordChanged => "password.changed",
            Self::MfaEnrolled => "mfa.enrolled",
            Self::MfaEnabled => "mfa.enabled",
            Self::MfaDisabled => "mfa.disabled",
            Self::MfaReset => "mfa.reset",
            Self::MfaChallenged => "mfa.challenged",
            Self::MfaCodeRefused => "mfa.code_refused",
            Self::RecoveryCodesRegenerated => "mfa.recovery_codes_regenerated",
            Self::RecoveryCodeUsed => "mfa.recovery_code_used",
            Self::PasswordReset => "password.reset",
            Self::EmailChangeRequested => "email.change_requested",
            Self::EmailChangeCancelled => "email.change_cancelled",
            Self::EmailChanged => "email.changed",
            Self::EmailVerified => "email.verified",
            Self::SessionOpened => "session.opened",
            Self::SessionEnded => "session.ended",
            Self::SessionsEnded => "user.sessions_ended",
            Self::RefreshTokenReused => "session.refresh_token_reused",
            Self::ServiceAccountCreated => "service_account.created",
            Self::ServiceAccountDisabled => "service_account.disabled",
            Self::ServiceKeyRotated => "service_account.key_rotated",
            Self::ApiKeyCreated => "api_key.created",
            Self::ApiKeyRevoked => "api_key.revoked",
            Self::QuotaOverrideSet => "quota.override_set",
            Self::QuotaOverrideCleared => "quota.override_cleared",
            Self::CreditsGranted => "quota.credits_granted",
            Self::CreditsVoided => "quota.credits_voided",
        }
    }
}

/// A security-relevant act, written in the transaction that does it. Never holds a secret.
#[derive(Clone, Debug)]
pub struct AuditEvent<'a> {
    pub action: AuditAction,
    pub origin: &'a Origin,
    /// The user, session, API key, service account or credits acted on.
    pub target: Uuid,
    /// Whom it concerns.
    pub user: Option<UserId>,
    pub details: Value,
}

impl<'a> AuditEvent<'a> {
    /// An act on a user.
    pub fn of_user(action: AuditAction, user: UserId, origin: &'a Origin) -> Self {
        Self::new(action, user.0, origin).about(user)
    }

    /// An act on something that belongs to nobody, unless [`Self::about`] says to whom.
    pub fn new(action: AuditAction, target: Uuid, origin: &'a Origin) -> Self {
        Self {
            action,
            origin,
            target,
            user: None,
            details: Value::Object(serde_json::Map::new()),
        }
    }

    /// Says whom the act concerns.
    pub fn about(self, user: UserId) -> Self {
        Self {
            user: Some(user),
            ..self
        }
    }

    pub fn with_details(self, details: Value) -> Self {
        Self { details, ..self }
    }
}

/// An act as it was written down.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditRecord {
    pub id: Uuid,
    pub occurred_at: DateTime<Utc>,
    pub action: String,
    pub actor_kind: ActorKind,
    pub actor_id: Option<Uuid>,
    pub target_id: Uuid,
    pub user_id: Option<UserId>,
    pub request_id: String,
    pub address: Option<IpAddr>,
    pub user_agent: String,
    pub details: Value,
}

/// Which acts to list; `None` means any.
#[derive(Clone, Debug, Default)]
pub struct AuditFilter {
    pub user_id: Option<UserId>,
    pub actor_id: Option<Uuid>,
    pub target_id: Option<Uuid>,
    pub action: Option<ActionFilter>,
    pub start: Option<DateTime<Utc>>,
    pub end: Option<DateTime<Utc>>,
}

impl AuditFilter {
    /// Whether it asks for the acts of all and on all.
    pub fn is_of_nobody(&self) -> bool {
        self.user_id.is_none() && self.actor_id.is_none() && self.target_id.is_none()
    }
}

/// One action, or all that begin alike: those end with a full stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ActionFilter {
    Exactly(String),
    /// With the full stop.
    Beginning(String),
}

impl FromStr for ActionFilter {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        let is_fine = |b: u8| b.is_ascii_lowercase() || b == b'_' || b == b'.';
        if !(1..=64).contains(&text.len()) || !text.bytes().all(is_fine) {
            return Err("must be up to 64 of a-z _ .".into());
        }
        let text = text.to_owned();
        Ok(if text.ends_with('.') {
            Self::Beginning(text)
        } else {
            Self::Exactly(text)
        })
    }
}

/// The position of an act in a list that is ordered by time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditCursor {
    pub occurred_at: DateTime<Utc>,
    pub id: Uuid,
}

impl Cursor for AuditCursor {
    fn to_bytes(&self) -> Vec<u8> {
        (self.occurred_at, self.id).to_bytes()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (occurred_at, id) = Cursor::from_bytes(bytes)?;
        Some(Self { occurred_at, id })
    }
}
