//! Every `ErrorReason` of the contract, brought about.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use prost::Message as _;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        CreateServiceAccountRequest, DisableServiceAccountRequest, DisableUserRequest,
        GetUserRequest, GrantCreditsRequest, ListUsersRequest, VoidCreditsRequest,
    },
    auth::v1::{
        GetCurrentUserRequest, ListApiKeysRequest, LogoutRequest, RefreshTokensRequest,
        RegisterRequest, RequestPasswordResetRequest, RevokeApiKeyRequest, RevokeSessionRequest,
        SendEmailVerificationRequest, ValidateTokenRequest, VerifyEmailRequest,
    },
    usage::v1::{ListTiersRequest, RecordUsageRequest, TokenCounts, UsageEvent},
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{
    send,
    wrong::{LOGIN, REGISTER, create_api_key, event, grant_credits, register},
};
use crate::{
    auth::mfa,
    descriptor,
    harness::{Mailbox, PASSWORD, TestApp, cluster, reason},
    usage,
};

/// Reasons that no test brings about, and why.
const NOT_PROVOKED: [(&str, &str); 6] = [
    ("UNSPECIFIED", "is not a reason"),
    (
        "DUPLICATE_ROW",
        "is of rows of an import alone, see its tests",
    ),
    (
        "IMPORT_CONFLICT",
        "is of rows of an import alone, see its tests",
    ),
    (
        "USER_ERASED",
        "is of rows of an import alone, see its tests",
    ),
    (
        "TIER_NOT_ALLOWED",
        "is in answers to gateways alone, see the tests of those",
    ),
    (
        "SHUTTING_DOWN",
        "needs a call that meets the last instant of a connection",
    ),
];

const NOBODY: &str = "01890a5d-ac96-774b-bcce-b302099a8057";

#[tokio::test(flavor = "multi_thread")]
async fn every_reason_of_the_contract_is_given_with_a_code_that_it_names() {
    let mut errors = Vec::new();
    let app = TestApp::spawn().await;
    errors.extend(of_credentials(&app).await);
    errors.extend(of_callers(&app).await);
    errors.extend(of_things(&app).await);
    errors.extend(of_requests(&app).await);
    errors.push(internal(&app).await);
    errors.push(expired().await);
    errors.push(too_many_keys().await);
    errors.push(too_many_attempts().await);
    errors.extend(of_credits(&app).await);
    errors.extend(mfa::refused(&app).await);
    errors.extend(of_mails().await);
    errors.extend(usage::reservations::refused_reservations().await);
    errors.push(crate::watch::dropped_reader().await);
    errors.push(too_late().await);
    errors.push(overloaded().await);
    errors.push(database_away(&app).await);

    let mut given = BTreeSet::new();
    for status in &errors {
        let reason = reason(status);
        let says = descriptor::enum_value_comment(REASONS.0, REASONS.1, &full(&reason));
        let code = code_name(status.code());
        assert!(
            says.contains(&code),
            "{reason} came as {code}, its comment: {says}"
        );
        given.insert(reason);
    }
    given.extend(NOT_PROVOKED.map(|(reason, _)| reason.to_owned()));
    let declared = descriptor::enum_values(REASONS.0, REASONS.1);
    let declared = declared
        .iter()
        .map(|name| name.replace("ERROR_REASON_", ""));
    assert_eq!(given, declared.collect::<BTreeSet<String>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn shed_load_says_when_to_come_back() {
    let status = overloaded().await;
    let delay = status
        .get_details_retry_info()
        .unwrap()
        .retry_delay
        .unwrap();
    assert!(delay > Duration::ZERO);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_says_when_to_come_back_and_nothing_of_the_database() {
    let app = TestApp::spawn().await;
    let status = database_away(&app).await;
    let delay = status
        .get_details_retry_info()
        .unwrap()
        .retry_delay
        .unwrap();
    assert!(delay > Duration::ZERO);
    assert_eq!(status.message(), "the database is unavailable");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_internal_error_says_nothing_of_its_cause() {
    let app = TestApp::spawn().await;
    assert_eq!(internal(&app).await.message(), "internal error");
}

const REASONS: (&str, &str) = ("tollkeeper.error.v1", "ErrorReason");

fn full(reason: &str) -> String {
    format!("ERROR_REASON_{reason}")
}

async fn of_credentials(app: &TestApp) -> Vec<Status> {
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    let me = |credential: String| async move {
        let me = app
            .auth(&credential)
            .get_current_user(GetCurrentUserRequest {})
            .await;
        me.unwrap_err()
    };
    let mut errors = vec![me(String::new()).await, me("garbage".to_owned()).await];
    errors.push(app.login_as(&user.email, "wrong").await.unwrap_err());

    let mut refresh_token = tokens.refresh_token.clone();
    for _ in 0..2 {
        let request = RefreshTokensRequest { refresh_token };
        let refreshed = app.auth("").refresh_tokens(request).await.unwrap();
        refresh_token = refreshed.into_inner().tokens.unwrap().refresh_token;
    }
    let request = RefreshTokensRequest {
        refresh_token: tokens.refresh_token,
    };
    errors.push(app.auth("").refresh_tokens(request).await.unwrap_err());

    let token = app.login(&user).await.access_token;
    app.auth(&token).logout(LogoutRequest {}).await.unwrap();
    errors.push(me(token).await);

    let token = app.login(&user).await.access_token;
    let request = DisableUserRequest {
        user_id: user.id,
        reason: String::new(),
    };
    app.admin(&app.service_key)
        .disable_user(request)
        .await
        .unwrap();
    errors.push(me(token).await);
    errors.push(app.login_as(&user.email, PASSWORD).await.unwrap_err());
    errors
}

async fn of_callers(app: &TestApp) -> Vec<Status> {
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let (_, key) = app.service("quota", &["quota"]).await;
    let request = ValidateTokenRequest {
        token: token.clone(),
        include_quota: false,
        ..ValidateTokenRequest::default()
    };
    let list = ListUsersRequest::default();
    let api_key = app.api_key(&user, &[]).await.text;
    vec![
        app.auth(&api_key)
            .list_api_keys(ListApiKeysRequest::default())
            .await
            .unwrap_err(),
        app.admin(&token).list_users(list).await.unwrap_err(),
        app.auth(&key).validate_token(request).await.unwrap_err(),
        app.usage(&key)
            .list_tiers(ListTiersRequest {})
            .await
            .unwrap_err(),
    ]
}

async fn of_things(app: &TestApp) -> Vec<Status> {
    let (user, key) = (app.user().create().await, app.service_key.as_str());
    let mut errors = Vec::new();
    let request = GetUserRequest {
        user_id: NOBODY.to_owned(),
    };
    errors.push(app.admin(key).get_user(request).await.unwrap_err());
    let admin = app
        .sql("SELECT id::text FROM users WHERE role = 'admin'")
        .await;
    let request = DisableUserRequest {
        user_id: admin[0].get(0),
        reason: String::new(),
    };
    errors.push(app.admin(key).disable_user(request).await.unwrap_err());
    let request = DisableServiceAccountRequest {
        service_account_id: NOBODY.to_owned(),
    };
    let answer = app.admin(key).disable_service_account(request).await;
    errors.push(answer.unwrap_err());
    let request = RevokeApiKeyRequest {
        api_key_id: NOBODY.to_owned(),
    };
    let token = app.login(&user).await.access_token;
    let answer = app.auth(&token).revoke_api_key(request).await;
    errors.push(answer.unwrap_err());
    let session_id = NOBODY.to_owned();
    let request = RevokeSessionRequest { session_id };
    let answer = app.auth(&token).revoke_session(request).await;
    errors.push(answer.unwrap_err());
    let request = RegisterRequest {
        email: user.email.to_uppercase(),
        ..register()
    };
    errors.push(app.auth("").register(request).await.unwrap_err());
    let request = CreateServiceAccountRequest {
        name: "All-Scopes".to_owned(),
        scopes: vec!["quota".to_owned()],
    };
    let answer = app.admin(key).create_service_account(request).await;
    errors.push(answer.unwrap_err());

    let first = event(&user);
    let tokens = TokenCounts {
        input: 2,
        ..TokenCounts::default()
    };
    let second = UsageEvent {
        tokens: Some(tokens),
        ..first.clone()
    };
    let request = |event| RecordUsageRequest { event: Some(event) };
    app.usage(key).record_usage(request(first)).await.unwrap();
    errors.push(
        app.usage(key)
            .record_usage(request(second))
            .await
            .unwrap_err(),
    );
    let full = app.user().create().await;
    let beyond = UsageEvent {
        tokens: Some(TokenCounts {
            input: 1_000_000,
            ..TokenCounts::default()
        }),
        ..event(&full)
    };
    usage::use_up(app, &full.id, &beyond.model).await;
    let answer = app.usage(key).record_usage(request(beyond)).await;
    errors.push(answer.unwrap_err());
    errors
}

async fn of_requests(app: &TestApp) -> Vec<Status> {
    let garbage = Bytes::from_static(b"\xff\xff\xff");
    vec![
        send(app, REGISTER, Bytes::new()).await.unwrap_err(),
        send(app, REGISTER, garbage).await.unwrap_err(),
        send(app, "auth.v1.AuthService/Logon", Bytes::new())
            .await
            .unwrap_err(),
    ]
}

/// What a row that no code of ours wrote leads to.
async fn internal(app: &TestApp) -> Status {
    let user = app.user().create().await;
    app.sql(&format!(
        "UPDATE users SET tier = 'NOT A TIER' WHERE id = '{}'",
        user.id
    ))
    .await;
    let request = GetUserRequest { user_id: user.id };
    app.admin(&app.service_key)
        .get_user(request)
        .await
        .unwrap_err()
}

async fn expired() -> Status {
    let app = TestApp::spawn_with(|settings| {
        settings.auth.access_ttl = Duration::ZERO;
        settings.auth.leeway = Duration::ZERO;
    })
    .await;
    let token = app.admin_token().await;
    app.admin(&token)
        .list_users(ListUsersRequest::default())
        .await
        .unwrap_err()
}

async fn too_many_keys() -> Status {
    let app = TestApp::spawn_with(|settings| settings.auth.api_keys_per_user = 1).await;
    let token = app.admin_token().await;
    let mut auth = app.auth(&token);
    auth.create_api_key(create_api_key()).await.unwrap();
    auth.create_api_key(create_api_key()).await.unwrap_err()
}

async fn too_many_attempts() -> Status {
    let app = TestApp::spawn_with(|settings| settings.throttle.account_failures = 1).await;
    for _ in 0..2 {
        app.login_as("nobody", PASSWORD).await.unwrap_err();
    }
    app.login_as("nobody", PASSWORD).await.unwrap_err()
}

async fn of_mails() -> Vec<Status> {
    let request = RequestPasswordResetRequest {
        email: "nobody@example.com".to_owned(),
    };
    let without = TestApp::spawn().await;
    let answer = without.auth("").request_password_reset(request).await;
    let mut errors = vec![answer.unwrap_err()];
    let mailbox = Mailbox::new();
    let app = TestApp::spawn_with(|settings| {
        mailbox.take(settings);
        settings.auth.require_verified_email = true;
    })
    .await;
    let user = app.user().create().await;
    errors.push(app.login_as(&user.email, PASSWORD).await.unwrap_err());
    let token = "no token".to_owned();
    let answer = app
        .auth("")
        .verify_email(VerifyEmailRequest { token })
        .await;
    errors.push(answer.unwrap_err());
    app.sql("UPDATE users SET email_verified_at = now()").await;
    let token = app.login(&user).await.access_token;
    app.sql("UPDATE users SET email_verified_at = NULL").await;
    let request = SendEmailVerificationRequest {};
    let answer = app.auth(&token).send_email_verification(request).await;
    errors.push(answer.unwrap_err());
    errors
}

async fn of_credits(app: &TestApp) -> Vec<Status> {
    let user = app.user().create().await;
    let mut admin = app.admin(&app.service_key);
    let void = VoidCreditsRequest {
        credit_id: NOBODY.to_owned(),
        reason: String::new(),
    };
    let mut errors = vec![admin.void_credits(void).await.unwrap_err()];
    let first = grant_credits(&user);
    admin.grant_credits(first.clone()).await.unwrap();
    let second = GrantCreditsRequest { tokens: 2, ..first };
    errors.push(admin.grant_credits(second).await.unwrap_err());
    app.sql(&format!(
        "INSERT INTO credit_grants (id, user_id, tokens, priority, reason, request_id, actor_kind)
         SELECT gen_random_uuid(), '{}', 1, 0, '', gen_random_uuid(), 'operator'
         FROM generate_series(1, 199)",
        user.id
    ))
    .await;
    errors.push(admin.grant_credits(grant_credits(&user)).await.unwrap_err());
    errors
}

async fn too_late() -> Status {
    let app = TestApp::spawn_with(|s| s.server.max_deadline = Duration::from_nanos(1)).await;
    app.login_as(&app.admin_email, PASSWORD).await.unwrap_err()
}

/// Many logins at once where one hash runs at a time and none may wait.
async fn overloaded() -> Status {
    let app = TestApp::spawn_with(|settings| {
        settings.password.threads = 1;
        settings.password.queue = 0;
        settings.password.argon2_memory_kib = 19 * 1024;
        settings.password.argon2_iterations = 10;
    })
    .await;
    let logins = join_all((0..8).map(|_| app.login_as("nobody", PASSWORD))).await;
    let refused = logins.into_iter().filter_map(Result::err);
    let mut shed = refused.filter(|status| status.code() == Code::ResourceExhausted);
    shed.next().expect("seven of eight find no place")
}

async fn database_away(app: &TestApp) -> Status {
    let url = app.database_url.clone();
    tokio::task::spawn_blocking(move || cluster::drop_database(&url))
        .await
        .unwrap();
    let request = tollkeeper::proto::tollkeeper::auth::v1::LoginRequest {
        identifier: app.admin_email.clone(),
        password: PASSWORD.to_owned(),
    };
    send(app, LOGIN, request.encode_to_vec().into())
        .await
        .unwrap_err()
}

/// As the contract spells it: `INVALID_ARGUMENT`.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}
