//! What is mailed to people, and what they do with it: prove an address, set a forgotten password.

use std::{net::IpAddr, slice::from_ref, time::Duration};

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};

use super::{
    Auth, LoginPassword, MasterKey, one_time_token::OneTimeTokens, throttle::network::network,
};
use crate::{
    config::{AuthSettings, MailSettings},
    error::{Error, Result},
    model::{Change, Email, OneTimeTokenId, Origin, ThrottleRule, TokenPurpose, User, UserId},
    store::{Mailing, NewToken},
};

/// So often at least somebody who asks again and again is mailed.
const MAX_INTERVAL: Duration = Duration::from_mins(30);

/// When mails go, and how often.
pub(super) struct Mails {
    tokens: OneTimeTokens,
    /// Hides addresses that somebody named.
    names: hmac::Key,
    is_configured: bool,
    tells_logins: bool,
    requires_verified: bool,
    interval: Duration,
    verification_ttl: Duration,
    reset_ttl: Duration,
}

impl Mails {
    pub(super) fn new(master_key: &MasterKey, settings: &AuthSettings) -> Self {
        Self {
            tokens: OneTimeTokens::new(master_key),
            names: master_key.mac_key("mail-throttle/v1"),
            is_configured: false,
            tells_logins: false,
            requires_verified: settings.require_verified_email,
            interval: settings.mail_interval,
            verification_ttl: settings.verification_ttl,
            reset_ttl: settings.reset_ttl,
        }
    }

    /// Knows where mails go.
    pub(super) fn sending(self, settings: &MailSettings) -> Self {
        let is_configured = settings.is_configured();
        Self {
            is_configured,
            tells_logins: is_configured && settings.notify_logins,
            ..self
        }
    }

    fn configured(&self) -> Result<()> {
        match self.is_configured {
            true => Ok(()),
            false => Err(Error::MailNotConfigured),
        }
    }

    /// Whether mails tell of what has happened.
    pub(super) fn tells(&self) -> bool {
        self.is_configured
    }

    pub(super) fn tells_logins(&self) -> bool {
        self.tells_logins
    }

    /// Whether a user has to prove the address before anything else.
    pub(super) fn holds_up(&self, user: &User) -> bool {
        self.requires_verified && user.email_verified_at.is_none()
    }

    /// An interval that doubles with each mail, and is forgotten when nobody asks. Who lost a mail may have
    /// another one while the token of the lost one would be good.
    fn rule(&self, purpose: TokenPurpose) -> ThrottleRule {
        let max_delay = self.interval.max(MAX_INTERVAL).min(self.ttl(purpose) / 2);
        ThrottleRule {
            free: 0,
            first_delay: self.interval,
            max_delay,
            forgiven_in: 2 * max_delay,
        }
    }

    /// Of an address, to count by.
    fn name(&self, email: &Email) -> hmac::Tag {
        let lower = email.as_str().to_ascii_lowercase();
        hmac::sign(&self.names, lower.as_bytes())
    }

    /// One of mails to an address that is not the account's, or not yet: throwaway accounts must not buy
    /// mails to strangers. From elsewhere another one counts, and for each purpose, so that nobody's wishes
    /// keep back what proves the address of another.
    fn strangers(
        &self,
        purpose: TokenPurpose,
        email: &Email,
        from: Option<IpAddr>,
    ) -> (String, ThrottleRule) {
        let name = URL_SAFE_NO_PAD.encode(self.name(email));
        let from = from.map_or_else(|| "nowhere".to_owned(), |from| network(from).to_string());
        let subject = format!("mail {} {name} from {from}", purpose.as_str());
        (subject, self.rule(purpose))
    }

    fn ttl(&self, purpose: TokenPurpose) -> Duration {
        match purpose {
            TokenPurpose::ResetPassword => self.reset_ttl,
            TokenPurpose::VerifyEmail | TokenPurpose::ChangeEmail => self.verification_ttl,
        }
    }

    fn token(&self, purpose: TokenPurpose, limits: Vec<(String, ThrottleRule)>) -> NewToken {
        let id = OneTimeTokenId::new();
        NewToken {
            id,
            hash: self.tokens.hash(id),
            purpose,
            ttl: self.ttl(purpose),
            limits,
        }
    }

    /// To prove the address of an account that is being made; `None` when nothing is mailed.
    pub(super) fn first_verification(&self, email: &Email, origin: &Origin) -> Option<NewToken> {
        let purpose = TokenPurpose::VerifyEmail;
        let limits = vec![self.strangers(purpose, email, origin.address)];
        self.is_configured.then(|| self.token(purpose, limits))
    }

    /// To prove the address of an account that is there: no other account has it, so the account alone
    /// counts, and nobody else can use that up.
    fn verification(&self, user: &User) -> NewToken {
        let purpose = TokenPurpose::VerifyEmail;
        let own = (format!("mail {} verify", user.id), self.rule(purpose));
        self.token(purpose, vec![own])
    }

    fn change(&self, user: UserId, email: &Email, origin: &Origin) -> NewToken {
        let purpose = TokenPurpose::ChangeEmail;
        let own = (format!("mail {user} change"), self.rule(purpose));
        let strangers = self.strangers(purpose, email, origin.address);
        self.token(purpose, vec![own, strangers])
    }

    /// The token of a reset, and whose it is if it is nobody's. Whoever asks, and whether anybody has the
    /// address, one counts: by its name.
    fn reset(&self, email: &Email) -> (NewToken, UserId) {
        let name = self.name(email);
        let subject = format!("mail reset {}", URL_SAFE_NO_PAD.encode(name));
        let mut id = [0; 16];
        id.copy_from_slice(&name.as_ref()[..16]);
        let nobody = UserId(uuid::Builder::from_random_bytes(id).into_uuid());
        let purpose = TokenPurpose::ResetPassword;
        let token = self.token(purpose, vec![(subject, self.rule(purpose))]);
        (token, nobody)
    }
}

impl Auth {
    /// The text of a mailed token, to be mailed.
    pub fn one_time_token(&self, id: OneTimeTokenId) -> String {
        self.mails.tokens.derive(id)
    }

    /// Mails a user what proves their address; `false` when it is proven already.
    ///
    /// # Errors
    /// `MailNotConfigured` · `MailTooSoon` · `Unavailable`
    pub async fn send_verification(&self, id: UserId) -> Result<bool> {
        self.mails.configured()?;
        let user = self.store.user_by_id(id).await?;
        if user.email_verified_at.is_some() {
            return Ok(false);
        }
        let token = self.mails.verification(&user);
        queued(self.store.verification_request(&user, &token).await?)?;
        Ok(true)
    }

    /// Refuses a user who has to prove their address first, and mails them what proves it, unless that was
    /// done a moment ago. To be asked behind a right password only.
    ///
    /// # Errors
    /// `EmailUnverified` · `Unavailable`
    pub(super) async fn check_verified(&self, user: &User) -> Result<()> {
        if !self.mails.holds_up(user) {
            return Ok(());
        }
        if self.mails.is_configured {
            let token = self.mails.verification(user);
            self.store.verification_request(user, &token).await?;
        }
        Err(Error::EmailUnverified)
    }

    /// Proves an address with a mailed token, once.
    ///
    /// # Errors
    /// `OneTimeTokenInvalid` · `AccountExists` when another account has the new address by now ·
    /// `Unavailable`
    pub async fn verify_email(&self, token: &str, origin: &Origin) -> Result<()> {
        let id = self.mails.tokens.read(token);
        let id = id.ok_or(Error::OneTimeTokenInvalid)?;
        let hash = self.mails.tokens.hash(id);
        let proven = self.store.email_prove(id, &hash, origin).await?;
        let user_id = proven.ok_or(Error::OneTimeTokenInvalid)?;
        self.apply(Change::User(user_id));
        Ok(())
    }

    /// Mails whoever has an account of this address, is active and has a password, what sets another one.
    /// Whether anybody has shows neither in the answer nor in its time: else the same is written to the
    /// same tables for nobody. Each network may ask a number of times.
    ///
    /// # Errors
    /// `MailNotConfigured` · `Throttled` · `Unavailable`
    pub async fn request_password_reset(
        &self,
        email: &Email,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<()> {
        self.mails.configured()?;
        self.admit_from("reset", origin, now).await?;
        let (token, nobody) = self.mails.reset(email);
        self.store.reset_request(email, nobody, &token).await
    }

    /// Sets a password with a mailed token, once, and ends all sessions; returns how many. Opens none.
    ///
    /// # Errors
    /// `OneTimeTokenInvalid` · `Invalid` (`new_password`), the token stays good · `Overloaded` ·
    /// `Unavailable`
    pub async fn reset_password(
        &self,
        token: &str,
        new: String,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<usize> {
        let id = self.mails.tokens.read(token);
        let id = id.ok_or(Error::OneTimeTokenInvalid)?;
        let hash = self.mails.tokens.hash(id);
        let user = self.store.reset_user(id, &hash).await?;
        let user = user.ok_or(Error::OneTimeTokenInvalid)?;
        let hashed = self
            .passwords
            .hash_new("new_password", new, &user.person())
            .await?;
        let tell = self.mails.tells();
        let reset = self
            .store
            .password_reset(id, &hash, &hashed, origin, tell, now)
            .await?;
        let (user_id, ended) = reset.ok_or(Error::OneTimeTokenInvalid)?;
        self.apply(Change::User(user_id));
        Ok(ended)
    }

    /// Mails another address what proves it, and the present one that it is asked for. The present one
    /// counts until then; naming it takes the wish back. Asks for the password, as whoever has the
    /// address has the account.
    ///
    /// # Errors
    /// `MailNotConfigured` · `InvalidCredentials` · `AccountDisabled` · `Throttled` · `MailTooSoon` ·
    /// `Overloaded` · `Unavailable`
    pub async fn change_email(
        &self,
        id: UserId,
        email: &Email,
        current: LoginPassword,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<User> {
        self.mails.configured()?;
        let known = self.store.credentials_by_id(id).await?;
        let checked = known.password_hash;
        let attempt = self.admit_own(id, now).await?;
        let verdict = self.passwords.verify(current, checked.clone()).await?;
        let (Some(checked), true) = (checked, verdict.matches) else {
            self.attempt_failed(attempt).await?;
            return Err(Error::InvalidCredentials);
        };
        self.attempt_succeeded(attempt).await;
        if *email == known.user.email {
            self.store.email_change_cancel(id, origin).await?;
            return Ok(known.user);
        }
        let token = self.mails.change(id, email, origin);
        let asked = self
            .store
            .email_change_request(id, email, &checked, &token, origin);
        queued(asked.await?)?;
        Ok(known.user)
    }

    /// Lets somebody without a credential do something, and counts it against the network whatever becomes
    /// of it.
    ///
    /// # Errors
    /// `Throttled` · `Unavailable`
    pub(super) async fn admit_from(
        &self,
        what: &str,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<()> {
        let (Some(rule), Some(address)) = (self.throttle.address, origin.address) else {
            return Ok(());
        };
        let subject = format!("{what} {}", network(address));
        let states = self.store.throttle_states(from_ref(&subject)).await?;
        if let Some(wait) = states.get(&subject).and_then(|state| rule.wait(state, now)) {
            return Err(Error::Throttled { retry_after: wait });
        }
        self.store.throttle_fail(&[(subject, rule)], now).await
    }
}

fn queued(mailing: Mailing) -> Result<()> {
    match mailing {
        Mailing::Queued => Ok(()),
        Mailing::TooSoon(retry_after) => Err(Error::MailTooSoon { retry_after }),
    }
}
