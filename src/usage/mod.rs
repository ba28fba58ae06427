//! Tokens used and tokens left: the ledger, the quota, the tiers.
//!
//! Knows no protocol, no SQL and no credentials. [`Usage`] is the public face; decisions beneath it
//! are pure.

mod counters;
mod export;
mod handle;
mod keeper;
pub mod lease;
mod ledger;
mod notices;
mod query;
mod quota;
mod requests;
mod reservations;
mod spool;
mod tiers;
mod writer;

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use chrono::{DateTime, Utc};
use tokio::sync::{Mutex, watch};

pub use counters::Counters;
pub use export::{Export, ExportFormat, ExportPlace, Written};
pub use handle::HandleKey;
pub use keeper::{Holding, Keeper, KeeperSettings, Reservation, Standing, Wish};
pub use ledger::{Recorded, check_occurred_at};
pub use query::{GroupBy, UsageQuery, UsageSeries, UsageSeriesSet};
pub use quota::{Decision, QuotaWish};
pub use requests::RequestName;
pub use reservations::{Committed, QuotaRequest, Reserved};
pub use tiers::{TiersError, load_tiers};
pub use writer::WhenFull;

use export::ExportPlaces;
use handle::RequestKeys;
use notices::Marks;
use spool::Spool;
use writer::Writers;

use crate::{
    config::{QuotaSettings, UsageSettings},
    error::{Error, Result},
    model::{Change, Period, TierName, Tiers, UsageFilter, UserId},
    store::Store,
};

/// The public face of this room. Cheap to clone.
#[derive(Clone)]
pub struct Usage {
    store: Store,
    tiers: Arc<ArcSwap<Tiers>>,
    /// One at a time: what was found out about the tiers in force is to hold until others are.
    replacing: Arc<Mutex<()>>,
    writers: Writers,
    keeper: Keeper,
    spool: Spool,
    marks: Marks,
    /// Signs handles of reservations.
    handle_key: HandleKey,
    request_keys: RequestKeys,
    counters: Arc<Counters>,
    closing: watch::Sender<bool>,
    export_places: ExportPlaces,
}

/// For heartbeats, leases and what ends them, so that nothing else holds them up.
const KEEPER_CONNECTIONS: usize = 4;

/// At the end; what is not given back by then comes back when this replica counts as dead.
const GIVE_BACK: Duration = Duration::from_secs(2);

impl Usage {
    /// The ledger is written on the current runtime, and on as many `threads` that serve. Handles of
    /// reservations are signed with `handle_key`, the same on all replicas.
    ///
    /// # Errors
    /// `Internal` when the database's URL cannot be read.
    pub fn new(
        store: Store,
        tiers: Tiers,
        settings: &UsageSettings,
        quota: &QuotaSettings,
        handle_key: HandleKey,
        threads: usize,
    ) -> Result<Self> {
        let counters = Arc::<Counters>::default();
        let marks = Marks::default();
        let tiers = Arc::new(ArcSwap::from_pointee(tiers));
        let leases = store.with_lease_connections(KEEPER_CONNECTIONS)?;
        Ok(Self {
            keeper: Keeper::new(leases, tiers.clone(), quota.into()),
            tiers,
            replacing: Arc::default(),
            writers: Writers::new(&store, settings, threads, counters.clone(), marks.clone())?,
            spool: Spool::default(),
            marks,
            handle_key,
            request_keys: RequestKeys::new(),
            counters,
            closing: watch::Sender::new(false),
            export_places: ExportPlaces::default(),
            store,
        })
    }

    /// Has what a question about a user's quota begins with on its way from memory.
    pub fn prefetch(&self, user: UserId) {
        self.keeper.prefetch(user);
    }

    /// Asks streams of events to end: one that goes on would hold up the end of the server.
    pub fn end_streams(&self) {
        self.closing.send_replace(true);
    }

    /// Turns true when streams of events are to end.
    pub fn closing(&self) -> watch::Receiver<bool> {
        self.closing.subscribe()
    }

    /// A place to export in, for as long as it is held; `user` is the caller who is one.
    ///
    /// # Errors
    /// `Overloaded`
    pub fn export_place(&self, user: Option<UserId>) -> Result<ExportPlace> {
        self.export_places.take(user)
    }

    /// Keeps what this replica holds ready of users' quota, and books what waits; runs until dropped.
    pub async fn keep(self) {
        let spooled = self.spool.run(self.writers, self.keeper.clone());
        tokio::join!(self.keeper.run(), spooled);
    }

    /// Waits until quota can be held: the database has been heard of.
    pub async fn ready(&self) {
        self.keeper.heard().await;
    }

    /// The time of the database, about: what is reserved is of its months.
    fn now(&self) -> DateTime<Utc> {
        self.keeper.now().unwrap_or_else(Utc::now)
    }

    /// What limits users may have changed.
    pub fn apply(&self, change: Change) {
        match change {
            Change::User(id) | Change::Quota(id) => {
                self.keeper.limits_changed(id);
                let now = Period::containing(Utc::now());
                self.marks.add([(now, id)].into_iter());
            }
            Change::All => {
                self.keeper.all_limits_changed();
                self.marks.add_all();
            }
            Change::NewApiKey | Change::Services => {}
        }
    }

    /// Gives back what is held ready, when nobody reserves any more; within some seconds, and at once
    /// when the database is silent. [`Usage::keep`] must still run.
    pub async fn give_back(&self) {
        self.keeper.give_back(GIVE_BACK).await;
    }

    /// Books nothing more; returns once everything that was taken is durable or has failed.
    /// [`Usage::keep`] must still run.
    pub async fn close(&self) {
        self.spool.emptied().await;
        self.writers.close().await;
    }

    /// Commits that were accepted while the database was away, and are not booked yet.
    pub fn accepted_commits(&self) -> usize {
        self.spool.accepted()
    }

    /// What the ledger has done.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Events that wait to be written, and events that are being written.
    pub fn backlog(&self) -> (usize, usize) {
        self.writers.backlog()
    }

    /// An export of one user's records, or of everybody's.
    pub fn export(
        &self,
        whose: Option<UserId>,
        filter: UsageFilter,
        format: ExportFormat,
    ) -> Export {
        Export::new(self.store.clone(), whose, filter, format)
    }

    /// The tiers as they are configured now.
    pub fn tiers(&self) -> Arc<Tiers> {
        self.tiers.load_full()
    }

    /// Puts other tiers in force, for the next call on; [`Usage::settle`] is due then.
    ///
    /// # Errors
    /// `Removed` when users are in a tier that would be gone: the tiers in force stay. `Unknown` when
    /// that cannot be told.
    pub async fn replace_tiers(&self, tiers: Tiers) -> Result<(), ReplaceError> {
        let _turn = self.replacing.lock().await;
        let before = self.tiers();
        let mut removed: Vec<TierName> = before.all.iter().map(|tier| tier.name.clone()).collect();
        removed.retain(|name| tiers.get(name).is_none());
        if !removed.is_empty() {
            let used = self.store.user_tiers_among(&removed).await;
            let used = used.map_err(ReplaceError::Unknown)?;
            if !used.is_empty() {
                return Err(ReplaceError::Removed(used));
            }
        }
        self.tiers.store(Arc::new(tiers));
        self.keeper.all_limits_changed();
        self.marks.add_all();
        Ok(())
    }

    /// The tiers that users are in and that are configured no longer.
    ///
    /// # Errors
    /// `Unavailable`
    pub async fn missing_tiers(&self) -> Result<Vec<String>> {
        let tiers = self.tiers();
        let configured: Vec<&TierName> = tiers.all.iter().map(|tier| &tier.name).collect();
        self.store.user_tiers_beside(&configured).await
    }
}

/// Why tiers were not put in force.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    #[error("users are in tiers that the file does not have: {}", .0.join(", "))]
    Removed(Vec<String>),
    #[error("tiers are gone, and whether users are in them cannot be told")]
    Unknown(#[source] Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_tiers_stay_is_told_once() {
        let unknown = ReplaceError::Unknown(Error::Unavailable("no route".into()));
        let told = format!("{:#}", anyhow::Error::from(unknown));
        assert_eq!(
            told.matches("the database is unavailable").count(),
            1,
            "{told}"
        );
        assert_eq!(told.matches("no route").count(), 1, "{told}");
    }
}
