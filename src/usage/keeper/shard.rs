//! One shard: a book, whose it is, and what Postgres said last.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use super::super::lease::{
    self, Book, Boot, Bounds, Gcra, Heartbeat, HoldId, Lasting, Map, MeterKey, Operation, Pace,
    Rate, Registration, Sight, Tokens, Told,
};
use crate::{
    model::{Period, QuotaState, ReplicaId, TierName, UserId},
    store::{Heard, Operated},
};

pub(super) struct Shard {
    /// The name under which the book's leases are Postgres'.
    pub(super) owner: ReplicaId,
    pub(super) book: Book,
    lasting: Lasting,
    pub(super) registration: Registration,
    /// The time of Postgres, when the clock showed this.
    clock: Option<(DateTime<Utc>, Boot)>,
    /// Requests a minute, of those who have not been quiet for that long.
    rates: Map<UserId, Gcra>,
    /// Replicas that share a rate.
    replicas: u32,
    forgot_at: Boot,
}

/// How a meter stands, as far as it is known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// `None`: there is no limit.
    pub limit: Option<Tokens>,
    pub committed: Tokens,
    /// What no replica has and nobody used; `None`: any number.
    pub left: Option<Tokens>,
    /// What other replicas may admit.
    pub elsewhere: Tokens,
    /// What this replica may admit, what it is giving back, and what it holds.
    pub free: Tokens,
    pub leaving: Tokens,
    pub held: Tokens,
    /// What is booked and may not be counted in `committed` yet.
    pub spent: Tokens,
}

impl Standing {
    /// Of what is leased here, what is not held.
    pub fn ready(&self) -> Tokens {
        self.free + self.spent
    }

    /// As people are told of it.
    pub fn state(&self, period: Period, tier: &TierName) -> QuotaState {
        let used = self.committed.saturating_add(self.spent);
        let remaining = self.limit.map(|limit| limit.saturating_sub(used).max(0));
        let held = match (remaining, self.obtainable()) {
            (Some(remaining), Some(obtainable)) => remaining - obtainable,
            _ => self.held + self.elsewhere,
        };
        QuotaState {
            period,
            tier: tier.clone(),
            limit: self.limit,
            used,
            held: held.max(0),
            remaining,
        }
    }

    /// What a request here may have if nobody else is quicker: what is free here, what was and is on its
    /// way back, and what Postgres has. `None`: any number.
    pub fn obtainable(&self) -> Option<Tokens> {
        let here = self.free + self.leaving;
        Some(here.saturating_add(self.left?))
    }
}

impl From<(Told, Sight)> for Standing {
    fn from((told, sight): (Told, Sight)) -> Self {
        let Told {
            granted, balance, ..
        } = told;
        Self {
            limit: balance.limit,
            committed: balance.committed,
            left: balance.limit.map(|limit| {
                let used = balance.committed.saturating_add(balance.leased);
                limit.saturating_sub(used).max(0)
            }),
            elsewhere: balance.leased - granted,
            free: sight.free,
            leaving: sight.leaving,
            held: sight.held,
            spent: sight.spent,
        }
    }
}

impl Shard {
    pub(super) fn new(owner: ReplicaId, bounds: Bounds, pace: Pace, lasting: Lasting) -> Self {
        Self {
            owner,
            book: Book::new(bounds, pace),
            lasting,
            registration: Registration::new(lasting),
            clock: None,
            rates: Map::default(),
            replicas: 1,
            forgot_at: Boot(0),
        }
    }

    /// Goes on under a new name, with nothing.
    pub(super) fn rejoin(&mut self, owner: ReplicaId) {
        self.owner = owner;
        self.book.reset();
        self.registration = Registration::new(self.lasting);
    }

    pub(super) fn heard(&mut self, heartbeat: &Heartbeat, heard: &Heard, at: Boot) {
        self.registration.answered(heartbeat);
        self.clock = Some((heard.now, at));
        self.replicas = heard.replicas;
        self.book.outage_ended();
    }

    /// One request more of a user who may make `per_minute`; to be remembered if it is made.
    ///
    /// # Errors
    /// Says after how long to ask again.
    pub(super) fn request(
        &self,
        user: UserId,
        per_minute: i64,
        now: Boot,
    ) -> Result<Gcra, Duration> {
        let mut state = self.rates.get(&user).copied().unwrap_or_default();
        let limit = u32::try_from(per_minute).unwrap_or(u32::MAX);
        let Some(rate) = Rate::per_minute(limit, self.replicas) else {
            return Err(MINUTE);
        };
        let admitted = state.admit(rate, nanos(now));
        admitted.map(|()| state).map_err(Duration::from_nanos)
    }

    pub(super) fn remember_request(&mut self, user: UserId, state: Gcra) {
        self.rates.insert(user, state);
    }

    pub(super) fn admission(&self, now: Boot) -> lease::Standing {
        self.registration.standing(now)
    }

    /// The time of Postgres, about; `None` before it was heard of.
    pub(super) fn time_at(&self, at: Boot) -> Option<DateTime<Utc>> {
        let (heard, boot) = self.clock?;
        let since = i64::try_from(at.0).ok()? - i64::try_from(boot.0).ok()?;
        heard.checked_add_signed(TimeDelta::milliseconds(since))
    }

    pub(super) fn answered(
        &mut self,
        key: MeterKey,
        operation: &Operation,
        operated: &Operated,
        now: Boot,
    ) {
        let Some(answer) = operated.answer else {
            return;
        };
        self.book.answered(key, operation.number, &answer, now);
        let told = Told {
            number: operation.number,
            granted: answer.granted,
            balance: operated.balance,
        };
        self.book.tell(key, told);
    }

    /// What others have of a meter, as an operation after number `sent` found; `None`: none was answered
    /// yet.
    pub(super) fn elsewhere_since(&self, key: MeterKey, sent: u64) -> Option<Tokens> {
        let told = self.book.told(key).filter(|told| told.number > sent)?;
        Some(told.balance.leased - told.granted)
    }

    pub(super) fn standing(&self, key: MeterKey) -> Option<Standing> {
        self.book.view(key).map(Standing::from)
    }

    /// Of the total, with a hold.
    pub(super) fn standing_of(&mut self, hold: HoldId) -> Option<Standing> {
        self.book.view_of(hold).map(Standing::from)
    }

    /// Looks after a tenth of the book, and forgets who has been quiet.
    pub(super) fn sweep(&mut self, now: Boot) {
        self.book.sweep(now, 10);
        if now.since(self.forgot_at) >= FORGET_EVERY_MS {
            self.forgot_at = now;
            self.rates.retain(|_, state| !state.is_fresh(nanos(now)));
        }
    }

    /// Limits have changed: of one user, or of everybody.
    pub(super) fn outdate(&mut self, user: Option<UserId>, now: Boot) {
        let of_user = |key: &MeterKey| user.is_none_or(|user| key.user == user);
        let all: Vec<MeterKey> = self.book.keys().filter(of_user).collect();
        for key in all {
            self.book.outdate(key, now);
        }
    }

    /// Asks for all that is not held to be given back; answers how much that is.
    pub(super) fn recall_all(&mut self, now: Boot) -> Tokens {
        let mut all = 0;
        for key in Vec::from_iter(self.book.keys()) {
            let sight = self.book.sight(key).unwrap_or_default();
            let here = sight.free + sight.spent;
            if here > 0 {
                self.book.recall(key, now);
                all += here;
            }
        }
        all
    }
}

/// Between looks at all of those.
const FORGET_EVERY_MS: u64 = 5_000;

const MINUTE: Duration = Duration::from_mins(1);

fn nanos(at: Boot) -> u64 {
    at.0.saturating_mul(1_000_000)
}

/// Of ids of holds, the bits that name the shard.
pub(super) const SHARD_BITS: u32 = 6;
const SLOT: u64 = u32::MAX as u64;

/// A hold of a shard, named so that no other shard's is called the same.
pub(super) fn outward(shard: usize, hold: HoldId) -> HoldId {
    let slot = hold.0 & SLOT;
    debug_assert!(slot << SHARD_BITS <= SLOT && shard < 1 << SHARD_BITS);
    HoldId(hold.0 & !SLOT | slot << SHARD_BITS | shard as u64)
}

/// The shard of a hold, and its name there.
pub(super) fn inward(hold: HoldId) -> (usize, HoldId) {
    let low = hold.0 & SLOT;
    let shard = low & ((1 << SHARD_BITS) - 1);
    (shard as usize, HoldId(hold.0 & !SLOT | low >> SHARD_BITS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_of_all_shards_have_names_of_their_own() {
        for shard in [0, 1, 63] {
            for hold in [1 << 32, 7 << 32 | 12, u64::from(u32::MAX) << 32 | 0xfff] {
                let name = outward(shard, HoldId(hold));
                assert_eq!(inward(name), (shard, HoldId(hold)));
            }
        }
    }
}
