//! What waits to be written, and when the next batch may start. Pure: it knows no clock and no
//! database.

use std::{collections::VecDeque, ops::Range};

use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, oneshot},
};

use super::Booked;
use crate::{config::UsageSettings, model::Booking};

/// Batches at a time when much is written: one is on its way to the disk while another is read by
/// Postgres. More would only be smaller.
const BUSY_BATCHES: usize = 2;

/// A call of as many events waits for other calls even while few are being written: of a statement
/// that books ten events, most of the work is the statement. One event is what a person waits for, and
/// hundreds are a batch already.
const MERGED_EVENTS: Range<usize> = 2..200;

/// What waits, and how much is being written.
pub(super) struct Queue {
    pub(super) waiting: VecDeque<Submission>,
    pub(super) batches: usize,
    /// Events and calls that are being written.
    pub(super) writing: usize,
    pub(super) calls: usize,
    /// While fewer calls are being written, the next one does not wait for them.
    pub(super) max_batches: usize,
    /// A batch takes more submissions while it has fewer events.
    pub(super) batch_events: usize,
    pub(super) is_closed: bool,
}

/// Events of one caller.
pub(super) struct Submission {
    pub(super) events: Vec<Booking>,
    pub(super) reply: Reply,
    /// Where the caller waits.
    pub(super) runtime: Handle,
    pub(super) _places: Places,
}

pub(super) type Reply = oneshot::Sender<Vec<Booked>>;

/// Room in the queue, also among those who wait for it.
pub(super) type Places = (OwnedSemaphorePermit, Option<OwnedSemaphorePermit>);

impl Queue {
    pub(super) fn new(settings: &UsageSettings) -> Self {
        Self {
            waiting: VecDeque::new(),
            batches: 0,
            writing: 0,
            calls: 0,
            max_batches: settings.writers,
            batch_events: settings.batch_events,
            is_closed: false,
        }
    }

    /// Takes the next batch, if one may start now.
    pub(super) fn next_batch(&mut self) -> Option<Vec<Submission>> {
        let first = self.waiting.front()?;
        let gains_alone = !MERGED_EVENTS.contains(&first.events.len());
        let may_start =
            self.batches < BUSY_BATCHES || (gains_alone && self.calls < self.max_batches);
        if !may_start {
            return None;
        }
        let (mut batch, mut events) = (Vec::new(), 0);
        while events < self.batch_events
            && let Some(next) = self.waiting.pop_front()
        {
            events += next.events.len();
            batch.push(next);
        }
        self.batches += 1;
        self.writing += events;
        self.calls += batch.len();
        Some(batch)
    }

    /// Puts a batch that was not written before all others.
    pub(super) fn put_back(&mut self, batch: Vec<Submission>) {
        for submission in batch.into_iter().rev() {
            self.waiting.push_front(submission);
        }
    }

    pub(super) fn end_batch(&mut self, calls: usize, events: usize) {
        self.batches -= 1;
        self.writing -= events;
        self.calls -= calls;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.batches == 0 && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::model::{EventId, Labels, TokenCounts, UsageEvent, UserId};

    fn queue() -> Queue {
        Queue {
            waiting: VecDeque::new(),
            batches: 0,
            writing: 0,
            calls: 0,
            max_batches: 8,
            batch_events: 100,
            is_closed: false,
        }
    }

    fn event() -> Booking {
        Booking::from(UsageEvent {
            event_id: EventId(uuid::Uuid::nil()),
            occurred_at: chrono::DateTime::UNIX_EPOCH,
            user_id: UserId::new(),
            model: "m".parse().expect("valid"),
            tokens: TokenCounts::default(),
            request_id: String::new(),
            labels: Labels::new(),
        })
    }

    /// Submissions of these numbers of events arrive.
    fn arrive(queue: &mut Queue, sizes: &[usize]) {
        let places = Arc::new(Semaphore::new(sizes.len()));
        for &size in sizes {
            queue.waiting.push_back(Submission {
                events: vec![event(); size],
                reply: oneshot::channel().0,
                runtime: Handle::current(),
                _places: (places.clone().try_acquire_owned().expect("enough"), None),
            });
        }
    }

    fn next(queue: &mut Queue) -> Option<usize> {
        let batch = queue.next_batch()?;
        Some(batch.iter().map(|one| one.events.len()).sum())
    }

    #[tokio::test]
    async fn few_calls_start_at_once_and_many_wait_for_two() {
        let mut queue = queue();
        assert_eq!(next(&mut queue), None);
        for _ in 0..8 {
            arrive(&mut queue, &[1]);
            assert_eq!(next(&mut queue), Some(1));
        }
        arrive(&mut queue, &[1; 50]);
        assert_eq!(next(&mut queue), None, "eight are being written");
        queue.end_batch(1, 1);
        assert_eq!(next(&mut queue), Some(50));
        arrive(&mut queue, &[1; 20]);
        for _ in 0..6 {
            queue.end_batch(1, 1);
            assert_eq!(next(&mut queue), None);
        }
        queue.end_batch(1, 1);
        assert_eq!(next(&mut queue), Some(20), "one large batch is left");
        arrive(&mut queue, &[1]);
        assert_eq!(next(&mut queue), None);
    }

    #[tokio::test]
    async fn few_small_batches_wait_for_two_and_become_one() {
        let mut queue = queue();
        arrive(&mut queue, &[10; 5]);
        assert_eq!(next(&mut queue), Some(50));
        for _ in 0..3 {
            arrive(&mut queue, &[10]);
        }
        assert_eq!(next(&mut queue), Some(30));
        arrive(&mut queue, &[10, 10]);
        assert_eq!(next(&mut queue), None, "two are being written");
        queue.end_batch(5, 50);
        assert_eq!(next(&mut queue), Some(20));
    }

    #[tokio::test]
    async fn few_large_calls_do_not_wait_for_each_other() {
        let mut queue = queue();
        for _ in 0..8 {
            arrive(&mut queue, &[1000]);
            assert_eq!(next(&mut queue), Some(1000));
        }
        arrive(&mut queue, &[1000]);
        assert_eq!(next(&mut queue), None, "eight are being written");
    }

    #[tokio::test]
    async fn a_batch_has_a_size_and_submissions_stay_whole() {
        let mut queue = queue();
        arrive(&mut queue, &[60, 60, 1, 300]);
        assert_eq!(next(&mut queue), Some(120));
        assert_eq!(next(&mut queue), Some(301));
        assert!(queue.waiting.is_empty() && !queue.is_idle());
        queue.end_batch(2, 120);
        queue.end_batch(2, 301);
        assert!(queue.is_idle());
    }
}
