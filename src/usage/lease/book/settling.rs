//! How holds end: by a commit, a release, or what another replica did with them.

use super::{
    super::{
        hold::{NONE, State},
        meter::MeterKey,
    },
    Book,
};
use crate::model::{Ending, HoldId, Kind, Tokens};

/// What became of a commit, for certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The record is there; `new` when this commit made it.
    Booked { actual: Tokens, new: bool },
    /// It is not there, or another is, and will not be there of this commit.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// [`Book::end_commit`] must follow once the outcome is certain.
    Commit,
    Unknown,
}

/// How a commit, release or settlement met its hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The hold is over.
    Now,
    /// There is no such hold any more; if this charged something, it was late.
    Unknown,
    /// A commit is under way here: look again when it has ended.
    Later,
}

impl Book {
    /// A commit of the hold is going to be booked: nothing else ends the hold until its outcome is
    /// certain.
    pub fn begin_commit(&mut self, id: HoldId) -> Begun {
        match self.holds.get_mut(id) {
            Some(hold) => {
                hold.commits += 1;
                Begun::Commit
            }
            None => Begun::Unknown,
        }
    }

    /// The outcome of a commit that [`Book::begin_commit`] knew or did not know.
    ///
    /// `meters` are the handle's: what is charged without a hold is taken from what is free here, so
    /// that it overshoots by less.
    pub fn end_commit(&mut self, id: HoldId, meters: &[MeterKey], outcome: Outcome) -> Ended {
        let Some(hold) = self.holds.get_mut(id) else {
            if let Outcome::Booked { actual, new: true } = outcome {
                self.charge_free(meters, actual);
            }
            return Ended::Unknown;
        };
        debug_assert!(hold.commits > 0);
        hold.commits -= 1;
        if hold.state == State::Over {
            if hold.commits == 0 {
                self.holds.remove(id);
            }
            return Ended::Now;
        }
        match outcome {
            Outcome::Booked { actual, .. } => {
                self.end(id, actual);
                Ended::Now
            }
            Outcome::Refused if hold.state == State::Buried && hold.commits == 0 => {
                self.end(id, 0);
                Ended::Now
            }
            Outcome::Refused => {
                // A tombstone may have met the settlement of a commit while this one was under way.
                if hold.commits == 0 && matches!(hold.state, State::Limbo(_)) {
                    self.limbo.push_back(id);
                }
                Ended::Later
            }
        }
    }

    /// Releases a hold: its tokens are free once the tombstone is in Postgres, because a commit may
    /// have landed on another replica.
    pub fn release(&mut self, id: HoldId) -> Ended {
        let Some(hold) = self.holds.get_mut(id) else {
            return Ended::Unknown;
        };
        if hold.state == State::Over {
            return Ended::Unknown;
        }
        if hold.commits > 0 {
            return Ended::Later;
        }
        if hold.state == State::Live {
            hold.state = State::Limbo(Ending::Released);
            self.limbo.push_back(id);
        }
        Ended::Now
    }

    /// Tombstones to insert. Each must come back by [`Book::settled`], with the kind that Postgres
    /// has, or by [`Book::tombstone_lost`].
    pub fn tombstones(&mut self, max: usize) -> Vec<(HoldId, Ending)> {
        let mut all = Vec::new();
        while all.len() < max
            && let Some(id) = self.limbo.pop_front()
        {
            if let Some(hold) = self.holds.get_mut(id)
                && let State::Limbo(ending) = hold.state
            {
                all.push((id, ending));
            }
        }
        all
    }

    /// Nobody knows whether the tombstone is there: it is to be inserted again.
    pub fn tombstone_lost(&mut self, id: HoldId) {
        self.limbo.push_back(id);
    }

    /// How a hold ended, read from Postgres in a statement that saw it committed. After
    /// [`Ended::Now`] and [`Ended::Unknown`] the row is of no more use.
    pub fn settled(&mut self, id: HoldId, kind: Kind) -> Ended {
        let Some(hold) = self.holds.get_mut(id) else {
            return Ended::Unknown;
        };
        match kind {
            _ if hold.state == State::Over => return Ended::Unknown,
            // The commit under way here, or one before it whose answer was lost, may be what made the
            // record; it will say for certain how much.
            Kind::Committed(_) if hold.commits > 0 => return Ended::Later,
            Kind::Committed(actual) => self.end(id, actual),
            // Expired is what this replica said itself, of a hold in limbo.
            Kind::Ended(Ending::Expired) if hold.state == State::Live => return Ended::Unknown,
            Kind::Ended(_) if hold.commits > 0 => hold.state = State::Buried,
            Kind::Ended(_) => self.end(id, 0),
        }
        Ended::Now
    }

    /// A hold is over; `actual` of it is booked.
    ///
    /// Kept while more of its commits are under way: the one that made the record may be answered
    /// after one that found it, and must not count as late.
    fn end(&mut self, id: HoldId, actual: Tokens) {
        let Some(hold) = self.holds.get_mut(id) else {
            return;
        };
        let (tokens, request) = (hold.tokens, hold.request);
        let meters = std::mem::replace(&mut hold.meters, [NONE; 2]);
        if std::mem::take(&mut hold.is_open) {
            self.open_holds -= 1;
        }
        if hold.commits > 0 {
            hold.state = State::Over;
            self.holds.forget_request(id, request);
        } else {
            self.holds.remove(id);
        }
        for index in meters.into_iter().filter(|index| *index != NONE) {
            let meter = self.meters.at_mut(index);
            meter
                .expect("a meter with holds is kept")
                .end_hold(tokens, actual);
        }
    }

    /// Takes what was used without a hold from what is free.
    pub fn charge_free(&mut self, meters: &[MeterKey], actual: Tokens) {
        for key in meters {
            if let Some((_, meter)) = self.meters.get_mut(*key) {
                meter.spend(actual);
            }
        }
    }
}
