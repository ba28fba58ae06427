//! Time, the network, clients and faults; and the watcher that checks every step.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use uuid::Uuid;

use super::{
    Dice, Flaw, HEARTBEAT_MS, HOLD_MS, MONTH_MS, RECALL_MS, TICK_MS, TIMEOUT_MS, period_at,
    postgres::{Booked, Name, Postgres, Record, Transaction},
    replica::Replica,
};
use crate::{
    model::{Period, UserId},
    usage::lease::{
        Answer, Ask, Begun, Boot, Ended, Ending, Heartbeat, HoldId, Kind, MeterKey, Mode, ModelKey,
        Operation, Outcome, Refusal, RequestKey, Reserved, Standing, Tokens,
    },
};

const REPLICAS: usize = 3;
/// A model without a limit of its own, and one with.
const MODELS: [ModelKey; 2] = [ModelKey(1), ModelKey(2)];

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    pub(super) held: u64,
    pub(super) denied: u64,
    pub(super) refused: u64,
    pub(super) booked: u64,
    pub(super) foreign: u64,
    pub(super) replayed: u64,
    pub(super) conflicts: u64,
    pub(super) late: u64,
    pub(super) released: u64,
    pub(super) extended: u64,
    pub(super) tombstones: u64,
    pub(super) crashes: u64,
    pub(super) rejoined: u64,
    pub(super) spent_to_the_last: u64,
    /// Steps at which nothing was left of a meter.
    pub(super) full: u64,
}

impl Counts {
    fn all(&mut self) -> [&mut u64; 15] {
        [
            &mut self.held,
            &mut self.denied,
            &mut self.refused,
            &mut self.booked,
            &mut self.foreign,
            &mut self.replayed,
            &mut self.conflicts,
            &mut self.late,
            &mut self.released,
            &mut self.extended,
            &mut self.tombstones,
            &mut self.crashes,
            &mut self.rejoined,
            &mut self.spent_to_the_last,
            &mut self.full,
        ]
    }

    pub(super) fn add(&mut self, other: &Self) {
        let mut other = *other;
        for (sum, more) in self.all().into_iter().zip(other.all()) {
            *sum += *more;
        }
    }

    /// A simulation in which nothing happens finds nothing.
    pub(super) fn check_that_much_happened(&mut self) {
        let all = *self;
        assert!(self.all().into_iter().all(|count| *count > 0), "{all:?}");
    }
}

/// A hold as its client knows it, and what became of it.
struct Handle {
    owner: Name,
    id: HoldId,
    model: ModelKey,
    meters: Vec<MeterKey>,
    request: RequestKey,
    tokens: Tokens,
    /// By true time.
    expires: u64,
    released: bool,
    landed: bool,
    /// What it used counts as spent in the owner's lease.
    covered: bool,
}

/// What a seed lets happen beside faults.
#[derive(Clone, Copy)]
struct Manners {
    /// No late commits, no overruns, no changes of limits: the sum must hold exactly.
    strict: bool,
    late: bool,
    overrun: bool,
    slow_percent: u64,
    /// Of operations whose transaction is long.
    long_percent: u64,
    /// Of holds that last longer than the standard.
    long_holds_percent: u64,
    /// Of messages each way.
    lost_percent: u64,
}

impl Handle {
    /// Whether a commit that arrives now is in time: its client has not ended the hold and it has not
    /// expired, or it has and Postgres was not told so.
    fn is_live(&self, now: u64, postgres: &Postgres) -> bool {
        !self.landed
            && ((!self.released && now < self.expires) || postgres.is_open(self.owner, self.id))
    }

    fn user(&self) -> UserId {
        self.meters[0].user
    }

    fn period(&self) -> Period {
        self.meters[0].period
    }
}

#[derive(Clone, Debug)]
pub(super) enum Statement {
    Heartbeat(Heartbeat),
    Settlements,
    Forget(Vec<HoldId>),
    Operation(MeterKey, Operation),
    Book {
        handle: usize,
        actual: Tokens,
        own: bool,
    },
    Tombstones(Vec<(HoldId, Ending)>),
    Release(usize),
    /// Of [`Flaw::SettlementApart`].
    Settle(usize, Tokens),
}

#[derive(Clone, Debug)]
struct Call {
    replica: usize,
    process: u64,
    name: Name,
    id: u64,
    statement: Statement,
}

enum Reply {
    Alive(bool),
    Settlements(Vec<(HoldId, Kind)>),
    Operation(Option<Answer>),
    Booked(Booked),
    Tombstones(Vec<(HoldId, Kind)>),
    Nothing,
}

#[derive(Clone, Copy)]
struct Wish {
    id: u64,
    user: UserId,
    model: ModelKey,
    tokens: Tokens,
    mode: Mode,
    ttl: u64,
    request: RequestKey,
    started: u64,
    tries: u32,
    /// Whether its client goes on to settle what it gets.
    goes_on: bool,
}

#[derive(Clone, Copy)]
enum Step {
    Commit(Tokens),
    Release,
    Extend(u64),
}

enum Event {
    Tick,
    Heartbeat,
    Answer(Call, Reply),
    Timeout(u64),
    Wish(Wish),
    Admit(Wish, Standing),
    Step {
        handle: usize,
        step: Step,
        tries: u32,
    },
    Recall(MeterKey),
    // Of no replica.
    Arrive(Call),
    Decide(Call, Transaction),
    Commit(Call, Transaction),
    Reap,
    Fault,
    Restart,
    Change,
    Arrival,
}

/// What an event is for: nobody, or a process of a replica (0: any).
type To = Option<(usize, u64)>;

pub(super) struct World {
    flaw: Option<Flaw>,
    dice: Dice,
    now: u64,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, (To, Event)>,
    postgres: Postgres,
    replicas: Vec<Replica>,
    names: Name,
    handles: Vec<Handle>,
    by_hold: BTreeMap<(Name, HoldId), usize>,
    live: Vec<usize>,
    /// What each request really used, so that its repeats say the same.
    actuals: BTreeMap<RequestKey, Tokens>,
    outcomes: BTreeMap<u64, Option<usize>>,
    users: Vec<UserId>,
    ceilings: BTreeMap<(UserId, ModelKey), Tokens>,
    /// What was charged without a live hold.
    excess: BTreeMap<MeterKey, Tokens>,
    calm: bool,
    calm_month: Option<Period>,
    manners: Manners,
    pub(super) counts: Counts,
}

impl World {
    pub(super) fn new(seed: u64, flaw: Option<Flaw>) -> Self {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9).wrapping_add(1));
        let users: Vec<UserId> = (1..3)
            .map(|n| UserId(Uuid::from_u128(n << 64 | n)))
            .collect();
        let strict = dice.percent(80);
        let manners = Manners {
            strict,
            late: !strict && dice.percent(60),
            overrun: !strict && dice.percent(40),
            slow_percent: [4, 15, 30][dice.between(0, 3) as usize],
            long_percent: [3, 50][dice.between(0, 2) as usize],
            lost_percent: [2, 15][dice.between(0, 2) as usize],
            long_holds_percent: [5, 40][dice.between(0, 2) as usize],
        };
        let mut postgres = Postgres::default();
        postgres.flaw = flaw;
        for user in &users {
            let limit = dice.tokens(40, 800);
            let all = [(ModelKey::TOTAL, limit), (MODELS[1], limit * 2 / 5)];
            for (model, limit) in all {
                postgres.limits.insert((*user, model), limit);
            }
        }
        let replicas = (0..REPLICAS)
            .map(|_| {
                let rate = dice.between(995_500, 1_004_500);
                Replica::new(rate, dice.between(0, 1 << 20), dice.between(0, 20))
            })
            .collect();
        let mut world = Self {
            flaw,
            now: 1_000,
            order: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            ceilings: postgres.limits.clone(),
            postgres,
            replicas,
            names: 0,
            handles: Vec::new(),
            by_hold: BTreeMap::new(),
            live: Vec::new(),
            actuals: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            users,
            excess: BTreeMap::new(),
            calm: false,
            calm_month: None,
            manners,
            counts: Counts::default(),
            dice,
        };
        for replica in 0..REPLICAS {
            world.start(replica);
        }
        world.push(50, None, Event::Reap);
        world.push(400, None, Event::Fault);
        if !strict && world.dice.percent(60) {
            world.push(300, None, Event::Change);
        }
        world.push(30, None, Event::Arrival);
        world
    }

    /// Everything that may go wrong, for so many steps.
    pub(super) fn storm(&mut self, steps: u64) -> Result<(), String> {
        for _ in 0..steps {
            self.step()?;
        }
        Ok(())
    }

    /// Then all is well and nobody asks: nothing may be left over, and all of every limit can be
    /// spent, although another replica has some of it.
    pub(super) fn calm(&mut self) -> Result<(), String> {
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
        self.run_for(5_000)?;
        for _ in 0..14 {
            if self.check_rest().is_ok() {
                break;
            }
            self.run_for(500)?;
        }
        self.check_rest()?;
        for user in self.users.clone() {
            for model in MODELS {
                self.spend_to_the_last(user, model)?;
            }
        }
        self.postgres.check_sums()
    }

    fn check_rest(&mut self) -> Result<(), String> {
        self.postgres.check_sums()?;
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

    fn spend_to_the_last(&mut self, user: UserId, model: ModelKey) -> Result<(), String> {
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
        self.counts.spent_to_the_last += 1;
        match self.left(user, model) {
            0 => Ok(()),
            left => Err(format!("{left} left after all was spent")),
        }
    }

    /// What is neither booked nor held, of the model and in all.
    fn left(&self, user: UserId, model: ModelKey) -> Tokens {
        let meters = meters(user, self.period(self.now), model);
        let left = |key: &MeterKey| {
            let limit = self.postgres.limits[&(key.user, key.model)];
            limit - self.postgres.committed_of(*key)
        };
        meters.iter().map(left).min().expect("the total")
    }

    fn ask(
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
        Ok(self.outcomes.get(&wish.id).copied().flatten())
    }

    fn wish(&mut self, user: UserId, model: ModelKey, tokens: Tokens) -> Wish {
        self.order += 1;
        Wish {
            id: self.order,
            user,
            model,
            tokens,
            mode: Mode::AllOrNothing,
            ttl: HOLD_MS,
            request: RequestKey(u128::from(self.dice.next()) << 64 | u128::from(self.order)),
            started: self.now,
            tries: 0,
            goes_on: true,
        }
    }

    fn push(&mut self, delay: u64, to: To, event: Event) {
        self.push_at(self.now + delay, to, event);
    }

    fn push_at(&mut self, at: u64, to: To, event: Event) {
        self.order += 1;
        self.queue.push(Reverse((at, self.order)));
        self.events.insert(self.order, (to, event));
    }

    fn run_for(&mut self, millis: u64) -> Result<(), String> {
        let until = self.now + millis;
        while let Some(Reverse((at, _))) = self.queue.peek()
            && *at <= until
        {
            self.step()?;
        }
        self.now = until;
        Ok(())
    }

    /// The next event that is still of interest, and then the checks.
    fn step(&mut self) -> Result<(), String> {
        loop {
            let Reverse((at, order)) = self.queue.pop().ok_or("nothing left to happen")?;
            let (to, event) = self.events.remove(&order).expect("queued");
            self.now = self.now.max(at);
            let Some((index, process)) = to else {
                self.happen(event);
                return self.check(None);
            };
            let replica = &self.replicas[index];
            if !replica.up || (process != 0 && process != replica.process) {
                if let Event::Step { .. } | Event::Wish(_) = event {
                    self.elsewhere(event);
                }
                continue;
            }
            if replica.paused_until > self.now {
                self.push_at(replica.paused_until, to, event);
                continue;
            }
            if let Event::Timeout(call) = event
                && !replica.pending.contains_key(&call)
            {
                continue;
            }
            self.happen_at(index, event);
            return self.check(Some(index));
        }
    }

    /// A client whose replica does not answer asks another, a few times.
    fn elsewhere(&mut self, event: Event) {
        let other = self.any_replica();
        match event {
            Event::Step {
                handle,
                step,
                tries,
            } if tries < 4 => {
                let tries = tries + 1;
                self.push(
                    50,
                    Some((other, 0)),
                    Event::Step {
                        handle,
                        step,
                        tries,
                    },
                );
            }
            Event::Wish(wish) if wish.tries == 0 && wish.goes_on => {
                let tries = 1;
                self.push(50, Some((other, 0)), Event::Wish(Wish { tries, ..wish }));
            }
            _ => {}
        }
    }

    fn period(&self, at: u64) -> Period {
        self.calm_month.unwrap_or_else(|| period_at(at))
    }

    fn any_replica(&mut self) -> usize {
        self.dice.between(0, REPLICAS as u64) as usize
    }

    fn check(&mut self, touched: Option<usize>) -> Result<(), String> {
        if let Some(index) = touched {
            self.replicas[index].book.check();
        }
        self.postgres.check()?;
        if let Some(index) = touched {
            self.check_admission(index)?;
        }
        let (now, postgres) = (self.now, &self.postgres);
        let handles = &self.handles;
        self.live
            .retain(|handle| handles[*handle].is_live(now, postgres));
        let mut held: BTreeMap<MeterKey, Tokens> = BTreeMap::new();
        for handle in &self.live {
            for key in &handles[*handle].meters {
                *held.entry(*key).or_default() += handles[*handle].tokens;
            }
        }
        let months = [period_at(now.saturating_sub(MONTH_MS)), period_at(now)];
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
            // What may be sold without asking anybody counts as sold.
            for replica in self.replicas.iter().filter(|replica| replica.admits(now)) {
                held += replica.book.sight(key).map_or(0, |sight| sight.free);
            }
            let Some(limit) = self.ceilings.get(&(key.user, key.model)) else {
                continue;
            };
            let committed = self.postgres.committed_of(key);
            let excess = self.excess.get(&key).copied().unwrap_or(0);
            if self.manners.strict && (excess != 0 || *limit != postgres.limits[&(key.user, key.model)]) {
                return Err(format!("a strict seed excuses {excess} of {limit}"));
            }
            if committed + held > limit + excess {
                return Err(format!(
                    "oversold at {now}: {committed} committed, {held} held, limit {limit}, late {excess}"
                ));
            }
            self.counts.full += u64::from(self.manners.strict && committed + held == limit + excess);
        }
        Ok(())
    }

    /// The claim of `docs/quota.md`, by the watcher's own count of what is spent.
    fn check_leases(&self, meters: &BTreeMap<MeterKey, Tokens>) -> Result<(), String> {
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
                return Err(format!("oversold at {now}: {sum} booked or leased of {limit}"));
            }
        }
        Ok(())
    }

    /// Whoever admits is alive as Postgres knows, and its holds end within what Postgres knows.
    fn check_admission(&self, index: usize) -> Result<(), String> {
        let replica = &self.replicas[index];
        let now = self.now;
        let row = self.postgres.replicas.get(&replica.name);
        if replica.admits(now) && !row.is_some_and(|(row, dead)| !dead && now < row.expires_at) {
            return Err(format!("stale at {now}: admits, and Postgres has {row:?}"));
        }
        for handle in self.live.iter().map(|handle| &self.handles[*handle]) {
            if handle.owner == replica.name
                && now < handle.expires
                && !row.is_some_and(|(row, _)| handle.expires <= row.holds_until)
            {
                let until = handle.expires;
                return Err(format!("unknown at {now}: a hold until {until}, {row:?}"));
            }
        }
        Ok(())
    }

    // Faults and the passing of time.

    fn start(&mut self, replica: usize) {
        self.names += 1;
        self.postgres.register(self.names, self.now);
        self.replicas[replica].start(self.names);
        let to = Some((replica, self.replicas[replica].process));
        self.push(0, to, Event::Heartbeat);
        self.push(TICK_MS, to, Event::Tick);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrive(call) => self.arrive(call),
            Event::Decide(call, mut transaction) => {
                if self.postgres.decide(&mut transaction) {
                    let long = self.dice.percent(self.manners.long_percent) && !self.calm;
                    let takes = self.dice.between(0, if long { 150 } else { 3 });
                    self.push(takes, None, Event::Commit(call, transaction));
                } else {
                    self.push(1, None, Event::Decide(call, transaction));
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

    fn fault(&mut self) {
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

    // The network, and Postgres behind it.

    /// `None`: lost.
    fn delay(&mut self, replica: usize) -> Option<u64> {
        if self.calm {
            return Some(self.dice.between(1, 4));
        }
        if self.replicas[replica].cut_until > self.now || self.dice.percent(self.manners.lost_percent) {
            return None;
        }
        let slow = self.dice.percent(self.manners.slow_percent);
        Some(self.dice.between(1, if slow { 1_500 } else { 15 }))
    }

    fn send(&mut self, replica: usize, statement: Statement) {
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

    fn reply(&mut self, call: Call, reply: Reply) {
        if let Some(delay) = self.delay(call.replica) {
            let to = Some((call.replica, call.process));
            self.push(delay, to, Event::Answer(call, reply));
        }
    }

    fn arrive(&mut self, call: Call) {
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

    fn book(&mut self, index: usize, actual: Tokens, own: bool) -> Booked {
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
    fn cover(&mut self, index: usize, actual: Tokens) {
        let handle = &mut self.handles[index];
        if !std::mem::replace(&mut handle.covered, true) {
            for key in &handle.meters {
                let covered = self.postgres.covered.entry((*key, handle.owner));
                *covered.or_default() += actual.min(handle.tokens);
            }
        }
    }

    // What a replica does.

    fn happen_at(&mut self, index: usize, event: Event) {
        let now = self.replicas[index].clock(self.now);
        let to = Some((index, self.replicas[index].process));
        match event {
            Event::Tick => {
                self.replicas[index].book.sweep(now, 1_000);
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
                    let delay = self.dice.between(0, 2_500);
                    self.push(delay, to, Event::Admit(wish, standing));
                } else {
                    self.admit(index, wish, &standing);
                }
            }
            Event::Admit(wish, standing) => self.admit(index, wish, &standing),
            Event::Step { handle, step, .. } => self.settle(index, handle, step),
            Event::Recall(key) => {
                self.replicas[index].book.recall(key, now);
                self.send_operations(index);
            }
            _ => unreachable!("of no replica"),
        }
    }

    fn send_operations(&mut self, index: usize) {
        let now = self.replicas[index].clock(self.now);
        for (key, operation) in self.replicas[index].book.operations(now, 100) {
            self.send(index, Statement::Operation(key, operation));
        }
    }

    fn send_tombstones(&mut self, index: usize) {
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

    fn answer(&mut self, index: usize, call: Call, reply: Reply) {
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
                self.send(index, Statement::Settlements);
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
                replica.book.answered(key, operation.number, &answer, now);
                // Whatever came up meanwhile: a recall does not wait for the next tick.
                self.send_operations(index);
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
                } else if self.flaw == Some(Flaw::SettlementApart) && booked == Booked::Now {
                    self.send(index, Statement::Settle(handle, actual));
                }
            }
            (statement, _) => self.lost(index, name, statement),
        }
    }

    fn settled(&mut self, index: usize, all: Vec<(HoldId, Kind)>) {
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
    fn lost(&mut self, index: usize, name: Name, statement: Statement) {
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

    // What clients do.

    fn admit(&mut self, index: usize, mut wish: Wish, standing: &Standing) {
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

    fn again(&mut self, index: usize, wish: Wish) {
        let delay = self.dice.between(15, 35);
        let to = Some((index, self.replicas[index].process));
        self.push(delay, to, Event::Wish(wish));
    }

    fn plan(&mut self, handle: usize, ttl: u64) {
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
            let own = self.replicas.iter().position(|replica| replica.name == owner);
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

    fn settle(&mut self, index: usize, handle: usize, step: Step) {
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

/// What limits a model: the total, and the model itself if it is limited.
fn meters(user: UserId, period: Period, model: ModelKey) -> Vec<MeterKey> {
    let key = |model| MeterKey {
        user,
        period,
        model,
    };
    let mut all = vec![key(ModelKey::TOTAL)];
    if model == MODELS[1] {
        all.push(key(model));
    }
    all
}

fn model_limit(model: ModelKey) -> ModelKey {
    if model == MODELS[1] {
        model
    } else {
        ModelKey::TOTAL
    }
}
