//! What clients do.

use super::*;

impl World {
    pub(super) fn admit(&mut self, index: usize, mut wish: Wish, standing: &Standing) {
        let period = self.period(self.now - self.replicas[index].bias);
        let replica = &mut self.replicas[index];
        let meters = meters(wish.user, period, wish.model);
        let now = replica.clock(self.now);
        // Best effort takes what there is once all that was wanted is not to be had.
        let tried = self.now - wish.started >= RECALL_MS;
        let ask = Ask {
            request: wish.request,
            meters: &meters,
            tokens: wish.tokens,
            mode: if tried { wish.mode } else { Mode::AllOrNothing },
            lasts_ms: wish.ttl,
        };
        let reserved = replica.book.reserve(&ask, standing);
        self.send_operations(index);
        match reserved {
            Reserved::Held(held) => {
                let expires = self.replicas[index].when(held.expires);
                let name = self.replicas[index].name;
                let handle = *self.by_hold.entry((name, held.id)).or_insert_with(|| {
                    self.handles.push(Handle {
                        owner: name,
                        id: held.id,
                        model: wish.model,
                        meters,
                        request: wish.request,
                        tokens: held.tokens,
                        expires,
                        released: false,
                        landed: false,
                        covered: false,
                    });
                    self.live.push(self.handles.len() - 1);
                    self.handles.len() - 1
                });
                self.counts.held += 1;
                self.outcomes.insert(wish.id, Some(handle));
                if wish.goes_on {
                    self.plan(handle, wish.ttl);
                }
            }
            Reserved::Enough => unreachable!("nobody only looks"),
            Reserved::Short(short) => {
                if tried {
                    self.counts.denied += 1;
                    self.outcomes.insert(wish.id, None);
                    return;
                }
                if wish.tries > 0 && self.flaw != Some(Flaw::NoRecall) {
                    for other in (0..REPLICAS).filter(|other| *other != index) {
                        let Some(delay) = self.delay(other) else {
                            continue;
                        };
                        for key in short.into_iter().flatten() {
                            self.push(delay, Some((other, 0)), Event::Recall(key));
                        }
                    }
                }
                wish.tries += 1;
                self.again(index, wish);
            }
            Reserved::Refused(Refusal::BeyondHorizon) if wish.tries < 5 => {
                let registration = &mut self.replicas[index].registration;
                registration.want_until(Boot(now.0 + wish.ttl + 100));
                let heartbeat = registration.heartbeat(now);
                self.send(index, Statement::Heartbeat(heartbeat));
                wish.tries += 1;
                self.again(index, wish);
            }
            Reserved::Refused(_) => {
                self.counts.refused += 1;
                self.outcomes.insert(wish.id, None);
            }
        }
    }

    pub(super) fn again(&mut self, index: usize, wish: Wish) {
        let delay = self.dice.between(15, 35);
        let to = Some((index, self.replicas[index].process));
        self.push(delay, to, Event::Wish(wish));
    }

    pub(super) fn plan(&mut self, handle: usize, ttl: u64) {
        let Handle {
            request, tokens, ..
        } = self.handles[handle];
        let fresh = if self.manners.overrun && self.dice.percent(15) {
            self.dice.tokens(tokens, 2 * tokens + 1)
        } else {
            // Mostly little, so that the same tokens are sold again and again; at times all.
            match self.dice.between(0, 10) {
                0 => tokens,
                1 | 2 => self.dice.tokens(0, tokens + 1),
                _ => 0,
            }
        };
        let same = !self.dice.percent(10);
        let actual = match self.actuals.get(&request) {
            Some(actual) if same && *actual <= tokens => *actual,
            _ => fresh,
        };
        self.actuals.insert(request, actual);
        let late = self.manners.late && self.dice.percent(20);
        let part = self.dice.between(2, if late { 250 } else { 75 });
        let then = (ttl * part / 100).min(4_000);
        let after = then + self.dice.between(1, 600);
        let commit = Step::Commit(actual);
        let steps: &[(u64, Step)] = match self.dice.between(0, 100) {
            0..=39 => &[(then, commit)],
            40..=59 => &[(then, commit), (after, commit)],
            60..=69 => &[(then, commit), (after, Step::Release)],
            70..=83 => &[(then, Step::Release)],
            84..=87 if self.manners.late => &[(then, Step::Release), (after, commit)],
            88..=93 => &[
                (then, Step::Extend(ttl)),
                (after.min(then + ttl / 2), commit),
            ],
            _ => &[],
        };
        for (delay, step) in steps {
            let owner = self.handles[handle].owner;
            let own = self
                .replicas
                .iter()
                .position(|replica| replica.name == owner);
            let replica = match own {
                Some(own) if self.dice.percent(35) => own,
                _ => self.any_replica(),
            };
            let event = Event::Step {
                handle,
                step: *step,
                tries: 0,
            };
            self.push(*delay, Some((replica, 0)), event);
        }
    }

    pub(super) fn settle(&mut self, index: usize, handle: usize, step: Step) {
        let replica = &mut self.replicas[index];
        let now = replica.clock(self.now);
        let Handle { owner, id, .. } = self.handles[handle];
        let own = owner == replica.name;
        match step {
            Step::Commit(actual) => {
                if own
                    && let Begun::Commit { .. } = replica.book.begin_commit(id)
                    && self.flaw == Some(Flaw::SpentBeforeBooked)
                {
                    let outcome = Outcome::Booked { actual, new: true };
                    let meters = &self.handles[handle].meters;
                    replica.book.end_commit(id, meters, outcome);
                }
                self.send(
                    index,
                    Statement::Book {
                        handle,
                        actual,
                        own,
                    },
                );
            }
            Step::Release => {
                self.counts.released += 1;
                self.handles[handle].released = true;
                if own {
                    replica.book.release(id);
                    self.send_tombstones(index);
                } else {
                    self.send(index, Statement::Release(handle));
                }
            }
            Step::Extend(ttl) if own => {
                let standing = replica.registration.standing(now);
                if let Ok(expires) = replica.book.extend(id, ttl, &standing) {
                    self.handles[handle].expires = replica.when(expires);
                    self.counts.extended += 1;
                }
            }
            Step::Extend(_) => {}
        }
    }
}
