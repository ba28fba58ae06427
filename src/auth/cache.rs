//! What is known of credentials, in memory.
//!
//! Three layers: credentials that were verified, by their whole text; sessions with their users,
//! and service keys, as last read from the database. Every answer carries a [`Stamp`]; the change
//! feed outdates stamps, so a hit costs no database and an outdated answer is read anew. A thousand
//! misses of one session make one read.

use std::{hash::Hash, sync::Arc};

use quick_cache::{Weighter, sync::Cache};
use tokio::time::timeout;

use super::{
    access_token::Claims,
    freshness::{BootTime, Freshness, Trust},
    stamps::{Stamp, Stamps},
};
use crate::{
    error::{Error, Result},
    model::{Change, SessionId, SessionStanding, UserId},
    store::{ServiceStanding, Store},
};

/// Beside a key's text: its value, the map's own bookkeeping, the allocator's.
const ENTRY_BYTES: u64 = 160;
/// A session and its user with their texts.
const STANDING_BYTES: u64 = 768;

/// Shares of the byte budget, in eighths.
const CREDENTIALS_SHARE: u64 = 5;

/// Keys that are no key: enough to blunt a loop that presents one, too few to matter.
const UNKNOWN_KEYS: usize = 4096;

/// See the module.
pub(super) struct CredentialCache {
    store: Store,
    credentials: Cache<Box<str>, Verified, ByLength>,
    standings: Answers<Standings>,
    services: Answers<Services>,
    unknown_keys: Answers<Services>,
    stamps: Stamps,
    freshness: Freshness,
}

/// A credential whose text has been checked: only its state is open.
#[derive(Clone)]
pub(super) enum Verified {
    Token(Arc<Claims>, Arc<Answer<SessionStanding>>),
    ServiceKey(Arc<Answer<ServiceStanding>>),
}

/// What the database said, and when.
pub(super) struct Answer<T> {
    /// `None`: there is no such thing.
    pub(super) value: Option<T>,
    stamp: Stamp,
}

/// All services' answers share one stamp: they are few and seldom change.
const SERVICES: &str = "services";

impl CredentialCache {
    /// A cache of about `bytes` at most.
    pub(super) fn new(store: Store, bytes: u64, freshness: Freshness) -> Self {
        let credentials = bytes / 8 * CREDENTIALS_SHARE;
        let standings = ((bytes - credentials) / STANDING_BYTES).max(1);
        let standings = usize::try_from(standings).unwrap_or(usize::MAX);
        let typical = usize::try_from(credentials / (600 + ENTRY_BYTES)).unwrap_or(usize::MAX);
        Self {
            store,
            credentials: Cache::with_weighter(typical.max(1), credentials, ByLength),
            standings: Cache::new(standings),
            services: Cache::new(UNKNOWN_KEYS),
            unknown_keys: Cache::new(UNKNOWN_KEYS),
            stamps: Stamps::new(),
            freshness,
        }
    }

    pub(super) fn freshness(&self) -> &Freshness {
        &self.freshness
    }

    /// Outdates what `change` contradicts.
    pub(super) fn apply(&self, change: Change) {
        match change {
            Change::User(id) => self.stamps.outdate(id),
            Change::Services => self.stamps.outdate(SERVICES),
        }
    }

    /// Outdates everything: changes may have been missed.
    pub(super) fn flush(&self) {
        self.stamps.outdate_all();
    }

    /// What is known of a credential's text, if it was verified before.
    pub(super) fn credential(&self, text: &str) -> Option<Verified> {
        self.credentials.get(text)
    }

    /// Remembers a verified credential.
    pub(super) fn remember(&self, text: &str, verified: Verified) {
        self.credentials.insert(text.into(), verified);
    }

    pub(super) fn forget(&self, text: &str) {
        self.credentials.remove(text);
    }

    /// Whether an answer may be given again.
    pub(super) fn holds<T>(&self, answer: &Answer<T>, now: BootTime) -> bool {
        self.stamps.is_current(answer.stamp) && self.freshness.trust(now) == Trust::Live
    }

    /// The session of a token of `user_id` as it stands.
    ///
    /// # Errors
    /// `Unavailable` when the database is needed and away.
    pub(super) async fn standing(
        &self,
        id: SessionId,
        user_id: UserId,
        now: BootTime,
    ) -> Result<Arc<Answer<SessionStanding>>> {
        self.answer::<Standings, _>(&self.standings, id, user_id, now)
            .await
    }

    /// The service account of a key, by the key's hash, as it stands.
    ///
    /// # Errors
    /// `Unavailable` when the database is needed and away.
    pub(super) async fn service(
        &self,
        key_hash: Vec<u8>,
        now: BootTime,
    ) -> Result<Arc<Answer<ServiceStanding>>> {
        // Keys that are no key have a place of their own: they cannot push good ones out.
        if let Some(unknown) = self.unknown_keys.get(&key_hash)
            && self.holds(&unknown, now)
        {
            return Ok(unknown);
        }
        let answer = self
            .answer::<Services, _>(&self.services, key_hash.clone(), SERVICES, now)
            .await?;
        if answer.value.is_none() {
            self.services.remove(&key_hash);
            self.unknown_keys.insert(key_hash, answer.clone());
        }
        Ok(answer)
    }

    /// An answer from memory while that may be trusted, else from the database, else, when the
    /// database is away, from memory once more for as long as that is allowed.
    async fn answer<S: Source, G: Hash + Copy + Send>(
        &self,
        cache: &Answers<S>,
        key: S::Key,
        group: G,
        now: BootTime,
    ) -> Result<Arc<Answer<S::Value>>> {
        if self.freshness.trust(now) == Trust::Live {
            // A change that is heard of during the read outdates it: once more.
            for _ in 0..3 {
                let read = self.read::<S, G>(&key, group);
                let answer = cache.get_or_insert_async(&key, read).await?;
                if self.stamps.is_current(answer.stamp) {
                    return Ok(answer);
                }
                cache.remove_if(&key, |held| Arc::ptr_eq(held, &answer));
            }
        }
        match self.read::<S, G>(&key, group).await {
            Ok(answer) => {
                cache.insert(key, answer.clone());
                Ok(answer)
            }
            Err(error @ Error::Unavailable(_)) => {
                let trusted = self.freshness.trust(now) != Trust::Lost;
                let held = cache
                    .get(&key)
                    .filter(|held| self.stamps.is_current(held.stamp));
                held.filter(|_| trusted).ok_or(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn read<S: Source, G: Hash>(
        &self,
        key: &S::Key,
        group: G,
    ) -> Result<Arc<Answer<S::Value>>> {
        // Before the read: a change that commits meanwhile must outdate what is read.
        let stamp = self.stamps.of(group);
        // A silent database must not hold the answer that memory may still give.
        let limit = self.freshness.staleness_bound();
        let value = timeout(limit, S::read(&self.store, key))
            .await
            .map_err(|silence| Error::Unavailable(silence.into()))??;
        Ok(Arc::new(Answer { value, stamp }))
    }
}

/// Where answers come from.
trait Source {
    type Key: Clone + Eq + Hash + Send + Sync;
    type Value: Send + Sync;

    fn read(
        store: &Store,
        key: &Self::Key,
    ) -> impl Future<Output = Result<Option<Self::Value>>> + Send;
}

type Answers<S> = Cache<<S as Source>::Key, Arc<Answer<<S as Source>::Value>>>;

/// Sessions with their users.
struct Standings;

impl Source for Standings {
    type Key = SessionId;
    type Value = SessionStanding;

    async fn read(store: &Store, id: &SessionId) -> Result<Option<SessionStanding>> {
        store.session_standing(*id).await
    }
}

/// Service accounts, by the hash of a key.
struct Services;

impl Source for Services {
    type Key = Vec<u8>;
    type Value = ServiceStanding;

    async fn read(store: &Store, key_hash: &Vec<u8>) -> Result<Option<ServiceStanding>> {
        store.service_by_key_hash(key_hash).await
    }
}

#[derive(Clone)]
struct ByLength;

impl Weighter<Box<str>, Verified> for ByLength {
    fn weight(&self, text: &Box<str>, _: &Verified) -> u64 {
        text.len() as u64 + ENTRY_BYTES
    }
}
