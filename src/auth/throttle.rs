//! Slows guessing down: who fails waits, for longer each time, on whichever replica they come.
//!
//! Failures count against
//!
//! - `user ID`: an account, by whichever of its names, for those who come from elsewhere;
//! - `user ID from ADDRESS`: the same account from an address at which its user has logged in before, so
//!   that strangers who guess do not keep the user out;
//! - `name HASH`: a name that nobody has. It must look as if somebody had;
//! - `from ADDRESS`, `new ADDRESS`: failed logins, and registrations, from an address;
//! - `own ID`: the present password, asked for within a session. Apart from the logins: whoever stole a
//!   session must not keep the user from logging in, and no guesser at the door keeps the user from a
//!   new password.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    slice::from_ref,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use uuid::Uuid;

use super::{Auth, MasterKey};
use crate::{
    config::{PasswordSettings, ThrottleSettings},
    error::{Error, Result},
    model::{Identifier, Origin, ThrottleRule, UserId},
};

/// A day without guesses forgives a hundred of them.
const ACCOUNT_FORGIVEN_IN: Duration = Duration::from_mins(15);

/// Many may share an address.
const ADDRESS_FORGIVEN_IN: Duration = Duration::from_secs(6);
const ADDRESS_MAX_DELAY: Duration = Duration::from_mins(1);

const FIRST_DELAY: Duration = Duration::from_secs(1);

/// The rules, and what is being tried now.
pub(super) struct Throttle {
    account: Option<ThrottleRule>,
    address: Option<ThrottleRule>,
    /// Hides names that somebody tried.
    names: hmac::Key,
    turns: Arc<Turns>,
    turn_timeout: Duration,
}

/// An attempt that may be made. To be settled by [`Auth::attempt_failed`] or [`Auth::attempt_succeeded`];
/// one that is dropped was none.
pub(super) struct Attempt {
    account: Option<AccountAttempt>,
    address: Option<IpAddr>,
    /// When it was admitted, by the caller's clock and by one that runs on.
    now: DateTime<Utc>,
    admitted: Instant,
}

struct AccountAttempt {
    /// Of whom a home is looked for; nobody's id for a name that nobody has, for both to take as long.
    user: UserId,
    subject: String,
    /// Where failures are counted instead, once that is known to be a home.
    home: Option<String>,
    is_known: bool,
    _turn: Turn,
}

impl Throttle {
    pub(super) fn new(
        master_key: &MasterKey,
        settings: &ThrottleSettings,
        passwords: &PasswordSettings,
    ) -> Self {
        let rule = |free: u32, max_delay, forgiven_in| {
            (free > 0).then_some(ThrottleRule {
                free,
                first_delay: FIRST_DELAY,
                max_delay,
                forgiven_in,
            })
        };
        let (account, address) = (settings.account_failures, settings.address_failures);
        Self {
            account: rule(account, settings.max_delay, ACCOUNT_FORGIVEN_IN),
            address: rule(address, ADDRESS_MAX_DELAY, ADDRESS_FORGIVEN_IN),
            names: master_key.mac_key("login-throttle/v1"),
            turns: Arc::default(),
            turn_timeout: passwords.queue_timeout,
        }
    }

    fn name(&self, identifier: &Identifier) -> String {
        let name = match identifier {
            Identifier::Email(email) => email.as_str(),
            Identifier::Username(username) => username.as_str(),
        };
        let hash = hmac::sign(&self.names, name.to_ascii_lowercase().as_bytes());
        format!("name {}", URL_SAFE_NO_PAD.encode(hash))
    }

    /// A turn to try something: as many at once as may fail for free, or racing guesses would not see
    /// each other's failures.
    async fn turn(&self, subject: &str, rule: &ThrottleRule) -> Result<Turn> {
        let places = usize::try_from(rule.free).unwrap_or(usize::MAX);
        let waiting = self.turns.take(subject, places.min(Semaphore::MAX_PERMITS));
        timeout(self.turn_timeout, waiting)
            .await
            .map_err(|_| Error::Overloaded {
                retry_after: FIRST_DELAY,
            })
    }
}

impl Auth {
    /// Lets a login be tried, by the account if the name is somebody's.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(super) async fn admit_login(
        &self,
        user: Option<UserId>,
        identifier: &Identifier,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<Attempt> {
        let subject = match user {
            Some(id) => format!("user {id}"),
            None => self.throttle.name(identifier),
        };
        let user = user.unwrap_or(UserId(Uuid::nil()));
        self.admit(user, subject, origin.address, now).await
    }

    /// Lets the present password be asked for within a session.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(super) async fn admit_own(&self, user: UserId, now: DateTime<Utc>) -> Result<Attempt> {
        self.admit(user, format!("own {user}"), None, now).await
    }

    /// Lets somebody register, and counts it against the address whatever becomes of it.
    ///
    /// # Errors
    /// `Throttled` · `Unavailable`
    pub(super) async fn admit_registration(
        &self,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<()> {
        let (Some(rule), Some(address)) = (self.throttle.address, origin.address) else {
            return Ok(());
        };
        let subject = format!("new {}", network(address));
        let states = self.store.throttle_states(from_ref(&subject)).await?;
        if let Some(wait) = states.get(&subject).and_then(|state| rule.wait(state, now)) {
            return Err(Error::Throttled { retry_after: wait });
        }
        self.store.throttle_fail(&[(subject, rule)], now).await
    }

    async fn admit(
        &self,
        user: UserId,
        subject: String,
        address: Option<IpAddr>,
        now: DateTime<Utc>,
    ) -> Result<Attempt> {
        let (by_account, by_address) = (self.throttle.account, self.throttle.address);
        let address_rule = by_address.filter(|_| address.is_some());
        let attempt = Attempt {
            account: None,
            address,
            now,
            admitted: Instant::now(),
        };
        let turn = match by_account {
            Some(rule) => Some(self.throttle.turn(&subject, &rule).await?),
            None => None,
        };
        if by_account.is_none() && address_rule.is_none() {
            return Ok(attempt);
        }
        let from = address.map(from).unwrap_or_default();
        let mut states = self
            .store
            .throttle_states(&[subject.clone(), from.clone()])
            .await?;
        let is_spent = |rule: &ThrottleRule, subject: &str| {
            let state = states.get(subject);
            state.is_some_and(|state| rule.is_spent(state, now))
        };
        let account_spent = by_account.is_some_and(|rule| is_spent(&rule, &subject));
        let address_wait =
            address_rule.and_then(|rule| states.get(&from).and_then(|state| rule.wait(state, now)));
        let mut home = None;
        if account_spent || address_wait.is_some() {
            // At home, what strangers did elsewhere, and others at the same address, does not count.
            home = self.home(user, address).await?;
            match &home {
                Some(home) => states.extend(self.store.throttle_states(from_ref(home)).await?),
                None => {
                    if let Some(retry_after) = address_wait {
                        return Err(Error::Throttled { retry_after });
                    }
                }
            }
        }
        let counted = home.as_ref().unwrap_or(&subject);
        if let (Some(rule), Some(state)) = (by_account, states.get(counted))
            && rule.is_spent(state, now)
        {
            if let Some(retry_after) = rule.wait(state, now) {
                return Err(Error::Throttled { retry_after });
            }
            // From here on one attempt at a time, over all replicas.
            let retry_after = rule.delay(rule.failures(state, now).saturating_add(1));
            let claimed = self.store.throttle_claim(counted, now + retry_after, now);
            if !claimed.await? {
                return Err(Error::Throttled { retry_after });
            }
        }
        let is_known = states.contains_key(counted);
        Ok(Attempt {
            account: turn.map(|turn| AccountAttempt {
                user,
                subject,
                home,
                is_known,
                _turn: turn,
            }),
            ..attempt
        })
    }

    /// Counts an attempt as failed.
    ///
    /// # Errors
    /// `Unavailable`: nobody is told then that it failed.
    pub(super) async fn attempt_failed(&self, attempt: Attempt) -> Result<()> {
        let now = attempt.now + attempt.admitted.elapsed();
        let Attempt {
            account, address, ..
        } = attempt;
        let mut counts = Vec::new();
        let mut is_home = false;
        // Borrowed: whoever waits for the turn is to see this failure.
        if let (Some(rule), Some(account)) = (self.throttle.account, &account) {
            let home = match &account.home {
                None => self.home(account.user, address).await?,
                home => home.clone(),
            };
            is_home = home.is_some();
            counts.push((home.unwrap_or_else(|| account.subject.clone()), rule));
        }
        if let (Some(rule), Some(address), false) = (self.throttle.address, address, is_home) {
            counts.push((from(address), rule));
        }
        if counts.is_empty() {
            return Ok(());
        }
        self.store.throttle_fail(&counts, now).await
    }

    /// Forgets what failed before. Should that not be possible now, it is forgiven in time.
    pub(super) async fn attempt_succeeded(&self, attempt: Attempt) {
        let Some(account) = attempt.account.filter(|account| account.is_known) else {
            return;
        };
        let subject = account.home.as_ref().unwrap_or(&account.subject);
        if let Err(error) = self.store.throttle_clear(subject).await {
            tracing::warn!(%error, "failed attempts before a success still count");
        }
    }

    /// Where a user counts apart, if they have logged in from this address before.
    async fn home(&self, user: UserId, address: Option<IpAddr>) -> Result<Option<String>> {
        let Some(address) = address else {
            return Ok(None);
        };
        let text = address.to_string();
        let is_home = self.store.session_any_from(user, &text).await?;
        Ok(is_home.then(|| format!("user {user} from {text}")))
    }
}

fn from(address: IpAddr) -> String {
    format!("from {}", network(address))
}

/// What one person has of the addresses: of IPv6 a whole /64.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let bits = address.to_bits() >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from_bits(bits))
        }
        address => address,
    }
}

/// Who tries what, in this process.
#[derive(Default)]
struct Turns(Mutex<HashMap<String, Arc<Semaphore>>>);

/// Given back when dropped.
struct Turn {
    turns: Arc<Turns>,
    subject: String,
    permit: Option<OwnedSemaphorePermit>,
}

impl Turns {
    async fn take(self: &Arc<Self>, subject: &str, places: usize) -> Turn {
        // Made first: should this be dropped while it waits, it cleans up all the same.
        let mut turn = Turn {
            turns: self.clone(),
            subject: subject.to_owned(),
            permit: None,
        };
        let places = self
            .lock()
            .entry(subject.to_owned())
            .or_insert_with(|| Arc::new(Semaphore::new(places)))
            .clone();
        turn.permit = places.acquire_owned().await.ok();
        turn
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Semaphore>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut turns = self.turns.lock();
        self.permit = None;
        // Nobody has it or waits for it but the map.
        if turns
            .get(&self.subject)
            .is_some_and(|places| Arc::strong_count(places) == 1)
        {
            turns.remove(&self.subject);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_one_and_of_ipv6_a_network() {
        for (address, of) in [
            ("192.0.2.7", "192.0.2.7"),
            ("::ffff:192.0.2.7", "192.0.2.7"),
            ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
            ("::1", "::"),
        ] {
            let address = network(address.parse().expect("an address"));
            assert_eq!(address.to_string(), of);
        }
    }

    #[tokio::test]
    async fn turns_are_bounded_and_nothing_is_left_of_them() {
        let turns = Arc::new(Turns::default());
        let (one, two) = (turns.take("a", 2).await, turns.take("a", 2).await);
        let waits = timeout(Duration::from_millis(20), turns.take("a", 2)).await;
        assert!(waits.is_err());
        let other = turns.take("b", 2).await;
        drop(one);
        let three = turns.take("a", 2).await;
        assert_eq!(turns.lock().len(), 2);
        drop((two, three, other));
        assert_eq!(turns.lock().len(), 0);
    }
}
