//! Through the real gateway, by the configuration that is delivered.

use std::{collections::BTreeSet, net::SocketAddr};

use http::{Method, StatusCode};
use serde_json::Value;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{SetQuotaOverrideRequest, set_quota_override_request::Limit},
    usage::v1::{CheckQuotaRequest, GetQuotaRequest},
};
use tonic::Code;

use super::upstream::Upstream;
use crate::harness::{Answer, Edge, RunningServer, TestApp, TestUser, eventually, reason};

/// Everything that a request passes.
pub(super) struct Site {
    pub(super) app: TestApp,
    pub(super) edge: Edge,
    pub(super) upstream: Upstream,
}

impl Site {
    pub(super) async fn start() -> Self {
        let app = TestApp::spawn().await;
        Self::before(app).await
    }

    pub(super) async fn before(app: TestApp) -> Self {
        let (_, key) = app.service("edge", &["gateway"]).await;
        let upstream = Upstream::start().await;
        let edge = Edge::start(app.address, &key, upstream.address).await;
        Self {
            app,
            edge,
            upstream,
        }
    }

    /// Asks with a credential.
    pub(super) async fn get(&self, path: &str, token: &str) -> Answer {
        let authorization = format!("Bearer {token}");
        self.edge
            .get(path, &[("authorization", &authorization)])
            .await
    }

    /// Asks the language model with a credential.
    pub(super) async fn prompt(&self, path: &str, token: &str) -> Answer {
        let authorization = format!("Bearer {token}");
        self.edge
            .send(Method::POST, path, &[("authorization", &authorization)], "")
            .await
    }

    /// A user who may use so many tokens this month, and a token of theirs.
    pub(super) async fn user(&self, tokens: i64) -> (TestUser, String) {
        let user = self.app.user().tier("advanced").create().await;
        let request = SetQuotaOverrideRequest {
            user_id: user.id.clone(),
            limit: Some(Limit::MonthlyTokens(tokens)),
            ..SetQuotaOverrideRequest::default()
        };
        let mut admin = self.app.admin(&self.app.service_key);
        admin.set_quota_override(request).await.unwrap();
        let token = self.app.login(&user).await.access_token;
        (user, token)
    }

    /// Input, output, and how many events.
    pub(super) async fn used(&self, user: &TestUser) -> (i64, i64, i64) {
        let totals = self
            .app
            .month(&user.id, "")
            .await
            .totals
            .unwrap_or_default();
        let tokens = totals.tokens.unwrap_or_default();
        (tokens.input, tokens.output, totals.request_count)
    }

    /// Tokens, as the server looks at them: a moment after they are booked.
    pub(super) async fn known(&self, user: &TestUser) -> i64 {
        let request = CheckQuotaRequest {
            user_id: user.id.clone(),
            ..CheckQuotaRequest::default()
        };
        let mut usage = self.app.usage(&self.app.service_key);
        let checked = usage.check_quota(request).await.unwrap();
        checked.into_inner().quota.unwrap().used_tokens
    }

    pub(super) async fn held(&self, user: &TestUser) -> i64 {
        held(&self.app, &user.id).await
    }

    pub(super) async fn nothing_stays_held(&self, user: &TestUser) {
        eventually("nothing stays held", async || self.held(user).await == 0).await;
    }
}

/// Tokens of a user.
pub(super) async fn held(app: &TestApp, user: &str) -> i64 {
    let request = GetQuotaRequest {
        user_id: user.to_owned(),
    };
    let mut usage = app.usage(&app.service_key);
    let quota = usage.get_quota(request).await.unwrap().into_inner().quota;
    quota.unwrap().held_tokens
}

/// What the upstream was told by headers of this name, whatever stands for the hyphens.
pub(super) fn told(answer: &Value, name: &str) -> Vec<String> {
    let headers = answer["headers"].as_array().expect("headers").iter();
    let named = headers.filter(|pair| {
        let header = pair[0].as_str().expect("a name").replace('_', "-");
        header == name
    });
    named
        .map(|pair| pair[1].as_str().expect("a value").to_owned())
        .collect()
}

/// All names that say who somebody is.
fn identity(answer: &Value) -> BTreeSet<String> {
    let headers = answer["headers"].as_array().expect("headers").iter();
    let names = headers.map(|pair| pair[0].as_str().expect("a name").to_owned());
    names
        .filter(|name| name.replace('_', "-").starts_with("x-user-"))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_good_token_passes_and_the_upstream_is_told_who_calls() {
    let site = Site::start().await;
    let user = site.app.user().tier("starter").create().await;
    let token = site.app.login(&user).await.access_token;
    let key = site.app.api_key(&user, &["chat"]).await;
    let authorization = format!("Bearer {token}");
    for (name, value, kind) in [
        ("authorization", authorization.as_str(), "session"),
        ("x-api-key", &key.text, "api_key"),
    ] {
        let answer = site.edge.get("/anything", &[(name, value)]).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", site.edge.log());
        let answer = answer.json().await;
        assert_eq!(told(&answer, "x-user-id"), [&*user.id]);
        assert_eq!(told(&answer, "x-user-tier"), ["starter"]);
        assert_eq!(told(&answer, "x-user-role"), ["user"]);
        assert_eq!(told(&answer, "x-user-credential"), [kind]);
        assert_eq!(told(&answer, "x-request-id").len(), 1);
        // Nobody behind the gateway needs the credential.
        assert_eq!(told(&answer, "authorization"), [] as [&str; 0]);
        assert_eq!(told(&answer, "x-api-key"), [] as [&str; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_says_about_itself_reaches_the_upstream_on_no_route() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000_000).await;
    let authorization = format!("Bearer {token}");
    let claims = [
        ("x-user-id", "somebody-else"),
        ("X-User-Id", "another"),
        ("x_user_id", "somebody-else"),
        ("x-user_id", "somebody-else"),
        ("x-user-tier", "advanced"),
        ("x-user-scopes", "all"),
        ("x-user-api-key-id", "mine"),
        ("x-user-anything", "yes"),
        ("x-request-id", "replayed"),
    ];
    let mut known = claims.to_vec();
    known.push(("authorization", &authorization));
    for path in [
        "/",
        "/anything",
        "/premium/x",
        "/tools/x",
        "/public/../x",
        "/v1/chat/completions?echo=yes",
    ] {
        let method = match path.starts_with("/v1/") {
            true => Method::POST,
            false => Method::GET,
        };
        let answer = site.edge.send(method, path, &known, "").await;
        assert_eq!(answer.status, StatusCode::OK, "{path}");
        let answer = answer.json().await;
        assert_eq!(told(&answer, "x-user-id"), [&*user.id], "{path}");
        assert_eq!(told(&answer, "x-user-tier"), ["advanced"], "{path}");
        let ids = told(&answer, "x-request-id");
        assert!(ids.len() == 1 && ids != ["replayed"], "{path}: {ids:?}");
        let ours = [
            "x-user-credential",
            "x-user-id",
            "x-user-role",
            "x-user-session-id",
            "x-user-tier",
        ];
        assert_eq!(identity(&answer), ours.map(str::to_owned).into(), "{path}");
    }
    // Where nobody is asked who calls, nobody is told.
    for headers in [&claims[..], &known] {
        let answer = site.edge.get("/public/x", headers).await;
        assert_eq!(answer.status, StatusCode::OK);
        let answer = answer.json().await;
        assert_eq!(identity(&answer), BTreeSet::new());
        assert_eq!(told(&answer, "authorization"), [] as [&str; 0]);
        assert_ne!(told(&answer, "x-request-id"), ["replayed"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_client_says_about_itself_reaches_not_even_tollkeeper() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let authorization = format!("Bearer {}", app.login(&user).await.access_token);
    let (_, key) = app.service("edge", &["gateway"]).await;
    let upstream = Upstream::start().await;
    // The route of Tollkeeper's own RPCs, to an upstream that says what it was told.
    let edge = Edge::start_with(app.address, &key, upstream.address, |delivered| {
        let route = "route: { cluster: tollkeeper_rest, ";
        assert_eq!(delivered.matches(route).count(), 1);
        delivered.replace(route, "route: { cluster: app, ")
    })
    .await;
    let claims = [
        ("authorization", authorization.as_str()),
        ("x-user-id", "somebody-else"),
        ("x_user_id", "somebody-else"),
        ("x-user-anything", "yes"),
        ("x-request-id", "replayed"),
    ];
    let answer = edge.get("/api/auth/me", &claims).await.json().await;
    assert_eq!(identity(&answer), BTreeSet::new());
    assert_eq!(told(&answer, "authorization"), [authorization]);
    assert_ne!(told(&answer, "x-request-id"), ["replayed"]);
}

/// A route that is added must be looked at as well.
#[test]
fn the_routes_on_which_claims_are_sent_are_all_there_are() {
    let delivered = include_str!("../../../deploy/envoy/envoy.yaml");
    let matches = delivered.lines().filter_map(|line| {
        let (_, rest) = line.split_once("- match: { ")?;
        rest.split('"').nth(1)
    });
    assert_eq!(
        matches.collect::<Vec<_>>(),
        [
            ".*;.*",
            "/public/",
            "/premium",
            "(?i)/v1/chat/completions/?",
            "/tools",
            "/api/(auth|usage)/.*",
            "/",
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_guards_nothing_itself_still_lets_no_claim_through() {
    let app = TestApp::spawn().await;
    let user = app.user().tier("starter").create().await;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let upstream = Upstream::start().await;
    let edge = Edge::start_with(app.address, &key, upstream.address, |delivered| {
        // Routes that ask are safe by what Tollkeeper answers alone.
        let (before, rest) = delivered
            .split_once("early_header_mutation_extensions:")
            .unwrap();
        let (_, after) = rest.split_once("http_filters:").unwrap();
        let bare = format!("{before}http_filters:{after}");
        bare.replace("DROP_HEADER", "ALLOW")
    })
    .await;
    let authorization = format!("Bearer {}", app.login(&user).await.access_token);
    let claims = [
        ("authorization", authorization.as_str()),
        ("x-user-id", "somebody-else"),
        ("X-USER-ID", "another"),
        ("x_user_id", "somebody-else"),
        ("x-user_id", "somebody-else"),
        ("x-user-tier", "advanced"),
        ("x-user-scopes", "all"),
        ("x-user-anything", "yes"),
    ];
    let answer = edge.get("/anything", &claims).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", edge.log());
    let answer = answer.json().await;
    assert_eq!(told(&answer, "x-user-id"), [&*user.id]);
    assert_eq!(told(&answer, "x-user-tier"), ["starter"]);
    assert_eq!(told(&answer, "x-user-scopes"), [] as [&str; 0]);
    assert_eq!(told(&answer, "x-user-anything"), [] as [&str; 0]);
    // What the other route shows: these claims do get as far as that.
    let open = edge.get("/public/x", &claims).await.json().await;
    assert_eq!(told(&open, "x-user-id").len(), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_and_revoked_credentials_are_401_and_never_reach_the_upstream() {
    let site = Site::start().await;
    let user = site.app.user().create().await;
    let ended = site.app.login(&user).await.access_token;
    assert_eq!(site.get("/", &ended).await.status, StatusCode::OK);
    site.app.logout(&ended).await;
    let revoked = site.app.api_key(&user, &[]).await;
    site.app.revoke_api_key(&user, &revoked.id).await;
    let disabled = site.app.user().create().await;
    let of_disabled = site.app.login(&disabled).await.access_token;
    site.app.disable(&disabled.id).await;
    eventually("the logout is heard of", async || {
        site.get("/", &ended).await.status == StatusCode::UNAUTHORIZED
    })
    .await;
    let before = site.upstream.asked();
    for (token, code) in [
        ("garbage", "CREDENTIAL_INVALID"),
        (&ended, "SESSION_ENDED"),
        (&revoked.text, "CREDENTIAL_INVALID"),
        (&of_disabled, "ACCOUNT_DISABLED"),
        (&site.app.service_key, "CREDENTIAL_INVALID"),
    ] {
        let answer = site.get("/anything", token).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{code}");
        let challenge = answer.header("www-authenticate");
        assert!(challenge.contains("error=\"invalid_token\""), "{challenge}");
        assert_eq!(answer.header("content-type"), "application/problem+json");
        let problem = answer.json().await;
        assert_eq!(problem["code"], code);
        assert_eq!(problem["status"], 401);
        assert!(problem["request_id"].as_str().unwrap().len() > 10);
    }
    let answer = site.edge.get("/anything", &[]).await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert_eq!(
        answer.header("www-authenticate"),
        "Bearer realm=\"tollkeeper\""
    );
    assert_eq!(site.upstream.asked(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_token_is_401() {
    let app = TestApp::spawn_with(|settings| {
        settings.auth.access_ttl = std::time::Duration::ZERO;
        settings.auth.leeway = std::time::Duration::ZERO;
    })
    .await;
    let token = app.admin_token().await;
    let site = Site::before(app).await;
    let answer = site.get("/", &token).await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert_eq!(answer.json().await["code"], "CREDENTIAL_EXPIRED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_tier_or_scope_is_403_until_it_is_right() {
    let site = Site::start().await;
    let user = site.app.user().tier("free").create().await;
    let token = site.app.login(&user).await.access_token;
    let answer = site.get("/premium/x", &token).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert_eq!(answer.header("content-type"), "application/problem+json");
    assert_eq!(answer.json().await["code"], "TIER_NOT_ALLOWED");
    // However it is written.
    for path in [
        "//premium/x",
        "/public/../premium/x",
        "/%70remium/x",
        "/Premium/x",
        "/premium",
        "/public/..;/premium/x",
    ] {
        let answer = site.get(path, &token).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{path}");
    }
    let answer = site.get("/premium;x/y", &token).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert_eq!(site.upstream.asked(), 0);
    site.app.set_tier(&user.id, "builder").await;
    eventually("the upgrade counts", async || {
        site.get("/premium/x", &token).await.status == StatusCode::OK
    })
    .await;
    let key = site.app.api_key(&user, &["other"]).await.text;
    let answer = site.get("/premium/x", &key).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    let challenge = answer.header("www-authenticate");
    assert!(challenge.contains("error=\"insufficient_scope\", scope=\"premium\""));
    let key = site.app.api_key(&user, &["premium"]).await.text;
    assert_eq!(site.get("/premium/x", &key).await.status, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_of_grpc_is_told_in_its_own_words() {
    let site = Site::start().await;
    let (_, token) = site.user(10).await;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", site.edge.address))
        .unwrap()
        .connect_lazy();
    let ask = async |path: &str, token: &str| {
        let credential = (!token.is_empty()).then_some(token);
        let call = crate::harness::Raw::call(&channel, path, bytes::Bytes::new(), credential).await;
        call.unwrap_err()
    };
    for (path, token, code, why) in [
        (
            "/any.Service/Do",
            "",
            Code::Unauthenticated,
            "CREDENTIAL_MISSING",
        ),
        (
            "/any.Service/Do",
            "garbage",
            Code::Unauthenticated,
            "CREDENTIAL_INVALID",
        ),
        (
            "/v1/chat/completions",
            &*token,
            Code::ResourceExhausted,
            "QUOTA_EXCEEDED",
        ),
    ] {
        let status = ask(path, token).await;
        assert_eq!(
            (status.code(), &*reason(&status)),
            (code, why),
            "{status:?}"
        );
        assert!(!status.message().contains('{'), "{status:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_whose_key_is_wrong_lets_nobody_pass() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let upstream = Upstream::start().await;
    let (_, unfit) = app.service("unfit", &["tokens.validate", "quota"]).await;
    for key in ["garbage", "", &unfit] {
        let edge = Edge::start(app.address, key, upstream.address).await;
        let authorization = format!("Bearer {token}");
        let answer = edge.get("/", &[("authorization", &authorization)]).await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
    assert_eq!(upstream.asked(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn while_tollkeeper_is_away_nobody_passes_and_it_recovers_by_itself() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let upstream = Upstream::start().await;
    let replica = app.replica().await;
    let address: SocketAddr = replica.address;
    let edge = Edge::start(address, &key, upstream.address).await;
    let authorization = format!("Bearer {token}");
    let ask = async |path: &str| {
        let answer = edge.get(path, &[("authorization", &authorization)]).await;
        answer.status
    };
    assert_eq!(ask("/").await, StatusCode::OK);
    replica.stop().await.unwrap();
    let before = upstream.asked();
    for path in ["/", "/tools/x", "/premium/x"] {
        assert_eq!(ask(path).await, StatusCode::SERVICE_UNAVAILABLE, "{path}");
    }
    assert_eq!(upstream.asked(), before);
    assert_eq!(ask("/public/x").await, StatusCode::OK);
    let mut settings = app.settings().clone();
    settings.server.listen = address;
    let _replica = RunningServer::start(&settings).await.unwrap();
    eventually("it recovers", async || ask("/").await == StatusCode::OK).await;
}
