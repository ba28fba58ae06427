//! The connections that the ledger is written over.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::{
    runtime::{Handle, Id},
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::queue::most_batches;
use crate::{config::UsageSettings, error::Result, store::Store};

/// Some for all, and some of each thread that serves: what a small batch brings and what Postgres
/// answers crosses no threads over those.
pub(super) struct Connections {
    /// Over the connections of `runtime`.
    store: Store,
    runtime: Id,
    near: Mutex<Vec<Near>>,
    near_connections: usize,
}

/// The database over the connections of a thread that serves.
struct Near {
    runtime: Id,
    store: Store,
    /// One for each connection.
    free: Arc<Semaphore>,
}

impl Connections {
    /// Enough for all batches at a time that live on the current runtime, and at most `settings.writers`
    /// that `threads` that serve share evenly.
    pub(super) fn new(store: &Store, settings: &UsageSettings, threads: usize) -> Result<Self> {
        Ok(Self {
            store: store.with_ledger_connections(most_batches(settings.writers, threads))?,
            runtime: Handle::current().id(),
            near: Mutex::default(),
            near_connections: settings.writers / threads,
        })
    }

    /// The database over a connection that lives on the current runtime, unless those are all in use.
    pub(super) fn here(&self) -> (Store, Option<OwnedSemaphorePermit>) {
        // An error would mean that its URL, read before, cannot be read.
        if let Ok(Some((store, place))) = self.near() {
            return (store, Some(place));
        }
        (self.store.clone(), None)
    }

    fn near(&self) -> Result<Option<(Store, OwnedSemaphorePermit)>> {
        let here = Handle::current().id();
        if here == self.runtime || self.near_connections == 0 {
            return Ok(None);
        }
        let mut near = self.near.lock().unwrap_or_else(PoisonError::into_inner);
        let known = near.iter().position(|near| near.runtime == here);
        let place = match known {
            Some(place) => place,
            None => {
                near.push(Near {
                    runtime: here,
                    store: self.store.with_ledger_connections(self.near_connections)?,
                    free: Arc::new(Semaphore::new(self.near_connections)),
                });
                near.len() - 1
            }
        };
        let near = &near[place];
        let free = near.free.clone().try_acquire_owned().ok();
        Ok(free.map(|place| (near.store.clone(), place)))
    }

    /// Closes every connection that is idle and refuses new work.
    pub(super) fn close(&self) {
        self.store.close();
        let mut near = self.near.lock().unwrap_or_else(PoisonError::into_inner);
        near.drain(..).for_each(|near| near.store.close());
    }
}
