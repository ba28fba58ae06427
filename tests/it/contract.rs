//! The contract of the messages: what is refused, how it is named, where the limits lie.

mod bounds;
mod reasons;
mod wrong;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use prost::Message;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{ImportUsersRequest, ImportUsersResponse, ImportUsersRow},
    usage::v1::{
        BatchRecordUsageRequest, BatchRecordUsageResponse, RecordUsageRequest, StreamUsageRequest,
        StreamUsageResponse, UsageEvent, usage_result,
    },
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use wrong::Wrong;

use crate::{
    descriptor,
    harness::{Raw, TestApp, reason},
};

/// Fields that no value makes wrong, or not in this way, and why.
const ANY_VALUE: [(&str, &str, &str); 19] = [
    (wrong::importing::IMPORT, "dry_run", "a bool"),
    (wrong::importing::IMPORT, "allow_admins", "a bool"),
    (wrong::importing::IMPORT, "rows.is_active", "a bool"),
    (wrong::importing::IMPORT, "rows.row", "the caller's own"),
    (
        "auth.v1.AuthService/ConfirmTotp",
        "keep_other_sessions",
        "a bool",
    ),
    (
        "auth.v1.AuthService/DisableTotp",
        "keep_other_sessions",
        "a bool",
    ),
    (
        "auth.v1.AuthService/ChangePassword",
        "keep_other_sessions",
        "a bool",
    ),
    (
        "auth.v1.AuthService/RevokeAllSessions",
        "keep_current",
        "a bool",
    ),
    (
        "admin.v1.AdminService/SetQuotaOverride",
        "unlimited",
        "has no fields",
    ),
    ("auth.v1.AuthService/ListApiKeys", "show_ended", "a bool"),
    (
        "auth.v1.AuthService/ValidateToken",
        "include_quota",
        "a bool",
    ),
    ("admin.v1.AdminService/ListUsers", "is_active", "a bool"),
    (
        "auth.v1.AuthService/ValidateToken",
        "min_freshness",
        "its fields have",
    ),
    (
        "auth.v1.AuthService/ValidateToken",
        "min_freshness.from_database",
        "has no fields",
    ),
    (
        "auth.v1.AuthService/BatchValidateTokens",
        "min_freshness",
        "its fields have",
    ),
    (
        "auth.v1.AuthService/BatchValidateTokens",
        "min_freshness.from_database",
        "has no fields",
    ),
    (
        "usage.v1.UsageService/ExtendReservation",
        "reservation",
        "RESERVATION_INVALID",
    ),
    (
        "usage.v1.UsageService/CommitReservation",
        "reservation",
        "RESERVATION_INVALID",
    ),
    (
        "usage.v1.UsageService/ReleaseReservation",
        "reservation",
        "RESERVATION_INVALID",
    ),
];

/// Updates carry the whole user (AIP-134), and read these fields of it.
const UPDATES: [(&str, &[&str]); 2] = [
    (
        "auth.v1.AuthService/UpdateCurrentUser",
        &["username", "full_name", "email"],
    ),
    (
        "admin.v1.AdminService/UpdateUser",
        &["id", "email", "username", "full_name", "role"],
    ),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_field_is_named_alone_and_its_value_is_not_repeated() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let mut failures = Vec::new();
    for row in wrong::rows(&user) {
        if let Err(why) = check(&app, &row).await {
            failures.push(format!(
                "{} {} = {:?}: {why}",
                row.rpc, row.field, row.value
            ));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn every_field_of_every_request_has_a_wrong_value_in_the_table() {
    let user = crate::harness::TestUser {
        id: "01890a5d-ac96-774b-bcce-b302099a8057".to_owned(),
        email: "a@example.com".to_owned(),
        username: "someone".to_owned(),
    };
    let rows = wrong::rows(&user);
    let covered = rows
        .iter()
        .map(|row| (row.rpc.to_owned(), row.field.clone()));
    let mut covered: BTreeSet<(String, String)> = covered.collect();
    // Each is wrong among others as it is alone, which the test after this one shows.
    for row in rows.iter().filter(|row| row.rpc == wrong::RECORD) {
        if let Some(field) = row.field.strip_prefix("event.") {
            for rpc in [wrong::RECORD_BATCH, wrong::RECORD_STREAM] {
                covered.insert((rpc.to_owned(), format!("events.{field}")));
            }
        }
    }
    for (field, ..) in wrong::importing::rows(&rows) {
        covered.insert((wrong::importing::IMPORT.to_owned(), format!("rows.{field}")));
    }
    let any = ANY_VALUE.map(|(rpc, field, _)| (rpc.to_owned(), field.to_owned()));
    covered.extend(any);
    for (rpc, read) in UPDATES {
        let mut ignored = paths("tollkeeper.auth.v1.User");
        ignored.retain(|field| !read.contains(&&**field));
        covered.extend(
            ignored
                .into_iter()
                .map(|f| (rpc.to_owned(), format!("user.{f}"))),
        );
    }
    let mut declared = BTreeSet::new();
    for rpc in descriptor::own_rpcs() {
        let name = rpc.path.trim_start_matches("/tollkeeper.").to_owned();
        for field in paths(&rpc.input) {
            declared.insert((name.clone(), field));
        }
    }
    assert!(
        declared.len() > 30,
        "the walk found {} fields",
        declared.len()
    );
    let missing: Vec<_> = declared.difference(&covered).collect();
    assert!(missing.is_empty(), "without a wrong value: {missing:#?}");
    // `by` and `limit` are oneofs themselves: none of their fields is set.
    covered.retain(|(_, field)| field != "by" && field != "limit");
    let stale: Vec<_> = covered.difference(&declared).collect();
    assert!(
        stale.is_empty(),
        "in the table, but not in the contract: {stale:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_event_is_refused_among_others_as_it_is_alone() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let rows = wrong::rows(&user).into_iter();
    let rows: Vec<Wrong> = rows.filter(|row| row.rpc == wrong::RECORD).collect();
    let events: Vec<UsageEvent> = rows
        .iter()
        .filter_map(|row| {
            RecordUsageRequest::decode(row.message.clone())
                .unwrap()
                .event
        })
        .collect();
    let request = BatchRecordUsageRequest {
        events: events.clone(),
    };
    let batch: BatchRecordUsageResponse = ask(&app, wrong::RECORD_BATCH, request).await.unwrap();
    let request = StreamUsageRequest { offset: 7, events };
    let stream: StreamUsageResponse = ask(&app, wrong::RECORD_STREAM, request).await.unwrap();
    assert_eq!(stream.acknowledged, 7 + stream.failures.len() as i64);
    let with_event = rows.iter().filter(|row| row.field != "event");
    let batch = batch.results.into_iter().map(|one| one.result.unwrap());
    let mut seen = 0;
    for ((row, result), of_stream) in with_event.zip(batch).zip(stream.failures) {
        let usage_result::Result::Failure(failure) = result else {
            panic!("{} = {:?} was booked", row.field, row.value);
        };
        assert_eq!(failure.reason, "INVALID_FIELD");
        let fields: Vec<_> = failure.fields.iter().map(|field| &field.field).collect();
        assert_eq!(fields, [row.field.trim_start_matches("event.")]);
        assert_eq!(of_stream.failure, Some(failure));
        seen += 1;
    }
    assert!(seen > 50, "{seen} wrong events");
    app.assert_books_balance(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_row_of_an_import_is_refused_as_a_user_to_create_would_be() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let create_user = wrong::rows(&user);
    let rows = wrong::importing::rows(&create_user);
    // What is said of each when it is created alone.
    let mut alone = BTreeMap::new();
    for row in create_user
        .iter()
        .filter(|row| row.rpc == wrong::CREATE_USER)
    {
        let status = send(&app, row.rpc, row.message.clone()).await.unwrap_err();
        let mut violations = violations(&status);
        let violation = violations.remove(&row.field).expect("named");
        alone.insert((row.field.clone(), row.value.clone()), violation);
    }
    let numbered = |(number, (_, _, row)): (i64, &wrong::importing::WrongRow)| ImportUsersRow {
        row: number,
        ..row.clone()
    };
    let request = ImportUsersRequest {
        source: "legacy".to_owned(),
        allow_admins: true,
        rows: (0..).zip(&rows).map(numbered).collect(),
        ..ImportUsersRequest::default()
    };
    let answer: ImportUsersResponse = ask(&app, wrong::importing::IMPORT, request).await.unwrap();
    assert_eq!((answer.imported, answer.already_there), (0, 0));
    let mut compared = 0;
    for ((number, failure), (field, value, _)) in (0..).zip(&answer.failures).zip(&rows) {
        assert_eq!((failure.row, &*failure.reason), (number, "INVALID_FIELD"));
        let [named] = &failure.fields[..] else {
            panic!("{field} = {value:?}: {failure:?}");
        };
        assert_eq!(named.field, *field, "{value:?}");
        assert!(
            value.len() <= 3 || !failure.message.contains(value),
            "{failure:?}"
        );
        if let Some(violation) = alone.get(&(field.clone(), value.clone())) {
            assert_eq!(named.description, *violation, "{field} = {value:?}");
            compared += 1;
        }
    }
    assert_eq!(answer.failures.len(), rows.len());
    assert!(compared > 25, "{compared} of the same rules");
}

#[tokio::test(flavor = "multi_thread")]
async fn all_wrong_fields_of_a_request_are_named_at_once() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (rpc, fields, message) in wrong::all_at_once(&user) {
        let status = send(&app, rpc, message).await.expect_err(rpc);
        assert_eq!(status.code(), Code::InvalidArgument, "{rpc}: {status:?}");
        let named: BTreeSet<String> = violations(&status).into_keys().collect();
        assert_eq!(
            named,
            fields.iter().map(|f| (*f).to_owned()).collect(),
            "{rpc}"
        );
    }
}

/// Sends a message to an RPC of ours as a caller whom it admits.
async fn send(app: &TestApp, rpc: &str, message: Bytes) -> Result<Bytes, Status> {
    let path = format!("/tollkeeper.{rpc}");
    let is_for_users = |rpc: &descriptor::Rpc| rpc.rule.user && !rpc.rule.service;
    let rpcs = descriptor::own_rpcs();
    let credential = match rpcs.iter().find(|rpc| rpc.path == path) {
        Some(rpc) if is_for_users(rpc) => app.admin_token().await,
        _ => app.service_key.clone(),
    };
    let answer = Raw::call(&app.channel, &path, message, Some(&credential)).await?;
    Ok(answer.into_inner())
}

/// Sends a message and reads the answer.
async fn ask<M: Message + Default>(
    app: &TestApp,
    rpc: &str,
    message: impl Message,
) -> Result<M, Status> {
    let answer = send(app, rpc, message.encode_to_vec().into()).await?;
    Ok(M::decode(answer).expect("an answer"))
}

async fn check(app: &TestApp, row: &Wrong) -> Result<(), String> {
    let Err(status) = send(app, row.rpc, row.message.clone()).await else {
        return Err("was accepted".to_owned());
    };
    if (status.code(), reason(&status).as_str()) != (Code::InvalidArgument, "INVALID_FIELD") {
        return Err(format!("{status:?}"));
    }
    let violations = violations(&status);
    if violations.keys().ne([&row.field]) {
        return Err(format!("names {violations:?}"));
    }
    // Very short values occur in any sentence.
    let texts = violations
        .values()
        .map(String::as_str)
        .chain([status.message()]);
    let repeats = |text: &str| row.value.len() > 3 && text.contains(&row.value);
    if texts.into_iter().any(repeats) {
        return Err(format!("repeats the value: {}", status.message()));
    }
    Ok(())
}

/// The fields that an error names and what it says of each.
fn violations(status: &Status) -> BTreeMap<String, String> {
    let details = status.get_details_bad_request();
    let details = details.unwrap_or_else(|| panic!("no BadRequest in {status:?}"));
    details
        .field_violations
        .into_iter()
        .map(|violation| (violation.field, violation.description))
        .collect()
}

/// The paths of all fields of a message and of our messages in it.
fn paths(message: &str) -> Vec<String> {
    let mut all = Vec::new();
    for field in descriptor::fields(message) {
        all.push(field.name.clone());
        let ours = field.message.filter(|name| name.starts_with("tollkeeper."));
        for inner in ours.iter().flat_map(|name| paths(name)) {
            all.push(format!("{}.{inner}", field.name));
        }
    }
    all
}
