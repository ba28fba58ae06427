//! What one replica knows of the leases and holds of one shard of users, and what it admits.

mod leasing;
mod settling;

use std::collections::VecDeque;

use super::{
    hash::Map,
    hold::{Held, Hold, Holds, NONE, RequestKey, State},
    meter::{Boot, Meter, MeterKey, Pace, Sight, Told},
    meters::Meters,
    registration::Standing,
};
use crate::model::{HoldId, Tokens, UserId};

pub use leasing::Answered;
pub use settling::{Begun, Ended, Outcome};

/// How much a book may hold; past it reserving is refused.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// At a time, on one meter: so a user's.
    pub holds_per_meter: u32,
    pub holds: usize,
    pub meters: usize,
    /// Users with an allowance in use, during an outage.
    pub allowances: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            holds_per_meter: 10_000,
            holds: 1 << 20,
            meters: 1 << 20,
            allowances: 1 << 20,
        }
    }
}

/// Meters that are looked at in one sweep.
const SWEEP_AT_LEAST: u32 = 64;

/// A wish for tokens.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    pub request: RequestKey,
    /// What limits it: none, the total, the model, or both. Of one user and one month.
    pub meters: &'a [MeterKey],
    pub tokens: Tokens,
    pub mode: Mode,
    /// How long the hold is to last.
    pub lasts_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    AllOrNothing,
    /// Takes what is free here, at least one token. Ask [`Mode::AllOrNothing`] first, until it is
    /// denied for good: what is free here is not all there is.
    BestEffort,
    /// Holds nothing, and asks for what is missing as the others do.
    LookOnly,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserved {
    Held(Held),
    /// To [`Mode::LookOnly`]: it could be held.
    Enough,
    /// These meters have too little free here. What is missing is asked for by their next operation.
    Short([Option<MeterKey>; 2]),
    Refused(Refusal),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// No heartbeat was answered in time: only the tier's policy can admit.
    Fenced,
    /// The hold would end after what Postgres was told: a heartbeat is needed first.
    BeyondHorizon,
    TooManyHolds,
    Full,
    /// More than the allowance of this outage.
    Allowance,
}

/// One shard's state. Whoever has it decides; nothing here waits.
#[derive(Debug)]
pub struct Book {
    bounds: Bounds,
    pace: Pace,
    meters: Meters,
    holds: Holds,
    due: VecDeque<u32>,
    limbo: VecDeque<HoldId>,
    allowances: Map<UserId, Tokens>,
    /// Those that no lease covers.
    open_holds: usize,
    number: u64,
    next_chunk: usize,
    next_meter: u32,
}

impl Book {
    pub fn new(bounds: Bounds, pace: Pace) -> Self {
        Self {
            bounds,
            pace,
            meters: Meters::default(),
            holds: Holds::default(),
            due: VecDeque::new(),
            limbo: VecDeque::new(),
            allowances: Map::default(),
            open_holds: 0,
            number: 0,
            next_chunk: 0,
            next_meter: 0,
        }
    }

    /// Holds tokens on all meters, or on none.
    ///
    /// A request that has a live hold gets the same again.
    pub fn reserve(&mut self, ask: &Ask<'_>, standing: &Standing) -> Reserved {
        debug_assert!(ask.meters.len() <= 2 && ask.tokens >= 0);
        let is_look = ask.mode == Mode::LookOnly;
        if let Some(held) = self.replayed(ask, standing.now) {
            return Reserved::Held(held);
        }
        if standing.is_fenced() {
            return Reserved::Refused(Refusal::Fenced);
        }
        let expires = standing.now.plus(ask.lasts_ms);
        if expires > standing.horizon && !is_look {
            return Reserved::Refused(Refusal::BeyondHorizon);
        }
        if self.holds.len() >= self.bounds.holds && !is_look {
            return Reserved::Refused(Refusal::Full);
        }
        let mut meters = [NONE; 2];
        let mut tokens = ask.tokens;
        let mut short = [None; 2];
        for ((slot, short), key) in meters.iter_mut().zip(&mut short).zip(ask.meters) {
            let Some(index) = self.meter_or_new(*key, standing.now) else {
                return Reserved::Refused(Refusal::Full);
            };
            *slot = index;
            let meter = self.meters.at_mut(index).expect("just found");
            if meter.holds >= self.bounds.holds_per_meter && !is_look {
                return Reserved::Refused(Refusal::TooManyHolds);
            }
            let free = meter.available();
            if free >= tokens {
                continue;
            }
            if ask.mode == Mode::BestEffort && free > 0 {
                tokens = free;
                continue;
            }
            *short = Some(*key);
            meter.wait_for(tokens);
            self.make_due(index);
        }
        if short != [None; 2] {
            return Reserved::Short(short);
        }
        for index in meters.into_iter().filter(|index| *index != NONE) {
            let meter = self.meters.at_mut(index).expect("just found");
            meter.touch(standing.now);
            if is_look {
                continue;
            }
            meter.hold(tokens);
            if meter.runs_low(standing.now) {
                self.make_due(index);
            }
        }
        if is_look {
            return Reserved::Enough;
        }
        let id = self.insert(ask, meters, tokens, expires, false);
        Reserved::Held(Held {
            id,
            tokens,
            expires,
            replay: false,
        })
    }

    /// Holds tokens that no lease covers, while Postgres is silent and the tier says `open`. All of
    /// them, or none.
    ///
    /// A user is admitted at most `allowance` so until [`Book::outage_ended`], whatever becomes of
    /// the holds: where they were committed is not known before then.
    pub fn reserve_open(
        &mut self,
        ask: &Ask<'_>,
        user: UserId,
        allowance: Tokens,
        now: Boot,
    ) -> Reserved {
        if let Some(held) = self.replayed(ask, now) {
            return Reserved::Held(held);
        }
        let full = self.allowances.len() >= self.bounds.allowances;
        if self.holds.len() >= self.bounds.holds || (full && !self.allowances.contains_key(&user)) {
            return Reserved::Refused(Refusal::Full);
        }
        let used = self.allowances.get(&user).copied().unwrap_or(0);
        if ask.tokens > allowance.saturating_sub(used) {
            return Reserved::Refused(Refusal::Allowance);
        }
        if ask.mode == Mode::LookOnly {
            return Reserved::Enough;
        }
        self.allowances.insert(user, used + ask.tokens);
        let expires = now.plus(ask.lasts_ms);
        self.open_holds += 1;
        let id = self.insert(ask, [NONE; 2], ask.tokens, expires, true);
        Reserved::Held(Held {
            id,
            tokens: ask.tokens,
            expires,
            replay: false,
        })
    }

    /// Postgres answers again: users have their allowance anew once what was admitted openly is
    /// booked, or over.
    pub fn outage_ended(&mut self) {
        if self.open_holds == 0 {
            self.allowances.clear();
        }
    }

    /// Whether a request has a live hold.
    pub fn has(&mut self, request: RequestKey, now: Boot) -> bool {
        self.held(request, now).is_some()
    }

    /// Has what a reservation of a user looks at, and where it writes, on its way from memory.
    pub fn prefetch(&self, user: UserId) {
        self.meters.prefetch(user);
        self.holds.prefetch();
    }

    /// Looks at a meter and consumes nothing.
    pub fn sight(&self, key: MeterKey) -> Option<Sight> {
        self.meters.get(key).map(Meter::sight)
    }

    /// What Postgres said of a meter last.
    pub fn told(&self, key: MeterKey) -> Option<Told> {
        self.meters.get(key)?.told
    }

    /// Both, of a meter that Postgres said something of.
    pub fn view(&self, key: MeterKey) -> Option<(Told, Sight)> {
        let meter = self.meters.get(key)?;
        Some((meter.told?, meter.sight()))
    }

    /// As [`Book::view`], of the first meter of a hold.
    pub fn view_of(&mut self, hold: HoldId) -> Option<(Told, Sight)> {
        let [index, _] = self.holds.get_mut(hold)?.meters;
        let meter = self.meters.at(index)?;
        Some((meter.told?, meter.sight()))
    }

    /// The number of the operation of a meter that was sent last; 0 is none.
    pub fn sent(&self, key: MeterKey) -> u64 {
        self.meters.get(key).map_or(0, |meter| meter.sent)
    }

    /// Remembers what Postgres said of a meter.
    pub fn tell(&mut self, key: MeterKey, told: Told) {
        if let Some((_, meter)) = self.meters.get_mut(key) {
            meter.told = Some(told);
        }
    }

    pub fn keys(&self) -> impl Iterator<Item = MeterKey> {
        self.meters.iter().map(|meter| meter.key)
    }

    /// Keeps a live hold for longer; never makes it shorter. Past the fence too: its rights cannot be
    /// taken before the horizon.
    ///
    /// # Errors
    /// `None`: there is no live hold · `BeyondHorizon`
    pub fn extend(
        &mut self,
        id: HoldId,
        lasts_ms: u64,
        standing: &Standing,
    ) -> Result<Boot, Option<Refusal>> {
        let hold = self.holds.get_mut(id).ok_or(None)?;
        if hold.state != State::Live || hold.expires <= standing.now {
            return Err(None);
        }
        let expires = standing.now.plus(lasts_ms).max(hold.expires);
        if expires > standing.horizon && !hold.is_open {
            return Err(Some(Refusal::BeyondHorizon));
        }
        hold.expires = expires;
        Ok(expires)
    }

    /// Looks at one of so many parts of the holds and meters, and goes on from there the next time:
    /// expires holds, and makes due what is spent, idle or empty. Few are all looked at.
    pub fn sweep(&mut self, now: Boot, parts: u32) {
        for _ in 0..self.holds.chunks().div_ceil(parts as usize) {
            self.next_chunk = (self.next_chunk + 1) % self.holds.chunks();
            self.limbo.extend(self.holds.expire(self.next_chunk, now));
        }
        let meters = self.meters.slots().div_ceil(parts).max(SWEEP_AT_LEAST);
        for _ in 0..meters.min(self.meters.slots()) {
            self.next_meter = (self.next_meter + 1) % self.meters.slots();
            let index = self.next_meter;
            let Some(meter) = self.meters.at(index) else {
                continue;
            };
            let idle = meter.is_idle(&self.pace, now);
            if idle && meter.is_empty() && !meter.due {
                self.meters.remove(index);
            } else if meter.is_to_flush(&self.pace, now) || (idle && meter.free() > 0) {
                self.make_due(index);
            }
        }
    }

    /// Forgets leases and holds: Postgres has given the leases of this replica to others, after all its
    /// holds had ended.
    pub fn reset(&mut self) {
        let mut holds = std::mem::take(&mut self.holds);
        holds.clear();
        *self = Self {
            holds,
            number: self.number,
            allowances: std::mem::take(&mut self.allowances),
            ..Self::new(self.bounds, self.pace)
        };
    }

    pub fn meters(&self) -> usize {
        self.meters.len()
    }

    /// Holds of all states.
    pub fn holds(&self) -> usize {
        self.holds.len()
    }

    fn replayed(&mut self, ask: &Ask<'_>, now: Boot) -> Option<Held> {
        if ask.mode == Mode::LookOnly {
            return None;
        }
        self.held(ask.request, now)
    }

    /// The live hold of a request.
    pub fn held(&mut self, request: RequestKey, now: Boot) -> Option<Held> {
        let (id, hold) = self.holds.of_request(request)?;
        (hold.state == State::Live && hold.expires > now).then_some(Held {
            id,
            tokens: hold.tokens,
            expires: hold.expires,
            replay: true,
        })
    }

    fn insert(
        &mut self,
        ask: &Ask<'_>,
        meters: [u32; 2],
        tokens: Tokens,
        expires: Boot,
        is_open: bool,
    ) -> HoldId {
        self.holds.insert(Hold {
            request: ask.request,
            is_open,
            meters,
            tokens,
            expires,
            state: State::Live,
            commits: 0,
        })
    }

    fn meter_or_new(&mut self, key: MeterKey, now: Boot) -> Option<u32> {
        let found = self.meters.find(key);
        if found.is_some() || self.meters.len() >= self.bounds.meters {
            return found;
        }
        Some(self.meters.insert(Meter::new(key, &self.pace, now)))
    }

    fn make_due(&mut self, index: u32) {
        if let Some(meter) = self.meters.at_mut(index)
            && !std::mem::replace(&mut meter.due, true)
        {
            self.due.push_back(index);
        }
    }

    /// What must hold after every call.
    #[cfg(test)]
    pub(super) fn check(&mut self) {
        let mut held = vec![(0, 0); self.meters.slots() as usize];
        for slot in 0..self.holds.slots() {
            if let Some((_, hold)) = self.holds.at(slot) {
                for index in hold.meters.into_iter().filter(|index| *index != NONE) {
                    held[index as usize].0 += hold.tokens;
                    held[index as usize].1 += 1;
                }
            }
        }
        for (slot, (tokens, holds)) in (0..).zip(held) {
            let Some(meter) = self.meters.at(slot) else {
                assert_eq!(holds, 0);
                continue;
            };
            assert_eq!((meter.held, meter.holds), (tokens, holds));
            assert!(meter.free() >= 0 && meter.spent >= 0 && meter.leaving >= 0);
            assert_eq!(self.meters.find(meter.key), Some(slot));
        }
        assert_eq!(self.meters.len(), self.meters.iter().count());
    }
}

#[cfg(test)]
mod tests;
