//! The limits of the fields: the last value that is accepted and the first that is not.

use std::collections::HashMap;

use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        CreateServiceAccountRequest, CreateServiceAccountResponse, CreateUserResponse,
        DisableUserRequest, DisableUserResponse, GrantCreditsRequest, GrantCreditsResponse,
        ListCreditsRequest, ListCreditsResponse, ListServiceAccountsRequest,
        ListServiceAccountsResponse, ListUsersRequest, ListUsersResponse, RotateServiceKeyRequest,
        RotateServiceKeyResponse, SetQuotaOverrideRequest, SetQuotaOverrideResponse,
        set_quota_override_request::Limit,
    },
    auth::v1::{
        CreateApiKeyRequest, CreateApiKeyResponse, ListApiKeysRequest, ListApiKeysResponse,
        LoginRequest, LoginResponse, RegisterRequest, RegisterResponse, ValidateTokenRequest,
        ValidateTokenResponse,
    },
    usage::v1::{
        CheckQuotaRequest, CheckQuotaResponse, CommitReservationRequest, CommitReservationResponse,
        ExtendReservationRequest, ExtendReservationResponse, ListUsageRecordsRequest,
        ListUsageRecordsResponse, RecordUsageRequest, RecordUsageResponse, ReserveQuotaRequest,
        ReserveQuotaResponse, TokenCounts, UsageEvent,
    },
};
use tonic::{Code, Status};

use super::{
    ask, violations,
    wrong::{
        CHECK, COMMIT, CREATE_KEY, CREATE_SERVICE, CREATE_USER, CREDITS, DAY, DIMENSIONS, DISABLE,
        EXTEND, GRANT, KEYS, LOGIN, OVERRIDE, RECORD, RECORDS, REGISTER, RESERVE, ROTATE, SERVICES,
        USERS, VALIDATE, ago, create_api_key, create_user, event, grant_credits, register, reserve,
        set_override,
    },
};
use crate::harness::{PASSWORD, TestApp, TestUser, reason};

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_at_most_254_bytes() {
    let app = TestApp::spawn().await;
    // Labels of a domain have at most 63 bytes, the local part 64.
    let address = |last: usize| {
        let (local, label) = ("l".repeat(64), "d".repeat(63));
        format!("{local}@{label}.{label}.{}", "d".repeat(last))
    };
    assert_eq!(address(61).len(), 254);
    try_register(&app, |r| r.email = address(61)).await.unwrap();
    refuses(try_register(&app, |r| r.email = address(62)).await, "email");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_username_has_3_to_32_characters() {
    let app = TestApp::spawn().await;
    for (length, fits) in [(2, false), (3, true), (32, true), (33, false)] {
        let answer = try_register(&app, |r| r.username = "n".repeat(length)).await;
        decide(answer, fits, "username");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_name_has_at_most_200_characters() {
    let app = TestApp::spawn().await;
    for (length, fits) in [(0, true), (200, true), (201, false)] {
        let answer = try_register(&app, |r| r.full_name = "é".repeat(length)).await;
        decide(answer, fits, "full_name");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_has_12_to_128_characters() {
    let app = TestApp::spawn_with(|settings| settings.password.min_strength = 0).await;
    for (length, fits) in [(11, false), (12, true), (128, true), (129, false)] {
        let answer = try_register(&app, |r| r.password = "ü".repeat(length)).await;
        decide(answer, fits, "password");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_longest_password_logs_in() {
    let app = TestApp::spawn_with(|settings| settings.password.min_strength = 0).await;
    let (mut new, password) = (register(), "ü€🔑x".repeat(32));
    new.password.clone_from(&password);
    let identifier = new.email.clone();
    let _: RegisterResponse = ask(&app, REGISTER, new).await.unwrap();
    let request = LoginRequest {
        identifier,
        password,
    };
    let _: LoginResponse = ask(&app, LOGIN, request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_for_bcrypt_has_at_most_72_bytes() {
    let app = TestApp::spawn_with(|settings| {
        settings.password.scheme = tollkeeper::config::PasswordScheme::Bcrypt;
        settings.password.min_strength = 0;
    })
    .await;
    for (password, fits) in [("p".repeat(72), true), ("ü".repeat(36) + "p", false)] {
        let answer = try_register(&app, |r| r.password = password).await;
        decide(answer, fits, "password");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_takes_a_password_of_up_to_1024_bytes() {
    let app = TestApp::spawn().await;
    let login = |length: usize| LoginRequest {
        identifier: "nobody".to_owned(),
        password: "p".repeat(length),
    };
    let answer: Result<LoginResponse, _> = ask(&app, LOGIN, login(1024)).await;
    assert_eq!(reason(&answer.unwrap_err()), "INVALID_CREDENTIALS");
    let answer: Result<LoginResponse, _> = ask(&app, LOGIN, login(1025)).await;
    refuses(answer, "password");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_may_be_created_without_a_credential_and_cannot_log_in() {
    let app = TestApp::spawn().await;
    let new = create_user();
    let identifier = new.email.clone();
    let _: CreateUserResponse = ask(&app, CREATE_USER, new).await.unwrap();
    let error = app.login_as(&identifier, PASSWORD).await.unwrap_err();
    assert_eq!(reason(&error), "INVALID_CREDENTIALS");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_name_has_3_to_64_characters() {
    let app = TestApp::spawn().await;
    for (length, fits) in [(2, false), (3, true), (64, true), (65, false)] {
        let request = CreateServiceAccountRequest {
            name: "n".repeat(length),
            scopes: vec!["quota".to_owned()],
        };
        let answer: Result<CreateServiceAccountResponse, _> =
            ask(&app, CREATE_SERVICE, request).await;
        decide(answer, fits, "name");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scope_named_twice_counts_once() {
    let app = TestApp::spawn().await;
    let request = CreateServiceAccountRequest {
        name: "twice".to_owned(),
        scopes: vec!["quota".to_owned(); 2],
    };
    let made: CreateServiceAccountResponse = ask(&app, CREATE_SERVICE, request).await.unwrap();
    assert_eq!(made.service_account.unwrap().scopes, ["quota"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reason_to_disable_has_at_most_500_characters() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (length, fits) in [(0, true), (500, true), (501, false)] {
        let request = DisableUserRequest {
            user_id: user.id.clone(),
            reason: "é".repeat(length),
        };
        let answer: Result<DisableUserResponse, _> = ask(&app, DISABLE, request).await;
        decide(answer, fits, "reason");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_and_a_request_id_have_at_most_128_characters() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (length, fits) in [(1, true), (128, true), (129, false)] {
        let answer = record(&app, &user, |e| e.model = "~".repeat(length)).await;
        decide(answer, fits, "event.model");
        let answer = record(&app, &user, |e| e.request_id = "!".repeat(length)).await;
        decide(answer, fits, "event.request_id");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_at_most_35_days_old_and_5_minutes_ahead() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (secs_ago, fits) in [
        (35 * DAY - 60, true),
        (35 * DAY + 60, false),
        (-4 * 60, true),
        (-6 * 60, false),
    ] {
        let answer = record(&app, &user, |e| e.occurred_at = Some(ago(secs_ago))).await;
        decide(answer, fits, "event.occurred_at");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_has_at_most_16_labels_of_64_and_256_bytes() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (labels, fits) in sets_of_labels() {
        let answer = record(&app, &user, |e| e.labels = labels.clone()).await;
        decide(answer, fits, "event.labels");
        let held = hold(&app, &user, |_| {}).await.unwrap();
        let answer = commit(&app, held, |c| c.labels = labels).await;
        decide(answer, fits, "labels");
    }
}

/// And whether they fit.
fn sets_of_labels() -> [(HashMap<String, String>, bool); 4] {
    let full = |count: u8| -> HashMap<String, String> {
        let key = |n| char::from(b'a' + n).to_string().repeat(64);
        (0..count).map(|n| (key(n), "é".repeat(128))).collect()
    };
    [
        (full(16), true),
        (full(17), false),
        (HashMap::from([("k".repeat(65), String::new())]), false),
        (HashMap::from([("k".to_owned(), "v".repeat(257))]), false),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_is_of_1_to_a_trillion_tokens() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (tokens, fits) in [
        (0, false),
        (1, true),
        (1_000_000_000_000, true),
        (1_000_000_000_001, false),
    ] {
        let answer = hold(&app, &user, |r| r.tokens = tokens).await;
        if fits && tokens > 1 {
            // Of the form that it must have, and more than the tier gives.
            assert_eq!(reason(&answer.unwrap_err()), "REQUEST_TOO_LARGE");
        } else {
            decide(answer, fits, "tokens");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_request_and_the_model_of_a_reservation_have_1_to_128_characters() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (length, fits) in [(0, false), (1, true), (128, true), (129, false)] {
        let answer = hold(&app, &user, |r| r.request_id = "~".repeat(length)).await;
        decide(answer, fits, "request_id");
        let answer = hold(&app, &user, |r| r.model = "!".repeat(length)).await;
        decide(answer, fits, "model");
    }
    // Of the longest ones, what names the reservation is as long as it can be.
    let longest = |r: &mut ReserveQuotaRequest| {
        r.request_id = "r".repeat(128);
        r.model = "m".repeat(128);
    };
    let held = hold(&app, &user, longest).await.unwrap();
    assert!(held.reservation.is_ascii() && held.reservation.len() <= 1024);
    commit(&app, held, |_| {}).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_lasts_1_second_to_1_hour_and_2_minutes_by_default() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let kept = hold(&app, &user, |_| {}).await.unwrap();
    let seconds_left = |at: Option<prost_types::Timestamp>| at.unwrap().seconds - ago(0).seconds;
    let left = seconds_left(kept.expires_at);
    assert!((110..=121).contains(&left), "{left}");
    for (seconds, nanos, fits) in [
        (0, 999_999_999, false),
        (1, 0, true),
        (3600, 0, true),
        (3600, 1, false),
    ] {
        let lifetime = Some(prost_types::Duration { seconds, nanos });
        let answer = hold(&app, &user, |r| r.lifetime = lifetime).await;
        decide(answer, fits, "lifetime");
        let request = ExtendReservationRequest {
            reservation: kept.reservation.clone(),
            lifetime,
        };
        let answer: Result<ExtendReservationResponse, _> = ask(&app, EXTEND, request).await;
        decide(answer, fits, "lifetime");
    }
    let request = ExtendReservationRequest {
        reservation: kept.reservation,
        lifetime: None,
    };
    let extended: ExtendReservationResponse = ask(&app, EXTEND, request).await.unwrap();
    // Never shorter than it was.
    let left = seconds_left(extended.expires_at);
    assert!((3580..=3601).contains(&left), "{left}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_counts_at_most_a_trillion_tokens_of_a_dimension() {
    let app = TestApp::spawn().await;
    for (name, set) in DIMENSIONS {
        for (count, fits) in [(1_000_000_000_000, true), (1_000_000_000_001, false)] {
            // So much uses up whatever anybody has.
            let user = app.user().create().await;
            let held = hold(&app, &user, |_| {}).await.unwrap();
            let mut tokens = TokenCounts::default();
            *set(&mut tokens) = count;
            let answer = commit(&app, held, |c| c.tokens = Some(tokens)).await;
            decide(answer, fits, &format!("tokens.{name}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dimension_counts_at_most_a_trillion_tokens() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (name, set) in DIMENSIONS {
        for (count, fits) in [(1_000_000_000_000, true), (1_000_000_000_001, false)] {
            let mut tokens = TokenCounts::default();
            *set(&mut tokens) = count;
            let answer = record(&app, &user, |e| e.tokens = Some(tokens)).await;
            decide(answer, fits, &format!("event.tokens.{name}"));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_check_asks_for_0_to_a_trillion_tokens() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for (tokens, fits) in [
        (-1, false),
        (0, true),
        (1_000_000_000_000, true),
        (1_000_000_000_001, false),
    ] {
        let user_id = user.id.clone();
        let request = CheckQuotaRequest {
            user_id,
            tokens,
            ..CheckQuotaRequest::default()
        };
        let answer: Result<CheckQuotaResponse, _> = ask(&app, CHECK, request).await;
        decide(answer, fits, "tokens");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_over_8192_bytes_is_refused_as_any_bad_token() {
    let app = TestApp::spawn().await;
    for length in [8192, 8193, 100_000] {
        let request = ValidateTokenRequest {
            token: "x".repeat(length),
            include_quota: false,
            ..ValidateTokenRequest::default()
        };
        let answer: Result<ValidateTokenResponse, _> = ask(&app, VALIDATE, request).await;
        let status = answer.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert_eq!(reason(&status), "CREDENTIAL_INVALID");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn old_service_keys_overlap_for_30_days_at_most() {
    let app = TestApp::spawn().await;
    let (id, _) = app.service("gateway", &["quota"]).await;
    for (seconds, nanos, fits) in [
        (0, 0, true),
        (0, 1, true),
        (30 * DAY, 0, true),
        (30 * DAY, 1, false),
    ] {
        let request = RotateServiceKeyRequest {
            service_account_id: id.clone(),
            overlap: Some(prost_types::Duration { seconds, nanos }),
        };
        let answer: Result<RotateServiceKeyResponse, _> = ask(&app, ROTATE, request).await;
        decide(answer, fits, "overlap");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_users_is_50_by_default_and_1000_at_most() {
    let app = TestApp::spawn().await;
    app.sql(
        "INSERT INTO users (id, email, username, tier)
         SELECT gen_random_uuid(), 'p' || n || '@example.com', 'p' || n || 'p', 'starter'
         FROM generate_series(1, 1001) n",
    )
    .await;
    for (page_size, items) in [
        (0, 50),
        (1, 1),
        (1000, 1000),
        (1001, 1000),
        (i32::MAX, 1000),
    ] {
        let request = ListUsersRequest {
            page_size,
            tier: "starter".to_owned(),
            ..ListUsersRequest::default()
        };
        let page: ListUsersResponse = ask(&app, USERS, request).await.unwrap();
        assert_eq!(page.users.len(), items, "{page_size}");
        assert_ne!(page.next_page_token, "", "{page_size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_service_accounts_is_50_by_default_and_1000_at_most() {
    let app = TestApp::spawn().await;
    app.sql(
        "INSERT INTO service_accounts (id, name, scopes)
         SELECT gen_random_uuid(), 'service-' || n, '{quota}' FROM generate_series(1, 1001) n",
    )
    .await;
    for (page_size, items) in [(0, 50), (1000, 1000), (1001, 1000)] {
        let request = ListServiceAccountsRequest {
            page_size,
            page_token: String::new(),
        };
        let page: ListServiceAccountsResponse = ask(&app, SERVICES, request).await.unwrap();
        assert_eq!(page.service_accounts.len(), items, "{page_size}");
        assert_ne!(page.next_page_token, "", "{page_size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_has_a_name_of_1_to_100_characters_and_32_scopes_of_64() {
    let app = TestApp::spawn().await;
    for (length, fits) in [(0, false), (1, true), (100, true), (101, false)] {
        let answer = try_create_key(&app, |r| r.name = "é".repeat(length)).await;
        decide(answer, fits, "name");
    }
    let scopes = |count: usize, length: usize| -> Vec<String> {
        (0..count).map(|n| format!("{n:~>length$}")).collect()
    };
    for (scopes, fits) in [
        (vec![], true),
        (scopes(32, 64), true),
        (scopes(33, 64), false),
        (scopes(1, 65), false),
    ] {
        let answer = try_create_key(&app, |r| r.scopes = scopes).await;
        decide(answer, fits, "scopes");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_expires_within_a_year_or_never() {
    let app = TestApp::spawn().await;
    for (secs_ahead, fits) in [
        (-1, false),
        (60, true),
        (365 * DAY - 60, true),
        (365 * DAY + 60, false),
    ] {
        let answer = try_create_key(&app, |r| r.expires_at = Some(ago(-secs_ahead))).await;
        decide(answer, fits, "expires_at");
    }
    try_create_key(&app, |r| r.expires_at = None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_api_keys_is_50_by_default_and_1000_at_most() {
    let app = TestApp::spawn().await;
    app.sql(
        "INSERT INTO api_keys (id, user_id, name, key_hash, scopes)
         SELECT gen_random_uuid(), id, 'key ' || n, n::text::bytea, '{}'
         FROM users, generate_series(1, 1001) n WHERE username = 'admin'",
    )
    .await;
    for (page_size, items) in [(0, 50), (1, 1), (1000, 1000), (1001, 1000)] {
        let request = ListApiKeysRequest {
            page_size,
            ..ListApiKeysRequest::default()
        };
        let page: ListApiKeysResponse = ask(&app, KEYS, request).await.unwrap();
        assert_eq!(page.api_keys.len(), items, "{page_size}");
        assert_ne!(page.next_page_token, "", "{page_size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn credits_and_overrides_are_within_their_bounds() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    const MOST: i64 = 1_000_000_000_000_000;
    for (tokens, fits) in [(0, false), (1, true), (MOST, true), (MOST + 1, false)] {
        let request = GrantCreditsRequest {
            tokens,
            ..grant_credits(&user)
        };
        let answer: Result<GrantCreditsResponse, _> = ask(&app, GRANT, request).await;
        decide(answer, fits, "tokens");
    }
    for (priority, fits) in [(-1, false), (0, true), (1000, true), (1001, false)] {
        let request = GrantCreditsRequest {
            priority,
            ..grant_credits(&user)
        };
        let answer: Result<GrantCreditsResponse, _> = ask(&app, GRANT, request).await;
        decide(answer, fits, "priority");
    }
    for (secs_ahead, fits) in [
        (-1, false),
        (60, true),
        (3653 * DAY - 60, true),
        (3653 * DAY + 60, false),
    ] {
        let expires_at = Some(ago(-secs_ahead));
        let request = GrantCreditsRequest {
            expires_at,
            ..grant_credits(&user)
        };
        let answer: Result<GrantCreditsResponse, _> = ask(&app, GRANT, request).await;
        decide(answer, fits, "expires_at");
        let request = SetQuotaOverrideRequest {
            expires_at,
            ..set_override(&user)
        };
        let answer: Result<SetQuotaOverrideResponse, _> = ask(&app, OVERRIDE, request).await;
        decide(answer, fits, "expires_at");
    }
    for (tokens, fits) in [(-1, false), (0, true), (MOST, true), (MOST + 1, false)] {
        let request = SetQuotaOverrideRequest {
            limit: Some(Limit::MonthlyTokens(tokens)),
            ..set_override(&user)
        };
        let answer: Result<SetQuotaOverrideResponse, _> = ask(&app, OVERRIDE, request).await;
        decide(answer, fits, "monthly_tokens");
    }
    for (length, fits) in [(500, true), (501, false)] {
        let reason = "é".repeat(length);
        let request = GrantCreditsRequest {
            reason: reason.clone(),
            ..grant_credits(&user)
        };
        let answer: Result<GrantCreditsResponse, _> = ask(&app, GRANT, request).await;
        decide(answer, fits, "reason");
        let request = SetQuotaOverrideRequest {
            reason,
            ..set_override(&user)
        };
        let answer: Result<SetQuotaOverrideResponse, _> = ask(&app, OVERRIDE, request).await;
        decide(answer, fits, "reason");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_of_credits_is_50_by_default_and_1000_at_most() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.sql(&format!(
        "INSERT INTO credit_grants (id, user_id, tokens, priority, closed_at, drawn_tokens, reason,
             request_id, actor_kind)
         SELECT gen_random_uuid(), '{}', 1, 0, now(), 0, '', gen_random_uuid(), 'operator'
         FROM generate_series(1, 1001) n",
        user.id
    ))
    .await;
    for (page_size, items) in [(0, 50), (1, 1), (1000, 1000), (1001, 1000)] {
        let request = ListCreditsRequest {
            user_id: user.id.clone(),
            page_size,
            page_token: String::new(),
        };
        let page: ListCreditsResponse = ask(&app, CREDITS, request).await.unwrap();
        assert_eq!(page.credits.len(), items, "{page_size}");
        assert_ne!(page.next_page_token, "", "{page_size}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_of_another_list_is_refused() {
    let app = TestApp::spawn().await;
    let users = [app.user().create().await, app.user().create().await];
    for user in &users {
        record(&app, user, |_| {}).await.unwrap();
        record(&app, user, |_| {}).await.unwrap();
    }
    let list = |user: &TestUser, page_token: &str| ListUsageRecordsRequest {
        user_id: user.id.clone(),
        page_size: 1,
        page_token: page_token.to_owned(),
        ..ListUsageRecordsRequest::default()
    };
    let page: ListUsageRecordsResponse = ask(&app, RECORDS, list(&users[0], "")).await.unwrap();
    let token = page.next_page_token;
    let answer: Result<ListUsageRecordsResponse, _> =
        ask(&app, RECORDS, list(&users[1], &token)).await;
    refuses(answer, "page_token");
    let next: ListUsageRecordsResponse = ask(&app, RECORDS, list(&users[0], &token)).await.unwrap();
    assert_eq!((next.records.len(), next.next_page_token.as_str()), (1, ""));
}

async fn try_register(
    app: &TestApp,
    change: impl FnOnce(&mut RegisterRequest),
) -> Result<RegisterResponse, Status> {
    let mut request = register();
    change(&mut request);
    ask(app, REGISTER, request).await
}

async fn try_create_key(
    app: &TestApp,
    change: impl FnOnce(&mut CreateApiKeyRequest),
) -> Result<CreateApiKeyResponse, Status> {
    let mut request = create_api_key();
    change(&mut request);
    ask(app, CREATE_KEY, request).await
}

async fn record(
    app: &TestApp,
    user: &TestUser,
    change: impl FnOnce(&mut UsageEvent),
) -> Result<RecordUsageResponse, Status> {
    let mut event = event(user);
    change(&mut event);
    ask(app, RECORD, RecordUsageRequest { event: Some(event) }).await
}

/// Holds a token, or what `change` says.
async fn hold(
    app: &TestApp,
    user: &TestUser,
    change: impl FnOnce(&mut ReserveQuotaRequest),
) -> Result<ReserveQuotaResponse, Status> {
    let mut request = reserve(user);
    change(&mut request);
    ask(app, RESERVE, request).await
}

/// Books a token, or what `change` says.
async fn commit(
    app: &TestApp,
    held: ReserveQuotaResponse,
    change: impl FnOnce(&mut CommitReservationRequest),
) -> Result<CommitReservationResponse, Status> {
    let mut request = CommitReservationRequest {
        reservation: held.reservation,
        tokens: Some(TokenCounts {
            input: 1,
            ..TokenCounts::default()
        }),
        ..CommitReservationRequest::default()
    };
    change(&mut request);
    ask(app, COMMIT, request).await
}

fn decide<T: std::fmt::Debug>(answer: Result<T, Status>, fits: bool, field: &str) {
    if fits {
        answer.unwrap_or_else(|status| panic!("{field}: {status:?}"));
    } else {
        refuses(answer, field);
    }
}

fn refuses<T: std::fmt::Debug>(answer: Result<T, Status>, field: &str) {
    let status = answer.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{field}");
    let named: Vec<String> = violations(&status).into_keys().collect();
    assert_eq!(named, [field]);
}
