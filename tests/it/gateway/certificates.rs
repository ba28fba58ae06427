//! Who may ask by a certificate, and TLS as such.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};
use tollkeeper::{
    config::Settings,
    proto::{
        envoy::service::{
            auth::v3::{CheckResponse, authorization_client::AuthorizationClient},
            ratelimit::v3::{
                rate_limit_response::Code as Verdict,
                rate_limit_service_client::RateLimitServiceClient,
            },
        },
        tollkeeper::{
            auth::v1::{
                ListSessionsRequest, WatchRevocationsRequest,
                auth_service_client::AuthServiceClient,
            },
            usage::v1::{
                CheckQuotaRequest, ExportUsageRequest, StreamUsageRequest,
                export_usage_response::Content, usage_service_client::UsageServiceClient,
            },
        },
    },
};
use tonic::{Status, transport::Channel};

use super::{
    asking,
    limits::{about, asking_for},
    refused,
    upstream::Upstream,
};
use crate::{
    harness::{
        Authority, Edge, PASSWORD, TestApp, eventually, login_through, reason, validate_through,
        with_bearer,
    },
    usage::event,
};

const EDGE: &str = "spiffe://example.test/ns/edge";

/// A server that speaks TLS, and knows two identities.
async fn secured(authority: &Authority) -> TestApp {
    let mut app = TestApp::spawn_with(|settings| speak_tls(settings, authority)).await;
    // What the harness asks, it asks without a certificate.
    app.channel = authority.channel(app.address, None);
    app
}

fn speak_tls(settings: &mut Settings, authority: &Authority) {
    let server = authority.server();
    settings.tls.cert_file = server.certificate;
    settings.tls.key_file = server.key;
    settings.tls.client_ca_file.clone_from(&authority.ca);
    settings.tls.clients = format!(
        "{EDGE}=gateway, quota.example.test=quota, \
         billing.example.test=usage.write usage.read tokens.validate"
    );
}

async fn check_through(channel: &Channel) -> Result<CheckResponse, Status> {
    let mut client = AuthorizationClient::new(channel.clone());
    let answer = client.check(asking(&[], &[])).await?;
    Ok(answer.into_inner())
}

async fn check_quota_through(channel: &Channel, user: &str) -> Result<(), Status> {
    let request = CheckQuotaRequest {
        user_id: user.to_owned(),
        ..CheckQuotaRequest::default()
    };
    let mut client = UsageServiceClient::new(channel.clone());
    client.check_quota(request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_opens_what_the_settings_say_of_its_identity_and_no_more() {
    let authority = Authority::new();
    let app = secured(&authority).await;
    let user = app.user().create().await;
    let edge = authority.channel(app.address, Some(&authority.uri(EDGE)));
    assert_eq!(refused(check_through(&edge).await.unwrap()).0, 401);
    // Also where memory answers.
    for _ in 0..3 {
        let request = asking_for(vec![about("check", &user.id, "", 1)]);
        let mut client = RateLimitServiceClient::new(edge.clone());
        let answer = client.should_rate_limit(request).await.unwrap();
        assert_eq!(answer.into_inner().overall_code(), Verdict::Ok);
        let wrong = check_quota_through(&edge, &user.id).await.unwrap_err();
        assert_eq!(reason(&wrong), "SCOPE_MISSING");
    }
    let quota = authority.dns("quota.example.test");
    let quota = authority.channel(app.address, Some(&quota));
    for _ in 0..3 {
        check_quota_through(&quota, &user.id).await.unwrap();
        let wrong = check_through(&quota).await.unwrap_err();
        assert_eq!(reason(&wrong), "SCOPE_MISSING");
    }
    // It is a service and nobody's user.
    let mut auth = AuthServiceClient::new(edge.clone());
    let sessions = auth.list_sessions(ListSessionsRequest::default()).await;
    assert_eq!(reason(&sessions.unwrap_err()), "CALLER_NOT_ALLOWED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_opens_streams() {
    let authority = Authority::new();
    let app = secured(&authority).await;
    let user = app.user().create().await;
    let billing = authority.dns("billing.example.test");
    let billing = authority.channel(app.address, Some(&billing));
    let mut usage = UsageServiceClient::new(billing.clone());
    let batch = StreamUsageRequest {
        offset: 0,
        events: vec![event(&user.id)],
    };
    let answers = usage.stream_usage(tokio_stream::iter([batch])).await;
    let answer = answers.unwrap().into_inner().message().await.unwrap();
    assert_eq!(answer.expect("settled").recorded, 1);
    let request = ExportUsageRequest {
        user_id: user.id.clone(),
        ..ExportUsageRequest::default()
    };
    let file = usage.export_usage(request).await.unwrap().into_inner();
    let file: Vec<_> = file.try_collect().await.unwrap();
    let Some(Content::Summary(summary)) = &file.last().unwrap().content else {
        panic!("{file:?}");
    };
    assert_eq!(summary.record_count, 1);
    let mut auth = AuthServiceClient::new(billing);
    let request = WatchRevocationsRequest::default();
    let mut told = auth.watch_revocations(request).await.unwrap().into_inner();
    for _ in 0..3 {
        told.message().await.unwrap().expect("it goes on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_known_certificate_only_keys_and_tokens_open_anything() {
    let authority = Authority::new();
    let app = secured(&authority).await;
    let user = app.user().create().await;
    let stranger = authority.uri("spiffe://example.test/ns/stranger");
    for shows in [None, Some(&stranger)] {
        let channel = authority.channel(app.address, shows);
        let nobody = check_through(&channel).await.unwrap_err();
        assert_eq!(reason(&nobody), "CREDENTIAL_MISSING");
        let token = login_through(&channel, &user.email, PASSWORD)
            .await
            .unwrap();
        let validated = validate_through(&channel, &app.service_key, &token.access_token).await;
        assert_eq!(validated.unwrap().user_id, user.id);
    }
    // A key that is shown counts, not the certificate beside it.
    let edge = authority.channel(app.address, Some(&authority.uri(EDGE)));
    let mut client = AuthorizationClient::new(edge);
    let garbage = client.check(with_bearer(asking(&[], &[]), "garbage")).await;
    assert_eq!(reason(&garbage.unwrap_err()), "CREDENTIAL_INVALID");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_of_the_other_kind_or_a_uri_in_another_case_is_nobody() {
    let authority = Authority::new();
    let app = secured(&authority).await;
    let user = app.user().create().await;
    let other_case = authority.uri(&EDGE.replace("/edge", "/Edge"));
    let edge = authority.channel(app.address, Some(&other_case));
    let nobody = check_through(&edge).await.unwrap_err();
    assert_eq!(reason(&nobody), "CREDENTIAL_MISSING");
    // A URI that reads like the name of a host.
    let alike = authority.uri("quota.example.test");
    let quota = authority.channel(app.address, Some(&alike));
    let nobody = check_quota_through(&quota, &user.id).await.unwrap_err();
    assert_eq!(reason(&nobody), "CREDENTIAL_MISSING");
    // Of the name of a host the case does not count.
    let other_case = authority.dns("Quota.Example.Test");
    let quota = authority.channel(app.address, Some(&other_case));
    check_quota_through(&quota, &user.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_and_certificates_of_others_do_not_get_as_far_as_a_call() {
    let (authority, other) = (Authority::new(), Authority::new());
    let app = secured(&authority).await;
    let forged = authority.channel(app.address, Some(&other.uri(EDGE)));
    let plaintext = app.running().channel();
    // It does not trust the server.
    let misled = other.channel(app.address, Some(&authority.uri(EDGE)));
    for (what, channel) in [
        ("forged", forged),
        ("plaintext", plaintext),
        ("misled", misled),
    ] {
        let status = check_through(&channel).await.unwrap_err();
        // Which of its words it finds for that depends on the moment.
        let source = std::error::Error::source(&status);
        let is_of_transport = source.is_some_and(|source| source.is::<tonic::transport::Error>());
        assert!(is_of_transport, "{what}: {status:?}");
    }
    // Who is refused takes nothing from others.
    let edge = authority.channel(app.address, Some(&authority.uri(EDGE)));
    assert_eq!(refused(check_through(&edge).await.unwrap()).0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_shake_hands_gives_the_place_back() {
    let authority = Authority::new();
    let app = TestApp::spawn_with(|settings| {
        speak_tls(settings, &authority);
        settings.server.max_connections = 2;
    })
    .await;
    let mut silent = Vec::new();
    // Nothing, and the beginning of a handshake.
    for said in [&b""[..], b"\x16\x03\x01"] {
        let mut stream = TcpStream::connect(app.address).await.unwrap();
        stream.write_all(said).await.unwrap();
        silent.push(stream);
    }
    // It has to wait for a place.
    let edge = authority.channel(app.address, Some(&authority.uri(EDGE)));
    let answer = timeout(Duration::from_secs(30), check_through(&edge)).await;
    assert_eq!(refused(answer.expect("a place in time").unwrap()).0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_read_again_without_a_restart() {
    let (old, new) = (Authority::new(), Authority::new());
    let app = secured(&old).await;
    let before = old.channel(app.address, Some(&old.uri(EDGE)));
    check_through(&before).await.unwrap();
    let mut settings = app.settings().clone();
    speak_tls(&mut settings, &new);
    let tls = app.running().tls.as_ref().expect("it speaks TLS");
    tls.reload(&settings.tls).expect("read");
    let after = new.channel(app.address, Some(&new.uri(EDGE)));
    check_through(&after).await.unwrap();
    let late = old.channel(app.address, Some(&old.uri(EDGE)));
    check_through(&late).await.unwrap_err();
    // Who was connected stays so.
    check_through(&before).await.unwrap();
    // What cannot be used changes nothing.
    settings.tls.key_file = old.server().key;
    tls.reload(&settings.tls).expect_err("another key");
    settings.tls.key_file = "nowhere.pem".into();
    tls.reload(&settings.tls).expect_err("no file");
    let still = new.channel(app.address, Some(&new.uri(EDGE)));
    check_through(&still).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_asks_by_its_certificate_as_the_configuration_shows() {
    let authority = Authority::new();
    let app = secured(&authority).await;
    let user = app.user().tier("starter").create().await;
    let authorization = format!("Bearer {}", app.login(&user).await.access_token);
    let upstream = Upstream::start().await;
    let (edge, stranger) = (
        authority.uri(EDGE),
        authority.uri("spiffe://example.test/x"),
    );
    for (shows, status) in [(edge, 200), (stranger, 503)] {
        let edge = Edge::start_with(app.address, "", upstream.address, |delivered| {
            let with_tls = uncommented(&delivered, "transport_socket:");
            let without_key = without(&with_tls, "initial_metadata:", 2);
            // Only the cluster that asks shows a certificate, not the one for REST.
            [
                ("/etc/envoy/tls/edge.pem", &shows.certificate, 1),
                ("/etc/envoy/tls/edge.key", &shows.key, 1),
                ("/etc/envoy/tls/ca.pem", &authority.ca, 2),
            ]
            .into_iter()
            .fold(without_key, |text, (path, own, count)| {
                assert_eq!(text.matches(path).count(), count, "{path}");
                text.replace(path, own.to_str().expect("UTF-8"))
            })
        })
        .await;
        // A gateway that has just started connects first.
        eventually("the gateway answers", async || {
            let answer = edge.get("/", &[("authorization", &authorization)]).await;
            answer.status.as_u16() == status
        })
        .await;
        let answer = edge.get("/", &[("authorization", &authorization)]).await;
        assert_eq!(answer.status.as_u16(), status, "{}", edge.log());
        // REST is its clients', whatever the gateway shows for itself.
        let headers = [("authorization", authorization.as_str())];
        let me = edge.get("/api/auth/me", &headers).await;
        assert_eq!(me.status.as_u16(), 200, "{}", edge.log());
        assert_eq!(me.json().await["user"]["id"], user.id.as_str());
        let nobody = edge.get("/api/auth/me", &[]).await;
        assert_eq!(nobody.status.as_u16(), 401);
        assert_eq!(
            nobody.json().await["details"][0]["reason"],
            "CREDENTIAL_MISSING"
        );
    }
}

/// The configuration with blocks that are commented out there.
fn uncommented(text: &str, block: &str) -> String {
    let mut inside = false;
    let lines = text.lines().map(|line| {
        let bare = line.trim_start();
        inside = bare.starts_with("# ") && (inside || bare == format!("# {block}"));
        if inside {
            line.replacen("# ", "", 1)
        } else {
            line.to_owned()
        }
    });
    let lines: Vec<_> = lines.collect();
    assert!(lines.iter().any(|line| line.trim() == block), "{block}");
    lines.join("\n")
}

/// The configuration without a line of it and those that follow, `count` in all.
fn without(text: &str, first: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    let at = lines.iter().position(|line| line.trim() == first);
    let at = at.unwrap_or_else(|| panic!("no {first}"));
    [&lines[..at], &lines[at + count..]].concat().join("\n")
}
