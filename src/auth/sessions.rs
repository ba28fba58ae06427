//! Logins and what follows: opening, refreshing and ending sessions.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Auth, LoginAnswer, LoginPassword, refresh_token};
use crate::{
    error::{Credential, Error, Fault, Result},
    model::{
        Change, Identifier, Origin, Page, PageRequest, RefreshRefusal, RefreshStep, SessionDetails,
        SessionId, SessionStanding, User, UserId,
    },
    store::Credentials,
};

/// Both tokens of a session.
pub struct IssuedTokens {
    pub access_token: String,
    pub access_token_expires_at: DateTime<Utc>,
    pub refresh_token: String,
    /// When the session lapses if the refresh token is not used.
    pub refresh_token_expires_at: DateTime<Utc>,
    pub session_id: SessionId,
}

pub struct LoggedIn {
    pub tokens: IssuedTokens,
    pub user: User,
}

pub struct Refreshed {
    pub tokens: IssuedTokens,
    /// The same successor was given before.
    pub repeated: bool,
}

impl Auth {
    /// Opens a session, or asks for a second factor.
    ///
    /// Whether the account exists shows neither in the answer nor in its time: an unknown one costs
    /// a hash too.
    ///
    /// # Errors
    /// `InvalidCredentials` · `AccountDisabled` and `EmailUnverified`, only after the right password ·
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub async fn login(
        &self,
        identifier: &Identifier,
        password: LoginPassword,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<LoginAnswer> {
        let (known, attempt) = self.admit_login(identifier, origin, now).await?;
        let (user, hash) = match known {
            Some(Credentials {
                user,
                password_hash,
            }) => (Some(user), password_hash),
            None => (None, None),
        };
        let verdict = self.passwords.verify(password, hash.clone()).await?;
        let (Some(user), Some(hash), true) = (user, hash, verdict.matches) else {
            self.attempt_failed(attempt).await?;
            return Err(Error::InvalidCredentials);
        };
        if !user.is_active {
            return Err(Error::AccountDisabled);
        }
        self.check_verified(&user).await?;
        let rehashed = verdict.rehashed;
        if user.mfa_enabled {
            let challenge = self.challenge(user.id, hash, rehashed, origin).await?;
            return Ok(LoginAnswer::Challenge(challenge));
        }
        let id = SessionId::new();
        let new = self.new_session(id, user.id, None, rehashed.clone(), origin, now);
        let standing = match self.store.session_open(new, &hash, now).await {
            // Since this moment.
            Err(Error::MfaChallengeInvalid) => {
                let challenge = self.challenge(user.id, hash, rehashed, origin).await?;
                return Ok(LoginAnswer::Challenge(challenge));
            }
            opened => opened?,
        };
        self.attempt_succeeded(attempt).await;
        let tokens = self.issue(&standing, now)?;
        Ok(LoginAnswer::Session(Box::new(LoggedIn {
            tokens,
            user: standing.user,
        })))
    }

    /// Exchanges a refresh token for its successor.
    ///
    /// # Errors
    /// `Refused` with the fault of the refresh token · `EmailUnverified` · `Unavailable`
    pub async fn refresh(
        &self,
        token: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<Refreshed> {
        let refused = |fault| Error::Refused {
            credential: Credential::RefreshToken,
            fault,
        };
        let (session_id, presented) = self
            .refresh_tokens
            .read(token)
            .ok_or(refused(Fault::Invalid))?;
        let lifetimes = self.lifetimes;
        let mails = self.mails.clone();
        let decide = move |standing: &SessionStanding| match refresh_token::decide(
            standing, presented, &lifetimes, now,
        ) {
            RefreshStep::Advance { .. } | RefreshStep::Repeat if mails.holds_up(&standing.user) => {
                RefreshStep::Refuse(RefreshRefusal::EmailUnverified)
            }
            step => step,
        };
        let after = self
            .store
            .session_refresh(session_id, origin, decide, now)
            .await?
            .ok_or(refused(Fault::SessionEnded))?;
        let repeated = match after.step {
            RefreshStep::Advance { .. } => false,
            RefreshStep::Repeat => true,
            RefreshStep::Revoke => {
                self.apply(Change::User(after.standing.user.id));
                return Err(refused(Fault::Reused));
            }
            RefreshStep::Refuse(refusal) => {
                return Err(refused(match refusal {
                    RefreshRefusal::Unknown => Fault::Invalid,
                    RefreshRefusal::Expired => Fault::Expired,
                    RefreshRefusal::SessionEnded => Fault::SessionEnded,
                    RefreshRefusal::AccountDisabled => Fault::AccountDisabled,
                    // No mail: clients refresh by themselves, and each would end the link before.
                    RefreshRefusal::EmailUnverified => return Err(Error::EmailUnverified),
                }));
            }
        };
        Ok(Refreshed {
            tokens: self.issue(&after.standing, now)?,
            repeated,
        })
    }

    /// Ends a session of a user. Repeating it changes nothing.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn logout(
        &self,
        session_id: SessionId,
        user_id: UserId,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<()> {
        match self
            .revoke_session(session_id, user_id, "", origin, now)
            .await
        {
            // Deleted meanwhile: nothing is left to end.
            Ok(_) | Err(Error::SessionNotFound) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Lists a user's sessions that can still be refreshed, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn sessions(
        &self,
        user_id: UserId,
        page: &PageRequest<Uuid>,
        now: DateTime<Utc>,
    ) -> Result<Page<SessionDetails>> {
        self.store.session_list(user_id, page, now).await
    }

    /// Ends a session of a user, and says whether it could still have been refreshed. One that had been
    /// ended before stays as it is. `reason` is for the audit trail.
    ///
    /// # Errors
    /// `SessionNotFound`, also when it is somebody else's · `Unavailable`
    pub async fn revoke_session(
        &self,
        id: SessionId,
        user_id: UserId,
        reason: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<(SessionDetails, bool)> {
        let revoked = self
            .store
            .session_revoke(id, user_id, reason, origin, now)
            .await?;
        self.apply(Change::User(user_id));
        Ok(revoked)
    }

    /// Ends all sessions of a user but `kept`; returns how many that were. `reason` is for the audit
    /// trail.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn revoke_sessions(
        &self,
        user_id: UserId,
        kept: Option<SessionId>,
        reason: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<usize> {
        let revoked = self
            .store
            .session_revoke_all(user_id, kept, reason, origin, now)
            .await?;
        self.apply(Change::User(user_id));
        Ok(revoked)
    }

    pub(super) fn issue(
        &self,
        standing: &SessionStanding,
        now: DateTime<Utc>,
    ) -> Result<IssuedTokens> {
        let session = &standing.session;
        let (access_token, access_token_expires_at) = self.access_tokens.issue(standing, now)?;
        Ok(IssuedTokens {
            access_token,
            access_token_expires_at,
            refresh_token: self.refresh_tokens.derive(session.id, session.counter),
            refresh_token_expires_at: session.idle_expires_at,
            session_id: session.id,
        })
    }
}
