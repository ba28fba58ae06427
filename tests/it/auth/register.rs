use tollkeeper::{
    config::PasswordScheme,
    proto::tollkeeper::auth::v1::{RegisterRequest, Role, User},
};
use tonic::{Code, Status};

use super::{assert_invalid, assert_refused, visible};
use crate::harness::{PASSWORD, TestApp};

fn request(email: &str, username: &str) -> RegisterRequest {
    RegisterRequest {
        email: email.to_owned(),
        username: username.to_owned(),
        full_name: "Ada Lovelace".to_owned(),
        password: PASSWORD.to_owned(),
    }
}

async fn register(app: &TestApp, request: RegisterRequest) -> Result<User, Status> {
    let response = app.auth("").register(request).await?;
    Ok(response.into_inner().user.expect("a user"))
}

#[tokio::test(flavor = "multi_thread")]
async fn registering_gives_an_active_account_of_the_default_tier_as_typed() {
    let app = TestApp::spawn().await;
    let user = register(&app, request("Ada@Example.com", "Ada.L"))
        .await
        .unwrap();
    assert_eq!(user.id.parse::<uuid::Uuid>().unwrap().get_version_num(), 7);
    assert_eq!(
        (&*user.email, &*user.username),
        ("Ada@Example.com", "Ada.L")
    );
    assert_eq!((&*user.full_name, &*user.tier), ("Ada Lovelace", "free"));
    assert_eq!(user.role(), Role::User);
    assert!(user.is_active);
    assert!(user.email_verified_at.is_none() && user.last_login_at.is_none());
    assert!(user.created_at.is_some());
    assert_eq!(user.created_at, user.tier_updated_at);
    assert_eq!(user.created_at, user.updated_at);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registered_user_logs_in() {
    let app = TestApp::spawn().await;
    register(&app, request("ada@example.com", "ada"))
        .await
        .unwrap();
    app.login_as("ada", PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_stored_as_a_hash_only() {
    let app = TestApp::spawn().await;
    register(&app, request("ada@example.com", "ada"))
        .await
        .unwrap();
    let rows = app
        .sql("SELECT password_hash, row_to_json(users)::text FROM users WHERE username = 'ada'")
        .await;
    let (hash, row): (&str, &str) = (rows[0].get(0), rows[0].get(1));
    assert!(hash.starts_with("$argon2id$v=19$m=64,t=1,p=1$"), "{hash}");
    assert!(!row.contains(PASSWORD));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_address_and_a_taken_username_are_refused_alike_in_any_case() {
    let app = TestApp::spawn().await;
    register(&app, request("ada@example.com", "ada"))
        .await
        .unwrap();
    let mut refusals = Vec::new();
    for (email, username) in [
        ("ada@example.com", "other"),
        ("ADA@Example.COM", "other"),
        ("other@example.com", "ada"),
        ("other@example.com", "ADA"),
        ("Ada@example.com", "Ada"),
    ] {
        let refused = register(&app, request(email, username)).await;
        refusals.push(assert_refused(
            refused,
            Code::AlreadyExists,
            "ACCOUNT_EXISTS",
        ));
    }
    for refusal in &refusals {
        assert_eq!(visible(refusal), visible(&refusals[0]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_registration_leaves_no_trace() {
    const TRACES: &str =
        "SELECT (SELECT count(*) FROM users) + (SELECT count(*) FROM audit_events)";
    let app = TestApp::spawn().await;
    register(&app, request("ada@example.com", "ada"))
        .await
        .unwrap();
    let before = app.count(TRACES).await;
    register(&app, request("ada@example.com", "other"))
        .await
        .unwrap_err();
    assert_eq!(app.count(TRACES).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_concurrent_registrations_of_one_address_exactly_one_succeeds() {
    let app = TestApp::spawn().await;
    let calls = (0..12).map(|n| {
        let app = &app;
        async move { register(app, request("ada@example.com", &format!("ada-{n}"))).await }
    });
    let outcomes = futures_util::future::join_all(calls).await;
    let (won, lost): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!(won.len(), 1);
    for refused in lost {
        assert_refused(refused, Code::AlreadyExists, "ACCOUNT_EXISTS");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_wrong_field_is_named_at_once() {
    let app = TestApp::spawn().await;
    let wrong = RegisterRequest {
        email: "no address".to_owned(),
        username: "@".to_owned(),
        full_name: "line\nbreak".to_owned(),
        password: String::new(),
    };
    let refused = register(&app, wrong).await;
    assert_invalid(refused, &["email", "username", "full_name", "password"]);
    for (field, change) in [
        (
            "email",
            (|r| r.email = "a@b".to_owned()) as fn(&mut RegisterRequest),
        ),
        ("email", |r| {
            r.email = format!("{}@example.com", "a".repeat(65))
        }),
        ("email", |r| r.email = "ada@example.com\0".to_owned()),
        ("username", |r| r.username = "ab".to_owned()),
        ("username", |r| r.username = "a".repeat(33)),
        ("username", |r| r.username = "-ada".to_owned()),
        ("full_name", |r| r.full_name = "x".repeat(201)),
        ("full_name", |r| r.full_name = "\0".to_owned()),
        ("password", |r| r.password = "short".to_owned()),
        ("password", |r| r.password = format!("{PASSWORD}\0")),
    ] {
        let mut request = request("ada@example.com", "ada");
        change(&mut request);
        assert_invalid(register(&app, request).await, &[field]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn password_length_is_counted_in_characters() {
    let app = TestApp::spawn_with(|settings| settings.password.min_strength = 0).await;
    for (chars, accepted) in [(11, false), (12, true), (128, true), (129, false)] {
        let name = format!("user-{chars}");
        let mut request = request(&format!("{name}@example.com"), &name);
        request.password = "ü".repeat(chars);
        let outcome = register(&app, request).await;
        assert_eq!(outcome.is_ok(), accepted, "{chars} characters");
        if accepted {
            app.login_as(&name, &"ü".repeat(chars)).await.unwrap();
        } else {
            assert_invalid(outcome, &["password"]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_bcrypt_a_password_of_more_than_72_bytes_is_refused() {
    let app = TestApp::spawn_with(|settings| {
        settings.password.scheme = PasswordScheme::Bcrypt;
        settings.password.min_strength = 0;
    })
    .await;
    let mut at_limit = request("a@example.com", "at-limit");
    at_limit.password = "x".repeat(72);
    register(&app, at_limit).await.unwrap();
    app.login_as("at-limit", &"x".repeat(72)).await.unwrap();
    let longer = app.login_as("at-limit", &"x".repeat(73)).await;
    assert_refused(longer, Code::Unauthenticated, "INVALID_CREDENTIALS");
    let mut beyond = request("b@example.com", "beyond");
    beyond.password = "ü".repeat(37);
    assert_invalid(register(&app, beyond).await, &["password"]);
}
