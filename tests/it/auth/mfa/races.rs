//! Codes count once, whoever races for them and wherever.

use futures_util::future::join_all;
use tollkeeper::proto::tollkeeper::auth::v1::{
    EnrollTotpRequest, auth_service_client::AuthServiceClient,
};
use tonic::Code;

use super::{
    super::assert_refused, Authenticator, challenge, complete_through, confirm, confirm_through,
    enroll, let_time_pass, login, login_through, user_with_mfa,
};
use crate::harness::{Blocker, PASSWORD, TestApp, reason, with_bearer};

/// Gives a code to as many challenges at once as it is given; how many sessions that opens.
async fn race(
    app: &TestApp,
    channels: &[tonic::transport::Channel],
    challenges: &[String],
    code: &str,
) -> usize {
    let attempts = challenges.iter().zip(channels.iter().cycle());
    let attempts = attempts.map(|(challenge, channel)| complete_through(channel, challenge, code));
    let outcomes = join_all(attempts).await;
    let mut opened = 0;
    for outcome in outcomes {
        match outcome.map_err(|status| reason(&status)) {
            Ok(_) => opened += 1,
            Err(why) => assert!(
                [
                    "MFA_CODE_INVALID",
                    "MFA_CHALLENGE_INVALID",
                    "TOO_MANY_ATTEMPTS"
                ]
                .contains(&&*why),
                "{why}"
            ),
        }
    }
    app.sql("DELETE FROM login_throttle").await;
    opened
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_that_many_give_at_once_opens_one_session() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    let (user, phone, _) = user_with_mfa(&app).await;
    let sessions = format!(
        "SELECT count(*) FROM sessions WHERE user_id = '{}'",
        user.id
    );
    for round in 0..5 {
        let mut challenges = Vec::new();
        for _ in 0..20 {
            challenges.push(challenge(&app, &user).await.challenge);
        }
        // The same code, and the same recovery code.
        for code in [phone.code(), phone.recovery_codes[round].clone()] {
            let before = app.count(&sessions).await;
            assert_eq!(race(&app, &channels, &challenges, &code).await, 1);
            assert_eq!(app.count(&sessions).await, before + 1);
        }
        let_time_pass(&app).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_that_many_complete_at_once_opens_one_session() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    let (user, phone, _) = user_with_mfa(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    // Each by a code of its own, all good.
    let attempts = phone.recovery_codes.iter().zip(channels.iter().cycle());
    let attempts = attempts.map(|(code, channel)| complete_through(channel, &challenge, code));
    let outcomes = join_all(attempts).await;
    let opened = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(opened, 1);
    for refused in outcomes.into_iter().filter(Result::is_err) {
        assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
    }
    let left = app.count("SELECT count(*) FROM recovery_codes").await;
    assert_eq!(left, 9, "none was lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_enrolments_and_confirmations_leave_one_factor_that_works() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    for _ in 0..4 {
        let user = app.user().create().await;
        let token = app.login(&user).await.access_token;
        let first = enroll(&app, &token, PASSWORD).await.unwrap();
        let first = Authenticator::enrolled(&first.secret);
        let code = first.code();
        let enrolling = channels.iter().cycle().take(4).map(|channel| {
            let request = EnrollTotpRequest {
                current_password: PASSWORD.to_owned(),
            };
            let mut auth = AuthServiceClient::new(channel.clone());
            let request = with_bearer(request, &token);
            async move { auth.enroll_totp(request).await }
        });
        let confirming = channels.iter().cycle().take(4);
        let confirming = confirming.map(|channel| confirm_through(channel, &token, &code));
        let (enrolled, confirmed) =
            futures_util::future::join(join_all(enrolling), join_all(confirming)).await;
        let of_user =
            |what: &str| format!("SELECT count(*) FROM {what} AND user_id = '{}'", user.id);
        let codes = of_user("recovery_codes WHERE true");
        let confirmed: Vec<_> = confirmed.into_iter().filter_map(Result::ok).collect();
        if let [confirmed] = &*confirmed {
            // Whatever was enrolled before it was replaced by nothing after it.
            let_time_pass(&app).await;
            let challenged = challenge(&app, &user).await.challenge;
            let code = first.code();
            complete_through(&app.channel, &challenged, &code)
                .await
                .unwrap();
            assert_eq!(confirmed.recovery_codes.len(), 10);
            assert_eq!(app.count(&codes).await, 10);
        } else {
            assert!(confirmed.is_empty());
            assert!(login(&app, &user, PASSWORD).await.unwrap().tokens.is_some());
            // The last that was enrolled is the one.
            let works = async |secret: &str| {
                let code = Authenticator::enrolled(secret).code();
                confirm(&app, &token, &code).await.is_ok()
            };
            let mut working = 0;
            app.sql("DELETE FROM login_throttle").await;
            for enrolled in enrolled.into_iter().filter_map(Result::ok) {
                working += usize::from(works(&enrolled.into_inner().secret).await);
            }
            assert_eq!(working, 1);
        }
        let rows = of_user("totp_credentials WHERE confirmed_at IS NOT NULL");
        assert_eq!(app.count(&rows).await, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_login_by_password_alone_slips_through_while_a_factor_is_enabled() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    for _ in 0..4 {
        let user = app.user().create().await;
        let token = app.login(&user).await.access_token;
        let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
        let code = Authenticator::enrolled(&enrolled.secret).code();
        let channels = [app.channel.clone(), replica.channel()];
        let logins = channels.iter().cycle().take(12);
        let logins = logins.map(|channel| login_through(channel, &user, PASSWORD));
        let (logins, confirmed) =
            futures_util::future::join(join_all(logins), confirm(&app, &token, &code)).await;
        confirmed.unwrap();
        for login in logins {
            let login = login.unwrap();
            assert!(login.tokens.is_some() != login.mfa_challenge.is_some());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_that_meets_the_moment_of_enabling_is_asked_for_a_code() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
    let phone = Authenticator::enrolled(&enrolled.secret);
    // The one waits where it holds the user, the other where it has found no factor and the password right.
    let blocker = Blocker::lock_writes(&app, "users").await;
    let (channel, code, bearer) = (app.channel.clone(), phone.code(), token.clone());
    let confirming = tokio::spawn(async move { confirm_through(&channel, &bearer, &code).await });
    blocker.hold_up(&app, 1).await;
    let (channel, person) = (app.channel.clone(), user.clone());
    let logging_in = tokio::spawn(async move { login_through(&channel, &person, PASSWORD).await });
    blocker.hold_up(&app, 2).await;
    blocker.release().await;
    confirming.await.unwrap().unwrap();
    let answer = logging_in.await.unwrap().unwrap();
    assert!(answer.tokens.is_none());
    let_time_pass(&app).await;
    let challenge = answer.mfa_challenge.unwrap().challenge;
    complete_through(&app.channel, &challenge, &phone.code())
        .await
        .unwrap();
}
