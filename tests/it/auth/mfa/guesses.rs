//! Codes are guessed by those who have the password.

use futures_util::future::join_all;
use tollkeeper::config::Settings;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{
    super::assert_refused, Authenticator, WRONG_PASSWORD, audited, challenge, complete,
    complete_through, confirm, enroll, let_time_pass, login, login_through, login_with,
    user_with_mfa,
};
use crate::harness::{Blocker, PASSWORD, TestApp, TestUser, reason};

const FREE: usize = 5;

fn by_account(settings: &mut Settings) {
    settings.throttle.account_failures = 5;
}

async fn wait_out(app: &TestApp) {
    app.sql("UPDATE login_throttle SET blocked_until = now() - interval '1 ms'")
        .await;
}

#[track_caller]
fn assert_waits<T: std::fmt::Debug>(outcome: Result<T, Status>) {
    let status = assert_refused(outcome, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    let retry = status.get_details_retry_info().expect("a RetryInfo");
    assert!(retry.retry_delay.is_some_and(|delay| !delay.is_zero()));
}

/// Gives wrong codes, each to a challenge of its own.
async fn guess(app: &TestApp, user: &TestUser, phone: &Authenticator, times: usize) {
    for _ in 0..times {
        let refused = login_with(app, user, &phone.wrong_code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_codes_wait_though_every_login_before_them_succeeds() {
    // Also where the settings let passwords be guessed.
    for free in [0, 1000] {
        let app = TestApp::spawn_with(|s| s.throttle.account_failures = free).await;
        let (user, phone, _) = user_with_mfa(&app).await;
        guess(&app, &user, &phone, FREE + 1).await;
        assert_eq!(audited(&app, &user, "mfa.code_refused").await, 6);
        for code in [phone.wrong_code(), phone.code()] {
            assert_waits(login_with(&app, &user, &code).await);
        }
        assert_eq!(
            audited(&app, &user, "mfa.code_refused").await,
            6,
            "not looked at"
        );
        // One at a time, for waits that double.
        for _ in 0..3 {
            wait_out(&app).await;
            guess(&app, &user, &phone, 1).await;
            assert_waits(login_with(&app, &user, &phone.code()).await);
        }
        wait_out(&app).await;
        login_with(&app, &user, &phone.code()).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn waits_for_codes_hold_on_every_replica() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let channels = [app.channel.clone(), replica.channel()];
    for channel in channels.iter().cycle().take(FREE + 1) {
        let challenge = challenge(&app, &user).await.challenge;
        let refused = complete_through(channel, &challenge, &phone.wrong_code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
    let challenge = challenge(&app, &user).await.challenge;
    for channel in &channels {
        assert_waits(complete_through(channel, &challenge, &phone.code()).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_password_alone_forgets_no_wrong_password_and_the_code_does() {
    let app = TestApp::spawn_with(by_account).await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let failures = "SELECT coalesce(sum(failures), 0)::bigint FROM login_throttle";
    for n in 1..=4 {
        let refused = login(&app, &user, WRONG_PASSWORD).await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
        challenge(&app, &user).await;
        assert_eq!(app.count(failures).await, n);
    }
    guess(&app, &user, &phone, 1).await;
    assert_eq!(app.count(failures).await, 5);
    login_with(&app, &user, &phone.code()).await.unwrap();
    assert_eq!(app.count(failures).await, 1, "the wrong code");
    app.sql("DELETE FROM login_throttle").await;

    // And from where the user has never been.
    app.sql("UPDATE sessions SET address = '192.0.2.1'").await;
    let_time_pass(&app).await;
    let elsewhere = app.running().channel_from([127, 0, 0, 2]);
    let refused = login_through(&elsewhere, &user, WRONG_PASSWORD).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    let answer = login_through(&elsewhere, &user, PASSWORD).await.unwrap();
    assert_eq!(app.count(failures).await, 1);
    let challenge = answer.mfa_challenge.unwrap().challenge;
    complete_through(&elsewhere, &challenge, &phone.code())
        .await
        .unwrap();
    assert_eq!(app.count(failures).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_who_guess_codes_do_not_keep_the_user_out_at_home() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    login_with(&app, &user, &phone.code()).await.unwrap();
    let_time_pass(&app).await;
    let elsewhere = app.running().channel_from([127, 0, 0, 2]);
    let challenged = challenge(&app, &user).await.challenge;
    for _ in 0..=FREE {
        let refused = complete_through(&elsewhere, &challenged, &phone.wrong_code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
    assert_waits(complete_through(&elsewhere, &challenged, &phone.code()).await);
    complete(&app, &challenged, &phone.code()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn codes_within_a_session_wait_apart_from_those_of_logins() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
    let phone = Authenticator::enrolled(&enrolled.secret);
    for _ in 0..=FREE {
        let refused = confirm(&app, &token, &phone.wrong_code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
    assert_waits(confirm(&app, &token, &phone.code()).await);
    wait_out(&app).await;
    confirm(&app, &token, &phone.code()).await.unwrap();
    let_time_pass(&app).await;
    app.sql("DELETE FROM login_throttle").await;

    let disable = async |code: &str| super::changes::disable(&app, &token, PASSWORD, code).await;
    for _ in 0..=FREE {
        let refused = disable(&phone.wrong_code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
    assert_waits(disable(&phone.code()).await);
    login_with(&app, &user, &phone.code()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_lets_a_user_who_waits_in_again() {
    let app = TestApp::spawn().await;
    let (user, phone, token) = user_with_mfa(&app).await;
    guess(&app, &user, &phone, FREE + 1).await;
    for _ in 0..FREE {
        let wrong = phone.wrong_code();
        let refused = super::changes::disable(&app, &token, PASSWORD, &wrong).await;
        assert_eq!(reason(&refused.unwrap_err()), "MFA_CODE_INVALID");
    }
    assert_waits(login_with(&app, &user, &phone.code()).await);
    app.enable(&user.id).await;
    // Many guesses of few codes: who may change a user buys no more of them.
    assert_waits(login_with(&app, &user, &phone.code()).await);
    // A recovery code is a way in all the same.
    login_with(&app, &user, &phone.recovery_codes[0])
        .await
        .unwrap();
    let reset = tollkeeper::proto::tollkeeper::admin::v1::ResetUserMfaRequest {
        user_id: user.id.clone(),
        reason: "called back".to_owned(),
    };
    let mut admin = app.admin(&app.service_key);
    admin.reset_user_mfa(reset).await.unwrap();
    assert_eq!(app.count("SELECT count(*) FROM login_throttle").await, 0);
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_alone_makes_no_home_for_guesses() {
    let app = TestApp::spawn().await;
    // Sessions from here, opened before there was a second factor.
    let (user, phone, _) = user_with_mfa(&app).await;
    let elsewhere = app.running().channel_from([127, 0, 0, 2]);
    let challenged = challenge(&app, &user).await.challenge;
    for _ in 0..=FREE {
        let refused = complete_through(&elsewhere, &challenged, &phone.wrong_code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
    assert_waits(complete(&app, &challenged, &phone.code()).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn homes_have_one_limit_together() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let homes: Vec<_> = (2..6)
        .map(|n| app.running().channel_from([127, 0, 0, n]))
        .collect();
    let mut looked_at = 0;
    for (home, code) in homes.iter().zip(&phone.recovery_codes) {
        let challenged = challenge(&app, &user).await.challenge;
        complete_through(home, &challenged, code).await.unwrap();
        for _ in 0..FREE {
            let challenged = challenge(&app, &user).await.challenge;
            let refused = complete_through(home, &challenged, &phone.wrong_code()).await;
            looked_at += usize::from(reason(&refused.unwrap_err()) == "MFA_CODE_INVALID");
        }
    }
    assert!((2 * FREE..2 * FREE + 4).contains(&looked_at), "{looked_at}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_right_password_without_a_code_is_written_down_once_an_hour() {
    let app = TestApp::spawn().await;
    let (user, ..) = user_with_mfa(&app).await;
    let elsewhere = app.running().channel_from([127, 0, 0, 2]);
    for _ in 0..3 {
        challenge(&app, &user).await;
    }
    assert_eq!(audited(&app, &user, "mfa.challenged").await, 1);
    login_through(&elsewhere, &user, PASSWORD).await.unwrap();
    assert_eq!(audited(&app, &user, "mfa.challenged").await, 2);
    app.sql("UPDATE audit_events SET occurred_at = occurred_at - interval '61 min'")
        .await;
    challenge(&app, &user).await;
    assert_eq!(audited(&app, &user, "mfa.challenged").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_enrolment_lapses_and_ends_with_the_sessions() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for undoing in [
        "UPDATE totp_credentials SET created_at = created_at - interval '16 min'",
        "",
    ] {
        let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
        let phone = Authenticator::enrolled(&enrolled.secret);
        if undoing.is_empty() {
            let all = tollkeeper::proto::tollkeeper::admin::v1::RevokeUserSessionsRequest {
                user_id: user.id.clone(),
                ..Default::default()
            };
            let mut admin = app.admin(&app.service_key);
            admin.revoke_user_sessions(all).await.unwrap();
            let rows = app.count("SELECT count(*) FROM totp_credentials").await;
            assert_eq!(rows, 0);
        } else {
            app.sql(undoing).await;
            let refused = confirm(&app, &token, &phone.code()).await;
            assert_refused(refused, Code::FailedPrecondition, "MFA_NOT_ENABLED");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_that_cannot_be_counted_is_not_answered() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    app.sql("ALTER TABLE login_throttle ADD CONSTRAINT stuck CHECK (false) NOT VALID")
        .await;
    // Not even looked at: a right one is none the wiser.
    for code in [phone.wrong_code(), phone.code()] {
        let refused = login_with(&app, &user, &code).await;
        assert_refused(refused, Code::Internal, "INTERNAL");
    }
    app.sql("ALTER TABLE login_throttle DROP CONSTRAINT stuck")
        .await;
    login_with(&app, &user, &phone.code()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_guesses_of_codes_get_few_tries() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    let (user, phone, _) = user_with_mfa(&app).await;
    let mut challenges = Vec::new();
    for _ in 0..40 {
        challenges.push(challenge(&app, &user).await.challenge);
    }
    let wrong = phone.wrong_code();
    let guesses = challenges.iter().zip(channels.iter().cycle());
    let guesses = guesses.map(|(challenge, channel)| complete_through(channel, challenge, &wrong));
    let mut looked_at = 0;
    for outcome in join_all(guesses).await {
        match &*reason(&outcome.unwrap_err()) {
            "MFA_CODE_INVALID" => looked_at += 1,
            other => assert_eq!(other, "TOO_MANY_ATTEMPTS"),
        }
    }
    // Those that are free, one that costs a wait, and on a slow machine some whose wait has ended.
    assert!((FREE..FREE + 4).contains(&looked_at), "{looked_at}");
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_guesses_from_many_addresses_get_no_more_tries_than_from_one() {
    for pool_size in [2, 8] {
        let app = TestApp::spawn_with(|s| s.database.pool_size = pool_size).await;
        let (user, phone, _) = user_with_mfa(&app).await;
        // One challenge does for all.
        let challenged = challenge(&app, &user).await.challenge;
        let channels = (1..=40).map(|n| app.running().channel_from([127, 0, 1, n]));
        let channels: Vec<_> = channels.collect();
        let wrong = phone.wrong_code();
        let none = "tkm_none";
        join_all(channels.iter().map(|c| complete_through(c, none, &wrong))).await;
        let guesses = channels
            .iter()
            .cycle()
            .take(120)
            .map(|channel| complete_through(channel, &challenged, &wrong));
        let mut looked_at = 0;
        for outcome in join_all(guesses).await {
            match &*reason(&outcome.unwrap_err()) {
                "MFA_CODE_INVALID" => looked_at += 1,
                other => assert!(
                    ["TOO_MANY_ATTEMPTS", "UNAVAILABLE"].contains(&other),
                    "{other}"
                ),
            }
        }
        assert!((FREE..FREE + 4).contains(&looked_at), "{looked_at}");
        let failures = app
            .count("SELECT coalesce(sum(failures), 0)::bigint FROM login_throttle")
            .await;
        assert!(failures >= i64::try_from(looked_at).unwrap(), "all count");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guess_counts_before_it_is_looked_at() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let challenged = challenge(&app, &user).await.challenge;
    // Nobody learns of a wrong one, nor opens a session by a right one; both are under way.
    let blocker = Blocker::lock(&app, "audit_events").await;
    let (channel, wrong) = (app.channel.clone(), phone.wrong_code());
    let guessing =
        tokio::spawn(async move { complete_through(&channel, &challenged, &wrong).await });
    blocker.hold_up(&app, 1).await;
    let failures = "SELECT coalesce(sum(failures), 0)::bigint FROM login_throttle";
    assert_eq!(app.count(failures).await, 1);
    guessing.abort();
    blocker.release().await;
    assert_eq!(app.count(failures).await, 1, "who hangs up has guessed");
}

#[tokio::test(flavor = "multi_thread")]
async fn right_codes_forget_no_wrong_ones() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    login_with(&app, &user, &phone.code()).await.unwrap();
    let_time_pass(&app).await;
    // The user and a guesser behind one gateway.
    for _ in 0..FREE {
        guess(&app, &user, &phone, 1).await;
        login_with(&app, &user, &phone.code()).await.unwrap();
        let_time_pass(&app).await;
    }
    guess(&app, &user, &phone, 1).await;
    assert_waits(login_with(&app, &user, &phone.wrong_code()).await);
    // Nor do right ones cost anything, however many there are.
    app.sql("DELETE FROM login_throttle").await;
    for _ in 0..3 * FREE {
        login_with(&app, &user, &phone.code()).await.unwrap();
        let_time_pass(&app).await;
    }
    assert_eq!(app.count("SELECT count(*) FROM login_throttle").await, 0);
}
