//! Turns to try something, so that racing guesses see each other's failures.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Who tries what, in this process.
#[derive(Default)]
pub(super) struct Turns(Mutex<HashMap<String, Arc<Semaphore>>>);

/// Given back when dropped.
pub(super) struct Turn {
    turns: Arc<Turns>,
    subject: String,
    permit: Option<OwnedSemaphorePermit>,
    /// It was waited for.
    pub(super) is_late: bool,
}

impl Turns {
    pub(super) async fn take(self: &Arc<Self>, subject: &str, places: usize) -> Turn {
        // Made first: should this be dropped while it waits, it cleans up all the same.
        let mut turn = Turn {
            turns: self.clone(),
            subject: subject.to_owned(),
            permit: None,
            is_late: false,
        };
        let places = self
            .lock()
            .entry(subject.to_owned())
            .or_insert_with(|| Arc::new(Semaphore::new(places)))
            .clone();
        turn.permit = places.clone().try_acquire_owned().ok();
        if turn.permit.is_none() {
            turn.is_late = true;
            turn.permit = places.acquire_owned().await.ok();
        }
        turn
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Arc<Semaphore>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.turns.lock();
        self.permit = None;
        // Nobody has it or waits for it but the map.
        if turns
            .get(&self.subject)
            .is_some_and(|places| Arc::strong_count(places) == 1)
        {
            turns.remove(&self.subject);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::FutureExt as _;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn turns_are_bounded_and_nothing_is_left_of_them() {
        let turns = Arc::new(Turns::default());
        let (one, two) = (turns.take("a", 2).await, turns.take("a", 2).await);
        let waits = timeout(Duration::from_millis(20), turns.take("a", 2)).await;
        assert!(waits.is_err());
        let other = turns.take("b", 2).await;
        drop(one);
        let three = turns.take("a", 2).await;
        assert_eq!(turns.lock().len(), 2);
        drop((two, three, other));
        assert_eq!(turns.lock().len(), 0);
    }

    #[tokio::test]
    async fn a_turn_that_was_waited_for_is_late() {
        let turns = Arc::new(Turns::default());
        let first = turns.take("a", 1).await;
        assert!(!first.is_late);
        let mut second = Box::pin(turns.take("a", 1));
        assert!(second.as_mut().now_or_never().is_none());
        drop(first);
        assert!(second.await.is_late);
        assert!(!turns.take("a", 1).await.is_late);
    }
}
