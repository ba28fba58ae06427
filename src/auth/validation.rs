//! Whose credential is this, and is it still good?
//!
//! The one path for both questions: what `ValidateToken` answers and who calls an RPC. State is
//! resolved live, from memory that the change feed keeps true, so a logout or a ban needs no expiry
//! and a good token no database.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::Bytes;
use chrono::{DateTime, Utc};

use super::{
    Auth, BootTime,
    access_token::Claims,
    cache::{Answer, Verified},
    service_key,
};
use crate::{
    error::{Credential, Error, Fault, Result},
    model::{Role, Scope, ScopeSet, ServiceAccountId, SessionId, SessionStanding, User, UserId},
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

/// A good access token and what it stands for now. Cheap to clone.
#[derive(Clone)]
pub struct Validated(Arc<Checked>);

/// A service as its key was last resolved: perhaps outdated.
#[derive(Clone)]
pub struct KnownService(Arc<Answer<ServiceStanding>>);

/// One allocation: the memory that a hit touches is what it costs.
struct Checked {
    /// Seconds since the epoch, exclusive: until then only a change can spoil the token.
    good_until: i64,
    claims: Claims,
    answer: Arc<Answer<SessionStanding>>,
    /// See [`Validated::encoded`].
    encoded: OnceLock<Bytes>,
}

impl Validated {
    pub fn user(&self) -> &User {
        &self.standing().user
    }

    pub fn session_id(&self) -> SessionId {
        self.0.claims.session_id()
    }

    pub fn issued_at(&self) -> DateTime<Utc> {
        self.0.claims.issued_at()
    }

    pub fn expires_at(&self) -> DateTime<Utc> {
        self.0.claims.expires_at()
    }

    /// How long the answer may be reused without missing a revocation for longer than promised.
    /// Callers are not told of revocations, so not at all.
    pub fn cache_for(&self) -> Duration {
        Duration::ZERO
    }

    /// The answer as a caller wants it on the wire, made once by `encode` and kept beside the token
    /// for as long as it holds.
    pub fn encoded(&self, encode: impl FnOnce(&Self) -> Bytes) -> &Bytes {
        self.0.encoded.get_or_init(|| encode(self))
    }

    fn standing(&self) -> &SessionStanding {
        self.0
            .answer
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
        let claims = match self.cache.credential(token) {
            Some(Verified::Token(validated)) => {
                if self.still_good(&validated, now, clock) {
                    return Ok(validated);
                }
                let claims = &validated.0.claims;
                if let Err(expired) = self.access_tokens.check_expiry(claims, now) {
                    self.cache.forget(token);
                    return Err(refused(expired));
                }
                *claims
            }
            Some(Verified::ServiceKey(_)) => return Err(refused(Fault::Invalid)),
            None => self.access_tokens.verify(token, now).map_err(refused)?,
        };
        let (session_id, user_id) = (claims.session_id(), claims.user_id());
        let answer = self.cache.standing(session_id, user_id, clock).await?;
        let standing = answer.value.as_ref().ok_or(refused(Fault::SessionEnded))?;
        check(standing, &claims, now).map_err(refused)?;
        let expires_at = self.access_tokens.expiry(&claims);
        let session_ends_at = standing.session.absolute_expires_at.timestamp();
        let validated = Validated(Arc::new(Checked {
            good_until: expires_at.min(session_ends_at),
            claims,
            answer,
            encoded: OnceLock::new(),
        }));
        self.cache
            .remember(token, Verified::Token(validated.clone()));
        Ok(validated)
    }

    /// What [`Auth::validate`] would answer, if memory alone can say so and it is good news.
    pub fn recall(&self, token: &str, now: DateTime<Utc>, clock: BootTime) -> Option<Validated> {
        match self.cache.credential(token)? {
            Verified::Token(validated) => {
                self.still_good(&validated, now, clock).then_some(validated)
            }
            Verified::ServiceKey(_) => None,
        }
    }

    /// The service behind a key, if memory knows the key. Ask [`Auth::still_admits`] what it is worth.
    pub fn recall_service(&self, key: &str) -> Option<KnownService> {
        match self.cache.credential(key)? {
            Verified::ServiceKey(answer) => Some(KnownService(answer)),
            Verified::Token(_) => None,
        }
    }

    /// Whether memory alone can say that a service is good and has a scope.
    pub fn still_admits(
        &self,
        service: &KnownService,
        scope: Scope,
        now: DateTime<Utc>,
        clock: BootTime,
    ) -> bool {
        let KnownService(answer) = service;
        self.cache.holds(answer, clock)
            && answer.value.as_ref().is_some_and(|standing| {
                check_service(standing, now).is_ok() && standing.account.scopes.contains(scope)
            })
    }

    fn still_good(&self, validated: &Validated, now: DateTime<Utc>, clock: BootTime) -> bool {
        let Checked {
            good_until, answer, ..
        } = &*validated.0;
        now.timestamp() < *good_until && self.cache.holds(answer, clock)
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
