//! Limits that change while tokens are held, and those of single models.

use std::path::Path;

use tollkeeper::{
    proto::tollkeeper::{
        admin::v1::{
            ClearQuotaOverrideRequest, GrantCreditsRequest, SetQuotaOverrideRequest,
            VoidCreditsRequest, set_quota_override_request::Limit,
        },
        usage::v1::{
            ReserveQuotaRequest, commit_reservation_response::Outcome, reserve_quota_request::Mode,
        },
    },
    usage::load_tiers,
};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::{Client, used, wish};
use crate::{
    harness::{RunningServer, TestApp, eventually, reason},
    usage::quota::with_tiers,
};

/// Two servers of a database.
struct Both {
    app: TestApp,
    replica: RunningServer,
    tiers: tempfile::TempPath,
}

impl Both {
    async fn start() -> Self {
        let (app, tiers) = with_tiers().await;
        let replica = app.replica().await;
        Self {
            app,
            replica,
            tiers,
        }
    }

    fn clients(&self) -> [Client; 2] {
        [
            Client::of(&self.app),
            Client::of_replica(&self.app, &self.replica),
        ]
    }

    /// Waits until no server gives a user anything any more.
    async fn give_nothing(&self, user: &str) {
        let [here, there] = self.clients();
        let denies = async |client: Client| {
            eventually("it is denied", async || {
                let look = ReserveQuotaRequest {
                    mode: Mode::LookOnly.into(),
                    ..wish(user, 1)
                };
                let denied = client.reserve(look).await;
                denied.is_err_and(|status| reason(&status) == "QUOTA_EXCEEDED")
            })
            .await;
        };
        tokio::join!(denies(here), denies(there));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_larger_tier_gives_at_once_and_a_smaller_one_no_more_than_was_held() {
    let both = Both::start().await;
    let [here, there] = both.clients();
    let user = both.app.user().tier("small").create().await.id;
    let held = [here.hold(&user, 60).await, there.hold(&user, 40).await];
    both.give_nothing(&user).await;
    both.app.set_tier(&user, "large").await;
    let more = [here.hold(&user, 200).await, there.hold(&user, 200).await];
    both.app.set_tier(&user, "small").await;
    both.give_nothing(&user).await;
    for (reservation, tokens) in held.iter().zip([60, 40]).chain(more.iter().zip([200, 200])) {
        let booked = there.commit(reservation, tokens).await.unwrap();
        assert_eq!(booked.outcome(), Outcome::Recorded);
    }
    both.give_nothing(&user).await;
    assert_eq!(used(&both.app, &user).await, 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_had_ready_is_not_given_after_a_downgrade() {
    let both = Both::start().await;
    let [here, there] = both.clients();
    let user = both.app.user().tier("large").create().await.id;
    // Each takes more than it needs.
    let held = [here.hold(&user, 60).await, there.hold(&user, 60).await];
    both.app.set_tier(&user, "small").await;
    both.give_nothing(&user).await;
    for reservation in &held {
        here.release(reservation).await.unwrap();
    }
    eventually("the smaller limit can be had", async || {
        there.reserve(wish(&user, 60)).await.is_ok()
    })
    .await;
    here.hold(&user, 40).await;
    both.give_nothing(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_override_counts_at_once_for_what_is_held() {
    let both = Both::start().await;
    let [here, there] = both.clients();
    let user = both.app.user().tier("small").create().await.id;
    let held = here.hold(&user, 60).await;
    let set = async |limit| {
        let request = SetQuotaOverrideRequest {
            user_id: user.clone(),
            limit: Some(limit),
            ..SetQuotaOverrideRequest::default()
        };
        let mut admin = both.app.admin(&both.app.service_key);
        admin.set_quota_override(request).await.unwrap();
    };
    set(Limit::MonthlyTokens(180)).await;
    there.hold(&user, 60).await;
    here.hold(&user, 60).await;
    both.give_nothing(&user).await;
    set(Limit::Unlimited(())).await;
    for _ in 0..5 {
        there.hold(&user, 60).await;
        here.hold(&user, 60).await;
    }
    set(Limit::MonthlyTokens(0)).await;
    both.give_nothing(&user).await;
    there.commit(&held, 60).await.unwrap();
    let request = ClearQuotaOverrideRequest {
        user_id: user.clone(),
        reason: String::new(),
    };
    let mut admin = both.app.admin(&both.app.service_key);
    admin.clear_quota_override(request).await.unwrap();
    both.give_nothing(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credits_are_given_while_they_are_there() {
    let both = Both::start().await;
    let [here, there] = both.clients();
    let user = both.app.user().tier("small").create().await.id;
    let mut held = vec![here.hold(&user, 60).await, there.hold(&user, 40).await];
    both.give_nothing(&user).await;
    let request = GrantCreditsRequest {
        user_id: user.clone(),
        tokens: 50,
        request_id: Uuid::now_v7().to_string(),
        ..GrantCreditsRequest::default()
    };
    let mut admin = both.app.admin(&both.app.service_key);
    let granted = admin.grant_credits(request).await.unwrap().into_inner();
    held.push(there.hold(&user, 30).await);
    let request = VoidCreditsRequest {
        credit_id: granted.credit.unwrap().id,
        reason: String::new(),
    };
    admin.void_credits(request).await.unwrap();
    both.give_nothing(&user).await;
    for (reservation, tokens) in held.iter().zip([60, 40, 30]) {
        here.commit(reservation, tokens).await.unwrap();
    }
    assert_eq!(used(&both.app, &user).await, 130);
}

#[tokio::test(flavor = "multi_thread")]
async fn tiers_that_are_read_again_count_at_once() {
    let both = Both::start().await;
    let [here, there] = both.clients();
    let user = both.app.user().tier("small").create().await.id;
    let held = [here.hold(&user, 60).await, there.hold(&user, 40).await];
    both.give_nothing(&user).await;
    let before = std::fs::read_to_string(&both.tiers).unwrap();
    let reload = async |limit: i64| {
        let after = before.replacen("= 100\n", &format!("= {limit}\n"), 1);
        assert!(limit == 100 || after != before);
        std::fs::write(&both.tiers, after).unwrap();
        let path: &Path = &both.tiers;
        for server in [both.app.running(), &both.replica] {
            let tiers = load_tiers(path).unwrap();
            server.usage.replace_tiers(tiers).await.unwrap();
        }
    };
    reload(150).await;
    there.hold(&user, 50).await;
    both.give_nothing(&user).await;
    reload(100).await;
    for reservation in &held {
        there.release(reservation).await.unwrap();
    }
    // 50 of 100 are held.
    eventually("50 can be had", async || {
        there.reserve(wish(&user, 50)).await.is_ok()
    })
    .await;
    both.give_nothing(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_has_a_limit_beside_the_total_on_all_servers() {
    let both = Both::start().await;
    let [here, there] = both.clients();
    let user = both.app.user().tier("large").create().await.id;
    let of_model = |model: &str, tokens| ReserveQuotaRequest {
        model: model.to_owned(),
        ..wish(&user, tokens)
    };
    let first = here.reserve(of_model("gpt-5", 150)).await.unwrap();
    there.reserve(of_model("gpt-5", 50)).await.unwrap();
    for client in [&here, &there] {
        let denied = client.reserve(of_model("gpt-5", 1)).await.unwrap_err();
        let info = denied.get_details_error_info().unwrap();
        assert_eq!(info.reason, "QUOTA_EXCEEDED");
        assert_eq!(info.metadata["model"], "gpt-5");
        assert_eq!(info.metadata["held_tokens"], "200");
    }
    // Another one is limited by the total alone, which all of them draw from.
    there.reserve(of_model("gpt-x", 700)).await.unwrap();
    let denied = here.reserve(of_model("gpt-x", 101)).await.unwrap_err();
    let info = denied.get_details_error_info().unwrap();
    assert_eq!(info.metadata["limit_tokens"], "1000");
    assert!(!info.metadata.contains_key("model"));
    // What a commit leaves is there again, for the model and in all.
    there.commit(&first.reservation, 100).await.unwrap();
    eventually("the rest of the model can be had", async || {
        there.reserve(of_model("gpt-5", 50)).await.is_ok()
    })
    .await;
    let denied = here.reserve(of_model("gpt-5", 1)).await.unwrap_err();
    assert_eq!(reason(&denied), "QUOTA_EXCEEDED");
    here.reserve(of_model("gpt-x", 100)).await.unwrap();
    both.give_nothing(&user).await;
}
