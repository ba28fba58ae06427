use std::time::Duration;

use chrono::{DateTime, Utc};

/// What is known of the failed attempts against something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleState {
    /// As of `last_failed_at`.
    pub failures: u32,
    pub last_failed_at: DateTime<Utc>,
    /// Until then nothing is tried.
    pub blocked_until: DateTime<Utc>,
}

/// How many failures are free, and what those beyond cost.
#[derive(Clone, Copy, Debug)]
pub struct ThrottleRule {
    pub free: u32,
    /// Doubles with each failure beyond the free ones; the first costs this.
    pub first_delay: Duration,
    pub max_delay: Duration,
    /// One failure is forgotten in this time.
    pub forgiven_in: Duration,
}

/// As far as the clocks of replicas may differ: one that is a little ahead blocks as it should.
const CLOCKS_APART: Duration = Duration::from_mins(1);

impl ThrottleRule {
    /// Of what a user may do, and be told, as often as anybody needs to, and not in a loop.
    pub const REPEATED: Self = Self {
        free: 5,
        first_delay: Duration::from_mins(1),
        max_delay: Duration::from_mins(30),
        forgiven_in: Duration::from_hours(1),
    };

    /// Failures that still count.
    pub fn failures(&self, state: &ThrottleState, now: DateTime<Utc>) -> u32 {
        let passed = (now - state.last_failed_at).to_std().unwrap_or_default();
        let forgiven = passed.as_millis() / self.forgiven_in.as_millis().max(1);
        let forgiven = u32::try_from(forgiven).unwrap_or(u32::MAX);
        state.failures.saturating_sub(forgiven)
    }

    /// Whether the next failure would cost a wait: from then on one attempt is made at a time.
    pub fn is_spent(&self, state: &ThrottleState, now: DateTime<Utc>) -> bool {
        self.failures(state, now) >= self.free
    }

    /// How long nothing is tried after so many failures.
    pub fn delay(&self, failures: u32) -> Duration {
        let beyond = failures.checked_sub(self.free);
        let Some(beyond) = beyond.and_then(|beyond| beyond.checked_sub(1)) else {
            return Duration::ZERO;
        };
        let factor = 1_u32.checked_shl(beyond).unwrap_or(u32::MAX);
        self.first_delay.saturating_mul(factor).min(self.max_delay)
    }

    /// What one more failure leads to.
    pub fn after_failure(
        &self,
        state: Option<&ThrottleState>,
        now: DateTime<Utc>,
    ) -> ThrottleState {
        let before = state.map_or(0, |state| self.failures(state, now));
        let failures = before.saturating_add(1);
        ThrottleState {
            failures,
            last_failed_at: now,
            blocked_until: now + self.delay(failures),
        }
    }

    /// How long to wait; `None`: not at all.
    pub fn wait(&self, state: &ThrottleState, now: DateTime<Utc>) -> Option<Duration> {
        if state.blocked_until > self.latest(now) {
            return None;
        }
        let wait = (state.blocked_until - now).to_std().ok()?;
        Some(wait.min(self.max_delay)).filter(|wait| !wait.is_zero())
    }

    /// Until when anything may be blocked by now. A later time was set by a clock that is wrong and holds
    /// for nothing: it would keep people out for as long as that clock was ahead.
    pub fn latest(&self, now: DateTime<Utc>) -> DateTime<Utc> {
        now + self.max_delay + CLOCKS_APART
    }
}

/// An attempt that was counted as failed before it was made.
#[derive(Clone, Copy, Debug)]
pub struct ThrottleCharge {
    pub before: ThrottleState,
    pub after: ThrottleState,
}

impl ThrottleCharge {
    /// What is known without an attempt that did not fail: what was before it, and what was counted since.
    pub fn given_back(&self, state: &ThrottleState) -> ThrottleState {
        let is_last = state.last_failed_at == self.after.last_failed_at
            && state.blocked_until == self.after.blocked_until;
        if !is_last {
            return ThrottleState {
                failures: state.failures.saturating_sub(1),
                ..*state
            };
        }
        // Others that came before it may have been given back meanwhile.
        let failures = state.failures.saturating_add(self.before.failures);
        ThrottleState {
            failures: failures.saturating_sub(self.after.failures),
            ..self.before
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use proptest::prelude::*;

    use super::*;

    const RULE: ThrottleRule = ThrottleRule {
        free: 5,
        first_delay: Duration::from_secs(1),
        max_delay: Duration::from_secs(900),
        forgiven_in: Duration::from_secs(900),
    };

    fn start() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).expect("valid")
    }

    /// The state after so many failures, each as soon as it may be made.
    fn after(failures: u32) -> (ThrottleState, DateTime<Utc>) {
        let mut now = start();
        let mut state = RULE.after_failure(None, now);
        for _ in 1..failures {
            now = now.max(state.blocked_until);
            state = RULE.after_failure(Some(&state), now);
        }
        (state, now)
    }

    #[test]
    fn the_first_failures_are_free_and_those_beyond_cost_twice_as_much_each() {
        for (failures, secs) in [(1, 0), (5, 0), (6, 1), (7, 2), (8, 4), (15, 512), (16, 900)] {
            let (state, now) = after(failures);
            let wait = RULE.wait(&state, now).unwrap_or_default();
            assert_eq!(wait, Duration::from_secs(secs), "{failures}");
        }
    }

    #[test]
    fn failures_are_forgiven_with_time() {
        let (state, now) = after(8);
        assert!(RULE.is_spent(&state, now));
        let hour = now + TimeDelta::hours(1);
        assert_eq!(RULE.failures(&state, hour), 4);
        assert!(!RULE.is_spent(&state, hour));
        assert_eq!(RULE.failures(&state, now + TimeDelta::days(400)), 0);
        // A clock that is behind forgives nothing and adds nothing.
        assert_eq!(RULE.failures(&state, now - TimeDelta::days(1)), 8);
    }

    #[test]
    fn what_a_wrong_clock_blocked_is_not() {
        let blocked = |ahead| {
            let state = ThrottleState {
                failures: 20,
                last_failed_at: start(),
                blocked_until: start() + ahead,
            };
            RULE.wait(&state, start())
        };
        let max = RULE.max_delay;
        assert_eq!(blocked(max), Some(max));
        assert_eq!(blocked(max + Duration::from_secs(10)), Some(max));
        assert_eq!(blocked(max + CLOCKS_APART + Duration::from_secs(1)), None);
        assert_eq!(blocked(Duration::from_hours(24)), None);
    }

    proptest! {
        #[test]
        fn nobody_waits_for_longer_than_the_rule_says(
            failures in any::<u32>(), ahead in any::<i32>(), behind in any::<i32>()
        ) {
            let state = ThrottleState {
                failures,
                last_failed_at: start() - TimeDelta::seconds(behind.into()),
                blocked_until: start() + TimeDelta::seconds(ahead.into()),
            };
            prop_assert!(RULE.wait(&state, start()).unwrap_or_default() <= RULE.max_delay);
            prop_assert!(RULE.delay(failures) <= RULE.max_delay);
            let next = RULE.after_failure(Some(&state), start());
            prop_assert!(next.failures >= 1 && next.blocked_until >= start());
        }

        /// However fast they come: a day has room for few guesses.
        #[test]
        fn a_guesser_gets_few_tries_a_day(pauses in prop::collection::vec(0_i64..3600, 200)) {
            let (mut now, mut tries) = (start(), 0);
            let mut state: Option<ThrottleState> = None;
            for pause in pauses {
                now = state.map_or(now, |state| now.max(state.blocked_until));
                now += TimeDelta::seconds(pause);
                if now >= start() + TimeDelta::days(1) {
                    break;
                }
                state = Some(RULE.after_failure(state.as_ref(), now));
                tries += 1;
            }
            prop_assert!(tries <= 116, "{}", tries);
        }
    }
}
