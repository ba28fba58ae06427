//! What was looked up last, by id, where one look touches one place in memory.

use std::{
    array,
    hash::{BuildHasher, Hash, RandomState},
    sync::{Mutex, OnceLock, PoisonError},
};

use prefetch_index::prefetch_index;

/// Of as many ids as fit. In front of a map that knows more and forgets better: a map's hit follows a
/// chain of pointers, and among a hundred thousand ids each of them waits for memory.
pub(super) struct Recent<K, V> {
    /// An id belongs to one set. Two threads seldom want the same, so its lock is never waited for.
    chunks: Box<[OnceLock<Chunk<K, V>>]>,
    hasher: RandomState,
}

/// Made when one of its sets is needed: until then it takes no memory.
type Chunk<K, V> = Box<[Place<K, V>; CHUNK]>;

/// Begins with a line of the processor's cache, which holds what came last if that is small.
#[repr(align(64))]
struct Place<K, V>(Mutex<Set<K, V>>);

/// The one that came last is first, and the last one goes.
type Set<K, V> = [Option<(K, V)>; WAYS];

const CHUNK: usize = 64;
const WAYS: usize = 3;

impl<K: Copy + Eq + Hash, V: Clone> Recent<K, V> {
    const CHUNK_BYTES: u64 = size_of::<[Place<K, V>; CHUNK]>() as u64;

    /// Of about `bytes` at most.
    pub(super) fn new(bytes: u64) -> Self {
        let chunks = (bytes / Self::CHUNK_BYTES).max(1);
        Self {
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            hasher: RandomState::new(),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        let made = self.chunks.iter().filter(|chunk| chunk.get().is_some());
        made.count() as u64 * Self::CHUNK_BYTES
    }

    pub(super) fn bytes_limit(&self) -> u64 {
        self.chunks.len() as u64 * Self::CHUNK_BYTES
    }

    pub(super) fn get(&self, key: K) -> Option<V> {
        let (chunk, set) = self.place_of(key);
        let set = chunk.get()?[set].0.lock();
        let set = set.unwrap_or_else(PoisonError::into_inner);
        let mut found = set.iter().flatten();
        found
            .find(|(of, _)| *of == key)
            .map(|(_, value)| value.clone())
    }

    /// Has the place of an id on its way from memory.
    pub(super) fn prefetch(&self, key: K) {
        let (chunk, set) = self.place_of(key);
        if let Some(chunk) = chunk.get() {
            prefetch_index(&chunk[..], set);
        }
    }

    pub(super) fn insert(&self, key: K, value: V) {
        let (chunk, set) = self.place_of(key);
        let chunk = chunk.get_or_init(|| Box::new(array::from_fn(|_| Place(Mutex::default()))));
        let mut set = chunk[set].0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same = |entry: &Option<(K, V)>| entry.as_ref().is_some_and(|(of, _)| *of == key);
        let place = set.iter().position(is_same).unwrap_or(WAYS - 1);
        set[..=place].rotate_right(1);
        set[0] = Some((key, value));
    }

    fn place_of(&self, key: K) -> (&OnceLock<Chunk<K, V>>, usize) {
        let hash = self.hasher.hash_one(key);
        // The upper bits choose the chunk, without a division.
        let chunk = (u128::from(hash) * self.chunks.len() as u128) >> 64;
        (&self.chunks[chunk as usize], hash as usize % CHUNK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_full_set_what_came_first_is_forgotten() {
        let recent = Recent::new(0);
        let (_, set) = recent.place_of(0);
        let mut of_one_set = (0..).filter(|key| recent.place_of(*key).1 == set);
        let [a, b, c, d, e] = array::from_fn(|_| of_one_set.next().expect("there are many"));
        for key in [a, b, c, d] {
            recent.insert(key, key * 10);
        }
        let known = |keys: [u32; 4]| keys.map(|key| recent.get(key));
        assert_eq!(
            known([a, b, c, d]),
            [None, Some(b * 10), Some(c * 10), Some(d * 10)]
        );
        // Known already: in its place, with what is known now.
        recent.insert(b, 7);
        recent.insert(e, 8);
        assert_eq!(known([b, c, d, e]), [Some(7), None, Some(d * 10), Some(8)]);
    }
}
