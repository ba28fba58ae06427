use chrono::{DateTime, Utc};

use super::{ScopeSet, ServiceAccountId, ServiceName};

/// A program that calls this service.
#[derive(Clone, Debug)]
pub struct ServiceAccount {
    pub id: ServiceAccountId,
    pub name: ServiceName,
    pub scopes: ScopeSet,
    pub is_active: bool,
    pub created_at: DateTime<Utc>,
}
