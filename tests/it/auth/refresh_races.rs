use std::collections::HashSet;

use futures_util::future::join_all;
use tollkeeper::proto::tollkeeper::auth::v1::RefreshTokensResponse;
use tonic::{Code, Status, transport::Channel};

use super::{assert_refused, refresh, refresh_through, refreshed};
use crate::harness::{TestApp, eventually, reason, validate_through};

/// Presents one token this often at once, over these connections in turn.
async fn present(
    channels: &[Channel],
    token: &str,
    times: usize,
) -> Vec<Result<RefreshTokensResponse, Status>> {
    let channels = channels.iter().cycle().take(times);
    join_all(channels.map(|channel| refresh_through(channel, token))).await
}

/// The one successor that all answers name; asserts that one call made it and the others repeat it.
#[track_caller]
fn one_successor(outcomes: Vec<Result<RefreshTokensResponse, Status>>) -> String {
    let answers: Vec<_> = outcomes.into_iter().map(|answer| answer.unwrap()).collect();
    assert_eq!(answers.iter().filter(|answer| !answer.repeated).count(), 1);
    let successors: HashSet<String> = answers
        .into_iter()
        .map(|answer| answer.tokens.unwrap().refresh_token)
        .collect();
    assert_eq!(successors.len(), 1);
    successors.into_iter().next().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_concurrent_refreshes_of_one_token_give_one_successor() {
    let app = TestApp::spawn().await;
    let tokens = app.login(&app.user().create().await).await;
    let channels = [app.channel.clone()];
    let mut token = tokens.refresh_token;
    for generation in 1..=3 {
        token = one_successor(present(&channels, &token, 50).await);
        assert_eq!(app.count("SELECT counter FROM sessions").await, generation);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_refreshes_over_two_replicas_give_one_successor() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    let first = app.login(&app.user().create().await).await;
    let second = one_successor(present(&channels, &first.refresh_token, 50).await);
    let third = one_successor(present(&channels, &second, 50).await);
    let answer = refresh_through(&replica.channel(), &third).await.unwrap();
    app.validate(&answer.tokens.unwrap().access_token)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn reuse_seen_by_one_replica_ends_the_session_on_the_other() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let first = app.login(&app.user().create().await).await;
    let second = refreshed(&app, &first.refresh_token).await;
    refresh(&app, &second.refresh_token).await.unwrap();
    let token = &second.access_token;
    validate_through(&replica.channel(), &app.service_key, token)
        .await
        .unwrap();
    refresh(&app, &first.refresh_token).await.unwrap_err();
    eventually("the other replica refuses the session", async || {
        let answer = validate_through(&replica.channel(), &app.service_key, token).await;
        answer.is_err_and(|refused| reason(&refused) == "SESSION_ENDED")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_replays_of_an_old_token_revoke_once() {
    let app = TestApp::spawn().await;
    let first = app.login(&app.user().create().await).await;
    let second = refreshed(&app, &first.refresh_token).await;
    refresh(&app, &second.refresh_token).await.unwrap();
    let outcomes = present(std::slice::from_ref(&app.channel), &first.refresh_token, 20).await;
    let mut reused = 0;
    for outcome in outcomes {
        let refused = outcome.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        match &*reason(&refused) {
            "REFRESH_TOKEN_REUSED" => reused += 1,
            other => assert_eq!(other, "SESSION_ENDED"),
        }
    }
    assert_eq!(reused, 1);
    let events = "SELECT count(*) FROM audit_events WHERE action = 'session.refresh_token_reused'";
    assert_eq!(app.count(events).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_races_a_logout_does_not_survive_it() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for _ in 0..10 {
        let tokens = app.login(&user).await;
        let channels = [app.channel.clone()];
        let (refreshed, ()) = tokio::join!(
            present(&channels, &tokens.refresh_token, 4),
            app.logout(&tokens.access_token),
        );
        let mut access_tokens = vec![tokens.access_token];
        let mut refresh_tokens = vec![tokens.refresh_token];
        for outcome in refreshed {
            match outcome {
                Ok(answer) => {
                    let tokens = answer.tokens.unwrap();
                    access_tokens.push(tokens.access_token);
                    refresh_tokens.push(tokens.refresh_token);
                }
                refused => {
                    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
                }
            }
        }
        for token in access_tokens {
            let refused = app.validate(&token).await;
            assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
        }
        for token in refresh_tokens {
            let refused = refresh(&app, &token).await;
            assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_races_the_kill_switch_gives_nothing_usable() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for _ in 0..10 {
        let tokens = app.login(&user).await;
        let channels = [app.channel.clone()];
        let (refreshed, _) = tokio::join!(
            present(&channels, &tokens.refresh_token, 4),
            app.disable(&user.id),
        );
        let mut newest = tokens.refresh_token;
        for outcome in refreshed {
            match outcome {
                Ok(answer) => {
                    let tokens = answer.tokens.unwrap();
                    newest = tokens.refresh_token;
                    let refused = app.validate(&tokens.access_token).await;
                    assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
                }
                refused => {
                    assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
                }
            }
        }
        let refused = refresh(&app, &newest).await;
        assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
        app.enable(&user.id).await;
        refresh(&app, &newest).await.unwrap();
    }
}
