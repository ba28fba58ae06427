//! Commits whose outcome is not certain yet: booked again until it is.
//!
//! A connection may break between a commit and its answer, and a caller may go. While nobody knows
//! whether a reservation was booked its tokens can be neither free nor spent, so somebody has to find
//! out. Here, too, wait the commits that a tier's policy accepts while the database is away.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::sleep};
use tracing::error;

use super::{
    Committed,
    keeper::Keeper,
    lease::{Begun, Outcome},
    ledger::{Recorded, settled},
    writer::{WhenFull, Writers},
};
use crate::{
    error::{Error, Result},
    model::{Booking, HoldName, MeterName},
};

/// Commits that were accepted and are not booked yet, at most.
const MAX_ACCEPTED: usize = 100_000;

/// Booked together.
const BATCH: usize = 500;

/// After some could not be booked.
const RETRY: Duration = Duration::from_millis(500);

/// Different commits of one hold whose outcome is found out. Of more nothing is known, and the hold stays:
/// better that its tokens are lost until this replica ends than that they are used twice.
const MAX_OF_A_HOLD: usize = 8;

/// What Postgres refuses so often without a reason that is known will be refused for ever.
const MAX_ATTEMPTS: u32 = 20;

/// See the module. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Spool(Arc<Shared>);

#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    added: Notify,
    emptied: Notify,
}

#[derive(Default)]
struct Waiting {
    commits: VecDeque<Commit>,
    /// Whose outcome is being found out.
    holds: HashMap<HoldName, Vec<Booking>>,
    /// Being booked.
    taken: usize,
    accepted: usize,
}

struct Commit {
    booking: Booking,
    hold: HoldName,
    /// The keeper keeps the hold until it is told.
    is_begun: bool,
    is_accepted: bool,
    refusals: u32,
}

impl Spool {
    /// Commits that were accepted and are not booked yet.
    pub(super) fn accepted(&self) -> usize {
        self.waiting().accepted
    }

    /// Waits until nothing is left to be booked.
    pub(super) async fn emptied(&self) {
        loop {
            let emptied = self.0.emptied.notified();
            if self.waiting().is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Books what waits; runs until dropped.
    pub(super) async fn run(self, writers: Writers, keeper: Keeper) {
        loop {
            let added = self.0.added.notified();
            let batch = self.waiting().take();
            if batch.is_empty() {
                added.await;
                continue;
            }
            let bookings = batch.iter().map(|one| one.booking.clone()).collect();
            let booked = writers.insert(bookings, WhenFull::Wait).await;
            let (mut again, mut ended) = (Vec::new(), Vec::new());
            let taken = batch.len();
            match booked {
                Ok(booked) => {
                    for (commit, booked) in batch.into_iter().zip(booked) {
                        let found = (commit.hold, commit.booking.clone());
                        // What failed with others says nothing about this one.
                        let tried = match settled(booked) {
                            Ok(booked) => commit.end(&keeper, &booked),
                            Err(_) => Some(commit),
                        };
                        match tried {
                            Some(commit) => again.push(commit),
                            None => ended.push(found),
                        }
                    }
                }
                Err(_) => again = batch,
            }
            let are_some_left = !again.is_empty();
            {
                let mut waiting = self.waiting();
                waiting.taken -= taken;
                for (hold, booking) in ended {
                    waiting.forget(hold, &booking);
                }
                let accepted = |commits: &VecDeque<Commit>| {
                    commits.iter().filter(|commit| commit.is_accepted).count()
                };
                waiting.commits.extend(again);
                waiting.accepted = accepted(&waiting.commits);
                if waiting.is_empty() {
                    self.0.emptied.notify_waiters();
                }
            }
            if are_some_left {
                sleep(RETRY).await;
            }
        }
    }

    /// The commits of the hold whose outcome is being found out.
    fn of(&self, hold: HoldName) -> Vec<Booking> {
        self.waiting().holds.get(&hold).cloned().unwrap_or_default()
    }

    fn push(&self, commit: Commit) {
        let mut waiting = self.waiting();
        let of_hold = waiting.holds.entry(commit.hold).or_default();
        of_hold.push(commit.booking.clone());
        waiting.accepted += usize::from(commit.is_accepted);
        waiting.commits.push_back(commit);
        drop(waiting);
        self.0.added.notify_one();
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        let waiting = self.0.waiting.lock();
        waiting.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn take(&mut self) -> Vec<Commit> {
        let some = self.commits.len().min(BATCH);
        self.taken = some;
        self.commits.drain(..some).collect()
    }

    fn forget(&mut self, hold: HoldName, booking: &Booking) {
        let Entry::Occupied(mut of_hold) = self.holds.entry(hold) else {
            return;
        };
        if let Some(place) = of_hold.get().iter().position(|one| one == booking) {
            of_hold.get_mut().swap_remove(place);
        }
        if of_hold.get().is_empty() {
            of_hold.remove();
        }
    }

    fn is_empty(&self) -> bool {
        self.commits.is_empty() && self.taken == 0
    }
}

impl Commit {
    /// Tells the keeper what became of it; answers the commit itself when that is not certain.
    fn end(mut self, keeper: &Keeper, booked: &Result<Recorded>) -> Option<Self> {
        let outcome = match booked {
            Ok(recorded) => Outcome::Booked {
                actual: self.booking.event.tokens.total(),
                new: *recorded == Recorded::Now,
            },
            Err(Error::Unavailable(_)) => return Some(self),
            Err(Error::Internal(_)) if self.refusals < MAX_ATTEMPTS => {
                self.refusals += 1;
                return Some(self);
            }
            Err(cause) => {
                if self.is_accepted {
                    let event_id = self.booking.event.event_id;
                    error!(%event_id, %cause, "a commit that was accepted cannot be booked");
                }
                Outcome::Refused
            }
        };
        let event = &self.booking.event;
        let meter = |model| MeterName {
            user_id: event.user_id,
            period: event.period(),
            model,
        };
        // What is charged without a hold is taken from what is free.
        let late = || vec![meter(None), meter(Some(event.model.clone()))];
        let meters = if self.is_begun { Vec::new() } else { late() };
        keeper.end_commit(self.hold, &meters, outcome);
        None
    }
}

/// A commit under way. Dropped before its outcome is certain, it is left to the spool.
pub(super) struct Unsettled<'a> {
    spool: &'a Spool,
    keeper: &'a Keeper,
    commit: Option<Commit>,
}

impl<'a> Unsettled<'a> {
    /// From here on nothing else ends the hold.
    pub(super) fn begin(
        spool: &'a Spool,
        keeper: &'a Keeper,
        booking: Booking,
        hold: HoldName,
    ) -> Self {
        let is_begun = keeper.begin_commit(hold) == Begun::Commit;
        let commit = Commit {
            booking,
            hold,
            is_begun,
            is_accepted: false,
            refusals: 0,
        };
        Self {
            spool,
            keeper,
            commit: Some(commit),
        }
    }

    /// What became of it.
    pub(super) fn settle(mut self, booked: Result<Recorded>) -> Result<Recorded> {
        if let Some(commit) = self.commit.take() {
            self.commit = commit.end(self.keeper, &booked);
        }
        booked
    }

    /// Promises that it will be booked.
    ///
    /// # Errors
    /// `Unavailable` when too many wait already
    pub(super) fn accept(mut self) -> Result<Committed> {
        if self.spool.accepted() >= MAX_ACCEPTED {
            return Err(Error::Unavailable("too many commits wait".into()));
        }
        if let Some(commit) = self.commit.take() {
            self.spool.push(Commit {
                is_accepted: true,
                ..commit
            });
        }
        Ok(Committed::Accepted)
    }
}

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        let Some(commit) = self.commit.take().filter(|commit| commit.is_begun) else {
            return;
        };
        let known = self.spool.of(commit.hold);
        let is_same = |one: &Booking| one.is_booked_as(&commit.booking.event);
        if known.iter().any(is_same) {
            // It finds out for both. Not so of another payload: the one that is booked is charged.
            self.keeper.end_commit(commit.hold, &[], Outcome::Refused);
        } else if known.len() < MAX_OF_A_HOLD {
            self.spool.push(commit);
        } else {
            let event_id = commit.booking.event.event_id;
            error!(%event_id, "a reservation has too many different commits: its tokens stay held");
        }
    }
}
