//! Programs' accounts and their keys.

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::{Auth, key_text::SERVICE_KEY};
use crate::{
    error::Result,
    model::{
        Change, KeyOverlap, Origin, Page, PageRequest, ScopeSet, ServiceAccount, ServiceAccountId,
        ServiceName,
    },
    store::NewServiceAccount,
};

/// Live keys of one account, so that rotations that are tried again and again do not pile up.
const MAX_LIVE_KEYS: u32 = 10;

/// A new key of a service account.
pub struct RotatedKey {
    pub account: ServiceAccount,
    /// Shown this once.
    pub key: String,
    /// From when on only the new key works.
    pub old_keys_end_at: DateTime<Utc>,
}

impl Auth {
    /// Creates a service account and its key, which is shown this once and stored hashed.
    ///
    /// # Errors
    /// `ServiceAccountExists` · `Unavailable`
    pub async fn create_service_account(
        &self,
        name: ServiceName,
        scopes: ScopeSet,
        origin: &Origin,
    ) -> Result<(ServiceAccount, String)> {
        let key = SERVICE_KEY.generate()?;
        let key_hash = SERVICE_KEY
            .hash(&key)
            .expect("a key just made is well formed");
        let new = NewServiceAccount {
            name,
            scopes,
            key_hash,
        };
        let account = self.store.service_account_insert(&new, origin).await?;
        Ok((account, key))
    }

    /// A service account by its name, in any case.
    ///
    /// # Errors
    /// `ServiceAccountNotFound` · `Unavailable`
    pub async fn service_account_by_name(&self, name: &ServiceName) -> Result<ServiceAccount> {
        self.store.service_account_by_name(name).await
    }

    /// Makes a new key for a service account, which is shown this once and stored hashed. The old
    /// ones go on working for `overlap`, or as long as they would have if that is shorter.
    ///
    /// Repeating it makes another key, to which the one before is an old one.
    ///
    /// # Errors
    /// `ServiceAccountNotFound` · `AccountDisabled` · `TooManyKeys`, not with an overlap of zero ·
    /// `Unavailable`
    pub async fn rotate_service_key(
        &self,
        id: ServiceAccountId,
        overlap: KeyOverlap,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<RotatedKey> {
        let key = SERVICE_KEY.generate()?;
        let key_hash = SERVICE_KEY
            .hash(&key)
            .expect("a key just made is well formed");
        let account = self
            .store
            .service_key_rotate(id, &key_hash, overlap, MAX_LIVE_KEYS, origin, now)
            .await?;
        self.apply(Change::Services);
        Ok(RotatedKey {
            account,
            key,
            old_keys_end_at: now + overlap.get(),
        })
    }

    /// Lists service accounts, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn service_accounts(&self, page: &PageRequest<Uuid>) -> Result<Page<ServiceAccount>> {
        self.store.service_account_list(page).await
    }

    /// Turns a service account off for good. Repeating it changes nothing.
    ///
    /// # Errors
    /// `ServiceAccountNotFound` · `Unavailable`
    pub async fn disable_service_account(
        &self,
        id: ServiceAccountId,
        origin: &Origin,
    ) -> Result<ServiceAccount> {
        let account = self.store.service_account_disable(id, origin).await?;
        self.apply(Change::Services);
        Ok(account)
    }
}
