//! Users' keys for programs of theirs.

use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Auth, key_text::API_KEY};
use crate::{
    config::duration,
    error::Result,
    model::{
        ApiKey, ApiKeyId, ApiKeyName, ApiKeyScopes, Change, Origin, Page, PageRequest, UserId,
        Violation,
    },
    store::NewApiKey,
};

/// Rows of one statement that notes uses.
const NOTE_BATCH: usize = 5_000;

/// How many and how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct ApiKeyLimits {
    pub(super) per_user: u32,
    pub(super) max_ttl: Duration,
}

impl Auth {
    /// Whether a key that is made now may expire then; asked ahead to name it beside the other
    /// wrong fields.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check_api_key_expiry(
        &self,
        expires_at: DateTime<Utc>,
        now: DateTime<Utc>,
    ) -> Result<(), Violation> {
        let max_ttl = self.api_key_limits.max_ttl;
        if expires_at <= now {
            Err("must be in the future".into())
        } else if expires_at > now + max_ttl {
            let within = duration::text(max_ttl);
            Err(format!("must be within {within}, or unset for a key that never expires").into())
        } else {
            Ok(())
        }
    }

    /// Creates an API key, which is shown this once and stored hashed.
    ///
    /// # Errors
    /// `TooManyKeys` · `UserNotFound` · `Unavailable`
    pub async fn create_api_key(
        &self,
        user_id: UserId,
        name: ApiKeyName,
        scopes: ApiKeyScopes,
        expires_at: Option<DateTime<Utc>>,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<(ApiKey, String)> {
        let text = API_KEY.generate()?;
        let new = NewApiKey {
            user_id,
            name,
            scopes,
            key_hash: API_KEY.hash(&text).expect("a key just made is well formed"),
            expires_at,
        };
        let limit = self.api_key_limits.per_user;
        let key = self.store.api_key_insert(&new, limit, origin, now).await?;
        Ok((key, text))
    }

    /// Lists a user's API keys, newest first: the live ones, or also those that have ended.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn api_keys(
        &self,
        user_id: UserId,
        show_ended: bool,
        page: &PageRequest<Uuid>,
        now: DateTime<Utc>,
    ) -> Result<Page<ApiKey>> {
        self.store
            .api_key_list(user_id, show_ended, page, now)
            .await
    }

    /// Ends an API key of a user for good. Repeating it changes nothing.
    ///
    /// # Errors
    /// `ApiKeyNotFound`, also when it is somebody else's · `Unavailable`
    pub async fn revoke_api_key(
        &self,
        id: ApiKeyId,
        user_id: UserId,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<ApiKey> {
        let key = self.store.api_key_revoke(id, user_id, origin, now).await?;
        self.apply(Change::User(user_id));
        Ok(key)
    }

    /// Writes when API keys were last used, as far as that was not written before. Repeating it
    /// changes nothing; what fails waits for the next time.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn write_api_key_uses(&self) -> Result<()> {
        for batch in self.api_key_uses.unwritten().chunks(NOTE_BATCH) {
            self.store.api_key_note_uses(batch).await?;
            self.api_key_uses.settle(batch);
        }
        Ok(())
    }
}
