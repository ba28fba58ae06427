//! People, programs and their credentials: who is calling, and is it still allowed.
//!
//! Knows no protocol and no SQL. [`Auth`] is the public face; decisions beneath it are pure.

mod access_token;
mod accounts;
mod api_key_uses;
mod api_keys;
mod cache;
mod counters;
mod freshness;
#[cfg(fuzzing)]
pub mod fuzzing;
mod hash_pool;
mod import;
mod key_text;
mod keys;
mod mails;
mod master_key;
mod mfa;
mod one_time_token;
mod password;
mod password_policy;
mod random;
mod recent;
mod refresh_token;
mod service_accounts;
mod sessions;
mod stamps;
mod throttle;
mod validation;
mod watch;

use std::{sync::Arc, time::Duration};

use tokio::time::timeout;

pub use accounts::{InitialCredential, NewAccount};
pub use cache::Memory;
pub use counters::Counters;
pub use freshness::{Freshness, Trust};
pub use import::{Import, ImportOptions, ImportRow, Imported, RowFault};
pub use keys::{KeyError, KeyFile, KeyRing, PublicKey, generate_key_file, list_key_files};
pub use master_key::MasterKey;
pub use mfa::{Completed, Enabled, Enrolment, LoginAnswer, MfaChallenge};
pub use password::{ImportedHash, LoginPassword};
pub use random::random_alphanumeric;
pub use service_accounts::RotatedKey;
pub use sessions::{IssuedTokens, LoggedIn, Refreshed};
pub use validation::{KnownService, Principal, UserCredential, UserPrincipal, Validated};

pub use watch::{Told, Watch};

use access_token::AccessTokens;
use api_key_uses::ApiKeyUses;
use api_keys::ApiKeyLimits;
use cache::CredentialCache;
use mails::Mails;
use mfa::Mfa;
use password::Passwords;
use refresh_token::RefreshTokens;
use throttle::Throttle;
use watch::Watchers;

use crate::{
    clock::BootTime,
    config::{AuthSettings, MailSettings, PasswordSettings, ThrottleSettings},
    error::{Error, Result},
    model::{Change, Revision},
    store::Store,
};

/// The public face of this room. Cheap to clone.
#[derive(Clone)]
pub struct Auth {
    store: Store,
    cache: Arc<CredentialCache>,
    watchers: Arc<Watchers>,
    passwords: Passwords,
    throttle: Arc<Throttle>,
    mfa: Arc<Mfa>,
    mails: Arc<Mails>,
    access_tokens: Arc<AccessTokens>,
    refresh_tokens: Arc<RefreshTokens>,
    lifetimes: Lifetimes,
    api_key_limits: ApiKeyLimits,
    api_key_uses: Arc<ApiKeyUses>,
    import_ids: aws_lc_rs::hmac::Key,
}

/// For the state that a call left, beyond the call itself.
const REVISION_WITHIN: Duration = Duration::from_millis(250);

/// How long things last.
#[derive(Clone, Copy, Debug)]
struct Lifetimes {
    refresh_idle: Duration,
    refresh_absolute: Duration,
    refresh_retry_window: Duration,
}

impl Auth {
    /// Computes one hash, to answer for accounts that do not exist.
    ///
    /// # Errors
    /// `Internal` when the random source fails.
    pub fn new(
        store: Store,
        keys: KeyRing,
        master_key: &MasterKey,
        settings: &AuthSettings,
        passwords: &PasswordSettings,
        throttle: &ThrottleSettings,
    ) -> Result<Self> {
        let freshness = Freshness::new(settings.staleness_bound, settings.max_stale);
        let cache = CredentialCache::new(store.clone(), settings.cache_bytes, freshness);
        Ok(Self {
            store,
            cache: Arc::new(cache),
            watchers: Arc::new(Watchers::new()),
            passwords: Passwords::new(passwords)?,
            throttle: Arc::new(Throttle::new(master_key, throttle, passwords)),
            mfa: Arc::new(Mfa::new(master_key, settings)),
            mails: Arc::new(Mails::new(master_key, settings)),
            access_tokens: Arc::new(AccessTokens::new(keys, settings)),
            refresh_tokens: Arc::new(RefreshTokens::new(master_key)),
            lifetimes: Lifetimes {
                refresh_idle: settings.refresh_idle_ttl,
                refresh_absolute: settings.refresh_absolute_ttl,
                refresh_retry_window: settings.refresh_retry_window,
            },
            api_key_limits: ApiKeyLimits {
                per_user: settings.api_keys_per_user,
                max_ttl: settings.api_key_max_ttl,
            },
            api_key_uses: Arc::default(),
            import_ids: master_key.mac_key("import-ids/v1"),
        })
    }

    /// The same, and it mails.
    pub fn mailing(
        self,
        master_key: &MasterKey,
        settings: &AuthSettings,
        mail: &MailSettings,
    ) -> Self {
        let mails = Mails::new(master_key, settings).sending(mail);
        Self {
            mails: Arc::new(mails),
            ..self
        }
    }

    /// A change that this or another replica has committed: answers read before it are given no more.
    pub fn apply(&self, change: Change) {
        self.cache.apply(change);
        // After: an answer asked for by now is the new one.
        self.watchers.tell_change(change);
    }

    /// Changes may have been missed, so answers read before are not simply believed any more.
    pub fn doubt(&self) {
        self.cache.doubt();
        self.watchers.tell(Told::Reset);
    }

    /// Every change up to `revision` is known; a heartbeat sent at `sent_at` has proved it.
    pub fn heard_up_to(&self, revision: Revision, sent_at: BootTime) {
        self.freshness().confirm(revision, sent_at);
        self.watchers.tell(Told::UpTo(revision));
    }

    /// Watches for whatever may contradict answers of [`Auth::validate`], from now on.
    ///
    /// # Errors
    /// `Overloaded` · `Unavailable` while changes are not heard of in time
    pub fn watch(&self) -> Result<Watch> {
        match self.freshness().trust(BootTime::now()) {
            Trust::Live => self.watchers.watch(),
            Trust::Stale | Trust::Lost => {
                Err(Error::Unavailable("the change feed is not live".into()))
            }
        }
    }

    /// Ends every watch, those that begin from now on too: one that goes on would hold up the end of
    /// the server.
    pub fn end_watches(&self) {
        self.watchers.close();
    }

    /// The state that a change which has committed left; `None` when it cannot be told soon: that
    /// must not cost the answer.
    pub async fn revision(&self) -> Option<Revision> {
        timeout(REVISION_WITHIN, self.store.revision())
            .await
            .ok()?
            .ok()
    }

    /// Up to when changes are known.
    pub fn freshness(&self) -> &Freshness {
        self.cache.freshness()
    }

    /// What was done, counted.
    pub fn counters(&self) -> &Counters {
        self.cache.counters()
    }

    /// How much is remembered of credentials.
    pub fn memory(&self) -> Memory {
        self.cache.memory()
    }

    /// The public keys that verify access tokens.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.access_tokens.keys().public_keys().to_vec()
    }

    /// Signs and verifies access tokens with these keys from now on. A token of a key that is gone is
    /// refused, though it was accepted before: whoever keeps answers must ask again.
    pub fn replace_keys(&self, keys: KeyRing) {
        self.access_tokens.replace_keys(keys);
        self.watchers.tell(Told::Reset);
    }
}
