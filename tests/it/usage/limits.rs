//! Overrides, credits, and where a limit comes from.

use std::{collections::BTreeSet, future::ready, pin::pin};

use chrono::{DateTime, TimeDelta, Utc};
use futures_util::future::join_all;
use tollkeeper::{
    config::{DatabaseSettings, Secret},
    model::{Change, Period, UserId},
    proto::tollkeeper::{
        admin::v1::{
            ClearQuotaOverrideRequest, Credit, GrantCreditsRequest, ListCreditsRequest,
            ListCreditsResponse, SetQuotaOverrideRequest, VoidCreditsRequest,
            admin_service_client::AdminServiceClient, set_quota_override_request::Limit,
        },
        auth::v1::ValidateTokenRequest,
        usage::v1::{
            CheckQuotaRequest, GetQuotaRequest, GetQuotaResponse, ModelQuota, Quota, UsageEvent,
            check_quota_response::Decision, get_quota_response::BaseSource,
            usage_service_client::UsageServiceClient,
        },
    },
    store::{Notification, Store},
    usage::load_tiers,
};
use tonic::{Code, Status, transport::Channel};
use uuid::Uuid;

use super::{
    at, event,
    quota::{use_tokens, with_tiers},
    tokens, turn_of_the_month,
};
use crate::harness::{TestApp, cluster, eventually, reason, with_bearer};

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_says_where_each_number_comes_from() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    use_tokens(&app, &user, 60).await;
    let plain = quota(&app, &user).await;
    assert_eq!(plain.user_id, user);
    assert_eq!(plain.base_source(), BaseSource::Tier);
    assert_eq!(
        (plain.base_tokens, plain.max_request_tokens),
        (100, Some(60))
    );
    assert_eq!(plain.requests_per_minute, None);
    assert_eq!((plain.credits.len(), plain.models.len()), (0, 0));
    let end = Period::containing(Utc::now()).end();
    let expected = Quota {
        month: Period::containing(Utc::now()).to_string(),
        limit_tokens: 100,
        used_tokens: 60,
        remaining_tokens: 40,
        resets_at: Some(at(end)),
        tier: "small".to_owned(),
        ..Quota::default()
    };
    assert_eq!(plain.quota, Some(expected));

    let expiry = Utc::now() + TimeDelta::days(90);
    let late = grant(
        &app,
        GrantCreditsRequest {
            priority: 2,
            ..credits(&user, 30)
        },
    )
    .await;
    let first = GrantCreditsRequest {
        priority: 1,
        expires_at: Some(at(expiry)),
        ..credits(&user, 20)
    };
    let first = grant(&app, first).await;
    use_tokens(&app, &user, 65).await;
    let full = quota(&app, &user).await;
    let numbers = full.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.used_tokens), (150, 125));
    assert_eq!(numbers.remaining_tokens, 25);
    assert_eq!(full.base_tokens, 100);
    let shares: Vec<_> = full
        .credits
        .iter()
        .map(|one| {
            (
                one.id.clone(),
                one.tokens,
                one.drawn_tokens,
                one.remaining_tokens,
            )
        })
        .collect();
    let expected = [(first.id, 20, 20, 0), (late.id, 30, 5, 25)];
    assert_eq!(shares, expected);
    assert_eq!(full.credits[0].expires_at, Some(at(expiry)));
    assert_eq!(full.credits[1].expires_at, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn users_see_their_own_quota_and_nobody_elses() {
    let (app, _tiers) = with_tiers().await;
    let (ada, bob) = (app.user().create().await, app.user().create().await);
    let token = app.login(&ada).await.access_token;
    let ask = |credential: String, user_id: String| {
        let mut usage = app.usage(&credential);
        async move { usage.get_quota(GetQuotaRequest { user_id }).await }
    };
    let own = ask(token.clone(), String::new())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(own.user_id, ada.id);
    let refused = ask(token, bob.id.clone()).await.unwrap_err();
    assert_eq!(reason(&refused), "CALLER_NOT_ALLOWED");
    let named = ask(app.service_key.clone(), bob.id.clone()).await.unwrap();
    assert_eq!(named.into_inner().user_id, bob.id);
    let nobody = ask(app.service_key.clone(), Uuid::now_v7().to_string()).await;
    let nobody = nobody.unwrap_err();
    assert_eq!(
        (nobody.code(), reason(&nobody)),
        (Code::NotFound, "USER_NOT_FOUND".to_owned())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_override_counts_at_once_on_every_replica_until_it_is_cleared() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let user = app.user().tier("small").create().await.id;
    for (limit, tokens) in [
        (Limit::MonthlyTokens(5000), Some(5000)),
        (Limit::MonthlyTokens(0), Some(0)),
        (Limit::Unlimited(()), None),
        (Limit::MonthlyTokens(7), Some(7)),
    ] {
        let request = SetQuotaOverrideRequest {
            user_id: user.clone(),
            limit: Some(limit),
            ..SetQuotaOverrideRequest::default()
        };
        let set = app
            .admin(&app.service_key)
            .set_quota_override(request)
            .await;
        let set = set.unwrap().into_inner().quota.unwrap();
        assert_eq!((!set.unlimited).then_some(set.limit_tokens), tokens);
        for channel in [app.channel.clone(), replica.channel()] {
            let seen = quota_through(&channel, &app.service_key, &user).await;
            assert_eq!(seen.base_source(), BaseSource::Override);
            assert_eq!(seen.override_expires_at, None);
            // What the other server has ready is no part of it.
            let unheld = |quota: &Quota| Quota {
                held_tokens: 0,
                ..quota.clone()
            };
            assert_eq!(unheld(&seen.quota.unwrap()), unheld(&set));
            let wanted = tokens.unwrap_or(1_000_000_000_000);
            // The tier still limits a single request to 60.
            let expected = if wanted == 0 {
                Decision::MonthlyLimit
            } else {
                Decision::Allowed
            };
            // What a server had ready before goes back as soon as it hears of the change.
            eventually("it is decided by it", async || {
                let decision = check_through(&channel, &app, &user, wanted.min(60), "");
                decision.await == expected
            })
            .await;
        }
    }
    let decision = check_through(&replica.channel(), &app, &user, 8, "").await;
    assert_eq!(decision, Decision::MonthlyLimit);
    for _ in 0..2 {
        let cleared = clear(&app, &user).await.unwrap();
        assert_eq!(cleared.limit_tokens, 100);
    }
    let seen = quota_through(&replica.channel(), &app.service_key, &user).await;
    assert_eq!(seen.base_source(), BaseSource::Tier);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_override_ends_when_it_expires() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let expiry = Utc::now() + TimeDelta::days(1);
    let request = SetQuotaOverrideRequest {
        expires_at: Some(at(expiry)),
        ..own_limit(&user, 5000)
    };
    app.admin(&app.service_key)
        .set_quota_override(request)
        .await
        .unwrap();
    assert_eq!(
        quota(&app, &user).await.override_expires_at,
        Some(at(expiry))
    );
    app.sql("UPDATE quota_overrides SET expires_at = now()")
        .await;
    let after = quota(&app, &user).await;
    assert_eq!(after.base_source(), BaseSource::Tier);
    assert_eq!((after.base_tokens, after.override_expires_at), (100, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_under_a_larger_limit_draws_no_credit() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    grant(&app, credits(&user, 50)).await;
    use_tokens(&app, &user, 400).await;
    app.set_tier(&user, "small").await;
    let smaller = quota(&app, &user).await;
    assert_eq!(smaller.base_source(), BaseSource::Kept);
    assert_eq!(smaller.base_tokens, 400);
    let numbers = smaller.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.remaining_tokens), (450, 50));
    // What is used since does.
    use_tokens(&app, &user, 30).await;
    let since = quota(&app, &user).await;
    assert_eq!(since.base_tokens, 400);
    let numbers = since.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.remaining_tokens), (450, 20));
    // The same by an override that goes.
    let other = app.user().tier("small").create().await.id;
    app.admin(&app.service_key)
        .set_quota_override(own_limit(&other, 1000))
        .await
        .unwrap();
    use_tokens(&app, &other, 300).await;
    assert_eq!(clear(&app, &other).await.unwrap().limit_tokens, 300);
    use_tokens(&app, &other, 10).await;
    let numbers = quota(&app, &other).await.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.remaining_tokens), (300, 0));
    // An upgrade holds at once.
    app.set_tier(&other, "large").await;
    assert_eq!(quota(&app, &other).await.quota.unwrap().limit_tokens, 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_month_of_a_larger_tier_is_judged_by_it_when_it_is_over() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    grant(&app, credits(&user, 500)).await;
    app.set_tier(&user, "large").await;
    let (last, ..) = turn_of_the_month();
    begin_next_month(&app).await;
    use_tokens_at(&app, &user, 900, last).await;
    let numbers = quota(&app, &user).await.quota.unwrap();
    assert_eq!(numbers.limit_tokens, 1500);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_used_after_an_override_has_expired_draws_credits() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    grant(&app, credits(&user, 50)).await;
    let request = SetQuotaOverrideRequest {
        expires_at: Some(at(Utc::now() + TimeDelta::days(1))),
        ..own_limit(&user, 5000)
    };
    app.admin(&app.service_key)
        .set_quota_override(request)
        .await
        .unwrap();
    use_tokens(&app, &user, 300).await;
    assert_eq!(settle(&app).await, 0);
    app.sql("UPDATE quota_overrides SET expires_at = now()")
        .await;
    assert_eq!(settle(&app).await, 1);
    use_tokens(&app, &user, 30).await;
    let after = quota(&app, &user).await;
    assert_eq!(
        (after.base_source(), after.base_tokens),
        (BaseSource::Kept, 300)
    );
    let numbers = after.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.remaining_tokens), (350, 20));
    // It is gone, and to clear it is no act.
    clear(&app, &user).await.unwrap();
    let acts = "SELECT count(*) FROM audit_events WHERE action = 'quota.override_cleared'";
    assert_eq!(app.count(acts).await, 0);
    assert_eq!(settle(&app).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn upkeep_settles_months_as_soon_as_a_replica_starts() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    app.admin(&app.service_key)
        .set_quota_override(own_limit(&user, 5000))
        .await
        .unwrap();
    use_tokens(&app, &user, 300).await;
    app.sql("UPDATE quota_overrides SET expires_at = now()")
        .await;
    let _replica = app.replica().await;
    let settled = "SELECT count(*) FROM quota_balances WHERE base_limit = 300";
    eventually("it is settled", async || app.count(settled).await == 1).await;
    assert_eq!(app.count("SELECT count(*) FROM quota_overrides").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_month_and_other_tiers_are_recorded_of_users_with_credits() {
    let (app, file) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    grant(&app, credits(&user, 50)).await;
    begin_next_month(&app).await;
    assert_eq!(settle(&app).await, 1);
    let bases = "SELECT base_limit FROM quota_balances ORDER BY month DESC LIMIT 1";
    assert_eq!(app.count(bases).await, 1000);
    use_tokens(&app, &user, 800).await;
    assert_eq!(settle(&app).await, 0);

    let text = std::fs::read_to_string(&file).unwrap();
    let text = text.replace("monthly_tokens = 1000", "monthly_tokens = 300");
    std::fs::write(&file, text).unwrap();
    let usage = &app.running().usage;
    usage
        .replace_tiers(load_tiers(&file).unwrap())
        .await
        .unwrap();
    assert_eq!(settle(&app).await, 1);
    use_tokens(&app, &user, 30).await;
    let after = quota(&app, &user).await;
    assert_eq!(
        (after.base_source(), after.base_tokens),
        (BaseSource::Kept, 800)
    );
    assert_eq!(after.quota.unwrap().remaining_tokens, 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_reloads_at_once_the_later_one_counts() {
    let (app, file) = with_tiers().await;
    let text = std::fs::read_to_string(&file).unwrap();
    let read = |text: String| {
        std::fs::write(&file, text).unwrap();
        load_tiers(&file).unwrap()
    };
    // The first has a tier less, so it asks whether anybody is in that, and has to wait.
    let first = read(text.replace("name = \"open\"", "name = \"wide\""));
    let second = read(format!("{text}\n[[tier]]\nname = \"more\"\n"));
    let client = cluster::connect(&app.database_url).await;
    client
        .batch_execute("BEGIN; LOCK TABLE users")
        .await
        .unwrap();
    let usage = app.running().usage.clone();
    let first = tokio::spawn({
        let usage = usage.clone();
        async move { usage.replace_tiers(first).await }
    });
    let waiting =
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass";
    eventually("it asks", async || app.count(waiting).await == 1).await;
    let mut later = pin!(usage.replace_tiers(second.clone()));
    let early = tokio::select! {
        biased;
        replaced = &mut later => Some(replaced),
        () = ready(()) => None,
    };
    client.batch_execute("COMMIT").await.unwrap();
    first.await.unwrap().unwrap();
    match early {
        Some(replaced) => replaced.unwrap(),
        None => later.await.unwrap(),
    }
    assert_eq!(*usage.tiers(), second);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_override_as_the_first_act_of_a_month_keeps_what_the_tier_paid_for() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    use_tokens(&app, &user, 800).await;
    grant(&app, credits(&user, 50)).await;
    // As if nothing had been recorded this month.
    app.sql("UPDATE quota_balances SET base_limit = NULL").await;
    app.admin(&app.service_key)
        .set_quota_override(own_limit(&user, 7))
        .await
        .unwrap();
    let kept = quota(&app, &user).await;
    assert_eq!(kept.base_source(), BaseSource::Kept);
    assert_eq!(kept.base_tokens, 800);
    let numbers = kept.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.remaining_tokens), (850, 50));
}

#[tokio::test(flavor = "multi_thread")]
async fn credits_count_on_every_replica_and_in_every_answer() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let user = app.user().tier("small").create().await;
    use_tokens(&app, &user.id, 100).await;
    let channel = replica.channel();
    assert_eq!(
        check_through(&channel, &app, &user.id, 1, "").await,
        Decision::MonthlyLimit
    );
    grant(&app, credits(&user.id, 25)).await;
    // The other replica hears of it a moment later.
    eventually("it counts", async || {
        check_through(&channel, &app, &user.id, 25, "").await == Decision::Allowed
    })
    .await;
    assert_eq!(
        check_through(&channel, &app, &user.id, 26, "").await,
        Decision::MonthlyLimit
    );
    let request = ValidateTokenRequest {
        token: app.login(&user).await.access_token,
        include_quota: true,
        ..ValidateTokenRequest::default()
    };
    let validated = app.auth(&app.service_key).validate_token(request).await;
    let validated = validated.unwrap().into_inner().quota.unwrap();
    assert_eq!(
        (validated.limit_tokens, validated.remaining_tokens),
        (125, 25)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_of_credits_goes_on_into_the_next_month() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let (last, ..) = turn_of_the_month();
    grant(&app, credits(&user, 50)).await;
    let month = Period::containing(last);
    app.sql(&format!(
        "UPDATE credit_grants SET granted_at = '{}'",
        month.start().to_rfc3339()
    ))
    .await;
    let beyond = UsageEvent {
        occurred_at: Some(at(last)),
        tokens: tokens(130),
        ..event(&user)
    };
    app.record(&beyond).await.unwrap();
    // Drawn by the base of that month; where nobody recorded one, by today's.
    let left = |answer: GetQuotaResponse| answer.quota.unwrap().limit_tokens - 100;
    assert_eq!(left(quota(&app, &user).await), 20);
    app.sql(&format!(
        "INSERT INTO quota_balances (user_id, month, model, base_limit)
         VALUES ('{user}', '{month}', '', 115)"
    ))
    .await;
    let answer = quota(&app, &user).await;
    let share = &answer.credits[0];
    assert_eq!((share.drawn_tokens, share.remaining_tokens), (0, 35));
    assert_eq!(left(answer), 35);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_credit_gives_nothing_more_and_keeps_what_it_gave() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let expiring = GrantCreditsRequest {
        expires_at: Some(at(Utc::now() + TimeDelta::days(1))),
        ..credits(&user, 50)
    };
    grant(&app, expiring).await;
    use_tokens(&app, &user, 130).await;
    app.sql("UPDATE credit_grants SET expires_at = now()").await;
    for closed in [false, true] {
        let numbers = quota(&app, &user).await.quota.unwrap();
        assert_eq!(
            (numbers.limit_tokens, numbers.remaining_tokens),
            (130, 0),
            "{closed}"
        );
        let listed = list(&app, &user, 0, "").await.unwrap().credits;
        assert_eq!(listed[0].remaining_tokens, 0);
        assert_eq!(settle(&app).await, usize::from(!closed));
    }
    let drawn = app.count("SELECT drawn_tokens FROM credit_grants").await;
    assert_eq!(drawn, 30);
    use_tokens(&app, &user, 5).await;
    let numbers = quota(&app, &user).await.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.used_tokens), (130, 135));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_credit_pays_for_nothing_that_is_booked_later() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let first = grant(&app, credits(&user, 50)).await;
    let second = GrantCreditsRequest {
        priority: 1,
        ..credits(&user, 40)
    };
    grant(&app, second).await;
    let (last, ..) = turn_of_the_month();
    begin_next_month(&app).await;
    use_tokens_at(&app, &user, 130, last).await;
    void(&app, &first.id).await.unwrap();
    assert_eq!(quota(&app, &user).await.quota.unwrap().limit_tokens, 140);
    use_tokens_at(&app, &user, 10, last).await;
    assert_eq!(quota(&app, &user).await.quota.unwrap().limit_tokens, 130);
    let drawn = format!(
        "SELECT drawn_tokens FROM credit_grants WHERE id = '{}'",
        first.id
    );
    assert_eq!(app.count(&drawn).await, 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn credits_that_are_used_up_make_room_for_others() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    app.sql(&format!(
        "INSERT INTO credit_grants (id, user_id, tokens, priority, reason, request_id, actor_kind)
         SELECT gen_random_uuid(), '{user}', 1, 0, '', gen_random_uuid(), 'operator'
         FROM generate_series(1, 200)"
    ))
    .await;
    let refused = grant_through(&app.channel, &app, credits(&user, 10)).await;
    assert_eq!(reason(&refused.unwrap_err()), "TOO_MANY_CREDITS");
    use_tokens(&app, &user, 101).await;
    grant(&app, credits(&user, 10)).await;
    let answer = quota(&app, &user).await;
    let numbers = answer.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.remaining_tokens), (310, 209));
    // What was used up is shown as what it gave.
    assert_eq!(answer.credits.len(), 201);
    let closed = "SELECT count(*) FROM credit_grants WHERE closed_at IS NOT NULL";
    assert_eq!(app.count(closed).await, 1);
    // A larger limit gives nothing back of it, and nothing is lost by it.
    app.set_tier(&user, "large").await;
    let numbers = quota(&app, &user).await.quota.unwrap();
    assert_eq!(
        (numbers.limit_tokens, numbers.remaining_tokens),
        (1210, 1109)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn months_that_take_no_more_events_are_read_once() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    grant(&app, credits(&user, 500)).await;
    app.sql("UPDATE credit_grants SET granted_at = now() - interval '2 years'")
        .await;
    // 20 beyond the base in each of 24 months.
    app.sql(&format!(
        "WITH months AS (
             SELECT to_char(now() AT TIME ZONE 'UTC' - n * interval '1 month', 'YYYY-MM') AS month
             FROM generate_series(1, 24) AS n
         ), bases AS (
             INSERT INTO quota_balances (user_id, month, model, base_limit)
             SELECT '{user}', month, '', 100 FROM months
         )
         INSERT INTO monthly_model_usage
         SELECT '{user}', month, 'gpt', 120, 0, 0, 0, 0, 1 FROM months"
    ))
    .await;
    for settled in [false, true] {
        let numbers = quota(&app, &user).await.quota.unwrap();
        assert_eq!(numbers.limit_tokens, 100 + 500 - 24 * 20, "{settled}");
        assert_eq!(settle(&app).await, usize::from(!settled));
    }
    // Nothing is booked for them by now: whatever is there does not count.
    let now = Period::containing(Utc::now());
    for (month, limit) in [(now.minus_months(3), 120), (now.minus_months(2), 110)] {
        app.sql(&format!(
            "UPDATE monthly_model_usage SET input_tokens = 130 WHERE month = '{month}'"
        ))
        .await;
        let numbers = quota(&app, &user).await.quota.unwrap();
        assert_eq!(numbers.limit_tokens, limit, "{month}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn voiding_takes_back_what_is_left_and_nothing_else() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let user = app.user().tier("small").create().await.id;
    let granted = grant(&app, credits(&user, 50)).await;
    use_tokens(&app, &user, 120).await;
    let voided = void(&app, &granted.id).await.unwrap();
    assert_eq!((voided.tokens, voided.remaining_tokens), (50, 0));
    assert!(voided.voided_at.is_some());
    let seen = quota_through(&replica.channel(), &app.service_key, &user).await;
    let numbers = seen.quota.unwrap();
    assert_eq!((numbers.limit_tokens, numbers.remaining_tokens), (120, 0));
    assert_eq!(void(&app, &granted.id).await.unwrap(), voided);
    let acts = "SELECT count(*) FROM audit_events WHERE action = 'quota.credits_voided'";
    assert_eq!(app.count(acts).await, 1);
    let unknown = void(&app, &Uuid::now_v7().to_string()).await.unwrap_err();
    assert_eq!(
        (unknown.code(), reason(&unknown)),
        (Code::NotFound, "CREDIT_NOT_FOUND".to_owned())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_credit_is_closed_as_of_the_moment_that_its_draws_are_of() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let granted = grant(&app, credits(&user, 50)).await;
    let client = cluster::connect(&app.database_url).await;
    let lock = "BEGIN; SELECT FROM quota_balances FOR UPDATE";
    client.batch_execute(lock).await.unwrap();
    let voiding = async {
        let voided = void(&app, &granted.id).await.unwrap();
        assert_eq!(voided.remaining_tokens, 0);
    };
    let using = async {
        let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted";
        eventually("it waits", async || app.count(waiting).await == 1).await;
        use_tokens(&app, &user, 130).await;
        let now = "SELECT clock_timestamp()::text";
        let used_at: String = client.query_one(now, &[]).await.unwrap().get(0);
        client.batch_execute("COMMIT").await.unwrap();
        used_at
    };
    let ((), used_at) = tokio::join!(voiding, using);
    let after = format!(
        "SELECT count(*) FROM credit_grants
         WHERE closed_at > '{used_at}' AND voided_at = closed_at AND drawn_tokens = 30"
    );
    assert_eq!(app.count(&after).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_grant_counts_once_however_it_races() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let user = app.user().tier("small").create().await.id;
    let request = credits(&user, 40);
    let channels = [app.channel.clone(), replica.channel()];
    let grants = (0..32).map(|n| grant_through(&channels[n % 2], &app, request.clone()));
    let grants = join_all(grants).await.into_iter().map(Result::unwrap);
    let grants: Vec<Credit> = grants.collect();
    assert!(grants.iter().all(|one| *one == grants[0]), "{grants:?}");
    assert_eq!(quota(&app, &user).await.quota.unwrap().limit_tokens, 140);
    assert_eq!(app.count("SELECT count(*) FROM credit_grants").await, 1);
    let acts = "SELECT count(*) FROM audit_events WHERE action = 'quota.credits_granted'";
    assert_eq!(app.count(acts).await, 1);

    // Anything else by the same id is another grant; the same is answered as it stands.
    let other = app.user().tier("small").create().await.id;
    let same = || request.clone();
    for changed in [
        GrantCreditsRequest {
            user_id: other.clone(),
            ..same()
        },
        GrantCreditsRequest {
            tokens: 41,
            ..same()
        },
        GrantCreditsRequest {
            priority: 9,
            ..same()
        },
        GrantCreditsRequest {
            expires_at: Some(at(Utc::now() + TimeDelta::days(1))),
            ..same()
        },
        GrantCreditsRequest {
            reason: "another".to_owned(),
            ..same()
        },
    ] {
        let refused = grant_through(&app.channel, &app, changed)
            .await
            .unwrap_err();
        let said = (refused.code(), reason(&refused));
        assert_eq!(said, (Code::AlreadyExists, "CREDIT_CONFLICT".to_owned()));
    }
    let voided = void(&app, &grants[0].id).await.unwrap();
    assert_eq!(grant(&app, same()).await, voided);
    assert_eq!(app.count("SELECT count(*) FROM credit_grants").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grant_is_answered_again_after_it_has_expired() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let now = Utc::now();
    let request = GrantCreditsRequest {
        expires_at: Some(at(now + TimeDelta::days(1))),
        ..credits(&user, 40)
    };
    let granted = grant(&app, request.clone()).await;
    // As if that day had passed.
    app.sql("UPDATE credit_grants SET expires_at = expires_at - interval '1 day'")
        .await;
    let late = GrantCreditsRequest {
        expires_at: Some(at(now)),
        ..request
    };
    let again = grant(&app, late.clone()).await;
    assert_eq!((again.id, again.remaining_tokens), (granted.id, 0));
    let other = GrantCreditsRequest {
        tokens: 41,
        ..late.clone()
    };
    let refused = grant_through(&app.channel, &app, other).await.unwrap_err();
    assert_eq!(reason(&refused), "CREDIT_CONFLICT");
    let new = GrantCreditsRequest {
        request_id: Uuid::now_v7().to_string(),
        ..late
    };
    let refused = grant_through(&app.channel, &app, new).await.unwrap_err();
    assert_eq!(reason(&refused), "INVALID_FIELD");
    assert_eq!(app.count("SELECT count(*) FROM credit_grants").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_of_credits_is_of_one_moment() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let granting = async {
        for _ in 0..150 {
            grant(&app, credits(&user, 7)).await;
        }
    };
    let listing = || async {
        loop {
            let listed = list(&app, &user, 2, "").await.unwrap().credits;
            for credit in listed {
                assert_eq!(credit.remaining_tokens, 7, "nothing was used");
            }
        }
    };
    let listing = join_all((0..4).map(|_| listing()));
    tokio::select! {
        () = granting => {}
        _ = listing => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_grants_do_not_exceed_what_a_user_may_have() {
    let (app, _tiers) = with_tiers().await;
    let replica = app.replica().await;
    let user = app.user().tier("small").create().await.id;
    app.sql(&format!(
        "INSERT INTO credit_grants (id, user_id, tokens, priority, reason, request_id, actor_kind)
         SELECT gen_random_uuid(), '{user}', 1, 0, '', gen_random_uuid(), 'operator'
         FROM generate_series(1, 195)"
    ))
    .await;
    let channels = [app.channel.clone(), replica.channel()];
    let grants = (0..12).map(|n| grant_through(&channels[n % 2], &app, credits(&user, 10)));
    let grants = join_all(grants).await;
    let refused = grants.iter().filter_map(|one| one.as_ref().err());
    let refused: Vec<_> = refused.map(reason).collect();
    assert_eq!(refused, ["TOO_MANY_CREDITS"; 7]);
    assert_eq!(
        quota(&app, &user).await.quota.unwrap().limit_tokens,
        100 + 195 + 50
    );
    // Voiding one makes room.
    let newest = list(&app, &user, 1, "").await.unwrap().credits.remove(0);
    void(&app, &newest.id).await.unwrap();
    grant(&app, credits(&user, 10)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn credits_are_listed_newest_first_page_by_page() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let other = app.user().tier("small").create().await.id;
    let mut granted = Vec::new();
    for tokens in 1..=5 {
        granted.push(grant(&app, credits(&user, tokens)).await);
        grant(&app, credits(&other, tokens)).await;
    }
    granted.reverse();
    let (mut listed, mut token) = (Vec::new(), String::new());
    for size in [2, 2, 1] {
        let page = list(&app, &user, 2, &token).await.unwrap();
        assert_eq!(page.credits.len(), size);
        listed.extend(page.credits);
        token = page.next_page_token;
    }
    assert_eq!((listed, token.as_str()), (granted, ""));
    let first = list(&app, &user, 2, "").await.unwrap();
    let refused = list(&app, &other, 2, &first.next_page_token)
        .await
        .unwrap_err();
    assert_eq!(reason(&refused), "INVALID_FIELD");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_can_be_given_a_limit_or_credits() {
    let (app, _tiers) = with_tiers().await;
    let nobody = Uuid::now_v7().to_string();
    let mut admin = app.admin(&app.service_key);
    let errors = [
        admin
            .set_quota_override(own_limit(&nobody, 1))
            .await
            .unwrap_err(),
        clear(&app, &nobody).await.unwrap_err(),
        grant_through(&app.channel, &app, credits(&nobody, 1))
            .await
            .unwrap_err(),
        list(&app, &nobody, 0, "").await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(
            (error.code(), reason(&error)),
            (Code::NotFound, "USER_NOT_FOUND".to_owned())
        );
    }
    assert_eq!(app.count("SELECT count(*) FROM quota_balances").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_act_is_in_the_trail_with_its_reason() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    let why = |what: &str| what.to_owned();
    let mut admin = app.admin(&app.service_key);
    let set = SetQuotaOverrideRequest {
        reason: why("set it"),
        ..own_limit(&user, 7)
    };
    admin.set_quota_override(set).await.unwrap();
    let cleared = ClearQuotaOverrideRequest {
        user_id: user.clone(),
        reason: why("clear it"),
    };
    for _ in 0..2 {
        admin.clear_quota_override(cleared.clone()).await.unwrap();
    }
    let given = GrantCreditsRequest {
        reason: why("give it"),
        ..credits(&user, 30)
    };
    let credit = grant(&app, given).await;
    let taken = VoidCreditsRequest {
        credit_id: credit.id.clone(),
        reason: why("take it"),
    };
    admin.void_credits(taken).await.unwrap();
    let rows = app
        .sql(
            "SELECT action, target_id::text, actor_kind, details->>'reason',
                coalesce(details->>'user_id', target_id::text)
             FROM audit_events WHERE action LIKE 'quota.%' ORDER BY occurred_at",
        )
        .await;
    let events: Vec<[String; 5]> = rows
        .iter()
        .map(|row| std::array::from_fn(|column| row.get(column)))
        .collect();
    let expected = [
        ("quota.override_set", &user, "set it"),
        ("quota.override_cleared", &user, "clear it"),
        ("quota.credits_granted", &credit.id, "give it"),
        ("quota.credits_voided", &credit.id, "take it"),
    ];
    let expected = expected
        .map(|(action, target, why)| [action, target, "service", why, &user].map(str::to_owned));
    assert_eq!(events, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_has_a_limit_of_its_own() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    let spent = UsageEvent {
        model: "gpt-5".to_owned(),
        tokens: tokens(150),
        ..event(&user)
    };
    app.record(&spent).await.unwrap();
    let model = |model: &str, limit, used| ModelQuota {
        model: model.to_owned(),
        limit_tokens: limit,
        used_tokens: used,
        remaining_tokens: limit - used,
        held_tokens: 0,
    };
    let answer = quota(&app, &user).await;
    assert_eq!(
        answer.models,
        [model("a-model", 700, 0), model("gpt-5", 200, 150)]
    );
    for (model, wanted, decision) in [
        ("gpt-5", 50, Decision::Allowed),
        ("gpt-5", 51, Decision::ModelLimit),
        ("a-model", 700, Decision::Allowed),
        ("another", 850, Decision::Allowed),
        ("", 850, Decision::Allowed),
        ("gpt-5", 851, Decision::MonthlyLimit),
    ] {
        let got = check_through(&app.channel, &app, &user, wanted, model).await;
        assert_eq!(got, decision, "{model} {wanted}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tier_that_is_gone_has_the_limits_of_the_default_one() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("large").create().await.id;
    app.sql("UPDATE users SET tier = 'retired' WHERE tier = 'large'")
        .await;
    let answer = quota(&app, &user).await;
    let numbers = answer.quota.unwrap();
    assert_eq!(
        (numbers.limit_tokens, numbers.tier.as_str()),
        (100, "retired")
    );
    assert_eq!(answer.max_request_tokens, Some(60));
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_changes_a_limit_is_told_to_all_replicas() {
    let (app, _tiers) = with_tiers().await;
    let user = app.user().tier("small").create().await.id;
    grant(&app, credits(&user, 5)).await;
    let settings = DatabaseSettings {
        url: Secret::new(app.database_url.clone()),
        ..DatabaseSettings::default()
    };
    let mut changes = Store::new(&settings).unwrap().changes().await.unwrap();
    let id: UserId = user.parse().unwrap();
    let of_user = Some(Change::Quota(id));
    let over = format!(
        "INSERT INTO quota_overrides (user_id, monthly_tokens, reason, actor_kind)
         VALUES ('{user}', 5, '', 'operator')"
    );
    for (statement, told) in [
        (over.as_str(), of_user),
        ("UPDATE quota_overrides SET monthly_tokens = 6", of_user),
        ("DELETE FROM quota_overrides", of_user),
        ("UPDATE credit_grants SET tokens = 6", of_user),
        (
            "UPDATE credit_grants SET closed_at = now(), drawn_tokens = 0",
            None,
        ),
        ("UPDATE credit_grants SET voided_at = now()", of_user),
        ("UPDATE quota_balances SET leased = 1", None),
        ("DELETE FROM credit_grants", of_user),
        ("TRUNCATE credit_grants", Some(Change::All)),
        ("TRUNCATE quota_overrides", Some(Change::All)),
    ] {
        app.sql(statement).await;
        // What is told after it: changes come in the order of their commits.
        app.sql("UPDATE service_accounts SET name = name").await;
        let mut heard = Vec::new();
        loop {
            match changes.next().await.unwrap() {
                Notification::Changed(Change::Services) => break,
                Notification::Changed(change) => heard.push(change),
                Notification::Heartbeat(..) => {}
            }
        }
        assert_eq!(heard, told.into_iter().collect::<Vec<_>>(), "{statement}");
    }
    // And by what no statement of a test does: the RPCs.
    grant(&app, credits(&user, 5)).await;
    clear(&app, &user).await.unwrap();
    app.sql("UPDATE service_accounts SET name = name").await;
    let mut heard = BTreeSet::new();
    loop {
        match changes.next().await.unwrap() {
            Notification::Changed(Change::Services) => break,
            Notification::Changed(Change::Quota(user)) => heard.insert(user),
            _ => true,
        };
    }
    assert_eq!(heard, BTreeSet::from([id]));
}

/// What upkeep does; returns how many users' months it changed.
async fn settle(app: &TestApp) -> usize {
    app.running().usage.settle(Utc::now()).await.unwrap()
}

/// Makes this month, with all that was granted and recorded in it, the last one.
async fn begin_next_month(app: &TestApp) {
    let (_, _, last, _) = turn_of_the_month();
    let start = last.start().to_rfc3339();
    app.sql(&format!("UPDATE quota_balances SET month = '{last}'"))
        .await;
    app.sql(&format!("UPDATE credit_grants SET granted_at = '{start}'"))
        .await;
}

async fn use_tokens_at(app: &TestApp, user_id: &str, input: i64, when: DateTime<Utc>) {
    let event = UsageEvent {
        occurred_at: Some(at(when)),
        tokens: tokens(input),
        ..event(user_id)
    };
    app.record(&event).await.unwrap();
}

fn own_limit(user_id: &str, tokens: i64) -> SetQuotaOverrideRequest {
    SetQuotaOverrideRequest {
        user_id: user_id.to_owned(),
        limit: Some(Limit::MonthlyTokens(tokens)),
        ..SetQuotaOverrideRequest::default()
    }
}

async fn clear(app: &TestApp, user_id: &str) -> Result<Quota, Status> {
    let request = ClearQuotaOverrideRequest {
        user_id: user_id.to_owned(),
        reason: String::new(),
    };
    let cleared = app
        .admin(&app.service_key)
        .clear_quota_override(request)
        .await?;
    Ok(cleared.into_inner().quota.unwrap())
}

fn credits(user_id: &str, tokens: i64) -> GrantCreditsRequest {
    GrantCreditsRequest {
        user_id: user_id.to_owned(),
        tokens,
        request_id: Uuid::now_v7().to_string(),
        ..GrantCreditsRequest::default()
    }
}

async fn grant(app: &TestApp, request: GrantCreditsRequest) -> Credit {
    grant_through(&app.channel, app, request).await.unwrap()
}

async fn grant_through(
    channel: &Channel,
    app: &TestApp,
    request: GrantCreditsRequest,
) -> Result<Credit, Status> {
    let mut admin = AdminServiceClient::new(channel.clone());
    let granted = admin
        .grant_credits(with_bearer(request, &app.service_key))
        .await?;
    Ok(granted.into_inner().credit.unwrap())
}

async fn void(app: &TestApp, id: &str) -> Result<Credit, Status> {
    let request = VoidCreditsRequest {
        credit_id: id.to_owned(),
        reason: String::new(),
    };
    let voided = app.admin(&app.service_key).void_credits(request).await?;
    Ok(voided.into_inner().credit.unwrap())
}

async fn list(
    app: &TestApp,
    user_id: &str,
    page_size: i32,
    page_token: &str,
) -> Result<ListCreditsResponse, Status> {
    let request = ListCreditsRequest {
        user_id: user_id.to_owned(),
        page_size,
        page_token: page_token.to_owned(),
    };
    let listed = app.admin(&app.service_key).list_credits(request).await?;
    Ok(listed.into_inner())
}

async fn quota(app: &TestApp, user_id: &str) -> GetQuotaResponse {
    quota_through(&app.channel, &app.service_key, user_id).await
}

async fn quota_through(channel: &Channel, service_key: &str, user_id: &str) -> GetQuotaResponse {
    let request = GetQuotaRequest {
        user_id: user_id.to_owned(),
    };
    let answer = UsageServiceClient::new(channel.clone())
        .get_quota(with_bearer(request, service_key))
        .await;
    answer.expect("answered").into_inner()
}

async fn check_through(
    channel: &Channel,
    app: &TestApp,
    user_id: &str,
    tokens: i64,
    model: &str,
) -> Decision {
    let request = CheckQuotaRequest {
        user_id: user_id.to_owned(),
        tokens,
        model: model.to_owned(),
    };
    let answer = UsageServiceClient::new(channel.clone())
        .check_quota(with_bearer(request, &app.service_key))
        .await;
    answer.expect("answered").into_inner().decision()
}
