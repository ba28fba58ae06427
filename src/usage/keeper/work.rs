//! What runs beside the calls: heartbeats, operations, tombstones, settlements, recalls, reaping.

use std::{sync::atomic::Ordering, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tracing::{error, info, warn};

use super::{
    Inner, Keeper, SHARDS, boot,
    shard::{inward, outward},
};
use crate::{
    error::{Error, Result},
    model::{Ending, HoldId, Kind, MeterName, Operation, ReplicaId},
    usage::lease::{Ended, MeterKey},
};

/// Between looks at a tenth of what may have expired or lie idle.
const SWEEP: Duration = Duration::from_millis(100);

/// Operations of a transaction.
const BATCH: usize = 500;
const SETTLEMENTS: i64 = 2_000;
const REAP_BATCH: i64 = 500;

/// After something failed.
const RETRY: Duration = Duration::from_millis(100);

/// Between clearings of what nobody needs any more.
const FORGET: Duration = Duration::from_mins(10);

impl Keeper {
    /// Keeps the leases; runs until dropped.
    pub async fn run(self) {
        let inner = &*self.0;
        loop {
            // A name is never used again: what was sent under an earlier one is nobody's.
            let id = ReplicaId::new();
            let registered = inner.store.replica_register(id, inner.settings.ttl).await;
            if let Err(error) = registered {
                warn!(
                    error = error.with_causes(),
                    "this replica cannot be registered"
                );
                sleep(RETRY).await;
                continue;
            }
            for shard in &inner.shards {
                shard.lock().rejoin(id);
            }
            tokio::select! {
                () = inner.heartbeats(id) => {}
                () = inner.operations(id) => {}
                () = inner.recalls(id) => {}
                () = inner.reap() => {}
            }
            error!("this replica was taken for dead: it begins anew, without leases");
        }
    }

    /// Gives all back that is free, while [`Keeper::run`] runs; for the end, when nothing is reserved
    /// any more.
    pub async fn give_back(&self, deadline: Duration) {
        let inner = &*self.0;
        let until = Instant::now() + deadline;
        loop {
            let now = boot();
            let (mut free, mut is_told) = (0, true);
            for shard in &inner.shards {
                let mut shard = shard.lock();
                free += shard.recall_all(now);
                // What is released is free only later, and what is under way may still be lost.
                is_told &= shard.book.is_told();
            }
            if free == 0 && is_told {
                return;
            }
            // While the database is silent nothing can be given to it.
            let is_hopeless = self.is_fenced();
            if is_hopeless || Instant::now() >= until {
                warn!(
                    free,
                    "tokens were not given back for certain: others may wait for the quarantine"
                );
                return;
            }
            inner.due.notify_one();
            sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Inner {
    /// Until this replica is dead.
    async fn heartbeats(&self, id: ReplicaId) {
        loop {
            match timeout(self.settings.ttl, self.heartbeat(id)).await {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => return,
                Ok(Err(error)) => warn!(
                    error = error.with_causes(),
                    "a heartbeat of the quota was not answered"
                ),
                Err(_) => warn!("a heartbeat of the quota was not answered in time"),
            }
            let _ = timeout(self.settings.heartbeat, self.beat.notified()).await;
        }
    }

    async fn heartbeat(&self, id: ReplicaId) -> Result<bool> {
        let mut registration = self.shards[0].lock().registration;
        registration.want_until(self.wanted());
        // The clock before it is sent.
        let beat = registration.heartbeat(boot());
        let ttl = Duration::from_millis(beat.ttl_ms);
        let holds = Duration::from_millis(beat.holds_ms);
        let Some(heard) = self.store.replica_heartbeat(id, ttl, holds).await? else {
            return Ok(false);
        };
        let now = boot();
        for shard in &self.shards {
            shard.lock().heard(&beat, &heard, now);
        }
        self.answered.notify_waiters();
        self.settlements(id).await?;
        Ok(true)
    }

    async fn settlements(&self, id: ReplicaId) -> Result<()> {
        let mut after = None;
        loop {
            let page = self.store.settlement_list(id, after, SETTLEMENTS).await?;
            let Some((last, _)) = page.last() else {
                return Ok(());
            };
            after = Some(*last);
            self.settled(id, &page).await?;
        }
    }

    /// Rows that tell nothing more are deleted.
    async fn settled(&self, id: ReplicaId, all: &[(HoldId, Kind)]) -> Result<()> {
        let over = |(name, kind): &(HoldId, Kind)| {
            let (shard, hold) = inward(*name);
            let ended = self.shards[shard].lock().book.settled(hold, *kind);
            (ended != Ended::Later).then_some(*name)
        };
        let over: Vec<HoldId> = all.iter().filter_map(over).collect();
        if over.is_empty() {
            return Ok(());
        }
        self.answered.notify_waiters();
        self.store.settlement_delete(id, &over).await
    }

    async fn operations(&self, id: ReplicaId) {
        let mut sweeps = interval(SWEEP);
        sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.due.notified() => {}
                _ = sweeps.tick() => {
                    let now = boot();
                    let mut meters = 0;
                    for shard in &self.shards {
                        let mut shard = shard.lock();
                        shard.sweep(now);
                        meters += shard.book.meters();
                    }
                    self.is_in_use.store(meters > 0, Ordering::Relaxed);
                }
            }
            let Some(sent) = self.send(id).await else {
                continue;
            };
            // There may be more. Through the select: a server that always has something to send would
            // never look at what has expired.
            self.due.notify_one();
            if let Err(error) = sent {
                warn!(
                    error = error.with_causes(),
                    "leases could not be changed, to be tried again"
                );
                sleep(RETRY).await;
            }
        }
    }

    /// Sends what is due, some of it; `None`: there was nothing.
    async fn send(&self, id: ReplicaId) -> Option<Result<()>> {
        let now = boot();
        let (mut operations, mut tombstones) = (Vec::new(), Vec::new());
        // Each in its turn: what comes up in one again and again keeps none of the others waiting.
        let first = self.first.fetch_add(1, Ordering::Relaxed);
        for step in 0..SHARDS {
            let index = (first + step) % SHARDS;
            let mut shard = self.shards[index].lock();
            operations.extend(shard.book.operations(now, BATCH - operations.len()));
            let ended = shard.book.tombstones(BATCH - tombstones.len());
            let ended = ended.into_iter();
            tombstones.extend(ended.map(|(hold, ending)| (outward(index, hold), ending)));
        }
        if operations.is_empty() && tombstones.is_empty() {
            return None;
        }
        let (operated, buried) =
            tokio::join!(self.operate(id, &operations), self.bury(id, &tombstones));
        self.answered.notify_waiters();
        Some(operated.and(buried))
    }

    /// What cannot be carried out, of a user whose rows cannot be read, is parted from the others.
    async fn operate(&self, id: ReplicaId, all: &[(MeterKey, Operation)]) -> Result<()> {
        let (mut parts, mut outcome) = (vec![all], Ok(()));
        while let Some(part) = parts.pop() {
            match self.operate_together(id, part).await {
                Ok(()) => {}
                Err(Error::Internal(_)) if part.len() > 1 => {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
                Err(error) => {
                    self.lost(part);
                    outcome = Err(error);
                }
            }
        }
        outcome
    }

    fn lost(&self, all: &[(MeterKey, Operation)]) {
        for (key, operation) in all {
            let mut shard = self.shard_of(key.user).lock();
            shard.book.operation_lost(*key, operation.number);
        }
        // A heartbeat tells whether it is dead or only late.
        self.beat.notify_one();
    }

    /// All of them or none.
    async fn operate_together(&self, id: ReplicaId, all: &[(MeterKey, Operation)]) -> Result<()> {
        if all.is_empty() {
            return Ok(());
        }
        let named: Vec<(MeterName, Operation)> = all
            .iter()
            .map(|(key, operation)| (self.models.name_of(*key), *operation))
            .collect();
        let tiers = self.tiers.load_full();
        let operated = self.store.lease_operations(id, &named, &tiers).await?;
        let not_alive = || Error::Unavailable("this replica is not alive".into());
        let now = boot();
        for ((key, operation), operated) in all.iter().zip(operated.ok_or_else(not_alive)?) {
            let mut shard = self.shard_of(key.user).lock();
            shard.answered(*key, operation, &operated, now);
        }
        Ok(())
    }

    async fn bury(&self, id: ReplicaId, all: &[(HoldId, Ending)]) -> Result<()> {
        if all.is_empty() {
            return Ok(());
        }
        match self.store.settlement_tombstones(id, all).await {
            // A row that is not deleted is deleted after a heartbeat.
            Ok(kinds) => self.settled(id, &kinds).await,
            Err(error) => {
                for (name, _) in all {
                    let (shard, hold) = inward(*name);
                    self.shards[shard].lock().book.tombstone_lost(hold);
                }
                Err(error)
            }
        }
    }

    /// Gives back what others need.
    async fn recalls(&self, id: ReplicaId) {
        // Said once: in an outage others have more to say.
        let mut is_said = false;
        loop {
            match self.store.recalls(id).await {
                Ok(mut listener) => {
                    is_said = false;
                    let error = loop {
                        match listener.next().await {
                            Ok(meter) => {
                                let Some(key) = self.models.key_of(&meter) else {
                                    continue;
                                };
                                let mut shard = self.shard_of(key.user).lock();
                                shard.book.recall(key, boot());
                                drop(shard);
                                self.due.notify_one();
                                // What others have settled is read with a heartbeat.
                                self.beat.notify_one();
                            }
                            Err(error) => break error,
                        }
                    };
                    warn!(error = error.with_causes(), "recalls are not heard");
                }
                Err(_) if is_said => {}
                Err(error) => {
                    is_said = true;
                    warn!(error = error.with_causes(), "recalls cannot be listened to");
                }
            }
            sleep(RETRY).await;
        }
    }

    async fn reap(&self) {
        let mut forgotten = Instant::now();
        loop {
            sleep(self.settings.heartbeat).await;
            match self
                .store
                .replica_reap(self.settings.margin, REAP_BATCH)
                .await
            {
                Ok(0) => {}
                Ok(replicas) => info!(replicas, "leases of replicas that are gone came back"),
                Err(error) => warn!(
                    error = error.with_causes(),
                    "leases of the dead stay, to be tried again"
                ),
            }
            if forgotten.elapsed() >= FORGET {
                forgotten = Instant::now();
                if let Err(error) = self.store.lease_sweep(REAP_BATCH).await {
                    warn!(
                        error = error.with_causes(),
                        "leases that are empty stay, to be tried again"
                    );
                }
            }
        }
    }
}
