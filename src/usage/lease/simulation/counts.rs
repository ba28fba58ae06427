//! How much happened: a simulation in which nothing happens finds nothing.

use std::fmt::Write;

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident: $least:literal in $percent:literal,)*) => {
        /// What happened in a seed's storm.
        #[derive(Clone, Copy, Debug, Default)]
        pub(super) struct Counts {
            $($(#[$doc])* pub(super) $name: u64,)*
        }

        /// What is counted, the least of it in 1,000 steps on average, and the least percentage of
        /// seeds that must see any.
        const LEAST: &[(&str, f64, u64)] = &[$((stringify!($name), $least, $percent),)*];

        impl Counts {
            fn all(&self) -> [u64; LEAST.len()] {
                [$(self.$name,)*]
            }
        }
    };
}

counts! {
    /// Wishes, once each.
    attempts: 100.0 in 99,
    held: 45.0 in 99,
    denied: 40.0 in 95,
    refused: 10.0 in 70,
    /// Holds of a request that had one elsewhere.
    held_twice: 1.5 in 60,
    /// Requests that got the hold they had here.
    held_again: 1.5 in 60,
    booked: 20.0 in 99,
    booked_elsewhere: 8.0 in 95,
    /// Of a month that had ended.
    booked_after_month: 2.0 in 70,
    booked_late: 0.7 in 20,
    booked_above: 0.2 in 8,
    /// Commits that found their record.
    repeated: 5.0 in 90,
    /// Commits of a request that was booked with other tokens.
    conflicts: 0.1 in 8,
    released: 5.0 in 90,
    released_elsewhere: 2.0 in 80,
    extended: 0.7 in 40,
    expired: 3.0 in 80,
    operations: 50.0 in 99,
    operations_repeated: 4.0 in 80,
    /// Operations that came after a later one.
    stragglers: 0.4 in 25,
    recalls: 10.0 in 90,
    month_ends: 0.8 in 80,
    limits_changed: 1.0 in 40,
    crashes: 0.4 in 35,
    pauses: 0.4 in 35,
    cuts: 0.4 in 35,
    lost: 15.0 in 95,
    reaped: 0.2 in 20,
    rejoined: 0.05 in 4,
    /// Steps at which all of a limit was booked or leased.
    nothing_left: 30.0 in 20,
    /// And more than all, because what was booked had not yet been taken out of a lease.
    below_zero: 8.0 in 7,
}

/// The counts of many seeds.
pub(super) struct Totals {
    steps: u64,
    seeds: u64,
    sums: [u64; LEAST.len()],
    seeds_with: [u64; LEAST.len()],
}

impl Totals {
    pub(super) fn new(steps: u64) -> Self {
        Self {
            steps,
            seeds: 0,
            sums: [0; LEAST.len()],
            seeds_with: [0; LEAST.len()],
        }
    }

    pub(super) fn count(&mut self, counts: &Counts) {
        self.seeds += 1;
        for (index, count) in counts.all().into_iter().enumerate() {
            self.sums[index] += count;
            self.seeds_with[index] += u64::from(count > 0);
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.seeds += other.seeds;
        for index in 0..LEAST.len() {
            self.sums[index] += other.sums[index];
            self.seeds_with[index] += other.seeds_with[index];
        }
    }

    /// A table, and what is too thin.
    #[expect(clippy::cast_precision_loss, reason = "averages, for people")]
    pub(super) fn report(&self) -> (String, Vec<&'static str>) {
        let thousands = (self.seeds * self.steps) as f64 / 1_000.0;
        let mut table = format!(
            "{} seeds × {} steps; in 1,000 steps, and in how many seeds:\n",
            self.seeds, self.steps
        );
        let mut thin = Vec::new();
        for (index, (name, least, percent)) in LEAST.iter().enumerate() {
            let mean = self.sums[index] as f64 / thousands;
            let seeds = 100.0 * self.seeds_with[index] as f64 / self.seeds as f64;
            let sum = self.sums[index];
            writeln!(table, "{name:20} {sum:>12} {mean:>9.2} {seeds:>6.1} %").expect("a string");
            if mean < *least || seeds < *percent as f64 {
                thin.push(*name);
            }
        }
        (table, thin)
    }
}
