//! What becomes of the traces of users who were deleted.

use std::time::Duration;

use chrono::Utc;
use tokio::time::timeout;
use tollkeeper::{
    model::Period,
    proto::tollkeeper::{
        admin::v1::{
            DeleteUserRequest, SetQuotaOverrideRequest, set_quota_override_request::Limit,
        },
        usage::v1::{
            GetMonthlyUsageRequest, ListUsageRecordsRequest, QueryUsageRequest,
            commit_reservation_response::Outcome, query_usage_request::Interval,
        },
    },
};
use tonic::{Code, Status};

use super::assert_refused;
use crate::{
    harness::{PASSWORD, TestApp, TestUser, cluster, eventually},
    usage::{event, reservations},
};

async fn delete_as(app: &TestApp, credential: &str, id: &str) -> Result<(), Status> {
    let request = DeleteUserRequest {
        user_id: id.to_owned(),
        reason: "asked for".to_owned(),
    };
    app.admin(credential).delete_user(request).await.map(drop)
}

async fn delete(app: &TestApp, id: &str) {
    delete_as(app, &app.service_key, id).await.unwrap();
}

/// Has whichever server comes first look for the user's traces now, as if they had been deleted so long
/// ago.
async fn look_again(app: &TestApp, user: &TestUser, days: i32) {
    app.sql(&format!(
        "UPDATE user_erasures SET due_at = now(), deleted_at = now() - {days} * interval '1 day'
         WHERE user_id = '{}'",
        user.id
    ))
    .await;
    let replica = app.replica().await;
    let due = "SELECT count(*) FROM user_erasures WHERE due_at <= now()";
    eventually("nothing is due", async || app.count(due).await == 0).await;
    replica.stop().await.unwrap();
}

/// From where the user acted, by any of the trail, and what they named.
async fn traces(app: &TestApp, id: &str) -> i64 {
    app.count(&format!(
        "SELECT count(*) FROM audit_events WHERE
             (address IS NOT NULL OR user_agent <> '')
                 AND (actor_id = '{id}' OR (user_id = '{id}' AND actor_kind = 'anonymous'))
             OR user_id = '{id}' AND details ? 'name'"
    ))
    .await
}

async fn used(app: &TestApp, id: &str) -> i64 {
    app.count(&format!(
        "SELECT coalesce(sum(input_tokens + output_tokens + request_count), 0)::bigint
         FROM monthly_usage WHERE user_id = '{id}'"
    ))
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_deleted_user_the_sums_stay_and_nothing_personal() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let token = app.login(&user).await.access_token;
    app.login(&other).await;
    app.logout(&token).await;
    let key = app.api_key(&user, &[]).await;
    app.revoke_api_key(&user, &key.id).await;
    app.api_key(&other, &[]).await;
    let over = SetQuotaOverrideRequest {
        user_id: user.id.clone(),
        limit: Some(Limit::MonthlyTokens(1000)),
        expires_at: None,
        reason: String::new(),
    };
    let mut admin = app.admin(&app.service_key);
    admin.set_quota_override(over).await.unwrap();
    for one in [&user, &user, &other] {
        app.record(&event(&one.id)).await.unwrap();
    }
    let before = used(&app, &user.id).await;
    assert!(before > 0);
    assert!(traces(&app, &user.id).await > 4);
    delete(&app, &user.id).await;
    for table in ["sessions", "api_keys", "quota_overrides"] {
        let rows = format!("SELECT count(*) FROM {table} WHERE user_id = '{}'", user.id);
        assert_eq!(app.count(&rows).await, 0, "{table}");
    }

    look_again(&app, &user, 0).await;
    assert_eq!(traces(&app, &user.id).await, 0);
    let kept = format!(
        "SELECT count(*) FROM audit_events WHERE user_id = '{}' AND action IN \
         ('user.created', 'session.opened', 'session.ended', 'api_key.created', 'api_key.revoked')",
        user.id
    );
    assert_eq!(app.count(&kept).await, 7);
    // From where an administrator acted stays, and what is of others.
    let deletion = format!(
        "SELECT count(*) FROM audit_events WHERE action = 'user.deleted' \
         AND target_id = '{}' AND details ->> 'reason' = 'asked for' AND address IS NOT NULL",
        user.id
    );
    assert_eq!(app.count(&deletion).await, 1);
    let of_others = format!(
        "SELECT count(*) FROM audit_events WHERE user_id = '{}' \
         AND (action = 'session.opened' AND address IS NOT NULL OR details ? 'name')",
        other.id
    );
    assert_eq!(app.count(&of_others).await, 3);

    // Records are known by their keys, and say nothing else that was the user's own.
    let records = "SELECT count(*) FROM usage_records WHERE";
    let blank = "request_id = '' AND labels = '{}'";
    let of_user = format!("{records} {blank} AND user_id = '{}'", user.id);
    assert_eq!(app.count(&of_user).await, 2);
    assert_eq!(app.count(&format!("{records} NOT ({blank})")).await, 1);
    assert_eq!(used(&app, &user.id).await, before);

    // Nothing can come any more that they would have to be known by.
    look_again(&app, &user, 35).await;
    assert_eq!(app.count(&of_user).await, 2);
    look_again(&app, &user, 37).await;
    let of_user = format!("{records} user_id = '{}'", user.id);
    assert_eq!(app.count(&of_user).await, 0);
    assert_eq!(app.count("SELECT count(*) FROM usage_records").await, 1);
    assert_eq!(app.count("SELECT count(*) FROM user_erasures").await, 0);
    assert_eq!(used(&app, &user.id).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_deletes_themselves_leaves_no_address() {
    let app = TestApp::spawn().await;
    let user = app.user().admin().create().await;
    let token = app.login(&user).await.access_token;
    delete_as(&app, &token, &user.id).await.unwrap();
    let deletion = "SELECT count(*) FROM audit_events WHERE action = 'user.deleted' \
         AND actor_id = target_id AND address IS NULL AND user_agent = ''";
    assert_eq!(app.count(deletion).await, 1, "at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_trail_is_blanked_in_parts_by_all_and_resumed_by_others() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    // Three times a batch, over three partitions, each with one of somebody else.
    app.sql(&format!(
        "INSERT INTO audit_events \
             (id, occurred_at, action, actor_kind, actor_id, target_id, user_id, request_id, address) \
         SELECT gen_random_uuid(), now() - n * interval '15 minutes', 'test.made', 'user', u, u, u, \
             '', '192.0.2.1' \
         FROM generate_series(1, 6000) n, \
             unnest(ARRAY['{}', gen_random_uuid()]::uuid[]) AS u",
        user.id
    ))
    .await;
    // Somebody holds a row of the last batch.
    let holder = cluster::connect(&app.database_url).await;
    let hold = format!(
        "BEGIN; SELECT FROM audit_events WHERE user_id = '{}' AND action = 'test.made' \
         ORDER BY occurred_at DESC LIMIT 1 FOR UPDATE",
        user.id
    );
    holder.batch_execute(&hold).await.unwrap();
    let deleted = timeout(Duration::from_secs(5), delete(&app, &user.id));
    deleted.await.expect("it waits for none of the trail");
    assert_eq!(traces(&app, &user.id).await, 6000);

    let replica = app.replica().await;
    let batches =
        "SELECT count(*) FROM user_erasures WHERE after_at IS NOT NULL OR step <> 'trail_about'";
    eventually("a batch is done", async || app.count(batches).await == 1).await;
    drop(replica);
    holder.batch_execute("COMMIT").await.unwrap();

    let _replicas = (app.replica().await, app.replica().await);
    eventually("all is blank", async || traces(&app, &user.id).await == 0).await;
    let of_others = "SELECT count(*) FROM audit_events \
         WHERE action = 'test.made' AND address IS NOT NULL";
    assert_eq!(app.count(of_others).await, 6000);
}

#[tokio::test(flavor = "multi_thread")]
async fn acts_that_were_under_way_are_found_later() {
    let app = TestApp::spawn().await;
    let user = app.user().admin().create().await;
    delete(&app, &user.id).await;
    look_again(&app, &user, 0).await;
    // Of an administrator who was about to do something, and of a replica that names no user.
    app.sql(&format!(
        "INSERT INTO audit_events \
             (id, occurred_at, action, actor_kind, actor_id, target_id, request_id, address, details) \
         VALUES (gen_random_uuid(), now() - interval '1 hour', 'test.made', 'user', '{0}', \
                 gen_random_uuid(), '', '192.0.2.1', '{{}}'), \
             (gen_random_uuid(), now() - interval '1 hour', 'session.opened', 'anonymous', NULL, \
                 gen_random_uuid(), '', '192.0.2.1', '{{\"user_id\": \"{0}\"}}')",
        user.id
    ))
    .await;
    let address = "SELECT count(*) FROM audit_events WHERE address = '192.0.2.1'";
    assert_eq!(app.count(address).await, 2);
    look_again(&app, &user, 1).await;
    assert_eq!(app.count(address).await, 0);
    let next = "SELECT count(*) FROM user_erasures \
         WHERE due_at BETWEEN now() + interval '23 hours' AND now() + interval '1 day'";
    assert_eq!(app.count(next).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_committed_late_or_again_counts_once() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let client = reservations::Client::of(&app);
    let (early, late) = (
        client.hold(&user.id, 100).await,
        client.hold(&user.id, 100).await,
    );
    let committed = client.commit(&early, 10).await.unwrap();
    assert_eq!(committed.outcome(), Outcome::Recorded);
    delete(&app, &user.id).await;
    let committed = client.commit(&late, 20).await.unwrap();
    assert_eq!(committed.outcome(), Outcome::Recorded);
    look_again(&app, &user, 0).await;
    let named = "SELECT count(*) FROM usage_records WHERE request_id <> ''";
    assert_eq!(app.count(named).await, 0);
    let sum = used(&app, &user.id).await;
    assert_eq!(sum, 10 + 20 + 2);

    let replica = app.replica().await;
    let elsewhere = reservations::Client::of_replica(&app, &replica);
    for client in [&client, &elsewhere] {
        for (reservation, tokens) in [(&early, 10), (&late, 20)] {
            let again = client.commit(reservation, tokens).await.unwrap();
            assert_eq!(again.outcome(), Outcome::Duplicate);
            // Another amount is none that was booked.
            let other = client.commit(reservation, tokens + 1).await;
            assert_eq!(other.unwrap_err().code(), Code::AlreadyExists);
        }
    }
    assert_eq!(used(&app, &user.id).await, sum);
}

#[tokio::test(flavor = "multi_thread")]
async fn sums_of_a_deleted_user_are_read_by_the_id() {
    let app = TestApp::spawn().await;
    let (user, idle) = (app.user().create().await, app.user().create().await);
    let other = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    let month = Period::containing(Utc::now()).to_string();
    let before = app.month(&user.id, &month).await;
    assert!(
        before
            .totals
            .is_some_and(|totals| totals.request_count == 1)
    );
    delete(&app, &user.id).await;
    delete(&app, &idle.id).await;
    let admin = app.admin_token().await;
    for credential in [&admin, &app.service_key] {
        let mut usage = app.usage(credential);
        let asked = |user_id: &str| GetMonthlyUsageRequest {
            user_id: user_id.to_owned(),
            month: month.clone(),
        };
        let answer = usage.get_monthly_usage(asked(&user.id)).await.unwrap();
        assert_eq!(answer.into_inner(), before);
        // Of whom nothing is known but that they are not there.
        let refused = usage.get_monthly_usage(asked(&idle.id)).await;
        assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
        let query = QueryUsageRequest {
            user_id: user.id.clone(),
            interval: Interval::Month.into(),
            ..QueryUsageRequest::default()
        };
        let answer = usage.query_usage(query).await.unwrap().into_inner();
        let totals = answer.series[0].totals.unwrap();
        assert_eq!(totals.request_count, 1);
        let records = ListUsageRecordsRequest {
            user_id: user.id.clone(),
            ..ListUsageRecordsRequest::default()
        };
        let refused = usage.list_usage_records(records).await;
        assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
    }
    let token = app.login(&other).await.access_token;
    let asked = GetMonthlyUsageRequest {
        user_id: user.id,
        month,
    };
    let refused = app.usage(&token).get_monthly_usage(asked).await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_deleted_users_are_looked_through_together() {
    let app = TestApp::spawn().await;
    // More than go at once, each with some records.
    app.sql(
        "INSERT INTO user_erasures (user_id) SELECT md5(n::text)::uuid FROM generate_series(1, 250) n",
    )
    .await;
    let month = Period::containing(Utc::now());
    app.sql(&format!(
        "INSERT INTO usage_records (usage_month, user_id, event_id, occurred_at, model, input_tokens, \
             output_tokens, cached_input_tokens, cache_write_tokens, reasoning_tokens, request_id) \
         SELECT '{month}', md5((n % 250 + 1)::text)::uuid, gen_random_uuid(), \
             now() - n * interval '1 millisecond', 'a-model', 1, 1, 1, 1, 1, 'a-request' \
         FROM generate_series(1, 5000) n"
    ))
    .await;
    let _replicas = (app.replica().await, app.replica().await);
    let left = "SELECT count(*) FROM usage_records WHERE request_id <> ''";
    eventually("all are blank", async || app.count(left).await == 0).await;
    let due = "SELECT count(*) FROM user_erasures WHERE due_at <= now() OR after_at IS NOT NULL";
    eventually("each is done with", async || app.count(due).await == 0).await;
    app.sql("UPDATE user_erasures SET due_at = now(), deleted_at = now() - interval '37 days'")
        .await;
    let _third = app.replica().await;
    let rows = "SELECT (SELECT count(*) FROM usage_records) + (SELECT count(*) FROM user_erasures)";
    eventually("nothing is left", async || app.count(rows).await == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_of_very_many_sessions_is_off_at_once_and_deleted_in_parts() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    app.sql(&format!(
        "INSERT INTO sessions (id, user_id, counter, rotated_at, created_at, last_used_at, \
             idle_expires_at, absolute_expires_at, user_agent) \
         SELECT lpad(to_hex(n), 32, '0')::uuid, '{}', 0, now(), now(), now(), \
             now() + interval '1 day', now() + interval '1 day', '' \
         FROM generate_series(1, 12000) n",
        user.id
    ))
    .await;
    // Somebody holds a session of the second part.
    let holder = cluster::connect(&app.database_url).await;
    let hold =
        "BEGIN; SELECT FROM sessions WHERE id = lpad(to_hex(7000), 32, '0')::uuid FOR UPDATE";
    holder.batch_execute(hold).await.unwrap();
    let request = DeleteUserRequest {
        user_id: user.id.clone(),
        reason: String::new(),
    };
    let mut admin = app.admin(&app.service_key);
    let deletion = tokio::spawn(async move { admin.delete_user(request).await });
    let sessions = format!(
        "SELECT count(*) FROM sessions WHERE user_id = '{}'",
        user.id
    );
    eventually("the first part is gone", async || {
        app.count(&sessions).await == 12001 - 5000
    })
    .await;
    eventually("nobody gets in", async || {
        app.validate(&tokens.access_token).await.is_err()
    })
    .await;
    let refused = app.login_as(&user.email, PASSWORD).await;
    assert_refused(refused, Code::PermissionDenied, "ACCOUNT_DISABLED");
    holder.batch_execute("COMMIT").await.unwrap();
    deletion.await.unwrap().expect("deleted");
    assert_eq!(app.count(&sessions).await, 0);
    let again = delete_as(&app, &app.service_key, &user.id).await;
    assert_refused(again, Code::NotFound, "USER_NOT_FOUND");
}
