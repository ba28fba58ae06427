//! A user is deleted while others go on, here and on another replica.

use std::collections::BTreeMap;

use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        DeleteUserRequest, DisableUserRequest, GrantCreditsRequest, SetQuotaOverrideRequest,
        SetUserTierRequest, admin_service_client::AdminServiceClient,
        set_quota_override_request::Limit,
    },
    auth::v1::{CreateApiKeyRequest, auth_service_client::AuthServiceClient},
};
use tonic::{Code, Status};
use uuid::Uuid;

use super::{assert_refused, refresh, refresh_through};
use crate::{
    harness::{
        Blocker, PASSWORD, TestApp, eventually, login_through, reason, validate_through,
        with_bearer,
    },
    usage::{event, record_through, reservations},
};

/// What of each round is done beside the deletion, and how it may end.
type Outcomes = BTreeMap<&'static str, Result<(), Status>>;

#[tokio::test(flavor = "multi_thread")]
async fn whatever_goes_on_beside_a_deletion_succeeds_or_finds_nobody() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let (here, there) = (app.channel.clone(), replica.channel());
    let key = &app.service_key;
    for round in 0..8 {
        let user = app.user().create().await;
        let id = &user.id;
        let tokens = app.login(&user).await;
        let (access, fresh) = (&tokens.access_token, app.login(&user).await);
        validate_through(&there, key, access).await.unwrap();
        let used = event(id);
        let elsewhere = reservations::Client::of_replica(&app, &replica);
        let admin = || AdminServiceClient::new(there.clone());
        let delete = DeleteUserRequest {
            user_id: id.clone(),
            reason: String::new(),
        };
        let over = SetQuotaOverrideRequest {
            user_id: id.clone(),
            limit: Some(Limit::MonthlyTokens(1_000_000)),
            expires_at: None,
            reason: String::new(),
        };
        let credits = GrantCreditsRequest {
            user_id: id.clone(),
            tokens: 5,
            request_id: Uuid::now_v7().to_string(),
            ..GrantCreditsRequest::default()
        };
        let tier = SetUserTierRequest {
            user_id: id.clone(),
            tier: "starter".to_owned(),
        };
        let disable = DisableUserRequest {
            user_id: id.clone(),
            reason: String::new(),
        };
        let new_key = CreateApiKeyRequest {
            name: "a key".to_owned(),
            ..CreateApiKeyRequest::default()
        };
        let deletion = async {
            // Now before, now after the others have begun.
            for _ in 0..round * 40 {
                tokio::task::yield_now().await;
            }
            let request = with_bearer(delete, key);
            AdminServiceClient::new(here.clone())
                .delete_user(request)
                .await
        };
        let (deleted, login, refreshed, recorded, reserved, validated, overridden, granted, moved) = tokio::join!(
            deletion,
            login_through(&there, &user.email, PASSWORD),
            refresh_through(&there, &fresh.refresh_token),
            record_through(&there, key, &used),
            elsewhere.reserve(reservations::wish(id, 10)),
            validate_through(&there, key, access),
            async { admin().set_quota_override(with_bearer(over, key)).await },
            async { admin().grant_credits(with_bearer(credits, key)).await },
            async { admin().set_user_tier(with_bearer(tier, key)).await },
        );
        let (disabled, made) = tokio::join!(
            async { admin().disable_user(with_bearer(disable, key)).await },
            async {
                let mut auth = AuthServiceClient::new(there.clone());
                auth.create_api_key(with_bearer(new_key, access)).await
            },
        );
        deleted.expect("deleted");
        let was_recorded = recorded.is_ok();
        let outcomes: Outcomes = [
            ("login", login.map(drop)),
            ("refresh", refreshed.map(drop)),
            ("record", recorded.map(drop)),
            ("reserve", reserved.map(drop)),
            ("validate", validated.map(drop)),
            ("override", overridden.map(drop)),
            ("grant", granted.map(drop)),
            ("tier", moved.map(drop)),
            ("disable", disabled.map(drop)),
            ("key", made.map(drop)),
        ]
        .into();
        for (what, outcome) in outcomes {
            let Err(refused) = outcome else { continue };
            let expected: &[&str] = match what {
                "login" => &["INVALID_CREDENTIALS"],
                // Of nobody nothing is left.
                "reserve" => &["USER_NOT_FOUND", "QUOTA_EXCEEDED"],
                "refresh" | "validate" => &["SESSION_ENDED"],
                // Let in by a replica that has not heard of it yet, it finds nobody.
                "key" => &["SESSION_ENDED", "USER_NOT_FOUND"],
                _ => &["USER_NOT_FOUND"],
            };
            let why = reason(&refused);
            assert!(expected.contains(&&*why), "{what}: {refused:?}");
        }

        // Nothing is left but what was used, and nobody gets in.
        for table in ["sessions", "api_keys", "quota_overrides", "credit_grants"] {
            let rows = format!("SELECT count(*) FROM {table} WHERE user_id = '{id}'");
            assert_eq!(app.count(&rows).await, 0, "{table}");
        }
        let sums = format!(
            "SELECT coalesce(sum(request_count), 0)::bigint FROM monthly_usage WHERE user_id = '{id}'"
        );
        assert_eq!(app.count(&sums).await, i64::from(was_recorded));
        eventually("the other replica knows", async || {
            validate_through(&there, key, access).await.is_err()
                && record_through(&there, key, &event(id)).await.is_err()
        })
        .await;
        let refused = refresh(&app, &fresh.refresh_token).await;
        assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    }
    app.assert_books_balance(app.count("SELECT count(*) FROM usage_records").await)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_that_are_set_while_the_user_goes_find_nobody() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let over = SetQuotaOverrideRequest {
        user_id: user.id.clone(),
        limit: Some(Limit::MonthlyTokens(5)),
        expires_at: None,
        reason: String::new(),
    };
    let credits = GrantCreditsRequest {
        user_id: user.id.clone(),
        tokens: 5,
        request_id: Uuid::now_v7().to_string(),
        ..GrantCreditsRequest::default()
    };
    // The deletion has the user and waits with its last word; the others come meanwhile.
    let blocker = Blocker::lock(&app, "user_erasures").await;
    let delete = DeleteUserRequest {
        user_id: user.id.clone(),
        reason: String::new(),
    };
    let mut admin = app.admin(&app.service_key);
    let deletion = tokio::spawn(async move { admin.delete_user(delete).await });
    blocker.hold_up(&app, 1).await;
    let (mut first, mut second) = (app.admin(&app.service_key), app.admin(&app.service_key));
    let overriding = tokio::spawn(async move { first.set_quota_override(over).await });
    let granting = tokio::spawn(async move { second.grant_credits(credits).await });
    blocker.hold_up(&app, 3).await;
    blocker.release().await;
    deletion.await.unwrap().expect("deleted");
    let refused = overriding.await.unwrap();
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
    let refused = granting.await.unwrap();
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
}
