//! The edge below the messages: sizes, frames, deadlines, request ids, connections.

mod reflection;
mod wire;

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use http::StatusCode;
use prost::Message as _;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};
use tollkeeper::proto::tollkeeper::{
    admin::v1::{DisableUserRequest, GetUserRequest},
    auth::v1::{GetJwksRequest, RegisterRequest, ValidateTokenRequest},
};
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;
use wire::{Wire, frame};

use crate::{
    harness::{Blocker, PASSWORD, Raw, TestApp, TestUser, reason},
    usage::event,
};

const JWKS: &str = "/tollkeeper.auth.v1.AuthService/GetJwks";
const REGISTER: &str = "/tollkeeper.auth.v1.AuthService/Register";
const VALIDATE: &str = "/tollkeeper.auth.v1.AuthService/ValidateToken";
const DISABLE: &str = "/tollkeeper.admin.v1.AdminService/DisableUser";

#[tokio::test(flavor = "multi_thread")]
async fn a_request_over_the_size_limit_is_refused_and_one_at_it_is_read() {
    let app = TestApp::spawn_with(|s| s.server.max_request_bytes = 1000).await;
    for (length, code, why) in [
        (1000, Code::Unauthenticated, "CREDENTIAL_INVALID"),
        (1001, Code::OutOfRange, "MALFORMED_REQUEST"),
        (900_000, Code::OutOfRange, "MALFORMED_REQUEST"),
    ] {
        let mut request = ValidateTokenRequest {
            token: "x".repeat(length),
            include_quota: false,
            ..ValidateTokenRequest::default()
        };
        let extra = request.encoded_len() - length;
        request.token.truncate(length - extra);
        let message: Bytes = request.encode_to_vec().into();
        assert_eq!(message.len(), length);
        let key = Some(app.service_key.as_str());
        let status = Raw::call(&app.channel, VALIDATE, message, key)
            .await
            .unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (code, why),
            "{length}"
        );
    }
    // Nor is one read that is known well enough for the short way.
    let mut event = event(&app.user().create().await.id);
    app.record(&event).await.unwrap();
    let labels = (0..10).map(|number| (format!("label_{number}"), "x".repeat(100)));
    event.labels = labels.collect();
    event.event_id = Uuid::now_v7().to_string();
    let status = app.record(&event).await.unwrap_err();
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_no_message_is_the_clients_mistake() {
    let app = TestApp::spawn().await;
    // Not UTF-8 in a string · a field cut short · the wrong wire type · an unknown wire type.
    for body in [&b"\x0a\x01\xff"[..], b"\x0a\x05ab", b"\x08\x01", b"\x0f"] {
        let body = Bytes::copy_from_slice(body);
        let status = Raw::call(&app.channel, REGISTER, body, None)
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert_eq!(reason(&status), "MALFORMED_REQUEST");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_of_a_later_version_are_ignored() {
    let app = TestApp::spawn().await;
    let body = Bytes::from_static(b"\xfa\x7f\x03new");
    Raw::call(&app.channel, JWKS, body, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_frame_is_the_clients_mistake() {
    let app = TestApp::spawn().await;
    let mut wire = Wire::connect(app.address).await;
    for (what, body) in [
        ("nothing", Bytes::new()),
        ("half a header", Bytes::from_static(&[0, 0, 0])),
        (
            "less than announced",
            Bytes::from_static(&[0, 0, 0, 0, 9, 1]),
        ),
        ("an unknown flag", Bytes::from_static(&[7, 0, 0, 0, 0])),
        (
            "compressed without saying how",
            Bytes::from_static(&[1, 0, 0, 0, 0]),
        ),
    ] {
        let answer = wire.call(REGISTER, &[], body).await;
        let status = answer.status();
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        assert_eq!(reason(&status), "MALFORMED_REQUEST", "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_compression_is_not_taken_for_an_unknown_method() {
    let app = TestApp::spawn().await;
    let mut wire = Wire::connect(app.address).await;
    let headers = [("grpc-encoding", "br")];
    let status = wire.call(JWKS, &headers, frame(b"")).await.status();
    assert_eq!(status.code(), Code::Unimplemented);
    assert_eq!(reason(&status), "MALFORMED_REQUEST");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_content_type_is_refused() {
    let app = TestApp::spawn().await;
    let mut wire = Wire::connect(app.address).await;
    for content_type in ["application/json", "text/plain", "application/g"] {
        let headers = [("content-type", content_type)];
        let answer = wire.call(JWKS, &headers, frame(b"")).await;
        let unsupported = StatusCode::UNSUPPORTED_MEDIA_TYPE;
        assert_eq!(answer.http, unsupported, "{content_type}");
        assert_eq!(
            reason(&answer.status()),
            "MALFORMED_REQUEST",
            "{content_type}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_past_the_clients_deadline_fails_with_details() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let _lock = Blocker::lock_user(&app, &user).await;
    let mut wire = Wire::connect(app.address).await;
    let authorization = format!("Bearer {}", app.service_key);
    let body = frame(&disable(&user));
    // Some are past before the call is looked at.
    let mut calls = Vec::new();
    for micros in (0..30).map(|n| n * 1037) {
        let timeout = format!("{micros}u");
        let headers = [
            ("authorization", authorization.as_str()),
            ("grpc-timeout", timeout.as_str()),
        ];
        calls.push(wire.start(DISABLE, &headers, body.clone()).await);
    }
    for answer in join_all(calls).await {
        let status = answer.status();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        assert_eq!(reason(&status), "DEADLINE_EXCEEDED");
        assert!(answer.headers.contains_key("x-request-id"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_hang_end_at_the_servers_longest_deadline_and_give_their_connections_back() {
    let app = TestApp::spawn_with(|settings| {
        settings.server.max_deadline = Duration::from_millis(300);
        settings.database.pool_size = 2;
    })
    .await;
    let (stuck, other) = (app.user().create().await, app.user().create().await);
    let lock = Blocker::lock_user(&app, &stuck).await;
    let key = Some(app.service_key.as_str());
    let started = Instant::now();
    let calls = (0..6).map(|_| Raw::call(&app.channel, DISABLE, disable(&stuck), key));
    for answer in join_all(calls).await {
        let status = answer.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        assert_eq!(reason(&status), "DEADLINE_EXCEEDED");
    }
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "{:?}",
        started.elapsed()
    );
    let get = |user: &TestUser| GetUserRequest {
        user_id: user.id.clone(),
    };
    // New connections take their time on a busy machine.
    eventually(|| async { app.admin(&app.service_key).get_user(get(&other)).await }).await;
    lock.release().await;
    eventually(|| async { Raw::call(&app.channel, DISABLE, disable(&stuck), key).await }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_that_are_given_up_while_they_hang_open_nothing_and_give_their_connections_back() {
    let app = TestApp::spawn_with(|settings| {
        settings.database.pool_size = 2;
        // Nothing but the end of its call ends a statement.
        settings.database.statement_timeout = Duration::from_mins(10);
    })
    .await;
    let (stuck, other) = (app.user().create().await, app.user().create().await);
    let lock = Blocker::lock_user(&app, &stuck).await;
    let logins = (0..2).map(|_| app.login_as(&stuck.email, PASSWORD));
    tokio::select! {
        answers = join_all(logins) => panic!("nothing held them up: {answers:?}"),
        () = lock.hold_up(&app, 2) => {}
    }
    lock.let_go(&app).await;
    let get = || GetUserRequest {
        user_id: other.id.clone(),
    };
    // New connections take their time on a busy machine.
    eventually(|| async { app.admin(&app.service_key).get_user(get()).await }).await;
    lock.release().await;
    // Behind whatever might have waited for the row.
    app.disable(&stuck.id).await;
    for left in [
        "SELECT count(*) FROM sessions",
        "SELECT count(*) FROM audit_events WHERE action = 'session.opened'",
        "SELECT count(*) FROM users WHERE last_login_at IS NOT NULL",
    ] {
        assert_eq!(app.count(left).await, 0, "{left}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_request_id_of_the_caller_comes_back() {
    let app = TestApp::spawn().await;
    for id in ["abc-123", "!", &"~".repeat(128)] {
        for (what, answer) in every_kind_of_answer(&app, Some(id)).await {
            assert_eq!(request_id(&answer), id, "{what}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_id_is_made_where_none_or_an_insane_one_is_given() {
    let app = TestApp::spawn().await;
    for id in [None, Some(""), Some("two words"), Some(&*"~".repeat(129))] {
        for (what, answer) in every_kind_of_answer(&app, id).await {
            let made = request_id(&answer);
            assert!(
                uuid::Uuid::try_parse(&made).is_ok(),
                "{what} {id:?}: {made}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_carries_the_request_id_in_its_details() {
    let app = TestApp::spawn().await;
    for (what, answer) in every_kind_of_answer(&app, Some("abc-123")).await {
        let Err(status) = answer else { continue };
        let info = status.get_details_error_info().expect(what);
        let id = info.metadata.get("request_id").map(String::as_str);
        assert_eq!(id, Some("abc-123"), "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_keeps_its_other_details_beside_the_request_id() {
    let app = TestApp::spawn().await;
    let request = RegisterRequest::default().encode_to_vec().into();
    let status = Raw::call(&app.channel, REGISTER, request, None)
        .await
        .unwrap_err();
    let details = status.get_error_details();
    assert!(
        details
            .error_info()
            .unwrap()
            .metadata
            .contains_key("request_id")
    );
    assert_eq!(details.bad_request().unwrap().field_violations.len(), 3);
    assert!(status.message().starts_with("email must be"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_calls_share_one_connection() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let request = || GetUserRequest {
        user_id: user.id.clone(),
    };
    let calls = (0..200).map(|_| async {
        app.admin(&app.service_key)
            .get_user(request())
            .await
            .unwrap()
            .into_inner()
    });
    for answer in join_all(calls).await {
        assert_eq!(answer.user.unwrap().id, user.id);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_beyond_the_streams_of_a_connection_wait_their_turn() {
    let app = TestApp::spawn_with(|settings| settings.server.max_streams = 2).await;
    // A client learns the limit with the first answer; before, it may be refused a stream.
    app.auth("").get_jwks(GetJwksRequest {}).await.unwrap();
    let calls = (0..50).map(|_| async { app.auth("").get_jwks(GetJwksRequest {}).await });
    for answer in join_all(calls).await {
        assert_eq!(answer.unwrap().into_inner().keys.len(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_breaks_the_protocol_leaves_others_on_the_connection_alone() {
    let app = TestApp::spawn().await;
    let mut wire = Wire::connect(app.address).await;
    let broken = wire
        .start(REGISTER, &[], Bytes::from_static(&[9; 40]))
        .await;
    let good = wire.start(JWKS, &[], frame(b"")).await;
    assert!(broken.await.status().code() != Code::Ok);
    assert_eq!(good.await.status().code(), Code::Ok);
}

type Answer = Result<http::HeaderMap, Status>;

/// A success, and an error of each layer.
async fn every_kind_of_answer(app: &TestApp, id: Option<&str>) -> Vec<(&'static str, Answer)> {
    let too_long = Bytes::from(vec![0; (1 << 20) + 1]);
    let mut answers = Vec::new();
    for (what, path, body) in [
        ("a success", JWKS, Bytes::new()),
        ("an error of a handler", REGISTER, Bytes::new()),
        ("an error of access", VALIDATE, Bytes::new()),
        ("an unknown method", "/no.such.Service/Do", Bytes::new()),
        (
            "an unknown method of health",
            "/grpc.health.v1.Health/Do",
            Bytes::new(),
        ),
        (
            "a body that is no message",
            REGISTER,
            Bytes::from_static(b"\xff"),
        ),
        ("a body that is too long", REGISTER, too_long),
    ] {
        let mut request = Request::new(body);
        if let Some(id) = id {
            let value = id.parse().expect("ASCII");
            request.metadata_mut().insert("x-request-id", value);
        }
        let answer = Raw::send(&app.channel, path, request).await;
        assert_eq!(answer.is_ok(), what == "a success", "{what}");
        answers.push((
            what,
            answer.map(|answer| answer.metadata().clone().into_headers()),
        ));
    }
    answers
}

fn request_id(answer: &Answer) -> String {
    let id = match answer {
        Ok(headers) => headers.get("x-request-id").cloned(),
        Err(status) => status
            .metadata()
            .clone()
            .into_headers()
            .remove("x-request-id"),
    };
    id.expect("a request id")
        .to_str()
        .expect("ASCII")
        .to_owned()
}

fn disable(user: &TestUser) -> Bytes {
    let request = DisableUserRequest {
        user_id: user.id.clone(),
        reason: String::new(),
    };
    request.encode_to_vec().into()
}

/// Tries until it succeeds, for ten seconds.
async fn eventually<T, F: Future<Output = Result<T, Status>>>(attempt: impl Fn() -> F) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match attempt().await {
            Ok(answer) => return answer,
            Err(status) => assert!(Instant::now() < deadline, "still {status:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_give_their_places_back() {
    let app = TestApp::spawn_with(|settings| settings.server.max_connections = 3).await;
    let mut silent = Vec::new();
    for said in [&b""[..], b"PRI * HTTP/2.0\r\n", b""] {
        let mut stream = TcpStream::connect(app.address).await.unwrap();
        stream.write_all(said).await.unwrap();
        silent.push(stream);
    }
    // It has to wait for a place.
    let answer = Raw::call(&app.channel, JWKS, Bytes::new(), None);
    let answer = timeout(Duration::from_secs(30), answer).await;
    answer.expect("a place in time").unwrap();
}
