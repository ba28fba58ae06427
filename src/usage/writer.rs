//! Group commit: what arrives while others are written becomes the next batch.
//!
//! Handlers hand events over and wait. While few calls are being written a batch starts at once, so few
//! callers never wait for each other, unless each brings a few dozen events: those cost less together, and
//! each thread that serves writes those of its own callers. Beyond that few batches are written at a time,
//! and those that wait grow. Nobody waits for a timer: a lonely event is a batch of one.
//!
//! A batch is a task of its own: a handler that is cut short leaves its events with it, and they are
//! booked.

mod connections;
mod queue;

use std::{
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore, oneshot},
    time::{Instant as TokioInstant, timeout_at},
};
use tracing::warn;

use super::{counters::Counters, notices::Marks};
use crate::{
    config::UsageSettings,
    error::{Error, Result},
    model::Booking,
    store::{Store, UsageInsert},
};
use connections::Connections;
use queue::{Load, Places, Queue, Reply, Submission};

/// A batch of as many is written by the thread that has it: to wake another one costs more than to
/// do it.
const SMALL_EVENTS: usize = 128;
/// And one of as many by the thread that all its callers wait on: nothing of it crosses to another then.
const SMALL_HOME_EVENTS: usize = 300;

/// Attempts at a batch: a connection may prove to be gone, a transaction may lose to another.
const ATTEMPTS: u32 = 3;
/// No further attempt after so long: callers wait. Postgres takes a second to notice a deadlock.
const ATTEMPTS_WITHIN: Duration = Duration::from_secs(3);

/// Of one call; the queue has room for it.
const MOST_EVENTS: usize = 1000;

/// When to come back to a full queue: a batch takes milliseconds.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// What became of one event.
pub(super) type Booked = Result<UsageInsert, NotBooked>;

/// Why an event is not known to be booked. Errors are shared by those of a batch.
#[derive(Clone, Debug)]
pub(super) enum NotBooked {
    /// Its own fault: Postgres took others and refused it.
    Refused(Arc<Error>),
    /// That of all, or of none.
    Failed(Arc<Error>),
}

/// Books events in batches. Cheap to clone.
#[derive(Clone)]
pub(super) struct Writers(Arc<Shared>);

struct Shared {
    connections: Connections,
    /// Where large batches run: the threads that serve have other things to do.
    runtime: Handle,
    counters: Arc<Counters>,
    /// Whose usage was booked.
    marks: Marks,
    /// One per event that waits or is being written.
    places: Arc<Semaphore>,
    /// Those of them that callers who wait may take: the others must not be left without.
    patient_places: Arc<Semaphore>,
    queue: Mutex<Queue>,
    idle: Notify,
}

/// What a caller does when too much waits already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    Refuse,
    Wait,
    /// Waits until then, and is refused.
    WaitUntil(TokioInstant),
}

impl Writers {
    /// Large batches will run on the current runtime, small ones on any of `threads` that serve, all
    /// over connections of their own.
    pub(super) fn new(
        store: &Store,
        settings: &UsageSettings,
        threads: usize,
        counters: Arc<Counters>,
        marks: Marks,
    ) -> Result<Self> {
        Ok(Self(Arc::new(Shared {
            connections: Connections::new(store, settings, threads)?,
            runtime: Handle::current(),
            counters,
            marks,
            places: Arc::new(Semaphore::new(settings.queue_events)),
            patient_places: Arc::new(Semaphore::new((settings.queue_events / 2).max(MOST_EVENTS))),
            queue: Mutex::new(Queue::new(settings, threads)),
            idle: Notify::new(),
        })))
    }

    /// Books events; says what became of each, in their order.
    ///
    /// What is recorded is durable when it returns. A dropped future leaves the events behind to be
    /// booked.
    ///
    /// # Errors
    /// `Overloaded`: nothing was done · `Unavailable` on the way down
    pub(super) async fn insert(
        &self,
        events: Vec<Booking>,
        when_full: WhenFull,
    ) -> Result<Vec<Booked>> {
        let shared = &self.0;
        let places = shared.places(events.len(), when_full).await?;
        let (reply, answer) = oneshot::channel();
        let here = Handle::current();
        {
            let mut queue = shared.queue();
            if queue.is_closed {
                return Err(closed());
            }
            queue.push(Submission {
                events,
                reply,
                runtime: here.clone(),
                _places: places,
            });
        }
        start(shared, Some(&here));
        answer.await.map_err(|_| closed())
    }

    /// Takes no more, and returns once everything that was taken is written or has failed.
    pub(super) async fn close(&self) {
        self.0.queue().is_closed = true;
        loop {
            let idle = self.0.idle.notified();
            if self.0.queue().is_idle() {
                self.0.connections.close();
                return;
            }
            idle.await;
        }
    }

    /// Events that wait, and events that are being written.
    pub(super) fn backlog(&self) -> (usize, usize) {
        self.0.queue().backlog()
    }
}

impl Shared {
    /// Room for as many events.
    ///
    /// # Errors
    /// `Overloaded`
    async fn places(&self, events: usize, when_full: WhenFull) -> Result<Places> {
        let events = u32::try_from(events).map_err(Error::internal)?;
        let full = || Error::Overloaded {
            retry_after: RETRY_AFTER,
        };
        match when_full {
            WhenFull::Refuse => {
                let place = self.places.clone().try_acquire_many_owned(events);
                Ok((place.map_err(|_| full())?, None))
            }
            WhenFull::Wait => self.patient_places(events).await,
            WhenFull::WaitUntil(until) => {
                let places = timeout_at(until, self.patient_places(events)).await;
                places.map_err(|_| full())?
            }
        }
    }

    async fn patient_places(&self, events: u32) -> Result<Places> {
        // An error would mean that the semaphores were closed, which nobody does.
        let patient = self.patient_places.clone().acquire_many_owned(events).await;
        let patient = patient.map_err(Error::internal)?;
        let place = self.places.clone().acquire_many_owned(events).await;
        Ok((place.map_err(Error::internal)?, Some(patient)))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A batch that is being written. Its end, however it comes, lets the next one start.
struct Turn {
    shared: Arc<Shared>,
    /// Empty once it is written or has failed.
    batch: Vec<Submission>,
    load: Load,
    /// Written by a thread that serves.
    is_near: bool,
    /// Until the callers have been told.
    under_way: Option<UnderWay>,
}

impl Turn {
    async fn take(mut self) {
        let booked = commit(&self.shared, &self.batch).await;
        let batch = mem::take(&mut self.batch);
        let _under_way = self.under_way.take();
        // What waits goes to Postgres, which is idle meanwhile, before the callers are told.
        drop(self);
        tell(batch, booked);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let batch = mem::take(&mut self.batch);
        // A thread that serves ends while others still do, and cuts short what it has under way. The
        // threads that stay take it over; what was booked already counts once. What panicked would
        // only panic again.
        let is_cut = !batch.is_empty() && self.is_near && !thread::panicking();
        {
            let mut queue = self.shared.queue();
            queue.end_batch(self.load);
            if is_cut {
                queue.put_back(batch);
            }
        }
        let here = Handle::try_current().ok().filter(|_| !is_cut);
        start(&self.shared, here.as_ref());
    }
}

/// A batch whose callers wait.
struct UnderWay(Arc<Shared>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.settle_batch();
        if queue.is_idle() {
            self.0.idle.notify_waiters();
        }
    }
}

/// Starts as many batches as may start; small ones `here`, or where all their callers wait.
fn start(shared: &Arc<Shared>, here: Option<&Handle>) {
    loop {
        let Some((batch, load)) = shared.queue().next_batch() else {
            return;
        };
        let near = here.and_then(|here| {
            let (runtime, small) = match load.is_of_one_thread {
                true => (&batch.first()?.runtime, SMALL_HOME_EVENTS),
                false => (here, SMALL_EVENTS),
            };
            (load.events <= small).then(|| runtime.clone())
        });
        let runtime = near.as_ref().unwrap_or(&shared.runtime).clone();
        let turn = Turn {
            shared: shared.clone(),
            batch,
            load,
            is_near: near.is_some(),
            under_way: Some(UnderWay(shared.clone())),
        };
        runtime.spawn(turn.take());
    }
}

/// Writes a batch; says what became of each event, in their order. What Postgres refuses is halved
/// until the refused event stands alone: it fails, the others do not.
async fn commit(shared: &Shared, batch: &[Submission]) -> Vec<Booked> {
    let events: Vec<&Booking> = batch.iter().flat_map(|one| &one.events).collect();
    let mut booked: Vec<Option<Booked>> = vec![None; events.len()];
    let (store, _place) = shared.connections.here();
    let all = 0..events.len();
    let mut ranges = vec![all];
    let mut some_are_booked = false;
    while let Some(range) = ranges.pop() {
        shared.counters.batches.add_one();
        match insert(&store, &events[range.clone()]).await {
            Ok(inserts) => {
                some_are_booked = true;
                let new = events[range.clone()].iter().zip(&inserts);
                let new = new.filter(|(_, insert)| **insert == UsageInsert::Recorded);
                let marked = new.map(|(one, _)| (one.event.period(), one.event.user_id));
                shared.marks.add(marked);
                for (place, insert) in booked[range].iter_mut().zip(inserts) {
                    shared.counters.count(insert);
                    *place = Some(Ok(insert));
                }
            }
            Err(Error::Internal(_) | Error::TotalOutOfRange) if range.len() > 1 => {
                let middle = range.start + range.len() / 2;
                ranges.extend([middle..range.end, range.start..middle]);
            }
            Err(error @ Error::TotalOutOfRange) => {
                booked[range].fill(Some(Err(NotBooked::Refused(Arc::new(error)))));
            }
            Err(error) => booked[range].fill(Some(Err(NotBooked::Failed(Arc::new(error))))),
        }
    }
    // While none can be booked it is no event's fault.
    let blamed = |booked| match booked {
        Err(NotBooked::Failed(error)) if some_are_booked && is_refusal(&error) => {
            Err(NotBooked::Refused(error))
        }
        booked => booked,
    };
    booked.into_iter().flatten().map(blamed).collect()
}

/// Tells the callers of a batch what became of their events.
fn tell(batch: Vec<Submission>, booked: Vec<Booked>) {
    let mut booked = booked.into_iter();
    let mut answers = Answers::default();
    for submission in batch {
        let booked = booked.by_ref().take(submission.events.len()).collect();
        answers.add(submission.runtime, submission.reply, booked);
    }
    answers.send();
}

/// What callers are to be told, by the runtime that they wait on.
///
/// A runtime is woken once for all of its callers: it answers them together, where one after the
/// other each would be woken across threads and written to its connection alone.
#[derive(Default)]
struct Answers(Vec<(Handle, Vec<Answer>)>);

type Answer = (Reply, Vec<Booked>);

impl Answers {
    fn add(&mut self, runtime: Handle, reply: Reply, booked: Vec<Booked>) {
        let answer = (reply, booked);
        match self.0.iter_mut().find(|(at, _)| at.id() == runtime.id()) {
            Some((_, answers)) => answers.push(answer),
            None => self.0.push((runtime, vec![answer])),
        }
    }

    fn send(self) {
        let here = Handle::current().id();
        for (runtime, answers) in self.0 {
            let send = move || {
                for (reply, booked) in answers {
                    // An error means that the caller has gone.
                    let _ = reply.send(booked);
                }
            };
            if runtime.id() == here {
                send();
            } else {
                runtime.spawn(async move { send() });
            }
        }
    }
}

fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Internal(_))
}

async fn insert(store: &Store, events: &[&Booking]) -> Result<Vec<UsageInsert>> {
    let begun = Instant::now();
    let mut attempt = 1;
    loop {
        match store.usage_insert(events).await {
            Err(error @ Error::Unavailable(_))
                if attempt < ATTEMPTS && begun.elapsed() < ATTEMPTS_WITHIN =>
            {
                warn!(
                    error = error.with_causes(),
                    attempt, "usage is written once more"
                );
                attempt += 1;
            }
            outcome => return outcome,
        }
    }
}

/// The service is on its way down.
fn closed() -> Error {
    Error::Unavailable("the ledger is closed".into())
}
