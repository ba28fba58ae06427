//! Guessing is slowed down, over replicas and restarts, and keeps nobody out for good.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use prost_types::FieldMask;
use tollkeeper::{
    config::Settings,
    proto::tollkeeper::{
        admin::v1::UpdateUserRequest,
        auth::v1::{
            ChangePasswordRequest, LoginRequest, RegisterRequest, Tokens, UpdateCurrentUserRequest,
            User, auth_service_client::AuthServiceClient,
        },
    },
};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_types::StatusExt as _;

use super::{assert_refused, refresh};
use crate::harness::{
    Blocker, PASSWORD, TestApp, TestUser, eventually, login_through, reason, with_bearer,
};

const FREE: u32 = 5;
const WRONG: &str = "certainly not this one";

fn by_account(settings: &mut Settings) {
    settings.throttle.account_failures = FREE;
}

fn by_address(settings: &mut Settings) {
    settings.throttle.address_failures = 20;
}

/// How long a refused attempt is to wait.
#[track_caller]
fn wait_of<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Duration {
    let status = assert_refused(outcome, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    let retry = status.get_details_retry_info().expect("a RetryInfo");
    retry.retry_delay.expect("a delay")
}

async fn try_login(app: &TestApp, name: &str, password: &str) -> Result<Tokens, Status> {
    app.login_as(name, password).await
}

/// Fails to log in, for free.
async fn fail(app: &TestApp, name: &str, times: u32) {
    for _ in 0..times {
        let refused = try_login(app, name, WRONG).await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    }
}

/// Lets the waits of all pass, as time would.
async fn wait_out(app: &TestApp) {
    app.sql("UPDATE login_throttle SET blocked_until = now() - interval '1 ms'")
        .await;
}

/// As if the users had logged in from somewhere else.
async fn move_homes(app: &TestApp) {
    app.sql("UPDATE sessions SET address = '192.0.2.1'").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_passwords_beyond_the_free_ones_cost_waits_that_double() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    fail(&app, &user.email, FREE).await;
    for secs in [1, 2, 4, 8, 16] {
        fail(&app, &user.email, 1).await;
        let wait = wait_of(try_login(&app, &user.email, PASSWORD).await);
        let most = Duration::from_secs(secs);
        assert!(
            wait <= most && wait > most.mul_f64(0.4),
            "{wait:?} of {secs} s"
        );
        wait_out(&app).await;
    }
    a_login_forgets_what_failed(&app, &user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wait_ends_by_itself_when_it_was_said_to() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    fail(&app, &user.email, FREE + 1).await;
    let wait = wait_of(try_login(&app, &user.email, PASSWORD).await);
    tokio::time::sleep(wait + Duration::from_millis(5)).await;
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_names_of_an_account_count_as_one() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    let names = [
        user.email.clone(),
        user.username.to_uppercase(),
        user.email.to_uppercase(),
        user.username.clone(),
        user.email.clone(),
        user.username.clone(),
    ];
    for name in &names {
        fail(&app, name, 1).await;
    }
    for name in &names {
        wait_of(try_login(&app, name, PASSWORD).await);
    }
    assert_eq!(app.count("SELECT count(*) FROM login_throttle").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_nobody_has_is_throttled_as_one_that_somebody_has() {
    let app = TestApp::spawn_with(by_account).await;
    let (user, federated) = (app.user().create().await, app.user().create().await);
    app.sql(&format!(
        "UPDATE users SET password_hash = NULL WHERE id = '{}'",
        federated.id
    ))
    .await;
    for name in [&*user.email, "nobody@example.com", &*federated.email] {
        fail(&app, name, FREE + 1).await;
        let status = try_login(&app, name, PASSWORD).await;
        let message = status.as_ref().unwrap_err().message().to_owned();
        let wait = wait_of(status);
        assert!(wait <= Duration::from_secs(1), "{wait:?}");
        assert!(!message.contains(name));
        // In any case of the name.
        wait_of(try_login(&app, &name.to_uppercase(), PASSWORD).await);
    }
    let rows = app.sql("SELECT subject FROM login_throttle").await;
    assert_eq!(rows.len(), 3);
    for row in rows {
        let subject: &str = row.get(0);
        assert!(
            !subject.contains("nobody") && !subject.contains('@'),
            "{subject}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_hold_on_every_replica_and_after_a_restart() {
    let app = TestApp::spawn_with(by_account).await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let channels = [app.channel.clone(), replica.channel()];
    for channel in channels.iter().cycle().take(FREE as usize + 4) {
        let _ = login_through(channel, &user.email, WRONG).await;
        wait_out(&app).await;
    }
    let _ = login_through(&channels[0], &user.email, WRONG).await;
    for channel in &channels {
        wait_of(login_through(channel, &user.email, PASSWORD).await);
    }
    let restarted = app.replica().await;
    let wait = wait_of(login_through(&restarted.channel(), &user.email, PASSWORD).await);
    assert!(wait > Duration::from_secs(4), "{wait:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_go_on_while_logins_wait() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    move_homes(&app).await;
    fail(&app, &user.email, FREE + 1).await;
    wait_of(try_login(&app, &user.email, PASSWORD).await);
    app.validate(&tokens.access_token).await.unwrap();
    refresh(&app, &tokens.refresh_token).await.unwrap();
}

/// From where nobody has logged in.
fn elsewhere(app: &TestApp) -> Channel {
    app.running().channel_from([127, 0, 0, 2])
}

async fn a_login_forgets_what_failed(app: &TestApp, user: &TestUser) {
    app.login(user).await;
    fail(app, &user.email, FREE).await;
    wait_out(app).await;
    app.login(user).await;
}

/// Makes all who wait wait for longer than any test takes.
async fn go_on_waiting(app: &TestApp) {
    app.sql(
        "UPDATE login_throttle SET failures = 1000, blocked_until = now() + \
         CASE WHEN subject LIKE 'from %' THEN interval '55 s' ELSE interval '14 min' END",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_not_keep_a_user_out_where_the_user_has_logged_in_before() {
    let app = TestApp::spawn_with(|settings| {
        by_account(settings);
        by_address(settings);
    })
    .await;
    let user = app.user().create().await;
    app.login(&user).await;
    let elsewhere = elsewhere(&app);
    for _ in 0..=FREE {
        let refused = login_through(&elsewhere, &user.email, WRONG).await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    }
    go_on_waiting(&app).await;
    wait_of(login_through(&elsewhere, &user.email, PASSWORD).await);
    for _ in 0..3 {
        app.login(&user).await;
    }
    // Homes as a socket of both families writes them down.
    app.sql("UPDATE sessions SET address = '::ffff:127.0.0.1'")
        .await;
    app.login(&user).await;
    move_homes(&app).await;
    let wait = wait_of(try_login(&app, &user.email, PASSWORD).await);
    assert!(wait > Duration::from_mins(10), "{wait:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_where_the_user_has_logged_in_before_wait_too() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    app.login(&user).await;
    fail(&app, &user.email, FREE + 1).await;
    wait_of(try_login(&app, &user.email, PASSWORD).await);
    // Apart: elsewhere it is as before.
    login_through(&elsewhere(&app), &user.email, PASSWORD)
        .await
        .unwrap();
    go_on_waiting(&app).await;
    wait_of(try_login(&app, &user.email, PASSWORD).await);
    wait_out(&app).await;
    a_login_forgets_what_failed(&app, &user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_waits_does_not_tell_who_has_an_account() {
    let app = TestApp::spawn_with(|settings| {
        by_account(settings);
        by_address(settings);
    })
    .await;
    let user = app.user().create().await;
    app.login(&user).await;
    let failures = "SELECT failures::bigint FROM login_throttle WHERE subject = 'from 127.0.0.1'";
    fail(&app, &user.email, 1).await;
    assert_eq!(app.count(failures).await, 1, "whoever's home it is");
    for n in 0..20 {
        fail(&app, &format!("nobody-{n}"), 1).await;
    }
    go_on_waiting(&app).await;
    app.sql("DELETE FROM login_throttle WHERE subject NOT LIKE 'from %'")
        .await;
    for name in [&*user.email, "nobody-1", "nobody-at-all"] {
        for password in [WRONG, PASSWORD] {
            let wait = wait_of(try_login(&app, name, password).await);
            assert!(wait <= Duration::from_mins(1), "{wait:?}");
        }
    }
    login_through(&elsewhere(&app), &user.email, PASSWORD)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_counts_though_its_caller_is_out_of_time() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    // What is to be counted waits, past the deadlines of those who failed.
    let blocker = Blocker::lock_writes(&app, "login_throttle").await;
    let mut login = Request::new(LoginRequest {
        identifier: user.email.clone(),
        password: WRONG.to_owned(),
    });
    login.set_timeout(Duration::from_secs(3));
    let mut auth = AuthServiceClient::new(app.channel.clone());
    let login = tokio::spawn(async move { auth.login(login).await });
    blocker.hold_up(&app, 1).await;
    let change = ChangePasswordRequest {
        current_password: WRONG.to_owned(),
        new_password: "a staple for the next battery".to_owned(),
        keep_other_sessions: true,
    };
    let mut change = with_bearer(change, &token);
    change.set_timeout(Duration::from_secs(3));
    let mut auth = AuthServiceClient::new(app.channel.clone());
    let change = tokio::spawn(async move { auth.change_password(change).await });
    blocker.hold_up(&app, 2).await;
    for refused in [
        login.await.unwrap().map(drop),
        change.await.unwrap().map(drop),
    ] {
        let status = refused.unwrap_err();
        assert!(
            matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled),
            "{status:?}"
        );
    }
    blocker.release().await;
    let counted = "SELECT count(*) FROM login_throttle WHERE failures = 1";
    eventually("both count", async || app.count(counted).await == 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_finds_no_thread_costs_no_wait() {
    let app = TestApp::spawn_with(|settings| {
        by_account(settings);
        settings.password.threads = 1;
        settings.password.queue = 0;
    })
    .await;
    let user = app.user().create().await;
    // Takes the one thread for a while.
    let slow = app.user().create().await;
    app.sql(&format!(
        "UPDATE users SET password_hash = \
         '$2b$14$abcdefghijklmnopqrstuuxHeTz5LxLCPn2Ro2YXnlxAqP0pXG0Hm' WHERE id = '{}'",
        slow.id
    ))
    .await;
    fail(&app, &user.email, FREE + 1).await;
    go_on_waiting(&app).await;
    wait_out(&app).await;
    let channel = app.channel.clone();
    let hashing = tokio::spawn(async move {
        // One of those below may be there first.
        loop {
            let refused = login_through(&channel, &slow.email, WRONG).await;
            let status = refused.unwrap_err();
            if reason(&status) != "OVERLOADED" {
                return status;
            }
        }
    });
    let names = AtomicU32::new(0);
    eventually("the thread is taken", async || {
        let name = format!("nobody-{}", names.fetch_add(1, Ordering::Relaxed));
        let refused = try_login(&app, &name, WRONG).await;
        reason(&refused.unwrap_err()) == "OVERLOADED"
    })
    .await;
    let refused = try_login(&app, &user.email, PASSWORD).await;
    assert_refused(refused, Code::ResourceExhausted, "OVERLOADED");
    let blocked = "SELECT count(*) FROM login_throttle WHERE blocked_until > now()";
    eventually("the attempt is given back", async || {
        app.count(blocked).await == 0
    })
    .await;
    hashing.await.unwrap();
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_clock_ahead_blocked_is_not() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    fail(&app, &user.email, FREE + 1).await;
    app.sql("UPDATE login_throttle SET blocked_until = now() + interval '1 day'")
        .await;
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_lets_a_user_in_again() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let lock_out = async || {
        let _ = change(&app, &token, WRONG).await;
        let _ = try_login(&app, &user.email, WRONG).await;
        let _ = login_through(&elsewhere(&app), &user.email, WRONG).await;
        assert_eq!(app.count("SELECT count(*) FROM login_throttle").await, 3);
        go_on_waiting(&app).await;
        wait_of(try_login(&app, &user.email, PASSWORD).await);
    };
    let named = || User {
        id: user.id.clone(),
        full_name: "Ada".to_owned(),
        ..User::default()
    };
    let mask = Some(FieldMask {
        paths: vec!["full_name".to_owned()],
    });

    lock_out().await;
    app.enable(&user.id).await;
    assert_eq!(app.count("SELECT count(*) FROM login_throttle").await, 0);
    app.login(&user).await;

    lock_out().await;
    // Who has stolen a session lets themselves in to nothing.
    let own = UpdateCurrentUserRequest {
        user: Some(named()),
        update_mask: mask.clone(),
        current_password: String::new(),
    };
    app.auth(&token).update_current_user(own).await.unwrap();
    assert_eq!(app.count("SELECT count(*) FROM login_throttle").await, 3);
    wait_of(change(&app, &token, PASSWORD).await);
    let update = UpdateUserRequest {
        user: Some(named()),
        update_mask: mask,
    };
    let mut admin = app.admin(&app.service_key);
    admin.update_user(update).await.unwrap();
    change(&app, &token, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_guesses_get_no_more_tries_than_patient_ones() {
    let app = TestApp::spawn_with(by_account).await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let guess = |channel: Channel| {
        let name = user.email.clone();
        async move { login_through(&channel, &name, WRONG).await }
    };
    let channels = [app.channel.clone(), replica.channel()];
    let guesses = channels.iter().cycle().take(60).cloned().map(guess);
    let mut looked_at = 0;
    for outcome in join_all(guesses).await {
        match &*reason(&outcome.unwrap_err()) {
            "INVALID_CREDENTIALS" => looked_at += 1,
            other => assert_eq!(other, "TOO_MANY_ATTEMPTS"),
        }
    }
    // On each replica as many are under way at once as are free, and on a slow machine some waits end.
    assert!((FREE..4 * FREE).contains(&looked_at), "{looked_at}");
    wait_out(&app).await;
    let guesses = channels.iter().cycle().take(20).cloned().map(guess);
    let outcomes = join_all(guesses).await;
    let looked_at = outcomes
        .into_iter()
        .filter(|outcome| reason(outcome.as_ref().unwrap_err()) == "INVALID_CREDENTIALS");
    assert_eq!(looked_at.count(), 1, "one at a time");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_right_logins_at_once_all_succeed() {
    let app = TestApp::spawn_with(|settings| {
        by_account(settings);
        by_address(settings);
    })
    .await;
    let user = app.user().create().await;
    fail(&app, &user.email, FREE - 1).await;
    let logins = (0..40).map(|_| try_login(&app, &user.email, PASSWORD));
    for login in join_all(logins).await {
        login.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_fails_for_many_accounts_waits() {
    let app = TestApp::spawn_with(by_address).await;
    let user = app.user().create().await;
    for n in 0..21 {
        fail(&app, &format!("nobody-{n}"), 1).await;
    }
    let wait = wait_of(try_login(&app, &user.email, PASSWORD).await);
    assert!(wait <= Duration::from_secs(1), "{wait:?}");
    assert_eq!(app.count("SELECT count(*) FROM login_throttle").await, 1);
    wait_out(&app).await;
    app.login(&user).await;
    // A success of one forgives nothing: an account of one's own would buy guesses.
    let spent = "SELECT failures::bigint FROM login_throttle WHERE subject = 'from 127.0.0.1'";
    assert!(app.count(spent).await >= 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_registers_so_many_accounts_and_then_waits() {
    let app = TestApp::spawn_with(by_address).await;
    let register = async |n: u32| {
        let request = RegisterRequest {
            email: format!("bulk-{n}@example.com"),
            username: format!("bulk-{n}"),
            full_name: String::new(),
            password: PASSWORD.to_owned(),
        };
        app.auth("").register(request).await
    };
    for n in 0..21 {
        register(n).await.unwrap();
    }
    wait_of(register(21).await);
    // Administrators create, and people log in.
    let user = app.user().create().await;
    app.login(&user).await;
    wait_out(&app).await;
    register(22).await.unwrap();
}

async fn change(app: &TestApp, token: &str, current: &str) -> Result<(), Status> {
    let request = ChangePasswordRequest {
        current_password: current.to_owned(),
        new_password: "a staple for the next battery".to_owned(),
        keep_other_sessions: true,
    };
    app.auth(token).change_password(request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_within_a_session_wait_too_and_keep_nobody_from_logging_in() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for _ in 0..=FREE {
        let refused = change(&app, &token, WRONG).await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    }
    wait_of(change(&app, &token, PASSWORD).await);
    move_homes(&app).await;
    app.login(&user).await;
    // And the other way round.
    wait_out(&app).await;
    move_homes(&app).await;
    fail(&app, &user.email, FREE + 1).await;
    change(&app, &token, PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_cannot_be_counted_is_not_answered() {
    let app = TestApp::spawn_with(by_account).await;
    let user: TestUser = app.user().create().await;
    app.sql("ALTER TABLE login_throttle ADD CONSTRAINT stuck CHECK (false) NOT VALID")
        .await;
    let refused = try_login(&app, &user.email, WRONG).await;
    assert_refused(refused, Code::Internal, "INTERNAL");
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_failed_long_ago_is_forgotten_and_swept() {
    let app = TestApp::spawn_with(by_account).await;
    let user = app.user().create().await;
    fail(&app, &user.email, FREE + 1).await;
    app.sql(
        "UPDATE login_throttle SET last_failed_at = now() - interval '3 days',
             blocked_until = now() - interval '3 days'",
    )
    .await;
    fail(&app, &user.email, 1).await;
    let failures = "SELECT failures::bigint FROM login_throttle";
    assert_eq!(app.count(failures).await, 1);
    app.sql("UPDATE login_throttle SET blocked_until = now() - interval '3 days'")
        .await;
    let _replica = app.replica().await;
    eventually("it is swept", async || {
        app.count("SELECT count(*) FROM login_throttle").await == 0
    })
    .await;
}
