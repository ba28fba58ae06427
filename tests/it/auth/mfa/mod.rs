//! The second factor, from the enrolment to its end.

mod apps;
mod changes;
mod enrolment;
mod guesses;
mod login;
mod races;
mod reset;
mod secrets;

use aws_lc_rs::hmac;
use tollkeeper::proto::tollkeeper::auth::v1::{
    CompleteMfaRequest, CompleteMfaResponse, ConfirmTotpRequest, ConfirmTotpResponse,
    EnrollTotpRequest, EnrollTotpResponse, LoginRequest, LoginResponse, MfaChallenge,
    auth_service_client::AuthServiceClient,
};
use tonic::{Status, transport::Channel};

use crate::harness::{PASSWORD, TestApp, TestUser, with_bearer};

const WRONG_PASSWORD: &str = "certainly not this one";

/// A phone, or what is left when it is lost.
#[derive(Clone)]
pub(crate) struct Authenticator {
    pub(crate) secret: Vec<u8>,
    pub(crate) recovery_codes: Vec<String>,
}

impl Authenticator {
    pub(crate) fn enrolled(secret: &str) -> Self {
        Self {
            secret: from_base32(secret),
            recovery_codes: Vec::new(),
        }
    }

    /// What it shows now.
    pub(crate) fn code(&self) -> String {
        self.code_in(0)
    }

    /// What it shows so many steps from now.
    fn code_in(&self, steps: i64) -> String {
        let step = chrono::Utc::now().timestamp() / 30 + steps;
        let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &self.secret);
        let mac = hmac::sign(&key, &step.to_be_bytes());
        let at = usize::from(mac.as_ref()[19] % 16);
        let four: [u8; 4] = mac.as_ref()[at..at + 4].try_into().unwrap();
        format!("{:06}", (u32::from_be_bytes(four) << 1 >> 1) % 1_000_000)
    }

    /// A code that it shows nowhere near now.
    pub(crate) fn wrong_code(&self) -> String {
        let near: Vec<_> = (-3..=3).map(|steps| self.code_in(steps)).collect();
        let codes = (0..).map(|n| format!("{n:06}"));
        codes.skip(7).find(|code| !near.contains(code)).unwrap()
    }
}

fn from_base32(text: &str) -> Vec<u8> {
    let bits = text.bytes().flat_map(|c| {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'2'..=b'7' => c - b'2' + 26,
            _ => panic!("{text}"),
        };
        (0..5).rev().map(move |at| value >> at & 1)
    });
    let bits: Vec<u8> = bits.collect();
    let bytes = bits.chunks_exact(8);
    bytes
        .map(|bits| bits.iter().fold(0, |byte, bit| byte << 1 | bit))
        .collect()
}

pub(super) async fn enroll(
    app: &TestApp,
    token: &str,
    password: &str,
) -> Result<EnrollTotpResponse, Status> {
    let request = EnrollTotpRequest {
        current_password: password.to_owned(),
    };
    Ok(app.auth(token).enroll_totp(request).await?.into_inner())
}

async fn confirm(app: &TestApp, token: &str, code: &str) -> Result<ConfirmTotpResponse, Status> {
    confirm_through(&app.channel, token, code).await
}

async fn confirm_through(
    channel: &Channel,
    token: &str,
    code: &str,
) -> Result<ConfirmTotpResponse, Status> {
    let request = ConfirmTotpRequest {
        code: code.to_owned(),
        keep_other_sessions: true,
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    Ok(auth
        .confirm_totp(with_bearer(request, token))
        .await?
        .into_inner())
}

/// Gives a user a second factor by way of this session; its codes may be used at once.
async fn enable_in(app: &TestApp, token: &str) -> Authenticator {
    let enrolled = enroll(app, token, PASSWORD).await.unwrap();
    let mut phone = Authenticator::enrolled(&enrolled.secret);
    let confirmed = confirm(app, token, &phone.code()).await.unwrap();
    phone.recovery_codes = confirmed.recovery_codes;
    let_time_pass(app).await;
    phone
}

/// The same, over any connection.
pub(crate) async fn enable_through(
    channel: &Channel,
    token: &str,
    password: &str,
) -> Authenticator {
    let request = EnrollTotpRequest {
        current_password: password.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    let enrolled = auth.enroll_totp(with_bearer(request, token)).await;
    let mut phone = Authenticator::enrolled(&enrolled.unwrap().into_inner().secret);
    let confirmed = confirm_through(channel, token, &phone.code()).await;
    phone.recovery_codes = confirmed.unwrap().recovery_codes;
    phone
}

/// A user with a second factor, and an access token of theirs.
async fn user_with_mfa(app: &TestApp) -> (TestUser, Authenticator, String) {
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let phone = enable_in(app, &token).await;
    (user, phone, token)
}

/// As if no code of now had been used.
async fn let_time_pass(app: &TestApp) {
    app.sql("UPDATE totp_credentials SET last_step = last_step - 3")
        .await;
}

async fn login(app: &TestApp, user: &TestUser, password: &str) -> Result<LoginResponse, Status> {
    login_through(&app.channel, user, password).await
}

async fn login_through(
    channel: &Channel,
    user: &TestUser,
    password: &str,
) -> Result<LoginResponse, Status> {
    let request = LoginRequest {
        identifier: user.email.clone(),
        password: password.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    Ok(auth.login(request).await?.into_inner())
}

/// What the right password brings.
async fn challenge(app: &TestApp, user: &TestUser) -> MfaChallenge {
    let answer = login(app, user, PASSWORD).await.unwrap();
    assert!(
        answer.tokens.is_none() && answer.user.is_none(),
        "{answer:?}"
    );
    answer.mfa_challenge.expect("a challenge")
}

async fn complete(
    app: &TestApp,
    challenge: &str,
    code: &str,
) -> Result<CompleteMfaResponse, Status> {
    complete_through(&app.channel, challenge, code).await
}

async fn complete_through(
    channel: &Channel,
    challenge: &str,
    code: &str,
) -> Result<CompleteMfaResponse, Status> {
    let request = CompleteMfaRequest {
        challenge: challenge.to_owned(),
        code: code.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    Ok(auth.complete_mfa(request).await?.into_inner())
}

/// A whole login, by this code.
async fn login_with(
    app: &TestApp,
    user: &TestUser,
    code: &str,
) -> Result<CompleteMfaResponse, Status> {
    let challenge = challenge(app, user).await.challenge;
    complete(app, &challenge, code).await
}

/// How often this was written down of a user.
async fn audited(app: &TestApp, user: &TestUser, action: &str) -> i64 {
    app.count(&format!(
        "SELECT count(*) FROM audit_events WHERE action = '{action}' AND user_id = '{}'",
        user.id
    ))
    .await
}

/// A refusal for each reason that only second factors give.
pub(crate) async fn refused(app: &TestApp) -> Vec<Status> {
    let (user, phone, token) = user_with_mfa(app).await;
    let plain = app.user().create().await;
    let other = app.login(&plain).await.access_token;
    vec![
        login_with(app, &user, &phone.wrong_code())
            .await
            .unwrap_err(),
        complete(app, "tkm_none", &phone.code()).await.unwrap_err(),
        enroll(app, &token, PASSWORD).await.unwrap_err(),
        confirm(app, &other, "123456").await.unwrap_err(),
    ]
}
