//! Holds, in slots that are used again.

use hashbrown::HashTable;

use super::{
    meter::Boot,
    slots::{CHUNK, Slots},
};
use crate::model::{Ending, HoldId, Period, Tokens};

impl HoldId {
    fn new(slot: u32, generation: u32) -> Self {
        Self(u64::from(generation) << 32 | u64::from(slot))
    }

    fn slot(self) -> u32 {
        self.0 as u32
    }

    fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// What makes a repeated request the same: a hash of user and request id, 128 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestKey(pub u128);

impl RequestKey {
    /// The same request in a month: in another one it is another, charged to that.
    #[must_use]
    pub fn within(self, period: Period) -> Self {
        let month = period.start().timestamp().cast_unsigned();
        Self(self.0 ^ u128::from(month))
    }

    /// It is a hash already.
    fn hash(self) -> u32 {
        self.0 as u32
    }
}

/// A hold as its client is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub id: HoldId,
    pub tokens: Tokens,
    pub expires: Boot,
    /// The same request had it before.
    pub replay: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Live,
    /// Over, but a commit may have landed on another replica.
    Limbo(Ending),
    /// Over, as Postgres knows; only commits here may still charge it.
    Buried,
    /// Charged and gone, but for commits that are still under way.
    Over,
}

/// No meter.
pub(super) const NONE: u32 = u32::MAX;

#[derive(Debug)]
pub(super) struct Hold {
    pub(super) request: RequestKey,
    /// No lease covers it.
    pub(super) is_open: bool,
    pub(super) meters: [u32; 2],
    pub(super) tokens: Tokens,
    pub(super) expires: Boot,
    pub(super) state: State,
    /// Commits under way: while there are any, nothing else ends the hold.
    pub(super) commits: u32,
}

/// Holds by id, where a look-up is an index and a comparison, and by request.
#[derive(Debug, Default)]
pub(super) struct Holds {
    /// With the generation of the hold that is there, or was last.
    slots: Slots<(u32, Option<Hold>)>,
    empty: Vec<u32>,
    /// Of each chunk of slots: none of its live holds expires before.
    expires: Vec<Boot>,
    /// The slot of each request's hold, the latest one's.
    by_request: HashTable<Place>,
}

/// With the hash, so that to grow is to look at no hold.
#[derive(Clone, Copy, Debug)]
struct Place {
    hash: u32,
    slot: u32,
}

impl Place {
    fn is_of(self, request: RequestKey, slots: &Slots<(u32, Option<Hold>)>) -> bool {
        let is_same = |(_, hold): &(_, Option<Hold>)| {
            hold.as_ref().is_some_and(|hold| hold.request == request)
        };
        self.hash == request.hash() && slots.get(self.slot).is_some_and(is_same)
    }
}

/// Of a hash, what the table wants: it looks at the first bits and the last ones.
fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
}

impl Holds {
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.empty.len()
    }

    pub(super) fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    pub(super) fn chunks(&self) -> usize {
        self.expires.len()
    }

    /// Ends those of a chunk whose time is over, unless a commit of theirs is under way; says which.
    pub(super) fn expire(&mut self, chunk: usize, now: Boot) -> Vec<HoldId> {
        let mut expired = Vec::new();
        // Of those that a commit ends soon, most chunks are seldom looked into.
        if self.expires[chunk] > now {
            return expired;
        }
        let mut first = Boot(u64::MAX);
        for slot in (chunk * CHUNK) as u32..((chunk + 1) * CHUNK) as u32 {
            let Some((id, hold)) = self.at(slot) else {
                continue;
            };
            if hold.state != State::Live {
                continue;
            }
            if hold.expires <= now && hold.commits == 0 {
                hold.state = State::Limbo(Ending::Expired);
                expired.push(id);
            } else {
                first = first.min(hold.expires);
            }
        }
        self.expires[chunk] = first;
        expired
    }

    /// Forgets all holds and no generation: an id never comes again.
    pub(super) fn clear(&mut self) {
        self.empty.clear();
        self.by_request.clear();
        for (slot, (_, hold)) in (0..).zip(self.slots.iter_mut()) {
            *hold = None;
            self.empty.push(slot);
        }
    }

    /// Has the place of the next hold on its way from memory.
    pub(super) fn prefetch(&self) {
        let next = self.empty.last().copied();
        self.slots.prefetch(next.unwrap_or_else(|| self.slots()));
    }

    pub(super) fn insert(&mut self, hold: Hold) -> HoldId {
        let slot = self.empty.pop();
        let slot = slot.unwrap_or_else(|| self.slots.push((0, None)));
        let (generation, empty) = self.slots.get_mut(slot).expect("just found");
        debug_assert!(empty.is_none());
        *generation = generation.wrapping_add(1).max(1);
        let (request, expires) = (hold.request, hold.expires);
        *empty = Some(hold);
        let chunk = slot as usize / CHUNK;
        match self.expires.get_mut(chunk) {
            Some(first) => *first = expires.min(*first),
            None => self.expires.push(expires),
        }
        let id = HoldId::new(slot, *generation);
        let (hash, slots) = (request.hash(), &self.slots);
        let is_same = |place: &Place| place.is_of(request, slots);
        match self.by_request.find_mut(spread(hash), is_same) {
            Some(latest) => latest.slot = slot,
            None => {
                let place = Place { hash, slot };
                let hash_of = |place: &Place| spread(place.hash);
                self.by_request.insert_unique(spread(hash), place, hash_of);
            }
        }
        id
    }

    /// The latest hold of a request.
    pub(super) fn of_request(&mut self, request: RequestKey) -> Option<(HoldId, &mut Hold)> {
        let slots = &self.slots;
        let is_same = |place: &Place| place.is_of(request, slots);
        let place = *self.by_request.find(spread(request.hash()), is_same)?;
        self.at(place.slot)
    }

    /// The request has no hold any more, if this is its latest.
    pub(super) fn forget_request(&mut self, id: HoldId, request: RequestKey) {
        let is_latest = |place: &Place| place.slot == id.slot();
        let hash = spread(request.hash());
        if let Ok(entry) = self.by_request.find_entry(hash, is_latest) {
            entry.remove();
        }
    }

    pub(super) fn get_mut(&mut self, id: HoldId) -> Option<&mut Hold> {
        let (generation, hold) = self.slots.get_mut(id.slot())?;
        hold.as_mut().filter(|_| *generation == id.generation())
    }

    pub(super) fn remove(&mut self, id: HoldId) -> Option<Hold> {
        let request = self.get_mut(id)?.request;
        self.forget_request(id, request);
        self.empty.push(id.slot());
        self.slots.get_mut(id.slot())?.1.take()
    }

    /// The hold in a slot.
    pub(super) fn at(&mut self, slot: u32) -> Option<(HoldId, &mut Hold)> {
        let (generation, hold) = self.slots.get_mut(slot)?;
        let id = HoldId::new(slot, *generation);
        Some((id, hold.as_mut()?))
    }
}
