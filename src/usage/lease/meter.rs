//! One lease of this replica: the state of a meter.

use crate::model::{Balance, Operation, Period, Tokens, UserId};

/// Milliseconds of the replica's own clock, the one that counts suspend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Boot(pub u64);

impl Boot {
    pub fn plus(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis))
    }

    pub fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// A model, by a number that holds in this process; [`ModelKey::TOTAL`] is all of them together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelKey(pub u32);

impl ModelKey {
    pub const TOTAL: Self = Self(0);
}

/// What a limit is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeterKey {
    pub user: UserId,
    pub period: Period,
    pub model: ModelKey,
}

/// How fast a replica takes and gives back.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The first chunk beyond what a request needs, and the largest one.
    pub first_chunk: Tokens,
    pub max_chunk: Tokens,
    /// Chunks that follow one another within this time double.
    pub grow_within_ms: u64,
    /// What was not touched for so long goes back.
    pub idle_after_ms: u64,
    /// After a recall only what is needed is asked for, this long.
    pub exact_for_ms: u64,
    /// What is spent leaves the lease this long after the last operation, if nothing else is asked for:
    /// an operation for each commit would cost Postgres as much as the commit.
    pub flush_after_ms: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            first_chunk: 4_096,
            max_chunk: 1 << 40,
            grow_within_ms: 10_000,
            idle_after_ms: 60_000,
            exact_for_ms: 2_000,
            flush_after_ms: 5_000,
        }
    }
}

/// `granted = free + held + spent + leaving`, nothing of it below zero.
///
/// One of a hundred thousand is seldom in the processor's caches. What every reservation looks at comes
/// first, on two lines of them, which are fetched together.
#[derive(Debug)]
#[repr(C, align(128))]
pub(super) struct Meter {
    pub(super) key: MeterKey,
    /// As Postgres answered it last.
    pub(super) granted: Tokens,
    /// Live holds and those in limbo.
    pub(super) held: Tokens,
    /// Booked, and still in `granted`.
    pub(super) spent: Tokens,
    /// Given back by the operation under way.
    pub(super) leaving: Tokens,
    pub(super) holds: u32,
    /// Stands in the queue of operations.
    pub(super) due: bool,
    recalled: bool,
    /// The limit has changed since: what is free goes back first.
    is_outdated: bool,
    pub(super) told: Option<Told>,
    used_at: Boot,
    chunk: Tokens,
    exact_until: Boot,
    pub(super) flight: Option<Flight>,
    /// What the least of those who wait wants, and all of them together; 0 is nobody. Not what is
    /// missing: that changes while an operation is under way.
    need: Tokens,
    wanted: Tokens,
    grown_at: Boot,
    operated_at: Boot,
    /// Of the operation that was sent last.
    pub(super) sent: u64,
}

const _: () = assert!(std::mem::offset_of!(Meter, exact_until) == 128);

/// A meter as the operation that was answered last left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    pub number: u64,
    pub granted: Tokens,
    pub balance: Balance,
}

/// What a meter looks like from here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    pub free: Tokens,
    pub held: Tokens,
    /// Booked, and still counted as leased in Postgres.
    pub spent: Tokens,
    /// Given back by the operation under way, and counted as leased until it is answered.
    pub leaving: Tokens,
}

/// The operation under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flight {
    pub(super) operation: Operation,
    /// To be sent, first or again.
    pub(super) unsent: bool,
}

impl Meter {
    pub(super) fn new(key: MeterKey, pace: &Pace, now: Boot) -> Self {
        Self {
            key,
            granted: 0,
            held: 0,
            spent: 0,
            leaving: 0,
            holds: 0,
            flight: None,
            due: false,
            need: 0,
            wanted: 0,
            recalled: false,
            is_outdated: false,
            exact_until: Boot(0),
            chunk: pace.first_chunk,
            grown_at: Boot(0),
            used_at: now,
            operated_at: now,
            sent: 0,
            told: None,
        }
    }

    pub(super) fn free(&self) -> Tokens {
        let free = self.granted - self.held - self.spent - self.leaving;
        debug_assert!(free >= 0, "{self:?}");
        free
    }

    pub(super) fn sight(&self) -> Sight {
        Sight {
            free: self.free(),
            held: self.held,
            spent: self.spent,
            leaving: self.leaving,
        }
    }

    /// Of what is free, what may be held.
    pub(super) fn available(&self) -> Tokens {
        if self.is_outdated { 0 } else { self.free() }
    }

    /// Had enough for a reservation, or for a look: who is only looked at is not idle, for each look
    /// would have to wait for Postgres otherwise.
    pub(super) fn touch(&mut self, now: Boot) {
        self.used_at = now;
    }

    pub(super) fn hold(&mut self, tokens: Tokens) {
        debug_assert!(tokens <= self.free());
        self.held += tokens;
        self.holds += 1;
    }

    /// A hold ends; `actual` of it, and of what is free, is booked.
    pub(super) fn end_hold(&mut self, tokens: Tokens, actual: Tokens) {
        debug_assert!(tokens <= self.held && self.holds > 0);
        self.held -= tokens;
        self.holds -= 1;
        self.spend(actual);
    }

    /// What is booked beyond what is free is Postgres' to count.
    pub(super) fn spend(&mut self, actual: Tokens) {
        self.spent += actual.clamp(0, self.free());
    }

    pub(super) fn wait_for(&mut self, tokens: Tokens) {
        self.need = match self.need {
            0 => tokens,
            need => need.min(tokens),
        };
        self.wanted = self.wanted.saturating_add(tokens);
    }

    /// Whether to ask before there is nothing left.
    pub(super) fn runs_low(&self, now: Boot) -> bool {
        self.free() < self.chunk / 4 && self.flight.is_none() && now >= self.exact_until
    }

    /// What it may admit has changed: nothing is held of what it has, until it has asked anew.
    pub(super) fn outdate(&mut self, pace: &Pace, now: Boot) {
        self.recall(pace, now);
        self.is_outdated = true;
    }

    /// Asked to give back: all that is free, and no more than needed for a while.
    pub(super) fn recall(&mut self, pace: &Pace, now: Boot) {
        self.recalled = true;
        self.exact_until = now.plus(pace.exact_for_ms);
        self.chunk = pace.first_chunk;
    }

    pub(super) fn is_idle(&self, pace: &Pace, now: Boot) -> bool {
        now.since(self.used_at) >= pace.idle_after_ms
    }

    /// Whether what is spent is to leave.
    pub(super) fn is_to_flush(&self, pace: &Pace, now: Boot) -> bool {
        self.spent > 0 && now.since(self.operated_at) >= pace.flush_after_ms
    }

    /// Nothing that Postgres or a client knows would be forgotten with it.
    pub(super) fn is_empty(&self) -> bool {
        self.granted == 0 && self.flight.is_none() && self.holds == 0
    }

    /// The next operation, if there is anything to do.
    pub(super) fn next(&mut self, number: u64, pace: &Pace, now: Boot) -> Option<Operation> {
        debug_assert!(self.flight.is_none());
        let idle = self.is_idle(pace, now);
        // What is recalled goes even when somebody waits here: two that wait, each on what the other
        // has, would both be refused.
        let give_back = if self.recalled || (idle && self.need == 0) {
            self.free()
        } else {
            0
        };
        let extra = if idle || now < self.exact_until {
            0
        } else if self.need > 0 || self.runs_low(now) {
            self.chunk
        } else {
            0
        };
        let left = self.free() - give_back;
        let need = (self.need - left).max(0);
        let operation = Operation {
            number,
            spent: self.spent,
            give_back,
            need,
            want: (self.wanted - left).max(need).saturating_add(extra),
        };
        (self.recalled, self.is_outdated) = (false, false);
        (self.need, self.wanted) = (0, 0);
        if operation.spent == 0 && operation.give_back == 0 && operation.want == 0 {
            return None;
        }
        self.leaving += give_back;
        self.sent = number;
        self.flight = Some(Flight {
            operation,
            unsent: true,
        });
        Some(operation)
    }

    /// The operation under way was carried out; returns it and what it brought.
    pub(super) fn answered(
        &mut self,
        granted: Tokens,
        pace: &Pace,
        now: Boot,
    ) -> Option<(Operation, Tokens)> {
        let operation = self.flight.take()?.operation;
        self.spent -= operation.spent;
        self.leaving -= operation.give_back;
        let gained = granted - (self.granted - operation.spent - operation.give_back);
        debug_assert!(gained >= 0, "{self:?} {operation:?} {granted}");
        self.granted = granted;
        self.operated_at = now;
        if operation.want > operation.need && gained <= operation.need {
            // There is little left: asking for more again and again would only keep Postgres busy.
            self.exact_until = self.exact_until.max(now.plus(pace.exact_for_ms));
            self.chunk = pace.first_chunk;
        } else if gained > operation.need && gained < operation.want {
            // Not all that was wanted: a chunk of more than there is would always run low, and take
            // what is left little by little, without anybody asking.
            self.chunk = gained - operation.need;
            self.grown_at = now;
        } else if gained > operation.need {
            if now.since(self.grown_at) < pace.grow_within_ms {
                self.chunk = self.chunk.saturating_mul(2).min(pace.max_chunk);
            } else {
                self.chunk = (self.chunk / 2).max(pace.first_chunk);
            }
            self.grown_at = now;
        }
        Some((operation, gained))
    }
}
