use std::collections::HashSet;

use chrono::TimeDelta;
use prost::Message as _;
use tollkeeper::proto::tollkeeper::usage::v1::{
    ListUsageRecordsRequest, ListUsageRecordsResponse, UsageEvent,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{at, event, turn_of_the_month};
use crate::harness::{TestApp, TestUser};

#[tokio::test(flavor = "multi_thread")]
async fn a_record_comes_back_as_it_was_sent() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let event = event(&user.id);
    app.record(&event).await.unwrap();
    let page = list(&app, &app.service_key, &user.id, "", 0, "")
        .await
        .unwrap();
    assert_eq!(page.next_page_token, "");
    let [record] = &page.records[..] else {
        panic!("one record in {page:?}");
    };
    assert_eq!(record.event, Some(event));
    assert!(record.recorded_at.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_stay_in_step_while_records_are_added() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (_, first, ..) = turn_of_the_month();
    let middle = first - TimeDelta::days(1);
    let record = async |offset: i64| {
        let event = UsageEvent {
            occurred_at: Some(at(middle + TimeDelta::microseconds(offset))),
            ..event(&user.id)
        };
        app.record(&event).await.unwrap();
        event.event_id
    };
    let mut expected = HashSet::new();
    // Three to a microsecond: the order within one has to hold too.
    for n in 0..30 {
        expected.insert(record(n / 3).await);
    }
    let mut seen: Vec<UsageEvent> = Vec::new();
    let mut token = String::new();
    loop {
        let page = list(&app, &app.service_key, &user.id, "", 4, &token).await;
        let page = page.unwrap();
        assert!(page.records.len() <= 4);
        seen.extend(page.records.into_iter().map(|r| r.event.unwrap()));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
        // One ahead of everything seen, which a count of rows to skip would stumble over.
        record(1000).await;
    }
    let ids: Vec<&str> = seen.iter().map(|event| event.event_id.as_str()).collect();
    let distinct: HashSet<String> = ids.iter().map(|&id| id.to_owned()).collect();
    assert_eq!(ids.len(), distinct.len(), "none twice");
    assert_eq!(distinct, expected, "none hidden, none from ahead");
    let key = |event: &UsageEvent| {
        let at = event.occurred_at.unwrap();
        (at.seconds, at.nanos, event.event_id.clone())
    };
    assert!(seen.is_sorted_by(|a, b| key(a) > key(b)), "newest first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_month_lists_its_own_records_only() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (last, first, before, this) = turn_of_the_month();
    for instant in [last, first] {
        let event = UsageEvent {
            occurred_at: Some(at(instant)),
            ..event(&user.id)
        };
        app.record(&event).await.unwrap();
    }
    for (month, times) in [
        (before.to_string(), vec![at(last)]),
        (this.to_string(), vec![at(first)]),
        (String::new(), vec![at(first), at(last)]),
    ] {
        let page = list(&app, &app.service_key, &user.id, &month, 0, "").await;
        let records = page.unwrap().records.into_iter();
        let listed: Vec<_> = records
            .map(|record| record.event.unwrap().occurred_at.unwrap())
            .collect();
        assert_eq!(listed, times, "{month}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_fifty_by_default_and_a_thousand_at_most() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.sql(&format!(
        "INSERT INTO usage_records SELECT to_char(now(), 'YYYY-MM'), '{}', gen_random_uuid(), now(),
             'm', 1, 0, 0, 0, 0 FROM generate_series(1, 1001)",
        user.id
    ))
    .await;
    for (asked, got) in [(0, 50), (51, 51), (1000, 1000), (i32::MAX, 1000)] {
        let page = list(&app, &app.service_key, &user.id, "", asked, "").await;
        assert_eq!(page.unwrap().records.len(), got, "{asked}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_large_records_fits_what_clients_take() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.sql(&format!(
        "INSERT INTO usage_records
         SELECT to_char(now(), 'YYYY-MM'), '{}', gen_random_uuid(), now(), repeat('m', 100), 1, 0, 0, 0, 0,
             repeat('r', 128), (SELECT jsonb_object_agg(lpad(k::text, 64, 'k'), repeat('v', 256))
             FROM generate_series(1, 16) k) FROM generate_series(1, 1000)",
        user.id
    ))
    .await;
    let (mut token, mut records) = (String::new(), 0);
    loop {
        let page = list(&app, &app.service_key, &user.id, "", 1000, &token).await;
        let page = page.unwrap();
        let bytes = page.encoded_len();
        assert!(bytes <= 3 << 20, "{bytes}");
        records += page.records.len();
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
        assert!(bytes > 5 << 19, "a page need not be so small: {bytes}");
    }
    assert_eq!(records, 1000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_many_records_is_read_from_its_place_in_the_index() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    // Every hundredth.
    app.sql(&format!(
        "INSERT INTO usage_records
         SELECT to_char(t, 'YYYY-MM'),
             CASE WHEN extract(epoch FROM t)::bigint % 12000 < 120 THEN '{}' ELSE gen_random_uuid() END,
             gen_random_uuid(), t, 'm', 1, 0, 0, 0, 0
         FROM generate_series(now() - interval '40 days', now(), interval '2 minutes') AS t",
        user.id
    ))
    .await;
    app.sql("ANALYZE usage_records").await;
    let list = async || {
        let page = list(&app, &app.service_key, &user.id, "", 0, "").await;
        assert_eq!(page.unwrap().records.len(), 50);
    };
    let id = format!("'{}'", user.id);
    let marks = ["usage_bucket", "ORDER BY \"usage_records\""];
    let plan = app.plan(&marks, &[&id, &id, "51"], list).await;
    let found = "Index Cond: (((uuid_hash(user_id) & 1023) =";
    assert!(plan.contains(found), "{plan}");
    // What it would sort it would have read, all of it.
    assert!(plan.contains("Merge Append"), "{plan}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_of_another_list_is_refused() {
    let app = TestApp::spawn().await;
    let (user, other) = (users_with_two(&app).await, users_with_two(&app).await);
    let (.., this) = turn_of_the_month();
    let page = list(&app, &app.service_key, &user.id, "", 1, "").await;
    let token = page.unwrap().next_page_token;
    assert_ne!(token, "");
    for (user_id, month) in [(&other.id, String::new()), (&user.id, this.to_string())] {
        let refused = list(&app, &app.service_key, user_id, &month, 1, &token).await;
        assert_page_token_refused(&refused.unwrap_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_of_another_user_is_refused() {
    let app = TestApp::spawn().await;
    let (user, other) = (users_with_two(&app).await, users_with_two(&app).await);
    let mine = app.login(&user).await.access_token;
    let theirs = app.login(&other).await.access_token;
    let token = list(&app, &mine, "", "", 1, "").await.unwrap();
    let token = token.next_page_token;
    let refused = list(&app, &theirs, "", "", 1, &token).await;
    assert_page_token_refused(&refused.unwrap_err());
    // By whatever way it is asked for, one's own list is one list.
    let next = list(&app, &mine, &user.id, "", 1, &token).await.unwrap();
    assert_eq!(next.records.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn times_and_a_model_leave_their_records_and_pages_stay_within_them() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (last, first, before, _) = turn_of_the_month();
    let mut sent = Vec::new();
    for n in 0..24_i32 {
        let instant = first + TimeDelta::minutes((n - 12).into());
        let event = UsageEvent {
            occurred_at: Some(at(instant)),
            model: format!("model-{}", n % 2),
            ..event(&user.id)
        };
        app.record(&event).await.unwrap();
        sent.push((instant, event));
    }
    let minutes = |n| first + TimeDelta::minutes(n);
    for (start, end, month, model) in [
        (Some(minutes(-5)), None, "", ""),
        (None, Some(minutes(-5)), "", ""),
        (Some(minutes(-5)), Some(minutes(7)), "", "model-1"),
        (Some(minutes(-5)), Some(minutes(7)), &before.to_string(), ""),
        (Some(last), Some(first), "", ""),
        (None, None, "", "model-0"),
        (None, None, "", "no-model"),
    ] {
        let asked = ListUsageRecordsRequest {
            user_id: user.id.clone(),
            start_time: start.map(at),
            end_time: end.map(at),
            month: month.to_owned(),
            model: model.to_owned(),
            page_size: 3,
            ..ListUsageRecordsRequest::default()
        };
        let wanted = sent.iter().rev().filter(|(instant, event)| {
            start.is_none_or(|start| *instant >= start)
                && end.is_none_or(|end| *instant < end)
                && (month.is_empty() || *instant < first)
                && (model.is_empty() || event.model == model)
        });
        let wanted: Vec<&UsageEvent> = wanted.map(|(_, event)| event).collect();
        let mut seen = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = ListUsageRecordsRequest {
                page_token,
                ..asked.clone()
            };
            let mut usage = app.usage(&app.service_key);
            let page = usage.list_usage_records(request).await.unwrap();
            let page = page.into_inner();
            seen.extend(page.records.into_iter().map(|record| record.event.unwrap()));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(seen.iter().collect::<Vec<_>>(), wanted, "{asked:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_of_other_filters_is_refused() {
    let app = TestApp::spawn().await;
    let user = users_with_two(&app).await;
    let page = list(&app, &app.service_key, &user.id, "", 1, "").await;
    let asked = ListUsageRecordsRequest {
        user_id: user.id.clone(),
        page_token: page.unwrap().next_page_token,
        ..ListUsageRecordsRequest::default()
    };
    let long_ago = Some(at(chrono::Utc::now() - TimeDelta::days(30)));
    let far_ahead = Some(at(chrono::Utc::now() + TimeDelta::days(30)));
    let mut others = vec![asked.clone(); 3];
    others[0].start_time = long_ago;
    others[1].end_time = far_ahead;
    "gpt-x".clone_into(&mut others[2].model);
    for other in others {
        let refused = app.usage(&app.service_key).list_usage_records(other).await;
        assert_page_token_refused(&refused.unwrap_err());
    }
    let mut usage = app.usage(&app.service_key);
    usage.list_usage_records(asked).await.unwrap();
}

async fn users_with_two(app: &TestApp) -> TestUser {
    let user = app.user().create().await;
    for _ in 0..2 {
        app.record(&event(&user.id)).await.unwrap();
    }
    user
}

fn assert_page_token_refused(refused: &Status) {
    assert_eq!(refused.code(), Code::InvalidArgument);
    let fields = refused.get_details_bad_request().unwrap().field_violations;
    assert_eq!(fields[0].field, "page_token");
}

async fn list(
    app: &TestApp,
    credential: &str,
    user_id: &str,
    month: &str,
    page_size: i32,
    page_token: &str,
) -> Result<ListUsageRecordsResponse, Status> {
    let request = ListUsageRecordsRequest {
        user_id: user_id.to_owned(),
        month: month.to_owned(),
        page_size,
        page_token: page_token.to_owned(),
        ..ListUsageRecordsRequest::default()
    };
    let page = app.usage(credential).list_usage_records(request).await?;
    Ok(page.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_of_impossible_times_is_refused() {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for _ in 0..2 {
        app.record(&event(&user.id)).await.unwrap();
    }
    let page = list(&app, &app.service_key, &user.id, "", 1, "").await;
    let token = BASE64.decode(page.unwrap().next_page_token).unwrap();
    for micros in [i64::MIN, -8_000_000_000_000_000_000, -1, i64::MAX] {
        let mut forged = token.clone();
        forged[4..12].copy_from_slice(&micros.to_be_bytes());
        let forged = BASE64.encode(forged);
        let refused = list(&app, &app.service_key, &user.id, "", 1, &forged).await;
        assert_page_token_refused(&refused.unwrap_err());
    }
}
