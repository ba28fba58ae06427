//! Time, the network, clients and faults; and the watcher that checks every step.

mod calm;
mod clients;
mod faults;
mod network;
mod process;
mod watch;

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
            long_percent: [3, 30][dice.between(0, 2) as usize],
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
