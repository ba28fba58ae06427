//! Keeps the leases of this replica: the books, the heartbeat, and what is asked of Postgres for them.
//!
//! What is decided, [`super::lease`] decides; this is when it is asked and what is done with the answer.

mod admission;
mod models;
mod shard;
mod work;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use chrono::{DateTime, Utc};
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use super::lease::{
    Begun, Boot, Bounds, Ended, Held, HoldId, Lasting, MeterKey, Mode, ModelKey, Outcome, Pace,
    Refusal, RequestKey, Tokens,
};
use crate::{
    clock::BootTime,
    config::QuotaSettings,
    error::{Error, Result},
    model::{
        HoldName, MeterName, ModelName, Period, ReplicaId, TierLimits, Tiers, UsageEvent, UserId,
    },
    store::Store,
};
use models::Models;
pub use shard::Standing;
use shard::{Shard, inward, outward};

/// How the leases of a replica are kept.
#[derive(Clone, Copy, Debug)]
pub struct KeeperSettings {
    /// A replica that is not heard of for so long admits nothing from its leases.
    pub ttl: Duration,
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// Holds up to this long need no heartbeat of their own.
    pub hold: Duration,
    /// Beyond `ttl` and the longest hold, before the leases of the dead go to others.
    pub margin: Duration,
    /// So long others are asked for what they do not use before anybody is denied.
    pub recall_bound: Duration,
    pub pace: Pace,
    pub bounds: Bounds,
}

impl From<&QuotaSettings> for KeeperSettings {
    fn from(settings: &QuotaSettings) -> Self {
        Self {
            ttl: settings.replica_ttl,
            heartbeat: settings.replica_ttl / 5,
            hold: settings.hold_horizon,
            margin: settings.replica_ttl / 10,
            recall_bound: settings.recall_bound,
            pace: Pace::default(),
            bounds: Bounds::default(),
        }
    }
}

/// A wish for tokens of a user.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    pub user_id: UserId,
    /// Of the user's tier.
    pub limits: &'a TierLimits,
    /// `None`: whatever is used, only the total limits it.
    pub model: Option<&'a ModelName>,
    pub request: RequestKey,
    pub tokens: Tokens,
    pub mode: Mode,
    pub lasts: Duration,
    /// Counts as one of the requests a minute, if something is held.
    pub is_request: bool,
}

/// A hold, as a handle describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    pub owner: ReplicaId,
    pub held: Held,
    /// By the clock of the database, about.
    pub created_at: DateTime<Utc>,
    pub expires_at: DateTime<Utc>,
    /// How the total stands with it; `None`: no lease covers it, the database is silent.
    pub total: Option<Standing>,
}

/// What became of a wish.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reservation {
    Held(Holding),
    /// To a look: it could be held, now, in this month. `None`: by the tier's policy, while the database
    /// is silent.
    Enough(Option<(Period, Standing)>),
    /// Nobody has enough free: of these meters.
    Denied(Vec<(MeterName, Standing)>),
    /// Too many requests a minute.
    RateLimited(Duration),
    Refused(Refusal),
}

/// A part of all users, each under a lock of its own: those who serve seldom meet.
const SHARDS: usize = 1 << shard::SHARD_BITS;

/// A horizon that is asked for lies so far beyond what is needed: the answer takes a while.
const AHEAD_MS: u64 = 1_000;

/// The leases of this replica. Cheap to clone; [`Keeper::run`] does the work.
#[derive(Clone)]
pub struct Keeper(Arc<Inner>);

struct Inner {
    store: Store,
    tiers: Arc<ArcSwap<Tiers>>,
    settings: KeeperSettings,
    shards: Box<[Locked]>,
    models: Models,
    /// Something may be leased.
    is_in_use: AtomicBool,
    /// The shard that is looked at first for what to send.
    first: AtomicUsize,
    /// There are operations or tombstones to send.
    due: Notify,
    /// A hold needs a longer horizon, up to this reading of the clock.
    wanted_until: AtomicU64,
    beat: Notify,
    /// Something was answered: whoever waits may look again.
    answered: Notify,
    /// When others were asked for what they have of a meter.
    recalled: Mutex<HashMap<MeterKey, Boot>>,
}

impl Keeper {
    /// Admits nothing before [`Keeper::run`] has been heard by Postgres.
    pub fn new(store: Store, tiers: Arc<ArcSwap<Tiers>>, settings: KeeperSettings) -> Self {
        let bounds = Bounds {
            holds: settings.bounds.holds.div_ceil(SHARDS),
            meters: settings.bounds.meters.div_ceil(SHARDS),
            allowances: settings.bounds.allowances.div_ceil(SHARDS),
            ..settings.bounds
        };
        let nobody = ReplicaId::new();
        let shard = || Shard::new(nobody, bounds, settings.pace, lasting(&settings));
        let shard = || Locked(Mutex::new(shard()));
        Self(Arc::new(Inner {
            store,
            tiers,
            settings,
            shards: (0..SHARDS).map(|_| shard()).collect(),
            models: Models::default(),
            is_in_use: AtomicBool::new(false),
            first: AtomicUsize::new(0),
            due: Notify::new(),
            wanted_until: AtomicU64::new(0),
            beat: Notify::new(),
            answered: Notify::new(),
            recalled: Mutex::default(),
        }))
    }

    /// Waits until Postgres has been heard of: before, nothing is admitted.
    pub async fn heard(&self) {
        loop {
            let answered = self.0.answered.notified();
            if !self.is_fenced() {
                return;
            }
            answered.await;
        }
    }

    /// Whether Postgres has not been heard of in time: what is not held already is admitted by the
    /// tier's policy alone.
    pub fn is_fenced(&self) -> bool {
        self.0.shards[0].lock().admission(boot()).is_fenced()
    }

    /// Whether a hold is of a lease of this replica, under its present name.
    pub fn is_owner(&self, owner: ReplicaId) -> bool {
        self.0.shards[0].lock().owner == owner
    }

    /// Has what a reservation of a user begins with on its way from memory.
    pub fn prefetch(&self, user: UserId) {
        // Whoever would have to wait has nothing to gain.
        if let Ok(shard) = self.0.shard_of(user).0.try_lock() {
            shard.book.prefetch(user);
        }
    }

    /// What limits a user has changed: what is free of it goes back, and is asked for anew.
    pub fn limits_changed(&self, user: UserId) {
        let now = boot();
        self.0.shard_of(user).lock().outdate(Some(user), now);
        self.0.due.notify_one();
    }

    /// [`Keeper::limits_changed`] for everybody.
    pub fn all_limits_changed(&self) {
        let now = boot();
        for shard in &self.0.shards {
            shard.lock().outdate(None, now);
        }
        self.0.due.notify_one();
    }

    /// Keeps a live hold of this replica for longer; answers until when.
    ///
    /// # Errors
    /// `ReservationEnded`: there is no live hold here · `Unavailable` when Postgres was not told in time
    /// that there is one for so long
    pub async fn extend(&self, name: HoldName, lasts: Duration) -> Result<DateTime<Utc>> {
        let inner = &*self.0;
        let until = Instant::now() + inner.settings.recall_bound;
        loop {
            let answered = inner.answered.notified();
            tokio::pin!(answered);
            answered.as_mut().enable();
            match self.extend_at_once(name, lasts) {
                Ok(expires_at) => return Ok(expires_at),
                Err(None) => return Err(Error::ReservationEnded),
                Err(Some(_)) if Instant::now() >= until => {
                    let silence = "the database was not told in time of a longer hold";
                    return Err(Error::Unavailable(silence.into()));
                }
                Err(Some(_)) => {
                    let _ = timeout_at(until, answered).await;
                }
            }
        }
    }

    /// As [`Keeper::extend`].
    ///
    /// # Errors
    /// `None`: there is no live hold here · `BeyondHorizon`, which a heartbeat that is now on its way
    /// may mend
    fn extend_at_once(
        &self,
        name: HoldName,
        lasts: Duration,
    ) -> Result<DateTime<Utc>, Option<Refusal>> {
        let (mut shard, hold) = self.0.own(name).ok_or(None)?;
        let now = boot();
        let standing = shard.admission(now);
        let extended = shard.book.extend(hold, millis(lasts), &standing);
        if extended == Err(Some(Refusal::BeyondHorizon)) {
            self.0.want_until(now.plus(millis(lasts) + AHEAD_MS));
        }
        shard.time_at(extended?).ok_or(None)
    }

    /// Releases a hold of this replica. Its tokens are free once Postgres knows.
    pub fn release(&self, name: HoldName) -> Ended {
        let Some((mut shard, hold)) = self.0.own(name) else {
            return Ended::Unknown;
        };
        let ended = shard.book.release(hold);
        drop(shard);
        self.0.due.notify_one();
        ended
    }

    /// The live hold of a request within a month, and its tokens; `None`: this replica has none.
    pub(super) fn hold_of(&self, user: UserId, request: RequestKey) -> Option<(HoldName, Tokens)> {
        let index = self.0.index_of(user);
        let mut shard = self.0.shards[index].lock();
        let held = shard.book.held(request, boot())?;
        let name = HoldName {
            owner: shard.owner,
            hold: outward(index, held.id),
        };
        Some((name, held.tokens))
    }

    /// A commit of a hold of this replica is going to be booked; [`Keeper::end_commit`] must follow
    /// when its outcome is certain.
    pub fn begin_commit(&self, name: HoldName) -> Begun {
        match self.0.own(name) {
            Some((mut shard, hold)) => shard.book.begin_commit(hold),
            None => Begun::Unknown,
        }
    }

    /// What became of a commit that [`Keeper::begin_commit`] was told of.
    pub fn end_commit(&self, name: HoldName, meters: &[MeterName], outcome: Outcome) -> Ended {
        let key_of = |meter| self.0.models.key_of(meter);
        let keys: Vec<MeterKey> = meters.iter().filter_map(key_of).collect();
        match self.0.own(name) {
            Some((mut shard, hold)) => shard.book.end_commit(hold, &keys, outcome),
            None => Ended::Unknown,
        }
    }

    /// What events that nothing was reserved for will take from what is free here, once they are
    /// booked. Empty while nothing is leased.
    pub(super) fn charges_of(&self, events: &[UsageEvent]) -> Vec<Charge> {
        if !self.0.is_in_use.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let charge = |event: &UsageEvent| {
            let key = |model| MeterKey {
                user: event.user_id,
                period: event.period(),
                model,
            };
            let model = self.0.models.known(&event.model);
            Charge {
                meters: [key(ModelKey::TOTAL), key(model.unwrap_or(ModelKey::TOTAL))],
                of_model: model.is_some(),
                tokens: event.tokens.total(),
            }
        };
        events.iter().map(charge).collect()
    }

    /// Takes what was booked without a hold from what is free here: it is used, whoever asks next.
    pub(super) fn charge(&self, charge: &Charge) {
        let meters = &charge.meters[..if charge.of_model { 2 } else { 1 }];
        let mut shard = self.0.shard_of(meters[0].user).lock();
        shard.book.charge_free(meters, charge.tokens);
    }

    /// The time of the database, about; `None` before it was heard of.
    pub fn now(&self) -> Option<DateTime<Utc>> {
        self.0.shards[0].lock().time_at(boot())
    }

    /// What is known here of a meter; `None`: this replica has no lease on it.
    pub fn standing(&self, meter: &MeterName) -> Option<Standing> {
        let key = self.0.models.key_of(meter)?;
        self.0.shard_of(meter.user_id).lock().standing(key)
    }
}

/// Tokens that were used without a hold.
pub(super) struct Charge {
    meters: [MeterKey; 2],
    /// The second one counts.
    of_model: bool,
    tokens: Tokens,
}

impl Inner {
    fn want_until(&self, until: Boot) {
        self.wanted_until.fetch_max(until.0, Ordering::AcqRel);
        self.beat.notify_one();
    }

    fn wanted(&self) -> Boot {
        Boot(self.wanted_until.load(Ordering::Acquire))
    }

    fn index_of(&self, user: UserId) -> usize {
        // The end of an id is random.
        (user.0.as_u128() % SHARDS as u128) as usize
    }

    /// The shard of a hold and its name there; `None` when it is another replica's.
    fn own(&self, name: HoldName) -> Option<(MutexGuard<'_, Shard>, HoldId)> {
        let (shard, hold) = inward(name.hold);
        let shard = self.shards[shard].lock();
        (shard.owner == name.owner).then_some((shard, hold))
    }

    fn shard_of(&self, user: UserId) -> &Locked {
        &self.shards[self.index_of(user)]
    }
}

/// A shard, under its lock. Nothing waits while it has it.
struct Locked(Mutex<Shard>);

impl Locked {
    fn lock(&self) -> MutexGuard<'_, Shard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn boot() -> Boot {
    BootTime::now().into()
}

impl From<BootTime> for Boot {
    fn from(now: BootTime) -> Self {
        Self(now.millis())
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn lasting(settings: &KeeperSettings) -> Lasting {
    let part = millis(settings.ttl) / millis(settings.margin).max(1);
    Lasting {
        ttl_ms: millis(settings.ttl),
        hold_ms: millis(settings.hold),
        period_ms: millis(settings.heartbeat),
        // The margin covers what the clocks lose over all of it.
        drift_part: part.max(100),
    }
}
