//! Tells answers that a change has outdated from those that still hold.

use std::{
    hash::{BuildHasher as _, Hash, RandomState},
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

use prefetch_index::prefetch_index;

/// As many as a number of 16 bits names. More slots mean fewer answers outdated by the change of somebody
/// else.
const SLOTS: usize = 1 << u16::BITS;

/// One counter per group of keys; a change advances the counter of its group.
///
/// An answer remembers its counter as it was *before* the answer was read from the database. Equal
/// still means: no change has been heard of since. There is nothing to register, evict or leak, and
/// a change during the read is not missed.
pub(super) struct Stamps {
    slots: Box<[AtomicU64]>,
    /// Advanced when changes may have been missed.
    epoch: AtomicU32,
    hasher: RandomState,
}

/// A counter's value at some moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    value: u64,
    epoch: u32,
    slot: u16,
}

impl Stamp {
    /// Which stretch of unbroken hearing it is of.
    pub(super) fn epoch(self) -> u32 {
        self.epoch
    }
}

impl Stamps {
    pub(super) fn new() -> Self {
        Self {
            slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            epoch: AtomicU32::new(0),
            hasher: RandomState::new(),
        }
    }

    /// The counter of `key` now.
    pub(super) fn of(&self, key: impl Hash) -> Stamp {
        let slot = self.slot(key);
        Stamp {
            slot,
            value: self.slots[usize::from(slot)].load(Ordering::Acquire),
            epoch: self.epoch.load(Ordering::Acquire),
        }
    }

    /// Has the counter of `key` on its way from memory.
    pub(super) fn prefetch(&self, key: impl Hash) {
        prefetch_index(&self.slots, self.slot(key).into());
    }

    /// Whether no change of the key can have happened since, as far as is heard.
    pub(super) fn is_current(&self, stamp: Stamp) -> bool {
        self.epoch.load(Ordering::Acquire) == stamp.epoch && !self.is_contradicted(stamp)
    }

    /// Whether a change of the key was heard of since.
    pub(super) fn is_contradicted(&self, stamp: Stamp) -> bool {
        self.slots[usize::from(stamp.slot)].load(Ordering::Acquire) != stamp.value
    }

    /// Outdates every answer about `key`.
    pub(super) fn outdate(&self, key: impl Hash) {
        self.slots[usize::from(self.slot(key))].fetch_add(1, Ordering::AcqRel);
    }

    /// Makes every answer doubtful; returns the epoch that has ended.
    pub(super) fn doubt_all(&self) -> u32 {
        self.epoch.fetch_add(1, Ordering::AcqRel)
    }

    /// Outdates every answer there is.
    pub(super) fn outdate_all(&self) {
        for slot in &self.slots {
            slot.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn slot(&self, key: impl Hash) -> u16 {
        self.hasher.hash_one(key) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_outdates_its_key_and_a_flush_all() {
        let stamps = Stamps::new();
        let (a, before) = (stamps.of("a"), stamps.of("a"));
        stamps.outdate("a");
        assert!(!stamps.is_current(a) && !stamps.is_current(before));
        let after = stamps.of("a");
        assert!(stamps.is_current(after));
        stamps.outdate_all();
        assert!(!stamps.is_current(after));
    }

    #[test]
    fn doubt_is_no_contradiction() {
        let stamps = Stamps::new();
        let stamp = stamps.of("a");
        assert_eq!(stamps.doubt_all(), stamp.epoch());
        assert!(!stamps.is_current(stamp) && !stamps.is_contradicted(stamp));
        stamps.outdate("a");
        assert!(stamps.is_contradicted(stamp));
        assert!(stamps.is_current(stamps.of("a")));
    }
}
