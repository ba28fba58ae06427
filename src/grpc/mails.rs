//! What people do by mail: prove an address, ask for another one, set a forgotten password.

use chrono::Utc;
use tonic::{Request, Response, Status};

use super::{
    access::Caller,
    call::origin_of,
    convert::{self, Fields, only},
    people,
};
use crate::{
    auth::{Auth, LoginPassword},
    model::{Email, UserId, Violation},
    proto::tollkeeper::auth::v1::{
        RequestPasswordResetRequest, RequestPasswordResetResponse, ResetPasswordRequest,
        ResetPasswordResponse, SendEmailVerificationRequest, SendEmailVerificationResponse,
        UpdateCurrentUserRequest, UpdateCurrentUserResponse, VerifyEmailRequest,
        VerifyEmailResponse,
    },
};

/// Whether an update is about the address: its mask names that alone.
pub(super) fn asks_for_another_address(message: &UpdateCurrentUserRequest) -> bool {
    let mask = message.update_mask.as_ref();
    mask.is_some_and(|mask| mask.paths == ["email"])
}

pub(super) async fn change_email(
    auth: &Auth,
    id: UserId,
    request: Request<UpdateCurrentUserRequest>,
) -> Result<Response<UpdateCurrentUserResponse>, Status> {
    let origin = origin_of(&request);
    let message = request.into_inner();
    let mut fields = Fields::default();
    let user = fields.take("user", message.user.as_ref().ok_or("must be set".into()));
    let email: Option<Email> = user.and_then(|user| fields.parse("user.email", &user.email));
    let current: Option<LoginPassword> =
        fields.parse("current_password", &message.current_password);
    let (email, current) = fields.finish(email.zip(current))?;
    let asked = auth.change_email(id, &email, current, &origin, Utc::now());
    Ok(Response::new(UpdateCurrentUserResponse {
        user: Some(asked.await?.into()),
        revision: convert::revision(auth.revision().await),
    }))
}

pub(super) async fn send_email_verification(
    auth: &Auth,
    request: Request<SendEmailVerificationRequest>,
) -> Result<Response<SendEmailVerificationResponse>, Status> {
    let (id, _) = Caller::session_of(&request)?;
    let mailed = auth.send_verification(id).await?;
    Ok(Response::new(SendEmailVerificationResponse {
        already_verified: !mailed,
    }))
}

pub(super) async fn verify_email(
    auth: &Auth,
    request: Request<VerifyEmailRequest>,
) -> Result<Response<VerifyEmailResponse>, Status> {
    let origin = origin_of(&request);
    let token = only(|fields| fields.take("token", present(request.into_inner().token)))?;
    auth.verify_email(&token, &origin).await?;
    Ok(Response::new(VerifyEmailResponse {
        revision: convert::revision(auth.revision().await),
    }))
}

pub(super) async fn request_password_reset(
    auth: &Auth,
    request: Request<RequestPasswordResetRequest>,
) -> Result<Response<RequestPasswordResetResponse>, Status> {
    let email = only(|fields| fields.parse("email", &request.get_ref().email))?;
    let origin = origin_of(&request);
    auth.request_password_reset(&email, &origin, Utc::now())
        .await?;
    Ok(Response::new(RequestPasswordResetResponse {}))
}

pub(super) async fn reset_password(
    auth: &Auth,
    request: Request<ResetPasswordRequest>,
) -> Result<Response<ResetPasswordResponse>, Status> {
    let origin = origin_of(&request);
    let message = request.into_inner();
    let mut fields = Fields::default();
    let token = fields.take("token", present(message.token));
    let acceptable = auth.check_password_length(&message.new_password);
    let new = fields.take("new_password", acceptable.map(|()| message.new_password));
    let (token, new) = fields.finish(token.zip(new))?;
    let reset = auth.reset_password(&token, new, &origin, Utc::now());
    Ok(Response::new(ResetPasswordResponse {
        revoked_count: people::count(reset.await?),
        revision: convert::revision(auth.revision().await),
    }))
}

/// Whatever is not empty may be a token: of what is none, no more is said.
fn present(token: String) -> Result<String, Violation> {
    if token.is_empty() {
        return Err("must not be empty".into());
    }
    Ok(token)
}
