use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    time::Duration,
};

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde_json::{Value, json};
use tokio::time::sleep;
use tollkeeper::proto::tollkeeper::{
    admin::v1::DisableServiceAccountRequest,
    usage::v1::{
        ExportSummary, ExportUsageRequest, ExportUsageResponse, UsageEvent,
        export_usage_request::Format, export_usage_response::Content,
        usage_service_client::UsageServiceClient,
    },
};
use tonic::{Code, Status, Streaming, transport::Endpoint};
use uuid::Uuid;

use super::{at, event, turn_of_the_month};
use crate::harness::{TestApp, TestUser, eventually, reason, with_bearer};

const HEADER: &str = "user_id,occurred_at,event_id,model,input_tokens,output_tokens,\
    cached_input_tokens,cache_write_tokens,reasoning_tokens,total_tokens,request_id,labels,\
    recorded_at";

/// Far more than fits what the network holds for a reader who has stopped.
const MANY: i64 = 30_000;

#[tokio::test(flavor = "multi_thread")]
async fn a_csv_file_holds_the_records_newest_first() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (last, first, ..) = turn_of_the_month();
    let odd = UsageEvent {
        occurred_at: Some(at(first)),
        model: "=1+1".to_owned(),
        request_id: "a,\"b\"".to_owned(),
        labels: [("team".to_owned(), "a \"b\",\nc".to_owned())].into(),
        ..event(&user.id)
    };
    let plain = UsageEvent {
        occurred_at: Some(at(last)),
        request_id: String::new(),
        labels: HashMap::new(),
        ..event(&user.id)
    };
    for event in [&odd, &plain] {
        app.record(event).await.unwrap();
    }
    let token = app.login(&user).await.access_token;
    let (file, summary) = export(&app, &token, ExportUsageRequest::default()).await;
    let time = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Micros, true);
    let (id, odd_id, plain_id) = (&user.id, &odd.event_id, &plain.event_id);
    let recorded = recorded_at(&app).await;
    let (recorded_odd, recorded_plain) = (&recorded[odd_id], &recorded[plain_id]);
    let wanted = [
        format!("{HEADER}\r\n"),
        format!("{id},{},{odd_id},'=1+1,100,20,3,4,5,132,", time(first)),
        "\"a,\"\"b\"\"\",\"{\"\"team\"\":\"\"a \\\"\"b\\\"\",\\nc\"\"}\",".to_owned(),
        format!("{recorded_odd}\r\n"),
        format!(
            "{id},{},{plain_id},gpt-x,100,20,3,4,5,132,,{{}},",
            time(last)
        ),
        format!("{recorded_plain}\r\n"),
    ];
    assert_eq!(file, wanted.concat());
    assert_eq!(summary.record_count, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_ndjson_is_the_record_as_it_is() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (_, first, ..) = turn_of_the_month();
    let event = UsageEvent {
        occurred_at: Some(at(first)),
        model: "@cf/model".to_owned(),
        labels: [("=key".to_owned(), "grün \u{1}".to_owned())].into(),
        ..event(&user.id)
    };
    app.record(&event).await.unwrap();
    let request = ExportUsageRequest {
        user_id: user.id.clone(),
        format: Format::Ndjson.into(),
        ..ExportUsageRequest::default()
    };
    let (file, summary) = export(&app, &app.service_key, request).await;
    let [line] = &lines(&file)[..] else {
        panic!("one line: {file}");
    };
    let wanted = json!({
        "user_id": user.id,
        "occurred_at": first.to_rfc3339_opts(SecondsFormat::Micros, true),
        "event_id": event.event_id,
        "model": "@cf/model",
        "input_tokens": 100,
        "output_tokens": 20,
        "cached_input_tokens": 3,
        "cache_write_tokens": 4,
        "reasoning_tokens": 5,
        "total_tokens": 132,
        "request_id": "req-1",
        "labels": {"=key": "grün \u{1}"},
        "recorded_at": recorded_at(&app).await[&event.event_id],
    });
    assert_eq!(*line, wanted);
    assert_eq!(summary.record_count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_without_records_is_whole_all_the_same() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for (format, wanted) in [
        (Format::Csv, format!("{HEADER}\r\n")),
        (Format::Ndjson, String::new()),
    ] {
        let request = ExportUsageRequest {
            format: format.into(),
            ..ExportUsageRequest::default()
        };
        let (file, summary) = export(&app, &token, request).await;
        assert_eq!(file, wanted);
        assert_eq!(summary.record_count, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn services_and_administrators_export_all_users_and_nobody_else_does() {
    let app = TestApp::spawn().await;
    let users = [app.user().create().await, app.user().create().await];
    let mut sent = HashSet::new();
    for user in users.iter().cycle().take(10) {
        let event = event(&user.id);
        app.record(&event).await.unwrap();
        sent.insert(event.event_id);
    }
    let all = ExportUsageRequest {
        all_users: true,
        format: Format::Ndjson.into(),
        ..ExportUsageRequest::default()
    };
    let (_, reader) = app.service("reader", &["usage.read"]).await;
    for credential in [reader, app.admin_token().await] {
        let (file, _) = export(&app, &credential, all.clone()).await;
        let lines = lines(&file);
        assert_eq!(lines.len(), 10);
        assert_eq!(ids(&lines), sent);
        for user in &users {
            let of_user = lines.iter().filter(|line| line["user_id"] == user.id);
            let times = of_user.map(|line| Reverse(line["occurred_at"].as_str().unwrap()));
            assert!(times.is_sorted(), "newest first");
        }
    }
    let admin = app.user().admin().create().await;
    let key = app.api_key(&admin, &["admin"]).await.text;
    for credential in [app.login(&users[0]).await.access_token, key] {
        let mut usage = app.usage(&credential);
        let refused = usage.export_usage(all.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert_eq!(reason(&refused), "CALLER_NOT_ALLOWED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_user_has_no_export() {
    let app = TestApp::spawn().await;
    let request = ExportUsageRequest {
        user_id: Uuid::now_v7().to_string(),
        ..ExportUsageRequest::default()
    };
    let mut usage = app.usage(&app.service_key);
    let refused = usage.export_usage(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(reason(&refused), "USER_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_leave_their_records_across_batches_users_and_months() {
    let app = TestApp::spawn().await;
    let users = [app.user().create().await, app.user().create().await];
    let [first_user, second] = users.map(|user| user.id);
    let beside = format!(
        "SELECT id::text FROM
             (SELECT gen_random_uuid() AS id FROM generate_series(1, 100000) OFFSET 0) AS ids
         WHERE usage_bucket(id) = usage_bucket('{second}') LIMIT 1"
    );
    let beside: String = app.sql(&beside).await[0].get(0);
    let (_, first, before, _) = turn_of_the_month();
    // More than a batch of each, three to a microsecond, over the turn of the month; those of users who
    // stand side by side under the same names.
    for user_id in [&first_user, &second, &beside] {
        app.sql(&format!(
            "INSERT INTO usage_records
             SELECT to_char(t, 'YYYY-MM'), '{user_id}', md5(n::text)::uuid, t, 'm' || n % 2, n, 0, 0, 0, 0
             FROM generate_series(1, 2600) n,
                 LATERAL (SELECT '{first}'::timestamptz + (n / 3 - 400) * interval '1 us' AS t) AS at"
        ))
        .await;
    }
    let micros = |n| first + TimeDelta::microseconds(n);
    let any = String::new;
    for (user_id, month, start, end, model) in [
        (any(), any(), None, None, any()),
        (second.clone(), any(), None, None, any()),
        (any(), before.to_string(), None, None, any()),
        (
            second.clone(),
            before.to_string(),
            None,
            None,
            "m1".to_owned(),
        ),
        (any(), any(), Some(micros(-100)), Some(micros(50)), any()),
        (
            second,
            any(),
            Some(micros(-100)),
            Some(micros(50)),
            "m0".to_owned(),
        ),
        (any(), before.to_string(), Some(first), None, any()),
    ] {
        let request = ExportUsageRequest {
            all_users: user_id.is_empty(),
            user_id: user_id.clone(),
            month: month.clone(),
            start_time: start.map(at),
            end_time: end.map(at),
            model: model.clone(),
            format: Format::Ndjson.into(),
        };
        let (file, summary) = export(&app, &app.service_key, request).await;
        let (start, end) = (start.unwrap_or(micros(-1000)), end.unwrap_or(micros(1000)));
        let statement = format!(
            "SELECT user_id::text, event_id::text FROM usage_records
             WHERE ('{user_id}' IN ('', user_id::text)) AND ('{month}' IN ('', usage_month))
                 AND occurred_at >= '{start}' AND occurred_at < '{end}' AND '{model}' IN ('', model)
             ORDER BY usage_bucket(user_id), occurred_at DESC, event_id DESC, user_id DESC"
        );
        let rows = app.sql(&statement).await;
        let wanted: Vec<(&str, &str)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let lines = lines(&file);
        let text = |line: &'_ Value, column| line[column].as_str().unwrap().to_owned();
        let name = |line| (text(line, "user_id"), text(line, "event_id"));
        let got: Vec<_> = lines.iter().map(name).collect();
        let got = got.iter().map(|(user, event)| (&**user, &**event));
        assert!(
            got.eq(wanted.iter().copied()),
            "{month} {start} {end} {model}"
        );
        assert_eq!(summary.record_count, wanted.len() as i64);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_booked_meanwhile_neither_repeat_nor_hide_others() {
    let app = TestApp::spawn().await;
    let users = [app.user().create().await, app.user().create().await];
    for user in &users {
        fill(&app, user, MANY / 2).await;
    }
    let rows = app.sql("SELECT event_id::text FROM usage_records").await;
    let before: HashSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let mut stream = open(&app, &app.service_key, all_users()).await.unwrap();
    let mut file = data(stream.message().await.unwrap());
    // Ahead of the reader and behind, in the time of each record that there is.
    for user in &users {
        fill(&app, user, MANY / 2).await;
    }
    let (rest, summary) = rest(&mut stream).await.unwrap();
    file.extend(rest);
    let lines = lines(std::str::from_utf8(&file).unwrap());
    let seen = ids(&lines);
    assert_eq!(seen.len(), lines.len(), "none twice");
    assert!(seen.is_superset(&before), "none hidden");
    assert_eq!(summary.unwrap().record_count, lines.len() as i64);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_who_stop_hold_nothing_of_the_database() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    fill(&app, &user, MANY).await;
    // More than the pool has connections.
    let mut stopped = Vec::new();
    for _ in 0..app.settings().database.pool_size + 1 {
        // Each on a connection of its own: what is not read of one stream holds up the others.
        let mut usage = UsageServiceClient::new(app.running().channel());
        let request = with_bearer(all_users(), &app.service_key);
        let mut stream = usage.export_usage(request).await.unwrap().into_inner();
        stream.message().await.unwrap();
        stopped.push(stream);
    }
    eventually("Postgres does nothing for them", async || {
        let busy = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name = 'tollkeeper' AND (state <> 'idle' OR backend_xmin IS NOT NULL)";
        app.count(busy).await == 0
    })
    .await;
    // Others go on as ever.
    let one = ExportUsageRequest {
        user_id: user.id.clone(),
        month: "2020-01".to_owned(),
        ..ExportUsageRequest::default()
    };
    export(&app, &app.service_key, one).await;
    app.record(&event(&user.id)).await.unwrap();
    // And so do they.
    let (_, summary) = rest(&mut stopped[0]).await.unwrap();
    assert!(summary.unwrap().record_count >= MANY);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_has_64_exports_at_a_time_and_takes_others_when_some_end() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    fill(&app, &user, MANY).await;
    let mut under_way = Vec::new();
    for _ in 0..64 {
        // Each on a connection of its own: what is not read of one stream holds up the others.
        let mut usage = UsageServiceClient::new(app.running().channel());
        let request = with_bearer(all_users(), &app.service_key);
        under_way.push(usage.export_usage(request).await.unwrap().into_inner());
    }
    let refused = open(&app, &app.service_key, all_users()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(reason(&refused), "OVERLOADED");
    under_way.pop();
    eventually("a place is free", async || {
        open(&app, &app.service_key, all_users()).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_4_exports_at_a_time_and_none_once_logged_out() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    fill(&app, &user, MANY).await;
    let tokens = app.login(&user).await;
    let own = ExportUsageRequest::default;
    let mut unread = Vec::new();
    for _ in 0..4 {
        // Each on a connection of its own: what is not read of one stream holds up the others.
        let mut usage = UsageServiceClient::new(app.running().channel());
        let request = with_bearer(own(), &tokens.access_token);
        unread.push(usage.export_usage(request).await.unwrap().into_inner());
    }
    let refused = open(&app, &tokens.access_token, own()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert_eq!(reason(&refused), "OVERLOADED");
    open(&app, &app.service_key, all_users()).await.unwrap();
    app.logout(&tokens.access_token).await;
    let token = app.login(&user).await.access_token;
    eventually("unread exports have ended", async || {
        open(&app, &token, own()).await.is_ok()
    })
    .await;
    for mut stream in unread {
        let cut = rest(&mut stream).await.unwrap_err();
        assert_eq!(reason(&cut), "SESSION_ENDED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_short_export_keeps_its_place_while_it_is_unread_and_is_whole_afterwards() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    // Two messages that are sent on their own, and the summary.
    fill(&app, &user, 400).await;
    let tokens = app.login(&user).await;
    let own = ExportUsageRequest::default;
    // The network holds little of it for a reader who does not read.
    let narrow = Endpoint::new(format!("http://{}", app.running().address)).unwrap();
    let narrow = narrow.initial_stream_window_size(1024).connect_lazy();
    let mut unread = Vec::new();
    for _ in 0..4 {
        let mut usage = UsageServiceClient::new(narrow.clone());
        let request = with_bearer(own(), &tokens.access_token);
        unread.push(usage.export_usage(request).await.unwrap().into_inner());
    }
    sleep(Duration::from_millis(200)).await;
    let refused = open(&app, &tokens.access_token, own()).await.unwrap_err();
    assert_eq!(reason(&refused), "OVERLOADED");
    app.logout(&tokens.access_token).await;
    let token = app.login(&user).await.access_token;
    eventually("unread exports have ended", async || {
        open(&app, &token, own()).await.is_ok()
    })
    .await;
    for mut stream in unread {
        let (_, summary) = rest(&mut stream).await.unwrap();
        assert_eq!(summary.unwrap().record_count, 400);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_is_cut_has_no_summary() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    fill(&app, &user, MANY).await;
    let (id, key) = app.service("reader", &["usage.read"]).await;
    let mut stream = open(&app, &key, all_users()).await.unwrap();
    stream.message().await.unwrap();
    let request = DisableServiceAccountRequest {
        service_account_id: id,
    };
    let mut admin = app.admin(&app.service_key);
    admin.disable_service_account(request).await.unwrap();
    let cut = rest(&mut stream).await.unwrap_err();
    assert_eq!(cut.code(), Code::Unauthenticated);
    assert_eq!(reason(&cut), "ACCOUNT_DISABLED");

    let mut stream = open(&app, &app.service_key, all_users()).await.unwrap();
    stream.message().await.unwrap();
    let (stopped, cut) = tokio::join!(app.stop(), rest(&mut stream));
    stopped.unwrap();
    let cut = cut.unwrap_err();
    assert_eq!(cut.code(), Code::Unavailable);
    assert_eq!(reason(&cut), "SHUTTING_DOWN");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_loses_the_database_has_no_summary() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|_| {}).await;
    let user = app.user().create().await;
    fill(&app, &user, MANY).await;
    let mut stream = open(&app, &app.service_key, all_users()).await.unwrap();
    stream.message().await.unwrap();
    proxy.cut();
    let cut = rest(&mut stream).await.unwrap_err();
    assert_eq!(cut.code(), Code::Unavailable);
    assert_eq!(reason(&cut), "DATABASE_UNAVAILABLE");
    // From the beginning, as the contract says.
    proxy.resume();
    eventually("the database is back", async || {
        let Ok(mut stream) = open(&app, &app.service_key, all_users()).await else {
            return false;
        };
        matches!(rest(&mut stream).await, Ok((_, Some(told))) if told.record_count == MANY)
    })
    .await;
}

/// As many records, a second apart, back from now.
async fn fill(app: &TestApp, user: &TestUser, count: i64) {
    app.sql(&format!(
        "INSERT INTO usage_records
         SELECT to_char(t, 'YYYY-MM'), '{}', gen_random_uuid(), t, 'a-model', n, 1, 0, 0, 0, '',
             '{{\"team\": \"blue\"}}'
         FROM generate_series(1, {count}) n,
             LATERAL (SELECT date_trunc('minute', now()) - n * interval '1 second' AS t) AS at",
        user.id
    ))
    .await;
}

fn all_users() -> ExportUsageRequest {
    ExportUsageRequest {
        all_users: true,
        format: Format::Ndjson.into(),
        ..ExportUsageRequest::default()
    }
}

async fn open(
    app: &TestApp,
    credential: &str,
    request: ExportUsageRequest,
) -> Result<Streaming<ExportUsageResponse>, Status> {
    let answer = app.usage(credential).export_usage(request).await?;
    Ok(answer.into_inner())
}

/// A whole file.
async fn export(
    app: &TestApp,
    credential: &str,
    request: ExportUsageRequest,
) -> (String, ExportSummary) {
    let mut stream = open(app, credential, request).await.unwrap();
    let (file, summary) = rest(&mut stream).await.unwrap();
    let summary = summary.expect("the file is whole");
    assert_eq!(summary.byte_count, file.len() as i64);
    (String::from_utf8(file).unwrap(), summary)
}

/// What is left of a file, and its end.
async fn rest(
    stream: &mut Streaming<ExportUsageResponse>,
) -> Result<(Vec<u8>, Option<ExportSummary>), Status> {
    let (mut file, mut summary) = (Vec::new(), None);
    while let Some(message) = stream.message().await? {
        assert_eq!(summary, None, "nothing comes after the summary");
        match message.content {
            Some(Content::Summary(told)) => summary = Some(told),
            _ => file.extend(data(Some(message))),
        }
    }
    Ok((file, summary))
}

/// The bytes of a message: whole lines, and not too many.
fn data(message: Option<ExportUsageResponse>) -> Vec<u8> {
    let Some(Content::Data(data)) = message.expect("the stream goes on").content else {
        panic!("a message without data");
    };
    assert!((1..=64 * 1024).contains(&data.len()), "{}", data.len());
    assert_eq!(data.last(), Some(&b'\n'));
    data
}

fn lines(file: &str) -> Vec<Value> {
    file.lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

fn ids(lines: &[Value]) -> HashSet<String> {
    let id = |line: &Value| line["event_id"].as_str().expect("an id").to_owned();
    lines.iter().map(id).collect()
}

/// When each event was booked, as files say it.
async fn recorded_at(app: &TestApp) -> HashMap<String, String> {
    let rows = app
        .sql(
            "SELECT event_id::text,
                 to_char(recorded_at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')
             FROM usage_records",
        )
        .await;
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}
