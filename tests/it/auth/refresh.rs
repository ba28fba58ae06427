use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use tollkeeper::proto::tollkeeper::auth::v1::Tokens;
use tonic::Code;

use super::{assert_invalid, assert_refused, credential, refresh, visible};
use crate::harness::{TestApp, TestUser};

/// A user with a session.
async fn session(app: &TestApp) -> (TestUser, Tokens) {
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    (user, tokens)
}

async fn advance(app: &TestApp, token: &str) -> Tokens {
    let answer = refresh(app, token).await.expect("refreshed");
    assert!(!answer.repeated);
    answer.tokens.expect("tokens")
}

/// Moves the times of a session into the past.
async fn age(app: &TestApp, tokens: &Tokens, column: &str, interval: &str) {
    let id = &tokens.session_id;
    app.sql(&format!(
        "UPDATE sessions SET {column} = {column} - interval '{interval}' WHERE id = '{id}'"
    ))
    .await;
}

async fn reuse_events(app: &TestApp, tokens: &Tokens) -> i64 {
    let id = &tokens.session_id;
    app.count(&format!(
        "SELECT count(*) FROM audit_events \
         WHERE action = 'session.refresh_token_reused' AND target_id = '{id}'"
    ))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_gives_new_tokens_of_the_same_session() {
    let app = TestApp::spawn().await;
    let (user, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    assert_eq!(second.session_id, first.session_id);
    assert_ne!(second.refresh_token, first.refresh_token);
    assert_ne!(second.access_token, first.access_token);
    let valid = app.validate(&second.access_token).await.unwrap();
    assert_eq!(
        (valid.user_id, valid.session_id),
        (user.id, first.session_id)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn access_tokens_issued_before_a_refresh_stay_valid() {
    let app = TestApp::spawn().await;
    let (_, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    advance(&app, &second.refresh_token).await;
    app.validate(&first.access_token).await.unwrap();
    app.validate(&second.access_token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_gets_the_same_successor_and_is_told_so() {
    let app = TestApp::spawn().await;
    let (_, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    for _ in 0..3 {
        let again = refresh(&app, &first.refresh_token).await.unwrap();
        assert!(again.repeated);
        let again = again.tokens.unwrap();
        assert_eq!(again.refresh_token, second.refresh_token);
        assert_eq!(
            again.refresh_token_expires_at,
            second.refresh_token_expires_at
        );
        app.validate(&again.access_token).await.unwrap();
    }
    advance(&app, &second.refresh_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_two_generations_old_revokes_the_session() {
    let app = TestApp::spawn().await;
    let (_, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    let third = advance(&app, &second.refresh_token).await;
    let refused = refresh(&app, &first.refresh_token).await;
    let refused = assert_refused(refused, Code::Unauthenticated, "REFRESH_TOKEN_REUSED");
    assert_eq!(credential(&refused), "refresh_token");
    for tokens in [&first, &second, &third] {
        let refused = app.validate(&tokens.access_token).await;
        assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
        let refused = refresh(&app, &tokens.refresh_token).await;
        assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    }
    assert_eq!(reuse_events(&app, &first).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn reuse_in_one_session_leaves_the_others_alone() {
    let app = TestApp::spawn().await;
    let (user, first) = session(&app).await;
    let other = app.login(&user).await;
    let second = advance(&app, &first.refresh_token).await;
    advance(&app, &second.refresh_token).await;
    refresh(&app, &first.refresh_token).await.unwrap_err();
    app.validate(&other.access_token).await.unwrap();
    advance(&app, &other.refresh_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_previous_token_counts_as_reused_after_the_retry_window() {
    let app = TestApp::spawn().await;
    let (_, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    age(&app, &second, "rotated_at", "110 s").await;
    assert!(refresh(&app, &first.refresh_token).await.unwrap().repeated);
    age(&app, &second, "rotated_at", "11 s").await;
    let refused = refresh(&app, &first.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "REFRESH_TOKEN_REUSED");
    app.validate(&second.access_token).await.unwrap_err();
    assert_eq!(reuse_events(&app, &first).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_token_works_after_the_retry_window() {
    let app = TestApp::spawn().await;
    let (_, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    age(&app, &second, "rotated_at", "6 days").await;
    advance(&app, &second.refresh_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_lapses_when_it_is_not_refreshed_in_time() {
    let app = TestApp::spawn().await;
    let (_, tokens) = session(&app).await;
    age(&app, &tokens, "idle_expires_at", "7 days").await;
    let refused = refresh(&app, &tokens.refresh_token).await;
    let refused = assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_EXPIRED");
    assert_eq!(credential(&refused), "refresh_token");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_extends_the_idle_time_but_not_the_absolute_one() {
    let app = TestApp::spawn().await;
    let (_, first) = session(&app).await;
    age(&app, &first, "idle_expires_at", "6 days").await;
    age(&app, &first, "absolute_expires_at", "27 days").await;
    let id = &first.session_id;
    let second = advance(&app, &first.refresh_token).await;
    let at_limit = format!(
        "SELECT count(*) FROM sessions WHERE id = '{id}' AND idle_expires_at = absolute_expires_at \
         AND absolute_expires_at BETWEEN now() + interval '71 h' AND now() + interval '72 h'"
    );
    assert_eq!(app.count(&at_limit).await, 1);
    let lapses = second.refresh_token_expires_at.unwrap().seconds;
    let told = format!(
        "SELECT extract(epoch FROM absolute_expires_at)::bigint - {lapses} \
         FROM sessions WHERE id = '{id}'"
    );
    assert!((-1..=1).contains(&app.count(&told).await));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_past_its_absolute_limit_has_ended_for_both_tokens() {
    let app = TestApp::spawn().await;
    let (_, tokens) = session(&app).await;
    age(&app, &tokens, "absolute_expires_at", "30 days").await;
    let refused = refresh(&app, &tokens.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    let refused = app.validate(&tokens.access_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_access_token_does_not_outlive_its_session() {
    let app = TestApp::spawn().await;
    let (_, tokens) = session(&app).await;
    age(&app, &tokens, "absolute_expires_at", "29 days 23 h 55 min").await;
    let next = advance(&app, &tokens.refresh_token).await;
    let left = next.access_token_expires_at.unwrap().seconds - chrono::Utc::now().timestamp();
    assert!((240..=300).contains(&left), "{left}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_no_refresh_token_of_ours_is_refused_alike() {
    let app = TestApp::spawn().await;
    let (_, tokens) = session(&app).await;
    let token = &*tokens.refresh_token;
    let body = token.strip_prefix("tkr_").expect("the prefix");
    let mut offered = vec![
        "garbage".to_owned(),
        "tkr_".to_owned(),
        body.to_owned(),
        format!("{token}="),
        format!(" {token}"),
        format!("{token}A"),
        token[..token.len() - 1].to_owned(),
        token.to_uppercase(),
        tokens.access_token.clone(),
        app.service_key.clone(),
        tokens.session_id.clone(),
        "tkr_".to_owned() + &"A".repeat(100_000),
    ];
    let bytes = URL_SAFE_NO_PAD.decode(body).expect("base64url");
    for at in 0..bytes.len() {
        let mut altered = bytes.clone();
        altered[at] ^= 1;
        offered.push(format!("tkr_{}", URL_SAFE_NO_PAD.encode(altered)));
    }
    let mut first = None;
    for offer in offered {
        let refused = refresh(&app, &offer).await;
        let refused = assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
        assert_eq!(credential(&refused), "refresh_token");
        let first = first.get_or_insert_with(|| refused.clone());
        assert_eq!(visible(&refused), visible(first), "{offer}");
    }
    // None of it harmed the session.
    advance(&app, token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_refresh_token_is_a_missing_field() {
    let app = TestApp::spawn().await;
    assert_invalid(refresh(&app, "").await, &["refresh_token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_a_session_that_this_database_does_not_know_is_refused() {
    let (app, elsewhere) = (TestApp::spawn().await, TestApp::spawn().await);
    let (_, foreign) = session(&elsewhere).await;
    let refused = refresh(&app, &foreign.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_generation_from_before_the_database_was_set_back_is_refused_without_blame() {
    let app = TestApp::spawn().await;
    let (_, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    app.sql("UPDATE sessions SET counter = 0").await;
    let refused = refresh(&app, &second.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
    app.validate(&second.access_token).await.unwrap();
    assert_eq!(reuse_events(&app, &first).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logged_out_session_is_not_refreshed_and_nobody_is_blamed() {
    let app = TestApp::spawn().await;
    let (_, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    app.logout(&second.access_token).await;
    for tokens in [&first, &second] {
        let refused = refresh(&app, &tokens.refresh_token).await;
        assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    }
    assert_eq!(reuse_events(&app, &first).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_user_refreshes_again_once_enabled() {
    let app = TestApp::spawn().await;
    let (user, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    app.disable(&user.id).await;
    for tokens in [&first, &second] {
        let refused = refresh(&app, &tokens.refresh_token).await;
        let refused = assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
        assert_eq!(credential(&refused), "refresh_token");
    }
    app.enable(&user.id).await;
    app.validate(&second.access_token).await.unwrap();
    advance(&app, &second.refresh_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn reuse_is_caught_while_the_user_is_disabled() {
    let app = TestApp::spawn().await;
    let (user, first) = session(&app).await;
    let second = advance(&app, &first.refresh_token).await;
    advance(&app, &second.refresh_token).await;
    app.disable(&user.id).await;
    let refused = refresh(&app, &first.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "REFRESH_TOKEN_REUSED");
    app.enable(&user.id).await;
    let refused = app.validate(&first.access_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
}
