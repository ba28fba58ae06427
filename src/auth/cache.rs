//! What is known of credentials, in memory.
//!
//! Credentials that were verified, by their whole text; behind them sessions and API keys with their
//! users, and service keys, as last read from the database. Every answer carries a [`Stamp`]; the change feed
//! outdates stamps, so a hit costs no database and an outdated answer is read anew. While memory is
//! trusted, a thousand misses of one session make one read.

use std::{hash::Hash, sync::Arc};

use quick_cache::{UnitWeighter, Weighter, sync::Cache};
use tokio::time::timeout;

use super::{
    api_key_uses::LastUse,
    counters::Counters,
    freshness::{Freshness, Trust},
    recent::Recent,
    stamps::{Stamp, Stamps},
    validation::Validated,
};
use crate::{
    clock::BootTime,
    error::{Error, Result},
    model::{
        ApiKey, ApiKeyStanding, Change, SessionId, SessionStanding, TierName, UserId, UserStanding,
    },
    store::{ServiceStanding, Store},
};

/// Of the byte budget, in eighteenths: for the texts of credentials, for API keys, for users without
/// either and for those of them that were asked for last; the rest is for sessions.
const CREDENTIALS_SHARE: u64 = 6;
const API_KEYS_SHARE: u64 = 2;
const USERS_SHARE: u64 = 2;
const RECENT_USERS_SHARE: u64 = 2;
const SHARES: u64 = 18;

/// The text of an access token, about.
const TOKEN_BYTES: u64 = 600;
/// Beside a credential's text: its value, the map's own bookkeeping, the allocator's.
const ENTRY_BYTES: u64 = 256;
/// A session, or an API key without scopes, and its user with their texts.
const STANDING_BYTES: u64 = 896;
/// What decides about a user's usage.
const USER_BYTES: u64 = 192;
/// Beside the characters of a scope: its place in the set.
const SCOPE_BYTES: u64 = 40;

/// Service keys in use: people make them by hand, so there are few.
const SERVICE_KEYS: usize = 4096;
/// Keys that are no key: enough to blunt a loop that presents one, too few to matter.
const UNKNOWN_KEYS: usize = 4096;

/// All services' answers share one stamp: they are few and seldom change.
const SERVICES: &str = "services";

/// Of what was no API key when it was asked for.
const API_KEYS: &str = "api_keys";

/// See the module.
pub(super) struct CredentialCache {
    store: Store,
    credentials: Cache<Box<str>, Verified, ByLength>,
    standings: Answers<SessionId, SessionStanding>,
    users: Answers<UserId, UserStanding>,
    recent_users: Recent<UserId, RecentUser>,
    /// By the hash of a key, as are the next ones.
    api_keys: Answers<Vec<u8>, KnownApiKey, ByScopes>,
    unknown_api_keys: Answers<Vec<u8>, KnownApiKey>,
    services: Answers<Vec<u8>, ServiceStanding>,
    unknown_keys: Answers<Vec<u8>, ServiceStanding>,
    stamps: Stamps,
    freshness: Freshness,
    counters: Counters,
}

type Answers<K, V, W = UnitWeighter> = Cache<K, Arc<Answer<V>>, W>;

/// A credential whose text has been checked: only its state is open.
#[derive(Clone)]
pub(super) enum Verified {
    /// An access token or an API key.
    User(Validated),
    ServiceKey(Arc<Answer<ServiceStanding>>),
}

/// An API key, and when it was used since it was read.
pub(super) struct KnownApiKey {
    pub(super) standing: ApiKeyStanding,
    pub(super) last_use: Arc<LastUse>,
}

/// How much is remembered of credentials, and of sessions and API keys behind them.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Credentials.
    pub entries: u64,
    /// Estimated.
    pub bytes: u64,
    pub bytes_limit: u64,
}

/// A user who is not disabled, as last read, but for the id.
#[derive(Clone)]
struct RecentUser {
    tier: TierName,
    stamp: Stamp,
}

// With a lock on one line of the processor's cache.
const _: () = assert!(size_of::<Option<(UserId, RecentUser)>>() <= 56);

/// Where an answer may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Memory; while the database is away, memory that may have missed changes too.
    Any,
    /// Memory only as far as all changes up to now were heard of.
    Heard,
    /// Not memory.
    Database,
}

/// What the database said, and when.
pub(super) struct Answer<T> {
    /// `None`: there is no such thing.
    pub(super) value: Option<T>,
    stamp: Stamp,
}

impl CredentialCache {
    /// A cache of about `bytes` at most.
    pub(super) fn new(store: Store, bytes: u64, freshness: Freshness) -> Self {
        let credentials = bytes / SHARES * CREDENTIALS_SHARE;
        let api_keys = bytes / SHARES * API_KEYS_SHARE;
        let users = bytes / SHARES * USERS_SHARE;
        let recent_users = bytes / SHARES * RECENT_USERS_SHARE;
        let standings = bytes - credentials - api_keys - users - recent_users;
        let items = |bytes: u64, each: u64| {
            let items = (bytes / each).max(1);
            usize::try_from(items).unwrap_or(usize::MAX)
        };
        let typical = items(credentials, TOKEN_BYTES + ENTRY_BYTES);
        Self {
            store,
            credentials: Cache::with_weighter(typical, credentials, ByLength),
            standings: Cache::new(items(standings, STANDING_BYTES)),
            users: Cache::new(items(users, USER_BYTES)),
            recent_users: Recent::new(recent_users),
            api_keys: Cache::with_weighter(items(api_keys, STANDING_BYTES), api_keys, ByScopes),
            unknown_api_keys: Cache::new(UNKNOWN_KEYS),
            services: Cache::new(SERVICE_KEYS),
            unknown_keys: Cache::new(UNKNOWN_KEYS),
            stamps: Stamps::new(),
            freshness,
            counters: Counters::default(),
        }
    }

    pub(super) fn freshness(&self) -> &Freshness {
        &self.freshness
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(super) fn memory(&self) -> Memory {
        Memory {
            entries: self.credentials.len() as u64,
            bytes: self.credentials.weight()
                + self.standings.weight() * STANDING_BYTES
                + self.api_keys.weight()
                + self.users.weight() * USER_BYTES
                + self.recent_users.bytes(),
            bytes_limit: self.credentials.capacity()
                + self.standings.capacity() * STANDING_BYTES
                + self.api_keys.capacity()
                + self.users.capacity() * USER_BYTES
                + self.recent_users.bytes_limit(),
        }
    }

    /// Outdates what `change` contradicts.
    pub(super) fn apply(&self, change: Change) {
        let Counters {
            user_changes,
            service_changes,
            flushes,
            ..
        } = &self.counters;
        match change {
            Change::User(id) => {
                user_changes.add_one();
                self.stamps.outdate(id);
            }
            // Nothing that is remembered here follows from it.
            Change::Quota(_) => {}
            Change::NewApiKey => {
                user_changes.add_one();
                self.stamps.outdate(API_KEYS);
            }
            Change::Services => {
                service_changes.add_one();
                self.stamps.outdate(SERVICES);
            }
            Change::All => {
                flushes.add_one();
                self.stamps.outdate_all();
            }
        }
    }

    /// Changes may have been missed: everything is read anew before it is believed. Only while the
    /// database cannot be read does memory last, from when it was known to be true.
    pub(super) fn doubt(&self) {
        self.counters.flushes.add_one();
        self.freshness.end_epoch(self.stamps.doubt_all());
    }

    /// What is known of a credential's text, if it was verified before.
    pub(super) fn credential(&self, text: &str) -> Option<Verified> {
        self.credentials.get(text)
    }

    /// Remembers a verified credential.
    pub(super) fn remember(&self, text: &str, verified: Verified) {
        self.credentials.insert(text.into(), verified);
    }

    /// Forgets a credential that will not be good again.
    pub(super) fn forget(&self, text: &str) {
        self.credentials.remove(text);
    }

    /// Whether an answer may be given again.
    pub(super) fn holds<T>(&self, answer: &Answer<T>, now: BootTime) -> bool {
        self.is_good(answer.stamp, now)
    }

    fn is_good(&self, stamp: Stamp, now: BootTime) -> bool {
        self.stamps.is_current(stamp) && self.freshness.trust(now) == Trust::Live
    }

    /// The session of a token of `user_id` as it stands.
    ///
    /// # Errors
    /// `Unavailable` when the database is needed and away.
    pub(super) async fn standing(
        &self,
        id: SessionId,
        user_id: UserId,
        source: Source,
        now: BootTime,
    ) -> Result<Arc<Answer<SessionStanding>>> {
        let read = || self.read(user_id, || self.store.session_standing(id));
        if source == Source::Database {
            let answer = Box::pin(read()).await?;
            self.standings.insert(id, answer.clone());
            return Ok(answer);
        }
        self.answer(&self.standings, id, read, source, now).await
    }

    /// Has what [`Self::known_user`] looks at first on its way from memory.
    pub(super) fn prefetch_user(&self, id: UserId) {
        self.recent_users.prefetch(id);
        self.stamps.prefetch(id);
    }

    /// As [`Self::user`] does, from memory that may be trusted.
    pub(super) fn known_user(&self, id: UserId, now: BootTime) -> Option<UserStanding> {
        let recent = self.recent_users.get(id);
        if let Some(recent) = recent.filter(|recent| self.is_good(recent.stamp, now)) {
            return Some(UserStanding {
                id,
                tier: recent.tier,
                is_active: true,
            });
        }
        let answer = self.users.get(&id).filter(|known| self.holds(known, now))?;
        let standing = answer.value.clone()?;
        if standing.is_active {
            let recent = RecentUser {
                tier: standing.tier.clone(),
                stamp: answer.stamp,
            };
            self.recent_users.insert(id, recent);
        }
        Some(standing)
    }

    /// What decides about a user's usage, as it stands.
    ///
    /// # Errors
    /// `Unavailable` when the database is needed and away.
    pub(super) async fn user(
        &self,
        id: UserId,
        now: BootTime,
    ) -> Result<Arc<Answer<UserStanding>>> {
        let read = || self.read(id, || self.store.user_standing(id));
        let answer = self.answer(&self.users, id, read, Source::Any, now).await?;
        if answer.value.is_none() {
            // Anybody can make ids up, and the feed does not tell of new users.
            self.users.remove(&id);
        }
        Ok(answer)
    }

    /// The API key of a hash as it stands. One that `is_known` was a key before.
    ///
    /// # Errors
    /// `Unavailable` when the database is needed and away.
    pub(super) async fn api_key(
        &self,
        key_hash: Vec<u8>,
        is_known: bool,
        source: Source,
        now: BootTime,
    ) -> Result<Arc<Answer<KnownApiKey>>> {
        if source != Source::Database
            && let Some(unknown) = self.unknown_api_keys.get(&key_hash)
            && self.holds(&unknown, now)
        {
            return Ok(unknown);
        }
        let read = || self.read_api_key(&key_hash, is_known);
        let answer = if source == Source::Database {
            let answer = Box::pin(read()).await?;
            self.api_keys.insert(key_hash.clone(), answer.clone());
            answer
        } else {
            let key_hash = key_hash.clone();
            self.answer(&self.api_keys, key_hash, read, source, now)
                .await?
        };
        if answer.value.is_none() {
            self.api_keys.remove(&key_hash);
            self.unknown_api_keys.insert(key_hash, answer.clone());
        }
        Ok(answer)
    }

    /// The service account of a key, by the key's hash, as it stands. One that `is_known` was a key
    /// before.
    ///
    /// # Errors
    /// `Unavailable` when the database is needed and away.
    pub(super) async fn service(
        &self,
        key_hash: Vec<u8>,
        is_known: bool,
        now: BootTime,
    ) -> Result<Arc<Answer<ServiceStanding>>> {
        // Keys that are no key have a place of their own: they cannot push good ones out.
        if let Some(unknown) = self.unknown_keys.get(&key_hash)
            && self.holds(&unknown, now)
        {
            return Ok(unknown);
        }
        let look = || self.store.service_by_key_hash(&key_hash, is_known);
        let read = || self.read(SERVICES, look);
        let answer = self
            .answer(&self.services, key_hash.clone(), read, Source::Any, now)
            .await?;
        if answer.value.is_none() {
            self.services.remove(&key_hash);
            self.unknown_keys.insert(key_hash, answer.clone());
        }
        Ok(answer)
    }

    /// An answer from memory while that may be trusted, else by `read` from the database, else, when
    /// the database is away, from memory once more as far as `source` allows.
    async fn answer<K, V, W, F>(
        &self,
        cache: &Answers<K, V, W>,
        key: K,
        read: impl Fn() -> F,
        source: Source,
        now: BootTime,
    ) -> Result<Arc<Answer<V>>>
    where
        K: Clone + Eq + Hash,
        W: Weighter<K, Arc<Answer<V>>> + Clone,
        F: Future<Output = Result<Arc<Answer<V>>>>,
    {
        if let Some(known) = cache.get(&key)
            && self.holds(&known, now)
        {
            return Ok(known);
        }
        // A read is kilobytes of future, which every call would carry through all its layers.
        Box::pin(self.answer_anew(cache, key, read, source, now)).await
    }

    /// As [`Self::answer`] does, when memory has none that may be trusted.
    async fn answer_anew<K, V, W, F>(
        &self,
        cache: &Answers<K, V, W>,
        key: K,
        read: impl Fn() -> F,
        source: Source,
        now: BootTime,
    ) -> Result<Arc<Answer<V>>>
    where
        K: Clone + Eq + Hash,
        W: Weighter<K, Arc<Answer<V>>> + Clone,
        F: Future<Output = Result<Arc<Answer<V>>>>,
    {
        let mut held = None;
        let read_anew = async {
            if self.freshness.trust(now) == Trust::Live {
                // A change that is heard of during the read outdates it: once more.
                for _ in 0..3 {
                    // While the database is silent, those who wait for the same read would try one
                    // after the other: together they wait no longer than one.
                    let shared = cache.get_or_insert_async(&key, read());
                    let answer = self.within_bound(shared).await?;
                    if self.stamps.is_current(answer.stamp) {
                        return Ok(answer);
                    }
                    cache.remove_if(&key, |held| Arc::ptr_eq(held, &answer));
                    held = Some(answer);
                }
            }
            let answer = read().await?;
            cache.insert(key.clone(), answer.clone());
            Ok(answer)
        }
        .await;
        let Err(error @ Error::Unavailable(_)) = read_anew else {
            return read_anew;
        };
        let answer = held.or_else(|| cache.get(&key)).filter(|held| {
            let stamp = held.stamp;
            match source {
                Source::Any => {
                    !self.stamps.is_contradicted(stamp) && self.freshness.lasts(stamp.epoch(), now)
                }
                Source::Heard => self.stamps.is_current(stamp),
                Source::Database => false,
            }
        });
        let answer = answer.ok_or(error)?;
        // For the next one, too: it may have been taken out to be read anew.
        cache.insert(key, answer.clone());
        self.counters.outage_answers.add_one();
        Ok(answer)
    }

    async fn read<V, F>(&self, group: impl Hash, read: impl FnOnce() -> F) -> Result<Arc<Answer<V>>>
    where
        F: Future<Output = Result<Option<V>>>,
    {
        // Before the read: a change that commits meanwhile must outdate what is read.
        let stamp = self.stamps.of(group);
        let value = self.in_time(read()).await?;
        Ok(Arc::new(Answer { value, stamp }))
    }

    /// As [`Self::read`], for a key whose user is not known before it is looked up.
    async fn read_api_key(
        &self,
        key_hash: &[u8],
        is_known: bool,
    ) -> Result<Arc<Answer<KnownApiKey>>> {
        let unknown = self.stamps.of(API_KEYS);
        let of_user = |user_id| self.stamps.of(user_id);
        let read = self.store.api_key_by_hash(key_hash, is_known, of_user);
        let held = self.api_keys.peek(key_hash);
        let held = held.and_then(|held| Some(held.value.as_ref()?.last_use.clone()));
        let last_use = held.unwrap_or_default();
        Ok(Arc::new(match self.in_time(read).await? {
            Some((stamp, standing)) => Answer {
                value: Some(KnownApiKey { standing, last_use }),
                stamp,
            },
            None => Answer {
                value: None,
                stamp: unknown,
            },
        }))
    }

    /// A silent database must not hold the answer that memory may still give.
    async fn in_time<T>(&self, read: impl Future<Output = Result<T>>) -> Result<T> {
        self.counters.reads.add_one();
        self.within_bound(read).await
    }

    async fn within_bound<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        timeout(self.freshness.staleness_bound(), work)
            .await
            .map_err(|silence| Error::Unavailable(silence.into()))?
    }
}

/// What is known of an API key counts here as well: it stays for as long as either holds it.
#[derive(Clone)]
struct ByLength;

impl Weighter<Box<str>, Verified> for ByLength {
    fn weight(&self, text: &Box<str>, verified: &Verified) -> u64 {
        let held = match verified {
            Verified::User(validated) => validated.api_key().map_or(0, api_key_bytes),
            Verified::ServiceKey(_) => 0,
        };
        text.len() as u64 + ENTRY_BYTES + held
    }
}

/// By the bytes of an API key: its scopes are as many and as long as its owner likes, within bounds.
#[derive(Clone)]
struct ByScopes;

impl Weighter<Vec<u8>, Arc<Answer<KnownApiKey>>> for ByScopes {
    fn weight(&self, _: &Vec<u8>, answer: &Arc<Answer<KnownApiKey>>) -> u64 {
        let known = answer.value.as_ref();
        known.map_or(STANDING_BYTES, |known| api_key_bytes(&known.standing.key))
    }
}

fn api_key_bytes(key: &ApiKey) -> u64 {
    let bytes = |scope: &str| scope.len() as u64 + SCOPE_BYTES;
    STANDING_BYTES + key.scopes.iter().map(bytes).sum::<u64>()
}
