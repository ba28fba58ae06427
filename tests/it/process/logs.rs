use std::{fs::File, net::TcpListener, process::Stdio, time::SystemTime};

use serde_json::Value;
use tollkeeper::proto::tollkeeper::{
    auth::v1::{
        CompleteMfaRequest, EnrollTotpRequest, LoginRequest, RefreshTokensRequest, RegisterRequest,
        ValidateTokenRequest, auth_service_client::AuthServiceClient,
    },
    usage::v1::{
        RecordUsageRequest, TokenCounts, UsageEvent, usage_service_client::UsageServiceClient,
    },
};
use tonic::{Code, Request};

use super::{Service, home::Home};
use crate::{
    auth::mfa,
    harness::{login_through, with_bearer},
};

const EMAIL: &str = "grace.hopper@navy.example";
const PASSWORD: &str = "a ship in port is safe";
const WRONG_PASSWORD: &str = "what ships are built for";

/// Adds `x-request-id` to a request.
fn called<T>(mut request: Request<T>, id: &'static str) -> Request<T> {
    let metadata = request.metadata_mut();
    metadata.insert("x-request-id", id.parse().expect("ASCII"));
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn json_logs_tell_each_call_and_no_secret() {
    let home = Home::with_database();
    let create = ["services", "create", "--name", "meter", "--scope"];
    let create = [&create[..], &["usage.write", "--scope", "tokens.validate"]].concat();
    let created = home.finish(home.production(&create), "").stdout;
    let key = created.rsplit(' ').next().expect("a key").trim().to_owned();

    // With every event of ours; a dependency's `trace` may show its bytes, and nobody asks for it.
    let serve = ["serve", "--log-format", "json", "--set"];
    let serve = [&serve[..], &["log.filter=info,tollkeeper=trace"]].concat();
    let mut service = home.start(home.production(&serve));
    let channel = service.serving().await;
    let mut auth = AuthServiceClient::new(channel.clone());

    let register = RegisterRequest {
        email: EMAIL.to_owned(),
        username: "grace".to_owned(),
        full_name: "Grace Hopper".to_owned(),
        password: PASSWORD.to_owned(),
    };
    let registered = auth
        .register(called(Request::new(register.clone()), "call-1"))
        .await
        .unwrap();
    let user_id = registered.into_inner().user.unwrap().id;
    let again = called(Request::new(register), "call-2");
    auth.register(again).await.unwrap_err();
    let credentials = |password: &str| LoginRequest {
        identifier: EMAIL.to_owned(),
        password: password.to_owned(),
    };
    let wrong = called(Request::new(credentials(WRONG_PASSWORD)), "call-3");
    auth.login(wrong).await.unwrap_err();
    let right = called(Request::new(credentials(PASSWORD)), "call-4");
    let first = auth.login(right).await.unwrap().into_inner();
    let first = first.tokens.unwrap();
    let refresh = RefreshTokensRequest {
        refresh_token: first.refresh_token.clone(),
    };
    let second = auth
        .refresh_tokens(called(Request::new(refresh), "call-5"))
        .await
        .unwrap();
    let second = second.into_inner().tokens.unwrap();
    let question = ValidateTokenRequest {
        token: second.access_token.clone(),
        include_quota: true,
        ..ValidateTokenRequest::default()
    };
    auth.validate_token(called(with_bearer(question.clone(), &key), "call-6"))
        .await
        .unwrap();
    // A credential of the wrong kind, and one that is none.
    let wrong_kind = with_bearer(question.clone(), &first.access_token);
    auth.validate_token(called(wrong_kind, "call-7"))
        .await
        .unwrap_err();
    let garbage = with_bearer(question, &key[..key.len() - 1]);
    auth.validate_token(called(garbage, "call-8"))
        .await
        .unwrap_err();
    let usage = RecordUsageRequest {
        event: Some(UsageEvent {
            event_id: "01890a5d-ac96-774b-bcce-b302099a8057".to_owned(),
            occurred_at: Some(SystemTime::now().into()),
            user_id,
            model: "a-model".to_owned(),
            tokens: Some(TokenCounts {
                input: 5,
                ..TokenCounts::default()
            }),
            ..UsageEvent::default()
        }),
    };
    UsageServiceClient::new(channel)
        .record_usage(called(with_bearer(usage, &key), "call-9"))
        .await
        .unwrap();

    let calls = [
        ("call-1", "tollkeeper.auth.v1.AuthService/Register", "Ok"),
        (
            "call-2",
            "tollkeeper.auth.v1.AuthService/Register",
            "AlreadyExists",
        ),
        (
            "call-3",
            "tollkeeper.auth.v1.AuthService/Login",
            "Unauthenticated",
        ),
        ("call-4", "tollkeeper.auth.v1.AuthService/Login", "Ok"),
        (
            "call-5",
            "tollkeeper.auth.v1.AuthService/RefreshTokens",
            "Ok",
        ),
        (
            "call-6",
            "tollkeeper.auth.v1.AuthService/ValidateToken",
            "Ok",
        ),
        (
            "call-7",
            "tollkeeper.auth.v1.AuthService/ValidateToken",
            "PermissionDenied",
        ),
        (
            "call-8",
            "tollkeeper.auth.v1.AuthService/ValidateToken",
            "Unauthenticated",
        ),
        (
            "call-9",
            "tollkeeper.usage.v1.UsageService/RecordUsage",
            "Ok",
        ),
    ];
    service.wait_until("the last call is logged", |service| {
        service.log().contains("call-9")
    });
    let log = service.log();
    let lines: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}")))
        .collect();
    for line in &lines {
        for member in ["timestamp", "level", "message"] {
            assert!(line[member].is_string(), "no {member}: {line}");
        }
    }
    for (id, method, code) in calls {
        let finished = lines
            .iter()
            .filter(|line| line["span"]["request_id"] == id && line["message"] == "call finished");
        let finished: Vec<&Value> = finished.collect();
        let [line] = finished[..] else {
            panic!("{id} is logged {} times", finished.len());
        };
        assert_eq!(line["span"]["method"], method);
        assert_eq!(line["code"], code);
        assert!(line["duration_ms"].is_number());
        assert_eq!(line["reason"].is_string(), code != "Ok", "{line}");
    }

    let reason_of = |id: &str| {
        let of_call = |line: &&Value| line["span"]["request_id"] == id;
        let mut lines = lines.iter().filter(of_call);
        lines.find_map(|line| line["reason"].as_str())
    };
    assert_eq!(reason_of("call-2"), Some("ACCOUNT_EXISTS"));
    assert_eq!(reason_of("call-3"), Some("INVALID_CREDENTIALS"));

    // An excerpt gives a secret away as well.
    let (password, wrong) = (&PASSWORD[..12], &WRONG_PASSWORD[..12]);
    let end_of = |token: &str| token[token.len() - 16..].to_owned();
    let tokens = [&first, &second]
        .map(|tokens| [&tokens.access_token, &tokens.refresh_token].map(|token| end_of(token)));
    let tokens = tokens.concat();
    let database = home.database_url();
    let mut secrets = vec![EMAIL, "grace.hopper", password, wrong, "$argon2", database];
    secrets.extend(tokens.iter().map(String::as_str));
    let key = end_of(&key);
    secrets.extend([key.as_str(), super::home::MASTER_KEY, "Bearer", "eyJ"]);
    for secret in secrets {
        let told = log.lines().find(|line| line.contains(secret));
        assert_eq!(told, None, "{secret} is in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn human_logs_are_one_event_a_line_without_colours() {
    let home = Home::new();
    let mut service = home.serve();
    service.serving().await;
    let log = service.log();
    assert!(log.contains(" INFO listening address="), "{log}");
    assert!(!log.contains('\u{1b}'), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_filter_shows_what_is_sent_to_the_database() {
    let home = Home::with_database();
    let filter = "log.filter=debug,tokio_postgres::query=trace";
    let mut service = home.start(home.production(&["serve", "--set", filter]));
    let mut auth = AuthServiceClient::new(service.serving().await);
    let register = RegisterRequest {
        email: EMAIL.to_owned(),
        username: "grace".to_owned(),
        full_name: String::new(),
        password: PASSWORD.to_owned(),
    };
    auth.register(register).await.unwrap();
    let log = service.log();
    assert!(log.contains("DEBUG"), "the filter is in effect");
    assert!(!log.contains("with parameters"));
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_tell_nothing_of_second_factors() {
    let home = Home::with_database();
    let serve = ["serve", "--set", "log.filter=info,tollkeeper=trace"];
    let mut service = home.start(home.production(&serve));
    let channel = service.serving().await;
    let mut auth = AuthServiceClient::new(channel.clone());
    let register = RegisterRequest {
        email: EMAIL.to_owned(),
        username: "grace".to_owned(),
        full_name: String::new(),
        password: PASSWORD.to_owned(),
    };
    auth.register(register).await.unwrap();
    let token = login_through(&channel, EMAIL, PASSWORD).await.unwrap();
    let enroll = EnrollTotpRequest {
        current_password: PASSWORD.to_owned(),
    };
    let enrolled = auth.enroll_totp(with_bearer(enroll, &token.access_token));
    let secret = enrolled.await.unwrap().into_inner().secret;
    let phone = mfa::enable_through(&channel, &token.access_token, PASSWORD).await;
    let login = LoginRequest {
        identifier: EMAIL.to_owned(),
        password: PASSWORD.to_owned(),
    };
    let answer = auth.login(login).await.unwrap().into_inner();
    let challenge = answer.mfa_challenge.unwrap().challenge;
    let used = phone.recovery_codes[0].clone();
    for code in [phone.wrong_code(), used.clone(), used] {
        let request = CompleteMfaRequest {
            challenge: challenge.clone(),
            code,
        };
        let _ = auth
            .complete_mfa(called(Request::new(request), "last"))
            .await;
    }
    service.wait_until("the last call is logged", |service| {
        service.log().matches("last").count() >= 3
    });
    let log = service.log();
    let mut secrets = vec![&secret[..8], &challenge[challenge.len() - 16..], "tkm_"];
    secrets.extend(phone.recovery_codes.iter().map(|code| &code[..9]));
    secrets.extend(["otpauth", "<svg"]);
    for secret in secrets {
        let told = log.lines().find(|line| line.contains(secret));
        assert_eq!(told, None, "{secret} is in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_that_cannot_be_written_costs_no_call() {
    let home = Home::with_database();
    // Nobody can read there where it listens: a port that was free a moment ago.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    drop(listener);
    let mut serve = home.production(&["serve", "--log-format", "json"]);
    let full = File::options().write(true).open("/dev/full");
    serve
        .env("TOLLKEEPER_SERVER_LISTEN", &address)
        .stdout(Stdio::null())
        .stderr(full.expect("a disk without room"));
    let mut service = Service {
        child: serve.spawn().expect("the program starts"),
        stdout: "/dev/null".into(),
        stderr: "/dev/null".into(),
    };
    let channel = service.serving_at(&address).await;
    let mut auth = AuthServiceClient::new(channel);
    for _ in 0..3 {
        let credentials = LoginRequest {
            identifier: EMAIL.to_owned(),
            password: PASSWORD.to_owned(),
        };
        // Each is logged.
        let refused = auth.login(credentials).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    }
}
