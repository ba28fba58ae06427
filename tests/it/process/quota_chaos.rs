//! Quota while replicas are killed and Postgres is restarted: nobody gets more than the limit, no hold
//! is left over, nothing is charged twice.
//!
//! The ordinary suite runs a short form. In full, with a million operations:
//!
//! ```text
//! TOLLKEEPER_CHAOS_OPERATIONS=1000000 scripts/test --cargo-profile long --no-capture \
//!     -E 'test(process::quota_chaos::)'
//! ```
//!
//! `TOLLKEEPER_RECALL_ROUNDS=50` measures how soon a replica has what lies idle on another.
//! `TOLLKEEPER_CHAOS_SEED` makes clients choose as in an earlier run; how they meet differs each time.

use std::{
    env, fs,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use nix::sys::signal::Signal;
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_postgres::NoTls;
use tollkeeper::proto::tollkeeper::usage::v1::{
    ReleaseReservationRequest, ReserveQuotaRequest, reserve_quota_request::Mode,
    usage_service_client::UsageServiceClient,
};
use tonic::transport::Channel;
use uuid::Uuid;

use super::{
    Service,
    home::Home,
    ledger_load::service_key,
    own_postgres::Postgres,
    quota_load::{Chance, Load, METERED, UNMETERED},
};
use crate::{
    harness::{cluster, eventually, reason, with_bearer},
    usage::{WRONG_MODELS, WRONG_MONTHS},
};

/// The short form ends with the first of them: others want the machine too.
const OPERATIONS: u64 = 20_000;
const ENOUGH_TIME: Duration = Duration::from_secs(12);

const REPLICAS: usize = 3;
const CLIENTS: u64 = 64;
const USERS: usize = 100;
/// At rest.
const SPENDERS: usize = 16;

/// Between kills of a replica.
const KILL_EVERY: Duration = Duration::from_secs(2);

/// What a run has to meet.
const REACHED: [&str; 4] = [
    "denied: total",
    "denied: model",
    "committed again",
    "released",
];

/// Whatever is down is back by then.
const RECOVERY: Duration = Duration::from_secs(60);

const ALL_OF: &str = "input_tokens + output_tokens + cached_input_tokens + cache_write_tokens
    + reasoning_tokens";

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn nothing_is_oversold_leaked_or_charged_twice_whatever_is_killed() {
    let in_full = number("TOLLKEEPER_CHAOS_OPERATIONS");
    let goal = in_full.unwrap_or(OPERATIONS);
    let enough_time = in_full.map_or(ENOUGH_TIME, |_| Duration::MAX);
    let seed = number("TOLLKEEPER_CHAOS_SEED").unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        now.as_secs() % 1_000_000
    });
    // Used up by the time that two thirds are over, by most.
    let model_limit = i64::try_from(goal / 100).unwrap();
    println!("TOLLKEEPER_CHAOS_SEED={seed}");
    let outside = Home::new();
    let mut postgres = Postgres::start(outside.path().join("cluster")).await;
    let url = postgres.running.database_url().to_owned();
    let home = Home::with_database_at(&url);
    let key = service_key(&home);
    let tiers = format!(
        "default = \"chaos\"\n[[tier]]\nname = \"chaos\"\nmonthly_tokens = 0\n\
         [tier.models]\n{METERED} = {model_limit}\n"
    );
    fs::write(home.path().join("tiers.toml"), tiers).unwrap();
    let (mut services, mut channels) = (Vec::new(), Vec::new());
    for _ in 0..REPLICAS {
        let (service, channel) = serve(&home, "1s").await;
        services.push(service);
        channels.push(channel);
    }
    let load = Load::new(key, channels, USERS).await;
    let before = load.operations();
    let begun = Instant::now();
    let mut clients = load.start(CLIENTS, seed);
    let samples = Samples::start(url.clone(), model_limit);

    let mut chance = Chance::new(seed);
    let (mut kills, mut restarts) = (0_usize, 0_u32);
    let mut seen = (before, begun);
    loop {
        let until_next = match enough_time.saturating_sub(begun.elapsed()) {
            Duration::ZERO => KILL_EVERY,
            left => KILL_EVERY.min(left),
        };
        let reached = timeout(until_next, load.reach(before + goal)).await;
        // A slow machine has enough of it earlier, once everything was met.
        let is_met = REACHED.iter().all(|what| load.count_of(what) > 0);
        let is_enough = reached.is_ok() || is_met && begun.elapsed() >= enough_time;
        if is_enough && kills > 0 && restarts == 2 {
            break;
        }
        if let Some(ended) = clients.try_join_next() {
            panic!("a client has ended: {ended:?}");
        }
        let done = load.operations();
        if done > seen.0 {
            seen = (done, Instant::now());
        }
        assert!(seen.1.elapsed() < RECOVERY, "the load does not go on");
        let part = f64::max(
            (done - before) as f64 / goal as f64,
            begun.elapsed().as_secs_f64() / enough_time.as_secs_f64(),
        );
        if kills > 0 && restarts < 2 && part > f64::from(restarts + 1) / 3.0 {
            restarts += 1;
            let data_dir = if restarts == 1 {
                postgres.kill().await
            } else {
                postgres.running.stop().await.unwrap();
                postgres.data_dir
            };
            sleep(Duration::from_millis(chance.below(1_000))).await;
            postgres = Postgres::start(data_dir).await;
        } else {
            let replica = kills % services.len();
            let killed = services[replica].stop(Signal::SIGKILL);
            assert_eq!(killed.code(), None, "it was alive and was killed");
            sleep(Duration::from_millis(chance.below(500))).await;
            let (service, channel) = serve(&home, "1s").await;
            services[replica] = service;
            *load.replicas[replica].lock().unwrap() = channel;
            kills += 1;
        }
        if kills % 10 == 0 {
            let (done, took) = (load.operations() - before, begun.elapsed());
            println!("{took:?}: {done} operations, {kills} kills, {restarts} restarts");
        }
    }
    load.end();
    let ended = timeout(RECOVERY, clients.join_all()).await;
    ended.expect("every client comes to its end");
    let (operations, took) = (load.operations() - before, begun.elapsed());
    let sampled = samples.end();

    let audit = Audit::of(&url).await;
    let quarantined = Instant::now();
    eventually(
        "the dead have been reaped and all holds have ended",
        async || {
            audit.number("SELECT count(*) FROM replicas").await == REPLICAS as i64
                && audit.number("SELECT count(*) FROM quota_settlements").await == 0
        },
    )
    .await;
    let quarantined = quarantined.elapsed();
    let spent = audit.spent().await;
    let (leaked, beyond) = spend_all(&load, &audit, model_limit).await;
    if leaked > 0 {
        audit.dump().await;
        for service in &services {
            let log = service.log();
            let lines: Vec<_> = log.lines().collect();
            println!("{}", lines[lines.len().saturating_sub(5)..].join("\n"));
        }
    }
    let found = audit.look(&load, model_limit).await;
    println!(
        "{operations} operations in {took:?} by {CLIENTS} clients of {USERS} users on {REPLICAS} \
         replicas; {kills} kills of a replica, {restarts} of Postgres; limits {} tokens, {spent} spent \
         at the end of the load, all at rest ({quarantined:?} after it)\n\
         oversold: {} tokens, in {} samples at most {}, of what clients knew at most {}; leaked: \
         {leaked} tokens; beyond: {beyond}\n{found:#?}\n{:#?}",
        found.limits,
        found.oversold,
        sampled.taken,
        sampled.excess,
        load.excess().max(0),
        load.counts(),
    );
    assert_eq!(found.oversold, 0, "oversold");
    assert_eq!(sampled.excess, 0, "oversold, meanwhile");
    assert!(
        load.excess() <= 0,
        "held and committed beyond the limit: {}",
        load.excess()
    );
    assert_eq!(
        (leaked, beyond),
        (0, 0),
        "all can be spent, and nothing more"
    );
    assert_eq!(
        (found.twice, found.unknown, found.lost),
        (0, 0, 0),
        "charges"
    );
    assert_eq!(found.wrong_sums, 0, "sums");
    for what in REACHED {
        assert!(load.count_of(what) > 0, "nothing was {what}");
    }
    assert!(kills > 0 && restarts == 2 && sampled.taken > 0);

    for service in &mut services {
        service.signal(Signal::SIGTERM);
    }
    for service in &mut services {
        assert_eq!(service.ended().code(), Some(0), "{}", service.log());
    }
    postgres.running.stop().await.unwrap();
}

/// Reserves and commits what is left of everything; answers what could not be had, and what could be
/// had beyond it.
async fn spend_all(load: &Arc<Load>, audit: &Audit, model_limit: i64) -> (i64, i64) {
    let mut spending = JoinSet::new();
    let mut each = Vec::new();
    for (number, user) in load.users.iter().enumerate() {
        let limit = user.limit.load(Ordering::SeqCst);
        let rest = limit - audit.used(&user.id, None).await;
        let of_model = model_limit - audit.used(&user.id, Some(METERED)).await;
        let load = load.clone();
        if spending.len() == SPENDERS {
            each.extend(spending.join_next().await);
        }
        spending.spawn(async move {
            let of_model = of_model.min(rest);
            let metered = load.spend(number, METERED, of_model).await;
            let others = load.spend(number, UNMETERED, rest - of_model).await;
            (metered.0 + others.0, metered.1 + others.1)
        });
    }
    while let Some(spent) = spending.join_next().await {
        each.push(spent);
    }
    let sum = |(leaked, beyond), (more, further)| (leaked + more, beyond + further);
    each.into_iter().map(Result::unwrap).fold((0, 0), sum)
}

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.replace('_', "").parse().expect(name))
}

/// A replica whose holds end soon after it.
async fn serve(home: &Home, recall_bound: &str) -> (Service, Channel) {
    let mut command = home.production(&["serve"]);
    command
        .env("TOLLKEEPER_QUOTA_REPLICA_TTL", "2s")
        .env("TOLLKEEPER_QUOTA_HOLD_HORIZON", "8s")
        .env("TOLLKEEPER_QUOTA_RECALL_BOUND", recall_bound);
    let tiers = home.path().join("tiers.toml");
    if tiers.exists() {
        command.env("TOLLKEEPER_USAGE_TIERS_FILE", tiers);
    }
    let mut service = home.start(command);
    let channel = service.serving().await;
    (service, channel)
}

/// Looks at the sums while everything goes on.
struct Samples {
    looking: JoinHandle<()>,
    seen: Arc<Seen>,
}

#[derive(Default)]
struct Seen {
    taken: AtomicU64,
    excess: AtomicI64,
}

struct Sampled {
    taken: u64,
    excess: i64,
}

impl Samples {
    fn start(url: String, model_limit: i64) -> Self {
        let seen = Arc::new(Seen::default());
        let to = seen.clone();
        let looking = tokio::spawn(async move {
            loop {
                // Postgres is not always there.
                if let Ok((client, connection)) = tokio_postgres::connect(&url, NoTls).await {
                    tokio::spawn(connection);
                    while let Ok(row) = client.query_one(&oversold(model_limit), &[]).await {
                        to.excess.fetch_max(row.get(0), Ordering::Relaxed);
                        to.taken.fetch_add(1, Ordering::Relaxed);
                        sleep(Duration::from_millis(100)).await;
                    }
                }
                sleep(Duration::from_millis(50)).await;
            }
        });
        Self { looking, seen }
    }

    fn end(self) -> Sampled {
        self.looking.abort();
        Sampled {
            taken: self.seen.taken.load(Ordering::Relaxed),
            excess: self.seen.excess.load(Ordering::Relaxed),
        }
    }
}

/// Tokens beyond limits, of totals and of the model that has one. In one snapshot.
fn oversold(model_limit: i64) -> String {
    format!(
        "SELECT coalesce(sum(excess), 0)::bigint FROM (
             SELECT {ALL_OF} - o.monthly_tokens AS excess
             FROM monthly_usage JOIN quota_overrides AS o USING (user_id)
             UNION ALL
             SELECT {ALL_OF} - {model_limit} FROM monthly_model_usage WHERE model = '{METERED}'
         ) AS meters WHERE excess > 0"
    )
}

struct Audit {
    client: tokio_postgres::Client,
}

/// What the database says, compared with what clients were told.
#[derive(Debug)]
#[expect(dead_code, reason = "printed")]
struct Found {
    limits: i64,
    oversold: i64,
    /// Distinct requests that were charged.
    charged: usize,
    /// Commits that were never answered, and those of them that were booked.
    unanswered: usize,
    unanswered_booked: usize,
    /// Rows beyond the first of a request.
    twice: usize,
    /// Charges that nobody sent, or not so.
    unknown: usize,
    /// Charges that were acknowledged and are not there.
    lost: usize,
    /// Charges that were booked when their holds would have expired, had no commit been under way.
    late: usize,
    /// Users' months, and their models, whose sums are not those of the records.
    wrong_sums: i64,
}

impl Audit {
    async fn of(url: &str) -> Self {
        let client = cluster::connect(url).await;
        Self { client }
    }

    async fn number(&self, statement: &str) -> i64 {
        self.client.query_one(statement, &[]).await.unwrap().get(0)
    }

    /// Who has what, for whoever looks for a leak.
    async fn dump(&self) {
        for query in [
            "SELECT r::text || ' ' || now() FROM replicas AS r",
            "SELECT b::text FROM quota_balances AS b WHERE leased > 0",
            "SELECT l::text FROM quota_leases AS l WHERE granted > 0",
            "SELECT s::text FROM quota_settlements AS s LIMIT 20",
        ] {
            println!("{query}");
            for row in self.client.query(query, &[]).await.unwrap() {
                println!("    {}", row.get::<_, String>(0));
            }
        }
    }

    async fn spent(&self) -> i64 {
        let spent = format!("SELECT coalesce(sum({ALL_OF}), 0)::bigint FROM monthly_usage");
        self.number(&spent).await
    }

    async fn used(&self, user: &str, model: Option<&str>) -> i64 {
        let (table, of_model) = match model {
            Some(model) => ("monthly_model_usage", format!("AND model = '{model}'")),
            None => ("monthly_usage", String::new()),
        };
        let used = format!(
            "SELECT coalesce(sum({ALL_OF}), 0)::bigint FROM {table}
             WHERE user_id = '{user}' {of_model}"
        );
        self.number(&used).await
    }

    async fn look(&self, load: &Load, model_limit: i64) -> Found {
        let charges = load.charges();
        let rows = format!(
            "SELECT request_id, user_id::text, model, {ALL_OF}, recorded_at FROM usage_records"
        );
        let rows = self.client.query(&rows, &[]).await.unwrap();
        let mut present = std::collections::HashSet::new();
        let (mut twice, mut unknown, mut late, mut unanswered_booked) = (0, 0, 0, 0);
        for row in &rows {
            let request_id: String = row.get(0);
            let recorded_at: SystemTime = row.get(4);
            match charges.get(&request_id) {
                Some(charge) => {
                    let sent = (&*load.users[charge.user].id, charge.model, charge.tokens);
                    unknown += usize::from((row.get(1), row.get(2), row.get(3)) != sent);
                    late += usize::from(recorded_at > charge.expires_at);
                    unanswered_booked += usize::from(!charge.is_certain);
                }
                None => unknown += 1,
            }
            twice += usize::from(!present.insert(request_id));
        }
        let lost = |(request_id, charge): &(&String, &super::quota_load::Charge)| {
            charge.is_certain && !present.contains(*request_id)
        };
        Found {
            limits: self
                .number("SELECT sum(monthly_tokens)::bigint FROM quota_overrides")
                .await,
            oversold: self.number(&oversold(model_limit)).await,
            charged: present.len(),
            unanswered: charges.values().filter(|charge| !charge.is_certain).count(),
            unanswered_booked,
            twice,
            unknown,
            lost: charges.iter().filter(lost).count(),
            late,
            wrong_sums: self.number(WRONG_MONTHS).await + self.number(WRONG_MODELS).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_lies_idle_elsewhere_is_had_within_the_recall_bound() {
    let rounds = env::var("TOLLKEEPER_RECALL_ROUNDS").ok();
    let rounds = rounds.map_or(5, |rounds| rounds.parse().expect("a number"));
    // Not that of production, for the machine may be busy: what it takes is printed.
    const BOUND: Duration = Duration::from_secs(5);
    let home = Home::with_database();
    let key = service_key(&home);
    // Without a limit of requests a minute.
    let tiers = "default = \"one\"\n[[tier]]\nname = \"one\"\n";
    fs::write(home.path().join("tiers.toml"), tiers).unwrap();
    let (_here, first) = serve(&home, "5s").await;
    let (_there, second) = serve(&home, "5s").await;
    let channels = [first, second];
    let load = Load::new(key.clone(), channels.clone().into(), 1).await;
    let user = &load.users[0];
    let reserve_all = async |replica: usize, mode: Mode| {
        let request = ReserveQuotaRequest {
            user_id: user.id.clone(),
            request_id: Uuid::now_v7().to_string(),
            model: "a-model".to_owned(),
            tokens: user.limit.load(Ordering::SeqCst),
            mode: mode.into(),
            lifetime: None,
        };
        let mut client = UsageServiceClient::new(channels[replica].clone());
        let reserved = client.reserve_quota(with_bearer(request, &key)).await;
        reserved.map(|reserved| reserved.into_inner().reservation)
    };
    let mut held = String::new();
    eventually("all is held here", async || {
        let reserved = reserve_all(0, Mode::AllOrNothing).await;
        reserved.map(|reservation| held = reservation).is_ok()
    })
    .await;
    let (mut times, mut refusals) = (Vec::new(), 0);
    for round in 0..rounds {
        let (idle, asker) = (round % 2, (round + 1) % 2);
        let request = ReleaseReservationRequest { reservation: held };
        let mut client = UsageServiceClient::new(channels[idle].clone());
        let released = client.release_reservation(with_bearer(request, &key)).await;
        released.unwrap();
        eventually("all is free where it was released", async || {
            reserve_all(idle, Mode::LookOnly).await.is_ok()
        })
        .await;
        let begun = Instant::now();
        held = loop {
            match reserve_all(asker, Mode::AllOrNothing).await {
                Ok(reservation) => break reservation,
                Err(status) => {
                    // Others have it, or nobody knows in time.
                    let reason = reason(&status);
                    let reasons = ["QUOTA_EXCEEDED", "DATABASE_UNAVAILABLE"];
                    assert!(reasons.contains(&&*reason), "{status:?}");
                    refusals += 1;
                }
            }
            assert!(begun.elapsed() < RECOVERY, "it cannot be had");
        };
        times.push(begun.elapsed());
    }
    times.sort();
    let (median, longest) = (times[rounds / 2], times[rounds - 1]);
    println!(
        "all that lay idle on another replica was had after {median:?} (median of {rounds}), \
         {longest:?} (longest); {refusals} refused first"
    );
    assert!(median < BOUND, "{median:?}");
    assert!(
        refusals <= rounds / 5,
        "{refusals} were refused what lay idle"
    );
}
