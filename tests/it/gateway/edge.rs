//! Through the real gateway, by the configuration that is delivered.

use std::{collections::BTreeSet, net::SocketAddr};

use http::StatusCode;
use serde_json::Value;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{SetQuotaOverrideRequest, set_quota_override_request::Limit},
    usage::v1::GetQuotaRequest,
};
use tonic::Code;

use super::upstream::Upstream;
use crate::harness::{Answer, Edge, RunningServer, TestApp, TestUser, eventually, reason};

/// Everything that a request passes.
struct Site {
    app: TestApp,
    edge: Edge,
    upstream: Upstream,
}

impl Site {
    async fn start() -> Self {
        let app = TestApp::spawn().await;
        Self::before(app).await
    }

    async fn before(app: TestApp) -> Self {
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
    async fn get(&self, path: &str, token: &str) -> Answer {
        let authorization = format!("Bearer {token}");
        self.edge
            .get(path, &[("authorization", &authorization)])
            .await
    }

    /// A user who may use so many tokens this month, and a token of theirs.
    async fn user(&self, tokens: i64) -> (TestUser, String) {
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
    async fn used(&self, user: &TestUser) -> (i64, i64, i64) {
        let totals = self
            .app
            .month(&user.id, "")
            .await
            .totals
            .unwrap_or_default();
        let tokens = totals.tokens.unwrap_or_default();
        (tokens.input, tokens.output, totals.request_count)
    }

    async fn held(&self, user: &TestUser) -> i64 {
        let request = GetQuotaRequest {
            user_id: user.id.clone(),
        };
        let mut usage = self.app.usage(&self.app.service_key);
        let quota = usage.get_quota(request).await.unwrap().into_inner().quota;
        quota.unwrap().held_tokens
    }
}

/// What the upstream was told by headers of this name, whatever stands for the hyphens.
fn told(answer: &Value, name: &str) -> Vec<String> {
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
    for path in ["/", "/anything", "/premium/x", "/tools/x", "/public/../x"] {
        let answer = site.edge.get(path, &known).await;
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
async fn over_quota_is_429_with_how_much_there_is_and_when_there_is_more() {
    let site = Site::start().await;
    let (_, token) = site.user(999).await;
    let model = "/v1/chat/completions";
    // Less than the estimate of the route.
    let answer = site.get(model, &token).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    let policy = answer.header("ratelimit-policy").to_owned();
    assert!(
        policy.starts_with("\"monthly-tokens\";q=999;qu=\"tokens\";w="),
        "{policy}"
    );
    let standing = answer.header("ratelimit").to_owned();
    let wait = answer.header("retry-after").to_owned();
    assert!(wait.parse::<u64>().unwrap() > 0);
    assert!(
        standing.starts_with("\"monthly-tokens\";r=999;t="),
        "{standing}"
    );
    assert_eq!(answer.headers.get_all("ratelimit").iter().count(), 1);
    let problem = answer.json().await;
    assert_eq!(problem["code"], "QUOTA_EXCEEDED");
    assert_eq!(problem["violated-policies"][0], "monthly-tokens");
    assert_eq!(site.upstream.asked(), 0);

    // The other way, by descriptors: it answers as long as something is left.
    let (user, token) = site.user(100).await;
    let answer = site.get("/tools/x?tokens=60", &token).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", site.edge.log());
    assert!(
        answer
            .header("ratelimit")
            .starts_with("\"monthly-tokens\";r=100;t=")
    );
    eventually("it is charged", async || site.used(&user).await.1 == 60).await;
    let answer = site.get("/tools/x?tokens=70", &token).await;
    assert!(
        answer
            .header("ratelimit")
            .starts_with("\"monthly-tokens\";r=40;t=")
    );
    eventually("it is charged", async || {
        site.used(&user).await == (0, 130, 2)
    })
    .await;
    let before = site.upstream.asked();
    let answer = site.get("/tools/x?tokens=1", &token).await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(
        answer
            .header("ratelimit")
            .starts_with("\"monthly-tokens\";r=0;t=")
    );
    assert_eq!(answer.header("content-type"), "application/problem+json");
    assert!(answer.header("retry-after").parse::<u64>().unwrap() > 0);
    assert_eq!(answer.json().await["code"], "QUOTA_EXCEEDED");
    assert_eq!(site.upstream.asked(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refund_is_denied() {
    let app = TestApp::spawn().await;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let upstream = Upstream::start().await;
    let edge = Edge::start_with(app.address, &key, upstream.address, |delivered| {
        let look = "hits_addend: { number: 0 }";
        assert_eq!(delivered.matches(look).count(), 1);
        delivered.replace(look, "hits_addend: { number: 5, is_negative_hits: true }")
    })
    .await;
    let token = app.login(&app.user().create().await).await.access_token;
    let authorization = format!("Bearer {token}");
    let answer = edge
        .get("/tools/x", &[("authorization", &authorization)])
        .await;
    assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    let problem = answer.json().await;
    assert_eq!(problem["code"], "INVALID_FIELD");
    assert!(problem["detail"].as_str().unwrap().contains("hits_addend"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_charged_once_and_exactly_as_it_reports_streamed_or_whole() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000_000).await;
    let (mut input, mut output) = (0, 0);
    for (count, more) in [(1, ""), (2, "&whole=yes"), (3, "")] {
        let path = format!("/v1/chat/completions?input={count}7&output=3{count}{more}");
        let answer = site.get(&path, &token).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", site.edge.log());
        assert!(
            answer
                .header("ratelimit")
                .starts_with("\"monthly-tokens\";r=")
        );
        answer.text().await;
        input += count * 10 + 7;
        output += 30 + count;
        // Both dimensions are one event.
        eventually("it is charged", async || {
            site.used(&user).await == (input, output, count)
        })
        .await;
    }
    eventually("nothing stays held", async || site.held(&user).await == 0).await;
    site.app.assert_books_balance(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_the_gateway_had_to_ask_for_twice_is_charged_once() {
    let app = TestApp::spawn().await;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let upstream = Upstream::start().await;
    let edge = Edge::start_with(app.address, &key, upstream.address, |delivered| {
        let route = "route: { cluster: app, timeout: 600s }";
        assert_eq!(delivered.matches(route).count(), 1);
        let retries = "retry_policy: { retry_on: 5xx, num_retries: 2 }";
        let with = format!("route: {{ cluster: app, timeout: 600s, {retries} }}");
        let delivered = delivered.replace(route, &with);
        let hosts = "domains: [\"*\"]";
        let counting = format!("{hosts}\n              include_request_attempt_count: true");
        delivered.replace(hosts, &counting)
    })
    .await;
    let site = Site {
        app,
        edge,
        upstream,
    };
    let (user, token) = site.user(1_000_000).await;
    let path = "/v1/chat/completions?input=5&output=6&fail-first=yes";
    let answer = site.get(path, &token).await;
    assert_eq!(answer.status, StatusCode::OK, "{}", site.edge.log());
    answer.text().await;
    assert_eq!(site.upstream.asked(), 2);
    eventually("it is charged", async || {
        site.used(&user).await == (5, 6, 1)
    })
    .await;
    eventually("nothing stays held", async || site.held(&user).await == 0).await;
    site.app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_pays_what_was_reported_until_then() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000_000).await;
    let path = "/v1/chat/completions?input=11&output=22&end=no";
    let mut answer = site.get(path, &token).await;
    assert_eq!(answer.status, StatusCode::OK);
    answer.read_until("completion_tokens").await;
    assert_eq!(site.used(&user).await, (0, 0, 0));
    drop(answer);
    eventually("it is charged", async || {
        site.used(&user).await == (11, 22, 1)
    })
    .await;
    eventually("nothing stays held", async || site.held(&user).await == 0).await;

    // Nothing was reported: nothing is charged, and what was held is free again.
    let mut answer = site
        .get("/v1/chat/completions?usage=no&end=no", &token)
        .await;
    answer.read_until("word-4").await;
    assert_eq!(site.held(&user).await, 1000);
    drop(answer);
    eventually("nothing stays held", async || site.held(&user).await == 0).await;
    site.app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_streams_do_not_overspend() {
    let site = Site::start().await;
    // Three times the estimate of the route, and a rest.
    let (user, token) = site.user(3_500).await;
    let asks = (0..12).map(|_| async {
        let path = "/v1/chat/completions?input=400&output=600&end=no";
        let mut answer = site.get(path, &token).await;
        if answer.status == StatusCode::OK {
            answer.read_until("completion_tokens").await;
        }
        answer
    });
    let answers = futures_util::future::join_all(asks).await;
    let (admitted, denied): (Vec<_>, Vec<_>) = answers
        .into_iter()
        .partition(|answer| answer.status == StatusCode::OK);
    assert_eq!(admitted.len(), 3);
    for answer in denied {
        assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
    }
    drop(admitted);
    eventually("all is charged", async || {
        site.used(&user).await == (1200, 1800, 3)
    })
    .await;
    println!("12 asked, 3 admitted: 3000 of 3500 tokens used, in 3 events");
    site.app.assert_books_balance(3).await;
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
