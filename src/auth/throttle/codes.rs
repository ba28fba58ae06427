//! Codes of a second factor: whoever guesses them knows the password already, and there are a million.

use std::{net::IpAddr, slice::from_ref, time::Duration};

use chrono::{DateTime, Utc};
use tracing::Instrument as _;

use super::{FIRST_DELAY, Throttle, Turn, account, at_home, from, networks};
use crate::{
    auth::Auth,
    error::{Error, Result},
    model::{MfaCode, Origin, ThrottleCharge, ThrottleRule, UserId},
};

/// Three codes of a million are right at a time. By this rule a guesser has about twenty tries on the
/// first day and nine on each further one, see the tests: 1 % to be let in by a year of guessing, and
/// somewhat more over all homes together.
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

/// Over all networks in which the user has logged in with a code: who has the run of many has no more tries
/// for it. Looser than the rule of each, so that one guesser at one home does not close the others.
fn over_homes(codes: ThrottleRule) -> ThrottleRule {
    ThrottleRule {
        free: codes.free * 2,
        ..codes
    }
}

/// Recovery codes have 120 bits: nobody guesses one, and a wait protects from load alone. By network, and
/// short: who has the password must not keep the owner from this way in.
const RECOVERY: ThrottleRule = ThrottleRule {
    free: 20,
    first_delay: FIRST_DELAY,
    max_delay: Duration::from_mins(1),
    forgiven_in: Duration::from_mins(1),
};

impl Auth {
    /// Lets a code be tried that is to end a login.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(in crate::auth) async fn admit_code(
        &self,
        user: UserId,
        code: &MfaCode,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<CodeAttempt> {
        let address = origin.address;
        let (everywhere, rule) = match code {
            MfaCode::Totp(_) => (format!("mfa {user}"), self.throttle.codes),
            MfaCode::Recovery(_) => (format!("recovery {user}"), RECOVERY),
        };
        let turn = self.throttle.turn(&everywhere, address, &rule).await?;
        let here = address.map(|address| at_home(&everywhere, address));
        let counts = match (code, here) {
            (MfaCode::Recovery(_), Some(here)) => vec![(here, rule)],
            (MfaCode::Totp(_), Some(here)) if self.is_home_of_codes(user, address).await? => {
                let at_home = format!("{everywhere} at home");
                vec![(here, rule), (at_home, over_homes(rule))]
            }
            _ => vec![(everywhere, rule)],
        };
        self.charge(counts, address, turn, now).await
    }

    /// Whether a user has logged in from around this address with a second factor: who has the password
    /// alone makes no home for guesses.
    async fn is_home_of_codes(&self, user: UserId, address: Option<IpAddr>) -> Result<bool> {
        match address.map(networks) {
            Some(networks) => self.store.session_any_from(user, &networks, true).await,
            None => Ok(false),
        }
    }

    /// Lets a code be tried within a session.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(in crate::auth) async fn admit_own_code(
        &self,
        user: UserId,
        code: &MfaCode,
        now: DateTime<Utc>,
    ) -> Result<CodeAttempt> {
        let (subject, rule) = match code {
            MfaCode::Totp(_) => (format!("own mfa {user}"), self.throttle.codes),
            MfaCode::Recovery(_) => (format!("own recovery {user}"), RECOVERY),
        };
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
        let by_address = address.map(from).zip(self.throttle.address);
        let rules = counts.iter().chain(&by_address);
        let subjects: Vec<String> = rules.map(|(subject, _)| subject.clone()).collect();
        let states = self.store.throttle_states(&subjects).await?;
        let spent = counts.iter().filter(|(subject, rule)| {
            let state = states.get(subject);
            state.is_some_and(|state| rule.is_spent(state, now))
        });
        for (subject, rule) in spent.chain(&by_address) {
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
                auth.fail(from_ref(&counted), attempt.now).await?;
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
                tracing::warn!(
                    error = error.with_causes(),
                    "a code that was not wrong still counts"
                );
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
        let subject = account(user);
        let home = origin.address.map(|address| at_home(&subject, address));
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
        let Some(subject) = subject else {
            return;
        };
        let cleared = self.store.throttle_clear(&subject).await;
        self.throttle.changed();
        if let Err(error) = cleared {
            tracing::warn!(
                error = error.with_causes(),
                "failed attempts before a success still count"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;

    use super::*;
    use crate::model::ThrottleState;

    /// What is left of a state once the user has given a right code, now.
    fn after_a_login(
        rule: &ThrottleRule,
        state: Option<ThrottleState>,
        now: DateTime<Utc>,
    ) -> Option<ThrottleState> {
        let before = state?;
        let after = rule.after_failure(Some(&before), now);
        Some(ThrottleCharge { before, after }.given_back(&after))
    }

    #[test]
    fn settings_make_the_rule_stricter_and_never_looser() {
        assert_eq!(rule(0).free, 5);
        assert_eq!(rule(2).free, 2);
        assert_eq!(rule(1000).free, 5);
    }

    /// Tries within so many days of somebody who never waits for longer than needed, while the user logs in
    /// before and after each; pauses of two days and more, after which the sweep forgets, are worth it or
    /// not.
    fn tries(rule: &ThrottleRule, days: i64, pause_after: Option<u32>) -> u32 {
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
            state = after_a_login(rule, state, now);
            state = Some(rule.after_failure(state.as_ref(), now));
            let waited = now.max(state.map_or(now, |state| state.blocked_until));
            state = after_a_login(rule, state, waited);
            (tries, burst) = (tries + 1, burst + 1);
        }
    }

    #[test]
    fn a_guesser_gets_few_codes_a_day_and_about_one_in_a_hundred_in_a_year() {
        // Elsewhere, and over all homes.
        for (rule, a_day, a_year, at_most) in [
            (rule(5), 25, 3400, 0.0102),
            (over_homes(rule(5)), 30, 4400, 0.0132),
        ] {
            let day = tries(&rule, 1, None);
            assert!(day <= a_day, "{day}");
            let best = (1..40).map(Some).chain([None]);
            let best = best.map(|pause| tries(&rule, 365, pause));
            let year = best.max().expect("some");
            assert!(year <= a_year, "{year}");
            let let_in = 1.0 - (1.0 - 3.0 / 1e6_f64).powf(f64::from(year));
            assert!(let_in < at_most, "{let_in}");
        }
    }

    #[test]
    fn a_right_code_leaves_what_was_counted_before_it_and_meanwhile() {
        let rule = rule(5);
        let start = DateTime::from_timestamp(1_800_000_000, 0).expect("valid");
        let wrong = rule.after_failure(None, start);
        let known = Some(wrong);
        assert_eq!(
            after_a_login(&rule, known, start + TimeDelta::hours(1)),
            known
        );
        let charge = |before: ThrottleState, now| ThrottleCharge {
            before,
            after: rule.after_failure(Some(&before), now),
        };
        // Two logins and a guess at once, given back in either order.
        let one = charge(wrong, start + TimeDelta::seconds(1));
        let two = charge(one.after, start + TimeDelta::seconds(2));
        let guess = rule.after_failure(Some(&two.after), start + TimeDelta::seconds(3));
        for (first, second) in [(one, two), (two, one)] {
            let left = second.given_back(&first.given_back(&guess));
            assert_eq!(left.failures, 2);
            assert_eq!(left.last_failed_at, guess.last_failed_at);
            let none = second.given_back(&first.given_back(&two.after));
            assert_eq!(none.failures, 1);
        }
    }
}
