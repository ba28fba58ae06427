use std::time::{Duration, Instant};

use tollkeeper::{config::PasswordSettings, proto::tollkeeper::admin::v1::CreateUserRequest};

use crate::harness::{PASSWORD, TestApp};

/// Logins of each kind in a round.
const SAMPLES: usize = 40;
/// How far the medians may be apart, as a share of the smallest one.
const BOUND: f64 = 0.25;
/// The machine may be busy: samples of further rounds are added until the medians settle. What the
/// code makes different stays different.
const ROUNDS: usize = 3;

/// A kind of login that is refused, and how long each took.
struct Kind<'a> {
    app: &'a TestApp,
    identifier: &'a str,
    times: Vec<Duration>,
}

impl<'a> Kind<'a> {
    fn new(app: &'a TestApp, identifier: &'a str) -> Self {
        let times = Vec::new();
        Self {
            app,
            identifier,
            times,
        }
    }

    async fn sample(&mut self) {
        let started = Instant::now();
        let refused = self.app.login_as(self.identifier, "not the password").await;
        self.times.push(started.elapsed());
        refused.expect_err("refused");
    }

    fn median(&mut self) -> Duration {
        self.times.sort();
        self.times[self.times.len() / 2]
    }
}

fn spread(times: &[Duration]) -> f64 {
    let seconds = || times.iter().map(Duration::as_secs_f64);
    let (least, most) = (
        seconds().fold(f64::MAX, f64::min),
        seconds().fold(0.0, f64::max),
    );
    most / least - 1.0
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_accounts_cost_as_much_time_as_wrong_passwords() {
    let real = TestApp::spawn_with(|s| {
        s.password = PasswordSettings::default();
        // Failures are counted, and none costs a wait.
        s.throttle.account_failures = u32::MAX;
        s.throttle.address_failures = u32::MAX;
    })
    .await;
    // All of a login but the hash: what an unknown account would cost without the dummy.
    let hashless = TestApp::spawn().await;
    let user = real.user().create().await;
    let without_password = CreateUserRequest {
        email: "federated@example.com".to_owned(),
        username: "federated".to_owned(),
        ..CreateUserRequest::default()
    };
    real.admin(&real.service_key)
        .create_user(without_password)
        .await
        .unwrap();
    real.login_as(&user.email, PASSWORD).await.unwrap();

    let mut kinds = [
        Kind::new(&real, &user.email),
        Kind::new(&real, "nobody@example.com"),
        Kind::new(&real, "federated"),
        Kind::new(&hashless, "nobody@example.com"),
    ];
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        for sample in 0..SAMPLES {
            // In turn and each first in turn: what slows the machine down slows all of them.
            for turn in 0..kinds.len() {
                let next = (sample + turn) % kinds.len();
                kinds[next].sample().await;
            }
        }
        let [wrong, unknown, federated, rest] = kinds.each_mut().map(Kind::median);
        // The bound means something only when the hash outweighs all else.
        let telling = wrong > 5 * rest && unknown > 5 * rest;
        if telling && spread(&[wrong, unknown, federated]) <= BOUND {
            return;
        }
        rounds.push(format!(
            "wrong {wrong:?}, unknown {unknown:?}, no password {federated:?}, rest {rest:?}"
        ));
    }
    panic!("the medians tell accounts apart: {rounds:#?}");
}
