use std::time::Duration;

use chrono::Utc;
use tollkeeper::proto::tollkeeper::auth::v1::{Role, ValidateTokenRequest};
use tonic::Code;

use super::{assert_invalid, assert_refused, credential, refresh, refusal_in_time, visible};
use crate::harness::{TestApp, eventually, validate_through};

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_says_who_it_is_and_until_when() {
    let app = TestApp::spawn().await;
    let user = app.user().tier("starter").create().await;
    let tokens = app.login(&user).await;
    let valid = app.validate(&tokens.access_token).await.unwrap();
    assert_eq!(
        (&valid.user_id, &valid.username),
        (&user.id, &user.username)
    );
    assert_eq!((&*valid.tier, valid.role()), ("starter", Role::User));
    assert_eq!(valid.session_id, tokens.session_id);
    assert_eq!(valid.expires_at, tokens.access_token_expires_at);
    let (issued, expires) = (valid.issued_at.unwrap(), valid.expires_at.unwrap());
    assert_eq!(expires.seconds - issued.seconds, 1800);
    assert!((Utc::now().timestamp() - issued.seconds) < 30);
    assert_eq!(valid.cache_for, Some(prost_types::Duration::default()));
    assert!(valid.quota.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn quota_is_told_when_asked_for() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let request = ValidateTokenRequest {
        token: app.login(&user).await.access_token,
        include_quota: true,
        ..ValidateTokenRequest::default()
    };
    let valid = app
        .auth(&app.service_key)
        .validate_token(request)
        .await
        .unwrap();
    let quota = valid.into_inner().quota.unwrap();
    assert_eq!((&*quota.tier, quota.unlimited), ("free", false));
    assert_eq!((quota.limit_tokens, quota.used_tokens), (100_000, 0));
    assert_eq!(quota.remaining_tokens, 100_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_tier_shows_in_the_next_answer() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for tier in ["starter", "builder", "free"] {
        app.set_tier(&user.id, tier).await;
        assert_eq!(app.validate(&token).await.unwrap().tier, tier);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kill_switch_shows_in_the_next_answer_both_ways() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for _ in 0..2 {
        app.disable(&user.id).await;
        let refused = app.validate(&token).await;
        let refused = assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
        assert_eq!(credential(&refused), "token");
        app.enable(&user.id).await;
        app.validate(&token).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_shows_in_the_next_answer() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    app.logout(&token).await;
    let refused = app.validate(&token).await;
    let refused = assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    assert_eq!(credential(&refused), "token");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_made_in_the_database_alone_is_heard_of() {
    let app = TestApp::spawn().await;
    let token = app
        .login(&app.user().admin().create().await)
        .await
        .access_token;
    assert_eq!(app.validate(&token).await.unwrap().role(), Role::Admin);
    app.sql("UPDATE users SET role = 'user'").await;
    eventually("the role is taken away", async || {
        app.validate(&token).await.unwrap().role() == Role::User
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_token_of_a_deleted_session_or_user_is_refused() {
    let app = TestApp::spawn().await;
    let (one, other) = (app.user().create().await, app.user().create().await);
    let (of_session, of_user) = (app.login(&one).await, app.login(&other).await);
    let id = of_session.session_id;
    app.sql(&format!("DELETE FROM sessions WHERE id = '{id}'"))
        .await;
    app.sql(&format!("DELETE FROM users WHERE id = '{}'", other.id))
        .await;
    for token in [of_session.access_token, of_user.access_token] {
        let refused = app.validate(&token).await;
        assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_an_earlier_epoch_is_refused() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let old = app.login(&user).await.access_token;
    app.sql("UPDATE users SET auth_epoch = auth_epoch + 1")
        .await;
    let refused = app.validate(&old).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    app.validate(&app.login(&user).await.access_token)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_token_expires_and_its_session_goes_on() {
    let app = TestApp::spawn_with(|settings| {
        settings.auth.access_ttl = Duration::from_secs(2);
        settings.auth.leeway = Duration::ZERO;
    })
    .await;
    let tokens = app.login(&app.user().create().await).await;
    let refused = refusal_in_time(&app, &tokens.access_token).await;
    let refused = assert_refused(
        Err::<(), _>(refused),
        Code::Unauthenticated,
        "CREDENTIAL_EXPIRED",
    );
    assert_eq!(credential(&refused), "token");
    assert!(tokens.access_token_expires_at.unwrap().seconds <= Utc::now().timestamp());
    refresh(&app, &tokens.refresh_token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_no_access_token_is_refused_alike() {
    let app = TestApp::spawn().await;
    let tokens = app.login(&app.user().create().await).await;
    let access = &*tokens.access_token;
    let (head, signature) = access.rsplit_once('.').expect("a JWT");
    let (header, payload) = head.split_once('.').expect("a JWT");
    let mut first = None;
    for token in [
        "garbage",
        "..",
        &app.service_key,
        &tokens.refresh_token,
        &tokens.session_id,
        head,
        &format!("{head}."),
        &format!("{header}.{payload}x.{signature}"),
        &format!("{access}.{signature}"),
        &format!("Bearer {access}"),
        &format!("{access} "),
        &format!("{access}\0"),
        &format!("{head}.{}", "A".repeat(signature.len())),
        &format!("{head}.{}", "A".repeat(8192)),
    ] {
        let refused = app.validate(token).await;
        let refused = assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
        assert_eq!(credential(&refused), "token", "{token}");
        let first = first.get_or_insert_with(|| refused.clone());
        assert_eq!(visible(&refused), visible(first), "{token}");
    }
    app.validate(access).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_token_is_a_missing_field() {
    let app = TestApp::spawn().await;
    assert_invalid(app.validate("").await, &["token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fault_of_the_callers_own_key_is_told_from_that_of_the_token() {
    let app = TestApp::spawn().await;
    let tokens = app.login(&app.user().create().await).await;
    let mut altered = app.service_key.clone();
    let last = if altered.ends_with('0') { '1' } else { '0' };
    altered.pop();
    altered.push(last);
    for key in ["garbage", &*altered, &*tokens.refresh_token] {
        // Even though the token asked about is no better.
        let refused = validate_through(&app.channel, key, "garbage").await;
        let refused = assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
        assert_eq!(credential(&refused), "authorization", "{key}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_services_with_the_scope_may_ask() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let admin = app.admin_token().await;
    let (_, writer) = app.service("writer", &["usage.write", "admin"]).await;
    let (_, validator) = app.service("validator", &["tokens.validate"]).await;
    for (key, code, reason) in [
        ("", Code::Unauthenticated, "CREDENTIAL_MISSING"),
        (&token, Code::PermissionDenied, "CALLER_NOT_ALLOWED"),
        (&admin, Code::PermissionDenied, "CALLER_NOT_ALLOWED"),
        (&writer, Code::PermissionDenied, "SCOPE_MISSING"),
    ] {
        let request = ValidateTokenRequest {
            token: token.clone(),
            include_quota: false,
            ..ValidateTokenRequest::default()
        };
        let refused = app.auth(key).validate_token(request).await;
        assert_refused(refused, code, reason);
    }
    validate_through(&app.channel, &validator, &token)
        .await
        .unwrap();
}
