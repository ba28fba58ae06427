//! Slows guessing down: who fails waits, for longer each time, on whichever replica they come.
//!
//! Failures count against
//!
//! - `user ID`: an account, by whichever of its names, for those who come from elsewhere;
//! - `user ID from NETWORK`: the same account from its home, a network in which its user has logged in
//!   before, so that strangers who guess do not keep the user out;
//! - `name HASH`: a name that nobody has. It must look as if somebody had;
//! - `from NETWORK`, `new NETWORK`, `reset NETWORK`: failed logins, registrations, and resets
//!   of passwords that were asked for, from a network, whoever's home it is:
//!   else it would tell whose;
//! - `own ID`: the present password, asked for within a session. Apart from the logins: whoever stole a
//!   session must not keep the user from logging in, and no guesser at the door keeps the user from a
//!   new password;
//! - `mfa ID`: codes of a second factor at a login, for those who come from elsewhere;
//! - `mfa ID from NETWORK` and `mfa ID at home`: the same from a network in which the user has logged in with
//!   a second factor before, by network and in all;
//! - `recovery ID from NETWORK`: recovery codes, which nobody guesses;
//! - `own mfa ID`, `own recovery ID`: such codes within a session.

mod codes;
pub(super) mod network;
mod turns;

pub(super) use codes::CodeAttempt;
pub(super) use network::networks;

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use tokio::{runtime::Handle, sync::Semaphore, time::timeout};
use tracing::Instrument as _;
use uuid::Uuid;

use super::{Auth, MasterKey};
use crate::{
    config::{PasswordSettings, ThrottleSettings},
    error::{Error, Result},
    model::{Identifier, Origin, ThrottleRule, ThrottleState, UserId},
    store::{Credentials, LoginStanding, LoginSubjects, Store},
};
use network::from;
use turns::{Turn, Turns};

/// A day without guesses forgives a hundred of them.
const ACCOUNT_FORGIVEN_IN: Duration = Duration::from_mins(15);

/// Many may share an address.
const ADDRESS_FORGIVEN_IN: Duration = Duration::from_secs(6);
const ADDRESS_MAX_DELAY: Duration = Duration::from_mins(1);

const FIRST_DELAY: Duration = Duration::from_secs(1);

/// The rules, and what is being tried now.
pub(super) struct Throttle {
    account: Option<ThrottleRule>,
    pub(super) address: Option<ThrottleRule>,
    codes: ThrottleRule,
    /// Hides names that somebody tried.
    names: hmac::Key,
    turns: Arc<Turns>,
    turn_timeout: Duration,
    /// How often failed logins were counted or forgotten by this replica.
    changes: AtomicU64,
}

/// What was known before an attempt had its turn.
struct Known {
    states: HashMap<String, ThrottleState>,
    /// As of before they were read.
    changes: u64,
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
    /// What counts instead, if this is a home.
    home: Option<String>,
    /// `None`: not looked up yet.
    is_home: Option<bool>,
    is_known: bool,
    claim: Option<Claim>,
    rule: ThrottleRule,
    _turn: Turn,
}

/// What is tried, and what failing costs.
struct Guarded {
    user: UserId,
    subject: String,
    rule: Option<ThrottleRule>,
    known: Option<Known>,
}

impl AccountAttempt {
    /// What failures count against.
    fn counted(&self) -> &str {
        match (&self.home, self.is_home) {
            (Some(home), Some(true)) => home,
            _ => &self.subject,
        }
    }
}

/// The one attempt that may be made now. Given back when dropped: it was not made, for want of a thread or
/// as the caller hung up, and must not cost the user the wait.
struct Claim {
    store: Store,
    subject: String,
    until: DateTime<Utc>,
    now: DateTime<Utc>,
    runtime: Handle,
    is_kept: bool,
}

impl Claim {
    fn keep(&mut self) {
        self.is_kept = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        let (store, subject) = (self.store.clone(), std::mem::take(&mut self.subject));
        let (until, now) = (self.until, self.now);
        self.runtime.spawn(async move {
            if let Err(error) = store.throttle_unclaim(&subject, until, now).await {
                tracing::warn!(
                    error = error.with_causes(),
                    "an attempt that was not made still costs a wait"
                );
            }
        });
    }
}

/// What failed logins of a user count against, unless they are tried at a home.
fn account(user: UserId) -> String {
    format!("{}{user}", LoginSubjects::USER)
}

/// What counts instead of a subject if around this address is a home.
fn at_home(subject: &str, address: IpAddr) -> String {
    format!("{subject} {}", from(address))
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
            codes: codes::rule(account),
            names: master_key.mac_key("login-throttle/v1"),
            turns: Arc::default(),
            turn_timeout: passwords.queue_timeout,
            changes: AtomicU64::new(0),
        }
    }

    fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// To be told before the turn of what was counted ends.
    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
    }

    fn name(&self, identifier: &Identifier) -> String {
        let name = match identifier {
            Identifier::Email(email) => email.as_str(),
            Identifier::Username(username) => username.as_str(),
        };
        let hash = hmac::sign(&self.names, name.to_ascii_lowercase().as_bytes());
        format!("name {}", URL_SAFE_NO_PAD.encode(hash))
    }

    /// A turn to try something from somewhere: as many at once as may fail for free, or racing guesses
    /// would not see each other's failures. By network: strangers who come in floods take no turn of the
    /// user's.
    async fn turn(
        &self,
        subject: &str,
        address: Option<IpAddr>,
        rule: &ThrottleRule,
    ) -> Result<Turn> {
        let places = usize::try_from(rule.free).unwrap_or(usize::MAX);
        let whose = match address {
            Some(address) => format!("{subject} {}", from(address)),
            None => subject.to_owned(),
        };
        let waiting = self.turns.take(&whose, places.min(Semaphore::MAX_PERMITS));
        timeout(self.turn_timeout, waiting)
            .await
            .map_err(|_| Error::Overloaded {
                retry_after: FIRST_DELAY,
            })
    }
}

impl Auth {
    /// Finds whom a login is for, and lets it be tried: by the account if the name is somebody's.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(super) async fn admit_login(
        &self,
        identifier: &Identifier,
        origin: &Origin,
        now: DateTime<Utc>,
    ) -> Result<(Option<Credentials>, Attempt)> {
        let subjects = LoginSubjects {
            at_home: origin.address.map(|address| at_home("", address)),
            nobody: self.throttle.name(identifier),
            from: origin.address.map(from),
        };
        let changes = self.throttle.changes();
        let LoginStanding {
            known,
            throttle: states,
        } = self.store.login_standing(identifier, &subjects).await?;
        let id = known.as_ref().map(|known| known.user.id);
        let what = Guarded {
            user: id.unwrap_or(UserId(Uuid::nil())),
            subject: id.map_or(subjects.nobody, account),
            rule: self.throttle.account,
            known: Some(Known { states, changes }),
        };
        Ok((known, self.admit(what, origin.address, now).await?))
    }

    /// Lets the present password be asked for within a session.
    ///
    /// # Errors
    /// `Throttled` · `Overloaded` · `Unavailable`
    pub(super) async fn admit_own(&self, user: UserId, now: DateTime<Utc>) -> Result<Attempt> {
        let what = Guarded {
            user,
            subject: format!("own {user}"),
            rule: self.throttle.account,
            known: None,
        };
        self.admit(what, None, now).await
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
        self.admit_from("new", origin, now).await
    }

    async fn admit(
        &self,
        what: Guarded,
        address: Option<IpAddr>,
        now: DateTime<Utc>,
    ) -> Result<Attempt> {
        let Guarded {
            user,
            subject,
            rule: by_account,
            known,
        } = what;
        let by_address = self.throttle.address;
        let by_address = by_address.zip(address.map(from));
        let mut attempt = Attempt {
            account: None,
            address,
            now,
            admitted: Instant::now(),
        };
        let turn = match by_account {
            Some(rule) => Some(self.throttle.turn(&subject, address, &rule).await?),
            None => None,
        };
        if by_account.is_none() && by_address.is_none() {
            return Ok(attempt);
        }
        let home = address.map(|address| at_home(&subject, address));
        let mut subjects = vec![subject.clone()];
        subjects.extend(home.clone());
        subjects.extend(by_address.as_ref().map(|(_, from)| from.clone()));
        let is_late = turn.as_ref().is_some_and(|turn| turn.is_late);
        let states = match known {
            // Whoever had a turn before, and failed, is in them.
            Some(known) if known.changes == self.throttle.changes() && !is_late => known.states,
            _ => self.store.throttle_states(&subjects).await?,
        };
        if let Some((rule, from)) = by_address
            && let Some(retry_after) = states.get(&from).and_then(|state| rule.wait(state, now))
        {
            return Err(Error::Throttled { retry_after });
        }
        let Some((rule, turn)) = by_account.zip(turn) else {
            return Ok(attempt);
        };
        let is_home = match &home {
            None => Some(false),
            // It was one when something failed there.
            Some(home) if states.contains_key(home) => Some(true),
            // At home, what strangers did elsewhere does not count.
            Some(_) => match states.get(&subject) {
                Some(state) if rule.is_spent(state, now) => {
                    Some(self.is_home(user, address).await?)
                }
                _ => None,
            },
        };
        let mut account = AccountAttempt {
            user,
            subject,
            home,
            is_home,
            is_known: false,
            claim: None,
            rule,
            _turn: turn,
        };
        if let Some(state) = states.get(account.counted()) {
            account.is_known = true;
            if rule.is_spent(state, now) {
                if let Some(retry_after) = rule.wait(state, now) {
                    return Err(Error::Throttled { retry_after });
                }
                // From here on one attempt at a time, over all replicas.
                let wait = rule.delay(rule.failures(state, now).saturating_add(1));
                account.claim = Some(self.claim(account.counted(), &rule, wait, now).await?);
            }
        }
        attempt.account = Some(account);
        Ok(attempt)
    }

    async fn claim(
        &self,
        subject: &str,
        rule: &ThrottleRule,
        wait: Duration,
        now: DateTime<Utc>,
    ) -> Result<Claim> {
        // Made first: should this be dropped while it is being taken, it is given back all the same.
        let mut claim = Claim {
            store: self.store.clone(),
            subject: subject.to_owned(),
            until: now + wait,
            now,
            runtime: Handle::current(),
            is_kept: false,
        };
        let latest = rule.latest(now);
        let claiming = self.store.throttle_claim(subject, claim.until, latest, now);
        if !claiming.await? {
            claim.keep();
            return Err(Error::Throttled { retry_after: wait });
        }
        Ok(claim)
    }

    /// Counts an attempt as failed, also for a caller who is gone by now or out of time: who sets the
    /// deadline between a success and a failure has failed all the same.
    ///
    /// # Errors
    /// `Unavailable`: nobody is told then that it failed.
    pub(super) async fn attempt_failed(&self, attempt: Attempt) -> Result<()> {
        let auth = self.clone();
        let counting = async move { auth.count_failure(attempt).await };
        tokio::spawn(counting.in_current_span())
            .await
            .map_err(Error::internal)?
    }

    async fn count_failure(&self, attempt: Attempt) -> Result<()> {
        let now = attempt.now + attempt.admitted.elapsed();
        let Attempt {
            mut account,
            address,
            ..
        } = attempt;
        let mut counts = Vec::new();
        // Borrowed: whoever waits for the turn is to see this failure.
        if let Some(account) = &mut account {
            if let Some(claim) = &mut account.claim {
                claim.keep();
            }
            if account.is_home.is_none() {
                account.is_home = Some(self.is_home(account.user, address).await?);
            }
            counts.push((account.counted().to_owned(), account.rule));
        }
        if let (Some(rule), Some(address)) = (self.throttle.address, address) {
            counts.push((from(address), rule));
        }
        if counts.is_empty() {
            return Ok(());
        }
        self.fail(&counts, now).await
    }

    /// Counts failures. Logins that have read what failed before, and have no turn yet, read it again.
    async fn fail(&self, counts: &[(String, ThrottleRule)], now: DateTime<Utc>) -> Result<()> {
        let counted = self.store.throttle_fail(counts, now).await;
        // Also when nobody can say whether they were.
        self.throttle.changed();
        counted
    }

    /// Forgets what failed before. Should that not be possible now, it is forgiven in time.
    pub(super) async fn attempt_succeeded(&self, attempt: Attempt) {
        let Some(mut account) = attempt.account.filter(|account| account.is_known) else {
            return;
        };
        let cleared = self.store.throttle_clear(account.counted()).await;
        self.throttle.changed();
        if let Err(error) = cleared {
            tracing::warn!(
                error = error.with_causes(),
                "failed attempts before a success still count"
            );
        } else if let Some(claim) = &mut account.claim {
            claim.keep();
        }
    }

    /// Whether a user has logged in from around this address before.
    async fn is_home(&self, user: UserId, address: Option<IpAddr>) -> Result<bool> {
        match address {
            Some(address) => {
                self.store
                    .session_any_from(user, &networks(address), false)
                    .await
            }
            None => Ok(false),
        }
    }
}
