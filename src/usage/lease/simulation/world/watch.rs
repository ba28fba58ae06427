//! What is checked after every step.

use super::*;

impl World {
    pub(super) fn check(&mut self, touched: Option<usize>) -> Result<(), String> {
        if let Some(index) = touched {
            self.replicas[index].book.check();
        }
        if let Some(wrong) = self.wrong.take() {
            return Err(wrong);
        }
        self.postgres.check()?;
        if let Some(index) = touched {
            self.check_admission(index)?;
        }
        self.count_tight();
        let (now, postgres) = (self.now, &self.postgres);
        let handles = &self.handles;
        self.live
            .retain(|handle| handles[*handle].is_live(now, postgres));
        let month = period_at(now);
        if !self.calm && std::mem::replace(&mut self.month, month) != month {
            self.counts.month_ends += u64::from(!self.live.is_empty());
        }
        let mut held: BTreeMap<MeterKey, Tokens> = BTreeMap::new();
        for handle in &self.live {
            for key in &handles[*handle].meters {
                *held.entry(*key).or_default() += handles[*handle].tokens;
            }
        }
        let last = period_at(now.saturating_sub(MONTH_MS));
        let months = [last, self.calm_month.unwrap_or_else(|| period_at(now))];
        for (user, model) in self.postgres.limits.keys() {
            for period in months {
                held.entry(MeterKey {
                    user: *user,
                    period,
                    model: *model,
                })
                .or_default();
            }
        }
        if self.manners.strict {
            self.check_leases(&held)?;
        }
        for (key, mut held) in held {
            let charged = self.charged.get(&key).copied().unwrap_or(0);
            let committed = self.postgres.committed_of(key);
            if charged != committed {
                return Err(format!(
                    "charged {committed} at {now}, distinct records say {charged}"
                ));
            }
            // What may be sold without asking anybody counts as sold.
            for replica in self.replicas.iter().filter(|replica| replica.admits(now)) {
                held += replica.book.sight(key).map_or(0, |sight| sight.free);
            }
            let Some(limit) = self.ceilings.get(&(key.user, key.model)) else {
                continue;
            };
            let excess = self.excess.get(&key).copied().unwrap_or(0);
            if self.manners.strict
                && (excess != 0 || *limit != postgres.limits[&(key.user, key.model)])
            {
                return Err(format!("a strict seed excuses {excess} of {limit}"));
            }
            if committed + held > limit + excess {
                return Err(format!(
                    "oversold at {now}: {committed} committed, {held} held, limit {limit}, late {excess}"
                ));
            }
        }
        Ok(())
    }

    /// How near the limits are, as Postgres would decide now.
    fn count_tight(&mut self) {
        let period = self.period(self.now);
        let remaining = |((user, model), limit): (&(UserId, ModelKey), &Tokens)| {
            let key = MeterKey {
                user: *user,
                period,
                model: *model,
            };
            let leased = self.postgres.leased.get(&key).copied().unwrap_or(0);
            limit - self.postgres.committed_of(key) - leased
        };
        let least = self.postgres.limits.iter().map(remaining).min();
        let least = least.expect("there are limits");
        self.counts.nothing_left += u64::from(least <= 0);
        self.counts.below_zero += u64::from(least < 0 && self.manners.strict);
    }

    /// The claim of `docs/quota.md`, by the watcher's own count of what is spent.
    pub(super) fn check_leases(&self, meters: &BTreeMap<MeterKey, Tokens>) -> Result<(), String> {
        let (now, postgres) = (self.now, &self.postgres);
        for key in meters.keys() {
            let Some(limit) = self.postgres.limits.get(&(key.user, key.model)) else {
                continue;
            };
            let mut sum = postgres.committed_of(*key);
            for ((_, name), lease) in postgres.leases.range((*key, 0)..=(*key, Name::MAX)) {
                let covered = postgres.covered.get(&(*key, *name)).copied().unwrap_or(0);
                let unspent = lease.granted - covered;
                sum += unspent;
                let owner = self.replicas.iter().find(|replica| replica.name == *name);
                let sight = owner
                    .filter(|owner| owner.admits(now))
                    .and_then(|owner| owner.book.sight(*key));
                let free = sight.map_or(0, |sight| sight.free);
                let live = self.live.iter().map(|handle| &self.handles[*handle]);
                let held: Tokens = live
                    .filter(|handle| handle.owner == *name && handle.meters.contains(key))
                    .map(|handle| handle.tokens)
                    .sum();
                if free + held > unspent {
                    return Err(format!(
                        "oversold at {now}: {name} has {unspent}, {held} held and {free} for sale"
                    ));
                }
            }
            if sum > *limit {
                return Err(format!(
                    "oversold at {now}: {sum} booked or leased of {limit}"
                ));
            }
        }
        Ok(())
    }

    /// What clients were told to be booked is booked, as they were told.
    pub(super) fn check_acknowledged(&self, all: &[(usize, Tokens)]) -> Result<(), String> {
        for (handle, actual) in all {
            let handle = &self.handles[*handle];
            let place = (handle.period(), handle.request);
            let record = self.postgres.records.get(&place);
            if record.is_none_or(|record| record.actual != *actual) {
                return Err(format!("acknowledged {actual}, and booked {record:?}"));
            }
        }
        Ok(())
    }

    /// Whoever admits is alive as Postgres knows, and its holds end within what Postgres knows.
    pub(super) fn check_admission(&self, index: usize) -> Result<(), String> {
        let replica = &self.replicas[index];
        let now = self.now;
        let row = self.postgres.replicas.get(&replica.name);
        if replica.admits(now) && !row.is_some_and(|(row, dead)| !dead && now < row.expires_at) {
            return Err(format!("stale at {now}: admits, and Postgres has {row:?}"));
        }
        for handle in self.live.iter().map(|handle| &self.handles[*handle]) {
            if handle.owner == replica.name
                && now < handle.expires
                && row.is_none_or(|(row, _)| row.holds_until < handle.expires)
            {
                let until = handle.expires;
                return Err(format!("unknown at {now}: a hold until {until}, {row:?}"));
            }
        }
        Ok(())
    }
}
