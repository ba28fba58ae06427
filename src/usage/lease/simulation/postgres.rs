//! Postgres, as far as quotas use it: what each statement reads, locks and writes, and when.

use std::collections::{BTreeMap, BTreeSet};

use super::{FORGET_MS, Flaw, MARGIN_MS, TTL_MS};
use crate::{
    model::{Period, UserId},
    usage::lease::{
        Answer, Balance, Carried, Ending, HoldId, Kind, LeaseRow, MeterKey, ModelKey, Operation,
        ReplicaRow, RequestKey, Tokens, operate,
    },
};

/// One start of a replica.
pub(super) type Name = u64;

#[derive(Clone, Copy, Debug)]
pub(super) struct Record {
    pub(super) user: UserId,
    pub(super) model: ModelKey,
    pub(super) actual: Tokens,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Booked {
    Now,
    Before,
    Conflict,
}

/// An operation's transaction between its statements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transaction {
    pub(super) name: Name,
    pub(super) key: MeterKey,
    pub(super) operation: Operation,
    /// As the snapshot of the statement that waits for the lock has it.
    seen: Tokens,
    pub(super) carried: Option<Carried>,
}

impl Transaction {
    pub(super) fn answer(&self) -> Option<Answer> {
        match self.carried? {
            Carried::Out { answer, .. } | Carried::Before(answer) => Some(answer),
            Carried::Straggler => None,
        }
    }
}

#[derive(Default)]
pub(super) struct Postgres {
    pub(super) flaw: Option<Flaw>,
    pub(super) limits: BTreeMap<(UserId, ModelKey), Tokens>,
    pub(super) committed: BTreeMap<MeterKey, Tokens>,
    pub(super) leased: BTreeMap<MeterKey, Tokens>,
    pub(super) leases: BTreeMap<(MeterKey, Name), LeaseRow>,
    /// When an operation was last carried out.
    operated: BTreeMap<(MeterKey, Name), u64>,
    pub(super) settlements: BTreeMap<(Name, HoldId), Kind>,
    pub(super) records: BTreeMap<(Period, RequestKey), Record>,
    /// Every hold that Postgres was ever told to be over.
    pub(super) buried: BTreeSet<(Name, HoldId)>,
    /// The watcher's: what is booked of each lease and has not left it.
    pub(super) covered: BTreeMap<(MeterKey, Name), Tokens>,
    /// With whether they are dead.
    pub(super) replicas: BTreeMap<Name, (ReplicaRow, bool)>,
    /// Leases were, since they were last checked.
    changed: bool,
    locked: BTreeSet<MeterKey>,
    shared: BTreeMap<Name, u32>,
}

impl Postgres {
    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    pub(super) fn register(&mut self, name: Name, now: u64) {
        let row = ReplicaRow {
            expires_at: now + TTL_MS,
            holds_until: now,
        };
        self.replicas.insert(name, (row, false));
    }

    /// `false`: the replica is dead or reaped.
    pub(super) fn heartbeat(&mut self, name: Name, ttl_ms: u64, holds_ms: u64, now: u64) -> bool {
        let careless = self.has(Flaw::LateHeartbeatShortens);
        match self.replicas.get_mut(&name) {
            Some((row, false)) if careless => {
                row.expires_at = now + ttl_ms;
                row.holds_until = now + holds_ms;
                true
            }
            Some((row, false)) => {
                row.heard(now, ttl_ms, holds_ms);
                true
            }
            _ => false,
        }
    }

    /// First statement: the replica is there, and stays while the transaction lasts.
    pub(super) fn begin(
        &mut self,
        name: Name,
        key: MeterKey,
        operation: Operation,
        now: u64,
    ) -> Option<Transaction> {
        let (row, dead) = self.replicas.get(&name)?;
        if *dead || row.expires_at <= now {
            return None;
        }
        *self.shared.entry(name).or_default() += 1;
        Some(Transaction {
            name,
            key,
            operation,
            seen: self.committed_of(key),
            carried: None,
        })
    }

    /// Second and third: locks the balance, then reads and decides. `false`: somebody has the lock.
    pub(super) fn decide(&mut self, transaction: &mut Transaction) -> bool {
        let Transaction { name, key, .. } = *transaction;
        if !self.locked.insert(key) {
            return false;
        }
        let stale = self.has(Flaw::OneSnapshot);
        let balance = Balance {
            limit: self.limits.get(&(key.user, key.model)).copied(),
            committed: if stale {
                transaction.seen
            } else {
                self.committed_of(key)
            },
            leased: self.leased.get(&key).copied().unwrap_or(0),
        };
        let mut lease = self.leases.get(&(key, name)).copied();
        if self.has(Flaw::OperationsUnnumbered)
            && let Some(lease) = &mut lease
        {
            lease.number = 0;
        }
        let live = self.replicas.values().filter(|(_, dead)| !dead).count();
        transaction.carried = Some(operate(
            &balance,
            lease,
            &transaction.operation,
            u32::try_from(live).expect("few"),
        ));
        true
    }

    /// Writes and commits.
    pub(super) fn commit(&mut self, transaction: &Transaction, now: u64) {
        let Transaction {
            name, key, carried, ..
        } = *transaction;
        if let Some(Carried::Out { lease, leased, .. }) = carried {
            self.changed = true;
            self.leases.insert((key, name), lease);
            self.operated.insert((key, name), now);
            *self.covered.entry((key, name)).or_default() -= transaction.operation.spent;
            self.leased.insert(key, leased);
        }
        self.locked.remove(&key);
        *self.shared.get_mut(&name).expect("begun") -= 1;
    }

    /// The ledger's statement: the record, its sums, and the settlement of a foreign hold.
    pub(super) fn book(
        &mut self,
        period: Period,
        request: RequestKey,
        record: Record,
        foreign: Option<(Name, HoldId, &[MeterKey], Tokens)>,
    ) -> Booked {
        let booked = match self.records.get(&(period, request)) {
            None => Booked::Now,
            Some(old) if old.actual == record.actual && old.model == record.model => Booked::Before,
            Some(_) => return Booked::Conflict,
        };
        if booked == Booked::Now {
            self.records.insert((period, request), record);
        }
        if booked == Booked::Now || self.has(Flaw::ReplayCharges) {
            for model in [ModelKey::TOTAL, record.model] {
                let user = record.user;
                *self
                    .committed
                    .entry(MeterKey {
                        user,
                        period,
                        model,
                    })
                    .or_default() += record.actual;
            }
        }
        let charged = if booked == Booked::Now {
            record.actual
        } else {
            0
        };
        if let Some((owner, hold, meters, held)) = foreign {
            if self.has(Flaw::ForeignShrinks) {
                self.changed = true;
                for key in meters.iter().filter(|_| booked == Booked::Now) {
                    if let Some(lease) = self.leases.get_mut(&(*key, owner))
                        && !self.locked.contains(key)
                    {
                        let less = held.min(lease.granted);
                        lease.granted -= less;
                        *self.leased.get_mut(key).expect("has a lease") -= less;
                    }
                }
            } else if !self.has(Flaw::SettlementApart) {
                self.settle(owner, hold, Kind::Committed(charged));
            }
        }
        booked
    }

    /// Inserts a settlement unless there is one, whether or not there is anybody to read it; says
    /// what is there.
    pub(super) fn settle(&mut self, owner: Name, hold: HoldId, kind: Kind) -> Kind {
        if matches!(kind, Kind::Ended(_)) {
            self.buried.insert((owner, hold));
        }
        *self.settlements.entry((owner, hold)).or_insert(kind)
    }

    /// A release on a foreign replica; refused, and rolled back, when the record is there.
    pub(super) fn release(
        &mut self,
        owner: Name,
        hold: HoldId,
        period: Period,
        request: RequestKey,
    ) {
        if !self.records.contains_key(&(period, request)) {
            self.settle(owner, hold, Kind::Ended(Ending::Released));
        }
    }

    /// What others than this replica have of a meter.
    pub(super) fn elsewhere(&self, name: Name, key: MeterKey) -> Tokens {
        let here = self.leases.get(&(key, name)).map_or(0, |row| row.granted);
        self.leased.get(&key).copied().unwrap_or(0) - here
    }

    /// Whether a commit of the hold could still be in time after its end: the owner is there, and no
    /// tombstone.
    pub(super) fn is_open(&self, owner: Name, hold: HoldId) -> bool {
        self.replicas.get(&owner).is_some_and(|(_, dead)| !dead)
            && !self.buried.contains(&(owner, hold))
    }

    pub(super) fn settlements_of(&self, owner: Name) -> Vec<(HoldId, Kind)> {
        let all = self
            .settlements
            .range((owner, HoldId(0))..=(owner, HoldId(u64::MAX)));
        all.map(|((_, hold), kind)| (*hold, *kind)).collect()
    }

    /// Takes back what replicas had that are over; says how many are gone.
    pub(super) fn reap(&mut self, now: u64) -> usize {
        let hasty = self.has(Flaw::NoQuarantine);
        self.changed = true;
        for (name, (row, dead)) in &mut self.replicas {
            let over = row.is_over(now, MARGIN_MS) || (hasty && row.expires_at <= now);
            let shared = self.shared.get(name).copied().unwrap_or(0);
            *dead |= over && shared == 0;
        }
        let dead: BTreeSet<Name> = self
            .replicas
            .iter()
            .filter(|(_, (_, dead))| *dead)
            .map(|(name, _)| *name)
            .collect();
        let Self {
            leases,
            leased,
            locked,
            ..
        } = self;
        leases.retain(|(key, name), lease| {
            let stays = !dead.contains(name) || locked.contains(key);
            if !stays {
                *leased.get_mut(key).expect("has a lease") -= lease.granted;
            }
            stays
        });
        let mut gone = 0;
        for name in dead {
            if !self.leases.keys().any(|(_, owner)| *owner == name) {
                gone += 1;
                self.replicas.remove(&name);
                self.covered.retain(|(_, owner), _| *owner != name);
                self.settlements.retain(|(owner, _), _| *owner != name);
            }
        }
        gone
    }

    /// Forgets leases that have been empty for long, and settlements that nobody will read.
    pub(super) fn sweep(&mut self, now: u64) {
        let Self {
            leases,
            operated,
            leased,
            locked,
            covered,
            replicas,
            settlements,
            ..
        } = self;
        leases.retain(|place, lease| {
            let at = operated.get(place).copied().unwrap_or(now);
            lease.granted != 0 || locked.contains(&place.0) || now - at < FORGET_MS
        });
        operated.retain(|place, _| leases.contains_key(place));
        leased.retain(|key, _| leases.range((*key, 0)..=(*key, Name::MAX)).next().is_some());
        covered.retain(|place, tokens| *tokens != 0 || leases.contains_key(place));
        settlements.retain(|(owner, _), _| replicas.contains_key(owner));
    }

    pub(super) fn committed_of(&self, key: MeterKey) -> Tokens {
        self.committed.get(&key).copied().unwrap_or(0)
    }

    /// What must hold whenever no transaction is half done, and between: they write at their end.
    pub(super) fn check(&mut self) -> Result<(), String> {
        if !std::mem::take(&mut self.changed) {
            return Ok(());
        }
        let mut sums: BTreeMap<MeterKey, Tokens> = BTreeMap::new();
        for ((key, name), lease) in &self.leases {
            if lease.granted < 0 {
                return Err(format!("lease of {name} below zero: {lease:?}"));
            }
            *sums.entry(*key).or_default() += lease.granted;
        }
        for (key, leased) in &self.leased {
            let sum = sums.remove(key).unwrap_or(0);
            if *leased != sum {
                return Err(format!("leased {leased}, sum of leases {sum}"));
            }
        }
        match sums.values().find(|sum| **sum != 0) {
            None => Ok(()),
            Some(sum) => Err(format!("nothing leased, sum of leases {sum}")),
        }
    }

    /// Sums against records.
    pub(super) fn check_sums(&self) -> Result<(), String> {
        let mut sums: BTreeMap<MeterKey, Tokens> = BTreeMap::new();
        for ((period, _), record) in &self.records {
            for model in [ModelKey::TOTAL, record.model] {
                let (user, period) = (record.user, *period);
                *sums
                    .entry(MeterKey {
                        user,
                        period,
                        model,
                    })
                    .or_default() += record.actual;
            }
        }
        if sums == self.committed {
            return Ok(());
        }
        Err(format!(
            "charged {:?}, the records say {sums:?}",
            self.committed
        ))
    }
}
