//! What a replica does.

use super::*;

impl World {
    pub(super) fn happen_at(&mut self, index: usize, event: Event) {
        let now = self.replicas[index].clock(self.now);
        let to = Some((index, self.replicas[index].process));
        match event {
            Event::Tick => {
                self.replicas[index].book.sweep(now, 1);
                if self.flaw == Some(Flaw::NoIdleReturn) {
                    // What it would give back is not sent.
                } else {
                    self.send_operations(index);
                }
                self.send_tombstones(index);
                self.push(TICK_MS, to, Event::Tick);
            }
            Event::Heartbeat => {
                let heartbeat = self.replicas[index].registration.heartbeat(now);
                self.send(index, Statement::Heartbeat(heartbeat));
                self.push(HEARTBEAT_MS, to, Event::Heartbeat);
            }
            Event::Answer(call, reply) => self.answer(index, call, reply),
            Event::Timeout(call) => {
                let pending = self.replicas[index].pending.remove(&call);
                let (name, statement) = pending.expect("still waited for");
                self.lost(index, name, statement);
            }
            Event::Wish(wish) => {
                let standing = self.replicas[index].registration.standing(now);
                if self.dice.percent(3) && !self.calm {
                    // The thread is stopped after it read the clock.
                    let delay = self.dice.between(0, 1_000);
                    self.push(delay, to, Event::Admit(wish, standing));
                } else {
                    self.admit(index, wish, &standing);
                }
            }
            Event::Admit(wish, standing) => self.admit(index, wish, &standing),
            Event::Look(wish) => {
                let standing = self.replicas[index].registration.standing(now);
                let waiting = self.waiting.remove(&wish).expect("still waits");
                self.admit(index, waiting.wish, &standing);
            }
            Event::Step { handle, step, .. } => self.settle(index, handle, step),
            Event::Recall(key) => {
                self.replicas[index].book.recall(key, now);
                self.send_operations(index);
            }
            _ => unreachable!("of no replica"),
        }
    }

    pub(super) fn send_operations(&mut self, index: usize) {
        let now = self.replicas[index].clock(self.now);
        for (key, operation) in self.replicas[index].book.operations(now, 100) {
            self.send(index, Statement::Operation(key, operation));
        }
    }

    pub(super) fn send_tombstones(&mut self, index: usize) {
        let book = &mut self.replicas[index].book;
        let mut all = book.tombstones(100);
        all.retain(|(hold, ending)| {
            let free = match self.flaw {
                Some(Flaw::NoTombstone) => *ending == Ending::Expired,
                Some(Flaw::ReleaseFreesAtOnce) => *ending == Ending::Released,
                _ => false,
            };
            if free {
                book.settled(*hold, Kind::Ended(*ending));
            }
            !free
        });
        if !all.is_empty() {
            self.send(index, Statement::Tombstones(all));
        }
    }

    pub(super) fn answer(&mut self, index: usize, call: Call, reply: Reply) {
        let replica = &mut self.replicas[index];
        let now = replica.clock(self.now);
        let Some((name, statement)) = replica.pending.remove(&call.id) else {
            return;
        };
        match (statement, reply) {
            (Statement::Heartbeat(mut heartbeat), Reply::Alive(true)) => {
                if self.flaw == Some(Flaw::FenceFromAnswer) {
                    heartbeat.sent = now;
                }
                replica.registration.answered(&heartbeat);
                // Mostly where there are any: one that finds none does nothing.
                let any = !self.postgres.settlements_of(name).is_empty();
                if any || self.dice.percent(5) {
                    self.send(index, Statement::Settlements);
                }
            }
            (Statement::Heartbeat(_), Reply::Alive(false)) => {
                self.names += 1;
                self.postgres.register(self.names, self.now);
                self.replicas[index].rejoin(self.names);
                self.counts.rejoined += 1;
                let heartbeat = self.replicas[index].registration.heartbeat(now);
                self.send(index, Statement::Heartbeat(heartbeat));
            }
            (Statement::Settlements, Reply::Settlements(all)) => {
                self.settled(index, all);
            }
            (Statement::Operation(key, operation), Reply::Operation(Some(answer))) => {
                let (answer, elsewhere) = answer;
                let answered = replica.book.answered(key, operation.number, &answer, now);
                // Whatever came up meanwhile: a recall does not wait for the next tick.
                self.send_operations(index);
                if let Some(Answered { gained, short }) = answered {
                    let brought = match gained {
                        _ if short && elsewhere <= 0 => Brought::NothingAnywhere,
                        0 => Brought::Little,
                        _ => Brought::Some,
                    };
                    self.told(index, call.id, key, brought);
                }
            }
            (Statement::Tombstones(_), Reply::Tombstones(all)) => {
                self.settled(index, all);
            }
            (
                Statement::Book {
                    handle,
                    actual,
                    own,
                },
                Reply::Booked(booked),
            ) => {
                if own {
                    let outcome = match booked {
                        Booked::Conflict => Outcome::Refused,
                        booked => Outcome::Booked {
                            actual,
                            new: booked == Booked::Now,
                        },
                    };
                    let Handle { id, meters, .. } = &self.handles[handle];
                    let ended = replica.book.end_commit(*id, meters, outcome);
                    if ended == Ended::Now && booked == Booked::Before {
                        // The record is of another handle: this one's tokens leave unused.
                        self.cover(handle, actual);
                    }
                }
                if booked != Booked::Conflict {
                    self.acknowledge(handle, actual);
                }
                if !own && self.flaw == Some(Flaw::SettlementApart) && booked == Booked::Now {
                    self.send(index, Statement::Settle(handle, actual));
                }
            }
            (statement, _) => self.lost(index, name, statement),
        }
    }

    pub(super) fn settled(&mut self, index: usize, all: Vec<(HoldId, Kind)>) {
        let book = &mut self.replicas[index].book;
        let done: Vec<HoldId> = all
            .into_iter()
            .filter(|(hold, kind)| book.settled(*hold, *kind) != Ended::Later)
            .map(|(hold, _)| hold)
            .collect();
        if !done.is_empty() {
            self.send(index, Statement::Forget(done));
        }
    }

    /// Nobody knows what became of it.
    pub(super) fn lost(&mut self, index: usize, name: Name, statement: Statement) {
        let replica = &mut self.replicas[index];
        match statement {
            Statement::Operation(key, operation) if name == replica.name => {
                replica.book.operation_lost(key, operation.number);
            }
            Statement::Tombstones(all) if name == replica.name => {
                for (hold, _) in all {
                    replica.book.tombstone_lost(hold);
                }
            }
            Statement::Book {
                handle, own: true, ..
            } if self.flaw == Some(Flaw::UncertainIsRefused) => {
                let handle = &self.handles[handle];
                replica
                    .book
                    .end_commit(handle.id, &handle.meters, Outcome::Refused);
            }
            // Until it is certain.
            Statement::Book { own: true, .. } => self.send(index, statement),
            _ => {}
        }
    }
}
