use chrono::{DateTime, Utc};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use prost_types::Timestamp;
use tokio::task::yield_now;
use tonic::{Request, Response, Status};

use super::{
    access::{Caller, Shown},
    call::origin_of,
    convert::{self, Fields, only},
    mails, mfa, people, watch,
};
use crate::{
    auth::{Auth, InitialCredential, NewAccount},
    error::{Credential, Error},
    model::{ApiKeyScopes, Role, Violation},
    proto::tollkeeper::auth::v1::{
        BatchValidateTokensRequest, BatchValidateTokensResponse, ChangePasswordRequest,
        ChangePasswordResponse, CompleteMfaRequest, CompleteMfaResponse, ConfirmTotpRequest,
        ConfirmTotpResponse, CreateApiKeyRequest, CreateApiKeyResponse, DisableTotpRequest,
        DisableTotpResponse, EnrollTotpRequest, EnrollTotpResponse, GetCurrentUserRequest,
        GetCurrentUserResponse, GetJwksRequest, GetJwksResponse, ListApiKeysRequest,
        ListApiKeysResponse, ListSessionsRequest, ListSessionsResponse, LoginRequest,
        LoginResponse, LogoutRequest, LogoutResponse, RefreshTokensRequest, RefreshTokensResponse,
        RegenerateRecoveryCodesRequest, RegenerateRecoveryCodesResponse, RegisterRequest,
        RegisterResponse, RequestPasswordResetRequest, RequestPasswordResetResponse,
        ResetPasswordRequest, ResetPasswordResponse, RevokeAllSessionsRequest,
        RevokeAllSessionsResponse, RevokeApiKeyRequest, RevokeApiKeyResponse, RevokeSessionRequest,
        RevokeSessionResponse, SendEmailVerificationRequest, SendEmailVerificationResponse,
        UpdateCurrentUserRequest, UpdateCurrentUserResponse, ValidateTokenRequest,
        ValidateTokenResponse, VerifyEmailRequest, VerifyEmailResponse, WatchRevocationsRequest,
        auth_service_server::AuthService,
    },
    usage::Usage,
};

/// `AuthService`.
pub(super) struct Handler {
    pub(super) auth: Auth,
    pub(super) usage: Usage,
}

#[tonic::async_trait]
impl AuthService for Handler {
    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let origin = origin_of(&request);
        let request = request.into_inner();
        let mut fields = Fields::default();
        let person = convert::person(
            &mut fields,
            &request.email,
            &request.username,
            &request.full_name,
        );
        let acceptable = self.auth.check_password_length(&request.password);
        let password = fields.take("password", acceptable.map(|()| request.password));
        let tier = self.usage.tiers().default_tier().name.clone();
        let (person, password) = fields.finish(person.zip(password))?;
        let new = NewAccount {
            person,
            credential: InitialCredential::Password(password),
            role: Role::User,
            tier,
        };
        let user = self.auth.register(new, &origin, Utc::now()).await?;
        Ok(Response::new(RegisterResponse {
            user: Some(user.into()),
        }))
    }

    async fn login(
        &self,
        request: Request<LoginRequest>,
    ) -> Result<Response<LoginResponse>, Status> {
        let origin = origin_of(&request);
        let request = request.into_inner();
        let mut fields = Fields::default();
        let identifier = fields.parse("identifier", &request.identifier);
        let password = fields.parse("password", &request.password);
        let (identifier, password) = fields.finish(identifier.zip(password))?;
        let login = self
            .auth
            .login(&identifier, password, &origin, Utc::now())
            .await?;
        Ok(Response::new(login.into()))
    }

    async fn complete_mfa(
        &self,
        request: Request<CompleteMfaRequest>,
    ) -> Result<Response<CompleteMfaResponse>, Status> {
        mfa::complete(&self.auth, request).await.map(Response::new)
    }

    async fn refresh_tokens(
        &self,
        request: Request<RefreshTokensRequest>,
    ) -> Result<Response<RefreshTokensResponse>, Status> {
        let origin = origin_of(&request);
        let request = request.into_inner();
        let token = only(|fields| fields.take("refresh_token", present(request.refresh_token)))?;
        let refreshed = self.auth.refresh(&token, &origin, Utc::now()).await?;
        Ok(Response::new(RefreshTokensResponse {
            tokens: Some(refreshed.tokens.into()),
            repeated: refreshed.repeated,
        }))
    }

    async fn logout(
        &self,
        request: Request<LogoutRequest>,
    ) -> Result<Response<LogoutResponse>, Status> {
        let (user_id, session_id) = Caller::session_of(&request)?;
        self.auth
            .logout(session_id, user_id, &origin_of(&request), Utc::now())
            .await?;
        Ok(Response::new(LogoutResponse {
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn list_sessions(
        &self,
        request: Request<ListSessionsRequest>,
    ) -> Result<Response<ListSessionsResponse>, Status> {
        let (user_id, current) = Caller::session_of(&request)?;
        let request = request.into_inner();
        let list = format!("sessions {user_id}");
        let page = only(|fields| fields.page(request.page_size, &request.page_token, &list))?;
        let page = self.auth.sessions(user_id, &page, Utc::now()).await?;
        let page = page.map(|session| people::session(session, Some(current)));
        Ok(Response::new(ListSessionsResponse {
            sessions: page.items,
            next_page_token: page.next_token.unwrap_or_default(),
        }))
    }

    async fn revoke_session(
        &self,
        request: Request<RevokeSessionRequest>,
    ) -> Result<Response<RevokeSessionResponse>, Status> {
        let (user_id, current) = Caller::session_of(&request)?;
        let id = only(|fields| fields.parse("session_id", &request.get_ref().session_id))?;
        let origin = origin_of(&request);
        let revoked = self
            .auth
            .revoke_session(id, user_id, "", &origin, Utc::now());
        let (session, _) = revoked.await?;
        Ok(Response::new(RevokeSessionResponse {
            session: Some(people::session(session, Some(current))),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn revoke_all_sessions(
        &self,
        request: Request<RevokeAllSessionsRequest>,
    ) -> Result<Response<RevokeAllSessionsResponse>, Status> {
        let (user_id, current) = Caller::session_of(&request)?;
        let kept = request.get_ref().keep_current.then_some(current);
        let origin = origin_of(&request);
        let revoked = self
            .auth
            .revoke_sessions(user_id, kept, "", &origin, Utc::now());
        Ok(Response::new(RevokeAllSessionsResponse {
            revoked_count: people::count(revoked.await?),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn get_current_user(
        &self,
        request: Request<GetCurrentUserRequest>,
    ) -> Result<Response<GetCurrentUserResponse>, Status> {
        let user = self.auth.user(Caller::user_of(&request)?.id).await?;
        Ok(Response::new(GetCurrentUserResponse {
            user: Some(user.into()),
        }))
    }

    async fn update_current_user(
        &self,
        request: Request<UpdateCurrentUserRequest>,
    ) -> Result<Response<UpdateCurrentUserResponse>, Status> {
        let (id, _) = Caller::session_of(&request)?;
        let message = request.get_ref();
        if mails::asks_for_another_address(message) {
            return mails::change_email(&self.auth, id, request).await;
        }
        let changes = only(|fields| {
            let user = fields.take("user", message.user.as_ref().ok_or("must be set".into()));
            let mask = message.update_mask.as_ref();
            people::changes(fields, user?, mask, people::OWN_FIELDS)
        })?;
        let origin = origin_of(&request);
        let user = self.auth.update_user(id, &changes, &origin).await?;
        Ok(Response::new(UpdateCurrentUserResponse {
            user: Some(user.into()),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn change_password(
        &self,
        request: Request<ChangePasswordRequest>,
    ) -> Result<Response<ChangePasswordResponse>, Status> {
        let (id, session) = Caller::session_of(&request)?;
        let origin = origin_of(&request);
        let message = request.into_inner();
        let keep_only = (!message.keep_other_sessions).then_some(session);
        let mut fields = Fields::default();
        let current = fields.parse("current_password", &message.current_password);
        let acceptable = self.auth.check_password_length(&message.new_password);
        let another = message.new_password != message.current_password;
        let acceptable = acceptable.and_then(|()| match another {
            true => Ok(message.new_password),
            false => Err("must be another than the present one".into()),
        });
        let new = fields.take("new_password", acceptable);
        let (current, new) = fields.finish(current.zip(new))?;
        let changed = self
            .auth
            .change_password(id, current, new, keep_only, &origin, Utc::now());
        Ok(Response::new(ChangePasswordResponse {
            revoked_count: people::count(changed.await?),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn enroll_totp(
        &self,
        request: Request<EnrollTotpRequest>,
    ) -> Result<Response<EnrollTotpResponse>, Status> {
        mfa::enroll(&self.auth, request).await.map(Response::new)
    }

    async fn confirm_totp(
        &self,
        request: Request<ConfirmTotpRequest>,
    ) -> Result<Response<ConfirmTotpResponse>, Status> {
        mfa::confirm(&self.auth, request).await.map(Response::new)
    }

    async fn disable_totp(
        &self,
        request: Request<DisableTotpRequest>,
    ) -> Result<Response<DisableTotpResponse>, Status> {
        mfa::disable(&self.auth, request).await.map(Response::new)
    }

    async fn regenerate_recovery_codes(
        &self,
        request: Request<RegenerateRecoveryCodesRequest>,
    ) -> Result<Response<RegenerateRecoveryCodesResponse>, Status> {
        mfa::regenerate(&self.auth, request)
            .await
            .map(Response::new)
    }

    async fn send_email_verification(
        &self,
        request: Request<SendEmailVerificationRequest>,
    ) -> Result<Response<SendEmailVerificationResponse>, Status> {
        mails::send_email_verification(&self.auth, request).await
    }

    async fn verify_email(
        &self,
        request: Request<VerifyEmailRequest>,
    ) -> Result<Response<VerifyEmailResponse>, Status> {
        mails::verify_email(&self.auth, request).await
    }

    async fn request_password_reset(
        &self,
        request: Request<RequestPasswordResetRequest>,
    ) -> Result<Response<RequestPasswordResetResponse>, Status> {
        mails::request_password_reset(&self.auth, request).await
    }

    async fn reset_password(
        &self,
        request: Request<ResetPasswordRequest>,
    ) -> Result<Response<ResetPasswordResponse>, Status> {
        mails::reset_password(&self.auth, request).await
    }

    async fn validate_token(
        &self,
        request: Request<ValidateTokenRequest>,
    ) -> Result<Response<ValidateTokenResponse>, Status> {
        let request = request.into_inner();
        let mut fields = Fields::default();
        let token = fields.take("token", present(request.token));
        let min_freshness = convert::min_freshness(&mut fields, request.min_freshness);
        let (token, min_freshness) = fields.finish(token.zip(min_freshness))?;
        let now = Utc::now();
        let validated = self
            .auth
            .validate(&token, Credential::Token, min_freshness, now)
            .await?;
        let user = validated.user();
        let quota = if request.include_quota {
            Some((&self.usage.quota(user.id, now).await?).into())
        } else {
            None
        };
        Ok(Response::new(ValidateTokenResponse {
            quota,
            ..ValidateTokenResponse::from(&validated)
        }))
    }

    async fn batch_validate_tokens(
        &self,
        request: Request<BatchValidateTokensRequest>,
    ) -> Result<Response<BatchValidateTokensResponse>, Status> {
        let request = request.into_inner();
        let mut fields = Fields::default();
        let tokens = fields.take("tokens", batch(request.tokens));
        let min_freshness = convert::min_freshness(&mut fields, request.min_freshness);
        let (tokens, min_freshness) = fields.finish(tokens.zip(min_freshness))?;
        let now = Utc::now();
        let auth = &self.auth;
        let results = tokens
            .into_iter()
            .enumerate()
            .map(|(index, token)| async move {
                if index % BATCH_BURST == 0 {
                    yield_now().await;
                }
                let answer = auth.validate(&token, Credential::Token, min_freshness, now);
                convert::token_result(answer.await)
            });
        let results = stream::iter(results).buffered(BATCH_READS);
        Ok(Response::new(BatchValidateTokensResponse {
            results: results.try_collect().await?,
        }))
    }

    type WatchRevocationsStream = watch::Messages;

    async fn watch_revocations(
        &self,
        request: Request<WatchRevocationsRequest>,
    ) -> Result<Response<Self::WatchRevocationsStream>, Status> {
        let messages = watch::messages(&self.auth, Shown::by(&request)?)?;
        Ok(Response::new(messages))
    }

    async fn create_api_key(
        &self,
        request: Request<CreateApiKeyRequest>,
    ) -> Result<Response<CreateApiKeyResponse>, Status> {
        let (user_id, _) = Caller::session_of(&request)?;
        let (message, now) = (request.get_ref(), Utc::now());
        let mut fields = Fields::default();
        let name = fields.parse("name", &message.name);
        let scopes = fields.take("scopes", ApiKeyScopes::parse(&message.scopes));
        let expires_at = fields.take("expires_at", self.key_expiry(message.expires_at, now));
        let ((name, scopes), expires_at) = fields.finish(name.zip(scopes).zip(expires_at))?;
        let (key, text) = self
            .auth
            .create_api_key(user_id, name, scopes, expires_at, &origin_of(&request), now)
            .await?;
        Ok(Response::new(CreateApiKeyResponse {
            api_key: Some(key.into()),
            key: text,
        }))
    }

    async fn list_api_keys(
        &self,
        request: Request<ListApiKeysRequest>,
    ) -> Result<Response<ListApiKeysResponse>, Status> {
        let (user_id, _) = Caller::session_of(&request)?;
        let request = request.into_inner();
        let list = format!("api keys {user_id} {}", request.show_ended);
        let page = only(|fields| fields.page(request.page_size, &request.page_token, &list))?;
        let page = self
            .auth
            .api_keys(user_id, request.show_ended, &page, Utc::now())
            .await?
            .map(Into::into);
        Ok(Response::new(ListApiKeysResponse {
            api_keys: page.items,
            next_page_token: page.next_token.unwrap_or_default(),
        }))
    }

    async fn revoke_api_key(
        &self,
        request: Request<RevokeApiKeyRequest>,
    ) -> Result<Response<RevokeApiKeyResponse>, Status> {
        let (user_id, _) = Caller::session_of(&request)?;
        let id = only(|fields| fields.parse("api_key_id", &request.get_ref().api_key_id))?;
        let key = self
            .auth
            .revoke_api_key(id, user_id, &origin_of(&request), Utc::now())
            .await?;
        Ok(Response::new(RevokeApiKeyResponse {
            api_key: Some(key.into()),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn get_jwks(
        &self,
        _request: Request<GetJwksRequest>,
    ) -> Result<Response<GetJwksResponse>, Status> {
        let keys = self.auth.public_keys();
        let json =
            serde_json::to_string(&serde_json::json!({"keys": keys})).map_err(Error::internal)?;
        Ok(Response::new(GetJwksResponse {
            keys: keys.iter().map(Into::into).collect(),
            json,
        }))
    }
}

impl Handler {
    /// Reads when an API key is to expire; unset means never.
    fn key_expiry(
        &self,
        value: Option<Timestamp>,
        now: DateTime<Utc>,
    ) -> Result<Option<DateTime<Utc>>, Violation> {
        let Some(value) = value else {
            return Ok(None);
        };
        let expires_at = convert::timestamp(Some(value))?;
        self.auth.check_api_key_expiry(expires_at, now)?;
        Ok(Some(expires_at))
    }
}

/// Most tokens of one call.
const BATCH_TOKENS: usize = 1000;

/// Those of a call that are read from the database at once: a part of the pool.
const BATCH_READS: usize = 4;

/// Tokens of a batch between which others have their turn: checking signatures takes the thread.
const BATCH_BURST: usize = 8;

fn batch(tokens: Vec<String>) -> Result<Vec<String>, Violation> {
    if (1..=BATCH_TOKENS).contains(&tokens.len()) && tokens.iter().all(|token| !token.is_empty()) {
        Ok(tokens)
    } else {
        Err(format!("must hold 1 to {BATCH_TOKENS} tokens, none of them empty").into())
    }
}

/// A text that must not be left out.
fn present(text: String) -> Result<String, Violation> {
    if text.is_empty() {
        Err("must not be empty".into())
    } else {
        Ok(text)
    }
}
