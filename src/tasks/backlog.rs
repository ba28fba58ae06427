use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// What of one kind waits in the outbox, as it was seen last.
#[derive(Debug)]
pub struct Backlog<F>(Mutex<Seen<F>>);

#[derive(Debug)]
struct Seen<F> {
    pending: u64,
    oldest_since: Option<Instant>,
    last_failure: Option<F>,
}

impl<F> Default for Backlog<F> {
    fn default() -> Self {
        Self(Mutex::new(Seen {
            pending: 0,
            oldest_since: None,
            last_failure: None,
        }))
    }
}

impl<F> Backlog<F> {
    /// How many wait; 10,000 stand for more.
    pub fn pending(&self) -> u64 {
        self.lock().pending
    }

    /// The age of the oldest of them.
    pub fn oldest(&self) -> Duration {
        let since = self.lock().oldest_since;
        since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// Keeps a failure until somebody looks.
    pub(super) fn failed(&self, failure: F) {
        self.lock().last_failure = Some(failure);
    }

    /// Takes note of what waits, and of how old the oldest is; returns the last failure since the look
    /// before, so that one line tells of it, however many wait.
    pub(super) fn see(&self, pending: u64, oldest: Option<Duration>) -> Option<F> {
        let mut seen = self.lock();
        seen.pending = pending;
        seen.oldest_since = oldest.and_then(|age| Instant::now().checked_sub(age));
        seen.last_failure.take()
    }

    fn lock(&self) -> MutexGuard<'_, Seen<F>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
