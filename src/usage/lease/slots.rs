//! A sequence that grows without moving what is in it.

use prefetch_index::prefetch_index;

/// In chunks: a vector that doubles would copy all of it, while its shard is locked, and touch twice the
/// memory.
#[derive(Debug)]
pub(super) struct Slots<T>(Vec<Vec<T>>);

pub(super) const CHUNK: usize = 256;

impl<T> Slots<T> {
    pub(super) fn len(&self) -> usize {
        let last = self.0.last().map_or(0, Vec::len);
        self.0.len().saturating_sub(1) * CHUNK + last
    }

    pub(super) fn get(&self, index: u32) -> Option<&T> {
        let index = index as usize;
        self.0.get(index / CHUNK)?.get(index % CHUNK)
    }

    /// Has an item on its way from memory: one that is there, or is pushed next.
    pub(super) fn prefetch(&self, index: u32) {
        let index = index as usize;
        if let Some(chunk) = self.0.get(index / CHUNK) {
            prefetch_index(chunk, index % CHUNK);
        }
    }

    pub(super) fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        let index = index as usize;
        self.0.get_mut(index / CHUNK)?.get_mut(index % CHUNK)
    }

    /// Answers its index.
    pub(super) fn push(&mut self, item: T) -> u32 {
        let index = u32::try_from(self.len()).expect("bounded far below");
        match self.0.last_mut().filter(|last| last.len() < CHUNK) {
            Some(last) => last.push(item),
            None => {
                let mut chunk = Vec::with_capacity(CHUNK);
                chunk.push(item);
                self.0.push(chunk);
            }
        }
        index
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().flatten()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().flatten()
    }
}

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_pushed_is_found_at_its_index() {
        let mut slots = Slots::default();
        for number in 0..1_000 {
            assert_eq!((slots.len(), slots.push(number)), (number as usize, number));
        }
        assert!((0..1_000).all(|number| slots.get(number) == Some(&number)));
        assert_eq!(slots.get(1_000), None);
        *slots.get_mut(700).expect("it is there") = 0;
        assert_eq!(slots.iter().sum::<u32>(), 999 * 500 - 700);
    }
}
