//! Part `revocation`: how soon what one replica revokes is refused by two others, under load.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use prost::Message as _;
use serde_json::json;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        CreateServiceAccountRequest, DisableServiceAccountRequest, DisableUserRequest,
        SetUserTierRequest, admin_service_client::AdminServiceClient,
    },
    auth::v1::{
        CreateApiKeyRequest, LogoutRequest, RevokeApiKeyRequest, ValidateTokenRequest,
        ValidateTokenResponse, auth_service_client::AuthServiceClient,
    },
};
use tonic::{Code, Status, transport::Channel};

use crate::{
    Options, cores,
    fixture::{Fixture, with_bearer},
    load::{self, Calls, InFlight, Until},
    process::Server,
    report,
};

const VALIDATE: &str = "/tollkeeper.auth.v1.AuthService/ValidateToken";
/// Users whose tokens are the load.
const BUSY: usize = 2_000;
/// Calls under way on each replica, all the time.
const IN_FLIGHT: usize = 16;
const PROMISE: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(30);

/// What is revoked, in turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Logout,
    Disable,
    Tier,
    ApiKey,
    Service,
}

const KINDS: [Kind; 5] = [
    Kind::Logout,
    Kind::Disable,
    Kind::Tier,
    Kind::ApiKey,
    Kind::Service,
];

impl Kind {
    fn title(self) -> &'static str {
        match self {
            Self::Logout => "logout",
            Self::Disable => "user disabled",
            Self::Tier => "tier changed",
            Self::ApiKey => "API key revoked",
            Self::Service => "service account disabled",
        }
    }
}

pub(crate) fn run(options: &Options, trials: usize) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let fixture = runtime.block_on(Fixture::start(&options.service, BUSY + trials, None))?;
    let measured = measure(&fixture, trials, &runtime);
    runtime.block_on(fixture.close())?;
    let (lags, load_per_second) = measured?;

    println!(
        "\nFrom the answer of the first replica until two others refuse, {trials} revocations, \
         under {load_per_second:.0} calls/s on each replica; ms"
    );
    println!(
        "  {:<26} {:>6} {:>8} {:>8} {:>8} {:>8} {:>9}",
        "", "lags", "p50", "p90", "p99", "max", "> 100 ms"
    );
    let kinds = KINDS.map(|kind| (kind.title(), of(&lags, Some(kind))));
    let rows: Vec<_> = kinds
        .into_iter()
        .chain([("all", of(&lags, None))])
        .collect();
    for (title, lags) in &rows {
        println!(
            "  {title:<26} {:>6} {:>8.2} {:>8.2} {:>8.2} {:>8.2} {:>9}",
            lags.len(),
            quantile(lags, 0.5),
            quantile(lags, 0.9),
            quantile(lags, 0.99),
            quantile(lags, 1.0),
            late(lags),
        );
    }
    let result = json!({
        "cores": cores(), "trials": trials, "load_per_second": load_per_second,
        "kinds": rows.iter().map(|(title, lags)| json!({
            "kind": title, "lags": lags.len(), "p50_ms": quantile(lags, 0.5),
            "p90_ms": quantile(lags, 0.9), "p99_ms": quantile(lags, 0.99),
            "max_ms": quantile(lags, 1.0), "late": late(lags),
        })).collect::<Vec<_>>(),
    });
    report::write_json(&options.results, "revocation", &result)?;
    println!("written to {}/revocation.json", options.results.display());
    Ok(())
}

/// The lags of a kind in milliseconds, shortest first.
fn of(lags: &[(Kind, Duration)], kind: Option<Kind>) -> Vec<f64> {
    let wanted = lags
        .iter()
        .filter(|(of, _)| kind.is_none_or(|kind| *of == kind));
    let mut lags: Vec<f64> = wanted.map(|(_, lag)| lag.as_secs_f64() * 1e3).collect();
    lags.sort_by(f64::total_cmp);
    lags
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    let found = sorted.get(rank.clamp(1, sorted.len().max(1)) - 1);
    found.copied().unwrap_or(f64::NAN)
}

fn late(lags: &[f64]) -> usize {
    lags.iter()
        .filter(|lag| **lag > PROMISE.as_secs_f64() * 1e3)
        .count()
}

/// Revokes one thing after the other while all replicas are kept busy.
fn measure(
    fixture: &Fixture,
    trials: usize,
    runtime: &tokio::runtime::Runtime,
) -> anyhow::Result<(Vec<(Kind, Duration)>, f64)> {
    let replicas = ["a", "b", "c"].map(|name| fixture.serve(name, &[]));
    let replicas: Vec<Server> = replicas.into_iter().collect::<anyhow::Result<_>>()?;
    let busy = fixture.people[..BUSY].iter().map(|person| {
        let token = fixture.token(person)?;
        Ok(ValidateTokenRequest {
            token,
            ..Default::default()
        }
        .encode_to_vec())
    });
    let busy = busy.collect::<anyhow::Result<Vec<_>>>()?;
    let busy = Calls::new(VALIDATE, Some(&fixture.service_key), busy, Code::Ok);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let keep_busy = |server| {
            let (busy, done) = (&busy, &done);
            scope.spawn(move || keep_busy(server, busy, done))
        };
        let load: Vec<_> = replicas.iter().map(keep_busy).collect();
        let lags = runtime.block_on(trial_after_trial(fixture, &replicas, trials));
        done.store(true, Ordering::Relaxed);
        let mut per_second = 0.0;
        for load in load {
            per_second += load.join().expect("no panic")?;
        }
        Ok((lags?, per_second / replicas.len() as f64))
    })
}

/// Keeps a replica busy until told to stop; answers the calls per second.
fn keep_busy(server: &Server, calls: &Calls, done: &AtomicBool) -> anyhow::Result<f64> {
    let (mut count, mut wrong, begun) = (0, 0, Instant::now());
    while !done.load(Ordering::Relaxed) {
        let until = Until::time(Duration::from_millis(500));
        let slice = load::run(server, calls, InFlight::new(IN_FLIGHT, 1), 1, until)?;
        count += slice.calls;
        wrong += slice.wrong;
        if let Some(first) = slice.first_wrong {
            eprintln!(
                "==> {} calls of the load failed, with {first}\n{}",
                slice.wrong,
                server.complaints()
            );
        }
    }
    // A disk that stalls for seconds may cost some; that is told, and no reason to begin anew.
    ensure!(
        wrong * 10_000 < count,
        "{wrong} calls of {count} of the load failed"
    );
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}

async fn trial_after_trial(
    fixture: &Fixture,
    replicas: &[Server],
    trials: usize,
) -> anyhow::Result<Vec<(Kind, Duration)>> {
    let mut channels = Vec::new();
    for replica in replicas {
        let url = format!("http://{}", replica.address);
        channels.push(Channel::from_shared(url)?.connect().await?);
    }
    let [first, others @ ..] = &channels[..] else {
        bail!("no replicas");
    };
    let (mut lags, mut unavailable) = (Vec::new(), 0);
    for trial in 0..trials {
        if trial % 100 == 0 {
            eprintln!("==> {trial} of {trials}");
        }
        let kind = KINDS[trial % KINDS.len()];
        let case = Case::prepare(fixture, BUSY + trial, kind, first).await?;
        for channel in others {
            ensure!(!case.is_told(channel).await?, "known before it happened");
        }
        // On a machine as busy as this one calls may be shed. Whether such a one has revoked cannot be
        // told, so it tells nothing about the time.
        if let Err(error) = case.revoke(first).await {
            ensure!(unavailable < trials / 10, error);
            unavailable += 1;
            continue;
        }
        let revoked = Instant::now();
        let waits = others.iter().map(|channel| case.wait(channel, revoked));
        for lag in futures_util::future::join_all(waits).await {
            lags.push((kind, lag?));
        }
    }
    if unavailable > 0 {
        eprintln!("==> {unavailable} trials were left out: the database was too busy for them");
    }
    Ok(lags)
}

/// One revocation.
struct Case {
    kind: Kind,
    /// Who asks.
    caller: String,
    admin_key: String,
    user_id: String,
    /// Of the user; what is asked about, but for API keys.
    token: String,
    asked_about: String,
    /// Of the API key or the service account.
    id: String,
}

impl Case {
    async fn prepare(
        fixture: &Fixture,
        person: usize,
        kind: Kind,
        channel: &Channel,
    ) -> anyhow::Result<Self> {
        let person = &fixture.people[person];
        let token = fixture.token(person)?;
        let mut case = Self {
            kind,
            caller: fixture.service_key.clone(),
            admin_key: fixture.service_key.clone(),
            user_id: person.user.to_string(),
            asked_about: token.clone(),
            token,
            id: String::new(),
        };
        match kind {
            Kind::ApiKey => {
                let request = CreateApiKeyRequest {
                    name: "bench".to_owned(),
                    ..Default::default()
                };
                let request = with_bearer(request, &case.token)?;
                let mut auth = AuthServiceClient::new(channel.clone());
                let made = auth.create_api_key(request).await?.into_inner();
                case.id = made.api_key.context("a key")?.id;
                case.asked_about = made.key;
            }
            Kind::Service => {
                let request = CreateServiceAccountRequest {
                    name: format!("bench-{}", person.user),
                    scopes: vec!["tokens.validate".to_owned()],
                };
                let request = with_bearer(request, &case.admin_key)?;
                let mut admin = AdminServiceClient::new(channel.clone());
                let made = admin.create_service_account(request).await?.into_inner();
                case.id = made.service_account.context("an account")?.id;
                case.caller = made.key;
            }
            Kind::Logout | Kind::Disable | Kind::Tier => {}
        }
        Ok(case)
    }

    async fn revoke(&self, channel: &Channel) -> anyhow::Result<()> {
        let mut auth = AuthServiceClient::new(channel.clone());
        let mut admin = AdminServiceClient::new(channel.clone());
        let (user_id, id) = (self.user_id.clone(), self.id.clone());
        match self.kind {
            Kind::Logout => {
                let request = with_bearer(LogoutRequest {}, &self.token)?;
                auth.logout(request).await?;
            }
            Kind::Disable => {
                let reason = String::new();
                let request = DisableUserRequest { user_id, reason };
                admin
                    .disable_user(with_bearer(request, &self.admin_key)?)
                    .await?;
            }
            Kind::Tier => {
                let tier = "builder".to_owned();
                let request = SetUserTierRequest { user_id, tier };
                admin
                    .set_user_tier(with_bearer(request, &self.admin_key)?)
                    .await?;
            }
            Kind::ApiKey => {
                let request = RevokeApiKeyRequest { api_key_id: id };
                auth.revoke_api_key(with_bearer(request, &self.token)?)
                    .await?;
            }
            Kind::Service => {
                let request = DisableServiceAccountRequest {
                    service_account_id: id,
                };
                let request = with_bearer(request, &self.admin_key)?;
                admin.disable_service_account(request).await?;
            }
        }
        Ok(())
    }

    /// Asks until the answer is the new one.
    async fn wait(&self, channel: &Channel, revoked: Instant) -> anyhow::Result<Duration> {
        loop {
            if self.is_told(channel).await? {
                return Ok(revoked.elapsed());
            }
            ensure!(
                revoked.elapsed() < PATIENCE,
                "{:?} was never heard of",
                self.kind
            );
        }
    }

    /// Whether a replica knows of the revocation.
    async fn is_told(&self, channel: &Channel) -> anyhow::Result<bool> {
        let request = ValidateTokenRequest {
            token: self.asked_about.clone(),
            ..Default::default()
        };
        let request = with_bearer(request, &self.caller)?;
        let answer: Result<_, Status> = AuthServiceClient::new(channel.clone())
            .validate_token(request)
            .await;
        let answer = answer.map(|answer| answer.into_inner());
        let told = match (self.kind, answer) {
            (Kind::Tier, Ok(ValidateTokenResponse { tier, .. })) => tier == "builder",
            (_, Ok(_)) => false,
            (_, Err(status)) if status.code() == Code::Unauthenticated => true,
            (_, Err(status)) if status.code() == Code::Unavailable => false,
            (_, Err(status)) => return Err(status.into()),
        };
        Ok(told)
    }
}
