//! Clients of the ledger that send each event until it is acknowledged, and an audit of what is
//! there.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        CreateUserRequest, admin_service_client::AdminServiceClient,
        create_user_request::Credential,
    },
    usage::v1::{
        BatchRecordUsageRequest, RecordUsageRequest, StreamUsageRequest, TokenCounts, UsageEvent,
        record_usage_response::Outcome, usage_result, usage_service_client::UsageServiceClient,
    },
};
use tonic::{Status, transport::Channel};
use tonic_types::StatusExt as _;

use super::{Service, home::Home};
use crate::{
    harness::{PASSWORD, cluster, with_bearer},
    usage::{WRONG_MODELS, WRONG_MONTHS, event},
};

const USERS: usize = 3;

/// Clients of each RPC.
const SINGLE_CLIENTS: usize = 6;
const BATCH_CLIENTS: usize = 2;
const STREAM_CLIENTS: usize = 2;

const BATCH_EVENTS: usize = 20;
/// Events of a stream that are on their way.
const STREAM_WINDOW: usize = 100;

/// A client of a service that has gone comes back after so long.
const BACK_OFF: Duration = Duration::from_millis(25);
/// Longer than the service lets a call take.
const PATIENCE: Duration = Duration::from_secs(40);
/// For the load to go on after a kill, also on a busy machine.
const RECOVERY: Duration = Duration::from_secs(60);

/// Reasons of a service that says to come back.
const COME_BACK: [&str; 4] = [
    "DATABASE_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "OVERLOADED",
    "SHUTTING_DOWN",
];

/// Clients that send each event until it is acknowledged, and what they have seen.
pub(super) struct Load {
    service_key: String,
    pub(super) users: Vec<String>,
    /// How to reach the replicas now.
    pub(super) replicas: Vec<Mutex<Channel>>,
    acknowledged: Mutex<Vec<UsageEvent>>,
    enough: AtomicBool,
    pub(super) seen: Seen,
}

#[derive(Default)]
pub(super) struct Seen {
    /// Answers by what became of the event.
    recorded: AtomicUsize,
    /// Of events that had been booked without the client knowing.
    duplicates: AtomicUsize,
    /// Of events that were sent once more after they had been acknowledged.
    replays: AtomicUsize,
    /// Errors by reason; those of the network have none.
    pub(super) failures: Mutex<BTreeMap<String, usize>>,
}

impl Load {
    pub(super) async fn new(service_key: String, channels: Vec<Channel>) -> Arc<Self> {
        let mut admin = AdminServiceClient::new(channels[0].clone());
        let mut users = Vec::new();
        for user in 0..USERS {
            let request = CreateUserRequest {
                email: format!("user-{user}@example.com"),
                username: format!("user-{user}"),
                credential: Some(Credential::Password(PASSWORD.to_owned())),
                ..CreateUserRequest::default()
            };
            let created = admin.create_user(with_bearer(request, &service_key)).await;
            users.push(created.unwrap().into_inner().user.unwrap().id);
        }
        Arc::new(Self {
            service_key,
            users,
            replicas: channels.into_iter().map(Mutex::new).collect(),
            acknowledged: Mutex::default(),
            enough: AtomicBool::new(false),
            seen: Seen::default(),
        })
    }

    pub(super) fn start(self: &Arc<Self>) -> JoinSet<()> {
        let mut clients = JoinSet::new();
        for client in 0..SINGLE_CLIENTS {
            clients.spawn(self.clone().send_singly(client));
        }
        for client in 0..BATCH_CLIENTS {
            clients.spawn(self.clone().send_batches(client));
        }
        for client in 0..STREAM_CLIENTS {
            clients.spawn(self.clone().send_streams(client));
        }
        clients
    }

    fn goes_on(&self) -> bool {
        !self.enough.load(Ordering::Relaxed)
    }

    /// The replica of this attempt: every failure leads to the next one.
    fn replica(&self, attempt: usize) -> UsageServiceClient<Channel> {
        let replica = &self.replicas[attempt % self.replicas.len()];
        UsageServiceClient::new(replica.lock().unwrap().clone())
    }

    fn new_event(&self, number: usize) -> UsageEvent {
        let amount = i64::try_from(number % 97).unwrap() + 1;
        UsageEvent {
            model: format!("model-{}", number % 4),
            tokens: Some(TokenCounts {
                input: amount,
                output: amount * 2,
                cached_input: amount % 3,
                cache_write: amount % 5,
                reasoning: amount % 7,
            }),
            ..event(&self.users[number % USERS])
        }
    }

    fn acknowledge(&self, events: impl IntoIterator<Item = UsageEvent>) {
        self.acknowledged.lock().unwrap().extend(events);
    }

    fn count(&self, outcome: Outcome) {
        let counter = match outcome {
            Outcome::Recorded => &self.seen.recorded,
            Outcome::Duplicate => &self.seen.duplicates,
            Outcome::Unspecified => panic!("neither recorded nor duplicate"),
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes why an attempt failed. Only what a retry may mend is allowed.
    async fn failed(&self, status: &Status) {
        let reason = match status.get_details_error_info() {
            Some(info) => {
                assert!(COME_BACK.contains(&&*info.reason), "{status:?}");
                info.reason
            }
            None => format!("network, {:?}", status.code()),
        };
        *self
            .seen
            .failures
            .lock()
            .unwrap()
            .entry(reason)
            .or_default() += 1;
        sleep(BACK_OFF).await;
    }

    async fn record(&self, event: &UsageEvent, attempt: &mut usize) -> Outcome {
        loop {
            let request = RecordUsageRequest {
                event: Some(event.clone()),
            };
            let request = with_bearer(request, &self.service_key);
            match in_time(self.replica(*attempt).record_usage(request)).await {
                Ok(answer) => return answer.into_inner().outcome(),
                Err(status) => self.failed(&status).await,
            }
            *attempt += 1;
        }
    }

    async fn send_singly(self: Arc<Self>, client: usize) {
        let (mut number, mut attempt) = (client, client);
        while self.goes_on() {
            let event = self.new_event(number);
            number += 1;
            self.count(self.record(&event, &mut attempt).await);
            if number % 5 == 0 {
                // Whatever has happened since, it is there.
                let again = self.record(&event, &mut attempt).await;
                assert_eq!(again, Outcome::Duplicate, "{} was lost", event.event_id);
                self.seen.replays.fetch_add(1, Ordering::Relaxed);
            }
            self.acknowledge([event]);
        }
    }

    async fn send_batches(self: Arc<Self>, client: usize) {
        let (mut number, mut attempt) = (client, client);
        while self.goes_on() {
            let events: Vec<_> = (0..BATCH_EVENTS)
                .map(|event| self.new_event(number + event))
                .collect();
            number += BATCH_EVENTS;
            loop {
                let request = BatchRecordUsageRequest {
                    events: events.clone(),
                };
                let request = with_bearer(request, &self.service_key);
                match in_time(self.replica(attempt).batch_record_usage(request)).await {
                    Ok(answer) => {
                        let results = answer.into_inner().results;
                        assert_eq!(results.len(), events.len());
                        for result in results {
                            match result.result {
                                Some(usage_result::Result::Outcome(outcome)) => {
                                    self.count(outcome.try_into().unwrap());
                                }
                                other => panic!("{other:?}"),
                            }
                        }
                        break;
                    }
                    Err(status) => self.failed(&status).await,
                }
                attempt += 1;
            }
            self.acknowledge(events);
        }
    }

    async fn send_streams(self: Arc<Self>, client: usize) {
        let mut unsettled = Unsettled {
            next: client,
            ..Unsettled::default()
        };
        let mut attempt = client;
        while let Err(status) = self.stream(&mut unsettled, attempt).await {
            self.failed(&status).await;
            attempt += 1;
        }
    }

    /// One stream, until it fails or everything is settled and the load is over.
    async fn stream(&self, unsettled: &mut Unsettled, attempt: usize) -> Result<(), Status> {
        let (requests, receiver) = mpsc::channel(2 * STREAM_WINDOW / BATCH_EVENTS);
        let request = with_bearer(ReceiverStream::new(receiver), &self.service_key);
        let opened = in_time(self.replica(attempt).stream_usage(request)).await?;
        let mut answers = opened.into_inner();
        let mut sent = 0;
        loop {
            while self.goes_on() && unsettled.events.len() < STREAM_WINDOW {
                unsettled.events.push_back(self.new_event(unsettled.next));
                unsettled.next += 1;
            }
            if unsettled.events.is_empty() {
                drop(requests);
                assert_eq!(in_time(answers.message()).await?, None);
                return Ok(());
            }
            while sent < unsettled.events.len() {
                let events = unsettled.events.iter().skip(sent).take(BATCH_EVENTS);
                let events: Vec<_> = events.cloned().collect();
                let offset = unsettled.offset + i64::try_from(sent).unwrap();
                sent += events.len();
                // An error means that the stream has ended: its answer tells why.
                let _ = requests.send(StreamUsageRequest { offset, events }).await;
            }
            let Some(answer) = in_time(answers.message()).await? else {
                return Err(Status::cancelled("the stream ended"));
            };
            assert_eq!(answer.failures, []);
            let settled = answer.acknowledged - unsettled.offset;
            assert_eq!(answer.recorded + answer.duplicates, settled);
            let [recorded, duplicates, settled] = [answer.recorded, answer.duplicates, settled]
                .map(|count| usize::try_from(count).unwrap());
            self.seen.recorded.fetch_add(recorded, Ordering::Relaxed);
            self.seen
                .duplicates
                .fetch_add(duplicates, Ordering::Relaxed);
            self.acknowledge(unsettled.events.drain(..settled));
            unsettled.offset = answer.acknowledged;
            sent -= settled;
        }
    }

    pub(super) fn acknowledged(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until as many more events have been acknowledged.
    pub(super) async fn advance(&self, events: usize) {
        let (goal, begun) = (self.acknowledged() + events, Instant::now());
        while self.acknowledged() < goal {
            assert!(begun.elapsed() < RECOVERY, "the load does not go on");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Events of a stream that are not acknowledged yet.
#[derive(Default)]
struct Unsettled {
    events: VecDeque<UsageEvent>,
    /// Of the first of them.
    offset: i64,
    /// Number of the next new event.
    next: usize,
}

/// A call that is not answered at all has failed as well.
async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    timeout(PATIENCE, call)
        .await
        .unwrap_or_else(|_| Err(Status::unknown("no answer")))
}

/// Compares the ledger in Postgres with what clients were told.
pub(super) struct Audit {
    client: tokio_postgres::Client,
}

impl Audit {
    pub(super) async fn of(url: &str) -> Self {
        let client = cluster::connect(url).await;
        Self { client }
    }

    async fn number(&self, statement: &str) -> i64 {
        self.client.query_one(statement, &[]).await.unwrap().get(0)
    }

    /// What is there, also under load.
    async fn look(&self, load: &Load) -> Found {
        // First: more is acknowledged meanwhile.
        let acknowledged = load.acknowledged.lock().unwrap().clone();
        let rows = "SELECT event_id::text, input_tokens + output_tokens + cached_input_tokens
                 + cache_write_tokens + reasoning_tokens FROM usage_records";
        let rows = self.client.query(rows, &[]).await.unwrap();
        // No index is of the id alone: an event might be there twice in two months.
        let present: HashMap<String, i64> =
            rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let is_lost = |event: &&UsageEvent| {
            let tokens = event.tokens.unwrap();
            let total = tokens.input
                + tokens.output
                + tokens.cached_input
                + tokens.cache_write
                + tokens.reasoning;
            present.get(&event.event_id) != Some(&total)
        };
        Found {
            acknowledged: acknowledged.len(),
            present: present.len(),
            lost: acknowledged.iter().filter(is_lost).count(),
            twice: rows.len() - present.len(),
            // Each in one snapshot.
            wrong_sums: self.number(WRONG_MONTHS).await + self.number(WRONG_MODELS).await,
        }
    }

    /// Asserts that all that was acknowledged until now is there with the tokens that were sent, once,
    /// and that both sums are those of the distinct events.
    pub(super) async fn check(&self, load: &Load) -> Found {
        let found = self.look(load).await;
        let wrong = (found.lost, found.twice, found.wrong_sums);
        assert_eq!(wrong, (0, 0, 0), "{found:?}");
        found
    }
}

#[derive(Debug)]
pub(super) struct Found {
    acknowledged: usize,
    present: usize,
    /// Acknowledged, and not there with the tokens that were sent.
    lost: usize,
    /// Rows beyond the first of an event.
    twice: usize,
    /// Users' months, and their models, whose sums are not those of the events.
    wrong_sums: i64,
}

/// Ends the load and checks that exactly what was acknowledged is there.
pub(super) async fn settle(load: &Load, clients: JoinSet<()>, url: &str, what: &str) {
    load.enough.store(true, Ordering::Relaxed);
    let ended = timeout(RECOVERY, clients.join_all()).await;
    ended.expect("every event is acknowledged in the end");
    let found = Audit::of(url).await.check(load).await;
    let Seen {
        recorded,
        duplicates,
        replays,
        failures,
    } = &load.seen;
    let [recorded, duplicates, replays] =
        [recorded, duplicates, replays].map(|counter| counter.load(Ordering::Relaxed));
    let failures = failures.lock().unwrap();
    println!(
        "{what}: {found:?}; answered as recorded: {recorded}, as duplicate, booked unheard: \
         {duplicates}; sent again though acknowledged, and duplicate: {replays}; failed attempts: \
         {failures:?}"
    );
    // Every event was sent until it was.
    assert_eq!(found.present, found.acknowledged);
    assert_eq!(recorded + duplicates, found.acknowledged);
    assert!(!failures.is_empty(), "nobody noticed");
}

/// A key for what the load needs.
pub(super) fn service_key(home: &Home) -> String {
    let scopes = ["usage.write", "usage.read", "quota", "admin"].map(|scope| ["--scope", scope]);
    let args = [
        &["services", "create", "--name", "load"][..],
        &scopes.concat(),
    ]
    .concat();
    let created = home.finish(home.production(&args), "");
    assert_eq!(created.code, Some(0), "{}", created.stderr);
    let mut lines = created.stdout.lines();
    let key = lines.find_map(|line| line.strip_prefix("key "));
    key.expect("shown once").trim().to_owned()
}

pub(super) async fn serve(home: &Home) -> (Service, Channel) {
    let mut service = home.start(home.production(&["serve"]));
    let channel = service.serving().await;
    (service, channel)
}
