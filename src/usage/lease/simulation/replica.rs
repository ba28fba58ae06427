//! One process: its book, its registration, its clock, and what it waits for.

use std::collections::BTreeMap;

use super::{HOLD_MS, TTL_MS, postgres::Name, world::Statement};
use crate::usage::lease::{Book, Boot, Bounds, Lasting, Pace, Registration};

pub(super) struct Replica {
    pub(super) name: Name,
    pub(super) book: Book,
    pub(super) registration: Registration,
    /// Starts of the process: what was sent to an earlier one is lost.
    pub(super) process: u64,
    pub(super) up: bool,
    pub(super) paused_until: u64,
    pub(super) cut_until: u64,
    pub(super) pending: BTreeMap<u64, (Name, Statement)>,
    /// The clock's rate, in millionths, and where it began.
    rate: u64,
    offset: u64,
    /// How far its notion of Postgres' time is off.
    pub(super) bias: u64,
}

const MILLION: u64 = 1_000_000;

impl Replica {
    pub(super) fn new(rate: u64, offset: u64, bias: u64) -> Self {
        Self {
            name: 0,
            book: new_book(),
            registration: new_registration(),
            process: 0,
            up: false,
            paused_until: 0,
            cut_until: 0,
            pending: BTreeMap::new(),
            rate,
            offset,
            bias,
        }
    }

    pub(super) fn start(&mut self, name: Name) {
        self.name = name;
        self.book = new_book();
        self.registration = new_registration();
        self.process += 1;
        self.up = true;
        self.paused_until = 0;
        self.pending.clear();
    }

    pub(super) fn crash(&mut self) {
        self.up = false;
        self.process += 1;
        self.pending.clear();
    }

    /// Postgres gave its leases away: it goes on under a new name. Commits under way go on.
    pub(super) fn rejoin(&mut self, name: Name) {
        self.name = name;
        self.book.reset();
        self.registration = new_registration();
        self.pending
            .retain(|_, (_, statement)| matches!(statement, Statement::Book { .. }));
    }

    /// Whether it would sell what is free in its book.
    pub(super) fn admits(&self, now: u64) -> bool {
        self.up && !self.registration.standing(self.clock(now)).is_fenced()
    }

    pub(super) fn clock(&self, now: u64) -> Boot {
        Boot(self.offset + now * self.rate / MILLION)
    }

    /// When the clock first shows `boot`.
    pub(super) fn when(&self, boot: Boot) -> u64 {
        (boot.0.saturating_sub(self.offset) * MILLION).div_ceil(self.rate)
    }
}

fn new_book() -> Book {
    let pace = Pace {
        first_chunk: 64,
        max_chunk: 100_000,
        grow_within_ms: 500,
        idle_after_ms: 700,
        exact_for_ms: 300,
        flush_after_ms: 0,
    };
    let bounds = Bounds {
        holds_per_meter: 50,
        holds: 200,
        ..Bounds::default()
    };
    Book::new(bounds, pace)
}

fn new_registration() -> Registration {
    Registration::new(Lasting {
        ttl_ms: TTL_MS,
        hold_ms: HOLD_MS,
        period_ms: 250,
        drift_part: 100,
    })
}
