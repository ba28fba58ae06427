//! When API keys were last used: noted in memory by every use, written now and then.

use std::{
    collections::BTreeMap,
    mem,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
};

use chrono::{DateTime, Utc};

use crate::model::ApiKeyId;

/// Uses within so many microseconds of each other are one: a busy key is not written to by every
/// call on every core.
const GRAIN_MICROS: i64 = 1_000_000;

/// The newest use of a key. Beside what is known of the key, so that noting one finds it at hand.
#[derive(Debug, Default)]
pub(super) struct LastUse {
    /// Microseconds since 1970; 0: none.
    at: AtomicI64,
    /// Whether it waits to be written.
    is_pending: AtomicBool,
}

/// The uses that wait to be written.
#[derive(Debug, Default)]
pub(super) struct ApiKeyUses {
    pending: Mutex<Vec<(ApiKeyId, Arc<LastUse>)>>,
    /// Collected, and not known to be written: of the keys used since writing last succeeded.
    unwritten: Mutex<BTreeMap<ApiKeyId, DateTime<Utc>>>,
}

impl ApiKeyUses {
    /// Notes that a key was used. Costs one look at a number, but once a second and key.
    pub(super) fn note(&self, id: ApiKeyId, last_use: &Arc<LastUse>, now: DateTime<Utc>) {
        let at = now.timestamp_micros();
        if at - last_use.at.load(Ordering::Relaxed) < GRAIN_MICROS {
            return;
        }
        last_use.at.fetch_max(at, Ordering::Relaxed);
        if !last_use.is_pending.swap(true, Ordering::AcqRel) {
            lock(&self.pending).push((id, last_use.clone()));
        }
    }

    /// What waits to be written, one time for each key; it goes on waiting until it is settled.
    pub(super) fn unwritten(&self) -> Vec<(ApiKeyId, DateTime<Utc>)> {
        let mut unwritten = lock(&self.unwritten);
        let pending = mem::take(&mut *lock(&self.pending));
        for (id, last_use) in pending {
            // First: a use from here on waits anew.
            last_use.is_pending.swap(false, Ordering::AcqRel);
            let at = last_use.at.load(Ordering::Relaxed);
            if let Some(at) = DateTime::from_timestamp_micros(at) {
                // A key that was read twice since has two records.
                let newest = unwritten.entry(id).or_insert(at);
                *newest = (*newest).max(at);
            }
        }
        unwritten.iter().map(|(id, at)| (*id, *at)).collect()
    }

    /// These have been written.
    pub(super) fn settle(&self, written: &[(ApiKeyId, DateTime<Utc>)]) {
        let mut unwritten = lock(&self.unwritten);
        for (id, at) in written {
            // Unless a newer use was collected meanwhile.
            if unwritten.get(id).is_some_and(|newest| newest <= at) {
                unwritten.remove(id);
            }
        }
    }
}

/// Nothing here can be left half done by a panic.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;

    fn at(secs: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).expect("a time") + TimeDelta::seconds(secs)
    }

    #[test]
    fn the_newest_use_waits_until_it_is_written() {
        let (uses, id, last) = (ApiKeyUses::default(), ApiKeyId::new(), Arc::default());
        for secs in [0, 5, 3] {
            uses.note(id, &last, at(secs));
        }
        let reread = Arc::default();
        uses.note(id, &reread, at(4));
        assert_eq!(uses.unwritten(), [(id, at(5))]);
        assert_eq!(uses.unwritten(), [(id, at(5))], "it was not written");
        uses.settle(&[(id, at(5))]);
        assert_eq!(uses.unwritten(), []);
        uses.note(id, &last, at(5) + TimeDelta::milliseconds(999));
        assert_eq!(uses.unwritten(), [], "within a second of the one before");
        uses.note(id, &last, at(6));
        let written = uses.unwritten();
        assert_eq!(written, [(id, at(6))]);
        uses.note(id, &last, at(8));
        assert_eq!(uses.unwritten(), [(id, at(8))]);
        uses.settle(&written);
        assert_eq!(uses.unwritten(), [(id, at(8))], "used while it was written");
    }

    #[test]
    fn no_use_is_lost_while_others_are_collected() {
        let (uses, id, last) = (ApiKeyUses::default(), ApiKeyId::new(), Arc::default());
        std::thread::scope(|scope| {
            let noting = scope.spawn(|| {
                for secs in 1..=20_000 {
                    uses.note(id, &last, at(secs));
                }
            });
            let mut newest = at(0);
            loop {
                let is_last = noting.is_finished();
                let unwritten = uses.unwritten();
                newest = unwritten
                    .iter()
                    .fold(newest, |newest, (_, at)| newest.max(*at));
                uses.settle(&unwritten);
                if is_last {
                    break;
                }
            }
            assert_eq!(newest, at(20_000));
        });
    }
}
