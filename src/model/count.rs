//! Counters at which threads do not wait for each other.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// More threads share them.
const PLACES: usize = 8;

thread_local! {
    static PLACE: usize = {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        NEXT.fetch_add(1, Ordering::Relaxed) % PLACES
    };
}

/// One for each of a few threads. What two threads write in turn travels between their caches each time.
#[derive(Debug, Default)]
pub struct PerThread<T>([Apart<T>; PLACES]);

/// In lines of the cache of its own; processors fetch two at a time.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart<T>(T);

impl<T> PerThread<T> {
    /// That of this thread.
    pub fn here(&self) -> &T {
        &self.0[PLACE.with(|place| *place)].0
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|Apart(one)| one)
    }
}

/// Counts up from the start of the process, for whoever watches.
#[derive(Debug, Default)]
pub struct Count(PerThread<AtomicU64>);

impl Count {
    pub fn add_one(&self) {
        self.0.here().fetch_add(1, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.iter().map(|one| one.load(Ordering::Relaxed)).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn what_many_threads_count_at_once_is_all_there() {
        let count = Count::default();
        thread::scope(|scope| {
            for _ in 0..2 * PLACES {
                scope.spawn(|| (0..1000).for_each(|_| count.add_one()));
            }
        });
        assert_eq!(count.get(), 2000 * PLACES as u64);
    }
}
