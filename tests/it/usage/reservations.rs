//! Quota held for requests, through one server and through two.

mod ends;
mod limits;
mod outage;
mod races;
mod refused;

pub(crate) use refused::refused_reservations;

use std::time::Duration;

use tollkeeper::proto::tollkeeper::usage::v1::{
    CommitReservationRequest, CommitReservationResponse, ExtendReservationRequest,
    ExtendReservationResponse, ReleaseReservationRequest, ReserveQuotaRequest,
    ReserveQuotaResponse, TokenCounts, commit_reservation_response::Outcome,
    reserve_quota_request::Mode, usage_service_client::UsageServiceClient,
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::quota::{use_tokens, with_tiers};
use crate::harness::{RunningServer, TestApp, eventually, reason, with_bearer};

/// A server as its clients see it.
#[derive(Clone)]
pub(crate) struct Client {
    channel: Channel,
    key: String,
}

impl Client {
    pub(crate) fn of(app: &TestApp) -> Self {
        Self {
            channel: app.channel.clone(),
            key: app.service_key.clone(),
        }
    }

    pub(crate) fn of_replica(app: &TestApp, replica: &RunningServer) -> Self {
        Self {
            channel: replica.channel(),
            key: app.service_key.clone(),
        }
    }

    pub(crate) async fn reserve(
        &self,
        request: ReserveQuotaRequest,
    ) -> Result<ReserveQuotaResponse, Status> {
        let request = with_bearer(request, &self.key);
        let reserved = self.client().reserve_quota(request).await?;
        Ok(reserved.into_inner())
    }

    /// Holds tokens for a request of its own; answers the reservation.
    pub(crate) async fn hold(&self, user: &str, tokens: i64) -> String {
        let reserved = self.reserve(wish(user, tokens)).await.unwrap();
        assert_eq!(reserved.tokens, tokens);
        reserved.reservation
    }

    pub(crate) async fn commit(
        &self,
        reservation: &str,
        tokens: i64,
    ) -> Result<CommitReservationResponse, Status> {
        let request = CommitReservationRequest {
            reservation: reservation.to_owned(),
            tokens: Some(TokenCounts {
                output: tokens,
                ..TokenCounts::default()
            }),
            ..CommitReservationRequest::default()
        };
        let request = with_bearer(request, &self.key);
        let committed = self.client().commit_reservation(request).await?;
        Ok(committed.into_inner())
    }

    pub(crate) async fn release(&self, reservation: &str) -> Result<(), Status> {
        let request = ReleaseReservationRequest {
            reservation: reservation.to_owned(),
        };
        let request = with_bearer(request, &self.key);
        self.client().release_reservation(request).await?;
        Ok(())
    }

    async fn extend(
        &self,
        reservation: &str,
        seconds: i64,
    ) -> Result<ExtendReservationResponse, Status> {
        let request = ExtendReservationRequest {
            reservation: reservation.to_owned(),
            lifetime: lasting(seconds),
        };
        let request = with_bearer(request, &self.key);
        let extended = self.client().extend_reservation(request).await?;
        Ok(extended.into_inner())
    }

    fn client(&self) -> UsageServiceClient<Channel> {
        UsageServiceClient::new(self.channel.clone())
    }
}

/// For so many seconds.
fn lasting(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// Of a request that nobody else makes.
pub(crate) fn wish(user: &str, tokens: i64) -> ReserveQuotaRequest {
    ReserveQuotaRequest {
        user_id: user.to_owned(),
        request_id: Uuid::now_v7().to_string(),
        model: "a-model".to_owned(),
        tokens,
        ..ReserveQuotaRequest::default()
    }
}

async fn used(app: &TestApp, user: &str) -> i64 {
    let sum = "input_tokens + output_tokens";
    let statement = format!(
        "SELECT coalesce(sum({sum}), 0)::bigint FROM monthly_usage WHERE user_id = '{user}'"
    );
    app.count(&statement).await
}

const SETTLEMENTS: &str = "SELECT count(*) FROM quota_settlements";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_is_charged_once_and_the_rest_can_be_had_again() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("small").create().await.id;
    let held = client.reserve(wish(&user, 60)).await.unwrap();
    let quota = held.quota.unwrap();
    assert_eq!((quota.limit_tokens, quota.used_tokens), (100, 0));
    assert_eq!((quota.held_tokens, quota.remaining_tokens), (60, 100));
    let denied = client.reserve(wish(&user, 41)).await.unwrap_err();
    assert_eq!(reason(&denied), "QUOTA_EXCEEDED");
    let committed = client.commit(&held.reservation, 25).await.unwrap();
    assert_eq!(committed.outcome(), Outcome::Recorded);
    let again = client.commit(&held.reservation, 25).await.unwrap();
    assert_eq!(again.outcome(), Outcome::Duplicate);
    assert_eq!(again.event_id, committed.event_id);
    let other = client.commit(&held.reservation, 26).await.unwrap_err();
    assert_eq!(reason(&other), "EVENT_CONFLICT");
    assert_eq!(used(&app, &user).await, 25);
    let rest = client.hold(&user, 60).await;
    client.commit(&rest, 60).await.unwrap();
    client.hold(&user, 15).await;
    let denied = client.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(denied.code(), Code::ResourceExhausted);
    assert_eq!(used(&app, &user).await, 85);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denial_says_which_limit_and_when_it_starts_anew() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("large").create().await.id;
    use_tokens(&app, &user, 100).await;
    client.hold(&user, 500).await;
    let denied = client.reserve(wish(&user, 401)).await.unwrap_err();
    let details = denied.get_error_details();
    let metadata = &details.error_info().unwrap().metadata;
    let number = |name: &str| metadata[name].parse::<i64>().unwrap();
    assert_eq!(number("limit_tokens"), 1000);
    assert_eq!(number("used_tokens"), 100);
    assert_eq!(
        (number("held_tokens"), number("remaining_tokens")),
        (500, 900)
    );
    let violation = &details.quota_failure().unwrap().violations[0];
    assert_eq!(violation.subject, format!("user:{user}"));
    let delay = details.retry_info().unwrap().retry_delay.unwrap();
    assert!(delay <= Duration::from_hours(31 * 24), "{delay:?}");
    // Of a model that is limited beside that.
    let mut of_model = wish(&user, 201);
    of_model.model = "gpt-5".to_owned();
    let denied = client.reserve(of_model).await.unwrap_err();
    let info = denied.get_details_error_info().unwrap();
    assert_eq!(info.metadata["model"], "gpt-5");
    assert_eq!(info.metadata["limit_tokens"], "200");
}

#[tokio::test(flavor = "multi_thread")]
async fn any_server_settles_what_another_holds() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let (here, there) = (Client::of(&app), Client::of_replica(&app, &replica));
    let user = app.user().tier("small").create().await.id;
    let first = here.hold(&user, 50).await;
    let second = here.hold(&user, 50).await;
    assert_eq!(
        reason(&there.reserve(wish(&user, 1)).await.unwrap_err()),
        "QUOTA_EXCEEDED"
    );
    let committed = there.commit(&first, 20).await.unwrap();
    assert_eq!(committed.outcome(), Outcome::Recorded);
    there.release(&second).await.unwrap();
    // The owner hears of both, and what they left goes to whoever wants it.
    eventually("the rest can be had there", async || {
        there.reserve(wish(&user, 60)).await.is_ok()
    })
    .await;
    here.hold(&user, 20).await;
    let over = here.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&over), "QUOTA_EXCEEDED");
    let again = here.commit(&first, 20).await.unwrap();
    assert_eq!(again.outcome(), Outcome::Duplicate);
    let ended = there.release(&first).await.unwrap_err();
    assert_eq!(reason(&ended), "RESERVATION_ENDED");
    here.release(&second).await.unwrap();
    assert_eq!(used(&app, &user).await, 20);
    eventually("all is forgotten", async || {
        app.count(SETTLEMENTS).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_reserved_on_two_servers_is_charged_once() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let (here, there) = (Client::of(&app), Client::of_replica(&app, &replica));
    let user = app.user().tier("small").create().await.id;
    let request = wish(&user, 30);
    let first = here.reserve(request.clone()).await.unwrap();
    let again = here.reserve(request.clone()).await.unwrap();
    assert_eq!(again.tokens, 30);
    let other = there.reserve(request).await.unwrap();
    let quota = other.quota.unwrap();
    // And what the first server has ready for the next one.
    assert!(quota.held_tokens >= 60, "{quota:?}");
    assert_eq!(quota.remaining_tokens, 100);
    let outcomes = [
        here.commit(&first.reservation, 10).await.unwrap().outcome(),
        there
            .commit(&other.reservation, 10)
            .await
            .unwrap()
            .outcome(),
        there
            .commit(&again.reservation, 10)
            .await
            .unwrap()
            .outcome(),
    ];
    assert_eq!(
        outcomes,
        [Outcome::Recorded, Outcome::Duplicate, Outcome::Duplicate]
    );
    assert_eq!(used(&app, &user).await, 10);
    // Both holds are over.
    eventually("the rest can be had", async || {
        let held = here.reserve(wish(&user, 50)).await;
        held.is_ok()
    })
    .await;
    there.hold(&user, 40).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_repeated_for_another_model_meets_that_models_limit() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("large").create().await.id;
    let request = wish(&user, 201);
    let first = client.reserve(request.clone()).await.unwrap();
    let of_model = |tokens| ReserveQuotaRequest {
        model: "gpt-5".to_owned(),
        tokens,
        ..request.clone()
    };
    let denied = client.reserve(of_model(201)).await.unwrap_err();
    assert_eq!(reason(&denied), "QUOTA_EXCEEDED");
    let other = client.reserve(of_model(200)).await.unwrap();
    assert_eq!(other.tokens, 200);
    client.commit(&other.reservation, 150).await.unwrap();
    let both = client.commit(&first.reservation, 150).await.unwrap_err();
    assert_eq!(reason(&both), "EVENT_CONFLICT");
    assert_eq!(used(&app, &user).await, 150);
}

#[tokio::test(flavor = "multi_thread")]
async fn less_than_wanted_is_held_when_asked_for_and_a_look_holds_nothing() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("small").create().await.id;
    use_tokens(&app, &user, 70).await;
    let with_mode = |tokens, mode: Mode| ReserveQuotaRequest {
        mode: mode.into(),
        ..wish(&user, tokens)
    };
    for _ in 0..3 {
        let look = client.reserve(with_mode(30, Mode::LookOnly)).await.unwrap();
        assert_eq!((look.reservation.as_str(), look.tokens), ("", 0));
    }
    let look = client.reserve(with_mode(31, Mode::LookOnly)).await;
    assert_eq!(reason(&look.unwrap_err()), "QUOTA_EXCEEDED");
    let some = client
        .reserve(with_mode(50, Mode::BestEffort))
        .await
        .unwrap();
    assert_eq!(some.tokens, 30);
    let none = client.reserve(with_mode(50, Mode::BestEffort)).await;
    assert_eq!(reason(&none.unwrap_err()), "QUOTA_EXCEEDED");
    // More than any request may have.
    let large = client.reserve(wish(&user, 61)).await.unwrap_err();
    assert_eq!(reason(&large), "REQUEST_TOO_LARGE");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_is_extended_by_its_owner_and_taken_over_by_others() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let (here, there) = (Client::of(&app), Client::of_replica(&app, &replica));
    let user = app.user().tier("small").create().await.id;
    let brief = ReserveQuotaRequest {
        lifetime: lasting(1),
        ..wish(&user, 40)
    };
    let held = here.reserve(brief).await.unwrap();
    // Beyond what the database was told so far.
    let longer = here.extend(&held.reservation, 1800).await.unwrap();
    let seconds = |at: Option<prost_types::Timestamp>| at.unwrap().seconds;
    assert!(seconds(longer.expires_at) - seconds(held.expires_at) > 1700);
    let elsewhere = there.extend(&longer.reservation, 900).await.unwrap();
    eventually("the first one is over", async || {
        here.reserve(wish(&user, 60)).await.is_ok()
    })
    .await;
    there.commit(&elsewhere.reservation, 40).await.unwrap();
    for ended in [&elsewhere.reservation, &longer.reservation] {
        for client in [&here, &there] {
            let ended = client.extend(ended, 10).await.unwrap_err();
            assert_eq!(reason(&ended), "RESERVATION_ENDED");
        }
    }
    assert_eq!(used(&app, &user).await, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_commit_is_booked_and_an_altered_reservation_is_none() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("small").create().await.id;
    let held = client.hold(&user, 60).await;
    client.release(&held).await.unwrap();
    client.release(&held).await.unwrap();
    eventually("it is free", async || {
        client.reserve(wish(&user, 60)).await.is_ok()
    })
    .await;
    let late = client.commit(&held, 70).await.unwrap();
    assert_eq!(late.outcome(), Outcome::Recorded);
    assert_eq!(used(&app, &user).await, 70);
    let over = client.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&over), "QUOTA_EXCEEDED");
    let mut altered = held.into_bytes();
    altered[40] ^= 1;
    let altered = String::from_utf8(altered).unwrap();
    for wrong in ["", "garbage", &altered] {
        let status = client.commit(wrong, 1).await.unwrap_err();
        assert_eq!(reason(&status), "RESERVATION_INVALID");
        let status = client.release(wrong).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let status = client.extend(wrong, 10).await.unwrap_err();
        assert_eq!(reason(&status), "RESERVATION_INVALID");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_a_minute_are_counted_and_refused_ones_cost_nothing() {
    let (app, _tiers) = with_tiers().await;
    let client = Client::of(&app);
    let user = app.user().tier("large").create().await.id;
    let first = wish(&user, 1);
    client.reserve(first.clone()).await.unwrap();
    for _ in 0..29 {
        client.hold(&user, 1).await;
    }
    let refused = client.reserve(wish(&user, 1)).await.unwrap_err();
    assert_eq!(reason(&refused), "RATE_LIMITED");
    let delay = refused
        .get_details_retry_info()
        .unwrap()
        .retry_delay
        .unwrap();
    assert!(delay <= Duration::from_secs(2), "{delay:?}");
    // What was reserved is; and looking is free.
    client.reserve(first).await.unwrap();
    let look = ReserveQuotaRequest {
        mode: Mode::LookOnly.into(),
        ..wish(&user, 1)
    };
    client.reserve(look).await.unwrap();
    assert!(
        app.count("SELECT coalesce(sum(leased), 0)::bigint FROM quota_balances")
            .await
            >= 30
    );
}
