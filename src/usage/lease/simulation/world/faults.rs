//! Faults, and what happens to no replica in particular.

use super::*;

/// Where limits only grow, in a long run.
const MAX_LIMIT: Tokens = 5_000;

impl World {
    pub(super) fn start(&mut self, replica: usize) {
        self.names += 1;
        self.postgres.register(self.names, self.now);
        self.replicas[replica].start(self.names);
        let to = Some((replica, self.replicas[replica].process));
        self.push(0, to, Event::Heartbeat);
        self.push(TICK_MS, to, Event::Tick);
    }

    /// What happens to no replica in particular; says to which it did after all.
    pub(super) fn happen(&mut self, event: Event) -> Option<usize> {
        match event {
            Event::Arrive(call) => self.arrive(call),
            Event::Decide(call, transaction) => self.decide(call, transaction),
            Event::Commit(call, transaction) => self.end(call, &transaction),
            Event::Reap => {
                self.counts.reaped += self.postgres.reap(self.now) as u64;
                if self.calm || self.dice.percent(10) {
                    self.postgres.sweep(self.now);
                }
                self.push(120, None, Event::Reap);
            }
            Event::Fault if !self.calm => self.fault(),
            Event::Restart => {
                if let Some(replica) = self.replicas.iter().position(|replica| !replica.up) {
                    self.start(replica);
                }
            }
            Event::Change if !self.calm => self.change(),
            Event::Arrival if !self.calm => return self.arrival(),
            _ => {}
        }
        None
    }

    /// A tier changes: where all must hold exactly only upwards.
    fn change(&mut self) {
        let user = self.any_user();
        let model = [ModelKey::TOTAL, MODELS[1]][self.dice.between(0, 2) as usize];
        let limit = self.postgres.limits.get_mut(&(user, model));
        let limit = limit.expect("limited");
        *limit = if self.manners.strict {
            let more = self.dice.tokens(1, *limit / 8 + 2);
            (*limit).max((*limit + more).min(MAX_LIMIT))
        } else {
            self.dice.tokens(0, 800)
        };
        let ceiling = self.ceilings.get_mut(&(user, model)).expect("limited");
        *ceiling = (*limit).max(*ceiling);
        self.counts.limits_changed += 1;
        let delay = self.dice.between(100, 800);
        self.push(delay, None, Event::Change);
    }

    fn arrival(&mut self) -> Option<usize> {
        let user = self.any_user();
        let model = MODELS[self.dice.between(0, 2) as usize];
        let limit = self.postgres.limits[&(user, model_limit(model))];
        let part = [24, 24, 20, 10, 6, 3][self.dice.between(0, 6) as usize];
        let tokens = self.dice.tokens(1, (limit / part).max(2));
        let mut wish = self.wish(user, model, tokens);
        if self.dice.percent(20) {
            wish.mode = Mode::BestEffort;
        }
        wish.ttl = if self.dice.percent(self.manners.long_holds_percent) {
            self.dice.between(HOLD_MS, 3 * HOLD_MS)
        } else {
            self.dice.between(50, HOLD_MS)
        };
        if self.dice.percent(self.manners.twice_percent) {
            let twin = self.wish(user, model, tokens);
            let twin = Wish {
                id: twin.id,
                ..wish
            };
            let (replica, delay) = (self.any_replica(), self.dice.between(0, 150));
            self.push(delay, Some((replica, 0)), Event::Wish(twin));
        }
        let delay = self.dice.between(1, self.manners.pause_ms);
        self.push(delay, None, Event::Arrival);
        let index = self.any_replica();
        let replica = &self.replicas[index];
        if replica.up && replica.paused_until <= self.now {
            self.happen_at(index, Event::Wish(wish));
            return Some(index);
        }
        self.push(0, Some((index, 0)), Event::Wish(wish));
        None
    }

    fn fault(&mut self) {
        let index = self.any_replica();
        let most = [200, 1_500][self.dice.between(0, 2) as usize];
        let lasts = self.dice.between(20, most);
        let now = self.now;
        match self.dice.between(0, 10) {
            0..=2 if self.replicas[index].up => {
                self.replicas[index].crash();
                self.counts.crashes += 1;
                self.push(lasts, None, Event::Restart);
            }
            3..=5 => {
                self.replicas[index].paused_until = now + lasts;
                self.counts.pauses += 1;
            }
            6..=8 => {
                self.replicas[index].cut_until = now + lasts;
                self.counts.cuts += 1;
            }
            _ => {}
        }
        let delay = self.dice.between(100, 1_200);
        self.push(delay, None, Event::Fault);
    }
}
