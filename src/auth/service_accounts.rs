//! Programs' accounts and their keys.

use uuid::Uuid;

use super::{Auth, key_text::SERVICE_KEY};
use crate::{
    error::Result,
    model::{
        Change, Origin, Page, PageRequest, ScopeSet, ServiceAccount, ServiceAccountId, ServiceName,
    },
    store::NewServiceAccount,
};

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
