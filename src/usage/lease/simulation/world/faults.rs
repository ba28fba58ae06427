//! Faults, and what happens to no replica in particular.

use super::*;

impl World {
    pub(super) fn start(&mut self, replica: usize) {
        self.names += 1;
        self.postgres.register(self.names, self.now);
        self.replicas[replica].start(self.names);
        let to = Some((replica, self.replicas[replica].process));
        self.push(0, to, Event::Heartbeat);
        self.push(TICK_MS, to, Event::Tick);
    }

    pub(super) fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive(call) => self.arrive(call),
            Event::Decide(call, mut transaction) => {
                if self.postgres.decide(&mut transaction) {
                    let long = self.dice.percent(self.manners.long_percent) && !self.calm;
                    let takes = self.dice.between(0, if long { 600 } else { 3 });
                    self.push(takes, None, Event::Commit(call, transaction));
                } else {
                    let wait = self.dice.between(1, 4);
                    self.push(wait, None, Event::Decide(call, transaction));
                }
            }
            Event::Commit(call, transaction) => {
                self.postgres.commit(&transaction);
                self.reply(call, Reply::Operation(transaction.answer()));
            }
            Event::Reap => {
                self.postgres.reap(self.now);
                self.push(150, None, Event::Reap);
            }
            Event::Fault if !self.calm => self.fault(),
            Event::Restart => {
                if let Some(replica) = self.replicas.iter().position(|replica| !replica.up) {
                    self.start(replica);
                }
            }
            Event::Change if !self.calm => {
                let user = self.users[self.dice.between(0, 2) as usize];
                let model = [ModelKey::TOTAL, MODELS[1]][self.dice.between(0, 2) as usize];
                let limit = self.dice.tokens(0, 4_000);
                self.postgres.limits.insert((user, model), limit);
                let ceiling = self.ceilings.get_mut(&(user, model)).expect("limited");
                *ceiling = limit.max(*ceiling);
                let delay = self.dice.between(200, 2_000);
                self.push(delay, None, Event::Change);
            }
            Event::Arrival if !self.calm => {
                let user = self.users[self.dice.between(0, 2) as usize];
                let model = MODELS[self.dice.between(0, 2) as usize];
                let limit = self.postgres.limits[&(user, model_limit(model))];
                let tokens = self.dice.tokens(1, (limit / 3).max(2));
                let mut wish = self.wish(user, model, tokens);
                if self.dice.percent(20) {
                    wish.mode = Mode::BestEffort;
                }
                wish.ttl = if self.dice.percent(self.manners.long_holds_percent) {
                    self.dice.between(HOLD_MS, 4 * HOLD_MS)
                } else {
                    self.dice.between(100, HOLD_MS)
                };
                let replica = self.any_replica();
                self.push(0, Some((replica, 0)), Event::Wish(wish));
                if self.dice.percent(12) {
                    let (replica, delay) = (self.any_replica(), self.dice.between(0, 400));
                    self.push(delay, Some((replica, 0)), Event::Wish(wish));
                }
                let delay = self.dice.between(2, 60);
                self.push(delay, None, Event::Arrival);
            }
            _ => {}
        }
    }

    pub(super) fn fault(&mut self) {
        let index = self.any_replica();
        let lasts = self.dice.between(50, 4_000);
        let now = self.now;
        match self.dice.between(0, 10) {
            0..=2 if self.replicas[index].up => {
                self.replicas[index].crash();
                self.counts.crashes += 1;
                self.push(lasts, None, Event::Restart);
            }
            3..=5 => self.replicas[index].paused_until = now + lasts,
            6..=8 => self.replicas[index].cut_until = now + lasts,
            _ => {}
        }
        let delay = self.dice.between(300, 2_500);
        self.push(delay, None, Event::Fault);
    }
}
