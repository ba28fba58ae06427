use std::io::Write as _;

use chrono::Utc;
use tollkeeper::{
    model::Period,
    proto::tollkeeper::usage::v1::{
        CheckQuotaRequest, CheckQuotaResponse, ListTiersRequest, ModelLimit, Tier, UsageEvent,
        check_quota_response::Decision, tier::OnOutage,
    },
};
use tonic::{Code, Status};
use uuid::Uuid;

use super::{at, event, tokens, turn_of_the_month};
use crate::harness::{TestApp, eventually, reason, with_bearer};

const TIERS: &str = r#"
default = "small"

[[tier]]
name = "small"
monthly_tokens = 100
max_request_tokens = 60

[[tier]]
name = "large"
monthly_tokens = 1000
requests_per_minute = 30
on_outage = "open"
open_tokens = 40
thresholds = [50, 90]

[tier.models]
"gpt-5" = 200
"a-model" = 700

[[tier]]
name = "open"

[[tier]]
name = "none"
monthly_tokens = 0
"#;

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_allowed_up_to_the_limit_and_no_further() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    use_tokens(&app, &user, 90).await;
    for (wanted, decision) in [
        (0, Decision::Allowed),
        (10, Decision::Allowed),
        (11, Decision::MonthlyLimit),
    ] {
        assert_eq!(decide(&app, &user, wanted).await, decision, "{wanted}");
    }
    use_tokens(&app, &user, 10).await;
    for wanted in [0, 1] {
        let decision = decide(&app, &user, wanted).await;
        assert_eq!(decision, Decision::MonthlyLimit, "{wanted}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_decision_says_where_the_user_stands() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    use_tokens(&app, &user, 90).await;
    let quota = check(&app, &user, 1).await.unwrap().quota.unwrap();
    let period = Period::containing(Utc::now());
    assert_eq!(quota.month, period.to_string());
    assert_eq!(quota.tier, "small");
    assert_eq!((quota.limit_tokens, quota.unlimited), (100, false));
    assert_eq!((quota.used_tokens, quota.remaining_tokens), (90, 10));
    assert_eq!(quota.resets_at, Some(at(period.end())));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_dimension_counts() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    app.record(&event(&user)).await.unwrap();
    let quota = check(&app, &user, 1).await.unwrap().quota.unwrap();
    assert_eq!(quota.used_tokens, 132);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_beyond_the_limit_is_booked_and_blocks_the_next() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    use_tokens(&app, &user, 250).await;
    let answer = check(&app, &user, 0).await.unwrap();
    assert_eq!(answer.decision(), Decision::MonthlyLimit);
    let quota = answer.quota.unwrap();
    assert_eq!((quota.used_tokens, quota.remaining_tokens), (250, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_request_has_its_own_limit() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    assert_eq!(decide(&app, &user, 60).await, Decision::Allowed);
    assert_eq!(decide(&app, &user, 61).await, Decision::RequestTooLarge);
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_of_the_month_before_leaves_this_one_whole() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let (last, ..) = turn_of_the_month();
    let event = UsageEvent {
        occurred_at: Some(at(last)),
        tokens: tokens(100),
        ..event(&user)
    };
    app.record(&event).await.unwrap();
    let answer = check(&app, &user, 60).await.unwrap();
    assert_eq!(answer.decision(), Decision::Allowed);
    assert_eq!(answer.quota.unwrap().used_tokens, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_of_nothing_allows_nothing() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("none").create().await.id;
    assert_eq!(decide(&app, &user, 0).await, Decision::MonthlyLimit);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unlimited_tier_allows_anything() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("open").create().await.id;
    use_tokens(&app, &user, 1_000_000_000_000).await;
    let answer = check(&app, &user, 1_000_000_000_000).await.unwrap();
    assert_eq!(answer.decision(), Decision::Allowed);
    let quota = answer.quota.unwrap();
    assert!(quota.unlimited);
    assert_eq!((quota.limit_tokens, quota.remaining_tokens), (0, 0));
    assert_eq!(quota.used_tokens, 1_000_000_000_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_tier_counts_on_every_replica_as_soon_as_it_is_told() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let user = app.user().tier("small").create().await.id;
    use_tokens(&app, &user, 100).await;
    for (tier, decision) in [
        ("small", Decision::MonthlyLimit),
        ("large", Decision::Allowed),
        ("small", Decision::MonthlyLimit),
        ("open", Decision::Allowed),
    ] {
        app.set_tier(&user, tier).await;
        for channel in [app.channel.clone(), replica.channel()] {
            eventually("the tier counts", async || {
                let answer = check_through(&channel, &app.service_key, &user, 1).await;
                let answer = answer.unwrap();
                answer.decision() == decision && answer.quota.unwrap().tier == tier
            })
            .await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_user_is_refused() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().create().await.id;
    app.disable(&user).await;
    let refused = check(&app, &user, 1).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(reason(&refused), "ACCOUNT_DISABLED");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_quota_of_an_unknown_user_is_not_found() {
    let app = TestApp::spawn().await;
    let refused = check(&app, &Uuid::now_v7().to_string(), 1).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(reason(&refused), "USER_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn checking_consumes_nothing() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    use_tokens(&app, &user, 50).await;
    for _ in 0..10 {
        let answer = check(&app, &user, 50).await.unwrap();
        assert_eq!(answer.decision(), Decision::Allowed);
        assert_eq!(answer.quota.unwrap().used_tokens, 50);
    }
    app.assert_books_balance(1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tiers_are_listed_as_configured() {
    let (app, _tiers) = with_tiers().await;
    let tier = |name: &str, monthly_tokens, max_request_tokens, is_default| Tier {
        name: name.to_owned(),
        monthly_tokens,
        max_request_tokens,
        is_default,
        on_outage: OnOutage::Closed.into(),
        thresholds: vec![80, 100],
        ..Tier::default()
    };
    let model = |model: &str, monthly_tokens| ModelLimit {
        model: model.to_owned(),
        monthly_tokens,
    };
    let expected = [
        tier("small", Some(100), Some(60), true),
        Tier {
            model_limits: vec![model("a-model", 700), model("gpt-5", 200)],
            requests_per_minute: Some(30),
            on_outage: OnOutage::Open.into(),
            open_tokens: 40,
            thresholds: vec![50, 90],
            ..tier("large", Some(1000), None, false)
        },
        tier("open", None, None, false),
        tier("none", Some(0), None, false),
    ];
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for credential in [&app.service_key, &token] {
        let listed = app.usage(credential).list_tiers(ListTiersRequest {}).await;
        assert_eq!(listed.unwrap().into_inner().tiers, expected);
    }
}

/// A server with [`TIERS`], and their file: a replica reads it again.
pub(crate) async fn with_tiers() -> (TestApp, tempfile::TempPath) {
    let file = tiers_file();
    let path = file.to_path_buf();
    let app = TestApp::spawn_with(|settings| settings.usage.tiers_file = path).await;
    (app, file)
}

/// [`TIERS`], on disk while it is kept.
pub(super) fn tiers_file() -> tempfile::TempPath {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(TIERS.as_bytes()).unwrap();
    file.into_temp_path()
}

pub(crate) async fn use_tokens(app: &TestApp, user_id: &str, input: i64) {
    let event = UsageEvent {
        tokens: tokens(input),
        ..event(user_id)
    };
    app.record(&event).await.unwrap();
}

async fn decide(app: &TestApp, user_id: &str, wanted: i64) -> Decision {
    check(app, user_id, wanted).await.unwrap().decision()
}

async fn check(app: &TestApp, user_id: &str, wanted: i64) -> Result<CheckQuotaResponse, Status> {
    check_through(&app.channel, &app.service_key, user_id, wanted).await
}

async fn check_through(
    channel: &tonic::transport::Channel,
    service_key: &str,
    user_id: &str,
    tokens: i64,
) -> Result<CheckQuotaResponse, Status> {
    let request = CheckQuotaRequest {
        user_id: user_id.to_owned(),
        tokens,
        ..CheckQuotaRequest::default()
    };
    let answer = super::UsageServiceClient::new(channel.clone())
        .check_quota(with_bearer(request, service_key))
        .await?;
    Ok(answer.into_inner())
}
