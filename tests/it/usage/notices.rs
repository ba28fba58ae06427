//! Thresholds of a month's limit: each is told once.

use chrono::Utc;
use futures_util::future::join_all;
use serde_json::{Value, json};
use tollkeeper::{
    model::{Period, QuotaNotice},
    proto::tollkeeper::{
        admin::v1::{
            ClearQuotaOverrideRequest, GrantCreditsRequest, SetQuotaOverrideRequest,
            SetUserTierRequest, set_quota_override_request::Limit,
        },
        usage::v1::UsageEvent,
    },
    store::Store,
};
use uuid::Uuid;

use super::{
    event,
    quota::{use_tokens, with_tiers},
    record_through, tokens,
};
use crate::harness::{TestApp, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn each_threshold_is_told_once_a_month_and_again_in_the_next() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await;
    let this = Period::containing(Utc::now());
    for (used, expected) in [(79, &[][..]), (1, &[80]), (19, &[80]), (1, &[80, 100])] {
        use_tokens(&app, &user.id, used).await;
        all_are_looked_at(&app).await;
        assert_eq!(told(&app, &user.id).await, expected);
    }
    for _ in 0..3 {
        use_tokens(&app, &user.id, 50).await;
        app.running().usage.notice_all();
    }
    all_are_looked_at(&app).await;
    assert_eq!(told(&app, &user.id).await, [80, 100]);

    let events = events(&app, &user.id).await;
    let second: Value = events[1].clone();
    let time = second["timestamp"].as_str().unwrap().to_owned();
    assert!(time.parse::<chrono::DateTime<Utc>>().is_ok(), "{time}");
    let expected = json!({
        "type": "quota.threshold_reached",
        "timestamp": time,
        "data": {
            "user_id": user.id,
            "month": this.to_string(),
            "model": null,
            "threshold_percent": 100,
            "used_tokens": 100,
            "limit_tokens": 100,
        },
    });
    assert_eq!(second, expected);

    // As if it had all been in the month before.
    for table in ["quota_notices", "monthly_model_usage"] {
        app.sql(&format!("UPDATE {table} SET month = '{}'", this.previous()))
            .await;
    }
    use_tokens(&app, &user.id, 85).await;
    all_are_looked_at(&app).await;
    assert_eq!(told(&app, &user.id).await, [80, 80, 100]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_passes_several_thresholds_at_once_is_told_of_each() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    use_tokens(&app, &user, 950).await;
    all_are_looked_at(&app).await;
    assert_eq!(told(&app, &user).await, [50, 90]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_of_no_limit_or_of_a_limit_of_zero() {
    let (app, _tiers) = with_tiers().await;
    for tier in ["open", "none"] {
        let user = app.user().tier(tier).create().await.id;
        use_tokens(&app, &user, 1_000_000).await;
        all_are_looked_at(&app).await;
        assert_eq!(told(&app, &user).await, &[0; 0], "{tier}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_race_tell_of_each_threshold_once() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let mut users = Vec::new();
    for _ in 0..20 {
        users.push(app.user().tier("small").create().await.id);
    }
    let halves = users.iter().flat_map(|user| {
        [app.channel.clone(), replica.channel()].map(|channel| {
            let (key, half) = (&app.service_key, event_of(user, 50));
            async move { record_through(&channel, key, &half).await.unwrap() }
        })
    });
    join_all(halves).await;
    replica.usage.notice_all();
    app.running().usage.notice_all();
    for user in &users {
        eventually("told", async || told(&app, user).await.len() >= 2).await;
    }
    all_are_looked_at(&app).await;
    for user in &users {
        assert_eq!(told(&app, user).await, [80, 100]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_find_the_same_at_the_same_moment_one_tells_it() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().create().await.id.parse().unwrap();
    let now = Utc::now();
    let notices: Vec<QuotaNotice> = (1..=100)
        .map(|threshold| QuotaNotice {
            user_id: user,
            period: Period::containing(now),
            threshold,
            used: 100,
            limit: 100,
            found_at: now,
        })
        .collect();
    let reversed: Vec<QuotaNotice> = notices.iter().rev().copied().collect();
    let stores = [(); 2].map(|()| Store::new(&app.settings().database).unwrap());
    let racers = (0..40).map(|n| {
        let store = stores[n % 2].clone();
        let notices = [&notices, &reversed][n / 2 % 2].clone();
        tokio::spawn(async move { store.quota_notices_insert(&notices).await.unwrap() })
    });
    let told: usize = join_all(racers).await.into_iter().map(Result::unwrap).sum();
    assert_eq!(told, notices.len());
    let outbox = app.count("SELECT count(*) FROM outbox").await;
    assert_eq!(outbox, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_forgot_is_told_once_a_replica_starts() {
    let (app, _tiers) = with_tiers().await;
    // More than are looked at together.
    let this = Period::containing(Utc::now());
    app.sql(
        "INSERT INTO users (id, email, username, full_name, role, tier)
         SELECT gen_random_uuid(), 'u' || n || '@example.com', 'forgotten' || n, '', 'user', 'small'
         FROM generate_series(1, 1200) AS n",
    )
    .await;
    // Booked, and then the replica that would have noticed was gone.
    app.sql(&format!(
        "INSERT INTO monthly_model_usage
         SELECT id, '{this}', 'gpt-x', 90, 0, 0, 0, 0, 1 FROM users WHERE username LIKE 'forgotten%'"
    ))
    .await;
    let of_them = "SELECT count(*) FROM outbox JOIN users AS u
        ON u.id = (payload #>> '{data,user_id}')::uuid WHERE username LIKE 'forgotten%'";
    let _replica = app.replica().await;
    eventually("all are told", async || app.count(of_them).await >= 1200).await;
    all_are_looked_at(&app).await;
    assert_eq!(app.count(of_them).await, 1200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_smaller_limit_has_its_thresholds_told_and_a_larger_one_takes_nothing_back() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    use_tokens(&app, &user, 300).await;
    let mut admin = app.admin(&app.service_key);
    let limit = SetQuotaOverrideRequest {
        user_id: user.clone(),
        limit: Some(Limit::MonthlyTokens(500)),
        ..SetQuotaOverrideRequest::default()
    };
    admin.set_quota_override(limit).await.unwrap();
    eventually("told", async || told(&app, &user).await == [50]).await;
    assert_eq!(events(&app, &user).await[0]["data"]["limit_tokens"], 500);
    let cleared = ClearQuotaOverrideRequest {
        user_id: user.clone(),
        reason: String::new(),
    };
    admin.clear_quota_override(cleared).await.unwrap();
    use_tokens(&app, &user, 250).await;
    all_are_looked_at(&app).await;
    assert_eq!(told(&app, &user).await, [50]);
    // What was used is more than the limit by now.
    let tier = SetUserTierRequest {
        user_id: user.clone(),
        tier: "small".to_owned(),
    };
    admin.set_user_tier(tier).await.unwrap();
    let all = [50, 80, 100];
    eventually("told", async || told(&app, &user).await == all).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credits_move_the_thresholds() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let credits = GrantCreditsRequest {
        user_id: user.clone(),
        tokens: 100,
        request_id: Uuid::now_v7().to_string(),
        ..GrantCreditsRequest::default()
    };
    app.admin(&app.service_key)
        .grant_credits(credits)
        .await
        .unwrap();
    use_tokens(&app, &user, 159).await;
    all_are_looked_at(&app).await;
    assert_eq!(told(&app, &user).await, &[0; 0]);
    use_tokens(&app, &user, 1).await;
    all_are_looked_at(&app).await;
    assert_eq!(told(&app, &user).await, [80]);
    assert_eq!(events(&app, &user).await[0]["data"]["limit_tokens"], 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn notices_of_old_months_are_forgotten_by_upkeep() {
    let (app, _tiers) = with_tiers().await;
    let this = Period::containing(Utc::now());
    for months in 0..4 {
        app.sql(&format!(
            "INSERT INTO quota_notices VALUES ('{}', gen_random_uuid(), 80)",
            this.minus_months(months)
        ))
        .await;
    }
    let _replica = app.replica().await;
    let kept = format!(
        "SELECT count(*) FROM quota_notices WHERE month < '{}'",
        this.minus_months(2)
    );
    eventually("forgotten", async || app.count(&kept).await == 0).await;
    assert_eq!(app.count("SELECT count(*) FROM quota_notices").await, 3);
}

/// Returns once everybody has been looked at who was marked before: marks are taken in turn.
async fn all_are_looked_at(app: &TestApp) {
    let last = app.user().tier("small").create().await.id;
    use_tokens(app, &last, 100).await;
    eventually("the last is told", async || {
        told(app, &last).await == [80, 100]
    })
    .await;
}

/// The thresholds that a user is told of.
async fn told(app: &TestApp, user_id: &str) -> Vec<i64> {
    let events = events(app, user_id).await;
    let threshold = |event: &Value| event["data"]["threshold_percent"].as_i64().unwrap();
    let mut told: Vec<i64> = events.iter().map(threshold).collect();
    told.sort_unstable();
    told
}

/// What the outbox has of a user, in its order.
async fn events(app: &TestApp, user_id: &str) -> Vec<Value> {
    let statement = format!(
        "SELECT payload::text FROM outbox WHERE payload #>> '{{data,user_id}}' = '{user_id}'
         ORDER BY created_at, (payload #>> '{{data,threshold_percent}}')::int"
    );
    let rows = app.sql(&statement).await;
    let event = |row: &tokio_postgres::Row| serde_json::from_str(row.get(0)).unwrap();
    rows.iter().map(event).collect()
}

fn event_of(user_id: &str, input: i64) -> UsageEvent {
    UsageEvent {
        tokens: tokens(input),
        ..event(user_id)
    }
}
