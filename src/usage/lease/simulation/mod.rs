//! A deterministic simulation: replicas, clients, a network and Postgres in virtual time, around the
//! real decisions of this room. `docs/quota.md` says what it does and does not see.
//!
//! A step is one event and all checks. A seed is a storm of so many steps, after which all must come to
//! rest and be spent to the last; a long one does so again and again. `TOLLKEEPER_SIMULATION_SEEDS`,
//! `_STEPS` and `_FIRST_SEED` make it longer, or look at one seed.

mod counts;
mod postgres;
mod replica;
mod world;

use std::{
    panic,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use chrono::DateTime;

use crate::model::Period;
use counts::{Counts, Totals};
use world::World;

// Short, so that in 1,000 steps everything ends that can.
const TTL_MS: u64 = 400;
const HOLD_MS: u64 = 400;
const MARGIN_MS: u64 = 10;
const HEARTBEAT_MS: u64 = 150;
const TICK_MS: u64 = 75;
const TIMEOUT_MS: u64 = 300;
const RECALL_MS: u64 = 150;
const MONTH_MS: u64 = 1_200;
/// An empty lease is forgotten after so long: nothing is under way for as long.
const FORGET_MS: u64 = 20_000;
/// Storms in between which all comes to rest.
const STORM_STEPS: u64 = 25_000;

/// What is left out, to see that it is missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flaw {
    /// A dead replica's leases go back when it expires, whatever holds it gave.
    NoQuarantine,
    /// An expired hold is free again without a tombstone.
    NoTombstone,
    /// A released hold is free again without a tombstone.
    ReleaseFreesAtOnce,
    /// A heartbeat counts from its answer.
    FenceFromAnswer,
    /// An operation reads usage in the statement that waited for the lock.
    OneSnapshot,
    /// A commit takes its hold out of the owner's lease itself.
    ForeignShrinks,
    /// A record sent again is charged again.
    ReplayCharges,
    /// A heartbeat sets what earlier ones promised.
    LateHeartbeatShortens,
    /// An operation that is repeated is carried out again.
    OperationsUnnumbered,
    /// A commit without an answer counts as not booked.
    UncertainIsRefused,
    /// The settlement is a statement of its own, after the record.
    SettlementApart,
    /// Tokens leave the lease before they are booked.
    SpentBeforeBooked,
    /// Nobody gives back what others need.
    NoRecall,
    /// What is idle stays.
    NoIdleReturn,
    /// A hold may outlive what Postgres was told.
    NoHorizon,
    /// A client is told that its commit is booked when it is only sent.
    AcknowledgedBeforeBooked,
    /// A record counts in the month of its commit.
    MonthOfCommit,
}

#[test]
fn no_seed_oversells_loses_or_leaks() {
    let seeds = setting("TOLLKEEPER_SIMULATION_SEEDS", 300);
    let first = setting("TOLLKEEPER_SIMULATION_FIRST_SEED", 0);
    let steps = setting("TOLLKEEPER_SIMULATION_STEPS", 1_000);
    let next = AtomicU64::new(first);
    let totals = thread::scope(|scope| {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut totals = Totals::new(steps);
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= first + seeds {
                            return totals;
                        }
                        match run(seed, steps, None) {
                            Ok(counts) => totals.count(&counts),
                            Err(wrong) => panic!("seed {seed}: {wrong}"),
                        }
                    }
                })
            })
            .collect();
        let mut totals = Totals::new(steps);
        for worker in workers {
            match worker.join() {
                Ok(some) => totals.add(&some),
                Err(panicked) => panic::resume_unwind(panicked),
            }
        }
        totals
    });
    let (table, thin) = totals.report();
    println!("{table}");
    // A few seeds have the manners of a few.
    if seeds >= 100 {
        assert!(thin.is_empty(), "too thin: {thin:?}\n{table}");
    }
}

macro_rules! caught {
    ($($name:ident: $flaw:ident $(from $first:literal)?,)*) => {$(
        #[test]
        fn $name() {
            must_be_caught(Flaw::$flaw, 0 $(+ $first)?);
        }
    )*};
}

caught! {
    commits_that_shrink_the_lease_of_another_are_caught: ForeignShrinks,
    replays_that_charge_again_are_caught: ReplayCharges,
    operations_without_numbers_are_caught: OperationsUnnumbered,
    without_recall_what_is_available_is_denied: NoRecall,
    without_idle_return_leases_leak: NoIdleReturn,
    without_quarantine_leases_go_before_their_holds: NoQuarantine,
    without_tombstones_it_oversells: NoTombstone,
    releases_that_free_at_once_oversell: ReleaseFreesAtOnce,
    a_fence_measured_from_the_answer_admits_too_long: FenceFromAnswer,
    late_heartbeats_that_shorten_forget_holds: LateHeartbeatShortens,
    uncertain_commits_that_count_as_refused_oversell: UncertainIsRefused,
    settlements_apart_from_their_record_oversell: SettlementApart,
    tokens_taken_out_before_they_are_booked_oversell: SpentBeforeBooked,
    // One seed in a thousand: here is one.
    one_snapshot_for_lock_and_usage_oversells: OneSnapshot from 3_200,
    holds_beyond_the_horizon_are_caught: NoHorizon,
    acknowledging_before_it_is_booked_is_caught: AcknowledgedBeforeBooked,
    charging_the_month_of_the_commit_is_caught: MonthOfCommit,
}

/// Runs seeds from `first` on until one catches the flaw: one that is clean without it.
fn must_be_caught(flaw: Flaw, first: u64) {
    let most = setting("TOLLKEEPER_SIMULATION_FLAW_SEEDS", 200);
    for seed in first..first + most {
        let wrong = match panic::catch_unwind(|| run(seed, 1_000, Some(flaw))) {
            Ok(Ok(_)) => continue,
            Ok(Err(wrong)) => wrong,
            Err(_) => "an assertion".to_owned(),
        };
        println!("{flaw:?}: seed {seed}: {wrong}");
        assert_eq!(run(seed, 1_000, None).map(drop), Ok(()));
        return;
    }
    panic!("{flaw:?} was not caught in {most} seeds");
}

fn run(seed: u64, steps: u64, flaw: Option<Flaw>) -> Result<Counts, String> {
    let mut world = World::new(seed, flaw);
    let mut left = steps;
    while left > 0 {
        let storm = left.min(STORM_STEPS);
        world.storm(storm)?;
        world.calm()?;
        left -= storm;
    }
    Ok(world.counts)
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// Months are short, so that limits are fresh again and again.
fn period_at(now: u64) -> Period {
    let months = now / MONTH_MS % (12 * 10_000);
    Period::containing(DateTime::UNIX_EPOCH).plus_months(u32::try_from(months).expect("bounded"))
}

/// `SplitMix64`: small, and the same on every machine.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `low` to below `high`.
    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }

    fn tokens(&mut self, low: i64, high: i64) -> i64 {
        low + (self.next() % high.abs_diff(low)).cast_signed()
    }

    fn percent(&mut self, chance: u64) -> bool {
        self.next() % 100 < chance
    }
}
