//! How far the changes of other replicas are known here.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::{clock::BootTime, model::Revision};

/// Ended epochs that are remembered: a feed that breaks more often is no feed.
const EPOCHS: usize = 64;

/// Whether answers from memory may be given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Every change older than the staleness bound is known: answer from memory.
    Live,
    /// The feed has been silent for longer: ask the database.
    Stale,
    /// It has been silent for so long that memory must not be used, database or not.
    Lost,
}

/// Up to when changes are known, as heartbeats through the change feed prove it.
#[derive(Debug)]
pub struct Freshness {
    /// When the newest heartbeat that came back was sent; zero: none yet.
    confirmed: AtomicU64,
    /// Every change up to this revision is known; zero: none was heard of yet.
    known: AtomicU64,
    /// Epochs that have ended, with the newest heartbeat of each; the newest last.
    ended: Mutex<VecDeque<(u32, u64)>>,
    staleness_bound: Duration,
    max_stale: Duration,
}

impl Freshness {
    pub(super) fn new(staleness_bound: Duration, max_stale: Duration) -> Self {
        Self {
            confirmed: AtomicU64::new(0),
            known: AtomicU64::new(0),
            ended: Mutex::default(),
            staleness_bound,
            max_stale,
        }
    }

    pub fn staleness_bound(&self) -> Duration {
        self.staleness_bound
    }

    /// A heartbeat came back: what was committed up to `revision`, and so before it was sent, is known.
    pub(super) fn confirm(&self, revision: Revision, sent_at: BootTime) {
        self.known.fetch_max(revision.0, Ordering::AcqRel);
        self.confirmed.fetch_max(sent_at.0, Ordering::AcqRel);
    }

    /// Hearing was broken off: what is known of this epoch is as old as its newest heartbeat.
    ///
    /// Revisions begin anew: a standby that takes over may be behind them.
    pub(super) fn end_epoch(&self, epoch: u32) {
        self.known.store(0, Ordering::Release);
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.push_back((epoch, self.confirmed.load(Ordering::Acquire)));
        if ended.len() > EPOCHS {
            ended.pop_front();
        }
    }

    /// Whether an answer of `epoch` may still be given when the database cannot be asked.
    pub(super) fn lasts(&self, epoch: u32, now: BootTime) -> bool {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let known_until = match (ended.front(), ended.iter().find(|(of, _)| *of == epoch)) {
            (_, Some((_, confirmed))) => *confirmed,
            // Ended so long ago that it was forgotten.
            (Some((oldest, _)), None) if epoch < *oldest => return false,
            _ => self.confirmed.load(Ordering::Acquire),
        };
        known_until != 0 && now.since(BootTime(known_until)) <= self.max_stale
    }

    /// Every change up to here is known.
    pub fn known(&self) -> Revision {
        Revision(self.known.load(Ordering::Acquire))
    }

    pub fn trust(&self, now: BootTime) -> Trust {
        match self.silence(now) {
            Some(silence) if silence <= self.staleness_bound => Trust::Live,
            Some(silence) if silence <= self.max_stale => Trust::Stale,
            Some(_) | None => Trust::Lost,
        }
    }

    /// How long ago the newest heartbeat that came back was sent; `None` while none has.
    pub fn silence(&self, now: BootTime) -> Option<Duration> {
        match self.confirmed.load(Ordering::Acquire) {
            0 => None,
            confirmed => Some(now.since(BootTime(confirmed))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trust_fades_with_silence() {
        let freshness = Freshness::new(Duration::from_secs(2), Duration::from_secs(30));
        let at = |secs: u64| BootTime(1_000_000 * secs);
        assert_eq!(freshness.trust(at(1)), Trust::Lost);
        freshness.confirm(Revision(100), at(100));
        // Heartbeats may overtake each other; time does not run backwards.
        freshness.confirm(Revision(99), at(99));
        assert_eq!(freshness.known(), Revision(100));
        assert_eq!(freshness.trust(at(102)), Trust::Live);
        assert_eq!(freshness.trust(at(103)), Trust::Stale);
        assert_eq!(freshness.trust(at(131)), Trust::Lost);
        freshness.confirm(Revision(131), at(131));
        assert_eq!(freshness.trust(at(131)), Trust::Live);
    }

    #[test]
    fn what_was_heard_before_a_break_ages_from_its_own_last_heartbeat() {
        let freshness = Freshness::new(Duration::from_secs(2), Duration::from_secs(30));
        let at = |secs: u64| BootTime(1_000_000 * secs);
        assert!(!freshness.lasts(0, at(1)), "nothing was ever heard");
        freshness.confirm(Revision(100), at(100));
        freshness.end_epoch(0);
        assert_eq!(freshness.known(), Revision(0));
        freshness.confirm(Revision(120), at(120));
        assert!(freshness.lasts(0, at(130)) && freshness.lasts(1, at(150)));
        assert!(!freshness.lasts(0, at(131)) && !freshness.lasts(1, at(151)));
        for epoch in 1..=64 {
            freshness.end_epoch(epoch);
        }
        assert!(!freshness.lasts(0, at(130)), "forgotten");
        assert!(freshness.lasts(64, at(150)) && freshness.lasts(65, at(150)));
    }
}
