use chrono::{DateTime, Utc};
use prost_types::Timestamp;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{CreateUserRequest, LookupUserRequest, lookup_user_request::By},
    auth::v1::{LoginRequest, LoginResponse, User},
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{assert_invalid, assert_refused, visible};
use crate::harness::{Blocker, PASSWORD, TestApp};

async fn login(app: &TestApp, identifier: &str, password: &str) -> Result<LoginResponse, Status> {
    let request = LoginRequest {
        identifier: identifier.to_owned(),
        password: password.to_owned(),
    };
    Ok(app.auth("").login(request).await?.into_inner())
}

async fn create_without_password(app: &TestApp, username: &str) -> User {
    let request = CreateUserRequest {
        email: format!("{username}@example.com"),
        username: username.to_owned(),
        ..CreateUserRequest::default()
    };
    let created = app.admin(&app.service_key).create_user(request).await;
    created.unwrap().into_inner().user.unwrap()
}

fn instant(time: Option<Timestamp>) -> DateTime<Utc> {
    let time = time.expect("set");
    DateTime::from_timestamp(time.seconds, time.nanos.cast_unsigned()).expect("valid")
}

#[tokio::test(flavor = "multi_thread")]
async fn address_and_username_are_taken_in_any_case() {
    let app = TestApp::spawn().await;
    let user = app
        .user()
        .email("Ada@Example.com")
        .username("Ada.L")
        .create()
        .await;
    for identifier in [
        "Ada@Example.com",
        "ada@example.com",
        "ADA@EXAMPLE.COM",
        "Ada.L",
        "ada.l",
        "ADA.L",
    ] {
        let answer = login(&app, identifier, PASSWORD).await.expect(identifier);
        let known = answer.user.unwrap();
        assert_eq!(
            (known.id, known.email),
            (user.id.clone(), "Ada@Example.com".to_owned())
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_password_unknown_account_and_no_password_are_refused_alike() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    create_without_password(&app, "federated").await;
    let mut refusals = Vec::new();
    for (identifier, password) in [
        (&*user.email, "not the password"),
        (&*user.username, "not the password"),
        (&*user.email, "x"),
        (&*user.email, &*"x".repeat(1024)),
        (&*user.email, &*format!("{PASSWORD}\0")),
        ("nobody@example.com", PASSWORD),
        ("nobody", PASSWORD),
        ("nobody", "a password that nobody has"),
        ("federated@example.com", PASSWORD),
        ("federated", "a password that nobody has"),
        // Patterns and quotes are letters like others.
        ("%@example.com", PASSWORD),
        ("'or'1'='1@example.com", PASSWORD),
    ] {
        let refused = login(&app, identifier, password).await;
        refusals.push(assert_refused(
            refused,
            Code::Unauthenticated,
            "INVALID_CREDENTIALS",
        ));
    }
    for refusal in &refusals {
        assert_eq!(visible(refusal), visible(&refusals[0]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_account_says_so_only_after_the_right_password() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.disable(&user.id).await;
    let unknown = login(&app, "nobody", PASSWORD).await.unwrap_err();
    let wrong = login(&app, &user.email, "not the password").await;
    let wrong = assert_refused(wrong, Code::Unauthenticated, "INVALID_CREDENTIALS");
    assert_eq!(visible(&wrong), visible(&unknown));
    let right = login(&app, &user.email, PASSWORD).await;
    assert_refused(right, Code::PermissionDenied, "ACCOUNT_DISABLED");
    assert_eq!(app.count("SELECT count(*) FROM sessions").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_while_the_password_is_checked_keeps_the_login_out() {
    let app = TestApp::spawn().await;
    for (change, code, reason) in [
        (
            "is_active = false",
            Code::PermissionDenied,
            "ACCOUNT_DISABLED",
        ),
        (
            "password_hash = 'of another password'",
            Code::Unauthenticated,
            "INVALID_CREDENTIALS",
        ),
    ] {
        let user = app.user().create().await;
        let held = Blocker::lock_user(&app, &user).await;
        let changing = async {
            // The password was right, and the session is about to be opened.
            held.hold_up(&app, 1).await;
            let id = &user.id;
            held.sql(&format!("UPDATE users SET {change} WHERE id = '{id}'"))
                .await;
            held.release().await;
        };
        let (answer, ()) = tokio::join!(login(&app, &user.email, PASSWORD), changing);
        assert_refused(answer, code, reason);
    }
    for left in [
        "SELECT count(*) FROM sessions",
        "SELECT count(*) FROM audit_events WHERE action = 'session.opened'",
        "SELECT count(*) FROM users WHERE last_login_at IS NOT NULL",
    ] {
        assert_eq!(app.count(left).await, 0, "{left}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_sets_last_login_at_and_no_other_time() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let before = Utc::now();
    let first = login(&app, &user.email, PASSWORD)
        .await
        .unwrap()
        .user
        .unwrap();
    let second = login(&app, &user.email, PASSWORD)
        .await
        .unwrap()
        .user
        .unwrap();
    assert!(instant(first.last_login_at) >= before - chrono::Duration::milliseconds(1));
    assert!(instant(second.last_login_at) > instant(first.last_login_at));
    assert_eq!(second.updated_at, first.created_at);
    let by = Some(By::Email(user.email));
    let stored = app
        .admin(&app.service_key)
        .lookup_user(LookupUserRequest { by })
        .await;
    assert_eq!(stored.unwrap().into_inner().user.unwrap(), second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_login_leaves_last_login_at_alone() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    login(&app, &user.email, "not the password")
        .await
        .unwrap_err();
    let logged_in = "SELECT count(*) FROM users WHERE last_login_at IS NOT NULL";
    assert_eq!(app.count(logged_in).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_say_when_they_lapse() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let before = Utc::now();
    let tokens = app.login(&user).await;
    let access_secs = (instant(tokens.access_token_expires_at) - before).num_seconds();
    let refresh_secs = (instant(tokens.refresh_token_expires_at) - before).num_seconds();
    assert!((1799..=1830).contains(&access_secs), "{access_secs}");
    assert!(
        (604_799..=604_830).contains(&refresh_secs),
        "{refresh_secs}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn each_login_opens_a_session_of_its_own() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (first, second) = (app.login(&user).await, app.login(&user).await);
    assert_ne!(first.session_id, second.session_id);
    assert_ne!(first.refresh_token, second.refresh_token);
    app.logout(&first.access_token).await;
    app.validate(&first.access_token).await.unwrap_err();
    app.validate(&second.access_token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_are_named() {
    let app = TestApp::spawn().await;
    assert_invalid(login(&app, "", "").await, &["identifier", "password"]);
    assert_invalid(login(&app, "no address@", PASSWORD).await, &["identifier"]);
    assert_invalid(login(&app, "no username", PASSWORD).await, &["identifier"]);
    assert_invalid(login(&app, "ada\0", PASSWORD).await, &["identifier"]);
    assert_invalid(login(&app, "ada", &"x".repeat(1025)).await, &["password"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_logins_is_shed_and_validation_goes_on() {
    let app = TestApp::spawn_with(|settings| {
        settings.password.threads = 1;
        settings.password.queue = 0;
        settings.password.argon2_memory_kib = 64 * 1024;
        settings.password.argon2_iterations = 3;
    })
    .await;
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    let flood = futures_util::future::join_all((0..16).map(|_| login(&app, &user.email, PASSWORD)));
    let (outcomes, valid) = tokio::join!(flood, app.validate(&tokens.access_token));
    valid.unwrap();
    let (served, shed): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert!(!served.is_empty() && !shed.is_empty());
    for refused in shed {
        let refused = assert_refused(refused, Code::ResourceExhausted, "OVERLOADED");
        let retry = refused.get_details_retry_info().expect("a RetryInfo");
        assert!(retry.retry_delay.is_some_and(|delay| !delay.is_zero()));
    }
}
