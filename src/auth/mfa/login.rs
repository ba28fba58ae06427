//! Logins that ask for a second factor: first a challenge, then the session.

use chrono::{DateTime, Utc};

use crate::{
    auth::{Auth, IssuedTokens, LoggedIn, throttle::networks},
    error::{Error, Result},
    model::{Factor, MfaCode, MfaStanding, Origin, SessionId, UsedCode, User, UserId},
    store::NewSession,
};

/// What the right password brings.
pub enum LoginAnswer {
    Session(Box<LoggedIn>),
    /// Nobody is logged in yet.
    Challenge(MfaChallenge),
}

/// What a login still needs. Not `Debug`.
pub struct MfaChallenge {
    pub challenge: String,
    pub expires_at: DateTime<Utc>,
    pub factors: Vec<Factor>,
}

/// A session that a second factor opened.
pub struct Completed {
    pub tokens: IssuedTokens,
    pub user: User,
    pub recovery_codes_left: i64,
}

impl Auth {
    /// Asks for the second factor of a user whose password matched `checked`. Nothing that failed before
    /// is forgotten: who knows the password alone is not let in. A weak hash is replaced all the same,
    /// for no later step has the password.
    pub(in crate::auth) async fn challenge(
        &self,
        id: UserId,
        checked: String,
        rehashed: Option<String>,
        origin: &Origin,
    ) -> Result<MfaChallenge> {
        let hash = match rehashed {
            Some(rehashed) => {
                let replacing = self.store.user_rehash(id, &checked, &rehashed, origin);
                replacing.await?;
                rehashed
            }
            None => checked,
        };
        let standing = self.store.mfa_standing(id).await?;
        let standing = standing.ok_or(Error::InvalidCredentials)?;
        if standing.password_hash.as_ref() != Some(&hash) {
            return Err(Error::InvalidCredentials);
        }
        let totp = match standing.confirmed() {
            Some(totp) => totp,
            None if standing.user.mfa_enabled => {
                return Err(Error::internal(format!(
                    "the second factor of user {id} is gone from the table totp_credentials: \
                     `tollkeeper users reset-mfa` the user"
                )));
            }
            // Taken away this moment.
            None => return Err(Error::MfaChallengeInvalid),
        };
        let issued = self
            .mfa
            .challenges
            .issue(&standing.user, &hash, totp.id, standing.at);
        let mut factors = vec![Factor::Totp];
        if standing.recovery_codes_left > 0 {
            factors.push(Factor::RecoveryCode);
        }
        let from = origin.address.map(networks).unwrap_or_default();
        self.store.mfa_challenged(id, &from, origin).await?;
        Ok(MfaChallenge {
            challenge: issued.0,
            expires_at: issued.1,
            factors,
        })
    }

    /// Opens the session of a challenge by a code.
    ///
    /// # Errors
    /// `MfaChallengeInvalid` · `MfaCodeInvalid` · `AccountDisabled` · `Throttled` · `Overloaded` ·
    /// `Unavailable`
    pub async fn complete_mfa(
        &self,
        challenge: &str,
        code: &MfaCode,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<Completed> {
        let challenge = self.mfa.challenges.read(challenge);
        let challenge = challenge.ok_or(Error::MfaChallengeInvalid)?;
        let (id, session_id) = (challenge.user_id, challenge.session_id);
        let standing = self.store.mfa_standing(id).await?;
        let standing = standing.ok_or(Error::MfaChallengeInvalid)?;
        let MfaStanding { user, at, .. } = &standing;
        let proved = standing.password_hash.as_ref().zip(standing.confirmed());
        let (hash, totp) = proved.ok_or(Error::MfaChallengeInvalid)?;
        if !self
            .mfa
            .challenges
            .holds(&challenge, user, hash, totp.id, *at)
            || self.store.session_standing(session_id).await?.is_some()
        {
            return Err(Error::MfaChallengeInvalid);
        }
        if !user.is_active {
            return Err(Error::AccountDisabled);
        }
        let attempt = self.admit_code(id, code, origin, now).await?;
        let opening = async {
            let used = self.proof(id, totp, code, *at).await?;
            // Before there is a session from here.
            let failed_logins = self.failed_logins(id, origin).await?;
            let new = self.new_session(session_id, id, Some(used), None, origin, now);
            match self.store.session_open(new, hash, now).await {
                // Changed this moment.
                Err(Error::InvalidCredentials) => Err(Error::MfaChallengeInvalid),
                opened => Ok((opened?, failed_logins)),
            }
        };
        let (opened, failed_logins) = self.with_code(attempt, id, origin, opening).await?;
        self.forget(failed_logins).await;
        let is_recovery = matches!(code, MfaCode::Recovery(_));
        Ok(Completed {
            tokens: self.issue(&opened, now)?,
            user: opened.user,
            recovery_codes_left: standing.recovery_codes_left - i64::from(is_recovery),
        })
    }

    /// A session to open, with a second factor or without.
    pub(in crate::auth) fn new_session<'a>(
        &self,
        id: SessionId,
        user_id: UserId,
        code: Option<UsedCode>,
        rehashed_password: Option<String>,
        origin: &'a Origin,
        now: DateTime<Utc>,
    ) -> NewSession<'a> {
        let absolute_expires_at = now + self.lifetimes.refresh_absolute;
        NewSession {
            id,
            user_id,
            idle_expires_at: (now + self.lifetimes.refresh_idle).min(absolute_expires_at),
            absolute_expires_at,
            rehashed_password,
            code,
            tell_if_new: self.mails.tells_logins(),
            origin,
        }
    }
}
