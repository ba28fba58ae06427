//! Codes of a second factor: whoever guesses them knows the password already, and there are a million.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::{Attempt, FIRST_DELAY, Guarded, Throttle, from};
use crate::{
    auth::Auth,
    error::Result,
    model::{Origin, ThrottleRule, UserId},
};

/// Three codes of a million are right at a time. By this rule a guesser has about twenty tries on the
/// first day and nine on each further one, see the tests: 1 % to be let in by a year of guessing.
const FORGIVEN_IN: Duration = Duration::from_hours(4);
const MAX_DELAY: Duration = Duration::from_hours(4);

/// Where the settings let guesses of passwords be free: six digits do not bear it.
const FREE: u32 = 5;

/// The rule of codes, which holds whatever the settings say; `account_failures` may make it stricter.
pub(super) fn rule(account_failures: u32) -> ThrottleRule {
    ThrottleRule {
        free: match account_failures {
            0 => FREE,
            free => free.min(FREE),
        },
        first_delay: FIRST_DELAY,
        max_delay: MAX_DELAY,
        forgiven_in: FORGIVEN_IN,
    }
}

impl Auth {
    /// Lets a code be tried that is to end a login.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(in crate::auth) async fn admit_code(
        &self,
        user: UserId,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<Attempt> {
        let what = Guarded {
            user,
            subject: format!("mfa {user}"),
            kind: "mfa",
            rule: Some(self.throttle.codes),
        };
        self.admit(what, origin.address, now).await
    }

    /// Lets a code be tried within a session.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(in crate::auth) async fn admit_own_code(
        &self,
        user: UserId,
        now: DateTime<Utc>,
    ) -> Result<Attempt> {
        let what = Guarded {
            user,
            subject: format!("own mfa {user}"),
            kind: "own mfa",
            rule: Some(self.throttle.codes),
        };
        self.admit(what, None, now).await
    }

    /// What wrong passwords from here have counted against, for [`Auth::forget`] once the user is let in:
    /// the password alone forgets nothing.
    ///
    /// # Errors
    /// `Unavailable`
    pub(in crate::auth) async fn failed_logins(
        &self,
        user: UserId,
        origin: &Origin,
    ) -> Result<Option<String>> {
        let Throttle {
            account: Some(_), ..
        } = &*self.throttle
        else {
            return Ok(None);
        };
        let subject = format!("user {user}");
        let home = origin
            .address
            .map(|address| format!("{subject} {}", from(address)));
        let mut subjects = vec![subject.clone()];
        subjects.extend(home.clone());
        let states = self.store.throttle_states(&subjects).await?;
        if let Some(home) = home.filter(|home| states.contains_key(home)) {
            return Ok(Some(home));
        }
        let is_elsewhere =
            states.contains_key(&subject) && !self.is_home(user, origin.address).await?;
        Ok(is_elsewhere.then_some(subject))
    }

    /// Forgets what failed before. Should that not be possible now, it is forgiven in time.
    pub(in crate::auth) async fn forget(&self, subject: Option<String>) {
        if let Some(subject) = subject
            && let Err(error) = self.store.throttle_clear(&subject).await
        {
            tracing::warn!(%error, "failed attempts before a success still count");
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;
    use crate::model::ThrottleState;

    #[test]
    fn settings_make_the_rule_stricter_and_never_looser() {
        assert_eq!(rule(0).free, 5);
        assert_eq!(rule(2).free, 2);
        assert_eq!(rule(1000).free, 5);
    }

    /// Tries within so many days of somebody who never waits for longer than needed; pauses of two days
    /// and more, after which the sweep forgets, are worth it or not.
    fn tries(days: i64, pause_after: Option<u32>) -> u32 {
        let rule = rule(5);
        let start = DateTime::from_timestamp(1_800_000_000, 0).expect("valid");
        let (mut now, mut state): (_, Option<ThrottleState>) = (start, None);
        let (mut tries, mut burst) = (0, 0);
        loop {
            now = state.map_or(now, |state| now.max(state.blocked_until));
            if pause_after == Some(burst) {
                (now, state, burst) = (now + TimeDelta::days(2), None, 0);
            }
            if now >= start + TimeDelta::days(days) {
                return tries;
            }
            state = Some(rule.after_failure(state.as_ref(), now));
            (tries, burst) = (tries + 1, burst + 1);
        }
    }

    #[test]
    fn a_guesser_gets_few_codes_a_day_and_less_than_one_in_a_hundred_in_a_year() {
        assert!(tries(1, None) <= 25, "{}", tries(1, None));
        let best = (1..40).map(Some).chain([None]);
        let year = best.map(|pause| tries(365, pause)).max().expect("some");
        assert!(year <= 3400, "{year}");
        let let_in = 1.0 - (1.0 - 3.0 / 1e6_f64).powf(f64::from(year));
        assert!(let_in < 0.0102, "{let_in}");
    }
}
