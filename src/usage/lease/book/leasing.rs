//! What the book asks of Postgres for its meters, and what it is answered.

use super::{
    super::{
        hold::State,
        meter::{Boot, Flight, Meter, MeterKey, Pace},
    },
    Book,
};
use crate::model::{Answer, Operation, Tokens};

/// What an answer to an operation brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answered {
    pub gained: Tokens,
    /// It was not what somebody here needs: time to recall what others have, or to deny.
    pub short: bool,
}

impl Book {
    /// Somebody else needs what is free here.
    pub fn recall(&mut self, key: MeterKey, now: Boot) {
        self.with_lease(key, |meter, pace| meter.recall(pace, now));
    }

    /// The limit has changed: what is free goes back, and is asked for anew.
    pub fn outdate(&mut self, key: MeterKey, now: Boot) {
        self.with_lease(key, |meter, pace| meter.outdate(pace, now));
    }

    fn with_lease(&mut self, key: MeterKey, change: impl FnOnce(&mut Meter, &Pace)) {
        if let Some((index, meter)) = self.meters.get_mut(key) {
            change(meter, &self.pace);
            self.make_due(index);
        }
    }

    /// Whether there may be operations or tombstones to send.
    pub fn is_due(&self) -> bool {
        !self.due.is_empty() || !self.limbo.is_empty()
    }

    /// Whether Postgres knows of everything: no operation, tombstone or commit is to be sent, or on
    /// its way. Looks at all there is.
    pub fn is_told(&mut self) -> bool {
        let is_flying = |meter: &Meter| meter.flight.is_some();
        if self.is_due() || self.meters.iter().any(is_flying) {
            return false;
        }
        (0..self.holds.slots()).all(|slot| {
            let hold = self.holds.at(slot);
            hold.is_none_or(|(_, hold)| hold.commits == 0 && !matches!(hold.state, State::Limbo(_)))
        })
    }

    /// Operations to send, each the only one of its meter under way.
    ///
    /// Each must come back by [`Book::answered`] or [`Book::operation_lost`].
    pub fn operations(&mut self, now: Boot, max: usize) -> Vec<(MeterKey, Operation)> {
        let mut all = Vec::new();
        let mut left = self.due.len();
        while all.len() < max && left > 0 {
            left -= 1;
            let Some(index) = self.due.pop_front() else {
                break;
            };
            let Some(meter) = self.meters.at_mut(index) else {
                continue;
            };
            meter.due = false;
            if let Some(flight) = &mut meter.flight {
                if std::mem::take(&mut flight.unsent) {
                    all.push((meter.key, flight.operation));
                }
                // What else there is goes with the next one, when this one is answered.
                continue;
            }
            if let Some(operation) = meter.next(self.number + 1, &self.pace, now) {
                self.number += 1;
                meter.flight.as_mut().expect("just begun").unsent = false;
                all.push((meter.key, operation));
            }
        }
        all
    }

    /// Nobody knows whether the operation was carried out: it is sent again under its number.
    pub fn operation_lost(&mut self, key: MeterKey, number: u64) {
        if let Some((index, meter)) = self.meters.get_mut(key)
            && let Some(flight) = &mut meter.flight
            && flight.operation.number == number
        {
            flight.unsent = true;
            self.make_due(index);
        }
    }

    /// An operation was carried out. An answer that comes twice, or for a meter that is gone, changes
    /// nothing.
    pub fn answered(
        &mut self,
        key: MeterKey,
        number: u64,
        answer: &Answer,
        now: Boot,
    ) -> Option<Answered> {
        let (index, meter) = self.meters.get_mut(key)?;
        meter
            .flight
            .filter(|Flight { operation, .. }| operation.number == number)?;
        let (operation, gained) = meter.answered(answer.granted, &self.pace, now)?;
        // Whatever came up meanwhile.
        self.make_due(index);
        Some(Answered {
            gained,
            short: gained < operation.need,
        })
    }
}
