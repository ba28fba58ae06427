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
    Auth,
    access_token::Claims,
    cache::{Answer, KnownApiKey, Source, Verified},
    key_text::{API_KEY, SERVICE_KEY},
};
use crate::{
    clock::BootTime,
    error::{Credential, Error, Fault, Result},
    model::{
        ApiKey, ApiKeyId, ApiKeyStanding, MinFreshness, Role, Scope, ScopeSet, ServiceAccountId,
        SessionId, SessionStanding, User, UserId,
    },
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
    /// A service that is known by its certificate.
    Peer {
        scopes: Arc<ScopeSet>,
    },
}

/// A user who acts.
#[derive(Clone, Copy, Debug)]
pub struct UserPrincipal {
    pub id: UserId,
    /// [`Role::User`] for any API key: what may leak must not carry an administrator's rights.
    pub role: Role,
    pub credential: UserCredential,
}

/// By what a user acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UserCredential {
    Session(SessionId),
    ApiKey(ApiKeyId),
}

/// A good access token or API key and what it stands for now. Cheap to clone.
#[derive(Clone)]
pub struct Validated(Arc<Checked>);

/// One allocation: the memory that a hit touches is what it costs.
struct Checked {
    /// Seconds since the epoch, exclusive: until then only a change can spoil it.
    good_until: i64,
    proof: Proof,
    /// See [`Validated::encoded`].
    encoded: OnceLock<Bytes>,
}

/// What was found good.
enum Proof {
    Token(Claims, Arc<Answer<SessionStanding>>),
    ApiKey(Arc<Answer<KnownApiKey>>),
}

/// A service as its key was last resolved: perhaps outdated.
#[derive(Clone)]
pub struct KnownService(Arc<Answer<ServiceStanding>>);

impl Principal {
    fn of(service: &ServiceStanding) -> Self {
        Self::Service {
            id: service.account.id,
            scopes: service.account.scopes.clone(),
        }
    }
}

impl UserPrincipal {
    fn of(validated: &Validated) -> Self {
        Self {
            id: validated.user().id,
            role: validated.role(),
            credential: validated.credential(),
        }
    }
}

impl<T> Answer<T> {
    /// What was found; of an answer that a proof holds.
    fn known(&self) -> &T {
        self.value
            .as_ref()
            .expect("checked before the proof was made")
    }
}

impl Validated {
    pub fn user(&self) -> &User {
        match &self.0.proof {
            Proof::Token(_, answer) => &answer.known().user,
            Proof::ApiKey(answer) => &answer.known().standing.user,
        }
    }

    /// What the user may do by this credential: see [`UserPrincipal::role`].
    pub fn role(&self) -> Role {
        match &self.0.proof {
            Proof::Token(..) => self.user().role,
            Proof::ApiKey(_) => Role::User,
        }
    }

    pub fn credential(&self) -> UserCredential {
        match &self.0.proof {
            Proof::Token(claims, _) => UserCredential::Session(claims.session_id()),
            Proof::ApiKey(answer) => UserCredential::ApiKey(answer.known().standing.key.id),
        }
    }

    /// How the session was opened (RFC 8176); nothing for an API key.
    pub fn methods(&self) -> &'static [&'static str] {
        match &self.0.proof {
            Proof::Token(_, answer) if answer.known().session.mfa => &["pwd", "otp"],
            Proof::Token(..) => &["pwd"],
            Proof::ApiKey(_) => &[],
        }
    }

    /// The API key that it is, if it is one.
    pub fn api_key(&self) -> Option<&ApiKey> {
        match &self.0.proof {
            Proof::Token(..) => None,
            Proof::ApiKey(answer) => Some(&answer.known().standing.key),
        }
    }

    pub fn issued_at(&self) -> DateTime<Utc> {
        match &self.0.proof {
            Proof::Token(claims, _) => claims.issued_at(),
            Proof::ApiKey(answer) => answer.known().standing.key.created_at,
        }
    }

    /// `None`: never.
    pub fn expires_at(&self) -> Option<DateTime<Utc>> {
        match &self.0.proof {
            Proof::Token(claims, _) => Some(claims.expires_at()),
            Proof::ApiKey(answer) => answer.known().standing.key.expires_at,
        }
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
}

impl Auth {
    /// Resolves the credential of a caller: an access token, an API key or a service key.
    ///
    /// # Errors
    /// `Refused` · `Unavailable`
    pub async fn authenticate(&self, credential: &str, now: DateTime<Utc>) -> Result<Principal> {
        if SERVICE_KEY.matches(credential) {
            return self.authenticate_service(credential, now).await;
        }
        let validated = self
            .validate(
                credential,
                Credential::Authorization,
                MinFreshness::Cached,
                now,
            )
            .await?;
        Ok(Principal::User(UserPrincipal::of(&validated)))
    }

    /// Checks an access token: signature and times, then session and user as they stand now. Or an
    /// API key: its text, then key and user as they stand now.
    ///
    /// `credential` is what an error calls it. One seen before costs one look-up in memory.
    ///
    /// # Errors
    /// `Refused` · `Unavailable`
    pub async fn validate(
        &self,
        token: &str,
        credential: Credential,
        min_freshness: MinFreshness,
        now: DateTime<Utc>,
    ) -> Result<Validated> {
        let refused = |fault| Error::Refused { credential, fault };
        let clock = BootTime::now();
        let source = match min_freshness {
            MinFreshness::Cached => Source::Any,
            MinFreshness::AtLeast(revision) if revision <= self.freshness().known() => {
                Source::Heard
            }
            MinFreshness::AtLeast(_) | MinFreshness::FromDatabase => Source::Database,
        };
        if source != Source::Database
            && let Some(validated) = self.recall(token, now, clock)
        {
            return Ok(validated);
        }
        self.cache.counters().misses.add_one();
        let proved = if API_KEY.matches(token) {
            self.prove_api_key(token, refused, source, now, clock).await
        } else {
            self.prove_token(token, refused, source, now, clock).await
        };
        if source == Source::Database
            && let Err(Error::Refused { .. }) = proved
        {
            // The good news of before still holds as far as is heard; now it is known better.
            self.cache.forget(token);
        }
        let (proof, good_until) = proved?;
        let validated = Validated(Arc::new(Checked {
            good_until,
            proof,
            encoded: OnceLock::new(),
        }));
        self.cache
            .remember(token, Verified::User(validated.clone()));
        Ok(validated)
    }

    /// What [`Auth::validate`] would answer, if memory alone can say so and it is good news.
    pub fn recall(&self, token: &str, now: DateTime<Utc>, clock: BootTime) -> Option<Validated> {
        let Verified::User(validated) = self.cache.credential(token)? else {
            return None;
        };
        let Checked {
            good_until, proof, ..
        } = &*validated.0;
        let holds = match proof {
            Proof::Token(claims, answer) => {
                self.access_tokens.is_current(claims) && self.cache.holds(answer, clock)
            }
            Proof::ApiKey(answer) => self.cache.holds(answer, clock),
        };
        if now.timestamp() >= *good_until || !holds {
            return None;
        }
        if let Proof::ApiKey(answer) = proof {
            self.note_use(answer.known(), now);
        }
        self.cache.counters().hits.add_one();
        Some(validated)
    }

    /// The service behind a key, if memory knows the key. Ask [`Auth::still_admits`] what it is worth.
    pub fn recall_service(&self, key: &str) -> Option<KnownService> {
        match self.cache.credential(key)? {
            Verified::ServiceKey(answer) => Some(KnownService(answer)),
            Verified::User(_) => None,
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

    /// Finds out what an access token stands for, and until when in seconds since the epoch.
    async fn prove_token(
        &self,
        token: &str,
        refused: impl Fn(Fault) -> Error,
        source: Source,
        now: DateTime<Utc>,
        clock: BootTime,
    ) -> Result<(Proof, i64)> {
        let claims = match self.known_claims(token) {
            Some(claims) => {
                if let Err(expired) = self.access_tokens.check_expiry(&claims, now) {
                    self.cache.forget(token);
                    return Err(refused(expired));
                }
                claims
            }
            None => self.access_tokens.verify(token, now).map_err(&refused)?,
        };
        let (session_id, user_id) = (claims.session_id(), claims.user_id());
        let answer = self
            .cache
            .standing(session_id, user_id, source, clock)
            .await?;
        let standing = answer.value.as_ref().ok_or(refused(Fault::SessionEnded))?;
        check(standing, &claims, now).map_err(refused)?;
        let session_ends_at = standing.session.absolute_expires_at.timestamp();
        let good_until = self.access_tokens.expiry(&claims).min(session_ends_at);
        Ok((Proof::Token(claims, answer), good_until))
    }

    /// What a token says that was verified before: its signature need not be checked again.
    fn known_claims(&self, token: &str) -> Option<Claims> {
        let Verified::User(validated) = self.cache.credential(token)? else {
            return None;
        };
        match &validated.0.proof {
            Proof::Token(claims, _) => Some(*claims).filter(|c| self.access_tokens.is_current(c)),
            Proof::ApiKey(_) => None,
        }
    }

    /// Finds out what an API key stands for, and until when in seconds since the epoch.
    async fn prove_api_key(
        &self,
        key: &str,
        refused: impl Fn(Fault) -> Error,
        source: Source,
        now: DateTime<Utc>,
        clock: BootTime,
    ) -> Result<(Proof, i64)> {
        let hash = API_KEY.hash(key).ok_or(refused(Fault::Invalid))?;
        let is_known = self.cache.credential(key).is_some();
        let answer = self.cache.api_key(hash, is_known, source, clock).await?;
        let known = answer.value.as_ref().ok_or(refused(Fault::Invalid))?;
        check_api_key(&known.standing, now).map_err(refused)?;
        self.note_use(known, now);
        let expires_at = known.standing.key.expires_at;
        let good_until = expires_at.map_or(i64::MAX, |at| at.timestamp());
        Ok((Proof::ApiKey(answer), good_until))
    }

    fn note_use(&self, known: &KnownApiKey, now: DateTime<Utc>) {
        let id = known.standing.key.id;
        self.api_key_uses.note(id, &known.last_use, now);
    }

    async fn authenticate_service(&self, key: &str, now: DateTime<Utc>) -> Result<Principal> {
        let refused = |fault| Error::Refused {
            credential: Credential::Authorization,
            fault,
        };
        let clock = BootTime::now();
        let answer = match self.cache.credential(key) {
            Some(Verified::ServiceKey(answer)) if self.cache.holds(&answer, clock) => answer,
            known => {
                let hash = SERVICE_KEY.hash(key).ok_or(refused(Fault::Invalid))?;
                let answer = self.cache.service(hash, known.is_some(), clock).await?;
                if answer.value.is_some() {
                    self.cache
                        .remember(key, Verified::ServiceKey(answer.clone()));
                }
                answer
            }
        };
        let standing = answer.value.as_ref().ok_or(refused(Fault::Invalid))?;
        check_service(standing, now).map_err(refused)?;
        Ok(Principal::of(standing))
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

/// A key outlives the sessions of its user, and a new password: only its own end and the kill switch
/// count.
fn check_api_key(standing: &ApiKeyStanding, now: DateTime<Utc>) -> Result<(), Fault> {
    let ApiKeyStanding { key, user } = standing;
    if key.revoked_at.is_some() {
        return Err(Fault::Invalid);
    }
    if key.expires_at.is_some_and(|expires_at| expires_at <= now) {
        return Err(Fault::Expired);
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
