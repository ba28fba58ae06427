//! The ledger under load while its service or its Postgres is killed: what was acknowledged is
//! there, and all of it counts once.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_postgres::NoTls;
use tokio_stream::wrappers::ReceiverStream;
use tollkeeper::{
    embedded::{Embedded, Options},
    proto::tollkeeper::{
        admin::v1::{
            CreateUserRequest, admin_service_client::AdminServiceClient,
            create_user_request::Credential,
        },
        usage::v1::{
            BatchRecordUsageRequest, RecordUsageRequest, StreamUsageRequest, TokenCounts,
            UsageEvent, record_usage_response::Outcome, usage_result,
            usage_service_client::UsageServiceClient,
        },
    },
};
use tonic::{Status, transport::Channel};
use tonic_types::StatusExt as _;

use super::{Service, home::Home};
use crate::{
    harness::{PASSWORD, with_bearer},
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
struct Load {
    service_key: String,
    users: Vec<String>,
    /// How to reach the replicas now.
    replicas: Vec<Mutex<Channel>>,
    acknowledged: Mutex<Vec<UsageEvent>>,
    enough: AtomicBool,
    seen: Seen,
}

#[derive(Default)]
struct Seen {
    /// Answers by what became of the event.
    recorded: AtomicUsize,
    /// Of events that had been booked without the client knowing.
    duplicates: AtomicUsize,
    /// Of events that were sent once more after they had been acknowledged.
    replays: AtomicUsize,
    /// Errors by reason; those of the network have none.
    failures: Mutex<BTreeMap<String, usize>>,
}

impl Load {
    async fn new(service_key: String, channels: Vec<Channel>) -> Arc<Self> {
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

    fn start(self: &Arc<Self>) -> JoinSet<()> {
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

    fn acknowledged(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }

    /// Waits until as many more events have been acknowledged.
    async fn advance(&self, events: usize) {
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
struct Audit {
    client: tokio_postgres::Client,
}

impl Audit {
    async fn of(url: &str) -> Self {
        let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
        tokio::spawn(connection);
        Self { client }
    }

    async fn number(&self, statement: &str) -> i64 {
        self.client.query_one(statement, &[]).await.unwrap().get(0)
    }

    /// Asserts, also under load, that what was acknowledged until now is there with the tokens that
    /// were sent, and that both sums are those of the distinct events. How many there are.
    async fn check(&self, load: &Load) -> usize {
        let acknowledged = load.acknowledged.lock().unwrap().clone();
        let rows = "SELECT event_id::text, input_tokens + output_tokens + cached_input_tokens
                 + cache_write_tokens + reasoning_tokens FROM usage_records";
        let rows = self.client.query(rows, &[]).await.unwrap();
        let present: HashSet<(String, i64)> =
            rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        // The id alone is the key of no index: no event may be there twice in any way.
        assert_eq!(present.len(), rows.len(), "an event is there twice");
        for event in acknowledged {
            let tokens = event.tokens.unwrap();
            let total = tokens.input
                + tokens.output
                + tokens.cached_input
                + tokens.cache_write
                + tokens.reasoning;
            let id = event.event_id;
            assert!(present.contains(&(id.clone(), total)), "{id} was lost");
        }
        // Each in one snapshot: load goes on.
        assert_eq!(self.number(WRONG_MONTHS).await, 0, "wrong sums of months");
        assert_eq!(self.number(WRONG_MODELS).await, 0, "wrong sums of models");
        present.len()
    }
}

/// Ends the load and checks that exactly what was acknowledged is there.
async fn settle(load: &Load, clients: JoinSet<()>, url: &str, kills: usize, what: &str) {
    load.enough.store(true, Ordering::Relaxed);
    let ended = timeout(RECOVERY, clients.join_all()).await;
    ended.expect("every event is acknowledged in the end");
    let present = Audit::of(url).await.check(load).await;
    let acknowledged = load.acknowledged();
    let [recorded, duplicates, replays] = [
        &load.seen.recorded,
        &load.seen.duplicates,
        &load.seen.replays,
    ]
    .map(|counter| counter.load(Ordering::Relaxed));
    let failures = load.seen.failures.lock().unwrap();
    println!(
        "{what} killed {kills} times: {acknowledged} events acknowledged, {present} present, \
         0 counted twice; first answers: {recorded} recorded, {duplicates} duplicate (booked \
         unheard); {replays} replays of acknowledged events, all duplicate; failed attempts: \
         {failures:?}"
    );
    assert_eq!(
        present, acknowledged,
        "every event was sent until acknowledged"
    );
    assert_eq!(recorded + duplicates, acknowledged);
    assert!(!failures.is_empty(), "no kill was noticed");
}

/// A key for what the load needs.
fn service_key(home: &Home) -> String {
    let scopes = ["usage.write", "admin"].map(|scope| ["--scope", scope]);
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

async fn serve(home: &Home) -> (Service, Channel) {
    let mut service = home.start(home.production(&["serve"]));
    let channel = service.serving().await;
    (service, channel)
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_kills_of_the_service_lose_nothing_and_count_nothing_twice() {
    const KILLS: usize = 50;
    let home = Home::with_database();
    let url = home.database_url().to_owned();
    let key = service_key(&home);
    // The one that is left books what the killed one's Postgres session may still be booking.
    let (mut services, mut channels) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let (service, channel) = serve(&home).await;
        services.push(service);
        channels.push(channel);
    }
    let load = Load::new(key, channels).await;
    let clients = load.start();
    let audit = Audit::of(&url).await;
    for round in 0..KILLS {
        load.advance(200).await;
        let replica = round % services.len();
        let killed = services[replica].stop(Signal::SIGKILL);
        assert_eq!(killed.code(), None, "it was alive and was killed");
        let (service, channel) = serve(&home).await;
        services[replica] = service;
        *load.replicas[replica].lock().unwrap() = channel;
        if round % 10 == 9 {
            audit.check(&load).await;
        }
    }
    settle(&load, clients, &url, KILLS, "service").await;
}

/// A Postgres of the test's own, with the durability of production.
struct Postgres {
    running: Embedded,
    data_dir: PathBuf,
}

impl Postgres {
    async fn start(data_dir: PathBuf) -> Self {
        let options = Options {
            data_dir: data_dir.clone(),
            settings: Vec::new(),
        };
        let running = Embedded::start(options).await.unwrap();
        Self { running, data_dir }
    }

    /// Kills all its processes at once, the postmaster first: nobody is left to clean up.
    async fn kill(self) -> PathBuf {
        let data_dir = fs::canonicalize(&self.data_dir).unwrap();
        let pid_file = fs::read_to_string(data_dir.join("postgres/postmaster.pid")).unwrap();
        let postmaster: i32 = pid_file.lines().next().unwrap().trim().parse().unwrap();
        let mut killed = processes_in(&data_dir);
        assert!(killed.contains(&postmaster), "{postmaster} of {killed:?}");
        killed.sort_by_key(|&pid| pid != postmaster);
        while !killed.is_empty() {
            for pid in killed {
                // An error means that it has just ended.
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            sleep(Duration::from_millis(5)).await;
            killed = processes_in(&data_dir);
        }
        self.running.stop().await.unwrap();
        self.data_dir
    }
}

/// Living processes that work inside a folder, as those of a Postgres do.
fn processes_in(folder: &Path) -> Vec<i32> {
    let processes = fs::read_dir("/proc").expect("Linux").flatten();
    processes
        .filter(|process| {
            fs::read_link(process.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(folder))
        })
        .filter_map(|process| process.file_name().to_str()?.parse().ok())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_kills_of_postgres_lose_nothing_and_count_nothing_twice() {
    const KILLS: usize = 10;
    let outside = Home::new();
    let mut postgres = Postgres::start(outside.path().join("cluster")).await;
    let url = postgres.running.database_url().to_owned();
    let home = Home::with_database_at(&url);
    let key = service_key(&home);
    let (service, channel) = serve(&home).await;
    let load = Load::new(key, vec![channel]).await;
    let clients = load.start();
    for _ in 0..KILLS {
        load.advance(200).await;
        let data_dir = postgres.kill().await;
        postgres = Postgres::start(data_dir).await;
        Audit::of(&url).await.check(&load).await;
    }
    settle(&load, clients, &url, KILLS, "Postgres").await;
    drop(service);
    postgres.running.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_thirty_seconds_is_told_and_got_over_without_help() {
    const OUTAGE: Duration = Duration::from_secs(30);
    let outside = Home::new();
    let mut postgres = Postgres::start(outside.path().join("cluster")).await;
    let url = postgres.running.database_url().to_owned();
    let home = Home::with_database_at(&url);
    let key = service_key(&home);
    let (mut service, channel) = serve(&home).await;
    let load = Load::new(key, vec![channel]).await;
    let clients = load.start();
    load.advance(200).await;

    postgres.running.stop().await.unwrap();
    let told = || {
        let failures = load.seen.failures.lock().unwrap();
        failures.get("DATABASE_UNAVAILABLE").copied().unwrap_or(0)
    };
    let mut seen = Vec::new();
    for _ in 0..10 {
        sleep(OUTAGE / 10).await;
        seen.push((told(), load.acknowledged()));
    }
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 == pair[1].1),
        "callers are told all the time, and nothing else: {seen:?}"
    );

    postgres = Postgres::start(postgres.data_dir).await;
    let begun = Instant::now();
    load.advance(200).await;
    println!(
        "200 more events were booked {:?} after its end",
        begun.elapsed()
    );
    assert_eq!(
        service.child.try_wait().unwrap(),
        None,
        "the service stayed"
    );
    let what = format!("outage of {OUTAGE:?}; Postgres");
    settle(&load, clients, &url, 0, &what).await;
    drop(service);
    postgres.running.stop().await.unwrap();
}
