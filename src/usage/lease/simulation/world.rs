//! Time, the network, clients and faults; and the watcher that checks every step.

mod calm;
mod clients;
mod faults;
mod network;
mod process;
mod watch;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
};

use uuid::Uuid;

use super::{
    Dice, Flaw, HEARTBEAT_MS, HOLD_MS, MONTH_MS, RECALL_MS, TICK_MS, TIMEOUT_MS,
    counts::Counts,
    period_at,
    postgres::{Booked, Name, Postgres, Record, Transaction},
    replica::Replica,
};
use crate::{
    model::{Period, UserId},
    usage::lease::{
        Answer, Answered, Ask, Begun, Boot, Carried, Ended, Ending, Heartbeat, Held, HoldId, Kind,
        MeterKey, Mode, ModelKey, Operation, Outcome, Refusal, RequestKey, Reserved, Sight,
        Standing, Tokens,
    },
};

const REPLICAS: usize = 3;
/// A model without a limit of its own, and one with.
const MODELS: [ModelKey; 2] = [ModelKey(1), ModelKey(2)];

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
    /// No late commits, no overruns, no limits that shrink: the sum must hold exactly.
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
    /// Of wishes that are sent to another replica too.
    twice_percent: u64,
    /// Of holds that are used up.
    all_percent: u64,
    /// The longest time between two wishes.
    pause_ms: u64,
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
    /// With what others have.
    Operation(Option<(Answer, Tokens)>),
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
    /// Postgres has told that it has too little: others are asked.
    told: bool,
}

/// A wish that was short, at a replica.
struct Waiting {
    replica: usize,
    wish: Wish,
    short: [Option<MeterKey>; 2],
    /// What was sent from here on tells.
    since: u64,
    looks_at: u64,
}

/// What an operation brought to those who wait for it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Brought {
    Some,
    Little,
    /// And nobody else has any.
    NothingAnywhere,
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
    /// A wish that waits looks again.
    Look(u64),
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
    waiting: BTreeMap<u64, Waiting>,
    /// Of wishes, the holds they got.
    outcomes: BTreeMap<u64, usize>,
    requests: BTreeSet<RequestKey>,
    /// When a meter was recalled.
    recalled: BTreeMap<(usize, MeterKey), u64>,
    /// Requests that were booked, in the month of their reservation, and what they charge.
    distinct: BTreeSet<(Period, RequestKey)>,
    charged: BTreeMap<MeterKey, Tokens>,
    /// What clients were told to be booked.
    acknowledged: Vec<(usize, Tokens)>,
    /// Transactions that wait for a lock.
    blocked: Vec<(Call, Transaction)>,
    /// Of what is seen while something happens, not between.
    wrong: Option<String>,
    month: Period,
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
        let users: Vec<UserId> = (1..2 + dice.between(0, 2))
            .map(u128::from)
            .map(|n| UserId(Uuid::from_u128(n << 64 | n)))
            .collect();
        let strict = dice.percent(60);
        let manners = Manners {
            strict,
            late: !strict && dice.percent(80),
            overrun: !strict && dice.percent(50),
            slow_percent: [2, 6, 20][dice.between(0, 3) as usize],
            long_percent: [3, 25][dice.between(0, 2) as usize],
            lost_percent: [1, 3, 10][dice.between(0, 3) as usize],
            long_holds_percent: [5, 30][dice.between(0, 2) as usize],
            twice_percent: [10, 35][dice.between(0, 2) as usize],
            all_percent: [0, 30, 80][dice.between(0, 3) as usize],
            pause_ms: [14, 20, 32][dice.between(0, 3) as usize],
        };
        let mut postgres = Postgres::default();
        postgres.flaw = flaw;
        for user in &users {
            let limit = dice.tokens(40, 400);
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
            waiting: BTreeMap::new(),
            outcomes: BTreeMap::new(),
            requests: BTreeSet::new(),
            recalled: BTreeMap::new(),
            charged: BTreeMap::new(),
            acknowledged: Vec::new(),
            blocked: Vec::new(),
            distinct: BTreeSet::new(),
            wrong: None,
            month: period_at(1_000),
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
        world.stir();
        world
    }

    /// Lets begin what the storm is made of.
    fn stir(&mut self) {
        self.push(50, None, Event::Fault);
        if self.dice.percent(60) {
            self.push(100, None, Event::Change);
        }
        // Not before the first heartbeats are answered.
        self.push(10, None, Event::Arrival);
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
            told: false,
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
                let touched = self.happen(event);
                return self.check(touched);
            };
            let replica = &self.replicas[index];
            if !replica.up || (process != 0 && process != replica.process) {
                self.elsewhere(event);
                continue;
            }
            if replica.paused_until > self.now {
                self.push_at(replica.paused_until, to, event);
                continue;
            }
            let in_vain = match &event {
                Event::Timeout(call) => !replica.pending.contains_key(call),
                Event::Look(wish) => !self.waiting.contains_key(wish),
                _ => false,
            };
            if in_vain {
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
            Event::Look(wish) => {
                if let Some(waiting) = self.waiting.remove(&wish) {
                    self.elsewhere(Event::Wish(waiting.wish));
                }
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

    fn any_user(&mut self) -> UserId {
        let all = self.users.len() as u64;
        self.users[self.dice.between(0, all) as usize]
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

/// What a record counts for.
fn sums(record: &Record, period: Period) -> [MeterKey; 2] {
    [ModelKey::TOTAL, record.model].map(|model| MeterKey {
        user: record.user,
        period,
        model,
    })
}

fn model_limit(model: ModelKey) -> ModelKey {
    if model == MODELS[1] {
        model
    } else {
        ModelKey::TOTAL
    }
}
