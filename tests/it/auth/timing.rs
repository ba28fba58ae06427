use std::time::{Duration, Instant};

use tollkeeper::{
    config::PasswordSettings,
    proto::tollkeeper::{
        admin::v1::CreateUserRequest,
        auth::v1::{RegisterRequest, RequestPasswordResetRequest},
    },
};
use tonic::Code;

use crate::harness::{Mailbox, PASSWORD, TestApp};

/// Logins of each kind in a round: of two, three or four kinds each order comes as often as the others.
const SAMPLES: usize = 48;
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
        median(&mut self.times)
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// One of the orders of so many, another one for each sample: what slows the machine down slows all, and
/// none comes after the same one every time.
fn order(sample: usize, kinds: usize) -> Vec<usize> {
    let (mut left, mut which): (Vec<usize>, _) = ((0..kinds).collect(), sample);
    let mut next = || {
        let (count, index) = (left.len(), which % left.len());
        which /= count;
        left.remove(index)
    };
    (0..kinds).map(|_| next()).collect()
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
        // They take turns, and one may be slower than another by a quarter for as long as both live: which one
        // a kind meets more often would be the orders' doing.
        s.password.threads = 1;
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
            for next in order(sample, kinds.len()) {
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

/// That something is taken has to be said; not what.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_registration_takes_as_long_whatever_is_taken() {
    let app = TestApp::spawn_with(|s| {
        s.password = PasswordSettings::default();
        s.throttle.address_failures = u32::MAX;
    })
    .await;
    let there = app.user().create().await;
    let mut rounds = Vec::new();
    let mut times = [const { Vec::new() }; 3];
    for round in 0..ROUNDS {
        for sample in 0..SAMPLES {
            let name = format!("new-{round}-{sample}");
            let email = format!("{name}@example.com");
            let names = [
                (&there.email, &name),
                (&email, &there.username),
                (&there.email, &there.username),
            ];
            for next in order(sample, names.len()) {
                let (email, username) = names[next];
                let request = RegisterRequest {
                    email: email.clone(),
                    username: username.clone(),
                    password: PASSWORD.to_owned(),
                    ..RegisterRequest::default()
                };
                let mut auth = app.auth("");
                let started = Instant::now();
                let registered = auth.register(request).await;
                times[next].push(started.elapsed());
                assert_eq!(registered.unwrap_err().code(), Code::AlreadyExists);
            }
        }
        let medians = times.each_mut().map(|times| median(times));
        if spread(&medians) <= BOUND {
            return;
        }
        rounds.push(medians);
    }
    panic!("the medians of address, username and both tell them apart: {rounds:#?}");
}

/// Of statements and commits alone, which vary more than hashes do.
const RESET_BOUND: f64 = 0.35;

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_takes_as_long_for_an_address_that_nobody_has() {
    let mailbox = Mailbox::new();
    let app = TestApp::spawn_with(|settings| mailbox.take(settings)).await;
    // Sent by nobody meanwhile: whose mail it is would be what else the machine does.
    app.sql("ALTER TABLE outbox ALTER available_at SET DEFAULT now() + interval '1 h'")
        .await;
    let mut rounds = Vec::new();
    let mut times = [const { Vec::new() }; 3];
    for round in 0..ROUNDS {
        for sample in 0..SAMPLES {
            let (user, disabled) = (app.user().create().await, app.user().create().await);
            app.disable(&disabled.id).await;
            let nobody = format!("nobody-{round}-{sample}@example.com");
            let emails = [user.email, disabled.email, nobody];
            for _ in 0..2 {
                for next in order(sample, emails.len()) {
                    let email = emails[next].clone();
                    let request = RequestPasswordResetRequest { email };
                    let mut auth = app.auth("");
                    let started = Instant::now();
                    auth.request_password_reset(request).await.unwrap();
                    times[next].push(started.elapsed());
                }
                // The second one finds a token there, and replaces it.
                app.sql("UPDATE login_throttle SET blocked_until = now()")
                    .await;
            }
        }
        let medians = times.each_mut().map(|times| median(times));
        if spread(&medians) <= RESET_BOUND {
            return;
        }
        rounds.push(medians);
    }
    panic!("the medians of somebody, a disabled one and nobody tell them apart: {rounds:#?}");
}
