//! Answers as fresh as asked for, for one token and for many.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::time::sleep;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{DisableUserRequest, EnableUserRequest},
    auth::v1::{
        BatchValidateTokensRequest, LogoutRequest, MinFreshness, RevokeApiKeyRequest, TokenResult,
        ValidateTokenRequest, ValidateTokenResponse, auth_service_client::AuthServiceClient,
        min_freshness::AtLeast, token_result::Result as Worth,
    },
};
use tonic::{Code, Status, transport::Channel};

use crate::harness::{Blocker, Proxy, RunningServer, TestApp, eventually, reason, with_bearer};

/// Two replicas; the second one does not hear of changes for as long as the proxy is told.
async fn with_deaf_replica() -> (TestApp, RunningServer, Proxy) {
    with_replica(Duration::from_secs(60)).await
}

async fn with_replica(staleness_bound: Duration) -> (TestApp, RunningServer, Proxy) {
    let app = TestApp::spawn_with(|settings| {
        settings.auth.staleness_bound = staleness_bound;
        settings.auth.max_stale = Duration::from_secs(60);
    })
    .await;
    let (proxy, url) = Proxy::start(&app.database_url);
    let mut settings = app.settings().clone();
    settings.database.url = tollkeeper::config::Secret::new(url);
    let replica = RunningServer::start(&settings).await.unwrap();
    (app, replica, proxy)
}

fn at_least(revision: &str) -> Option<MinFreshness> {
    Some(MinFreshness {
        at_least: Some(AtLeast::AtLeastRevision(revision.to_owned())),
    })
}

fn from_database() -> Option<MinFreshness> {
    Some(MinFreshness {
        at_least: Some(AtLeast::FromDatabase(())),
    })
}

async fn ask(
    app: &TestApp,
    channel: Channel,
    token: &str,
    min_freshness: Option<MinFreshness>,
) -> Result<ValidateTokenResponse, Status> {
    let request = ValidateTokenRequest {
        token: token.to_owned(),
        min_freshness,
        ..ValidateTokenRequest::default()
    };
    let mut auth = AuthServiceClient::new(channel);
    let request = with_bearer(request, &app.service_key);
    Ok(auth.validate_token(request).await?.into_inner())
}

/// Asks until the replica trusts its memory: before, every answer comes from the database.
async fn warm(app: &TestApp, replica: &RunningServer, token: &str) {
    eventually("memory is trusted", async || {
        let before = replica.auth.counters().hits.get();
        ask(app, replica.channel(), token, None).await.unwrap();
        replica.auth.counters().hits.get() > before
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_revision_of_a_change_makes_a_replica_that_has_not_heard_of_it_answer_anew() {
    let (app, replica, proxy) = with_deaf_replica().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    warm(&app, &replica, &token).await;
    proxy.pause_feed();

    let request = DisableUserRequest {
        user_id: user.id.clone(),
        ..DisableUserRequest::default()
    };
    let disabled = app.admin(&app.service_key).disable_user(request).await;
    let revision = disabled.unwrap().into_inner().revision;
    let cached = ask(&app, replica.channel(), &token, None).await;
    cached.expect("within the bound, memory may be behind");
    let fresh = ask(&app, replica.channel(), &token, at_least(&revision)).await;
    assert_eq!(reason(&fresh.unwrap_err()), "ACCOUNT_DISABLED");
    // What was read so is what memory holds from then on.
    let request = EnableUserRequest {
        user_id: user.id.clone(),
    };
    let enabled = app.admin(&app.service_key).enable_user(request).await;
    let revision = enabled.unwrap().into_inner().revision;
    ask(&app, replica.channel(), &token, at_least(&revision))
        .await
        .unwrap();

    let logged_out = app.auth(&token).logout(LogoutRequest {}).await;
    let revision = logged_out.unwrap().into_inner().revision;
    ask(&app, replica.channel(), &token, None)
        .await
        .expect("behind");
    let fresh = ask(&app, replica.channel(), &token, from_database()).await;
    assert_eq!(reason(&fresh.unwrap_err()), "SESSION_ENDED");
    let fresh = ask(&app, replica.channel(), &token, at_least(&revision)).await;
    assert_eq!(reason(&fresh.unwrap_err()), "SESSION_ENDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_revision_of_a_revoked_api_key_is_seen_by_a_replica_that_has_not_heard_of_it() {
    let (app, replica, proxy) = with_deaf_replica().await;
    let user = app.user().create().await;
    let key = app.api_key(&user, &[]).await;
    warm(&app, &replica, &key.text).await;
    proxy.pause_feed();
    let token = app.login(&user).await.access_token;
    let request = RevokeApiKeyRequest {
        api_key_id: key.id.clone(),
    };
    let revoked = app.auth(&token).revoke_api_key(request).await;
    let revision = revoked.unwrap().into_inner().revision;
    ask(&app, replica.channel(), &key.text, None)
        .await
        .expect("behind");
    for fresh in [at_least(&revision), from_database()] {
        let answer = ask(&app, replica.channel(), &key.text, fresh).await;
        assert_eq!(reason(&answer.unwrap_err()), "CREDENTIAL_INVALID");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revision_that_was_heard_of_is_answered_from_memory() {
    let (app, replica, proxy) = with_deaf_replica().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let set = app.admin(&app.service_key);
    let request = tollkeeper::proto::tollkeeper::admin::v1::SetUserTierRequest {
        user_id: user.id,
        tier: "builder".to_owned(),
    };
    let revision = { set }
        .set_user_tier(request)
        .await
        .unwrap()
        .into_inner()
        .revision;
    eventually("it was heard of", async || {
        replica.auth.freshness().known().to_string() >= revision
    })
    .await;
    warm(&app, &replica, &token).await;
    proxy.cut();
    for _ in 0..10 {
        let answer = ask(&app, replica.channel(), &token, at_least(&revision)).await;
        assert_eq!(answer.unwrap().tier, "builder");
    }
    // What is newer, memory cannot say, nor what the database has now.
    for fresh in [at_least("7fffffffffffffff"), from_database()] {
        let answer = ask(&app, replica.channel(), &token, fresh).await;
        assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_an_outage_memory_that_missed_changes_does_not_answer_for_a_revision() {
    let (app, replica, proxy) = with_replica(Duration::from_millis(600)).await;
    let token = app.login(&app.user().create().await).await.access_token;
    warm(&app, &replica, &token).await;
    proxy.pause_feed();
    let logged_out = app.auth(&token).logout(LogoutRequest {}).await;
    let revision = logged_out.unwrap().into_inner().revision;
    // With what it had to tell.
    proxy.cut();
    let blocker = Blocker::lock(&app, "sessions").await;
    proxy.resume();
    eventually("the feed is beyond the change", async || {
        replica.auth.freshness().known().to_string() >= revision
    })
    .await;
    ask(&app, replica.channel(), &token, None)
        .await
        .expect("memory answers in an outage");
    let fresh = ask(&app, replica.channel(), &token, at_least(&revision)).await;
    assert_eq!(reason(&fresh.unwrap_err()), "DATABASE_UNAVAILABLE");
    blocker.release().await;
    let fresh = ask(&app, replica.channel(), &token, at_least(&revision)).await;
    assert_eq!(reason(&fresh.unwrap_err()), "SESSION_ENDED");
}

async fn batch(
    app: &TestApp,
    tokens: Vec<String>,
    min_freshness: Option<MinFreshness>,
) -> Result<Vec<TokenResult>, Status> {
    let request = BatchValidateTokensRequest {
        tokens,
        min_freshness,
    };
    let answer = app
        .auth(&app.service_key)
        .batch_validate_tokens(request)
        .await?;
    Ok(answer.into_inner().results)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_token_of_a_batch_is_answered_in_its_place_as_it_would_be_alone() {
    let app = TestApp::spawn().await;
    let (ada, bob, eve) = (
        app.user().create().await,
        app.user().create().await,
        app.user().create().await,
    );
    let good = app.login(&ada).await.access_token;
    let ended = app.login(&ada).await.access_token;
    app.logout(&ended).await;
    let disabled = app.login(&bob).await.access_token;
    app.disable(&bob.id).await;
    let key = app.api_key(&eve, &["read"]).await.text;
    let tokens = [&good, "garbage", &ended, &key, &disabled, &good];
    let tokens: Vec<String> = tokens.iter().map(|&token| token.to_owned()).collect();
    for fresh in [None, from_database()] {
        let results = batch(&app, tokens.clone(), fresh).await.unwrap();
        assert_eq!(results.len(), tokens.len());
        for (token, result) in tokens.iter().zip(results) {
            match (app.validate(token).await, result.result.unwrap()) {
                (Ok(alone), Worth::Valid(among)) => assert_eq!(alone, among),
                (Err(alone), Worth::Refused(among)) => {
                    assert_eq!(reason(&alone), among.reason);
                    assert_eq!(alone.message(), among.message);
                }
                (alone, among) => panic!("{alone:?} alone, {among:?} among others"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_batch_is_answered_and_an_outage_fails_it_as_a_whole() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|_| {}).await;
    let token = app.login(&app.user().create().await).await.access_token;
    let results = batch(&app, vec![token.clone(); 1000], None).await.unwrap();
    assert!(
        results
            .iter()
            .all(|r| matches!(r.result, Some(Worth::Valid(_))))
    );
    assert_eq!(results.len(), 1000);
    proxy.cut();
    let failed = batch(&app, vec![token], from_database()).await.unwrap_err();
    assert_eq!(reason(&failed), "DATABASE_UNAVAILABLE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_was_read_anew_is_given_to_those_who_ask_memory_too() {
    let (app, replica, proxy) = with_deaf_replica().await;
    for is_api_key in [false, true] {
        for is_by_revision in [false, true] {
            let user = app.user().create().await;
            let token = if is_api_key {
                app.api_key(&user, &[]).await.text
            } else {
                app.login(&user).await.access_token
            };
            proxy.resume();
            warm(&app, &replica, &token).await;
            proxy.pause_feed();
            let revision = app.disable_for_revision(&user.id).await;
            let fresh = if is_by_revision {
                at_least(&revision)
            } else {
                from_database()
            };
            for fresh in [fresh, None] {
                let answer = ask(&app, replica.channel(), &token, fresh).await;
                assert_eq!(reason(&answer.unwrap_err()), "ACCOUNT_DISABLED");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strange_tokens_and_revisions_spoil_no_batch_that_holds_a_good_token() {
    let app = TestApp::spawn().await;
    let good = app.login(&app.user().create().await).await.access_token;
    for revision in ["", "-1", "0", "+000000000000001", "0000000016B3748D", "ä"] {
        let refused = batch(&app, vec![good.clone()], at_least(revision)).await;
        assert_eq!(reason(&refused.unwrap_err()), "INVALID_FIELD", "{revision}");
    }
    let long = "x".repeat(8193);
    let (before, after) = (format!(" {good}"), format!("{good} "));
    let mut tokens = vec![
        "ä", "\0", "\u{feff}", " ", "..", "a.b.c", "tka_", "tks_", "tka_ä",
    ];
    tokens.extend([&*app.service_key, &long, &before, &after, &good]);
    let tokens: Vec<String> = tokens.into_iter().map(str::to_owned).collect();
    // A revision of the future is read from the database, too.
    for fresh in [None, from_database(), at_least("ffffffffffffffff")] {
        let results = batch(&app, tokens.clone(), fresh).await.unwrap();
        let worth: Vec<_> = results.iter().map(|r| r.result.as_ref().unwrap()).collect();
        let (last, rest) = worth.split_last().unwrap();
        assert!(matches!(last, Worth::Valid(_)));
        for (token, worth) in tokens.iter().zip(rest) {
            assert!(
                matches!(worth, Worth::Refused(refused) if refused.reason == "CREDENTIAL_INVALID"),
                "{token}: {worth:?}"
            );
        }
    }
}

/// What a user's credentials are worth: how often it changed, odd while they are refused; while it
/// changes, all ones.
#[derive(Default)]
struct State {
    changes: AtomicU64,
    revision: Mutex<String>,
}

const CHANGING: u64 = u64::MAX;

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_is_older_than_a_change_that_was_answered_before_it_was_asked_for() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let key = app.api_key(&user, &[]).await.text;
    let state = State {
        revision: Mutex::new("0000000000000000".to_owned()),
        ..State::default()
    };
    let end = Instant::now() + Duration::from_secs(3);
    let asking = (0..12).map(async |asker: usize| {
        let token = [&token, &key][asker % 2];
        let mut judged = 0_u32;
        while Instant::now() < end {
            let before = state.changes.load(Ordering::SeqCst);
            // The replica that made the change knows it; the other one by its revision.
            let revision = state.revision.lock().unwrap().clone();
            let (channel, fresh) = match asker / 2 % 3 {
                0 => (replica.channel(), at_least(&revision)),
                1 => (app.channel.clone(), None),
                _ => (app.channel.clone(), from_database()),
            };
            let answer = ask(&app, channel, token, fresh).await;
            if let Err(refused) = &answer {
                assert_eq!(reason(refused), "ACCOUNT_DISABLED");
            }
            if before != CHANGING && before == state.changes.load(Ordering::SeqCst) {
                judged += 1;
                assert_eq!(answer.is_ok(), before.is_multiple_of(2), "asker {asker}");
            }
        }
        judged
    });
    let changing = async {
        for change in 1.. {
            if Instant::now() >= end {
                break;
            }
            state.changes.store(CHANGING, Ordering::SeqCst);
            *state.revision.lock().unwrap() = if change % 2 == 1 {
                app.disable_for_revision(&user.id).await
            } else {
                let request = EnableUserRequest {
                    user_id: user.id.clone(),
                };
                let enabled = app.admin(&app.service_key).enable_user(request).await;
                enabled.unwrap().into_inner().revision
            };
            state.changes.store(change, Ordering::SeqCst);
            if change % 5 == 0 {
                app.sql(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE
                     application_name = 'tollkeeper changes' AND datname = current_database()",
                )
                .await;
            }
            sleep(Duration::from_millis(20)).await;
        }
    };
    let ((), judged) = tokio::join!(changing, join_all(asking));
    let judged: u32 = judged.iter().sum();
    assert!(judged > 0, "no answer came between two changes");
}
