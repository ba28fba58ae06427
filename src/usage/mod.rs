//! Tokens used and tokens left: the ledger, the quota, the tiers.
//!
//! Knows no protocol, no SQL and no credentials. [`Usage`] is the public face; decisions beneath it
//! are pure.

mod ledger;
mod quota;
mod tiers;

use std::sync::Arc;

pub use ledger::check_occurred_at;
pub use quota::Decision;
pub use tiers::{TiersError, load_tiers};

use crate::{
    error::{Error, Result},
    model::{TierLimits, TierName, Tiers},
    store::Store,
};

/// The public face of this room. Cheap to clone.
#[derive(Clone)]
pub struct Usage {
    store: Store,
    tiers: Arc<Tiers>,
}

impl Usage {
    pub fn new(store: Store, tiers: Tiers) -> Self {
        Self {
            store,
            tiers: Arc::new(tiers),
        }
    }

    pub fn tiers(&self) -> &Tiers {
        &self.tiers
    }

    /// The limits of a tier.
    ///
    /// # Errors
    /// `Internal` when a user is in a tier that is configured no longer.
    fn limits(&self, tier: &TierName) -> Result<&TierLimits> {
        self.tiers
            .get(tier)
            .ok_or_else(|| Error::internal(format!("tier {tier} is not configured")))
    }
}
