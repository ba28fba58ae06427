//! How reservations end that nobody commits, and servers that stop.

use std::time::Duration;

use chrono::{DateTime, Utc};
use tollkeeper::proto::tollkeeper::usage::v1::{
    ReserveQuotaRequest, commit_reservation_response::Outcome,
};

use super::{Client, lasting, used, wish};
use crate::{
    harness::{eventually, reason},
    usage::quota::with_tiers,
};

/// A second, and what a busy machine may add.
const SOON: Duration = Duration::from_secs(5);

#[tokio::test(flavor = "multi_thread")]
async fn what_expires_is_soon_free_on_another_server() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let (here, there) = (Client::of(&app), Client::of_replica(&app, &replica));
    let user = app.user().tier("small").create().await.id;
    let brief = |tokens| ReserveQuotaRequest {
        lifetime: lasting(2),
        ..wish(&user, tokens)
    };
    let first = here.reserve(brief(60)).await.unwrap();
    let second = here.reserve(brief(40)).await.unwrap();
    eventually("it is free", async || {
        there.reserve(wish(&user, 60)).await.is_ok()
    })
    .await;
    let expired = first.expires_at.unwrap();
    let nanos = expired.nanos.try_into().unwrap();
    let expired = DateTime::from_timestamp(expired.seconds, nanos).unwrap();
    let late = (Utc::now() - expired).to_std();
    let late = late.expect("not before it has expired");
    assert!(late < SOON, "{late:?}");
    // Real use is booked all the same, wherever it is committed.
    let ended = here.extend(&first.reservation, 10).await.unwrap_err();
    assert_eq!(reason(&ended), "RESERVATION_ENDED");
    let booked = here.commit(&first.reservation, 60).await.unwrap();
    assert_eq!(booked.outcome(), Outcome::Recorded);
    let booked = there.commit(&second.reservation, 40).await.unwrap();
    assert_eq!(booked.outcome(), Outcome::Recorded);
    assert_eq!(used(&app, &user).await, 100);
    // What that one took while it was free, 40 beside what it holds, it may still give.
    let over = there.reserve(wish(&user, 41)).await.unwrap_err();
    assert_eq!(reason(&over), "QUOTA_EXCEEDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_gives_back_what_it_had_ready() {
    let (app, _tiers) = with_tiers().await;
    let here = Client::of(&app);
    let large = app.user().tier("large").create().await.id;
    let small = app.user().tier("small").create().await.id;
    let leased = "SELECT coalesce(sum(leased), 0)::bigint FROM quota_balances";
    let replica = app.replica().await;
    let there = Client::of_replica(&app, &replica);
    let released = there.hold(&large, 10).await;
    let kept = there.hold(&small, 7).await;
    assert!(app.count(leased).await > 17, "it took more than it needed");
    there.release(&released).await.unwrap();
    replica.stop().await.unwrap();
    // All that the model may have.
    here.hold(&large, 700).await;
    // What is held is still held, and any other server may settle it.
    here.hold(&small, 60).await;
    here.hold(&small, 33).await;
    let denied = here.reserve(wish(&small, 1)).await.unwrap_err();
    assert_eq!(reason(&denied), "QUOTA_EXCEEDED");
    let booked = here.commit(&kept, 5).await.unwrap();
    assert_eq!(booked.outcome(), Outcome::Recorded);
    assert_eq!(used(&app, &small).await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn extending_where_the_request_was_reserved_too_keeps_one_of_the_two_for_longer() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let (here, there) = (Client::of(&app), Client::of_replica(&app, &replica));
    let user = app.user().tier("small").create().await.id;
    let request = wish(&user, 30);
    let first = here.reserve(request.clone()).await.unwrap();
    let other = there.reserve(request).await.unwrap();
    let extended = there.extend(&first.reservation, 1800).await.unwrap();
    let seconds = |at: Option<prost_types::Timestamp>| at.unwrap().seconds;
    assert!(seconds(extended.expires_at) - seconds(other.expires_at) > 1600);
    // 70 are left.
    eventually("the other is over", async || {
        here.reserve(wish(&user, 60)).await.is_ok()
    })
    .await;
    here.hold(&user, 10).await;
    let denied = there.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&denied), "QUOTA_EXCEEDED");
}
