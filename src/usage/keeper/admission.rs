//! Whether there is enough for a wish: here, in Postgres, with others, or by the tier's policy.

use std::{
    sync::{PoisonError, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::warn;

use super::{
    AHEAD_MS, Holding, Inner, Keeper, Reservation, Wish, boot, millis,
    shard::{Standing, outward},
};
use crate::{
    error::Result,
    model::{MeterName, OnOutage, Period, Tokens},
    usage::lease::{Ask, Boot, MeterKey, Mode, ModelKey, Refusal, Reserved},
};

/// So long Postgres is waited for before the tier's policy decides; longer, if others may be asked for
/// longer.
const SILENCE: Duration = Duration::from_secs(1);

/// Between attempts while others are asked.
const AGAIN: Duration = Duration::from_millis(15);

const MAX_RECALLED: usize = 10_000;

/// A recall of the same meter is not repeated within.
const RECALL_AGAIN_MS: u64 = 60;

impl Keeper {
    /// [`Keeper::reserve`], if what this replica has is enough and nobody has to be asked. `now` was
    /// lately: a hold ends as much sooner.
    pub fn reserve_at_once(&self, wish: &Wish<'_>, now: Boot) -> Option<Reservation> {
        let mode = match wish.mode {
            Mode::BestEffort => Mode::AllOrNothing,
            mode => mode,
        };
        match self.0.admit(wish, mode, wish.tokens, None, now) {
            Tried::Done(done) => Some(done),
            Tried::Refused(_) | Tried::Short { .. } => None,
        }
    }

    /// Holds tokens for a request, on the total and on the model if the tier limits it. What is not free
    /// here is asked for: of Postgres, and then of other replicas, within the recall bound. What the
    /// database does not answer in time, the tier's policy decides.
    ///
    /// Cancel-safe: a dropped future leaves the whole hold, which expires, or none.
    pub async fn reserve(&self, wish: &Wish<'_>) -> Reservation {
        let inner = &*self.0;
        let recall_bound = inner.settings.recall_bound;
        let begun = Instant::now();
        let mut until = begun + SILENCE.max(recall_bound);
        let (mut mode, mut tokens, mut was_told) = (Mode::AllOrNothing, wish.tokens, false);
        if wish.mode == Mode::LookOnly {
            mode = Mode::LookOnly;
        }
        // The meters that were short first, and the operation of each that had been sent by then.
        let mut first: Option<Vec<(MeterKey, u64)>> = None;
        loop {
            let answered = inner.answered.notified();
            tokio::pin!(answered);
            // Before it looks, or the answer in between is missed.
            answered.as_mut().enable();
            let now = Instant::now();
            let is_last = now >= until;
            let tried = inner.admit(wish, mode, tokens, first.as_deref(), boot());
            let (mut wait, mut is_heard) = (until, true);
            match tried {
                Tried::Done(done) => return done,
                Tried::Refused(Refusal::BeyondHorizon | Refusal::Fenced)
                    if now < begun + recall_bound =>
                {
                    inner.want_until(boot().plus(millis(wish.lasts) + AHEAD_MS));
                    wait = begun + recall_bound;
                }
                Tried::Refused(Refusal::BeyondHorizon | Refusal::Fenced) => {
                    return inner.admit_open(wish);
                }
                Tried::Refused(refusal) => return Reservation::Refused(refusal),
                Tried::Short { short, elsewhere } => {
                    let keys = || short.iter().map(|(key, _)| *key);
                    if elsewhere.is_some() && !was_told {
                        // From now on it is others who are waited for.
                        was_told = true;
                        until = now + recall_bound;
                    }
                    match elsewhere {
                        // Postgres has no more, and nobody else has any, or did not give it back.
                        _ if is_last && was_told || elsewhere.is_some_and(|tokens| tokens <= 0) => {
                            let standings = inner.standings(keys());
                            if standings.len() < short.len() {
                                // One lay idle, and was forgotten meanwhile. A new one is not, for long.
                                until = now + SILENCE.max(recall_bound);
                                (was_told, first) = (false, None);
                                continue;
                            }
                            match left(&standings, tokens) {
                                Left::Enough if is_last => return inner.admit_open(wish),
                                Left::Enough => {
                                    first = Some(short);
                                    let _ = timeout_at(until, answered).await;
                                }
                                _ if mode != Mode::AllOrNothing || wish.mode == mode => {
                                    return Reservation::Denied(standings);
                                }
                                // What was sent until now did not ask for this.
                                Left::Less(less) if !is_last => (tokens, first) = (less, None),
                                // At last, what is free here.
                                _ => mode = wish.mode,
                            }
                            continue;
                        }
                        Some(_) => {
                            match timeout_at(until, inner.recall(keys())).await {
                                Ok(Ok(())) | Err(_) => {}
                                Ok(Err(error)) => {
                                    warn!(
                                        error = error.with_causes(),
                                        "others could not be asked for what they have"
                                    );
                                }
                            }
                            // They need a moment: asking again and again would only keep Postgres
                            // busy.
                            (wait, is_heard) = ((Instant::now() + AGAIN).min(until), false);
                        }
                        None if is_last => return inner.admit_open(wish),
                        None => {}
                    }
                    first.get_or_insert(short);
                }
            }
            if is_heard {
                let _ = timeout_at(wait, answered).await;
            } else {
                sleep_until(wait).await;
            }
        }
    }
}

/// What is left when nobody else has any.
enum Left {
    /// Others waited as well, and what was asked for was what the least of them needed: the look that
    /// came before has asked for it.
    Enough,
    /// Of the least of the meters.
    Less(Tokens),
    Nothing,
}

fn left(standings: &[(MeterName, Standing)], tokens: Tokens) -> Left {
    let obtainable = standings.iter().map(|(_, standing)| standing.obtainable());
    // `None` is without a limit.
    match obtainable.flatten().min() {
        None => Left::Enough,
        Some(least) if least >= tokens => Left::Enough,
        Some(least) if least > 0 => Left::Less(least),
        Some(_) => Left::Nothing,
    }
}

/// What one look at the book brought.
enum Tried {
    /// There is nothing to wait for.
    Done(Reservation),
    /// These meters, with the operation of each that was sent last; and what others have of one of
    /// them, if an operation that was sent since the first look has told.
    Short {
        short: Vec<(MeterKey, u64)>,
        elsewhere: Option<Tokens>,
    },
    Refused(Refusal),
}

impl Inner {
    fn admit(
        &self,
        wish: &Wish<'_>,
        mode: Mode,
        tokens: Tokens,
        first: Option<&[(MeterKey, u64)]>,
        now: Boot,
    ) -> Tried {
        let index = self.index_of(wish.user_id);
        let model = wish
            .model
            .filter(|model| wish.limits.models.contains_key(*model))
            .map(|model| self.models.key(model));
        let mut shard = self.shards[index].lock();
        let Some(time) = shard.time_at(now) else {
            return Tried::Refused(Refusal::Fenced);
        };
        let period = Period::containing(time);
        let key = |model| MeterKey {
            user: wish.user_id,
            period,
            model,
        };
        let both = [key(ModelKey::TOTAL), key(model.unwrap_or(ModelKey::TOTAL))];
        let request = wish.request.within(period);
        let ask = Ask {
            request,
            meters: &both[..if model.is_some() { 2 } else { 1 }],
            tokens,
            mode,
            lasts_ms: millis(wish.lasts),
        };
        let rate = wish.limits.requests_per_minute;
        let rate = rate.filter(|_| wish.is_request);
        let rate = match rate.map(|rate| shard.request(wish.user_id, rate, now)) {
            // A request that has been counted holds what it holds.
            Some(Err(wait)) if !shard.book.has(request, now) => {
                return Tried::Done(Reservation::RateLimited(wait));
            }
            Some(counted) => counted.ok(),
            None => None,
        };
        let standing = shard.admission(now);
        // Made before the hold is written: a copy of a time that was only just made waits until all that
        // was written before it has reached the cache.
        let expires_at = shard.time_at(now.plus(ask.lasts_ms)).unwrap_or(time);
        // Written seldom: every thread looks at it.
        if !self.is_in_use.load(Ordering::Relaxed) {
            self.is_in_use.store(true, Ordering::Relaxed);
        }
        let reserved = shard.book.reserve(&ask, &standing);
        // What the hold made due too: it asks for more before there is nothing left.
        if shard.book.is_due() {
            self.due.notify_one();
        }
        match reserved {
            Reserved::Held(mut held) => {
                if let Some(state) = rate.filter(|_| !held.replay) {
                    shard.remember_request(wish.user_id, state);
                }
                let total = shard.standing_of(held.id);
                held.id = outward(index, held.id);
                let expires_at = match held.replay {
                    true => shard.time_at(held.expires).unwrap_or(time),
                    false => expires_at,
                };
                Tried::Done(Reservation::Held(Holding {
                    owner: shard.owner,
                    created_at: time,
                    expires_at,
                    total,
                    held,
                }))
            }
            Reserved::Enough => {
                let total = shard.standing(both[0]);
                Tried::Done(Reservation::Enough(total.map(|total| (period, total))))
            }
            Reserved::Refused(refusal) => Tried::Refused(refusal),
            Reserved::Short(keys) => {
                let keys = keys.into_iter().flatten();
                let short: Vec<_> = keys.map(|key| (key, shard.book.sent(key))).collect();
                let since = |key: MeterKey| {
                    let (_, sent) = first?.iter().find(|(of, _)| *of == key)?;
                    shard.elsewhere_since(key, *sent)
                };
                // If one of them cannot be had, all are denied.
                let elsewhere = short.iter().filter_map(|(key, _)| since(*key)).min();
                Tried::Short { short, elsewhere }
            }
        }
    }

    /// What the tier's policy admits while Postgres is silent.
    fn admit_open(&self, wish: &Wish<'_>) -> Reservation {
        let silence = Reservation::Refused(Refusal::Fenced);
        let OnOutage::Open { open_tokens } = wish.limits.on_outage else {
            return silence;
        };
        let index = self.index_of(wish.user_id);
        let now = boot();
        let mut shard = self.shards[index].lock();
        // A handle needs a time of the database.
        let Some(time) = shard.time_at(now) else {
            return silence;
        };
        let ask = Ask {
            request: wish.request.within(Period::containing(time)),
            meters: &[],
            tokens: wish.tokens,
            mode: wish.mode,
            lasts_ms: millis(wish.lasts),
        };
        let reserved = shard
            .book
            .reserve_open(&ask, wish.user_id, open_tokens, now);
        match reserved {
            Reserved::Held(mut held) => {
                // Whether there are too many was asked before; it counts as one of them.
                let rate = wish.limits.requests_per_minute;
                if let Some(rate) = rate.filter(|_| wish.is_request && !held.replay)
                    && let Ok(state) = shard.request(wish.user_id, rate, now)
                {
                    shard.remember_request(wish.user_id, state);
                }
                held.id = outward(index, held.id);
                Reservation::Held(Holding {
                    owner: shard.owner,
                    created_at: time,
                    expires_at: shard.time_at(held.expires).unwrap_or(time),
                    total: None,
                    held,
                })
            }
            Reserved::Enough => Reservation::Enough(None),
            Reserved::Refused(Refusal::Full) => Reservation::Refused(Refusal::Full),
            Reserved::Refused(_) | Reserved::Short(_) => silence,
        }
    }

    /// Asks the others, unless that was just done.
    async fn recall(&self, keys: impl Iterator<Item = MeterKey>) -> Result<()> {
        let now = boot();
        let mut owner = None;
        let mut meters = Vec::new();
        {
            let mut recalled = self.recalled.lock().unwrap_or_else(PoisonError::into_inner);
            if recalled.len() > MAX_RECALLED {
                recalled.clear();
            }
            for key in keys {
                let again = recalled.get(&key).map(|at: &Boot| now.since(*at));
                if again.is_none_or(|since| since >= RECALL_AGAIN_MS) {
                    recalled.insert(key, now);
                    meters.push(self.models.name_of(key));
                    owner = Some(self.shard_of(key.user).lock().owner);
                }
            }
        }
        match owner {
            Some(owner) => self.store.recall(owner, &meters).await,
            None => Ok(()),
        }
    }

    fn standings(&self, keys: impl Iterator<Item = MeterKey>) -> Vec<(MeterName, Standing)> {
        let standing = |key: MeterKey| {
            let standing = self.shard_of(key.user).lock().standing(key)?;
            Some((self.models.name_of(key), standing))
        };
        keys.filter_map(standing).collect()
    }
}
