//! `Check`: who a request is from, and whether it may pass.

use serde_json::Value;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::{asking, check, metadata, overwriting, passed, refused, unique};
use crate::{
    harness::{TestApp, eventually, reason, with_bearer},
    usage::{
        quota::{use_tokens, with_tiers},
        reservations::Client,
    },
};

/// Headers of a request with an access token.
fn bearer(token: &str) -> (&'static str, String) {
    ("authorization", format!("Bearer {token}"))
}

/// Asks for a request that has this credential and no more.
async fn check_with(
    app: &TestApp,
    token: &str,
    extensions: &[(&str, &str)],
) -> tollkeeper::proto::envoy::service::auth::v3::CheckResponse {
    let (name, value) = bearer(token);
    let id = unique("request");
    check(app, &[(name, &value), ("x-request-id", &id)], extensions)
        .await
        .unwrap()
}

fn problem(body: &str) -> Value {
    serde_json::from_str(body).expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_token_passes_and_only_we_say_who_calls() {
    let app = TestApp::spawn().await;
    let user = app.user().tier("starter").create().await;
    let tokens = app.login(&user).await;
    let (name, value) = bearer(&tokens.access_token);
    let sent = [
        (name, value.as_str()),
        ("x-user-id", "somebody-else"),
        ("x-user-api-key-id", "mine"),
        ("x_user_id", "somebody-else"),
        ("x-user-anything", "yes"),
        ("accept", "*/*"),
    ];
    let answer = check(&app, &sent, &[]).await.unwrap();
    let facts = metadata(answer.dynamic_metadata.clone());
    let ok = passed(answer);
    let set = overwriting(&ok.headers);
    assert_eq!(set["x-user-id"], user.id);
    assert_eq!(set["x-user-tier"], "starter");
    assert_eq!(set["x-user-role"], "user");
    assert_eq!(set["x-user-credential"], "session");
    assert_eq!(facts["user_id"], user.id);
    assert_eq!(facts["tier"], "starter");
    assert_eq!(facts["session_id"], set["x-user-session-id"]);
    for removed in [
        "authorization",
        "x-api-key",
        "x-user-api-key-id",
        "x-user-scopes",
        "x_user_id",
        "x-user-anything",
    ] {
        assert!(
            ok.headers_to_remove.iter().any(|name| name == removed),
            "{removed}"
        );
        assert!(!set.contains_key(removed), "{removed}");
    }
    // Removed after it was set, it would be lost.
    assert!(
        ok.headers_to_remove
            .iter()
            .all(|name| !set.contains_key(name))
    );
    assert!(!ok.headers_to_remove.iter().any(|name| name == "accept"));

    let forwarded = check_with(&app, &tokens.access_token, &[("credential", "forward")]).await;
    let removed = passed(forwarded).headers_to_remove;
    assert!(
        !removed.iter().any(|name| name == "authorization"),
        "{removed:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_passes_by_either_header() {
    let app = TestApp::spawn().await;
    let user = app.user().admin().create().await;
    let key = app.api_key(&user, &["chat", "embed"]).await;
    let (name, value) = bearer(&key.text);
    for sent in [(name, value.as_str()), ("x-api-key", &key.text)] {
        let set = overwriting(&passed(check(&app, &[sent], &[]).await.unwrap()).headers);
        assert_eq!(set["x-user-id"], user.id);
        assert_eq!(set["x-user-credential"], "api_key");
        assert_eq!(set["x-user-api-key-id"], key.id);
        assert_eq!(set["x-user-scopes"], "chat embed");
        // What may leak carries no administrator's rights.
        assert_eq!(set["x-user-role"], "user");
    }
    let both = [(name, value.as_str()), ("x-api-key", &key.text)];
    assert_eq!(refused(check(&app, &both, &[]).await.unwrap()).0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_a_good_credential_is_unauthorized() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let ended = app.login(&user).await.access_token;
    app.logout(&ended).await;
    let disabled = app.user().create().await;
    let of_disabled = app.login(&disabled).await.access_token;
    app.disable(&disabled.id).await;
    let revoked = app.api_key(&user, &[]).await;
    app.revoke_api_key(&user, &revoked.id).await;
    for (token, code) in [
        ("garbage", "CREDENTIAL_INVALID"),
        ("", "CREDENTIAL_INVALID"),
        (&ended, "SESSION_ENDED"),
        (&of_disabled, "ACCOUNT_DISABLED"),
        (&revoked.text, "CREDENTIAL_INVALID"),
        // Of a program, not of a user.
        (&app.service_key, "CREDENTIAL_INVALID"),
    ] {
        let answer = check_with(&app, token, &[]).await;
        assert_eq!(metadata(answer.dynamic_metadata.clone())["reason"], code);
        let (status, denied) = refused(answer);
        let headers = overwriting(&denied.headers);
        assert_eq!(status, 401, "{code}");
        let challenge = &headers["www-authenticate"];
        assert!(challenge.contains("error=\"invalid_token\""), "{challenge}");
        assert_eq!(headers["content-type"], "application/problem+json");
        assert_eq!(problem(&denied.body)["code"], code);
        assert_eq!(problem(&denied.body)["status"], 401);
        assert!(token.is_empty() || !denied.body.contains(token));
    }
    let sent = [("x-request-id", "the-id")];
    let (status, denied) = refused(check(&app, &sent, &[]).await.unwrap());
    assert_eq!(status, 401);
    let challenge = &overwriting(&denied.headers)["www-authenticate"];
    assert_eq!(challenge, "Bearer realm=\"tollkeeper\"");
    assert_eq!(problem(&denied.body)["code"], "CREDENTIAL_MISSING");
    assert_eq!(problem(&denied.body)["request_id"], "the-id");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_is_said_to_be_expired() {
    let app = TestApp::spawn_with(|settings| {
        settings.auth.access_ttl = std::time::Duration::ZERO;
        settings.auth.leeway = std::time::Duration::ZERO;
    })
    .await;
    let token = app.admin_token().await;
    let (status, denied) = refused(check_with(&app, &token, &[]).await);
    assert_eq!(status, 401);
    assert_eq!(problem(&denied.body)["code"], "CREDENTIAL_EXPIRED");
    let challenge = &overwriting(&denied.headers)["www-authenticate"];
    assert!(challenge.contains("the token has expired"), "{challenge}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_is_for_the_tiers_that_it_names_and_an_upgrade_counts_at_once() {
    let app = TestApp::spawn().await;
    let user = app.user().tier("free").create().await;
    let token = app.login(&user).await.access_token;
    let route = [("tier", "starter, builder")];
    let (status, denied) = refused(check_with(&app, &token, &route).await);
    assert_eq!(status, 403);
    assert_eq!(problem(&denied.body)["code"], "TIER_NOT_ALLOWED");
    app.set_tier(&user.id, "builder").await;
    eventually("the upgrade is heard of", async || {
        check_with(&app, &token, &route).await.status.unwrap().code == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_needs_the_scopes_of_a_route_and_a_session_does_not() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let route = [("scope", "chat embed")];
    let key = app.api_key(&user, &["chat"]).await.text;
    let (status, denied) = refused(check_with(&app, &key, &route).await);
    assert_eq!(status, 403);
    assert_eq!(problem(&denied.body)["code"], "SCOPE_MISSING");
    let challenge = &overwriting(&denied.headers)["www-authenticate"];
    assert!(
        challenge.ends_with("error=\"insufficient_scope\", scope=\"embed\""),
        "{challenge}"
    );
    let key = app.api_key(&user, &["chat", "embed"]).await.text;
    let session = app.login(&user).await.access_token;
    for token in [key, session] {
        passed(check_with(&app, &token, &route).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_tells_what_is_left_and_refuses_when_it_is_not_enough() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await;
    let token = app.login(&user).await.access_token;
    use_tokens(&app, &user.id, 70).await;
    let look = |estimate| [("quota", "look"), ("estimate", estimate)];
    let answer = check_with(&app, &token, &look("30")).await;
    assert_eq!(
        metadata(answer.dynamic_metadata.clone())["remaining_tokens"],
        "30"
    );
    let told = overwriting(&passed(answer).response_headers_to_add);
    assert!(told["ratelimit"].starts_with("\"monthly-tokens\";r=30;t="));
    assert!(told["ratelimit-policy"].starts_with("\"monthly-tokens\";q=100;qu=\"tokens\";w="));

    let (status, denied) = refused(check_with(&app, &token, &look("31")).await);
    assert_eq!(status, 429);
    let told = overwriting(&denied.headers);
    assert!(told["ratelimit"].starts_with("\"monthly-tokens\";r=30;t="));
    let wait: u64 = told["retry-after"].parse().unwrap();
    assert!(wait > 0);
    assert_eq!(
        told["ratelimit"],
        format!("\"monthly-tokens\";r=30;t={wait}")
    );
    let body = problem(&denied.body);
    assert_eq!(body["code"], "QUOTA_EXCEEDED");
    assert_eq!(body["violated-policies"][0], "monthly-tokens");
    assert!(body["type"].as_str().unwrap().ends_with("#quota-exceeded"));

    // Trying that again never helps.
    let (status, denied) = refused(check_with(&app, &token, &look("61")).await);
    assert_eq!(status, 403);
    assert_eq!(problem(&denied.body)["code"], "REQUEST_TOO_LARGE");

    // A look holds nothing; equal to the limit is over.
    use_tokens(&app, &user.id, 30).await;
    let (status, _) = refused(check_with(&app, &token, &[("quota", "look")]).await);
    assert_eq!(status, 429);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_used_up_is_refused_and_others_are_not() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await;
    let token = app.login(&user).await.access_token;
    let look = |model| [("quota", "look"), ("estimate", "201"), ("model", model)];
    let (status, denied) = refused(check_with(&app, &token, &look("gpt-5")).await);
    assert_eq!(status, 429);
    let told = overwriting(&denied.headers);
    assert!(told["ratelimit"].starts_with("\"monthly-tokens-of-model\";r=200;t="));
    passed(check_with(&app, &token, &look("a-model")).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_is_held_once_for_a_request_and_can_be_committed() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await;
    let (name, value) = bearer(&app.login(&user).await.access_token);
    let route = [
        ("quota", "reserve"),
        ("model", "a-model"),
        ("estimate", "60"),
    ];
    let ask = async |id: &str| {
        let sent = [(name, value.as_str()), ("x-request-id", id)];
        check(&app, &sent, &route).await.unwrap()
    };
    let mut handles = Vec::new();
    for _ in 0..3 {
        let facts = metadata(ask("one").await.dynamic_metadata);
        assert_eq!(facts["estimate"], "60");
        assert_eq!(facts["model"], "a-model");
        handles.push(facts["reservation"].clone());
    }
    let (status, denied) = refused(ask("two").await);
    assert_eq!(status, 429);
    let told = overwriting(&denied.headers);
    assert!(told["ratelimit"].starts_with("\"monthly-tokens\";r=40;t="));
    let client = Client::of(&app);
    for handle in &handles {
        client.commit(handle, 25).await.unwrap();
    }
    app.assert_books_balance(1).await;
    passed(ask("two").await);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_requests_a_minute_than_the_tier_allows_are_refused() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await;
    let token = app.login(&user).await.access_token;
    let route = [
        ("quota", "reserve"),
        ("model", "a-model"),
        ("estimate", "1"),
    ];
    let mut last = None;
    for _ in 0..40 {
        let answer = check_with(&app, &token, &route).await;
        if answer.status.as_ref().unwrap().code != 0 {
            last = Some(refused(answer));
            break;
        }
    }
    let (status, denied) = last.expect("refused within forty");
    assert_eq!(status, 429);
    let told = overwriting(&denied.headers);
    assert_eq!(
        told["ratelimit-policy"],
        "\"requests-per-minute\";q=30;w=60"
    );
    assert!(told["ratelimit"].starts_with("\"requests-per-minute\";r=0;t="));
    assert!(told["retry-after"].parse::<u64>().unwrap() >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_grpc_is_refused_in_its_own_words() {
    let app = TestApp::spawn().await;
    let sent = [
        ("content-type", "application/grpc"),
        ("x-request-id", "the-id"),
    ];
    let (status, denied) = refused(check(&app, &sent, &[]).await.unwrap());
    assert_eq!(status, 401);
    let headers: http::HeaderMap = overwriting(&denied.headers)
        .into_iter()
        .map(|(name, value)| {
            let name: http::HeaderName = name.parse().unwrap();
            (name, value.parse().unwrap())
        })
        .collect();
    let status = tonic::Status::from_header_map(&headers).unwrap();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(reason(&status), "CREDENTIAL_MISSING");
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.metadata["request_id"], "the-id");
    assert!(denied.body.starts_with("the call needs a credential"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_that_asks_for_what_does_not_exist_lets_nobody_pass() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (name, value) = bearer(&token);
    let reserve = [("quota", "reserve"), ("model", "m"), ("estimate", "5")];
    for (extensions, field) in [
        (&[("teir", "free")][..], "context_extensions"),
        (&[("tier", "gold")], "context_extensions.tier"),
        (&[("quota", "reserve")], "context_extensions.quota"),
        // Nothing would tell a repeat from another request.
        (&reserve, "x-request-id"),
    ] {
        let status = check(&app, &[(name, &value)], extensions)
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, field);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_nobody_can_tell_the_call_fails_so_that_the_gateways_policy_decides() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.database.acquire_timeout = std::time::Duration::from_millis(500);
        settings.auth.staleness_bound = std::time::Duration::from_millis(500);
        settings.auth.max_stale = std::time::Duration::from_millis(500);
    })
    .await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (_, key) = app.service("gateway", &["gateway"]).await;
    let (name, value) = bearer(&token);
    let ask = async || {
        let request = with_bearer(asking(&[(name, &value)], &[]), &key);
        let channel = app.channel.clone();
        let mut client = tollkeeper::proto::envoy::service::auth::v3::authorization_client::AuthorizationClient::new(channel);
        client.check(request).await
    };
    passed(ask().await.unwrap().into_inner());
    proxy.pause();
    eventually("it cannot tell", async || {
        ask()
            .await
            .is_err_and(|status| status.code() == Code::Unavailable)
    })
    .await;
    proxy.resume();
    eventually("it recovers by itself", async || ask().await.is_ok()).await;
}
