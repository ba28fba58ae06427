//! Clients that reserve, commit and release quota whatever happens to the replicas, and what they
//! know of it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        CreateUserRequest, SetQuotaOverrideRequest, admin_service_client::AdminServiceClient,
        create_user_request::Credential, set_quota_override_request::Limit,
    },
    usage::v1::{
        CommitReservationRequest, CommitReservationResponse, ExtendReservationRequest,
        ReleaseReservationRequest, ReserveQuotaRequest, ReserveQuotaResponse, TokenCounts,
        commit_reservation_response::Outcome, reserve_quota_request::Mode,
        usage_service_client::UsageServiceClient,
    },
};
use tonic::{Code, Request, Response, Status, transport::Channel};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use crate::harness::{PASSWORD, reason, with_bearer};

/// A model that has a limit of its own, beside one that has none.
pub(super) const METERED: &str = "metered";
pub(super) const UNMETERED: &str = "unmetered";

/// Tokens that a request is expected to use, at most.
const MAX_TOKENS: u64 = 200;
/// Of each user at first; and what is added when it is used up, so that it always nearly is.
const LIMIT: i64 = 400;
const STEP: i64 = 800;

/// Of what is going to be settled, and of what is not.
const LIFETIME: Duration = Duration::from_secs(8);
const BRIEF: Duration = Duration::from_secs(1);
/// A commit is not sent any more when its hold has only so long: it might be late, and a late one may
/// exceed the limit.
const TOO_LATE: Duration = Duration::from_secs(2);
/// What one attempt may take.
const PATIENCE: Duration = Duration::from_secs(4);
/// A client of a service that has gone comes back after so long.
const BACK_OFF: Duration = Duration::from_millis(25);
/// Whatever is down is back by then.
const RECOVERY: Duration = Duration::from_secs(60);

/// Reasons of a service that says to come back.
const COME_BACK: [&str; 5] = [
    "DATABASE_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "OVERLOADED",
    "SHUTTING_DOWN",
    "TOO_MANY_RESERVATIONS",
];

/// Users, the replicas that serve them, and what their clients were told.
pub(super) struct Load {
    service_key: String,
    pub(super) users: Vec<User>,
    /// How to reach the replicas now.
    pub(super) replicas: Vec<Mutex<Channel>>,
    enough: AtomicBool,
    /// Answers, denials among them.
    operations: AtomicU64,
    counts: Mutex<BTreeMap<String, u64>>,
    charges: Mutex<HashMap<String, Charge>>,
    /// Most that live holds and commits that were told exceeded a limit by, at any moment.
    excess: AtomicI64,
}

pub(super) struct User {
    pub(super) id: String,
    /// What was asked for last; the limit of the database is this or less.
    pub(super) limit: AtomicI64,
    /// Whoever raises it.
    raising: tokio::sync::Mutex<()>,
    /// Tokens that clients know to be held or committed.
    known: AtomicI64,
}

/// What a commit charged, or may have: it was never answered.
#[derive(Clone, Debug)]
pub(super) struct Charge {
    pub(super) request_id: String,
    pub(super) user: usize,
    pub(super) model: &'static str,
    pub(super) tokens: i64,
    pub(super) is_certain: bool,
    pub(super) expires_at: SystemTime,
}

/// Tokens that a client holds.
#[derive(Clone)]
struct Hold {
    reservation: String,
    request: ReserveQuotaRequest,
    user: usize,
    tokens: i64,
    expires_at: SystemTime,
}

impl Hold {
    fn lasts(&self) -> Duration {
        let lasts = self.expires_at.duration_since(SystemTime::now());
        lasts.unwrap_or_default()
    }
}

/// Why there is no answer to act on.
#[derive(Debug)]
enum Failure {
    /// What the service says for good, and whether attempts before it failed.
    Told(Status, bool),
    /// Nothing certain until it was too late.
    Unknown,
}

/// As much chance as a test needs (`SplitMix64`), the same for a seed.
pub(super) struct Chance(u64);

impl Chance {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }

    fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

impl Load {
    pub(super) async fn new(
        service_key: String,
        channels: Vec<Channel>,
        users: usize,
    ) -> Arc<Self> {
        let mut load = Self {
            service_key,
            users: Vec::new(),
            replicas: channels.into_iter().map(Mutex::new).collect(),
            enough: AtomicBool::new(false),
            operations: AtomicU64::new(0),
            counts: Mutex::default(),
            charges: Mutex::default(),
            excess: AtomicI64::new(0),
        };
        for user in 0..users {
            let request = CreateUserRequest {
                email: format!("user-{user}@example.com"),
                username: format!("user-{user}"),
                credential: Some(Credential::Password(PASSWORD.to_owned())),
                ..CreateUserRequest::default()
            };
            let created = load.admin(0).create_user(load.bearing(request)).await;
            load.users.push(User {
                id: created.unwrap().into_inner().user.unwrap().id,
                limit: AtomicI64::new(0),
                raising: tokio::sync::Mutex::default(),
                known: AtomicI64::new(0),
            });
            load.raise(user, LIMIT).await;
        }
        Arc::new(load)
    }

    pub(super) fn start(self: &Arc<Self>, clients: u64, seed: u64) -> JoinSet<()> {
        let client = |number: u64| {
            let chance = Chance::new(seed.wrapping_mul(1_000).wrapping_add(number));
            self.clone().client(chance)
        };
        (0..clients).map(client).collect()
    }

    pub(super) fn end(&self) {
        self.enough.store(true, Ordering::Relaxed);
    }

    pub(super) fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    pub(super) fn counts(&self) -> BTreeMap<String, u64> {
        self.counts.lock().unwrap().clone()
    }

    pub(super) fn count_of(&self, what: &str) -> u64 {
        self.counts().get(what).copied().unwrap_or(0)
    }

    pub(super) fn charges(&self) -> HashMap<String, Charge> {
        self.charges.lock().unwrap().clone()
    }

    pub(super) fn excess(&self) -> i64 {
        self.excess.load(Ordering::Relaxed)
    }

    /// Waits until so many operations were answered.
    pub(super) async fn reach(&self, operations: u64) {
        while self.operations() < operations {
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn count(&self, what: &str) {
        let mut counts = self.counts.lock().unwrap();
        *counts.entry(what.to_owned()).or_default() += 1;
    }

    fn bearing<T>(&self, message: T) -> Request<T> {
        with_bearer(message, &self.service_key)
    }

    fn channel(&self, replica: usize) -> Channel {
        self.replicas[replica].lock().unwrap().clone()
    }

    fn admin(&self, replica: usize) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel(replica))
    }

    /// Calls one replica after the other until one says something that a retry does not mend.
    async fn insist<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        first: usize,
        until: Instant,
        mut call: impl FnMut(Channel) -> F,
    ) -> Result<T, Failure> {
        let mut has_failed = false;
        for attempt in first.. {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let channel = self.channel(attempt % self.replicas.len());
            let answered = timeout(left.min(PATIENCE), call(channel)).await;
            let status = match answered {
                Ok(Ok(answer)) => {
                    self.operations.fetch_add(1, Ordering::Relaxed);
                    return Ok(answer.into_inner());
                }
                Ok(Err(status)) => status,
                Err(_) => Status::unknown("no answer"),
            };
            match status.get_details_error_info() {
                Some(info) if COME_BACK.contains(&&*info.reason) => {
                    self.count(&format!("again: {}", info.reason));
                }
                Some(_) => {
                    self.operations.fetch_add(1, Ordering::Relaxed);
                    return Err(Failure::Told(status, has_failed));
                }
                None => self.count(&format!("again: network, {:?}", status.code())),
            }
            has_failed = true;
            sleep(BACK_OFF).await;
        }
        Err(Failure::Unknown)
    }

    /// Lets a user have more, in the end.
    pub(super) async fn raise(&self, user: usize, tokens: i64) {
        let user = &self.users[user];
        let Ok(_raising) = user.raising.try_lock() else {
            return;
        };
        let limit = user.limit.load(Ordering::SeqCst) + tokens;
        // Before the service hears of it.
        user.limit.store(limit, Ordering::SeqCst);
        let request = SetQuotaOverrideRequest {
            user_id: user.id.clone(),
            limit: Some(Limit::MonthlyTokens(limit)),
            ..SetQuotaOverrideRequest::default()
        };
        let until = Instant::now() + RECOVERY;
        let raised = self.insist(0, until, |channel| {
            let request = self.bearing(request.clone());
            async move {
                AdminServiceClient::new(channel)
                    .set_quota_override(request)
                    .await
            }
        });
        raised.await.expect("set");
        self.count("limits raised");
    }

    async fn reserve(
        &self,
        first: usize,
        user: usize,
        request: &ReserveQuotaRequest,
    ) -> Result<Hold, Failure> {
        let until = Instant::now() + RECOVERY;
        let reserved = self.insist(first, until, |channel| {
            let request = self.bearing(request.clone());
            async move {
                UsageServiceClient::new(channel)
                    .reserve_quota(request)
                    .await
            }
        });
        let ReserveQuotaResponse {
            reservation,
            tokens,
            expires_at,
            beyond_limit,
            ..
        } = reserved.await?;
        assert!(!beyond_limit, "no tier allows it");
        match Mode::try_from(request.mode).unwrap() {
            Mode::BestEffort => assert!((1..=request.tokens).contains(&tokens), "{tokens}"),
            _ => assert_eq!(tokens, request.tokens),
        }
        Ok(Hold {
            reservation,
            request: request.clone(),
            user,
            tokens,
            expires_at: expires_at.unwrap().try_into().unwrap(),
        })
    }

    /// Commits until it is certain or would be too late.
    async fn commit(
        &self,
        first: usize,
        hold: &Hold,
        tokens: i64,
    ) -> Result<CommitReservationResponse, Failure> {
        let until = Instant::now() + hold.lasts().saturating_sub(TOO_LATE);
        let request = CommitReservationRequest {
            reservation: hold.reservation.clone(),
            tokens: Some(TokenCounts {
                input: tokens / 3,
                output: tokens - tokens / 3,
                ..TokenCounts::default()
            }),
            ..CommitReservationRequest::default()
        };
        let committed = self.insist(first, until, |channel| {
            let mut request = self.bearing(request.clone());
            request.set_timeout(PATIENCE);
            async move {
                UsageServiceClient::new(channel)
                    .commit_reservation(request)
                    .await
            }
        });
        committed.await
    }

    async fn release(&self, first: usize, hold: &Hold) -> Result<(), Failure> {
        let until = Instant::now() + RECOVERY;
        let request = ReleaseReservationRequest {
            reservation: hold.reservation.clone(),
        };
        let released = self.insist(first, until, |channel| {
            let request = self.bearing(request.clone());
            async move {
                UsageServiceClient::new(channel)
                    .release_reservation(request)
                    .await
            }
        });
        released.await?;
        Ok(())
    }

    async fn extend(&self, first: usize, hold: &Hold) -> Result<Hold, Failure> {
        let until = Instant::now() + hold.lasts().saturating_sub(TOO_LATE);
        let request = ExtendReservationRequest {
            reservation: hold.reservation.clone(),
            lifetime: Some(LIFETIME.try_into().unwrap()),
        };
        let extended = self.insist(first, until, |channel| {
            let request = self.bearing(request.clone());
            async move {
                UsageServiceClient::new(channel)
                    .extend_reservation(request)
                    .await
            }
        });
        let extended = extended.await?;
        Ok(Hold {
            reservation: extended.reservation,
            expires_at: extended.expires_at.unwrap().try_into().unwrap(),
            ..hold.clone()
        })
    }

    /// Counts tokens as held or committed, which may never be more than the limit.
    fn know(&self, user: usize, tokens: i64) {
        let user = &self.users[user];
        let known = user.known.fetch_add(tokens, Ordering::SeqCst) + tokens;
        // Read later: it only grows.
        let excess = known - user.limit.load(Ordering::SeqCst);
        self.excess.fetch_max(excess, Ordering::SeqCst);
    }

    fn forget(&self, user: usize, tokens: i64) {
        self.users[user].known.fetch_sub(tokens, Ordering::SeqCst);
    }

    async fn client(self: Arc<Self>, mut chance: Chance) {
        while !self.enough.load(Ordering::Relaxed) {
            self.request(&mut chance).await;
        }
    }

    /// One request of a user's, from its reservation to its end.
    async fn request(self: &Arc<Self>, chance: &mut Chance) {
        let replicas = self.replicas.len();
        // Some users have many requests at a time.
        let user = chance
            .index(self.users.len())
            .min(chance.index(self.users.len()));
        let is_forgotten = chance.percent(8);
        let lifetime = if is_forgotten { BRIEF } else { LIFETIME };
        let mode = match chance.below(4) {
            0 => Mode::BestEffort,
            _ => Mode::AllOrNothing,
        };
        let request = ReserveQuotaRequest {
            user_id: self.users[user].id.clone(),
            request_id: Uuid::now_v7().to_string(),
            model: if chance.percent(15) {
                METERED
            } else {
                UNMETERED
            }
            .to_owned(),
            tokens: chance.below(MAX_TOKENS).cast_signed() + 1,
            mode: mode.into(),
            lifetime: Some(lifetime.try_into().unwrap()),
        };
        let mut hold = match self.reserve(chance.index(replicas), user, &request).await {
            Ok(hold) => hold,
            Err(Failure::Told(status, _)) => return self.denied(user, &status, chance).await,
            Err(Failure::Unknown) => panic!("nobody reserves any more"),
        };
        self.count("reserved");
        if hold.lasts() < TOO_LATE || is_forgotten {
            self.count("never settled");
            return self.leave(&hold);
        }
        self.know(user, hold.tokens);
        let mut other = None;
        if chance.percent(10) {
            // The same once more, somewhere: it may be held twice for a while.
            other = self
                .reserve(chance.index(replicas), user, &request)
                .await
                .ok();
            self.count("reserved again");
        }
        if chance.percent(50) {
            sleep(Duration::from_millis(chance.below(20))).await;
        }
        if chance.percent(5) {
            match self.extend(chance.index(replicas), &hold).await {
                Ok(extended) => {
                    self.count("extended");
                    hold = extended;
                }
                Err(Failure::Told(status, false)) => {
                    assert_eq!(reason(&status), "QUOTA_EXCEEDED", "{status:?}");
                    self.count("not extended");
                }
                // Perhaps it was released already: what nobody may commit.
                Err(_) => {
                    self.count("extension unknown");
                    return self.forget(user, hold.tokens);
                }
            }
        }
        if chance.percent(75) {
            self.charge(&hold, other, chance).await;
        } else {
            self.forget(user, hold.tokens);
            self.release(chance.index(replicas), &hold).await.unwrap();
            self.count("released");
            if let Some(other) = other {
                self.release(chance.index(replicas), &other).await.unwrap();
            }
        }
    }

    /// Commits some of a hold, as clients that are not sure do.
    async fn charge(self: &Arc<Self>, hold: &Hold, other: Option<Hold>, chance: &mut Chance) {
        let (user, replicas) = (hold.user, self.replicas.len());
        let actual = chance.below(hold.tokens.cast_unsigned()).cast_signed() + 1;
        self.forget(user, hold.tokens - actual);
        let request = &hold.request;
        let mut charge = Charge {
            request_id: request.request_id.clone(),
            user,
            model: if request.model == METERED {
                METERED
            } else {
                UNMETERED
            },
            tokens: actual,
            is_certain: false,
            expires_at: hold.expires_at,
        };
        // Before it is sent: the audit looks at what is booked meanwhile.
        self.note(&charge);
        let first = chance.index(replicas);
        let both = chance.percent(5);
        let (committed, at_once) = tokio::join!(self.commit(first, hold, actual), async {
            match both {
                true => Some(self.commit(first + 1, hold, actual).await),
                false => None,
            }
        });
        let mut recorded = 0;
        let mut event_ids = Vec::new();
        let mut settle = |committed: Result<CommitReservationResponse, Failure>| match committed {
            Ok(committed) => {
                recorded += u32::from(committed.outcome() == Outcome::Recorded);
                let outcome = committed.outcome();
                assert!(matches!(outcome, Outcome::Recorded | Outcome::Duplicate));
                event_ids.push(committed.event_id);
                true
            }
            Err(Failure::Told(status, _)) => panic!("a commit is refused: {status:?}"),
            Err(Failure::Unknown) => false,
        };
        let mut is_certain = settle(committed);
        is_certain |= at_once.is_some_and(&mut settle);
        if !is_certain {
            self.count("commit unknown");
            return self.forget(user, actual);
        }
        charge.is_certain = true;
        self.note(&charge);
        self.count("committed");
        if chance.percent(10)
            && let Ok(again) = self.commit(chance.index(replicas), hold, actual).await
        {
            assert_eq!(again.outcome(), Outcome::Duplicate, "it was lost");
            settle(Ok(again));
            self.count("committed again");
        }
        match other {
            Some(other) if chance.percent(50) => {
                if let Ok(again) = self.commit(chance.index(replicas), &other, actual).await {
                    assert_eq!(again.outcome(), Outcome::Duplicate, "it was lost");
                    settle(Ok(again));
                    self.count("committed again");
                }
            }
            Some(other) => {
                // It is over with the commit, or it is another hold.
                if let Err(Failure::Told(status, _)) = self.release(0, &other).await {
                    assert_eq!(reason(&status), "RESERVATION_ENDED", "{status:?}");
                }
                self.count("released, though committed");
            }
            None => {}
        }
        assert!(recorded <= 1, "booked {recorded} times: {charge:?}");
        event_ids.dedup();
        assert_eq!(event_ids.len(), 1, "{event_ids:?}");
    }

    fn note(&self, charge: &Charge) {
        let mut charges = self.charges.lock().unwrap();
        charges.insert(charge.request_id.clone(), charge.clone());
    }

    /// Counts what nobody will settle until it expires.
    fn leave(self: &Arc<Self>, hold: &Hold) {
        let (load, hold) = (self.clone(), hold.clone());
        load.know(hold.user, hold.tokens);
        tokio::spawn(async move {
            // What clocks may differ by.
            sleep(hold.lasts().saturating_sub(Duration::from_millis(100))).await;
            load.forget(hold.user, hold.tokens);
        });
    }

    async fn denied(&self, user: usize, status: &Status, chance: &mut Chance) {
        assert_eq!(reason(status), "QUOTA_EXCEEDED", "{status:?}");
        assert_eq!(status.code(), Code::ResourceExhausted);
        let info = status.get_details_error_info().unwrap();
        if info.metadata.contains_key("model") {
            self.count("denied: model");
        } else {
            self.count("denied: total");
            if chance.percent(30) {
                self.raise(user, STEP).await;
            }
        }
    }

    /// Spends all that a user has left of a model; answers what could not be had, and what was had
    /// though there was nothing left. Nothing else may go on.
    pub(super) async fn spend(&self, user: usize, model: &str, rest: i64) -> (i64, i64) {
        let mut request = ReserveQuotaRequest {
            user_id: self.users[user].id.clone(),
            model: model.to_owned(),
            lifetime: Some(LIFETIME.try_into().unwrap()),
            ..ReserveQuotaRequest::default()
        };
        let until = Instant::now() + RECOVERY / 4;
        let mut had = 0;
        while had < rest {
            request.tokens = rest - had;
            request.request_id = Uuid::now_v7().to_string();
            match self.reserve(user, user, &request).await {
                Ok(hold) => {
                    let committed = self.commit(user + 1, &hold, hold.tokens).await.unwrap();
                    assert_eq!(committed.outcome(), Outcome::Recorded);
                    had += hold.tokens;
                    self.note(&Charge {
                        request_id: request.request_id.clone(),
                        user,
                        model: if model == METERED { METERED } else { UNMETERED },
                        tokens: hold.tokens,
                        is_certain: true,
                        expires_at: hold.expires_at,
                    });
                }
                Err(Failure::Told(..)) if Instant::now() < until => {
                    sleep(BACK_OFF).await;
                }
                Err(Failure::Told(..)) if request.mode != i32::from(Mode::BestEffort) => {
                    request.mode = Mode::BestEffort.into();
                }
                Err(Failure::Told(..)) => break,
                Err(Failure::Unknown) => panic!("nobody reserves any more"),
            }
        }
        let one_more = ReserveQuotaRequest {
            request_id: Uuid::now_v7().to_string(),
            tokens: 1,
            mode: Mode::AllOrNothing.into(),
            ..request
        };
        let mut beyond = 0;
        for replica in 0..self.replicas.len() {
            match self.reserve(replica, user, &one_more).await {
                Ok(hold) => beyond += hold.tokens,
                Err(Failure::Told(status, _)) => assert_eq!(reason(&status), "QUOTA_EXCEEDED"),
                Err(Failure::Unknown) => panic!("nobody answers any more: {:#?}", self.counts()),
            }
        }
        (rest - had, beyond)
    }
}
