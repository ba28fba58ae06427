//! What leases and holds are, and what is decided about them while the meter's balance is locked. Pure:
//! the transaction decides with it from what it has read.

use super::{ModelName, Period, ReplicaId, UserId};

/// A number of tokens. Never negative where it stands for a right.
pub type Tokens = i64;

/// What a limit is about: a user's month, of one model or of all together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MeterName {
    pub user_id: UserId,
    pub period: Period,
    /// `None`: all of them.
    pub model: Option<ModelName>,
}

/// Names a hold of its replica; together with the replica's id it names it everywhere, for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldId(pub u64);

/// A hold, named for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HoldName {
    /// From whose leases it was taken.
    pub owner: ReplicaId,
    pub hold: HoldId,
}

/// Why a hold ended without a commit here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Expired,
    Released,
}

/// How Postgres says that a hold ended: a settlement, or a tombstone of the owner's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ended(Ending),
    /// Charged by another replica: 0 when the record was there before.
    Committed(Tokens),
}

/// A meter, as read under its lock and in a statement that began after the lock was had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance {
    /// `None`: there is none.
    pub limit: Option<Tokens>,
    pub committed: Tokens,
    /// The sum of `granted` over the meter's leases.
    pub leased: Tokens,
}

/// One replica's lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeaseRow {
    pub granted: Tokens,
    /// Of the operation carried out last.
    pub number: u64,
}

/// One change of a lease, by its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Counts up; the same operation repeated keeps it.
    pub number: u64,
    /// Is booked and leaves the lease.
    pub spent: Tokens,
    /// Was free and leaves the lease.
    pub give_back: Tokens,
    /// Less is of no use; 0 asks for nothing in particular.
    pub need: Tokens,
    /// At least `need`.
    pub want: Tokens,
}

/// What a replica is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub granted: Tokens,
    /// Of the pool, after the operation; below zero when more is booked and leased than the limit.
    /// `None`: there is no limit.
    pub remaining: Option<Tokens>,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// To be written: the lease's row, and the balance's `leased`.
    Out {
        lease: LeaseRow,
        leased: Tokens,
        answer: Answer,
    },
    /// It had been before; nothing is written.
    Before(Answer),
    /// A later one was: nobody waits for this one.
    Straggler,
}

/// Carries an operation out, once.
///
/// `lease` is the row, if there is one; `replicas` the number of live ones, which share what is left:
/// beyond its need a replica gets at most half of an equal part. So chunks shrink towards the limit
/// until each is just what is needed.
pub fn operate(
    balance: &Balance,
    lease: Option<LeaseRow>,
    operation: &Operation,
    replicas: u32,
) -> Carried {
    let before = lease.unwrap_or_default();
    let remaining = |leased: Tokens| {
        let limit = balance.limit?;
        Some(
            limit
                .saturating_sub(balance.committed)
                .saturating_sub(leased),
        )
    };
    if lease.is_some() && before.number == operation.number {
        return Carried::Before(Answer {
            granted: before.granted,
            remaining: remaining(balance.leased),
        });
    }
    if before.number > operation.number {
        return Carried::Straggler;
    }
    // More than there is cannot leave: a replica that says so is wrong, and must not be believed.
    let leaves = operation
        .spent
        .saturating_add(operation.give_back)
        .clamp(0, before.granted);
    let leased = balance.leased - leaves;
    let granted = grant(remaining(leased), operation.need, operation.want, replicas);
    let leased = leased.saturating_add(granted);
    let lease = LeaseRow {
        granted: before.granted - leaves + granted,
        number: operation.number,
    };
    Carried::Out {
        lease,
        leased,
        answer: Answer {
            granted: lease.granted,
            remaining: remaining(leased),
        },
    }
}

/// Most that a lease without a limit takes at once: sums stay far from overflow.
const UNLIMITED_GRANT: Tokens = 1 << 50;

fn grant(remaining: Option<Tokens>, need: Tokens, want: Tokens, replicas: u32) -> Tokens {
    let need = need.max(0);
    let want = want.max(need);
    let Some(remaining) = remaining else {
        return want.min(UNLIMITED_GRANT);
    };
    if remaining <= 0 || remaining < need {
        return 0;
    }
    let share = remaining / (2 * Tokens::from(replicas.max(1)));
    want.min(share.max(need))
}

/// A replica, as Postgres knows it. Times are milliseconds of Postgres' clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaRow {
    pub expires_at: u64,
    pub holds_until: u64,
}

impl ReplicaRow {
    /// Whether nothing of its leases can be in use any more.
    pub fn is_over(&self, now: u64, margin_ms: u64) -> bool {
        let quiet = self.expires_at.max(self.holds_until);
        quiet.saturating_add(margin_ms) <= now
    }

    /// A heartbeat. Never takes back what an earlier one promised: one that was held up comes later
    /// than one that knew more.
    pub fn heard(&mut self, now: u64, ttl_ms: u64, holds_ms: u64) {
        self.expires_at = self.expires_at.max(now.saturating_add(ttl_ms));
        self.holds_until = self.holds_until.max(now.saturating_add(holds_ms));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn operation() -> impl Strategy<Value = Operation> {
        let tokens = || 0..1_000_i64;
        (1..4_u64, tokens(), tokens(), tokens(), tokens()).prop_map(
            |(number, spent, give_back, need, more)| Operation {
                number,
                spent,
                give_back,
                need,
                want: need + more,
            },
        )
    }

    proptest! {
        #[test]
        fn never_gives_more_than_is_left(
            limit in 0..2_000_i64, committed in 0..2_000_i64, others in 0..2_000_i64,
            granted in 0..1_000_i64, operation in operation(), replicas in 0..5_u32,
        ) {
            let balance = Balance { limit: Some(limit), committed, leased: others + granted };
            let row = LeaseRow { granted, number: 0 };
            let Carried::Out { lease, leased, answer } = operate(&balance, Some(row), &operation, replicas) else {
                return Err(TestCaseError::fail("not carried out"));
            };
            prop_assert!(lease.granted >= 0);
            prop_assert_eq!(leased - lease.granted, others);
            let kept = granted - (operation.spent + operation.give_back).min(granted);
            let gained = lease.granted - kept;
            prop_assert!(gained == 0 || committed + leased <= limit);
            prop_assert!(gained == 0 || gained >= operation.need);
            let left = limit - committed - others - kept;
            prop_assert!(gained > 0 || left < operation.need || operation.want == 0 || left < 2 * i64::from(replicas.max(1)));
            // Repeated, it is carried out no second time.
            let after = Balance { leased, ..balance };
            prop_assert_eq!(operate(&after, Some(lease), &operation, replicas), Carried::Before(answer));
        }
    }

    #[test]
    fn a_straggler_changes_nothing() {
        let balance = Balance {
            limit: Some(100),
            committed: 0,
            leased: 10,
        };
        let row = LeaseRow {
            granted: 10,
            number: 7,
        };
        let operation = Operation {
            number: 6,
            spent: 0,
            give_back: 0,
            need: 5,
            want: 5,
        };
        assert_eq!(
            operate(&balance, Some(row), &operation, 1),
            Carried::Straggler
        );
    }
}
