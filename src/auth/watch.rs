//! Telling callers that keep answers what may contradict them.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, watch};

use crate::{
    error::{Error, Result},
    model::{Change, Revision, UserId},
};

/// Events that wait for the slowest reader; one that is further behind is dropped.
const BACKLOG: usize = 4096;

/// Streams at once. Each costs little, but a client that opens them in a loop must not.
const MAX_WATCHERS: usize = 256;

/// What watchers are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// Answers about a user may be worth something else now.
    User(UserId),
    /// Changes may have been missed.
    Reset,
    /// Every change up to here was told.
    UpTo(Revision),
    /// The server stops.
    Closing,
}

/// Those who watch.
pub(super) struct Watchers {
    events: broadcast::Sender<Told>,
    /// A state, not an event: those who come later must learn of it too.
    closing: watch::Sender<bool>,
    places: Arc<Semaphore>,
}

/// One who watches; ends when dropped.
pub struct Watch {
    events: broadcast::Receiver<Told>,
    closing: watch::Receiver<bool>,
    _place: OwnedSemaphorePermit,
}

impl Watchers {
    pub(super) fn new() -> Self {
        Self {
            events: broadcast::Sender::new(BACKLOG),
            closing: watch::Sender::new(false),
            places: Arc::new(Semaphore::new(MAX_WATCHERS)),
        }
    }

    /// Watches from now on.
    ///
    /// # Errors
    /// `Overloaded`
    pub(super) fn watch(&self) -> Result<Watch> {
        let place = self.places.clone().try_acquire_owned();
        let place = place.map_err(|_| Error::Overloaded {
            retry_after: std::time::Duration::from_secs(1),
        })?;
        Ok(Watch {
            events: self.events.subscribe(),
            closing: self.closing.subscribe(),
            _place: place,
        })
    }

    /// Tells all, now and later, that the server stops.
    pub(super) fn close(&self) {
        self.closing.send_replace(true);
    }

    pub(super) fn tell(&self, event: Told) {
        // An error means that nobody watches.
        let _ = self.events.send(event);
    }

    pub(super) fn tell_change(&self, change: Change) {
        match change {
            Change::User(id) => self.tell(Told::User(id)),
            Change::All => self.tell(Told::Reset),
            // No answer about a user's credential was kept of these.
            Change::NewApiKey | Change::Services | Change::Quota(_) => {}
        }
    }
}

impl Watch {
    /// The next event.
    ///
    /// # Errors
    /// `WatchTooSlow` when events were lost to this watcher; it hears no more.
    pub async fn next(&mut self) -> Result<Told> {
        let told = tokio::select! {
            biased;
            _ = self.closing.wait_for(|closing| *closing) => return Ok(Told::Closing),
            told = self.events.recv() => told,
        };
        match told {
            Ok(told) => Ok(told),
            Err(broadcast::error::RecvError::Lagged(_)) => Err(Error::WatchTooSlow),
            // The sender lives as long as the service.
            Err(broadcast::error::RecvError::Closed) => Ok(Told::Closing),
        }
    }
}
