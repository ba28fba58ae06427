//! Whose credential is this, and is it still good?
//!
//! The one path for both questions: what `ValidateToken` answers and who calls an RPC. State is
//! resolved live, so a logout or a ban needs no expiry. Reads Postgres on every call; the cache
//! that will stand before it has its place here.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::{Auth, access_token::Claims, service_key};
use crate::{
    error::{Credential, Error, Fault, Result},
    model::{Role, ScopeSet, ServiceAccountId, SessionId, SessionStanding, User, UserId},
    store::ServiceStanding,
};

/// Who a credential stands for.
#[derive(Clone, Debug)]
pub enum Principal {
    User(UserPrincipal),
    Service {
        id: ServiceAccountId,
        scopes: ScopeSet,
    },
}

/// A user acting through a session.
#[derive(Clone, Copy, Debug)]
pub struct UserPrincipal {
    pub id: UserId,
    pub role: Role,
    pub session_id: SessionId,
}

/// A good access token and what it stands for now.
#[derive(Clone, Debug)]
pub struct Validated {
    pub user: User,
    pub session_id: SessionId,
    pub issued_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
    /// How long the answer may be reused without missing a revocation for longer than promised.
    /// Nobody is told of revocations yet, so none.
    pub cache_for: Duration,
}

impl Auth {
    /// Resolves the credential of a caller: an access token or a service key.
    ///
    /// # Errors
    /// `Refused` · `Unavailable`
    pub async fn authenticate(&self, credential: &str, now: DateTime<Utc>) -> Result<Principal> {
        if service_key::is_service_key(credential) {
            return self.authenticate_service(credential, now).await;
        }
        let validated = self
            .validate(credential, Credential::Authorization, now)
            .await?;
        Ok(Principal::User(UserPrincipal {
            id: validated.user.id,
            role: validated.user.role,
            session_id: validated.session_id,
        }))
    }

    /// Checks an access token: signature and times, then session and user as they stand now.
    ///
    /// `credential` is what an error calls it.
    ///
    /// # Errors
    /// `Refused` · `Unavailable`
    pub async fn validate(
        &self,
        token: &str,
        credential: Credential,
        now: DateTime<Utc>,
    ) -> Result<Validated> {
        let refused = |fault| Error::Refused { credential, fault };
        let claims = self.access_tokens.verify(token, now).map_err(refused)?;
        let standing = self
            .store
            .session_standing(claims.session_id())
            .await?
            .ok_or(refused(Fault::SessionEnded))?;
        check(&standing, &claims, now).map_err(refused)?;
        Ok(Validated {
            session_id: standing.session.id,
            user: standing.user,
            issued_at: claims.issued_at(),
            expires_at: claims.expires_at(),
            cache_for: Duration::ZERO,
        })
    }

    async fn authenticate_service(&self, key: &str, now: DateTime<Utc>) -> Result<Principal> {
        let refused = |fault| Error::Refused {
            credential: Credential::Authorization,
            fault,
        };
        let hash = service_key::hash(key).ok_or(refused(Fault::Invalid))?;
        let standing = self
            .store
            .service_by_key_hash(&hash)
            .await?
            .ok_or(refused(Fault::Invalid))?;
        check_service(&standing, now).map_err(refused)?;
        Ok(Principal::Service {
            id: standing.account.id,
            scopes: standing.account.scopes,
        })
    }
}

/// Checks a verified token against the session and user it names.
fn check(standing: &SessionStanding, claims: &Claims, now: DateTime<Utc>) -> Result<(), Fault> {
    let SessionStanding { session, user } = standing;
    if user.id != claims.user_id() {
        return Err(Fault::Invalid);
    }
    if !session.is_live(now) || user.auth_epoch != claims.epoch() {
        return Err(Fault::SessionEnded);
    }
    if !user.is_active {
        return Err(Fault::AccountDisabled);
    }
    Ok(())
}

fn check_service(standing: &ServiceStanding, now: DateTime<Utc>) -> Result<(), Fault> {
    if standing.key_revoked_at.is_some() {
        return Err(Fault::Invalid);
    }
    if standing
        .key_expires_at
        .is_some_and(|expires_at| expires_at <= now)
    {
        return Err(Fault::Expired);
    }
    if !standing.account.is_active {
        return Err(Fault::AccountDisabled);
    }
    Ok(())
}
