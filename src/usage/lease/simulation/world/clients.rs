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
        let mut standing = *standing;
        if self.flaw == Some(Flaw::NoHorizon) {
            standing.horizon = Boot(u64::MAX);
        }
        if wish.tries == 0 {
            self.counts.attempts += 1;
        }
        let before = sights(replica, &meters);
        let reserved = replica.book.reserve(&ask, &standing);
        let is_held = matches!(reserved, Reserved::Held(_));
        if !is_held && before != sights(replica, &meters) {
            self.wrong = Some(format!("denied, and yet held: {before:?}"));
        }
        let since = self.order;
        self.send_operations(index);
        match reserved {
            Reserved::Held(held) => {
                self.waiting.remove(&wish.id);
                let handle = self.handle_of(index, held, &wish, meters);
                self.outcomes.insert(wish.id, handle);
                if wish.goes_on {
                    self.plan(handle, wish.ttl);
                }
            }
            Reserved::Enough => unreachable!("nobody only looks"),
            Reserved::Short(short) if !tried => {
                if wish.told {
                    self.recall(index, short);
                }
                wish.tries += 1;
                let waiting = self.waiting.entry(wish.id).or_insert(Waiting {
                    replica: index,
                    wish,
                    short,
                    since,
                    looks_at: 0,
                });
                waiting.wish = wish;
                if waiting.looks_at <= self.now {
                    let wait = match (wish.told, self.calm) {
                        (false, _) => RECALL_MS,
                        (true, true) => self.dice.between(15, 30),
                        (true, false) => self.dice.between(30, 90),
                    };
                    waiting.looks_at = self.now + wait;
                    let to = Some((index, self.replicas[index].process));
                    self.push(wait, to, Event::Look(wish.id));
                }
            }
            Reserved::Short(_) => self.deny(wish.id),
            Reserved::Refused(Refusal::BeyondHorizon) if wish.tries < 5 => {
                let registration = &mut self.replicas[index].registration;
                registration.want_until(Boot(now.0 + wish.ttl + 50));
                let heartbeat = registration.heartbeat(now);
                self.send(index, Statement::Heartbeat(heartbeat));
                wish.tries += 1;
                let wait = self.dice.between(10, 25);
                let to = Some((index, self.replicas[index].process));
                self.push(wait, to, Event::Wish(wish));
            }
            Reserved::Refused(_) => {
                self.counts.refused += 1;
                self.waiting.remove(&wish.id);
                self.elsewhere(Event::Wish(wish));
            }
        }
    }

    fn handle_of(&mut self, index: usize, held: Held, wish: &Wish, meters: Vec<MeterKey>) -> usize {
        let replica = &self.replicas[index];
        let (owner, expires) = (replica.name, replica.when(held.expires));
        if let Some(handle) = self.by_hold.get(&(owner, held.id)) {
            self.counts.held_again += 1;
            return *handle;
        }
        self.counts.held += 1;
        self.counts.held_twice += u64::from(!self.requests.insert(wish.request));
        let handle = self.handles.len();
        self.handles.push(Handle {
            owner,
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
        self.live.push(handle);
        self.by_hold.insert((owner, held.id), handle);
        handle
    }

    fn deny(&mut self, wish: u64) {
        self.counts.denied += 1;
        self.waiting.remove(&wish);
    }

    fn recall(&mut self, index: usize, short: [Option<MeterKey>; 2]) {
        if self.flaw == Some(Flaw::NoRecall) {
            return;
        }
        for key in short.into_iter().flatten() {
            let last = self.recalled.get(&(index, key));
            if last.is_some_and(|last| self.now - last < 40) {
                continue;
            }
            self.recalled.insert((index, key), self.now);
            self.counts.recalls += 1;
            for other in (0..REPLICAS).filter(|other| *other != index) {
                if let Some(delay) = self.delay(other) {
                    self.push(delay, Some((other, 0)), Event::Recall(key));
                }
            }
        }
    }

    /// An operation was answered: whoever waited for it looks again, or has no more to hope for.
    pub(super) fn told(&mut self, index: usize, call: u64, key: MeterKey, brought: Brought) {
        let waits = |waiting: &&Waiting| {
            waiting.replica == index && waiting.since < call && waiting.short.contains(&Some(key))
        };
        let waiting = self.waiting.values().filter(waits);
        let wishes: Vec<Wish> = waiting.map(|waiting| waiting.wish).collect();
        let now = self.replicas[index].clock(self.now);
        let standing = self.replicas[index].registration.standing(now);
        for mut wish in wishes {
            if brought == Brought::NothingAnywhere && wish.mode == Mode::AllOrNothing {
                self.deny(wish.id);
            } else if !wish.told || brought == Brought::Some {
                if !std::mem::replace(&mut wish.told, true) {
                    // From now on it looks again by itself.
                    self.waiting.remove(&wish.id);
                }
                self.admit(index, wish, &standing);
            }
        }
    }

    pub(super) fn plan(&mut self, handle: usize, ttl: u64) {
        let Handle {
            request, tokens, ..
        } = self.handles[handle];
        let fresh = if self.manners.overrun && self.dice.percent(15) {
            self.dice.tokens(tokens, 2 * tokens + 1)
        } else {
            // Mostly little, so that the same tokens are sold again and again; at times all.
            match self.dice.between(0, 20) {
                0 => tokens,
                _ if self.dice.percent(self.manners.all_percent) => tokens,
                1..=3 => self.dice.tokens(0, tokens + 1),
                4..=11 => self.dice.tokens(0, tokens / 8 + 2).min(tokens),
                _ => 0,
            }
        };
        let same = !self.dice.percent(20);
        let actual = match self.actuals.get(&request) {
            Some(actual) if same && *actual <= tokens => *actual,
            _ => fresh,
        };
        self.actuals.insert(request, actual);
        let late = self.manners.late && self.dice.percent(20);
        let part = self.dice.between(2, if late { 250 } else { 95 });
        let then = (ttl * part / 100).min(1_500);
        let after = then + self.dice.between(1, 200);
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
                if self.flaw == Some(Flaw::AcknowledgedBeforeBooked) {
                    self.acknowledge(handle, actual);
                }
                let replica = &mut self.replicas[index];
                if own
                    && let Begun::Commit = replica.book.begin_commit(id)
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
                self.counts.released_elsewhere += u64::from(!own);
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

/// What a replica has on meters.
fn sights(replica: &Replica, meters: &[MeterKey]) -> (usize, [Sight; 2]) {
    let mut all = [Sight::default(); 2];
    for (sight, key) in all.iter_mut().zip(meters) {
        *sight = replica.book.sight(*key).unwrap_or_default();
    }
    (replica.book.holds(), all)
}
