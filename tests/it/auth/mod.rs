//! Accounts, logins, sessions, keys and the trail they leave: `AuthService` and `AdminService`.

mod accounts;
mod administration;
mod api_keys;
mod attacks;
mod audit;
mod deletion_races;
mod erasure;
mod import;
mod key_rotation;
mod keys;
mod last_admin;
mod locale;
mod login;
mod mail;
mod mail_address;
mod mail_delivery;
mod mail_limits;
mod mail_standing;
pub(crate) mod mfa;
mod own_account;
mod profile;
pub(crate) mod python;
mod python_hashes;
mod refresh;
mod refresh_races;
mod register;
mod service_accounts;
mod sessions;
mod throttle;
mod timing;
mod trail;
mod users;
mod validate;

use std::{collections::BTreeMap, fmt::Debug, time::Duration};

use tollkeeper::proto::tollkeeper::auth::v1::{
    RefreshTokensRequest, RefreshTokensResponse, Tokens, auth_service_client::AuthServiceClient,
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;

use crate::harness::{TestApp, TestUser, reason};

/// Asserts code and reason of a refusal and hands it on.
#[track_caller]
fn assert_refused<T: Debug>(outcome: Result<T, Status>, code: Code, why: &str) -> Status {
    let status = outcome.expect_err(why);
    assert_eq!(
        (status.code(), &*reason(&status)),
        (code, why),
        "{status:?}"
    );
    status
}

/// Asserts that a request was refused for exactly these fields.
#[track_caller]
fn assert_invalid<T: Debug>(outcome: Result<T, Status>, fields: &[&str]) {
    let status = assert_refused(outcome, Code::InvalidArgument, "INVALID_FIELD");
    let violations = status.get_details_bad_request().expect("a BadRequest");
    let named: Vec<&str> = violations
        .field_violations
        .iter()
        .map(|violation| &*violation.field)
        .collect();
    assert_eq!(named, fields);
}

/// Whoever is nobody with a session, and how they are refused what only people may do: a key of
/// theirs among them.
fn without_session<'a>(app: &'a TestApp, key: &'a str) -> [(&'a str, Code, &'static str); 3] {
    [
        ("", Code::Unauthenticated, "CREDENTIAL_MISSING"),
        (key, Code::PermissionDenied, "SESSION_REQUIRED"),
        (
            &app.service_key,
            Code::PermissionDenied,
            "CALLER_NOT_ALLOWED",
        ),
    ]
}

/// Which credential a refusal is about.
fn credential(status: &Status) -> String {
    let mut info = status.get_details_error_info().expect("an ErrorInfo");
    info.metadata.remove("credential").unwrap_or_default()
}

/// All that a client can tell two refusals apart by; each has a request id of its own.
fn visible(status: &Status) -> (Code, String, String, BTreeMap<String, String>, usize) {
    let info = status.get_details_error_info().expect("an ErrorInfo");
    let mut metadata: BTreeMap<_, _> = info.metadata.into_iter().collect();
    assert_eq!(metadata.remove("request_id").map(|id| id.len()), Some(32));
    let size = status.details().len();
    (
        status.code(),
        status.message().to_owned(),
        info.reason,
        metadata,
        size,
    )
}

/// The tokens that follow `token`.
async fn refreshed(app: &TestApp, token: &str) -> Tokens {
    refresh(app, token).await.unwrap().tokens.unwrap()
}

async fn refresh(app: &TestApp, token: &str) -> Result<RefreshTokensResponse, Status> {
    refresh_through(&app.channel, token).await
}

async fn refresh_through(channel: &Channel, token: &str) -> Result<RefreshTokensResponse, Status> {
    let request = RefreshTokensRequest {
        refresh_token: token.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    Ok(auth.refresh_tokens(request).await?.into_inner())
}

/// The stored password hash of a user.
async fn stored_hash(app: &TestApp, user: &TestUser) -> String {
    let statement = format!("SELECT password_hash FROM users WHERE id = '{}'", user.id);
    app.sql(&statement).await[0].get(0)
}

/// Asks until a token is refused.
async fn refusal_in_time(app: &TestApp, token: &str) -> Status {
    let asked = async {
        loop {
            match app.validate(token).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                Err(status) => return status,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), asked)
        .await
        .expect("the token is refused in time")
}
