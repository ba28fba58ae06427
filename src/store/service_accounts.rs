use chrono::{DateTime, Utc};
use diesel::{
    dsl::{self, sql},
    prelude::*,
    sql_types::{Nullable, Text, Timestamptz},
};
use diesel_async::{AsyncConnection as _, RunQueryDsl};
use serde_json::json;
use uuid::Uuid;

use super::{
    Store,
    audit::audit_insert_in_txn,
    errors::{on_unique, stored},
    schema::{service_accounts, service_keys},
};
use crate::{
    error::{Error, Result},
    model::{
        AuditAction, AuditEvent, KeyOverlap, Origin, Page, PageRequest, ScopeSet, ServiceAccount,
        ServiceAccountId, ServiceKeyId, ServiceName,
    },
};

/// A service account to create, with its first key.
pub struct NewServiceAccount {
    pub name: ServiceName,
    pub scopes: ScopeSet,
    pub key_hash: Vec<u8>,
}

/// A key and its account as they stand now.
pub struct ServiceStanding {
    pub account: ServiceAccount,
    pub key_expires_at: Option<DateTime<Utc>>,
    pub key_revoked_at: Option<DateTime<Utc>>,
}

impl Store {
    /// Creates a service account with its first key.
    ///
    /// # Errors
    /// `ServiceAccountExists` · `Unavailable`
    pub async fn service_account_insert(
        &self,
        new: &NewServiceAccount,
        origin: &Origin,
    ) -> Result<ServiceAccount> {
        let id = ServiceAccountId::new();
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let row = diesel::insert_into(service_accounts::table)
                .values((
                    service_accounts::id.eq(id.0),
                    service_accounts::name.eq(new.name.as_str()),
                    service_accounts::scopes.eq(new.scopes.names()),
                ))
                .returning(ServiceAccountRow::as_returning())
                .get_result(conn)
                .await
                .map_err(on_unique(|| Error::ServiceAccountExists))?;
            diesel::insert_into(service_keys::table)
                .values((
                    service_keys::id.eq(ServiceKeyId::new().0),
                    service_keys::service_account_id.eq(id.0),
                    service_keys::key_hash.eq(&new.key_hash),
                ))
                .execute(conn)
                .await?;
            let event = AuditEvent::new(AuditAction::ServiceAccountCreated, id.0, origin)
                .with_details(json!({"name": row.name, "scopes": row.scopes}));
            audit_insert_in_txn(&event, conn).await?;
            row.try_into()
        })
        .await
    }

    /// Finds a key by its hash, with its account; `None` when there is no such key. One that
    /// `is_known` to have been a key does not wait behind those that anybody can make up.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn service_by_key_hash(
        &self,
        key_hash: &[u8],
        is_known: bool,
    ) -> Result<Option<ServiceStanding>> {
        type Found = (
            ServiceAccountRow,
            Option<DateTime<Utc>>,
            Option<DateTime<Utc>>,
        );
        let _turn = self.key_lookup(is_known).await?;
        let mut conn = self.conn().await?;
        let found: Option<Found> = service_keys::table
            .inner_join(service_accounts::table)
            .filter(service_keys::key_hash.eq(key_hash))
            .select((
                ServiceAccountRow::as_select(),
                service_keys::expires_at,
                service_keys::revoked_at,
            ))
            .first(&mut conn)
            .await
            .optional()?;
        found
            .map(|(row, key_expires_at, key_revoked_at)| {
                Ok(ServiceStanding {
                    account: row.try_into()?,
                    key_expires_at,
                    key_revoked_at,
                })
            })
            .transpose()
    }

    /// Finds a service account, in any case of the name.
    ///
    /// # Errors
    /// `ServiceAccountNotFound` · `Unavailable`
    pub async fn service_account_by_name(&self, name: &ServiceName) -> Result<ServiceAccount> {
        let mut conn = self.conn().await?;
        service_accounts::table
            .filter(sql::<Text>("lower(name)").eq(name.as_str().to_ascii_lowercase()))
            .select(ServiceAccountRow::as_select())
            .first(&mut conn)
            .await
            .optional()?
            .ok_or(Error::ServiceAccountNotFound)?
            .try_into()
    }

    /// Gives an account a new key and lets its live ones end: at once, or after an overlap, but
    /// none later than it would have.
    ///
    /// Calls for one account take turns. With an overlap, there are never more than `limit` live
    /// keys; without, the new one is the only one.
    ///
    /// # Errors
    /// `ServiceAccountNotFound` · `AccountDisabled` · `TooManyKeys` · `Unavailable`
    pub async fn service_key_rotate(
        &self,
        id: ServiceAccountId,
        key_hash: &[u8],
        overlap: KeyOverlap,
        limit: u32,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<ServiceAccount> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let account: ServiceAccount = service_accounts::table
                .find(id.0)
                .select(ServiceAccountRow::as_select())
                .for_no_key_update()
                .first(conn)
                .await
                .optional()?
                .ok_or(Error::ServiceAccountNotFound)?
                .try_into()?;
            if !account.is_active {
                return Err(Error::AccountDisabled);
            }
            let live = service_keys::table
                .filter(service_keys::service_account_id.eq(id.0))
                .filter(service_keys::revoked_at.is_null())
                .filter(
                    service_keys::expires_at
                        .is_null()
                        .or(service_keys::expires_at.gt(now)),
                );
            let old: i64 = live.count().get_result(conn).await?;
            if overlap.is_zero() {
                // Not by an expiry of now: the clock of another replica may be behind.
                diesel::update(live)
                    .set(service_keys::revoked_at.eq(now))
                    .execute(conn)
                    .await?;
            } else if old >= i64::from(limit) {
                return Err(Error::TooManyKeys { limit });
            } else {
                let sooner = sql::<Nullable<Timestamptz>>("LEAST(expires_at, ")
                    .bind::<Timestamptz, _>(now + overlap.get())
                    .sql(")");
                diesel::update(live)
                    .set(service_keys::expires_at.eq(sooner))
                    .execute(conn)
                    .await?;
            }
            let key_id = ServiceKeyId::new();
            diesel::insert_into(service_keys::table)
                .values((
                    service_keys::id.eq(key_id.0),
                    service_keys::service_account_id.eq(id.0),
                    service_keys::key_hash.eq(key_hash),
                ))
                .execute(conn)
                .await?;
            let details = json!({
                "key_id": key_id.to_string(),
                "old_keys": old,
                "overlap_secs": overlap.get().as_secs(),
            });
            let event = AuditEvent::new(AuditAction::ServiceKeyRotated, id.0, origin);
            audit_insert_in_txn(&event.with_details(details), conn).await?;
            Ok(account)
        })
        .await
    }

    /// Lists service accounts, newest first.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn service_account_list(
        &self,
        page: &PageRequest<Uuid>,
    ) -> Result<Page<ServiceAccount>> {
        let mut query = service_accounts::table
            .select(ServiceAccountRow::as_select())
            .order(service_accounts::id.desc())
            .limit(page.size + 1)
            .into_boxed();
        if let Some(after) = page.after {
            query = query.filter(service_accounts::id.lt(after));
        }
        let mut conn = self.conn().await?;
        let rows: Vec<ServiceAccountRow> = query.load(&mut conn).await?;
        let accounts = rows
            .into_iter()
            .map(ServiceAccount::try_from)
            .collect::<Result<Vec<_>>>()?;
        Ok(Page::from_rows(accounts, page, |account| account.id.0))
    }

    /// Turns an account off for good. Repeating it changes nothing.
    ///
    /// # Errors
    /// `ServiceAccountNotFound` · `Unavailable`
    pub async fn service_account_disable(
        &self,
        id: ServiceAccountId,
        origin: &Origin,
    ) -> Result<ServiceAccount> {
        let mut conn = self.conn().await?;
        conn.transaction::<_, Error, _>(async |conn| {
            let disabled = diesel::update(service_accounts::table.find(id.0))
                .filter(service_accounts::is_active)
                .set((
                    service_accounts::is_active.eq(false),
                    service_accounts::updated_at.eq(dsl::now),
                ))
                .execute(conn)
                .await?;
            if disabled > 0 {
                let event = AuditEvent::new(AuditAction::ServiceAccountDisabled, id.0, origin);
                audit_insert_in_txn(&event, conn).await?;
            }
            service_accounts::table
                .find(id.0)
                .select(ServiceAccountRow::as_select())
                .first(conn)
                .await
                .optional()?
                .ok_or(Error::ServiceAccountNotFound)?
                .try_into()
        })
        .await
    }
}

#[derive(Queryable, Selectable)]
#[diesel(table_name = service_accounts, check_for_backend(diesel::pg::Pg))]
struct ServiceAccountRow {
    id: Uuid,
    name: String,
    scopes: Vec<String>,
    is_active: bool,
    created_at: DateTime<Utc>,
}

impl TryFrom<ServiceAccountRow> for ServiceAccount {
    type Error = Error;

    fn try_from(row: ServiceAccountRow) -> Result<Self> {
        Ok(Self {
            id: ServiceAccountId(row.id),
            name: stored("service_accounts.name", &row.name)?,
            scopes: row
                .scopes
                .iter()
                .map(|scope| stored("service_accounts.scopes", scope))
                .collect::<Result<_>>()?,
            is_active: row.is_active,
            created_at: row.created_at,
        })
    }
}
