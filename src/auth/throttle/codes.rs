//! Codes of a second factor: whoever guesses them knows the password already, and there are a million.

use std::{net::IpAddr, slice::from_ref, time::Duration};

use chrono::{DateTime, Utc};
use tracing::Instrument as _;

use super::{FIRST_DELAY, Throttle, Turn, from};
use crate::{
    auth::Auth,
    error::{Error, Result},
    model::{Origin, ThrottleCharge, ThrottleRule, UserId},
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

/// A code that may be tried, and counts as wrong until [`Auth::code_was_not_wrong`] says otherwise: guesses
/// that race find it counted, and a guesser who hangs up has made it all the same.
pub(in crate::auth) struct CodeAttempt {
    charges: Vec<(String, ThrottleCharge)>,
    address: Option<IpAddr>,
    now: DateTime<Utc>,
    _turn: Turn,
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
    ) -> Result<CodeAttempt> {
        let (address, rule) = (origin.address, self.throttle.codes);
        let subject = format!("mfa {user}");
        let turn = self.throttle.turn(&subject, address, &rule).await?;
        let subject = match address {
            Some(address) if self.is_home(user, Some(address)).await? => {
                format!("{subject} {}", from(address))
            }
            _ => subject,
        };
        self.charge(vec![(subject, rule)], address, turn, now).await
    }

    /// Lets a code be tried within a session.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(in crate::auth) async fn admit_own_code(
        &self,
        user: UserId,
        now: DateTime<Utc>,
    ) -> Result<CodeAttempt> {
        let (subject, rule) = (format!("own mfa {user}"), self.throttle.codes);
        let turn = self.throttle.turn(&subject, None, &rule).await?;
        self.charge(vec![(subject, rule)], None, turn, now).await
    }

    async fn charge(
        &self,
        counts: Vec<(String, ThrottleRule)>,
        address: Option<IpAddr>,
        turn: Turn,
        now: DateTime<Utc>,
    ) -> Result<CodeAttempt> {
        // Read before anything is locked: most of a flood is refused by that.
        let mut rules = counts.clone();
        rules.extend(address.map(from).zip(self.throttle.address));
        let subjects: Vec<String> = rules.iter().map(|(subject, _)| subject.clone()).collect();
        let states = self.store.throttle_states(&subjects).await?;
        for (subject, rule) in &rules {
            if let Some(retry_after) = states.get(subject).and_then(|state| rule.wait(state, now)) {
                return Err(Error::Throttled { retry_after });
            }
        }
        Ok(CodeAttempt {
            charges: self.store.throttle_charge(&counts, now).await?,
            address,
            now,
            _turn: turn,
        })
    }

    /// Counts a wrong code against the address too, and writes it down, also for a caller who is gone by
    /// now: somebody has the password and not the app.
    ///
    /// # Errors
    /// `Unavailable`: nobody is told then that it was wrong.
    pub(in crate::auth) async fn code_was_wrong(
        &self,
        attempt: CodeAttempt,
        user: UserId,
        origin: &Origin,
    ) -> Result<()> {
        let (auth, origin) = (self.clone(), origin.clone());
        let counting = async move {
            let by_address = attempt.address.map(from).zip(auth.throttle.address);
            if let Some(counted) = by_address {
                let failing = auth.store.throttle_fail(from_ref(&counted), attempt.now);
                failing.await?;
            }
            auth.store.mfa_code_refused(user, &origin).await
        };
        tokio::spawn(counting.in_current_span())
            .await
            .map_err(Error::internal)?
    }

    /// Gives back an attempt: the code was right, or nothing was learnt of it. What failed before is
    /// forgiven by time alone, or the user's own logins would buy guesses.
    pub(in crate::auth) async fn code_was_not_wrong(&self, attempt: CodeAttempt) {
        let store = self.store.clone();
        let giving_back = async move {
            if let Err(error) = store.throttle_give_back(&attempt.charges).await {
                tracing::warn!(%error, "a code that was not wrong still counts");
            }
        };
        // Also for a caller who is gone by now.
        let _ = tokio::spawn(giving_back.in_current_span()).await;
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
