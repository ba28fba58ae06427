//! The second factor: codes of an authenticator app, and recovery codes for when it is lost.
//!
//! What changes it asks for everything that a login asks for (ASVS 5.0, 7.5.1). A code is used up in the
//! transaction of what it is used for, so that it counts once on all replicas, and is not lost when that
//! fails. Times are those of the database: all replicas have the same, and what was used is compared with
//! what was used elsewhere.

mod challenge;
mod enrolment;
mod login;
mod recovery;
mod sealing;
mod totp;

use chrono::{DateTime, Utc};

pub use enrolment::Enrolment;
pub use login::{Completed, LoginAnswer, MfaChallenge};

use challenge::Challenges;
use sealing::Sealing;
use totp::TotpSecret;

use super::{Auth, LoginPassword, MasterKey, throttle::CodeAttempt};
use crate::{
    config::AuthSettings,
    error::{Error, Result},
    model::{
        Change, FactorId, MfaCode, MfaStanding, Origin, SessionId, TotpCode, TotpCredential,
        UsedCode, UsedFactor, User, UserId,
    },
    store::{MfaReset, NewTotp},
};

/// What challenges and secrets are made with.
pub(super) struct Mfa {
    challenges: Challenges,
    sealing: Sealing,
    issuer: String,
}

/// A second factor that is in force now.
pub struct Enabled {
    /// For people to keep, this once.
    pub recovery_codes: Vec<String>,
    pub sessions_ended: usize,
}

/// A user whose password was right, and what it was checked against.
struct Proved {
    standing: MfaStanding,
    password_hash: String,
}

impl Mfa {
    pub(super) fn new(master_key: &MasterKey, settings: &AuthSettings) -> Self {
        Self {
            challenges: Challenges::new(master_key, settings.mfa_challenge_ttl),
            sealing: Sealing::new(master_key),
            issuer: settings.mfa_issuer.clone(),
        }
    }
}

impl Auth {
    /// Gives a user a secret for an authenticator app. It counts for nothing before
    /// [`Auth::confirm_totp`], and takes the place of one that was not confirmed.
    ///
    /// # Errors
    /// `InvalidCredentials` · `MfaAlreadyEnabled` · `Throttled` · `Overloaded` · `Unavailable`
    pub async fn enroll_totp(
        &self,
        id: UserId,
        current: LoginPassword,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<Enrolment> {
        let Proved {
            standing,
            password_hash,
        } = self.prove_password(id, current, now).await?;
        if standing.confirmed().is_some() {
            return Err(Error::MfaAlreadyEnabled);
        }
        let (secret, credential) = (TotpSecret::generate()?, FactorId::new());
        let new = NewTotp {
            user_id: id,
            id: credential,
            sealed_secret: self.mfa.sealing.seal(&secret, id, credential)?,
        };
        let enrolment = Enrolment::new(&secret, &self.mfa.issuer, &standing.user.username)?;
        self.store.totp_enroll(&new, &password_hash, origin).await?;
        Ok(enrolment)
    }

    /// Puts the enrolled factor in force, once a code shows that the app has it; ends the user's sessions
    /// but `keep_only`, if that is given.
    ///
    /// # Errors
    /// `MfaCodeInvalid` · `MfaNotEnabled`: nothing is enrolled · `MfaAlreadyEnabled` · `Throttled` ·
    /// `Unavailable`
    pub async fn confirm_totp(
        &self,
        id: UserId,
        code: TotpCode,
        keep_only: Option<SessionId>,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<Enabled> {
        let standing = self.mfa_standing(id).await?;
        let totp = match &standing.totp {
            None => return Err(Error::MfaNotEnabled),
            Some(totp) if totp.is_confirmed => return Err(Error::MfaAlreadyEnabled),
            Some(totp) => totp,
        };
        let code = MfaCode::Totp(code);
        let attempt = self.admit_own_code(id, &code, now).await?;
        let (codes, hashes) = recovery::generate(id)?;
        let confirming = async {
            let used = self.proof(id, totp, &code, standing.at).await?;
            let store = &self.store;
            store
                .totp_confirm(&used, &hashes, keep_only, origin, now)
                .await
        };
        let ended = self.with_code(attempt, id, origin, confirming).await?;
        self.apply(Change::User(id));
        Ok(Enabled {
            recovery_codes: codes.iter().map(|code| code.grouped()).collect(),
            sessions_ended: ended,
        })
    }

    /// Takes the second factor and the recovery codes away, and ends the user's sessions but `keep_only`,
    /// if that is given; returns how many ended.
    ///
    /// # Errors
    /// `InvalidCredentials` · `MfaCodeInvalid` · `MfaNotEnabled` · `Throttled` · `Overloaded` ·
    /// `Unavailable`
    pub async fn disable_totp(
        &self,
        id: UserId,
        current: LoginPassword,
        code: &MfaCode,
        keep_only: Option<SessionId>,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<usize> {
        let ended = self
            .with_both_factors(id, current, code, origin, now, async |used, hash| {
                self.store
                    .mfa_disable(used, hash, keep_only, origin, now)
                    .await
            })
            .await?;
        self.apply(Change::User(id));
        Ok(ended)
    }

    /// Gives a user new recovery codes in place of the old ones.
    ///
    /// # Errors
    /// `InvalidCredentials` · `MfaCodeInvalid` · `MfaNotEnabled` · `Throttled` · `Overloaded` ·
    /// `Unavailable`
    pub async fn regenerate_recovery_codes(
        &self,
        id: UserId,
        current: LoginPassword,
        code: &MfaCode,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<Vec<String>> {
        let (codes, hashes) = recovery::generate(id)?;
        self.with_both_factors(id, current, code, origin, now, async |used, hash| {
            self.store
                .recovery_codes_replace(used, hash, &hashes, origin)
                .await
        })
        .await?;
        Ok(codes.iter().map(|code| code.grouped()).collect())
    }

    /// Takes a user's second factor away for them, ends all their sessions, and forgets what failed.
    /// `reason` is for the audit trail. Repeating it changes nothing more.
    ///
    /// # Errors
    /// `UserNotFound` · `CallerNotAllowed`: one's own goes by [`Auth::disable_totp`] · `Unavailable`
    pub async fn reset_mfa(
        &self,
        id: UserId,
        reason: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<(User, MfaReset)> {
        let reset = self.store.mfa_reset(id, reason, origin, now).await?;
        self.apply(Change::User(id));
        Ok(reset)
    }

    /// Does what asks for password and code, and uses the code up with it.
    async fn with_both_factors<T>(
        &self,
        id: UserId,
        current: LoginPassword,
        code: &MfaCode,
        origin: &Origin,
        now: DateTime<Utc>,
        act: impl AsyncFnOnce(&UsedCode, &str) -> Result<T>,
    ) -> Result<T> {
        let Proved {
            standing,
            password_hash,
        } = self.prove_password(id, current, now).await?;
        let totp = standing.confirmed().ok_or(Error::MfaNotEnabled)?;
        let attempt = self.admit_own_code(id, code, now).await?;
        let acting = async {
            let used = self.proof(id, totp, code, standing.at).await?;
            act(&used, &password_hash).await
        };
        self.with_code(attempt, id, origin, acting).await
    }

    /// What a code would use up.
    ///
    /// # Errors
    /// `MfaCodeInvalid` · `Internal`: the secret cannot be read · `Unavailable`
    async fn proof(
        &self,
        user: UserId,
        totp: &TotpCredential,
        code: &MfaCode,
        at: DateTime<Utc>,
    ) -> Result<UsedCode> {
        let what = match code {
            MfaCode::Totp(code) => {
                let secret = self.mfa.sealing.open(&totp.sealed_secret, user, totp.id)?;
                let step = secret.step_of(code, totp.last_step, at);
                UsedFactor::Totp(step.ok_or(Error::MfaCodeInvalid)?)
            }
            MfaCode::Recovery(code) => {
                let hash = recovery::hash(user, code);
                // Before anything is locked for it: most that are wrong are wrong here.
                if !self.store.recovery_code_exists(user, &hash).await? {
                    return Err(Error::MfaCodeInvalid);
                }
                UsedFactor::RecoveryCode(hash)
            }
        };
        Ok(UsedCode {
            user_id: user,
            credential: totp.id,
            what,
        })
    }

    /// Tries a code that was let in by `attempt`, with what it is for, and settles it.
    async fn with_code<T>(
        &self,
        attempt: CodeAttempt,
        id: UserId,
        origin: &Origin,
        trying: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let tried = trying.await;
        match &tried {
            Err(Error::MfaCodeInvalid) => self.code_was_wrong(attempt, id, origin).await?,
            _ => self.code_was_not_wrong(attempt).await,
        }
        tried
    }

    /// Asks for the present password within a session, as [`Auth::change_password`] does.
    async fn prove_password(
        &self,
        id: UserId,
        current: LoginPassword,
        now: DateTime<Utc>,
    ) -> Result<Proved> {
        let standing = self.mfa_standing(id).await?;
        let attempt = self.admit_own(id, now).await?;
        let checked = standing.password_hash.clone();
        let verdict = self.passwords.verify(current, checked.clone()).await?;
        let (Some(password_hash), true) = (checked, verdict.matches) else {
            self.attempt_failed(attempt).await?;
            return Err(Error::InvalidCredentials);
        };
        self.attempt_succeeded(attempt).await;
        // Read again: the hash took its time, in which codes go by.
        Ok(Proved {
            standing: self.mfa_standing(id).await?,
            password_hash,
        })
    }

    async fn mfa_standing(&self, id: UserId) -> Result<MfaStanding> {
        let standing = self.store.mfa_standing(id).await?;
        standing.ok_or(Error::UserNotFound)
    }
}
