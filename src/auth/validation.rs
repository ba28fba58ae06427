//! Whose credential is this, and is it still good?
//!
//! The one path for both questions: what `ValidateToken` answers and who calls an RPC. State is
//! resolved live, from memory that the change feed keeps true, so a logout or a ban needs no expiry
//! and a good token no database.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};

use super::{
    Auth, BootTime,
    access_token::Claims,
    cache::{Answer, Verified},
    service_key,
};
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
#[derive(Clone)]
pub struct Validated {
    claims: Arc<Claims>,
    answer: Arc<Answer<SessionStanding>>,
}

impl Validated {
    pub fn user(&self) -> &User {
        &self.standing().user
    }

    pub fn session_id(&self) -> SessionId {
        self.claims.session_id()
    }

    pub fn issued_at(&self) -> DateTime<Utc> {
        self.claims.issued_at()
    }

    pub fn expires_at(&self) -> DateTime<Utc> {
        self.claims.expires_at()
    }

    /// How long the answer may be reused without missing a revocation for longer than promised.
    /// Callers are not told of revocations, so not at all.
    pub fn cache_for(&self) -> Duration {
        Duration::ZERO
    }

    fn standing(&self) -> &SessionStanding {
        self.answer
            .value
            .as_ref()
            .expect("checked before it was made")
    }
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
            id: validated.user().id,
            role: validated.user().role,
            session_id: validated.session_id(),
        }))
    }

    /// Checks an access token: signature and times, then session and user as they stand now.
    ///
    /// `credential` is what an error calls it. A token seen before costs one look-up in memory.
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
        let clock = BootTime::now();
        let (claims, answer) = match self.cache.credential(token) {
            Some(Verified::Token(claims, answer)) => {
                if let Err(expired) = self.access_tokens.check_expiry(&claims, now) {
                    self.cache.forget(token);
                    return Err(refused(expired));
                }
                if self.cache.holds(&answer, clock) {
                    (claims, answer)
                } else {
                    self.read_standing(token, claims, clock).await?
                }
            }
            Some(Verified::ServiceKey(_)) => return Err(refused(Fault::Invalid)),
            None => {
                let claims = self.access_tokens.verify(token, now).map_err(refused)?;
                self.read_standing(token, Arc::new(claims), clock).await?
            }
        };
        let standing = answer.value.as_ref().ok_or(refused(Fault::SessionEnded))?;
        check(standing, &claims, now).map_err(refused)?;
        Ok(Validated { claims, answer })
    }

    async fn read_standing(
        &self,
        token: &str,
        claims: Arc<Claims>,
        clock: BootTime,
    ) -> Result<(Arc<Claims>, Arc<Answer<SessionStanding>>)> {
        let (session_id, user_id) = (claims.session_id(), claims.user_id());
        let answer = self.cache.standing(session_id, user_id, clock).await?;
        self.cache
            .remember(token, Verified::Token(claims.clone(), answer.clone()));
        Ok((claims, answer))
    }

    async fn authenticate_service(&self, key: &str, now: DateTime<Utc>) -> Result<Principal> {
        let refused = |fault| Error::Refused {
            credential: Credential::Authorization,
            fault,
        };
        let clock = BootTime::now();
        let answer = match self.cache.credential(key) {
            Some(Verified::ServiceKey(answer)) if self.cache.holds(&answer, clock) => answer,
            _ => {
                let hash = service_key::hash(key).ok_or(refused(Fault::Invalid))?;
                let answer = self.cache.service(hash, clock).await?;
                if answer.value.is_some() {
                    self.cache
                        .remember(key, Verified::ServiceKey(answer.clone()));
                }
                answer
            }
        };
        let standing = answer.value.as_ref().ok_or(refused(Fault::Invalid))?;
        check_service(standing, now).map_err(refused)?;
        Ok(Principal::Service {
            id: standing.account.id,
            scopes: standing.account.scopes.clone(),
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
