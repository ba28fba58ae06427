//! After the storm: nothing may be left over, and all can be spent.

use super::*;

impl World {
    /// Then all is well and nobody asks: nothing may be left over, and all of every limit can be
    /// spent, although another replica has some of it.
    pub(in super::super) fn calm(&mut self) -> Result<(), String> {
        let counts = self.counts;
        self.calm = true;
        // A month of its own, that lasts.
        self.now = (self.now / MONTH_MS + 1) * MONTH_MS;
        self.calm_month = Some(period_at(self.now));
        for replica in 0..REPLICAS {
            self.replicas[replica].paused_until = 0;
            self.replicas[replica].cut_until = 0;
            if !self.replicas[replica].up {
                self.start(replica);
            }
        }
        // As long as what was sent may be under way, and then until nothing is left.
        self.run_for(2_500)?;
        for _ in 0..14 {
            if self.check_rest().is_ok() {
                break;
            }
            self.run_for(300)?;
        }
        self.check_rest()?;
        for user in self.users.clone() {
            for model in MODELS {
                self.spend_to_the_last(user, model)?;
            }
        }
        self.check_rest_of_all()?;
        // They are the storm's.
        self.counts = counts;
        self.calm = false;
        self.calm_month = None;
        self.now = (self.now / MONTH_MS + 1) * MONTH_MS;
        self.month = period_at(self.now);
        self.stir();
        Ok(())
    }

    /// What takes long to look at.
    fn check_rest_of_all(&self) -> Result<(), String> {
        self.postgres.check_sums()?;
        if self.charged != self.postgres.committed {
            return Err("charged is not what distinct records say".into());
        }
        self.check_acknowledged(&self.acknowledged)
    }

    pub(super) fn check_rest(&mut self) -> Result<(), String> {
        if let Some((key, leased)) = self
            .postgres
            .leased
            .iter()
            .find(|(_, leased)| **leased != 0)
        {
            return Err(format!("at rest {leased} are leased of {key:?}"));
        }
        if !self.postgres.settlements.is_empty() {
            return Err(format!("at rest: {:?}", self.postgres.settlements));
        }
        match self
            .replicas
            .iter()
            .map(|replica| replica.book.holds())
            .sum()
        {
            0 => Ok(()),
            holds => Err(format!("at rest {holds} holds")),
        }
    }

    pub(super) fn spend_to_the_last(
        &mut self,
        user: UserId,
        model: ModelKey,
    ) -> Result<(), String> {
        let left = self.left(user, model);
        if left < 2 {
            return Ok(());
        }
        let hoarder = self.dice.between(0, REPLICAS as u64) as usize;
        let other = (hoarder + 1) % REPLICAS;
        let first = self.ask(hoarder, user, model, 1)?;
        let handle = first.ok_or_else(|| format!("{left} left and 1 denied"))?;
        self.push(
            1,
            Some((hoarder, 0)),
            Event::Step {
                handle,
                step: Step::Commit(1),
                tries: 0,
            },
        );
        self.run_for(100)?;
        let all = self.ask(other, user, model, left - 1)?;
        let handle = all.ok_or_else(|| format!("{left} left and not granted in time"))?;
        self.push(
            1,
            Some((other, 0)),
            Event::Step {
                handle,
                step: Step::Commit(left - 1),
                tries: 0,
            },
        );
        self.run_for(100)?;
        match self.left(user, model) {
            0 => Ok(()),
            left => Err(format!("{left} left after all was spent")),
        }
    }

    /// What is neither booked nor held, of the model and in all.
    pub(super) fn left(&self, user: UserId, model: ModelKey) -> Tokens {
        let meters = meters(user, self.period(self.now), model);
        let left = |key: &MeterKey| {
            let limit = self.postgres.limits[&(key.user, key.model)];
            limit - self.postgres.committed_of(*key)
        };
        meters.iter().map(left).min().expect("the total")
    }

    pub(super) fn ask(
        &mut self,
        replica: usize,
        user: UserId,
        model: ModelKey,
        tokens: Tokens,
    ) -> Result<Option<usize>, String> {
        let mut wish = self.wish(user, model, tokens);
        wish.goes_on = false;
        self.push(0, Some((replica, 0)), Event::Wish(wish));
        // The last try may begin at the bound.
        self.run_for(RECALL_MS + 100)?;
        Ok(self.outcomes.get(&wish.id).copied())
    }
}
