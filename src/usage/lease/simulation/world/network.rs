//! The network, and Postgres behind it.

use super::*;

impl World {
    /// `None`: lost.
    pub(super) fn delay(&mut self, replica: usize) -> Option<u64> {
        if self.calm {
            return Some(self.dice.between(1, 4));
        }
        if self.replicas[replica].cut_until > self.now
            || self.dice.percent(self.manners.lost_percent)
        {
            self.counts.lost += 1;
            return None;
        }
        let slow = self.dice.percent(self.manners.slow_percent);
        Some(self.dice.between(1, if slow { 600 } else { 8 }))
    }

    pub(super) fn send(&mut self, replica: usize, statement: Statement) {
        self.order += 1;
        let id = self.order;
        let Replica { process, name, .. } = self.replicas[replica];
        let call = Call {
            replica,
            process,
            name,
            id,
            statement: statement.clone(),
        };
        if !matches!(statement, Statement::Forget(_) | Statement::Settle(..)) {
            self.replicas[replica].pending.insert(id, (name, statement));
            self.push(TIMEOUT_MS, Some((replica, process)), Event::Timeout(id));
        }
        if let Some(delay) = self.delay(replica) {
            self.push(delay, None, Event::Arrive(call));
        }
    }

    pub(super) fn reply(&mut self, call: Call, reply: Reply) {
        if let Some(delay) = self.delay(call.replica) {
            let to = Some((call.replica, call.process));
            self.push(delay, to, Event::Answer(call, reply));
        }
    }

    pub(super) fn arrive(&mut self, call: Call) {
        let name = call.name;
        let reply = match &call.statement {
            Statement::Heartbeat(Heartbeat {
                ttl_ms, holds_ms, ..
            }) => Reply::Alive(self.postgres.heartbeat(name, *ttl_ms, *holds_ms, self.now)),
            Statement::Settlements => Reply::Settlements(self.postgres.settlements_of(name)),
            Statement::Forget(holds) => {
                for hold in holds {
                    self.postgres.settlements.remove(&(name, *hold));
                }
                return;
            }
            Statement::Operation(key, operation) => {
                match self.postgres.begin(name, *key, *operation, self.now) {
                    Some(transaction) => {
                        // Locks of other meters of its batch come first.
                        let waits = if self.dice.percent(self.manners.long_percent) && !self.calm {
                            self.dice.between(50, 200)
                        } else if self.dice.percent(25) {
                            self.dice.between(1, 4)
                        } else {
                            0
                        };
                        if waits == 0 {
                            self.decide(call, transaction);
                        } else {
                            self.push(waits, None, Event::Decide(call, transaction));
                        }
                        return;
                    }
                    None => Reply::Operation(None),
                }
            }
            Statement::Book {
                handle,
                actual,
                own,
            } => Reply::Booked(self.book(*handle, *actual, *own)),
            Statement::Tombstones(all) => {
                let mut kinds = Vec::new();
                for (hold, ending) in all {
                    let kind = self.postgres.settle(name, *hold, Kind::Ended(*ending));
                    self.counts.expired += u64::from(kind == Kind::Ended(Ending::Expired));
                    kinds.push((*hold, kind));
                }
                Reply::Tombstones(kinds)
            }
            Statement::Release(handle) => {
                let Handle { owner, id, .. } = self.handles[*handle];
                let (period, request) = (
                    self.handles[*handle].period(),
                    self.handles[*handle].request,
                );
                self.postgres.release(owner, id, period, request);
                Reply::Nothing
            }
            Statement::Settle(handle, charged) => {
                let Handle { owner, id, .. } = self.handles[*handle];
                self.postgres.settle(owner, id, Kind::Committed(*charged));
                return;
            }
        };
        self.reply(call, reply);
    }

    /// An operation's transaction tries to get its lock.
    pub(super) fn decide(&mut self, call: Call, mut transaction: Transaction) {
        if !self.postgres.decide(&mut transaction) {
            self.blocked.push((call, transaction));
            return;
        }
        self.counts.operations += 1;
        match transaction.carried {
            Some(Carried::Before(_)) => self.counts.operations_repeated += 1,
            Some(Carried::Straggler) => self.counts.stragglers += 1,
            _ => {}
        }
        if self.dice.percent(self.manners.long_percent) && !self.calm {
            let takes = self.dice.between(1, 200);
            self.push(takes, None, Event::Commit(call, transaction));
        } else if self.dice.percent(30) {
            let takes = self.dice.between(1, 4);
            self.push(takes, None, Event::Commit(call, transaction));
        } else {
            self.end(call, &transaction);
        }
    }

    /// It commits; whoever waits for its lock tries again, in any order.
    pub(super) fn end(&mut self, call: Call, transaction: &Transaction) {
        self.postgres.commit(transaction, self.now);
        let (name, key) = (transaction.name, transaction.key);
        let elsewhere = self.postgres.elsewhere(name, key);
        let answer = transaction.answer().map(|answer| (answer, elsewhere));
        self.reply(call, Reply::Operation(answer));
        let blocked = std::mem::take(&mut self.blocked);
        for (call, transaction) in blocked {
            if transaction.key == key {
                let wait = self.dice.between(0, 3);
                self.push(wait, None, Event::Decide(call, transaction));
            } else {
                self.blocked.push((call, transaction));
            }
        }
    }

    pub(super) fn book(&mut self, index: usize, actual: Tokens, own: bool) -> Booked {
        let handle = &self.handles[index];
        let foreign = (!own).then_some((handle.owner, handle.id, &*handle.meters, handle.tokens));
        let record = Record {
            user: handle.user(),
            model: handle.model,
            actual,
        };
        let in_time = handle.is_live(self.now, &self.postgres);
        let month = if self.flaw == Some(Flaw::MonthOfCommit) {
            period_at(self.now)
        } else {
            handle.period()
        };
        let key = (month, handle.request);
        if self.manners.strict && !in_time && !self.postgres.records.contains_key(&key) {
            // In these seeds nobody commits late: this one is lost, and whoever sent it knows.
            return Booked::Conflict;
        }
        let booked = self.postgres.book(month, handle.request, record, foreign);
        match booked {
            Booked::Now => {
                let excess = if in_time {
                    self.counts.booked_above += u64::from(actual > handle.tokens);
                    actual - handle.tokens
                } else {
                    self.counts.booked_late += 1;
                    actual
                };
                for key in &handle.meters {
                    *self.excess.entry(*key).or_default() += excess.max(0);
                }
                self.counts.booked += 1;
                self.counts.booked_elsewhere += u64::from(!own);
                self.counts.booked_after_month += u64::from(period_at(self.now) > handle.period());
                if self.distinct.insert((handle.period(), handle.request)) {
                    for key in sums(&record, handle.period()) {
                        *self.charged.entry(key).or_default() += actual;
                    }
                }
                self.handles[index].landed = true;
                if in_time {
                    self.cover(index, actual);
                }
            }
            Booked::Before => {
                // Its client is told that it is committed: this hold, too, has ended.
                self.handles[index].landed = true;
                self.counts.repeated += 1;
            }
            Booked::Conflict => self.counts.conflicts += 1,
        }
        booked
    }

    /// A client is told that its commit is booked: from now on nothing may make that untrue.
    pub(super) fn acknowledge(&mut self, handle: usize, actual: Tokens) {
        self.acknowledged.push((handle, actual));
        if let Err(wrong) = self.check_acknowledged(&[(handle, actual)]) {
            self.wrong = Some(wrong);
        }
    }

    /// The watcher's own count of what is booked and still in the owner's lease.
    pub(super) fn cover(&mut self, index: usize, actual: Tokens) {
        let handle = &mut self.handles[index];
        if !std::mem::replace(&mut handle.covered, true) {
            for key in &handle.meters {
                let covered = self.postgres.covered.entry((*key, handle.owner));
                *covered.or_default() += actual.min(handle.tokens);
            }
        }
    }
}
