//! Second factors: what `AuthService` and `AdminService` do with them.

use chrono::Utc;
use tonic::{Request, Status};

use super::{
    access::Caller,
    call::origin_of,
    convert::{self, Fields, only, time},
    people, quota,
};
use crate::{
    auth::{Auth, LoginAnswer, MfaChallenge},
    model::{Factor, UserId, Violation},
    proto::tollkeeper::{
        admin::v1::{ResetUserMfaRequest, ResetUserMfaResponse},
        auth::v1::{
            self, CompleteMfaRequest, CompleteMfaResponse, ConfirmTotpRequest, ConfirmTotpResponse,
            DisableTotpRequest, DisableTotpResponse, EnrollTotpRequest, EnrollTotpResponse,
            LoginResponse, MfaFactor, RegenerateRecoveryCodesRequest,
            RegenerateRecoveryCodesResponse,
        },
    },
};

impl From<LoginAnswer> for LoginResponse {
    fn from(answer: LoginAnswer) -> Self {
        match answer {
            LoginAnswer::Session(login) => Self {
                tokens: Some(login.tokens.into()),
                user: Some(login.user.into()),
                mfa_challenge: None,
            },
            LoginAnswer::Challenge(challenge) => Self {
                tokens: None,
                user: None,
                mfa_challenge: Some(challenge.into()),
            },
        }
    }
}

impl From<MfaChallenge> for v1::MfaChallenge {
    fn from(challenge: MfaChallenge) -> Self {
        let factors = challenge.factors.into_iter().map(|factor| match factor {
            Factor::Totp => MfaFactor::Totp.into(),
            Factor::RecoveryCode => MfaFactor::RecoveryCode.into(),
        });
        Self {
            challenge: challenge.challenge,
            expires_at: Some(time(challenge.expires_at)),
            factors: factors.collect(),
        }
    }
}

pub(super) async fn complete(
    auth: &Auth,
    request: Request<CompleteMfaRequest>,
) -> Result<CompleteMfaResponse, Status> {
    let origin = origin_of(&request);
    let message = request.into_inner();
    let mut fields = Fields::default();
    let challenge = fields.take("challenge", challenge(message.challenge));
    let code = fields.parse("code", &message.code);
    let (challenge, code) = fields.finish(challenge.zip(code))?;
    let done = auth
        .complete_mfa(&challenge, &code, &origin, Utc::now())
        .await?;
    Ok(CompleteMfaResponse {
        tokens: Some(done.tokens.into()),
        user: Some(done.user.into()),
        recovery_codes_left: i32::try_from(done.recovery_codes_left).unwrap_or(i32::MAX),
    })
}

pub(super) async fn enroll(
    auth: &Auth,
    request: Request<EnrollTotpRequest>,
) -> Result<EnrollTotpResponse, Status> {
    let (id, _) = Caller::session_of(&request)?;
    let text = &request.get_ref().current_password;
    let current = only(|fields| fields.parse("current_password", text))?;
    let origin = origin_of(&request);
    let enrolment = auth.enroll_totp(id, current, &origin, Utc::now()).await?;
    Ok(EnrollTotpResponse {
        secret: enrolment.secret,
        otpauth_uri: enrolment.uri,
        qr_code_svg: enrolment.qr_code,
    })
}

pub(super) async fn confirm(
    auth: &Auth,
    request: Request<ConfirmTotpRequest>,
) -> Result<ConfirmTotpResponse, Status> {
    let (id, session) = Caller::session_of(&request)?;
    let message = request.get_ref();
    let code = only(|fields| fields.parse("code", &message.code))?;
    let keep_only = (!message.keep_other_sessions).then_some(session);
    let origin = origin_of(&request);
    let enabled = auth
        .confirm_totp(id, code, keep_only, &origin, Utc::now())
        .await?;
    Ok(ConfirmTotpResponse {
        recovery_codes: enabled.recovery_codes,
        revoked_count: people::count(enabled.sessions_ended),
        revision: convert::revision(auth.revision().await),
    })
}

pub(super) async fn disable(
    auth: &Auth,
    request: Request<DisableTotpRequest>,
) -> Result<DisableTotpResponse, Status> {
    let (id, session) = Caller::session_of(&request)?;
    let message = request.get_ref();
    let mut fields = Fields::default();
    let current = fields.parse("current_password", &message.current_password);
    let code = fields.parse("code", &message.code);
    let (current, code) = fields.finish(current.zip(code))?;
    let keep_only = (!message.keep_other_sessions).then_some(session);
    let origin = origin_of(&request);
    let ended = auth.disable_totp(id, current, &code, keep_only, &origin, Utc::now());
    Ok(DisableTotpResponse {
        revoked_count: people::count(ended.await?),
        revision: convert::revision(auth.revision().await),
    })
}

pub(super) async fn regenerate(
    auth: &Auth,
    request: Request<RegenerateRecoveryCodesRequest>,
) -> Result<RegenerateRecoveryCodesResponse, Status> {
    let (id, _) = Caller::session_of(&request)?;
    let message = request.get_ref();
    let mut fields = Fields::default();
    let current = fields.parse("current_password", &message.current_password);
    let code = fields.parse("code", &message.code);
    let (current, code) = fields.finish(current.zip(code))?;
    let origin = origin_of(&request);
    let codes = auth.regenerate_recovery_codes(id, current, &code, &origin, Utc::now());
    Ok(RegenerateRecoveryCodesResponse {
        recovery_codes: codes.await?,
    })
}

pub(super) async fn reset(
    auth: &Auth,
    request: Request<ResetUserMfaRequest>,
) -> Result<ResetUserMfaResponse, Status> {
    let message = request.get_ref();
    let mut fields = Fields::default();
    let id: Option<UserId> = fields.parse("user_id", &message.user_id);
    let reason = fields.take("reason", quota::reason(&message.reason));
    let (id, reason) = fields.finish(id.zip(reason))?;
    let origin = origin_of(&request);
    let (user, reset) = auth.reset_mfa(id, reason, &origin, Utc::now()).await?;
    Ok(ResetUserMfaResponse {
        user: Some(user.into()),
        was_enabled: reset.was_enabled,
        revoked_count: people::count(reset.sessions_ended),
        revision: convert::revision(auth.revision().await),
    })
}

fn challenge(text: String) -> Result<String, Violation> {
    match text.len() {
        0 => Err("must not be empty".into()),
        1..=1024 => Ok(text),
        _ => Err("must be at most 1024 bytes".into()),
    }
}
