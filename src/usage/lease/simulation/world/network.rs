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
            return None;
        }
        let slow = self.dice.percent(self.manners.slow_percent);
        Some(self.dice.between(1, if slow { 1_500 } else { 15 }))
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
                        let wait = self.dice.between(0, 4);
                        self.push(wait, None, Event::Decide(call, transaction));
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
                    if let Some(kind) = self.postgres.settle(name, *hold, Kind::Ended(*ending)) {
                        kinds.push((*hold, kind));
                    }
                }
                self.counts.tombstones += kinds.len() as u64;
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

    pub(super) fn book(&mut self, index: usize, actual: Tokens, own: bool) -> Booked {
        let handle = &self.handles[index];
        let foreign = (!own).then_some((handle.owner, handle.id, &*handle.meters, handle.tokens));
        let record = Record {
            user: handle.user(),
            model: handle.model,
            actual,
        };
        let in_time = handle.is_live(self.now, &self.postgres);
        let key = (handle.period(), handle.request);
        if self.manners.strict && !in_time && !self.postgres.records.contains_key(&key) {
            // In these seeds nobody commits late: this one is lost, and whoever sent it knows.
            return Booked::Conflict;
        }
        let booked = self
            .postgres
            .book(handle.period(), handle.request, record, foreign);
        match booked {
            Booked::Now => {
                let excess = if in_time {
                    actual - handle.tokens
                } else {
                    self.counts.late += 1;
                    actual
                };
                for key in &handle.meters {
                    *self.excess.entry(*key).or_default() += excess.max(0);
                }
                self.counts.booked += 1;
                self.counts.foreign += u64::from(!own);
                self.handles[index].landed = true;
                if in_time {
                    self.cover(index, actual);
                }
            }
            Booked::Before => {
                // Its client is told that it is committed: this hold, too, has ended.
                self.handles[index].landed = true;
                self.counts.replayed += 1;
            }
            Booked::Conflict => self.counts.conflicts += 1,
        }
        booked
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
