//! The audit trail as administrators read it.

use chrono::Utc;
use prost_types::{Timestamp, value::Kind};
use tollkeeper::{
    model::Period,
    proto::tollkeeper::{
        admin::v1::{ActorKind, AuditEvent, ListAuditEventsRequest},
        auth::v1::LogoutRequest,
    },
};
use tonic::{Code, Request};

use super::{assert_invalid, assert_refused};
use crate::harness::{RunningServer, TestApp, eventually};

async fn list(app: &TestApp, request: ListAuditEventsRequest) -> Vec<AuditEvent> {
    let answer = app.admin(&app.service_key).list_audit_events(request).await;
    answer.expect("listed").into_inner().audit_events
}

fn actions(events: &[AuditEvent]) -> Vec<&str> {
    events.iter().map(|event| &*event.action).collect()
}

fn of_user(id: &str) -> ListAuditEventsRequest {
    ListAuditEventsRequest {
        user_id: id.to_owned(),
        ..ListAuditEventsRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_concerns_a_user_is_listed_newest_first() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let tokens = app.login(&user).await;
    app.login(&other).await;
    let mut logout = Request::new(LogoutRequest {});
    let id = "the-logout".parse().unwrap();
    logout.metadata_mut().insert("x-request-id", id);
    app.auth(&tokens.access_token).logout(logout).await.unwrap();
    app.set_tier(&user.id, "starter").await;
    app.disable(&user.id).await;
    let events = list(&app, of_user(&user.id)).await;
    assert_eq!(
        actions(&events),
        [
            "user.disabled",
            "user.tier_set",
            "session.ended",
            "session.opened",
            "user.created"
        ]
    );
    assert!(events.iter().all(|event| event.user_id == user.id));
    let ended = &events[2];
    assert_eq!(ended.actor_kind(), ActorKind::User);
    assert_eq!(
        (&ended.actor_id, &ended.target_id),
        (&user.id, &tokens.session_id)
    );
    assert_eq!(
        (&*ended.request_id, &*ended.address),
        ("the-logout", "127.0.0.1")
    );
    assert!(!ended.user_agent.is_empty());
    let age = Utc::now().timestamp() - ended.occurred_at.unwrap().seconds;
    assert!((0..60).contains(&age), "{age}");
    let opened = &events[3];
    assert_eq!(opened.actor_kind(), ActorKind::Anonymous);
    assert_eq!(opened.actor_id, "");
    let tier_set = &events[1];
    assert_eq!(tier_set.actor_kind(), ActorKind::Service);
    let details = tier_set.details.clone().unwrap();
    let tier = details.fields["tier"].kind.clone();
    assert_eq!(tier, Some(Kind::StringValue("starter".to_owned())));
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_by_actor_target_action_and_time_go_together() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    app.logout(&tokens.access_token).await;
    app.login(&user).await;
    let by = ListAuditEventsRequest {
        actor_id: user.id.clone(),
        ..ListAuditEventsRequest::default()
    };
    assert_eq!(actions(&list(&app, by).await), ["session.ended"]);
    let target = ListAuditEventsRequest {
        target_id: tokens.session_id.clone(),
        ..ListAuditEventsRequest::default()
    };
    let of_target = list(&app, target.clone()).await;
    assert_eq!(actions(&of_target), ["session.ended", "session.opened"]);
    let with_action = |action: &str| ListAuditEventsRequest {
        action: action.to_owned(),
        ..of_user(&user.id)
    };
    for (action, found) in [
        ("session.opened", 2),
        ("session.", 3),
        ("user.", 1),
        ("session", 0),
        ("sess_on.", 0),
    ] {
        let events = list(&app, with_action(action)).await;
        assert_eq!(events.len(), found, "{action}");
    }
    let ended_at = of_target[0].occurred_at;
    let before = ListAuditEventsRequest {
        end_time: ended_at,
        ..target.clone()
    };
    assert_eq!(actions(&list(&app, before).await), ["session.opened"]);
    let since = ListAuditEventsRequest {
        start_time: ended_at,
        ..target
    };
    assert_eq!(actions(&list(&app, since).await), ["session.ended"]);
    let later = Timestamp {
        seconds: Utc::now().timestamp() + 60,
        nanos: 0,
    };
    let nothing = ListAuditEventsRequest {
        start_time: Some(later),
        ..ListAuditEventsRequest::default()
    };
    assert_eq!(list(&app, nothing).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_hold_each_event_once_also_those_of_one_transaction() {
    let app = TestApp::spawn().await;
    // Of one moment, over three partitions, beside what the harness did.
    app.sql(
        "INSERT INTO audit_events (id, occurred_at, action, actor_kind, target_id, request_id) \
         SELECT gen_random_uuid(), date_trunc('month', now()) - months * interval '1 month', \
             'test.made', 'operator', gen_random_uuid(), '' \
         FROM generate_series(0, 2) months, generate_series(1, 7)",
    )
    .await;
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListAuditEventsRequest {
            page_size: 4,
            page_token,
            ..ListAuditEventsRequest::default()
        };
        let answer = app.admin(&app.service_key).list_audit_events(request).await;
        let page = answer.unwrap().into_inner();
        assert!(page.audit_events.len() <= 4);
        found.extend(page.audit_events);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
        let other = ListAuditEventsRequest {
            page_token: page_token.clone(),
            action: "test.made".to_owned(),
            ..ListAuditEventsRequest::default()
        };
        let refused = app.admin(&app.service_key).list_audit_events(other).await;
        assert_invalid(refused, &["page_token"]);
    }
    let rows = app
        .sql("SELECT id::text FROM audit_events ORDER BY occurred_at DESC, id DESC")
        .await;
    let expected: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    let found: Vec<&str> = found.iter().map(|event| &*event.id).collect();
    assert_eq!(found, expected);
    assert!(found.len() >= 21);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_a_user_and_of_rare_actions_are_read_from_an_index() {
    let app = TestApp::spawn().await;
    app.sql(
        "INSERT INTO audit_events (id, action, actor_kind, actor_id, target_id, user_id, request_id) \
         SELECT gen_random_uuid(), 'test.made', 'user', u, u, u, '' \
         FROM (SELECT md5((n % 2000)::text)::uuid AS u FROM generate_series(1, 20000) n) AS many",
    )
    .await;
    app.sql("ANALYZE audit_events").await;
    let id = app.sql("SELECT md5('7')::uuid::text").await[0].get::<_, String>(0);
    let by = ListAuditEventsRequest {
        actor_id: id.clone(),
        ..ListAuditEventsRequest::default()
    };
    let rare = |action: &str| ListAuditEventsRequest {
        action: action.to_owned(),
        ..ListAuditEventsRequest::default()
    };
    let id = format!("'{id}'");
    let ordered = "ORDER BY \"audit_events\".\"occurred_at\" DESC";
    for (request, found, mark, value, index) in [
        (
            of_user(id.trim_matches('\'')),
            10,
            "\"user_id\" = $1",
            &*id,
            "user_id_occurred",
        ),
        (by, 10, "\"actor_id\" = $1", &*id, "actor_id_occurred"),
        (
            rare("user.created"),
            1,
            "action COLLATE",
            "'user.created'",
            "action_occurred",
        ),
        (
            rare("service_account."),
            1,
            "action COLLATE",
            "'service_account.created'",
            "action_occurred",
        ),
        (
            rare("nothing"),
            0,
            "action COLLATE",
            "'nothing'",
            "action_occurred",
        ),
    ] {
        let list = async || {
            let listed = list(&app, request.clone()).await.len();
            assert_eq!(listed, found, "{mark} {value}");
        };
        let plan = app.plan(&[mark, ordered], &[value, "51"], list).await;
        assert!(plan.contains(index), "{value}: {plan}");
    }
    // From one action to the next.
    let list = async || assert_eq!(list(&app, rare("nothing.")).await, []);
    let marks = ["action COLLATE", "> $1"];
    let values = ["'nothing.'", "'nothing/'", "1"];
    let plan = app.plan(&marks, &values, list).await;
    assert!(plan.contains("action_occurred"), "{plan}");
}

#[tokio::test(flavor = "multi_thread")]
async fn actions_that_begin_alike_are_paged_in_the_order_of_time() {
    let app = TestApp::spawn().await;
    app.sql(
        "INSERT INTO audit_events (id, occurred_at, action, actor_kind, target_id, request_id) \
         SELECT gen_random_uuid(), now() - n / 2 * interval '1 minute', \
             (ARRAY['test.a', 'test.b', 'test.c_d', 'testing', 'tesu.a'])[1 + n % 5], \
             'operator', gen_random_uuid(), '' \
         FROM generate_series(1, 60) n",
    )
    .await;
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListAuditEventsRequest {
            page_size: 7,
            page_token,
            action: "test.".to_owned(),
            ..ListAuditEventsRequest::default()
        };
        let answer = app.admin(&app.service_key).list_audit_events(request).await;
        let page = answer.unwrap().into_inner();
        found.extend(page.audit_events.into_iter().map(|event| event.id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    let rows = app
        .sql(
            "SELECT id::text FROM audit_events WHERE starts_with(action, 'test.') \
             ORDER BY occurred_at DESC, id DESC",
        )
        .await;
    let expected: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(found, expected);
    assert_eq!(found.len(), 36);
}

#[tokio::test(flavor = "multi_thread")]
async fn acts_that_older_replicas_write_down_are_found_by_their_user_in_the_end() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    // As they were written before there was a place for it; more than one batch.
    app.sql(&format!(
        "INSERT INTO audit_events (id, occurred_at, action, actor_kind, target_id, request_id, details) \
         SELECT gen_random_uuid(), now() - n * interval '20 minutes', a.action, 'operator', \
             CASE WHEN a.is_own THEN '{}' ELSE gen_random_uuid() END, '', a.details \
         FROM generate_series(1, 1500) n, (VALUES \
             ('user.tier_set', true, '{{}}'::jsonb), \
             ('quota.override_set', true, '{{}}'), \
             ('session.opened', false, '{{\"user_id\": \"{}\"}}'), \
             ('session.ended', false, '{{\"user_id\": \"no id\"}}'), \
             ('service_account.created', false, '{{}}')) AS a (action, is_own, details)",
        user.id, other.id
    ))
    .await;
    let _replicas = (app.replica().await, app.replica().await);
    let of = async |id: &str| {
        let rows = format!("SELECT count(*) FROM audit_events WHERE user_id = '{id}'");
        app.count(&rows).await
    };
    // Each with the creation of the user.
    eventually("all are found", async || {
        (of(&user.id).await, of(&other.id).await) == (3001, 1501)
    })
    .await;
    let none = "SELECT count(*) FROM audit_events WHERE user_id IS NULL \
         AND action IN ('session.ended', 'service_account.created')";
    assert_eq!(app.count(none).await, 3001);
    let set = ListAuditEventsRequest {
        action: "quota.override_set".to_owned(),
        ..of_user(&user.id)
    };
    assert_eq!(list(&app, set).await.len(), 50);
}

#[tokio::test(flavor = "multi_thread")]
async fn acts_past_their_retention_go_by_the_month() {
    let app = TestApp::spawn().await;
    let months = [0, 1, 2, 3, 14].map(|ago| Period::containing(Utc::now()).minus_months(ago));
    for month in months {
        let name = month.to_string().replace('-', "_");
        for statement in [
            format!(
                "CREATE TABLE IF NOT EXISTS audit_events_{name} PARTITION OF audit_events
                     FOR VALUES FROM ('{month}-01 00:00:00+00') TO ('{}-01 00:00:00+00')",
                month.plus_months(1)
            ),
            format!(
                "INSERT INTO audit_events (id, occurred_at, action, actor_kind, target_id, request_id)
                 VALUES (gen_random_uuid(), '{month}-01 12:00:00+00', 'test.made', 'operator',
                     gen_random_uuid(), '')"
            ),
        ] {
            app.sql(&statement).await;
        }
    }
    // By default all are kept.
    let _keeps_all = app.replica().await;
    let mut settings = app.settings().clone();
    settings.audit.retention_months = 2;
    let replicas = (
        RunningServer::start(&settings).await.unwrap(),
        RunningServer::start(&settings).await.unwrap(),
    );
    let made = ListAuditEventsRequest {
        action: "test.made".to_owned(),
        ..ListAuditEventsRequest::default()
    };
    eventually("what is older is gone", async || {
        list(&app, made.clone()).await.len() == 3
    })
    .await;
    let partitions = "SELECT count(*) FROM pg_inherits JOIN pg_class ON oid = inhrelid
         WHERE inhparent = 'audit_events'::regclass";
    // The default one, two months back, this one, three ahead.
    assert_eq!(app.count(partitions).await, 1 + 2 + 1 + 3);
    drop(replicas);
    assert_eq!(list(&app, made).await.len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_filters_are_named() {
    let app = TestApp::spawn().await;
    let now = Timestamp {
        seconds: Utc::now().timestamp(),
        nanos: 0,
    };
    let wrong = ListAuditEventsRequest {
        page_size: -1,
        page_token: "!".to_owned(),
        user_id: "nobody".to_owned(),
        actor_id: "nobody".to_owned(),
        target_id: "nobody".to_owned(),
        action: "User Created".to_owned(),
        start_time: Some(now),
        end_time: Some(now),
    };
    let refused = app.admin(&app.service_key).list_audit_events(wrong).await;
    let fields = [
        "user_id",
        "actor_id",
        "target_id",
        "action",
        "start_time",
        "page_size",
        "page_token",
    ];
    assert_invalid(refused, &fields);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trail_is_for_administrators() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let refused = app.admin(&token).list_audit_events(of_user(&user.id)).await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
    let admin = app.admin_token().await;
    let answer = app.admin(&admin).list_audit_events(of_user(&user.id)).await;
    assert_eq!(answer.unwrap().into_inner().audit_events.len(), 2);
}
