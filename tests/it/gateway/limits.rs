//! `ShouldRateLimit`: whether a user may use tokens, and what was used.

use std::time::Duration;

use chrono::{TimeDelta, Utc};
use tokio::time::{Instant, timeout};
use tollkeeper::{
    error::Error,
    model::{Period, TokenCounts, UserStanding},
    proto::{
        envoy::{
            extensions::common::ratelimit::v3::{
                RateLimitDescriptor, rate_limit_descriptor::Entry,
            },
            service::ratelimit::v3::{
                RateLimitRequest, RateLimitResponse,
                rate_limit_response::{Code as Verdict, rate_limit::Unit},
                rate_limit_service_client::RateLimitServiceClient,
            },
        },
        tollkeeper::usage::v1::ListUsageRecordsRequest,
    },
    usage::{Recorded, RequestName, WhenFull},
};
use tonic::{Code, Status, transport::Channel};

use super::{edge::held, metadata, unique};
use crate::{
    harness::{Blocker, TestApp, cluster, eventually, with_bearer},
    usage::{
        quota::{use_tokens, with_tiers},
        reservations::Client,
    },
};

fn entry((key, value): (&str, &str)) -> Entry {
    Entry {
        key: key.to_owned(),
        value: value.to_owned(),
    }
}

/// A descriptor of a gateway.
fn descriptor(entries: &[(&str, &str)], hits_addend: Option<u64>) -> RateLimitDescriptor {
    RateLimitDescriptor {
        entries: entries.iter().copied().map(entry).collect(),
        hits_addend,
        is_negative_hits: false,
    }
}

/// One that is about a request.
pub(super) fn about(op: &str, user: &str, request: &str, tokens: u64) -> RateLimitDescriptor {
    let entries = [
        ("op", op),
        ("user", user),
        ("model", "a-model"),
        ("request_id", request),
    ];
    descriptor(&entries, Some(tokens))
}

fn with(mut descriptor: RateLimitDescriptor, key: &str, value: &str) -> RateLimitDescriptor {
    descriptor.entries.push(entry((key, value)));
    descriptor
}

pub(super) fn asking_for(descriptors: Vec<RateLimitDescriptor>) -> RateLimitRequest {
    RateLimitRequest {
        descriptors,
        hits_addend: 0,
    }
}

pub(super) async fn limit_through(
    channel: &Channel,
    key: &str,
    descriptors: Vec<RateLimitDescriptor>,
) -> Result<RateLimitResponse, Status> {
    let request = asking_for(descriptors);
    let mut client = RateLimitServiceClient::new(channel.clone());
    let answer = client.should_rate_limit(with_bearer(request, key)).await?;
    Ok(answer.into_inner())
}

/// Asks, as a gateway with a key.
pub(super) async fn limit(
    app: &TestApp,
    descriptors: Vec<RateLimitDescriptor>,
) -> Result<RateLimitResponse, Status> {
    let (_, key) = app.service(&unique("gateway"), &["gateway"]).await;
    limit_through(&app.channel, &key, descriptors).await
}

async fn verdict(app: &TestApp, descriptor: RateLimitDescriptor) -> Verdict {
    let answer = limit(app, vec![descriptor]).await.unwrap();
    assert_eq!(answer.statuses.len(), 1);
    assert_eq!(answer.statuses[0].code, answer.overall_code);
    answer.overall_code()
}

/// Tokens of the month, as everybody reads them.
async fn used(app: &TestApp, user: &str) -> i64 {
    let totals = app.month(user, "").await.totals.unwrap_or_default();
    let tokens = totals.tokens.unwrap_or_default();
    tokens.input + tokens.output + tokens.cached_input + tokens.cache_write + tokens.reasoning
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_consumes_nothing_and_tells_limit_remaining_and_reset() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    use_tokens(&app, &user, 70).await;
    let check = |tokens| descriptor(&[("op", "check"), ("user", &user)], tokens);
    for _ in 0..3 {
        let answer = limit(&app, vec![check(Some(30))]).await.unwrap();
        assert_eq!(answer.overall_code(), Verdict::Ok);
        let told = &answer.statuses[0];
        let of = told.current_limit.as_ref().unwrap();
        assert_eq!((of.requests_per_unit, of.unit()), (100, Unit::Month));
        assert_eq!(told.limit_remaining, 30);
        assert!(told.duration_until_reset.as_ref().unwrap().seconds > 0);
        assert_eq!(metadata(answer.dynamic_metadata)["remaining_tokens"], "30");
    }
    let answer = limit(&app, vec![check(Some(31))]).await.unwrap();
    assert_eq!(answer.overall_code(), Verdict::OverLimit);
    let told = answer.response_headers_to_add.iter();
    let told: Vec<_> = told.map(|header| header.key.as_str()).collect();
    for name in [
        "ratelimit",
        "ratelimit-policy",
        "retry-after",
        "content-type",
    ] {
        assert!(told.contains(&name), "{name}");
    }
    // Nothing that says who somebody is: these headers are added to what is there.
    assert!(!told.iter().any(|name| name.starts_with("x-user")));
    let body: serde_json::Value = serde_json::from_slice(&answer.raw_body).unwrap();
    assert_eq!(body["code"], "QUOTA_EXCEEDED");
    // Equal to the limit is over, also for a look.
    assert_eq!(verdict(&app, check(Some(0))).await, Verdict::Ok);
    use_tokens(&app, &user, 30).await;
    assert_eq!(verdict(&app, check(Some(0))).await, Verdict::OverLimit);
    assert_eq!(verdict(&app, check(None)).await, Verdict::OverLimit);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_reserved_is_committed_once_by_its_request_id_however_often_it_is_told() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    for _ in 0..3 {
        assert_eq!(
            verdict(&app, about("reserve", &user, "one", 60)).await,
            Verdict::Ok
        );
    }
    assert_eq!(
        verdict(&app, about("reserve", &user, "two", 41)).await,
        Verdict::OverLimit
    );
    for _ in 0..3 {
        assert_eq!(
            verdict(&app, about("commit", &user, "one", 25)).await,
            Verdict::Ok
        );
    }
    assert_eq!(used(&app, &user).await, 25);
    app.assert_books_balance(1).await;
    // The rest of the hold is free again.
    assert_eq!(
        verdict(&app, about("reserve", &user, "two", 60)).await,
        Verdict::Ok
    );
    // Another number for the same request is no second charge.
    assert_eq!(
        verdict(&app, about("commit", &user, "one", 26)).await,
        Verdict::OverLimit
    );
    assert_eq!(used(&app, &user).await, 25);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handle_is_committed_through_another_server() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let user = app.user().tier("small").create().await.id;
    let reserved = limit(&app, vec![about("reserve", &user, "one", 60)])
        .await
        .unwrap();
    let handle = metadata(reserved.dynamic_metadata)["reservation"].clone();
    let (_, key) = app.service("there", &["gateway"]).await;
    let commit = with(about("commit", &user, "one", 25), "reservation", &handle);
    for _ in 0..2 {
        let answer = limit_through(&replica.channel(), &key, vec![commit.clone()]).await;
        assert_eq!(answer.unwrap().overall_code(), Verdict::Ok);
    }
    assert_eq!(used(&app, &user).await, 25);
    eventually("the owner hears of it", async || {
        verdict(&app, about("check", &user, "-", 60)).await == Verdict::Ok
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_charge_without_a_reservation_is_booked_once_also_beyond_the_limit() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    for _ in 0..3 {
        assert_eq!(
            verdict(&app, about("charge", &user, "one", 150)).await,
            Verdict::Ok
        );
    }
    assert_eq!(used(&app, &user).await, 150);
    app.assert_books_balance(1).await;
    // It was used: what comes next is refused.
    assert_eq!(
        verdict(&app, about("check", &user, "-", 1)).await,
        Verdict::OverLimit
    );
    let request = ListUsageRecordsRequest {
        user_id: user.clone(),
        ..ListUsageRecordsRequest::default()
    };
    let records = app
        .usage(&app.service_key)
        .list_usage_records(request)
        .await;
    let event = records
        .unwrap()
        .into_inner()
        .records
        .remove(0)
        .event
        .unwrap();
    assert_eq!(
        (event.request_id.as_str(), event.model.as_str()),
        ("one", "a-model")
    );
    // A commit of the same request is the same charge.
    assert_eq!(
        verdict(&app, about("commit", &user, "one", 150)).await,
        Verdict::Ok
    );
    assert_eq!(used(&app, &user).await, 150);
    // Nothing is charged by a look.
    assert_eq!(
        verdict(&app, about("charge", &user, "two", 0)).await,
        Verdict::OverLimit
    );
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_dimensions_of_a_request_are_booked_as_one_event() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    let charge = |dimension: &str, tokens| {
        with(
            about("charge", &user, "one", tokens),
            "dimension",
            dimension,
        )
    };
    let told = vec![
        charge("input", 30),
        charge("output", 7),
        charge("reasoning", 2),
    ];
    for _ in 0..2 {
        let answer = limit(&app, told.clone()).await.unwrap();
        assert_eq!(answer.statuses.len(), 3);
        assert_eq!(answer.overall_code(), Verdict::Ok);
    }
    let month = app.month(&user, "").await.totals.unwrap();
    let tokens = month.tokens.unwrap();
    assert_eq!((tokens.input, tokens.output, tokens.reasoning), (30, 7, 2));
    assert_eq!(month.request_count, 1);
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_released_or_committed_with_nothing_can_be_had_again_at_once() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let free = async || {
        eventually("it is free again", async || {
            verdict(&app, about("check", &user, "-", 60)).await == Verdict::Ok
        })
        .await;
    };
    for (op, tokens) in [("release", 1), ("commit", 0)] {
        let request = unique("request");
        assert_eq!(
            verdict(&app, about("reserve", &user, &request, 60)).await,
            Verdict::Ok
        );
        assert_eq!(
            verdict(&app, about("check", &user, "-", 60)).await,
            Verdict::OverLimit
        );
        for _ in 0..2 {
            assert_eq!(
                verdict(&app, about(op, &user, &request, tokens)).await,
                Verdict::Ok
            );
        }
        free().await;
    }
    // At the end of a stream both are told; what was used is charged.
    let reserved = limit(&app, vec![about("reserve", &user, "last", 60)])
        .await
        .unwrap();
    let handle = metadata(reserved.dynamic_metadata)["reservation"].clone();
    let release = with(about("release", &user, "last", 1), "reservation", &handle);
    let commit = with(about("commit", &user, "last", 40), "reservation", &handle);
    let answer = limit(&app, vec![release, commit]).await.unwrap();
    assert_eq!(answer.overall_code(), Verdict::Ok);
    assert_eq!(used(&app, &user).await, 40);
    free().await;
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_descriptor_that_is_over_denies_all_and_holds_nothing() {
    let (app, _tiers) = with_tiers().await;
    let (user, other) = (app.user().tier("small"), app.user().tier("none"));
    let (user, other) = (user.create().await.id, other.create().await.id);
    let descriptors = vec![
        about("reserve", &user, "one", 60),
        about("check", &other, "-", 1),
        about("charge", &user, "before", 10),
    ];
    let answer = limit(&app, descriptors).await.unwrap();
    assert_eq!(answer.overall_code(), Verdict::OverLimit);
    let codes: Vec<_> = answer.statuses.iter().map(|status| status.code()).collect();
    assert_eq!(codes, [Verdict::Ok, Verdict::OverLimit, Verdict::Ok]);
    assert!(!metadata(answer.dynamic_metadata).contains_key("reservation"));
    // What was used was used, whatever else was denied.
    assert_eq!(used(&app, &user).await, 10);
    eventually("what was held is free again", async || {
        verdict(&app, about("reserve", &user, &unique("again"), 60)).await == Verdict::Ok
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_reservations_do_not_overspend() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let (_, key) = app.service("many", &["gateway"]).await;
    let asks = (0..40).map(|n| {
        let descriptor = about("reserve", &user, &format!("request-{n}"), 10);
        let (channel, key) = (app.channel.clone(), key.clone());
        async move {
            limit_through(&channel, &key, vec![descriptor])
                .await
                .unwrap()
        }
    });
    let answers = futures_util::future::join_all(asks).await;
    let admitted = answers
        .iter()
        .filter(|answer| answer.overall_code() == Verdict::Ok);
    assert_eq!(admitted.count(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_users_missing_markers_and_disabled_users_are_denied() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    let disabled = app.user().tier("large").create().await.id;
    app.disable(&disabled).await;
    let nobody = "01890a5d-ac96-774b-bcce-b302099a8057";
    for (denied, reason) in [
        (descriptor(&[], Some(1)), "INVALID_FIELD"),
        (descriptor(&[("op", "check")], Some(1)), "INVALID_FIELD"),
        (descriptor(&[("user", &user)], Some(1)), "INVALID_FIELD"),
        (about("check", "__missing__", "r", 1), "INVALID_FIELD"),
        (about("check", nobody, "r", 1), "USER_NOT_FOUND"),
        (about("charge", nobody, "r", 1), "USER_NOT_FOUND"),
        (about("commit", nobody, "r", 1), "USER_NOT_FOUND"),
        (about("reserve", &disabled, "r", 1), "ACCOUNT_DISABLED"),
        (about("check", &disabled, "r", 1), "ACCOUNT_DISABLED"),
        (about("reserve", &user, "__missing__", 1), "INVALID_FIELD"),
        (
            about("charge", &user, "r", 1_000_000_000_001),
            "INVALID_FIELD",
        ),
        (
            with(about("charge", &user, "r", 1), "path", "/"),
            "INVALID_FIELD",
        ),
        (
            with(about("commit", &user, "r", 1), "reservation", "forged"),
            "RESERVATION_INVALID",
        ),
    ] {
        let answer = limit(&app, vec![denied.clone()]).await.unwrap();
        assert_eq!(answer.overall_code(), Verdict::OverLimit, "{denied:?}");
        let facts = metadata(answer.dynamic_metadata);
        assert_eq!(facts["reason"], reason, "{denied:?}");
    }
    app.assert_books_balance(0).await;
    let status = limit(&app, Vec::new()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_without_a_limit_has_no_number() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("open").create().await.id;
    let answer = limit(&app, vec![about("check", &user, "-", 1_000_000)])
        .await
        .unwrap();
    assert_eq!(answer.overall_code(), Verdict::Ok);
    assert_eq!(answer.statuses[0].current_limit, None);
    assert_eq!(answer.statuses[0].limit_remaining, u32::MAX);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_gateway_and_a_service_hold_for_a_request_is_one_hold() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let reserved = limit(&app, vec![about("reserve", &user, "one", 60)])
        .await
        .unwrap();
    let handle = metadata(reserved.dynamic_metadata)["reservation"].clone();
    Client::of(&app).commit(&handle, 33).await.unwrap();
    assert_eq!(
        verdict(&app, about("commit", &user, "one", 33)).await,
        Verdict::Ok
    );
    assert_eq!(used(&app, &user).await, 33);
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_is_away_the_call_fails_and_recovers_by_itself() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.quota.replica_ttl = std::time::Duration::from_secs(2);
        settings.quota.recall_bound = std::time::Duration::from_secs(1);
        settings.database.statement_timeout = std::time::Duration::from_secs(2);
        settings.database.acquire_timeout = std::time::Duration::from_millis(500);
        settings.auth.max_stale = std::time::Duration::from_secs(60);
    })
    .await;
    let user = app.user().create().await.id;
    let (_, key) = app.service("gateway", &["gateway"]).await;
    let check = async || {
        let check = vec![about("check", &user, "-", 1)];
        limit_through(&app.channel, &key, check).await
    };
    assert_eq!(check().await.unwrap().overall_code(), Verdict::Ok);
    proxy.cut();
    eventually("nobody can tell", async || {
        check()
            .await
            .is_err_and(|status| status.code() == Code::Unavailable)
    })
    .await;
    proxy.resume();
    eventually("it can be told again", async || {
        check()
            .await
            .is_ok_and(|answer| answer.overall_code() == Verdict::Ok)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_waits_for_room_in_a_full_ledger_and_keeps_its_hold_until_then() {
    const ROOM: usize = 4;
    let app = TestApp::spawn_with(|settings| settings.usage.queue_events = ROOM).await;
    let user = app.user().tier("advanced").create().await.id;
    let answer = limit(&app, vec![about("reserve", &user, "r", 500)]).await;
    let handle = metadata(answer.unwrap().dynamic_metadata)["reservation"].clone();
    let (_, key) = app.service("edge", &["gateway"]).await;
    let ask = |descriptors| {
        let (channel, key) = (app.channel.clone(), key.clone());
        tokio::spawn(async move { limit_through(&channel, &key, descriptors).await })
    };
    let blocker = Blocker::lock(&app, "usage_records").await;
    let charges: Vec<_> = (0..ROOM)
        .map(|n| ask(vec![about("charge", &user, &format!("charge-{n}"), 1)]))
        .collect();
    let backlog = || {
        let (waiting, writing) = app.running().usage.backlog();
        waiting + writing
    };
    eventually("the queue is full", async || backlog() == ROOM).await;
    let mut settled = ask(vec![
        with(about("commit", &user, "r", 30), "reservation", &handle),
        with(about("settle", &user, "r", 500), "reservation", &handle),
        with(about("release", &user, "r", 0), "reservation", &handle),
    ]);
    let early = timeout(Duration::from_secs(1), &mut settled).await;
    assert!(early.is_err(), "{early:?}");
    assert_eq!(held(&app, &user).await, 500);
    blocker.release().await;
    for answer in charges {
        assert_eq!(answer.await.unwrap().unwrap().overall_code(), Verdict::Ok);
    }
    let answer = settled.await.unwrap().unwrap();
    let codes: Vec<_> = answer.statuses.iter().map(|status| status.code()).collect();
    assert_eq!(codes, [Verdict::Ok; 3]);
    assert_eq!(used(&app, &user).await, 30 + ROOM as i64);
    eventually("nothing stays held", async || held(&app, &user).await == 0).await;
    app.assert_books_balance(ROOM as i64 + 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_room_when_its_gateway_has_gone_is_booked_before_the_server_stops() {
    const ROOM: usize = 4;
    let app = TestApp::spawn_with(|settings| settings.usage.queue_events = ROOM).await;
    let user = app.user().tier("advanced").create().await.id;
    let (_, key) = app.service("edge", &["gateway"]).await;
    let ask = |request: &str| {
        let (channel, key) = (app.channel.clone(), key.clone());
        let charge = about("charge", &user, request, 1);
        tokio::spawn(async move { limit_through(&channel, &key, vec![charge]).await })
    };
    let blocker = Blocker::lock(&app, "usage_records").await;
    let charges: Vec<_> = (0..ROOM).map(|n| ask(&format!("charge-{n}"))).collect();
    let backlog = || {
        let (waiting, writing) = app.running().usage.backlog();
        waiting + writing
    };
    eventually("the queue is full", async || backlog() == ROOM).await;
    let mut late = ask("late");
    let early = timeout(Duration::from_secs(1), &mut late).await;
    assert!(early.is_err(), "{early:?}");
    // So nothing is in flight that the server would wait for.
    charges.iter().for_each(|charge| charge.abort());
    late.abort();
    let (address, url) = (app.address, app.database_url.clone());
    let stopping = tokio::spawn(app.stop());
    eventually("new connections are refused", async || {
        tokio::net::TcpStream::connect(address).await.is_err()
    })
    .await;
    let early = timeout(Duration::from_secs(3), async {
        while !stopping.is_finished() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(early.await.is_err(), "waits for what waits");
    blocker.release().await;
    stopping.await.unwrap().unwrap();
    let client = cluster::connect(&url).await;
    let booked = "SELECT count(*) FROM usage_records";
    let booked: i64 = client.query_one(booked, &[]).await.unwrap().get(0);
    assert_eq!(booked, ROOM as i64 + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_booked_before_the_turn_of_a_month_counts_once_when_it_is_told_after() {
    let app = TestApp::spawn().await;
    let user = app.user().tier("advanced").create().await.id;
    let standing = UserStanding {
        id: user.parse().unwrap(),
        tier: "advanced".parse().unwrap(),
        is_active: true,
    };
    let usage = &app.running().usage;
    let turn = Period::containing(Utc::now()).start();
    let charge = async |request: &str, output, at| {
        let request = RequestName {
            request_id: request.parse().unwrap(),
            model: "a-model".parse().unwrap(),
        };
        let tokens = TokenCounts {
            output,
            ..TokenCounts::default()
        };
        usage
            .charge_at(&standing, &request, tokens, WhenFull::Refuse, at)
            .await
    };
    let (before, after) = (turn - TimeDelta::seconds(1), turn + TimeDelta::minutes(59));
    assert_eq!(charge("old", 7, before).await.unwrap(), Recorded::Now);
    assert_eq!(charge("old", 7, after).await.unwrap(), Recorded::Before);
    // Other numbers are refused there as they are within a month.
    let other = charge("old", 8, after).await.unwrap_err();
    assert!(matches!(other, Error::EventConflict), "{other:?}");
    assert_eq!(charge("new", 5, after).await.unwrap(), Recorded::Now);
    assert_eq!(charge("new", 5, after).await.unwrap(), Recorded::Before);
    assert_eq!(used(&app, &user).await, 5);
    app.assert_books_balance(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_turn_of_a_month_what_waits_for_room_outlasts_the_absence_of_the_database() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.database.acquire_timeout = Duration::from_millis(500);
    })
    .await;
    let user = app.user().tier("advanced").create().await.id;
    let standing = UserStanding {
        id: user.parse().unwrap(),
        tier: "advanced".parse().unwrap(),
        is_active: true,
    };
    let request = RequestName {
        request_id: "r".parse().unwrap(),
        model: "a-model".parse().unwrap(),
    };
    let tokens = TokenCounts {
        output: 5,
        ..TokenCounts::default()
    };
    let usage = app.running().usage.clone();
    let at = Period::containing(Utc::now()).start() + TimeDelta::minutes(1);
    proxy.cut();
    let refused = usage
        .charge_at(&standing, &request, tokens, WhenFull::Refuse, at)
        .await
        .unwrap_err();
    assert!(matches!(refused, Error::Unavailable(_)), "{refused:?}");
    let mut waiting = tokio::spawn(async move {
        let patient = WhenFull::WaitUntil(Instant::now() + Duration::from_secs(30));
        usage
            .charge_at(&standing, &request, tokens, patient, at)
            .await
    });
    let early = timeout(Duration::from_secs(2), &mut waiting).await;
    assert!(early.is_err(), "{early:?}");
    proxy.resume();
    assert_eq!(waiting.await.unwrap().unwrap(), Recorded::Now);
    app.assert_books_balance(1).await;
}
