//! Tollkeeper's own RPCs by JSON, through the real gateway.

use http::{Method, StatusCode};
use serde_json::{Value, json};
use tollkeeper::proto::tollkeeper::auth::v1::ListSessionsRequest;

use super::edge::Site;
use crate::{
    auth::mfa::Authenticator,
    descriptor,
    harness::{Answer, Edge, Mailbox, PASSWORD, Raw, TestApp, eventually, reason},
    usage::event,
};

impl Site {
    /// As `curl --json` does it; `token` may be empty.
    async fn json(&self, method: Method, path: &str, token: &str, body: &str) -> Answer {
        let authorization = format!("Bearer {token}");
        let mut headers = vec![("content-type", "application/json")];
        if !token.is_empty() {
            headers.push(("authorization", &authorization));
        }
        self.edge.send(method, path, &headers, body).await
    }

    async fn post(&self, path: &str, token: &str, body: &Value) -> Answer {
        self.json(Method::POST, path, token, &body.to_string())
            .await
    }

    /// The body of a success, which is as `docs/openapi.json` has it.
    async fn done(&self, path: &str, token: &str, body: &Value) -> Value {
        let answer = self.post(path, token, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{path}");
        assert_eq!(answer.header("content-type"), "application/json");
        assert_eq!(answer.header("cache-control"), "no-store");
        let answer = answer.json().await;
        assert_described("post", path, &answer);
        answer
    }

    /// The same of what is only read.
    async fn read(&self, path: &str, token: &str) -> Value {
        let answer = self.json(Method::GET, path, token, "").await;
        assert_eq!(answer.status, StatusCode::OK, "{path}");
        assert_eq!(answer.header("content-type"), "application/json");
        let answer = answer.json().await;
        assert_described("get", path.split('?').next().unwrap(), &answer);
        answer
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_by_a_trusted_proxy_comes_from_where_it_says() {
    for (proxies, seen) in [("127.0.0.1", "127.0.0.9"), ("10.0.0.0/8", "127.0.0.1")] {
        let app = TestApp::spawn_with(|settings| {
            settings.server.trusted_proxies = proxies.to_owned().try_into().unwrap();
        })
        .await;
        let site = Site::before(app).await;
        let user = site.app.user().create().await;
        let login = json!({"identifier": user.email, "password": PASSWORD}).to_string();
        let headers = [
            ("content-type", "application/json"),
            // Of no use: the gateway writes where this comes from behind it.
            ("x-forwarded-for", "203.0.113.7"),
        ];
        let path = "/api/auth/login";
        let answer = site
            .edge
            .send_from([127, 0, 0, 9], Method::POST, path, &headers, &login);
        let answer = answer.await;
        assert_eq!(answer.status, StatusCode::OK);
        let token = answer.json().await["tokens"]["access_token"].clone();
        let request = ListSessionsRequest::default();
        let mut auth = site.app.auth(token.as_str().unwrap());
        let listed = auth.list_sessions(request).await.unwrap().into_inner();
        assert_eq!(listed.sessions[0].address, seen, "{proxies}");
    }
}

fn openapi() -> Value {
    serde_json::from_str(include_str!("../../../docs/openapi.json")).expect("JSON")
}

/// Asserts that a body has what the document says of it, and nothing else.
fn assert_described(method: &str, path: &str, body: &Value) {
    let document = openapi();
    let done = &document["paths"][path][method]["responses"]["200"];
    let schema = &done["content"]["application/json"]["schema"];
    assert!(schema.is_object(), "{method} {path} is not described");
    assert_fits(&document, schema, body, path);
}

fn assert_fits(document: &Value, schema: &Value, value: &Value, at: &str) {
    if let Some(name) = schema["$ref"].as_str() {
        let schema = document.pointer(name.trim_start_matches('#'));
        return assert_fits(document, schema.expect(name), value, at);
    }
    let fits = match schema["type"].as_str().expect(at) {
        "string" => value
            .as_str()
            .is_some_and(|text| match schema["enum"].as_array() {
                Some(names) => names.iter().any(|name| name == text),
                None => schema["format"] != "int64" || text.parse::<i64>().is_ok(),
            }),
        "integer" => value.is_i64(),
        "boolean" => value.is_boolean(),
        "array" => {
            for (index, item) in value.as_array().expect(at).iter().enumerate() {
                assert_fits(document, &schema["items"], item, &format!("{at}[{index}]"));
            }
            true
        }
        "object" => {
            for (name, value) in value.as_object().expect(at) {
                let known = schema["properties"].get(name);
                let schema = known.or_else(|| schema.get("additionalProperties"));
                let at = format!("{at}.{name}");
                assert_fits(document, schema.expect(&at), value, &at);
            }
            true
        }
        other => panic!("{at}: {other}"),
    };
    assert!(fits, "{at}: {value} is no {schema}");
}

/// The code and the request id that a body tells, as a problem or as a status of gRPC.
fn code_and_id(body: &Value) -> (String, String) {
    let (code, id) = if body["details"].is_array() {
        let info = &body["details"][0];
        assert_eq!(info["@type"], "type.googleapis.com/google.rpc.ErrorInfo");
        (&info["reason"], &info["metadata"]["request_id"])
    } else {
        (&body["code"], &body["request_id"])
    };
    let text = |value: &Value| {
        value
            .as_str()
            .unwrap_or_else(|| panic!("{body}"))
            .to_owned()
    };
    (text(code), text(id))
}

/// Asserts that it is JSON with this code, and the id that the header has.
async fn assert_refused(answer: Answer, status: u16, code: &str, what: &str) -> Value {
    assert_eq!(answer.status.as_u16(), status, "{what}");
    let kind = answer.header("content-type").to_owned();
    let ids = answer.headers.get_all("x-request-id").iter().count();
    assert_eq!(ids, 1, "{what}");
    let id = answer.header("x-request-id").to_owned();
    let body = answer.json().await;
    let expected = if body["details"].is_array() {
        "application/json"
    } else {
        assert_eq!(body["status"], status, "{what}");
        "application/problem+json"
    };
    assert_eq!(kind, expected, "{what}");
    assert_eq!(code_and_id(&body), (code.to_owned(), id), "{what}");
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn people_register_log_in_refresh_and_log_out_by_json() {
    let site = Site::start().await;
    let ada = json!({
        "email": "ada@example.com",
        "username": "ada",
        "full_name": "Ada",
        "password": PASSWORD,
    });
    let registered = site.done("/api/auth/register", "", &ada).await["user"].clone();
    assert_eq!(registered["full_name"], "Ada");
    assert_eq!(registered["is_active"], true);

    let login = json!({"identifier": "ADA", "password": PASSWORD});
    let answer = site.done("/api/auth/login", "", &login).await;
    assert_eq!(answer["user"]["id"], registered["id"]);
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let access = text(&answer["tokens"]["access_token"]);
    let refresh = text(&answer["tokens"]["refresh_token"]);

    let me = site.read("/api/auth/me", &access).await;
    assert_eq!(me["user"]["id"], registered["id"]);
    assert_eq!(me["user"]["email"], "ada@example.com");

    let refreshed = json!({"refresh_token": refresh});
    let answer = site.done("/api/auth/refresh", "", &refreshed).await;
    assert_eq!(answer["repeated"], false);
    let latest = text(&answer["tokens"]["access_token"]);
    assert_eq!(site.read("/api/auth/me", &latest).await, me);

    site.done("/api/auth/logout", &latest, &json!({})).await;
    let answer = site.json(Method::GET, "/api/auth/me", &latest, "").await;
    assert_refused(answer, 401, "SESSION_ENDED", "after the logout").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn people_give_a_second_factor_by_json() {
    let site = Site::start().await;
    let user = site.app.user().create().await;
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let login = json!({"identifier": user.email, "password": PASSWORD});
    let answer = site.done("/api/auth/login", "", &login).await;
    let token = text(&answer["tokens"]["access_token"]);

    let password = json!({"current_password": PASSWORD});
    let enrolled = site.done("/api/auth/mfa/enroll", &token, &password).await;
    let phone = Authenticator::enrolled(enrolled["secret"].as_str().unwrap());
    assert!(text(&enrolled["qr_code_svg"]).starts_with("<svg "));
    let code = json!({"code": phone.code()});
    let confirmed = site.done("/api/auth/mfa/confirm", &token, &code).await;
    let codes = confirmed["recovery_codes"].as_array().unwrap();

    let answer = site.done("/api/auth/login", "", &login).await;
    assert_eq!(answer["tokens"], Value::Null);
    let challenge = &answer["mfa_challenge"];
    assert_eq!(
        challenge["factors"],
        json!(["MFA_FACTOR_TOTP", "MFA_FACTOR_RECOVERY_CODE"])
    );
    // Used up when it was confirmed.
    let completed = json!({"challenge": challenge["challenge"], "code": code["code"]});
    let answer = site.post("/api/auth/mfa/complete", "", &completed).await;
    assert_refused(answer, 401, "MFA_CODE_INVALID", "a used code").await;
    let completed = json!({"challenge": challenge["challenge"], "code": codes[0]});
    let answer = site.done("/api/auth/mfa/complete", "", &completed).await;
    assert_eq!(answer["recovery_codes_left"], 9);
    let token = text(&answer["tokens"]["access_token"]);

    let both = |code: &Value| json!({"current_password": PASSWORD, "code": code});
    let path = "/api/auth/mfa/recovery-codes";
    let new = site.done(path, &token, &both(&codes[1])).await;
    let code = both(&new["recovery_codes"][0]);
    site.done("/api/auth/mfa/disable", &token, &code).await;
    let answer = site.done("/api/auth/login", "", &login).await;
    assert_eq!(answer["user"]["mfa_enabled"], false);
}

/// That it says the right things of them a step of CI sees to.
#[test]
fn the_document_describes_the_rpcs_with_a_rule_for_http_and_health() {
    let mut expected: Vec<_> = descriptor::own_rpcs()
        .into_iter()
        .filter_map(|rpc| {
            let name = rpc.path.rsplit('/').next().unwrap().to_owned();
            let (method, path) = rpc.http?;
            Some((path, method.to_lowercase(), name, rpc.rule.public))
        })
        .collect();
    let [path, method, name] = ["/health", "get", "Health"].map(str::to_owned);
    expected.push((path, method, name, true));
    expected.sort();
    let document = openapi();
    let paths = document["paths"].as_object().unwrap();
    let mut described = Vec::new();
    for (path, operations) in paths {
        for (method, operation) in operations.as_object().unwrap() {
            let name = operation["operationId"].as_str().unwrap().to_owned();
            let public = operation["security"].as_array().unwrap().is_empty();
            described.push((path.clone(), method.clone(), name, public));
        }
    }
    described.sort();
    assert_eq!(described, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_and_quota_are_read_by_json() {
    let site = Site::start().await;
    let (user, token) = site.user(1_000).await;
    let mut sum = 0;
    for (model, input) in [("one", 10), ("two", 20), ("two", 30)] {
        let mut event = event(&user.id);
        event.model = model.to_owned();
        event.tokens.as_mut().expect("tokens").input = input;
        let tokens = event.tokens.as_ref().expect("tokens");
        sum += tokens.input
            + tokens.output
            + tokens.cached_input
            + tokens.cache_write
            + tokens.reasoning;
        site.app.record(&event).await.unwrap();
    }
    // Numbers of 64 bits are text in JSON.
    let sum = sum.to_string();
    let month = site.read("/api/usage/monthly", &token).await;
    assert_eq!(month["user_id"], *user.id);
    assert_eq!(month["totals"]["total_tokens"], *sum);
    assert_eq!(month["totals"]["request_count"], "3");
    assert_eq!(month["models"][1]["model"], "two");
    let key = site.app.api_key(&user, &[]).await.text;
    assert_eq!(site.read("/api/usage/monthly", &key).await, month);
    let past = site.read("/api/usage/monthly?month=2026-01", &token).await;
    assert_eq!(past["totals"]["total_tokens"], "0");

    let query = "/api/usage/query?interval=INTERVAL_MONTH&group_by=GROUP_BY_MODEL";
    let series = site.read(query, &token).await["series"].clone();
    assert_eq!(series[0]["group"], "two");
    assert_eq!(series[0]["kind"], "KIND_GROUP");
    let totals = &series[0]["totals"]["tokens"];
    assert_eq!(totals["input"], "50");
    let ranged = "/api/usage/query?start_time=2026-01-01T00:00:00Z&end_time=2026-01-02T00:00:00Z";
    let ranged = site.read(ranged, &token).await;
    assert_eq!(ranged["end_time"], "2026-01-02T00:00:00Z");

    let first = site
        .read("/api/usage/records?page_size=2&model=two", &token)
        .await;
    assert_eq!(first["records"].as_array().unwrap().len(), 2);
    assert_eq!(first["next_page_token"], "");
    let first = site.read("/api/usage/records?page_size=2", &token).await;
    let next = first["next_page_token"].as_str().unwrap();
    let next = format!("/api/usage/records?page_size=2&page_token={next}");
    let second = site.read(&next, &token).await;
    assert_eq!(second["records"].as_array().unwrap().len(), 1);

    let quota = site.read("/api/usage/quota", &token).await;
    assert_eq!(quota["quota"]["limit_tokens"], "1000");
    assert_eq!(quota["quota"]["used_tokens"], *sum);
    assert_eq!(quota["base_source"], "BASE_SOURCE_OVERRIDE");
    let tiers = site.read("/api/usage/tiers", &token).await;
    assert_eq!(tiers["tiers"][0]["name"], "free");

    // A service names the user, a user does not get to see another.
    let (_, reader) = site.app.service("reader", &["usage.read"]).await;
    let named = format!("/api/usage/monthly?user_id={}", user.id);
    assert_eq!(site.read(&named, &reader).await, month);
    let (_, other) = site.user(1).await;
    let answer = site.json(Method::GET, &named, &other, "").await;
    assert_refused(answer, 403, "CALLER_NOT_ALLOWED", "another's usage").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_told_as_json_with_a_code_and_the_request_id() {
    let site = Site::start().await;
    let user = site.app.user().create().await;
    let token = site.app.login(&user).await.access_token;
    // How much of it has come when the gateway looks decides whether it refuses it, and with which status,
    // or the service does.
    let large = json!({"identifier": "x".repeat(70_000)}).to_string();
    let answer = site.json(Method::POST, "/api/auth/login", "", &large).await;
    let status = answer.status.as_u16();
    assert!([400, 413].contains(&status), "{status}");
    let code = match answer.header("content-type") {
        "application/problem+json" => "MALFORMED_REQUEST",
        _ => "INVALID_FIELD",
    };
    assert_refused(answer, status, code, "a large body").await;
    let wrong = json!({"identifier": user.username, "password": "wrong"}).to_string();
    let taken = json!({"email": user.email, "username": "another", "password": PASSWORD});
    let taken = taken.to_string();
    let [login, refresh, me] = ["/api/auth/login", "/api/auth/refresh", "/api/auth/me"];
    let (get, post) = (Method::GET, Method::POST);
    for (method, path, token, body, status, code) in [
        // Refused by Tollkeeper.
        (&post, login, "", wrong.as_str(), 401, "INVALID_CREDENTIALS"),
        (&post, login, "", "{}", 400, "INVALID_FIELD"),
        (&post, login, "", "", 400, "INVALID_FIELD"),
        (
            &post,
            "/api/auth/register",
            "",
            &taken,
            409,
            "ACCOUNT_EXISTS",
        ),
        (
            &post,
            refresh,
            "",
            r#"{"refresh_token": "x"}"#,
            401,
            "CREDENTIAL_INVALID",
        ),
        (&get, me, "", "", 401, "CREDENTIAL_MISSING"),
        (&get, me, "garbage", "", 401, "CREDENTIAL_INVALID"),
        (
            &get,
            "/api/usage/monthly?month=May",
            &token,
            "",
            400,
            "INVALID_FIELD",
        ),
        (
            &get,
            "/api/usage/quota?user_id=1",
            &token,
            "",
            400,
            "INVALID_FIELD",
        ),
        // Refused by the gateway.
        (
            &post,
            login,
            "",
            r#"{"identifier": "#,
            400,
            "MALFORMED_REQUEST",
        ),
        (
            &post,
            login,
            "",
            r#"{"identifier": 5}"#,
            400,
            "MALFORMED_REQUEST",
        ),
        (&post, login, "", "[]", 400, "MALFORMED_REQUEST"),
        (&post, login, "", "identifier=ada", 400, "MALFORMED_REQUEST"),
        (
            &get,
            "/api/auth/me?nope=1",
            &token,
            "",
            400,
            "MALFORMED_REQUEST",
        ),
        (
            &get,
            "/api/usage/query?interval=X",
            &token,
            "",
            400,
            "MALFORMED_REQUEST",
        ),
        (
            &get,
            "/api/usage/records?page_size=x",
            &token,
            "",
            400,
            "MALFORMED_REQUEST",
        ),
        (
            &get,
            "/api/usage/query?start_time=x",
            &token,
            "",
            400,
            "MALFORMED_REQUEST",
        ),
        (&get, "/api/auth/nope", "", "", 404, "UNKNOWN_METHOD"),
        (&get, login, "", "", 404, "UNKNOWN_METHOD"),
        (&get, "/api/auth/me;x", &token, "", 400, "MALFORMED_REQUEST"),
    ] {
        let what = format!("{method} {path} {code}");
        let answer = site.json(method.clone(), path, token, body).await;
        assert_refused(answer, status, code, &what).await;
    }
    // Every wrong field by its name.
    let answer = site
        .post("/api/auth/register", "", &json!({"email": "x"}))
        .await;
    let body = assert_refused(answer, 400, "INVALID_FIELD", "no fields").await;
    let violations = body["details"][1]["field_violations"].as_array().unwrap();
    let fields = violations.iter().map(|violation| &violation["field"]);
    assert_eq!(
        fields.collect::<Vec<_>>(),
        ["email", "username", "password"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_rpc_with_a_rule_for_http_is_there_and_wants_a_credential_unless_it_is_public() {
    let site = Site::start().await;
    let rpcs = descriptor::own_rpcs();
    let mapped = rpcs.iter().filter_map(|rpc| Some((rpc, rpc.http.clone()?)));
    let mut seen = 0;
    for (rpc, (method, path)) in mapped {
        seen += 1;
        let method: Method = method.parse().unwrap();
        let path: String = path.replace(['{', '}'], "");
        let answer = site.json(method.clone(), &path, "", "{}").await;
        if rpc.rule.public {
            assert_ne!(answer.status, StatusCode::NOT_FOUND, "{path}");
            let (code, _) = code_and_id(&answer.json().await);
            assert!(code != "MALFORMED_REQUEST", "{path}: {code}");
        } else {
            let answer = if method == Method::GET {
                site.json(method, &path, "", "").await
            } else {
                answer
            };
            // By Tollkeeper itself, not by who guards what is behind the gateway.
            let body = assert_refused(answer, 401, "CREDENTIAL_MISSING", &path).await;
            assert_eq!(body["code"], 16, "{path} is no route to Tollkeeper");
        }
    }
    assert!(seen >= 10, "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_rule_for_http_cannot_be_called_through_the_gateway() {
    // Whoever gets as far as that as a program of this machine is trusted.
    let app = TestApp::spawn_with(|settings| settings.gateway.trust_loopback = true).await;
    let site = Site::before(app).await;
    let (_, token) = site.user(1).await;
    let before = site.app.count("SELECT count(*) FROM users").await;
    for path in [
        "/envoy.service.auth.v3.Authorization/Check",
        "/tollkeeper.auth.v1.AuthService/GetCurrentUser",
    ] {
        // It is for the application behind the gateway, whatever that makes of it.
        let answer = site.post(path, &token, &json!({})).await.json().await;
        assert!(answer["headers"].is_array(), "{path}: {answer}");
    }
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", site.edge.address))
        .unwrap()
        .connect_lazy();
    for path in [
        "/api/auth/me",
        "/api/auth/../../envoy.service.auth.v3.Authorization/Check",
        "/api/auth/envoy.service.auth.v3.Authorization/Check",
    ] {
        let call = Raw::call(&channel, path, bytes::Bytes::new(), None).await;
        let status = call.unwrap_err();
        let why = reason(&status);
        assert!(
            why == "UNKNOWN_METHOD" || why == "CREDENTIAL_MISSING",
            "{path}: {status:?}"
        );
    }
    assert_eq!(site.app.count("SELECT count(*) FROM users").await, before);
}

/// What a gateway shows to say who it is must not speak for those that it forwards.
#[test]
fn clients_of_rest_come_by_other_connections_than_the_questions_of_the_gateway() {
    let delivered = include_str!("../../../deploy/envoy/envoy.yaml");
    let routes = delivered
        .lines()
        .filter(|line| line.contains("route: { cluster: tollkeeper"));
    let routes: Vec<_> = routes.map(str::trim).collect();
    assert_eq!(
        routes,
        ["route: { cluster: tollkeeper_rest, timeout: 30s }"]
    );
    assert!(delivered.contains("envoy_grpc: { cluster_name: tollkeeper }"));
    let (_, rest) = delivered.split_once("- name: tollkeeper_rest").unwrap();
    let (rest, _) = rest.split_once("\n  - name:").unwrap();
    assert!(!rest.contains("tls_certificates"), "{rest}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_healthy_from_unhealthy() {
    let app = TestApp::spawn().await;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let replica = app.replica().await;
    let edge = Edge::start(replica.address, &key, replica.address).await;
    let answer = edge.get("/health", &[]).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("content-type"), "application/json");
    let answer = answer.json().await;
    assert_described("get", "/health", &answer);
    assert_eq!(answer, json!({"status": "healthy"}));
    replica.stop().await.unwrap();
    eventually("it is noticed", async || {
        edge.get("/health", &[]).await.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    let answer = edge.get("/health", &[]).await;
    assert_eq!(answer.json().await, json!({"status": "unhealthy"}));
    // Whoever asks anyway is told so.
    let answer = edge.get("/api/auth/me", &[]).await;
    assert_refused(answer, 503, "UNAVAILABLE", "away").await;
    let answer = edge.get("/anything", &[]).await;
    assert_refused(answer, 503, "UNAVAILABLE", "away").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_of_the_origin_that_is_allowed_may_call_and_read_and_others_may_not() {
    let site = Site::start().await;
    let user = site.app.user().create().await;
    let authorization = format!("Bearer {}", site.app.login(&user).await.access_token);
    let ours = "http://localhost:3000";
    let asks = [
        ("access-control-request-method", "POST"),
        (
            "access-control-request-headers",
            "authorization, content-type",
        ),
    ];
    for path in ["/api/auth/me", "/api/auth/login", "/anything", "/premium/x"] {
        for (origin, allowed) in [
            (ours, true),
            ("http://localhost:3001", false),
            ("https://localhost:3000", false),
            ("http://localhost:3000.example.com", false),
            ("null", false),
        ] {
            let what = format!("{path} {origin}");
            let mut preflight = asks.to_vec();
            preflight.push(("origin", origin));
            let answer = site.edge.send(Method::OPTIONS, path, &preflight, "").await;
            let told = |answer: &Answer, name: &str| answer.headers.contains_key(name);
            assert_eq!(
                told(&answer, "access-control-allow-origin"),
                allowed,
                "{what}"
            );
            if allowed {
                assert_eq!(answer.status, StatusCode::OK, "{what}");
                assert_eq!(answer.header("access-control-allow-origin"), ours);
                assert!(
                    answer
                        .header("access-control-allow-methods")
                        .contains("POST")
                );
                let headers = answer.header("access-control-allow-headers");
                assert!(headers.contains("authorization") && headers.contains("content-type"));
            } else {
                assert!(answer.status.is_client_error(), "{what}");
            }
            // Cookies say nothing here.
            assert!(!told(&answer, "access-control-allow-credentials"), "{what}");
            for credential in [authorization.as_str(), "Bearer garbage"] {
                let headers = [("origin", origin), ("authorization", credential)];
                let answer = site.edge.get(path, &headers).await;
                assert_eq!(
                    told(&answer, "access-control-allow-origin"),
                    allowed,
                    "{what}"
                );
                if allowed {
                    let exposed = answer.header("access-control-expose-headers");
                    assert!(exposed.contains("x-request-id"), "{what}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_password_is_set_by_json() {
    let mailbox = Mailbox::new();
    let app = TestApp::spawn_with(|settings| mailbox.take(settings)).await;
    let site = Site::before(app).await;
    let user = site.app.user().create().await;
    let ask = json!({"email": user.email});
    site.done("/api/auth/request-password-reset", "", &ask)
        .await;
    let token = mailbox.nth(&user.email, 1).await.token();
    let new = "a staple for the next battery";
    let set = json!({"token": token, "new_password": new});
    site.done("/api/auth/reset-password", "", &set).await;
    let again = site.post("/api/auth/reset-password", "", &set).await;
    assert_refused(again, 400, "ONE_TIME_TOKEN_INVALID", "used").await;
    let login = json!({"identifier": user.email, "password": new});
    let login = site.done("/api/auth/login", "", &login).await;
    let session = login["tokens"]["access_token"].as_str().unwrap();
    let sent = site
        .done("/api/auth/send-verification", session, &json!({}))
        .await;
    assert_eq!(sent["already_verified"], true);
    let verify = json!({"token": "tko_none"});
    let refused = site.post("/api/auth/verify-email", "", &verify).await;
    assert_refused(refused, 400, "ONE_TIME_TOKEN_INVALID", "none").await;
}
