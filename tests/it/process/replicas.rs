//! Several replicas as processes of their own on one Postgres: what one revokes the others refuse,
//! whatever happens to the network, to Postgres and to the replicas in between.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use tollkeeper::{
    embedded::{Embedded, Options},
    proto::tollkeeper::{
        admin::v1::{
            CreateServiceAccountRequest, CreateUserRequest, DisableServiceAccountRequest,
            DisableUserRequest, SetUserTierRequest, admin_service_client::AdminServiceClient,
            create_user_request::Credential,
        },
        auth::v1::{
            CreateApiKeyRequest, LogoutRequest, RevokeApiKeyRequest, ValidateTokenResponse,
            auth_service_client::AuthServiceClient,
        },
    },
};
use tonic::{Code, Status, transport::Channel};

use super::{Service, home::Home};
use crate::{
    harness::{PASSWORD, Proxy, eventually, login_through, validate_through, with_bearer},
    ops::scrape,
};

const BOUND: Duration = Duration::from_millis(600);

/// Replicas that share a database, and a service that calls them.
struct Fleet {
    replicas: Vec<Replica>,
    service_key: String,
    home: Home,
}

struct Replica {
    service: Service,
    channel: Channel,
    /// What it reaches its database through.
    proxy: Proxy,
    url: String,
}

impl Replica {
    async fn start(home: &Home, proxy: Proxy, url: String) -> Self {
        let bound = format!("auth.staleness_bound={}ms", BOUND.as_millis());
        let mut command = home.production(&["serve", "--set", &bound]);
        command.env("DATABASE_URL", &url);
        let mut service = home.start(command);
        let channel = service.serving().await;
        Self {
            service,
            channel,
            proxy,
            url,
        }
    }

    async fn metric(&self, name: &str) -> f64 {
        let log = self.service.log();
        let line = log.lines().find(|line| line.contains("listening")).unwrap();
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let address = line["ops"].as_str().unwrap().parse().unwrap();
        scrape(address).await[&format!("tollkeeper_{name}")]
    }
}

impl Fleet {
    async fn start(count: usize) -> Self {
        let home = Home::with_database();
        let url = home.database_url().to_owned();
        Self::on(home, &url, count).await
    }

    async fn on(home: Home, url: &str, count: usize) -> Self {
        let mut command = home.production(&[
            "services",
            "create",
            "--name",
            "gateway",
            "--scope",
            "tokens.validate",
            "--scope",
            "admin",
        ]);
        command.env("DATABASE_URL", url);
        let created = home.finish(command, "");
        assert_eq!(created.code, Some(0), "{}", created.stderr);
        let key = created
            .stdout
            .lines()
            .find_map(|line| line.strip_prefix("key "));
        let mut replicas = Vec::new();
        for _ in 0..count {
            let (proxy, through) = Proxy::start(url);
            replicas.push(Replica::start(&home, proxy, through).await);
        }
        Self {
            replicas,
            service_key: key.expect("shown once").trim().to_owned(),
            home,
        }
    }

    fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.replicas[0].channel.clone())
    }

    /// The id of a new user and an access token.
    async fn user(&self, name: &str) -> (String, String) {
        let request = CreateUserRequest {
            email: format!("{name}@example.com"),
            username: name.to_owned(),
            credential: Some(Credential::Password(PASSWORD.to_owned())),
            ..CreateUserRequest::default()
        };
        let request = with_bearer(request, &self.service_key);
        let created = self.admin().create_user(request).await.unwrap();
        let id = created.into_inner().user.unwrap().id;
        let tokens = login_through(&self.replicas[0].channel, name, PASSWORD).await;
        (id, tokens.unwrap().access_token)
    }

    async fn disable(&self, user_id: &str) {
        let request = DisableUserRequest {
            user_id: user_id.to_owned(),
            reason: String::new(),
        };
        let request = with_bearer(request, &self.service_key);
        self.admin().disable_user(request).await.unwrap();
    }

    async fn logout(&self, token: &str) {
        let mut auth = AuthServiceClient::new(self.replicas[0].channel.clone());
        auth.logout(with_bearer(LogoutRequest {}, token))
            .await
            .unwrap();
    }

    async fn ask(&self, replica: usize, token: &str) -> Result<ValidateTokenResponse, Status> {
        validate_through(&self.replicas[replica].channel, &self.service_key, token).await
    }

    /// Waits until every replica answers as `told` says; how long the last one took.
    async fn all_hear(
        &self,
        token: &str,
        told: impl Fn(Result<ValidateTokenResponse, Status>) -> bool,
    ) -> Duration {
        let begun = Instant::now();
        for replica in 0..self.replicas.len() {
            eventually("every replica hears of it", async || {
                told(self.ask(replica, token).await)
            })
            .await;
        }
        begun.elapsed()
    }
}

fn refused(answer: Result<ValidateTokenResponse, Status>) -> bool {
    answer.is_err_and(|status| status.code() == Code::Unauthenticated)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_process_revokes_the_others_refuse() {
    let fleet = Fleet::start(3).await;
    let mut lags = Vec::new();
    for round in 0..4 {
        let (id, token) = fleet.user(&format!("person-{round}")).await;
        let warm = async |token: &str| {
            for replica in 0..3 {
                fleet.ask(replica, token).await.unwrap();
            }
        };
        warm(&token).await;
        let tier = SetUserTierRequest {
            user_id: id.clone(),
            tier: "builder".to_owned(),
        };
        let tier = with_bearer(tier, &fleet.service_key);
        fleet.admin().set_user_tier(tier).await.unwrap();
        lags.push(
            fleet
                .all_hear(&token, |told| told.unwrap().tier == "builder")
                .await,
        );

        let mut auth = AuthServiceClient::new(fleet.replicas[0].channel.clone());
        let request = CreateApiKeyRequest {
            name: "a program".to_owned(),
            ..CreateApiKeyRequest::default()
        };
        let made = auth
            .create_api_key(with_bearer(request, &token))
            .await
            .unwrap()
            .into_inner();
        warm(&made.key).await;
        let api_key_id = made.api_key.unwrap().id;
        let request = with_bearer(RevokeApiKeyRequest { api_key_id }, &token);
        auth.revoke_api_key(request).await.unwrap();
        lags.push(fleet.all_hear(&made.key, refused).await);

        let request = CreateServiceAccountRequest {
            name: format!("service-{round}"),
            scopes: vec!["tokens.validate".to_owned()],
        };
        let request = with_bearer(request, &fleet.service_key);
        let made = fleet
            .admin()
            .create_service_account(request)
            .await
            .unwrap()
            .into_inner();
        let service_account_id = made.service_account.unwrap().id;
        for replica in &fleet.replicas {
            validate_through(&replica.channel, &made.key, &token)
                .await
                .unwrap();
        }
        let request = DisableServiceAccountRequest { service_account_id };
        let request = with_bearer(request, &fleet.service_key);
        fleet
            .admin()
            .disable_service_account(request)
            .await
            .unwrap();
        let begun = Instant::now();
        for replica in &fleet.replicas {
            eventually("the key is refused", async || {
                refused(validate_through(&replica.channel, &made.key, &token).await)
            })
            .await;
        }
        lags.push(begun.elapsed());

        if round % 2 == 0 {
            fleet.disable(&id).await;
        } else {
            fleet.logout(&token).await;
        }
        lags.push(fleet.all_hear(&token, refused).await);
    }
    assert!(lags.iter().all(|lag| *lag < BOUND), "{lags:?}");
    for replica in &fleet.replicas {
        let live = replica.metric(r#"change_feed_state{state="live"}"#).await;
        assert_eq!(live, 1.0, "every answer came from the database");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_feed_is_black_holed_refuses_within_the_bound_and_says_why() {
    let fleet = Fleet::start(2).await;
    let (id, token) = fleet.user("ada").await;
    fleet.ask(1, &token).await.unwrap();
    let (stale, reads) = (
        r#"change_feed_state{state="stale"}"#,
        "credential_reads_total",
    );
    let reads_before = fleet.replicas[1].metric(reads).await;

    fleet.replicas[1].proxy.pause_feed();
    fleet.disable(&id).await;
    let revoked = Instant::now();
    let mut accepted = Duration::ZERO;
    while revoked.elapsed() < BOUND * 3 {
        let asked = revoked.elapsed();
        if fleet.ask(1, &token).await.is_ok() {
            accepted = asked;
        }
    }
    assert!(
        accepted <= BOUND,
        "accepted {accepted:?} after the revocation"
    );
    assert_eq!(fleet.replicas[1].metric(stale).await, 1.0);
    assert!(fleet.replicas[1].metric(reads).await > reads_before);
    assert_eq!(
        fleet.replicas[0].metric(stale).await,
        0.0,
        "the other one hears all"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_replica_comes_back_knowing_what_was_revoked_meanwhile() {
    let mut fleet = Fleet::start(3).await;
    let (_, good) = fleet.user("good").await;
    let (bad_id, bad) = fleet.user("bad").await;
    for replica in 0..3 {
        fleet.ask(replica, &good).await.unwrap();
        fleet.ask(replica, &bad).await.unwrap();
    }
    let mut killed = fleet.replicas.remove(2);
    killed.service.stop(Signal::SIGKILL);
    fleet.disable(&bad_id).await;
    fleet.all_hear(&bad, refused).await;
    fleet.ask(1, &good).await.unwrap();
    let Replica { proxy, url, .. } = killed;
    let back = Replica::start(&fleet.home, proxy, url).await;
    fleet.replicas.push(back);
    assert!(refused(fleet.ask(2, &bad).await), "from its first call on");
    fleet.ask(2, &good).await.unwrap();
}

/// What calls under way have seen.
#[derive(Default)]
struct Seen {
    /// Tokens that were revoked, and when that was answered.
    revoked: Mutex<Vec<(String, Instant)>>,
    wrongly_refused: Mutex<Vec<Status>>,
    wrongly_accepted: Mutex<Vec<Duration>>,
    answers: AtomicUsize,
    done: AtomicBool,
}

/// Asks one replica about good and revoked tokens until told to stop.
async fn ask_on(channel: Channel, key: String, good: Vec<String>, seen: Arc<Seen>) {
    let mut next = 0;
    while !seen.done.load(Ordering::Relaxed) {
        next += 1;
        let token = &good[next % good.len()];
        match validate_through(&channel, &key, token).await {
            Ok(_) => drop(seen.answers.fetch_add(1, Ordering::Relaxed)),
            Err(status) => seen.wrongly_refused.lock().unwrap().push(status),
        }
        let revoked = seen.revoked.lock().unwrap().clone();
        for (token, at) in revoked {
            let since = at.elapsed();
            if validate_through(&channel, &key, &token).await.is_ok() && since > BOUND {
                seen.wrongly_accepted.lock().unwrap().push(since);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_to_postgres_no_revoked_token_passes_and_no_good_one_fails() {
    let outside = Home::new();
    let data_dir = outside.path().join("cluster");
    let start = async || {
        let options = Options {
            data_dir: data_dir.clone(),
            settings: Vec::new(),
        };
        Embedded::start(options).await.unwrap()
    };
    let mut postgres = start().await;
    let url = postgres.database_url().to_owned();
    let fleet = Fleet::on(Home::with_database_at(&url), &url, 3).await;
    let mut good = Vec::new();
    for number in 0..5 {
        good.push(fleet.user(&format!("good-{number}")).await.1);
    }
    let mut bad = Vec::new();
    for number in 0..5 {
        bad.push(fleet.user(&format!("bad-{number}")).await);
    }
    let tokens = || good.iter().chain(bad.iter().map(|(_, token)| token));
    for replica in 0..3 {
        for token in tokens() {
            // Twice: what is asked for before the first heartbeat is not kept.
            for _ in 0..2 {
                fleet.ask(replica, token).await.unwrap();
            }
        }
    }
    let seen = Arc::new(Seen::default());
    let asking: Vec<_> = (0..3)
        .map(|replica| {
            let channel = fleet.replicas[replica].channel.clone();
            tokio::spawn(ask_on(
                channel,
                fleet.service_key.clone(),
                good.clone(),
                seen.clone(),
            ))
        })
        .collect();

    for (trouble, (id, token)) in bad.iter().enumerate() {
        let [_, b, c] = &fleet.replicas[..] else {
            unreachable!("three were started")
        };
        match trouble {
            0 => b.proxy.cut(),
            1 => c.proxy.pause(),
            2 => b.proxy.pause_feed(),
            3 => {
                b.proxy.cut();
                c.proxy.cut();
            }
            _ => {
                postgres.stop().await.unwrap();
                tokio::time::sleep(BOUND * 2).await;
                postgres = start().await;
            }
        }
        eventually("the first replica can revoke", async || {
            let request = DisableUserRequest {
                user_id: id.clone(),
                reason: String::new(),
            };
            fleet
                .admin()
                .disable_user(with_bearer(request, &fleet.service_key))
                .await
                .is_ok()
        })
        .await;
        // Those that are cut off answer from memory: only what the others refuse is watched until
        // they can hear again.
        if matches!(trouble, 2 | 4) {
            seen.revoked
                .lock()
                .unwrap()
                .push((token.clone(), Instant::now()));
        }
        tokio::time::sleep(BOUND * 2).await;
        for replica in &fleet.replicas {
            replica.proxy.resume();
        }
        fleet.all_hear(token, refused).await;
        seen.revoked
            .lock()
            .unwrap()
            .push((token.clone(), Instant::now()));
    }
    seen.done.store(true, Ordering::Relaxed);
    for asking in asking {
        asking.await.unwrap();
    }
    drop(fleet);
    postgres.stop().await.unwrap();
    let wrong = seen.wrongly_refused.lock().unwrap();
    assert!(
        wrong.is_empty(),
        "{} of good tokens, such as {:?}",
        wrong.len(),
        wrong[0]
    );
    let wrong = seen.wrongly_accepted.lock().unwrap();
    assert!(wrong.is_empty(), "{wrong:?}");
    assert!(seen.answers.load(Ordering::Relaxed) > 100);
}
