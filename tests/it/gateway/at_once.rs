//! What memory alone answers, or the ledger alone, before the machinery for calls that wait.

use std::{convert::Infallible, future::ready, time::Duration};

use bytes::{BufMut as _, Bytes};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use prost::Message;
use tokio::sync::watch;
use tollkeeper::{
    grpc::{CallEnd, CallMetrics, MemoryLayer, Rules},
    proto::{
        DESCRIPTOR_SET,
        envoy::service::{
            auth::v3::{CheckResponse, OkHttpResponse},
            ratelimit::v3::RateLimitResponse,
        },
        tollkeeper::usage::v1::{
            CheckQuotaRequest, CheckQuotaResponse, RecordUsageRequest, RecordUsageResponse,
            ReserveQuotaRequest, ReserveQuotaResponse, UsageEvent, record_usage_response::Outcome,
        },
    },
};
use tonic::{Status, body::Body};
use tower::{Layer as _, Service as _};

use super::{
    asking, check,
    limits::{about, asking_for, limit, limit_through},
    metadata, passed,
};
use crate::{
    harness::TestApp,
    usage::{event, quota::with_tiers},
};

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
const CHECK_QUOTA: &str = "/tollkeeper.usage.v1.UsageService/CheckQuota";
const RECORD_USAGE: &str = "/tollkeeper.usage.v1.UsageService/RecordUsage";
const RESERVE_QUOTA: &str = "/tollkeeper.usage.v1.UsageService/ReserveQuota";
const LIMIT: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";

/// Asks memory as a gateway with a key; `None`: it leaves the call to the long way.
async fn at_once<M: Message + Default>(
    app: &TestApp,
    key: &str,
    path: &str,
    message: &impl Message,
) -> Option<M> {
    // From now on the key is known; a service that is made meanwhile puts all keys in doubt.
    let _ = limit_through(&app.channel, key, Vec::new()).await;
    let rules = Rules::from_descriptor_set(DESCRIPTOR_SET).unwrap();
    let metrics = CallMetrics::new(&rules);
    let server = app.running();
    let end = CallEnd::new(Duration::from_secs(30), watch::channel(false).1);
    let (auth, usage) = (server.auth.clone(), server.usage.clone());
    let memory = MemoryLayer::new(auth, usage, &rules, &metrics, 10_000, end);
    let long = |_| {
        ready(Ok::<Response<Body>, Infallible>(
            Status::aborted("the long way").into_http(),
        ))
    };
    let mut frame = vec![0];
    frame.put_u32(u32::try_from(message.encoded_len()).unwrap());
    message.encode(&mut frame).unwrap();
    let request = Request::post(path)
        .header("content-type", "application/grpc")
        .header("authorization", format!("Bearer {key}"))
        .body(Body::new(Full::new(Bytes::from(frame))))
        .unwrap();
    let answer = memory
        .layer(tower::service_fn(long))
        .call(request)
        .await
        .unwrap();
    // With a status among the headers it comes from behind.
    if answer.headers().contains_key("grpc-status") {
        return None;
    }
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    Some(M::decode(&body[5..]).unwrap())
}

/// The seconds until a limit is reset, which are cut off the header that says them, if there is one.
fn until_reset(answer: &mut OkHttpResponse) -> Option<i64> {
    let headers = answer.response_headers_to_add.iter_mut();
    let mut headers = headers.filter_map(|option| option.header.as_mut());
    let standing = headers.find(|header| header.key == "ratelimit")?;
    let (cut, seconds) = standing.value.rsplit_once(";t=").unwrap();
    let seconds = seconds.parse().unwrap();
    standing.value = cut.to_owned();
    Some(seconds)
}

#[tokio::test(flavor = "multi_thread")]
async fn good_news_that_memory_knows_is_told_at_once_and_all_else_the_long_way() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let (_, unfit) = app.service("unfit", &["quota"]).await;
    let authorization = format!("Bearer {}", app.login(&user).await.access_token);
    let sent = [
        ("authorization", authorization.as_str()),
        ("x-request-id", "one"),
        ("x-user-id", "somebody-else"),
    ];
    let hold = [
        ("quota", "reserve"),
        ("model", "a-model"),
        ("estimate", "10"),
    ];
    let at = async |key: &str, extensions: &[(&str, &str)]| {
        at_once::<CheckResponse>(&app, key, CHECK, &asking(&sent, extensions)).await
    };
    // Nobody has asked about the token yet.
    assert!(at(&key, &[]).await.is_none());
    for extensions in [&[][..], &[("quota", "look")], &hold] {
        let long = check(&app, &sent, extensions).await.unwrap();
        let short = at(&key, extensions).await.expect("it is known");
        let facts = metadata(long.dynamic_metadata.clone());
        let mut told = metadata(short.dynamic_metadata.clone());
        // The same hold; its handle is written anew.
        if let Some(handle) = told.get_mut("reservation") {
            handle.clone_from(&facts["reservation"]);
        }
        assert_eq!(told, facts, "{extensions:?}");
        let (mut long, mut short) = (passed(long), passed(short));
        // The same end; a second may have begun in between.
        let until = until_reset(&mut long).zip(until_reset(&mut short));
        let later = until.map(|(long, short)| long - short);
        assert!(
            later.is_none_or(|seconds| (0..60).contains(&seconds)),
            "{later:?}"
        );
        assert_eq!(short, long, "{extensions:?}");
        assert!(at(&unfit, extensions).await.is_none());
    }
    for refused in [
        &[("tier", "large")][..],
        &[("teir", "small")],
        &[("quota", "look"), ("estimate", "61")],
        &[("quota", "look"), ("estimate", "60"), ("model", "")],
    ] {
        assert!(at(&key, refused).await.is_none(), "{refused:?}");
    }

    let at = async |descriptors| {
        let message = asking_for(descriptors);
        at_once::<RateLimitResponse>(&app, &key, LIMIT, &message).await
    };
    let ask = |op: &str, tokens| about(op, &user.id, "two", tokens);
    for op in ["check", "reserve"] {
        let long = limit(&app, vec![ask(op, 5)]).await.unwrap();
        let short = at(vec![ask(op, 5)]).await.expect("it is known");
        assert_eq!(short.overall_code, long.overall_code);
        assert_eq!(
            short.statuses[0].limit_remaining,
            long.statuses[0].limit_remaining
        );
    }
    for left in [
        vec![ask("check", 95)],
        vec![ask("check", 5), ask("check", 5)],
        vec![ask("commit", 5)],
        vec![ask("release", 5)],
        vec![ask("chek", 5)],
        vec![],
    ] {
        assert!(at(left.clone()).await.is_none(), "{left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn services_are_told_at_once_what_a_known_user_may_use() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let (_, key) = app.service("chat", &["quota"]).await;
    let ask = |tokens| CheckQuotaRequest {
        user_id: user.clone(),
        tokens,
        model: "a-model".to_owned(),
    };
    let at =
        async |tokens| at_once::<CheckQuotaResponse>(&app, &key, CHECK_QUOTA, &ask(tokens)).await;
    let mut usage = app.usage(&key);
    let long = usage.check_quota(ask(5)).await.unwrap().into_inner();
    assert_eq!(at(5).await.expect("it is known"), long);
    assert!(at(101).await.is_none());
    assert!(at(-1).await.is_none());

    let ask = |tokens| ReserveQuotaRequest {
        user_id: user.clone(),
        request_id: "one".to_owned(),
        model: "a-model".to_owned(),
        tokens,
        ..ReserveQuotaRequest::default()
    };
    let at = async |tokens| {
        at_once::<ReserveQuotaResponse>(&app, &key, RESERVE_QUOTA, &ask(tokens)).await
    };
    let long = usage.reserve_quota(ask(5)).await.unwrap().into_inner();
    let short = at(5).await.expect("it is known");
    // The same hold; its handle is written anew.
    assert_eq!((short.tokens, short.quota), (long.tokens, long.quota));
    assert!(at(0).await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_booked_is_told_the_short_way_and_all_else_the_long_way() {
    let app = TestApp::spawn().await;
    let (known, unknown) = (app.user().create().await, app.user().create().await);
    let (_, key) = app.service("edge", &["gateway", "usage.write"]).await;
    let (_, unfit) = app.service("unfit", &["gateway"]).await;
    let at = async |key: &str, event: &UsageEvent| {
        let request = RecordUsageRequest {
            event: Some(event.clone()),
        };
        let told = at_once::<RecordUsageResponse>(&app, key, RECORD_USAGE, &request).await;
        told.map(|told| told.outcome())
    };
    let first = event(&known.id);
    app.record(&first).await.unwrap();
    assert_eq!(at(&key, &first).await, Some(Outcome::Duplicate));
    assert_eq!(at(&key, &event(&known.id)).await, Some(Outcome::Recorded));
    let mut others = vec![event(&unknown.id), event(&known.id), first];
    others[1].model = String::new();
    others[2].model = "another".to_owned();
    for event in &others {
        assert_eq!(at(&key, event).await, None, "{event:?}");
    }
    assert_eq!(at(&unfit, &event(&known.id)).await, None);
    app.assert_books_balance(2).await;
}
