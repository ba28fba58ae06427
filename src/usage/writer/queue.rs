//! What waits to be written, and when the next batch may start. Pure: it knows no clock and no
//! database.

use std::{collections::VecDeque, ops::Range};

use tokio::{
    runtime::{Handle, Id},
    sync::{OwnedSemaphorePermit, oneshot},
};

use super::Booked;
use crate::{config::UsageSettings, model::Booking};

/// Batches at a time when much is written: one is on its way to the disk while another is read by
/// Postgres. More would only be smaller.
const BUSY_BATCHES: usize = 2;

/// A call of as many events waits for other calls even while few are being written: of a statement
/// that books ten events, much of the work is the statement. One event is what a person waits for, and
/// hundreds are a batch already.
const MERGED_EVENTS: Range<usize> = 2..200;

/// A thread that wrote none of as many merged batches has nobody who calls: another may write two at a
/// time then.
const RECENT_MERGES: u64 = 16;

/// What waits, and how much is being written.
pub(super) struct Queue {
    /// Of the calls that gain nothing by company.
    alone: Line,
    /// Of those that are merged, with the thread that they came on: what a thread writes for its own
    /// callers crosses to no other. Of all threads together while those have no connections.
    merged: Vec<(Option<Id>, Line)>,
    has_threads: bool,
    /// Merged batches that have been started.
    merges: u64,
    /// Batches whose callers have not been told yet.
    under_way: usize,
    /// Events that are being written.
    writing: usize,
    /// While fewer calls are being written, the next one does not wait for them.
    max_batches: usize,
    /// A batch takes more submissions while it has fewer events.
    batch_events: usize,
    pub(super) is_closed: bool,
}

/// Calls of one kind: those that wait, and how many are being written.
#[derive(Default)]
struct Line {
    waiting: VecDeque<Submission>,
    batches: usize,
    calls: usize,
    /// Which of the merged batches was its last.
    last_merge: u64,
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

/// What a batch adds to what is being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Load {
    /// Whose line it was taken from.
    line: Place,
    calls: usize,
    pub(super) events: usize,
    /// All its callers wait on one thread that serves.
    pub(super) is_of_one_thread: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Alone,
    Merged(usize),
}

/// Batches that may be written at a time: of calls that are alone, and of those that are merged.
pub(super) fn most_batches(writers: usize, threads: usize) -> usize {
    let lines = if have_own(writers, threads) {
        threads
    } else {
        1
    };
    writers + lines.max(BUSY_BATCHES)
}

/// Whether threads that share `writers` connections evenly get any.
fn have_own(writers: usize, threads: usize) -> bool {
    threads <= writers
}

impl Queue {
    /// `threads` that serve share the settings' connections.
    pub(super) fn new(settings: &UsageSettings, threads: usize) -> Self {
        Self {
            alone: Line::default(),
            merged: Vec::new(),
            has_threads: have_own(settings.writers, threads),
            merges: 0,
            under_way: 0,
            writing: 0,
            max_batches: settings.writers,
            batch_events: settings.batch_events,
            is_closed: false,
        }
    }

    pub(super) fn push(&mut self, submission: Submission) {
        let place = self.place_of(&submission);
        self.line(place).waiting.push_back(submission);
    }

    /// Takes the next batch, if one may start now.
    pub(super) fn next_batch(&mut self) -> Option<(Vec<Submission>, Load)> {
        let place = self.next_line()?;
        let is_merged = place != Place::Alone;
        let is_of_one_thread = is_merged && self.has_threads;
        self.merges += u64::from(is_merged);
        let (batch_events, merges) = (self.batch_events, self.merges);
        let line = self.line(place);
        if is_merged {
            line.last_merge = merges;
        }
        let (mut batch, mut events) = (Vec::new(), 0);
        while events < batch_events
            && let Some(next) = line.waiting.pop_front()
        {
            events += next.events.len();
            batch.push(next);
        }
        let load = Load {
            line: place,
            calls: batch.len(),
            events,
            is_of_one_thread,
        };
        line.batches += 1;
        line.calls += load.calls;
        self.under_way += 1;
        self.writing += events;
        Some((batch, load))
    }

    /// Puts a batch that was not written before all others of its kind.
    pub(super) fn put_back(&mut self, batch: Vec<Submission>) {
        for submission in batch.into_iter().rev() {
            let place = self.place_of(&submission);
            self.line(place).waiting.push_front(submission);
        }
    }

    /// Postgres has answered a batch, or will not: the next one may start.
    pub(super) fn end_batch(&mut self, load: Load) {
        let line = self.line(load.line);
        line.batches -= 1;
        line.calls -= load.calls;
        self.writing -= load.events;
    }

    /// The callers of a batch have been told.
    pub(super) fn settle_batch(&mut self) {
        self.under_way -= 1;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.under_way == 0 && self.lines().all(|line| line.waiting.is_empty())
    }

    /// Events that wait, and events that are being written.
    pub(super) fn backlog(&self) -> (usize, usize) {
        let waiting = self.lines().flat_map(|line| &line.waiting);
        let waiting = waiting.map(|one| one.events.len()).sum();
        (waiting, self.writing)
    }

    /// A line whose next batch may start.
    fn next_line(&self) -> Option<Place> {
        let alone = &self.alone;
        let few = alone.batches < BUSY_BATCHES || alone.calls < self.max_batches;
        if few && !alone.waiting.is_empty() {
            return Some(Place::Alone);
        }
        // Two at a time of one thread would keep it busy while those of another wait for it.
        let is_recent = |(_, line): &&(_, Line)| {
            line.batches > 0 || self.merges < line.last_merge + RECENT_MERGES
        };
        let recent = self.merged.iter().filter(is_recent).count();
        let most = if recent > 1 { 1 } else { BUSY_BATCHES };
        let may_start = |line: &Line| !line.waiting.is_empty() && line.batches < most;
        let found = self.merged.iter().position(|(_, line)| may_start(line));
        found.map(Place::Merged)
    }

    fn place_of(&mut self, submission: &Submission) -> Place {
        if !MERGED_EVENTS.contains(&submission.events.len()) {
            return Place::Alone;
        }
        let of = self.has_threads.then(|| submission.runtime.id());
        let known = self.merged.iter().position(|(one, _)| *one == of);
        Place::Merged(known.unwrap_or_else(|| {
            self.merged.push((of, Line::default()));
            self.merged.len() - 1
        }))
    }

    fn line(&mut self, place: Place) -> &mut Line {
        match place {
            Place::Alone => &mut self.alone,
            Place::Merged(index) => &mut self.merged[index].1,
        }
    }

    fn lines(&self) -> impl Iterator<Item = &Line> {
        let merged = self.merged.iter().map(|(_, line)| line);
        merged.chain([&self.alone])
    }
}

#[cfg(test)]
mod tests {
    use std::{array, sync::Arc};

    use tokio::{
        runtime::{self, Runtime},
        sync::Semaphore,
    };

    use super::*;
    use crate::model::{EventId, Labels, TokenCounts, UsageEvent, UserId};

    fn queue() -> Queue {
        Queue {
            alone: Line::default(),
            merged: Vec::new(),
            has_threads: true,
            merges: RECENT_MERGES,
            under_way: 0,
            writing: 0,
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

    fn threads<const N: usize>() -> [Runtime; N] {
        array::from_fn(|_| {
            let thread = runtime::Builder::new_current_thread().build();
            thread.expect("a runtime")
        })
    }

    /// Submissions of these numbers of events arrive, here.
    fn arrive(queue: &mut Queue, sizes: &[usize]) {
        arrive_on(queue, &Handle::current(), sizes);
    }

    fn arrive_on(queue: &mut Queue, runtime: &Handle, sizes: &[usize]) {
        let places = Arc::new(Semaphore::new(sizes.len()));
        for &size in sizes {
            queue.push(Submission {
                events: vec![event(); size],
                reply: oneshot::channel().0,
                runtime: runtime.clone(),
                _places: (places.clone().try_acquire_owned().expect("enough"), None),
            });
        }
    }

    fn next(queue: &mut Queue) -> Option<Load> {
        let (batch, load) = queue.next_batch()?;
        let events: usize = batch.iter().map(|one| one.events.len()).sum();
        assert_eq!((batch.len(), events), (load.calls, load.events));
        Some(load)
    }

    /// Takes a batch of as many events.
    fn take(queue: &mut Queue, events: usize) -> Load {
        let load = next(queue).expect("one may start");
        assert_eq!(load.events, events);
        load
    }

    #[tokio::test]
    async fn few_calls_start_at_once_and_many_wait_for_two() {
        let mut queue = queue();
        assert_eq!(next(&mut queue), None);
        let mut loads = Vec::new();
        for _ in 0..8 {
            arrive(&mut queue, &[1]);
            loads.push(take(&mut queue, 1));
        }
        arrive(&mut queue, &[1; 50]);
        assert_eq!(next(&mut queue), None, "eight are being written");
        queue.end_batch(loads.pop().expect("eight"));
        take(&mut queue, 50);
        arrive(&mut queue, &[1; 20]);
        for _ in 0..6 {
            queue.end_batch(loads.pop().expect("seven"));
            assert_eq!(next(&mut queue), None);
        }
        queue.end_batch(loads.pop().expect("one"));
        take(&mut queue, 20);
        arrive(&mut queue, &[1]);
        assert_eq!(next(&mut queue), None, "two large ones are being written");
    }

    #[tokio::test]
    async fn few_small_batches_wait_for_two_and_become_one() {
        for has_threads in [true, false] {
            let mut queue = Queue {
                has_threads,
                ..queue()
            };
            arrive(&mut queue, &[10; 5]);
            let first = take(&mut queue, 50);
            arrive(&mut queue, &[10; 3]);
            take(&mut queue, 30);
            arrive(&mut queue, &[10, 10]);
            assert_eq!(next(&mut queue), None, "two are being written");
            queue.end_batch(first);
            take(&mut queue, 20);
        }
    }

    #[test]
    fn each_thread_merges_its_own_calls_and_waits_for_no_other() {
        let threads = threads::<3>();
        let [a, b, c] = threads.each_ref().map(|thread| thread.handle());
        let mut queue = queue();
        for thread in [a, b, a, b, a] {
            arrive_on(&mut queue, thread, &[10]);
        }
        let of_a = take(&mut queue, 30);
        take(&mut queue, 20);
        arrive_on(&mut queue, a, &[10]);
        assert_eq!(next(&mut queue), None, "its own one is being written");
        arrive_on(&mut queue, c, &[20, 20]);
        take(&mut queue, 40);
        arrive_on(&mut queue, c, &[30]);
        queue.end_batch(of_a);
        take(&mut queue, 10);
        assert_eq!(next(&mut queue), None, "three are being written");
    }

    #[test]
    fn a_thread_that_is_alone_with_its_calls_writes_two_batches() {
        let threads = threads::<2>();
        let [a, b] = threads.each_ref().map(|thread| thread.handle());
        let mut queue = queue();
        for _ in 0..RECENT_MERGES {
            arrive_on(&mut queue, b, &[10]);
            let load = take(&mut queue, 10);
            queue.end_batch(load);
            arrive_on(&mut queue, a, &[10]);
            let load = take(&mut queue, 10);
            arrive_on(&mut queue, a, &[20]);
            assert_eq!(next(&mut queue), None, "the other thread has callers");
            queue.end_batch(load);
            let load = take(&mut queue, 20);
            queue.end_batch(load);
        }
        for _ in 0..RECENT_MERGES {
            arrive_on(&mut queue, a, &[10]);
            let load = take(&mut queue, 10);
            queue.end_batch(load);
        }
        arrive_on(&mut queue, a, &[10]);
        take(&mut queue, 10);
        arrive_on(&mut queue, a, &[20]);
        take(&mut queue, 20);
        arrive_on(&mut queue, a, &[30]);
        assert_eq!(next(&mut queue), None, "two are being written");
    }

    #[test]
    fn threads_without_connections_merge_together() {
        let threads = threads::<3>();
        let mut queue = Queue {
            has_threads: false,
            ..queue()
        };
        for thread in &threads {
            arrive_on(&mut queue, thread.handle(), &[10]);
        }
        take(&mut queue, 30);
    }

    #[tokio::test]
    async fn calls_that_are_merged_and_others_do_not_hold_each_other_up() {
        let mut queue = queue();
        for _ in 0..2 {
            arrive(&mut queue, &[10]);
            take(&mut queue, 10);
        }
        arrive(&mut queue, &[10]);
        for _ in 0..8 {
            arrive(&mut queue, &[1]);
            take(&mut queue, 1);
        }
        arrive(&mut queue, &[1]);
        assert_eq!(next(&mut queue), None, "ten are being written");
        assert_eq!(queue.backlog(), (11, 28));
    }

    #[tokio::test]
    async fn few_large_calls_do_not_wait_for_each_other() {
        let mut queue = queue();
        for _ in 0..8 {
            arrive(&mut queue, &[1000]);
            take(&mut queue, 1000);
        }
        arrive(&mut queue, &[1000]);
        assert_eq!(next(&mut queue), None, "eight are being written");
    }

    #[tokio::test]
    async fn a_batch_has_a_size_and_submissions_stay_whole() {
        let mut queue = queue();
        arrive(&mut queue, &[60, 60, 2, 190]);
        let loads = [take(&mut queue, 120), take(&mut queue, 192)];
        for load in loads {
            assert!(!queue.is_idle());
            queue.end_batch(load);
            assert!(!queue.is_idle(), "its callers do not know yet");
            queue.settle_batch();
        }
        assert!(queue.is_idle());
    }

    #[tokio::test]
    async fn what_is_put_back_goes_first() {
        let mut queue = queue();
        arrive(&mut queue, &[10, 20]);
        let (batch, load) = queue.next_batch().expect("one may start");
        arrive(&mut queue, &[90]);
        queue.end_batch(load);
        queue.put_back(batch);
        assert!(!queue.is_idle());
        take(&mut queue, 120);
    }
}
