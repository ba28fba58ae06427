//! The meters of a book, in slots that are used again.

use std::hash::Hasher as _;

use hashbrown::HashTable;

use super::{
    hash::Mix,
    meter::{Meter, MeterKey, ModelKey},
    slots::Slots,
};
use crate::model::UserId;

/// Meters by index and by key.
#[derive(Debug, Default)]
pub(super) struct Meters {
    slots: Slots<Option<Meter>>,
    empty: Vec<u32>,
    /// Slots: what is looked up is looked at, so the key is not written down twice.
    by_key: HashTable<u32>,
}

impl Meters {
    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn slots(&self) -> u32 {
        self.slots.len() as u32
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Meter> {
        self.slots.iter().flatten()
    }

    pub(super) fn find(&self, key: MeterKey) -> Option<u32> {
        let is_same = |slot: &u32| self.at(*slot).is_some_and(|meter| meter.key == key);
        self.by_key.find(hash(key), is_same).copied()
    }

    /// Has what is looked at first of a user's total on its way from memory.
    pub(super) fn prefetch(&self, user: UserId) {
        for slot in self.by_key.iter_hash(hash_of(user, ModelKey::TOTAL)) {
            self.slots.prefetch(*slot);
        }
    }

    pub(super) fn get(&self, key: MeterKey) -> Option<&Meter> {
        self.at(self.find(key)?)
    }

    pub(super) fn get_mut(&mut self, key: MeterKey) -> Option<(u32, &mut Meter)> {
        let slot = self.find(key)?;
        Some((slot, self.at_mut(slot)?))
    }

    pub(super) fn at(&self, slot: u32) -> Option<&Meter> {
        self.slots.get(slot)?.as_ref()
    }

    pub(super) fn at_mut(&mut self, slot: u32) -> Option<&mut Meter> {
        self.slots.get_mut(slot)?.as_mut()
    }

    /// Of a key that has none.
    pub(super) fn insert(&mut self, meter: Meter) -> u32 {
        let key = meter.key;
        let slot = match self.empty.pop() {
            Some(slot) => {
                *self.slots.get_mut(slot).expect("it was used before") = Some(meter);
                slot
            }
            None => self.slots.push(Some(meter)),
        };
        let slots = &self.slots;
        let hash_of = |slot: &u32| {
            let meter = slots.get(*slot).and_then(Option::as_ref);
            meter.map_or(0, |meter| hash(meter.key))
        };
        self.by_key.insert_unique(hash(key), slot, hash_of);
        slot
    }

    pub(super) fn remove(&mut self, slot: u32) {
        let Some(meter) = self.slots.get_mut(slot).and_then(Option::take) else {
            return;
        };
        let found = self
            .by_key
            .find_entry(hash(meter.key), |other| *other == slot);
        if let Ok(entry) = found {
            entry.remove();
        }
        self.empty.push(slot);
    }
}

fn hash(key: MeterKey) -> u64 {
    hash_of(key.user, key.model)
}

/// Of a meter of any month: seldom has a user two.
fn hash_of(user: UserId, model: ModelKey) -> u64 {
    let mut state = Mix::default();
    state.write_u128(user.0.as_u128());
    state.write_u32(model.0);
    state.finish()
}
