//! What people change of their own account: profile and password.

use futures_util::future::join_all;
use prost_types::FieldMask;
use tollkeeper::{
    config::PasswordScheme,
    proto::tollkeeper::auth::v1::{
        ChangePasswordRequest, ChangePasswordResponse, GetCurrentUserRequest, RegisterRequest,
        UpdateCurrentUserRequest, User,
    },
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{assert_invalid, assert_refused, refresh, stored_hash, without_session};
use crate::harness::{PASSWORD, TestApp, eventually, reason, validate_through};

const NEW: &str = "a staple for the next battery";

fn mask(paths: &[&str]) -> Option<FieldMask> {
    let paths = paths.iter().map(|&path| path.to_owned()).collect();
    Some(FieldMask { paths })
}

fn named(username: &str, full_name: &str) -> User {
    User {
        username: username.to_owned(),
        full_name: full_name.to_owned(),
        ..User::default()
    }
}

async fn update(
    app: &TestApp,
    token: &str,
    user: User,
    update_mask: Option<FieldMask>,
) -> Result<User, Status> {
    let request = UpdateCurrentUserRequest {
        user: Some(user),
        update_mask,
        current_password: String::new(),
    };
    let answer = app.auth(token).update_current_user(request).await?;
    Ok(answer.into_inner().user.expect("a user"))
}

async fn change(
    app: &TestApp,
    token: &str,
    current: &str,
    new: &str,
) -> Result<ChangePasswordResponse, Status> {
    let request = ChangePasswordRequest {
        current_password: current.to_owned(),
        new_password: new.to_owned(),
        keep_other_sessions: false,
    };
    let answer = app.auth(token).change_password(request).await?;
    Ok(answer.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mask_says_what_changes_and_nothing_else_does() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let mut auth = app.auth(&token);
    let before = auth.get_current_user(GetCurrentUserRequest {}).await;
    let before = before.unwrap().into_inner().user.unwrap();

    let both = || named("countess", "Ada Lovelace");
    let after = update(&app, &token, both(), mask(&["full_name"])).await;
    let after = after.unwrap();
    assert_eq!(after.full_name, "Ada Lovelace");
    assert_eq!(after.username, before.username);
    assert_ne!(after.updated_at, before.updated_at);
    assert_eq!(
        User {
            full_name: before.full_name.clone(),
            updated_at: before.updated_at,
            ..after.clone()
        },
        before
    );
    // What is so already changes nothing.
    let again = update(&app, &token, both(), mask(&["full_name"])).await;
    assert_eq!(again.unwrap(), after);

    let after = update(&app, &token, both(), mask(&["*"])).await.unwrap();
    assert_eq!(
        (&*after.username, &*after.full_name),
        ("countess", "Ada Lovelace")
    );
    // Named, so emptied.
    let after = update(&app, &token, named("", ""), mask(&["full_name"])).await;
    assert_eq!(after.unwrap().full_name, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_mask_what_is_not_empty_changes_and_what_is_not_ones_own_is_ignored() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let wanted = named("", "Ada Lovelace");
    let before = update(&app, &token, wanted, None).await.unwrap();
    for mask in [None, mask(&[])] {
        let wanted = User {
            email: "another@example.com".to_owned(),
            tier: "advanced".to_owned(),
            role: 2,
            ..named("countess", "")
        };
        let after = update(&app, &token, wanted, mask).await.unwrap();
        assert_eq!(
            (&*after.username, &*after.email),
            ("countess", &*user.email)
        );
        assert_eq!((&*after.tier, after.role), ("free", 1));
        assert_eq!(after.full_name, before.full_name);
    }
    let nothing = update(&app, &token, User::default(), None).await.unwrap();
    assert_eq!(nothing.username, "countess");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_username_logs_in_and_validates_everywhere_and_frees_the_old_one() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().username("ada-byron").create().await;
    let token = app.login(&user).await.access_token;
    let key = &app.service_key;
    let asked = validate_through(&replica.channel(), key, &token).await;
    assert_eq!(asked.unwrap().username, "ada-byron");
    let wanted = named("Countess", "");
    update(&app, &token, wanted, mask(&["username"]))
        .await
        .unwrap();
    assert_eq!(app.validate(&token).await.unwrap().username, "Countess");
    eventually("the other replica knows", async || {
        let asked = validate_through(&replica.channel(), key, &token).await;
        asked.unwrap().username == "Countess"
    })
    .await;
    app.login_as("countess", PASSWORD).await.unwrap();
    let refused = app.login_as("ada-byron", PASSWORD).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    app.user().username("ada-byron").create().await;
    // Another case of one's own name is not somebody else's.
    let wanted = named("COUNTESS", "");
    let after = update(&app, &token, wanted, None).await.unwrap();
    assert_eq!(after.username, "COUNTESS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_username_that_is_taken_is_refused() {
    let app = TestApp::spawn().await;
    app.user().username("taken").create().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let refused = update(&app, &token, named("TAKEN", "Somebody"), None).await;
    assert_refused(refused, Code::AlreadyExists, "ACCOUNT_EXISTS");
    let me = app.login(&user).await;
    assert!(!me.access_token.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_of_an_update_are_named() {
    let app = TestApp::spawn().await;
    let token = app.admin_token().await;
    for path in ["email", "role", "tier", "id", "full_name.x", "", "Username"] {
        let refused = update(&app, &token, named("fine", ""), mask(&["username", path])).await;
        assert_invalid(refused, &["update_mask"]);
    }
    let refused = update(&app, &token, named("fine", ""), mask(&["*", "username"])).await;
    assert_invalid(refused, &["update_mask"]);
    let refused = update(&app, &token, named("", "line\nbreak"), mask(&["*"])).await;
    assert_invalid(refused, &["user.username", "user.full_name"]);
    let none = UpdateCurrentUserRequest::default();
    let refused = app.auth(&token).update_current_user(none).await;
    assert_invalid(refused, &["user"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_is_written_without_the_names() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let wanted = named("countess", "Ada Lovelace");
    for _ in 0..2 {
        update(&app, &token, wanted.clone(), None).await.unwrap();
    }
    let rows = app
        .sql(
            "SELECT details::text, actor_id::text, target_id::text FROM audit_events \
              WHERE action = 'user.updated'",
        )
        .await;
    assert_eq!(rows.len(), 1);
    let details: serde_json::Value = serde_json::from_str(rows[0].get(0)).unwrap();
    let fields = serde_json::json!({"fields": ["username", "full_name"]});
    assert_eq!(details, fields);
    let (actor, target): (&str, &str) = (rows[0].get(1), rows[0].get(2));
    assert_eq!((actor, target), (&*user.id, &*user.id));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_password_replaces_the_old_one_and_ends_the_other_sessions_everywhere() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let api_key = app.api_key(&user, &[]).await;
    let (mine, other) = (app.login(&user).await, app.login(&user).await);
    let key = &app.service_key;
    let asked = validate_through(&replica.channel(), key, &other.access_token).await;
    asked.unwrap();
    let before = stored_hash(&app, &user).await;
    let changed = change(&app, &mine.access_token, PASSWORD, NEW).await;
    assert_eq!(changed.unwrap().revoked_count, 2);
    assert_ne!(stored_hash(&app, &user).await, before);
    eventually("the other replica refuses it", async || {
        let asked = validate_through(&replica.channel(), key, &other.access_token).await;
        asked.is_err_and(|refused| reason(&refused) == "SESSION_ENDED")
    })
    .await;
    let refused = refresh(&app, &other.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    app.validate(&mine.access_token).await.unwrap();
    refresh(&app, &mine.refresh_token).await.unwrap();
    app.validate(&api_key.text).await.unwrap();
    let refused = app.login_as(&user.email, PASSWORD).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    app.login_as(&user.email, NEW).await.unwrap();
    let rows = app
        .sql("SELECT details::text FROM audit_events WHERE action = 'password.changed'")
        .await;
    let details: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(details, [r#"{"sessions_ended": 2}"#]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_sessions_stay_when_told_so() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (mine, other) = (app.login(&user).await, app.login(&user).await);
    let request = ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: NEW.to_owned(),
        keep_other_sessions: true,
    };
    let mut auth = app.auth(&mine.access_token);
    let answer = auth.change_password(request).await.unwrap().into_inner();
    assert_eq!(answer.revoked_count, 0);
    app.validate(&other.access_token).await.unwrap();
    refresh(&app, &other.refresh_token).await.unwrap();
    app.login_as(&user.email, NEW).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_present_password_changes_nothing() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (mine, other) = (app.login(&user).await, app.login(&user).await);
    let refused = change(&app, &mine.access_token, "not the present one", NEW).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    app.validate(&other.access_token).await.unwrap();
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_changes_at_once_one_wins() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let wanted = [NEW, "another staple entirely, friend"];
    let outcomes = join_all(wanted.map(|new| change(&app, &token, PASSWORD, new))).await;
    let won = outcomes.iter().position(Result::is_ok).expect("one wins");
    let lost = outcomes.into_iter().nth(1 - won).unwrap();
    assert_refused(lost, Code::Unauthenticated, "INVALID_CREDENTIALS");
    app.login_as(&user.email, wanted[won]).await.unwrap();
    let refused = app.login_as(&user.email, wanted[1 - won]).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_login_with_the_old_password_survives_its_change() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (mut present, mut next) = (PASSWORD, NEW);
    for _ in 0..10 {
        // So many changes in a row cost waits.
        app.sql("DELETE FROM login_throttle").await;
        let mine = app.login_as(&user.email, present).await.unwrap();
        let (changed, login) = tokio::join!(
            change(&app, &mine.access_token, present, next),
            app.login_as(&user.email, present),
        );
        changed.unwrap();
        match login {
            Ok(tokens) => {
                let refused = app.validate(&tokens.access_token).await;
                assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
            }
            refused => {
                assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
            }
        }
        std::mem::swap(&mut present, &mut next);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_may_not_be_set_is_refused() {
    let app = TestApp::spawn().await;
    let user = app.user().username("countess1815").create().await;
    let token = app.login(&user).await.access_token;
    let long = "x".repeat(129);
    for weak in [
        "short",
        &long,
        "twelve\0chars and more",
        "password1234",
        "countess1815",
        &user.email.to_uppercase(),
        PASSWORD,
    ] {
        let refused = change(&app, &token, PASSWORD, weak).await;
        assert_invalid(refused, &["new_password"]);
    }
    let refused = change(&app, &token, "", "short").await;
    assert_invalid(refused, &["current_password", "new_password"]);
    // The present one is checked before the new one is judged.
    let refused = change(&app, &token, "not the present one", "password1234").await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_with_ones_own_names_as_password_is_refused_and_says_why() {
    let app = TestApp::spawn().await;
    for password in ["Augusta Lovelace", "countess1815", "123456123456"] {
        let request = RegisterRequest {
            email: "ada@example.com".to_owned(),
            username: "countess1815".to_owned(),
            full_name: "Augusta Lovelace".to_owned(),
            password: password.to_owned(),
        };
        let refused = app.auth("").register(request).await;
        let status = refused.as_ref().unwrap_err().clone();
        assert_invalid(refused, &["password"]);
        let details = status.get_details_bad_request().unwrap();
        let why = &details.field_violations[0].description;
        assert!(why.starts_with("must be harder to guess"), "{why}");
        assert!(!status.message().contains(password));
    }
    assert_eq!(app.count("SELECT count(*) FROM users").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bcrypt_is_asked_for_no_more_than_it_reads() {
    let app =
        TestApp::spawn_with(|settings| settings.password.scheme = PasswordScheme::Bcrypt).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let words = "staples and batteries of horses, ".repeat(3);
    let refused = change(&app, &token, PASSWORD, &words[..73]).await;
    assert_invalid(refused, &["new_password"]);
    change(&app, &token, PASSWORD, &words[..72]).await.unwrap();
    app.login_as(&user.email, &words[..72]).await.unwrap();
    for other in [&words[..71], &words[..73]] {
        let refused = app.login_as(&user.email, other).await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_and_a_program_have_no_profile_and_no_password() {
    let app = TestApp::spawn().await;
    let key = app.api_key(&app.user().create().await, &[]).await.text;
    for (credential, code, why) in without_session(&app, &key) {
        let refused = update(&app, credential, named("somebody", ""), None).await;
        assert_refused(refused, code, why);
        let refused = change(&app, credential, PASSWORD, NEW).await;
        assert_refused(refused, code, why);
    }
}
