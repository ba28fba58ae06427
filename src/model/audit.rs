use std::net::IpAddr;

use serde_json::Value;
use uuid::Uuid;

use super::{ServiceAccountId, UserId};

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
    pub fn kind(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous",
            Self::User(_) => "user",
            Self::Service(_) => "service",
            Self::Operator => "operator",
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

/// What was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuditAction {
    UserCreated,
    UserUpdated,
    UserRoleSet,
    UserDeleted,
    UserTierSet,
    UserEnabled,
    UserDisabled,
    PasswordRehashed,
    PasswordChanged,
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
            Self::UserUpdated => "user.updated",
            Self::UserRoleSet => "user.role_set",
            Self::UserDeleted => "user.deleted",
            Self::UserTierSet => "user.tier_set",
            Self::UserEnabled => "user.enabled",
            Self::UserDisabled => "user.disabled",
            Self::PasswordRehashed => "password.rehashed",
            Self::PasswordChanged => "password.changed",
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
    pub details: Value,
}

impl<'a> AuditEvent<'a> {
    pub fn new(action: AuditAction, target: Uuid, origin: &'a Origin) -> Self {
        Self {
            action,
            origin,
            target,
            details: Value::Object(serde_json::Map::new()),
        }
    }

    pub fn with_details(self, details: Value) -> Self {
        Self { details, ..self }
    }
}
