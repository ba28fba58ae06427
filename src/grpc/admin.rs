use chrono::{DateTime, Utc};
use tonic::{Request, Response, Status, Streaming};

use super::{
    audit,
    bearer::bearer,
    call::origin_of,
    convert::{self, Fields, only, time},
    importing, mfa, people,
    quota::{self, reason},
};
use crate::{
    auth::{Auth, InitialCredential, NewAccount},
    model::{Change, ScopeSet, UserId},
    proto::tollkeeper::admin::v1::{
        ClearQuotaOverrideRequest, ClearQuotaOverrideResponse, CreateServiceAccountRequest,
        CreateServiceAccountResponse, CreateUserRequest, CreateUserResponse, DeleteUserRequest,
        DeleteUserResponse, DisableServiceAccountRequest, DisableServiceAccountResponse,
        DisableUserRequest, DisableUserResponse, EnableUserRequest, EnableUserResponse,
        GetUserRequest, GetUserResponse, GrantCreditsRequest, GrantCreditsResponse,
        ImportUsersRequest, ListAuditEventsRequest, ListAuditEventsResponse, ListCreditsRequest,
        ListCreditsResponse, ListServiceAccountsRequest, ListServiceAccountsResponse,
        ListUserSessionsRequest, ListUserSessionsResponse, ListUsersRequest, ListUsersResponse,
        LookupUserRequest, LookupUserResponse, ResetUserMfaRequest, ResetUserMfaResponse,
        RevokeUserSessionsRequest, RevokeUserSessionsResponse, RotateServiceKeyRequest,
        RotateServiceKeyResponse, SetQuotaOverrideRequest, SetQuotaOverrideResponse,
        SetUserTierRequest, SetUserTierResponse, UpdateUserRequest, UpdateUserResponse,
        VoidCreditsRequest, VoidCreditsResponse, admin_service_server::AdminService,
        create_user_request,
    },
    usage::Usage,
};

/// `AdminService`.
pub(super) struct Handler {
    pub(super) auth: Auth,
    pub(super) usage: Usage,
}

#[tonic::async_trait]
impl AdminService for Handler {
    async fn create_user(
        &self,
        request: Request<CreateUserRequest>,
    ) -> Result<Response<CreateUserResponse>, Status> {
        use create_user_request::Credential;
        let origin = origin_of(&request);
        let request = request.into_inner();
        let mut fields = Fields::default();
        let person = convert::person(
            &mut fields,
            &request.email,
            &request.username,
            &request.full_name,
        );
        let credential = match request.credential {
            Some(Credential::Password(password)) => fields
                .take("password", self.auth.check_password_length(&password))
                .map(|()| InitialCredential::Password(password)),
            Some(Credential::PasswordHash(hash)) => fields
                .parse("password_hash", &hash)
                .map(InitialCredential::Hash),
            None => Some(InitialCredential::None),
        };
        let tier = fields.tier("tier", &request.tier, &self.usage.tiers());
        let role = fields.take("role", convert::role(request.role));
        let read = person.zip(credential).zip(role.zip(tier));
        let ((person, credential), (role, tier)) = fields.finish(read)?;
        let new = NewAccount {
            person,
            credential,
            role,
            tier,
        };
        let user = self.auth.create_account(new, &origin).await?;
        Ok(Response::new(CreateUserResponse {
            user: Some(user.into()),
        }))
    }

    async fn get_user(
        &self,
        request: Request<GetUserRequest>,
    ) -> Result<Response<GetUserResponse>, Status> {
        let id = only(|fields| fields.parse("user_id", &request.get_ref().user_id))?;
        let user = self.auth.user(id).await?;
        Ok(Response::new(GetUserResponse {
            user: Some(user.into()),
        }))
    }

    async fn lookup_user(
        &self,
        request: Request<LookupUserRequest>,
    ) -> Result<Response<LookupUserResponse>, Status> {
        let identifier = only(|fields| convert::lookup(fields, request.into_inner().by))?;
        let user = self.auth.user_by_identifier(&identifier).await?;
        Ok(Response::new(LookupUserResponse {
            user: Some(user.into()),
        }))
    }

    async fn list_users(
        &self,
        request: Request<ListUsersRequest>,
    ) -> Result<Response<ListUsersResponse>, Status> {
        let request = request.into_inner();
        let (filter, page) = only(|fields| people::list(fields, &request))?;
        let page = self.auth.users(&filter, &page).await?.map(Into::into);
        Ok(Response::new(ListUsersResponse {
            users: page.items,
            next_page_token: page.next_token.unwrap_or_default(),
        }))
    }

    async fn update_user(
        &self,
        request: Request<UpdateUserRequest>,
    ) -> Result<Response<UpdateUserResponse>, Status> {
        let message = request.get_ref();
        let (id, changes) = only(|fields| {
            let user = fields.take("user", message.user.as_ref().ok_or("must be set".into()))?;
            let id = fields.parse("user.id", &user.id);
            let mask = message.update_mask.as_ref();
            id.zip(people::changes(fields, user, mask, people::ALL_FIELDS))
        })?;
        let origin = origin_of(&request);
        let user = self.auth.update_user(id, &changes, &origin).await?;
        Ok(Response::new(UpdateUserResponse {
            user: Some(user.into()),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn delete_user(
        &self,
        request: Request<DeleteUserRequest>,
    ) -> Result<Response<DeleteUserResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let id: Option<UserId> = fields.parse("user_id", &message.user_id);
        let reason = fields.take("reason", reason(&message.reason));
        let (id, reason) = fields.finish(id.zip(reason))?;
        let origin = origin_of(&request);
        self.auth.delete_user(id, reason, &origin).await?;
        self.usage.apply(Change::User(id));
        Ok(Response::new(DeleteUserResponse {
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    type ImportUsersStream = importing::Answers;

    async fn import_users(
        &self,
        request: Request<Streaming<ImportUsersRequest>>,
    ) -> Result<Response<Self::ImportUsersStream>, Status> {
        let credential = bearer(&request.metadata().clone().into_headers())?.to_owned();
        let origin = origin_of(&request);
        let (auth, usage) = (self.auth.clone(), self.usage.clone());
        let caller = importing::Importer { credential, origin };
        Ok(Response::new(importing::answer(
            auth,
            usage,
            caller,
            request.into_inner(),
        )))
    }

    async fn list_audit_events(
        &self,
        request: Request<ListAuditEventsRequest>,
    ) -> Result<Response<ListAuditEventsResponse>, Status> {
        let (filter, page) = only(|fields| audit::list(fields, request.get_ref()))?;
        let page = self.auth.audit_events(&filter, &page).await?;
        let page = page.map(Into::into);
        Ok(Response::new(ListAuditEventsResponse {
            audit_events: page.items,
            next_page_token: page.next_token.unwrap_or_default(),
        }))
    }

    async fn set_user_tier(
        &self,
        request: Request<SetUserTierRequest>,
    ) -> Result<Response<SetUserTierResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let id = fields.parse("user_id", &message.user_id);
        let tiers = self.usage.tiers();
        let tier = fields.known_tier("tier", &message.tier, &tiers);
        let (id, tier) = fields.finish(id.zip(tier))?;
        let origin = origin_of(&request);
        let user = self.auth.set_tier(id, &tier, &tiers, &origin).await?;
        self.usage.apply(Change::User(id));
        Ok(Response::new(SetUserTierResponse {
            user: Some(user.into()),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn enable_user(
        &self,
        request: Request<EnableUserRequest>,
    ) -> Result<Response<EnableUserResponse>, Status> {
        let id = only(|fields| fields.parse("user_id", &request.get_ref().user_id))?;
        let user = self
            .auth
            .set_active(id, true, "", &origin_of(&request))
            .await?;
        Ok(Response::new(EnableUserResponse {
            user: Some(user.into()),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn disable_user(
        &self,
        request: Request<DisableUserRequest>,
    ) -> Result<Response<DisableUserResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let id: Option<UserId> = fields.parse("user_id", &message.user_id);
        let reason = fields.take("reason", reason(&message.reason));
        let (id, reason) = fields.finish(id.zip(reason))?;
        let user = self
            .auth
            .set_active(id, false, reason, &origin_of(&request))
            .await?;
        Ok(Response::new(DisableUserResponse {
            user: Some(user.into()),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn reset_user_mfa(
        &self,
        request: Request<ResetUserMfaRequest>,
    ) -> Result<Response<ResetUserMfaResponse>, Status> {
        mfa::reset(&self.auth, request).await.map(Response::new)
    }

    async fn list_user_sessions(
        &self,
        request: Request<ListUserSessionsRequest>,
    ) -> Result<Response<ListUserSessionsResponse>, Status> {
        let request = request.into_inner();
        let mut fields = Fields::default();
        let user_id: Option<UserId> = fields.parse("user_id", &request.user_id);
        let list = format!("sessions {user_id:?}");
        let page = fields.page(request.page_size, &request.page_token, &list);
        let (user_id, page) = fields.finish(user_id.zip(page))?;
        self.auth.user(user_id).await?;
        let page = self.auth.sessions(user_id, &page, Utc::now()).await?;
        let page = page.map(|session| people::session(session, None));
        Ok(Response::new(ListUserSessionsResponse {
            sessions: page.items,
            next_page_token: page.next_token.unwrap_or_default(),
        }))
    }

    async fn revoke_user_sessions(
        &self,
        request: Request<RevokeUserSessionsRequest>,
    ) -> Result<Response<RevokeUserSessionsResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let user_id: Option<UserId> = fields.parse("user_id", &message.user_id);
        let one = fields.parse_optional("session_id", &message.session_id);
        let reason = fields.take("reason", reason(&message.reason));
        let ((user_id, one), reason) = fields.finish(user_id.zip(one).zip(reason))?;
        let (origin, now) = (origin_of(&request), Utc::now());
        self.auth.user(user_id).await?;
        let revoked = match one {
            Some(id) => {
                let revoked = self.auth.revoke_session(id, user_id, reason, &origin, now);
                usize::from(revoked.await?.1)
            }
            None => {
                let revoked = self
                    .auth
                    .revoke_sessions(user_id, None, reason, &origin, now);
                revoked.await?
            }
        };
        Ok(Response::new(RevokeUserSessionsResponse {
            revoked_count: people::count(revoked),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn create_service_account(
        &self,
        request: Request<CreateServiceAccountRequest>,
    ) -> Result<Response<CreateServiceAccountResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let name = fields.parse("name", &message.name);
        let scopes = fields.take("scopes", ScopeSet::parse(&message.scopes));
        let (name, scopes) = fields.finish(name.zip(scopes))?;
        let (account, key) = self
            .auth
            .create_service_account(name, scopes, &origin_of(&request))
            .await?;
        Ok(Response::new(CreateServiceAccountResponse {
            service_account: Some(account.into()),
            key,
        }))
    }

    async fn list_service_accounts(
        &self,
        request: Request<ListServiceAccountsRequest>,
    ) -> Result<Response<ListServiceAccountsResponse>, Status> {
        let request = request.into_inner();
        let page = only(|fields| {
            let list = "service accounts";
            fields.page(request.page_size, &request.page_token, list)
        })?;
        let page = self.auth.service_accounts(&page).await?.map(Into::into);
        Ok(Response::new(ListServiceAccountsResponse {
            service_accounts: page.items,
            next_page_token: page.next_token.unwrap_or_default(),
        }))
    }

    async fn rotate_service_key(
        &self,
        request: Request<RotateServiceKeyRequest>,
    ) -> Result<Response<RotateServiceKeyResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let id = fields.parse("service_account_id", &message.service_account_id);
        let overlap = fields.take("overlap", convert::key_overlap(message.overlap));
        let (id, overlap) = fields.finish(id.zip(overlap))?;
        let rotated = self
            .auth
            .rotate_service_key(id, overlap, &origin_of(&request), Utc::now())
            .await?;
        Ok(Response::new(RotateServiceKeyResponse {
            service_account: Some(rotated.account.into()),
            key: rotated.key,
            old_keys_end_at: Some(time(rotated.old_keys_end_at)),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn disable_service_account(
        &self,
        request: Request<DisableServiceAccountRequest>,
    ) -> Result<Response<DisableServiceAccountResponse>, Status> {
        let text = &request.get_ref().service_account_id;
        let id = only(|fields| fields.parse("service_account_id", text))?;
        let account = self
            .auth
            .disable_service_account(id, &origin_of(&request))
            .await?;
        Ok(Response::new(DisableServiceAccountResponse {
            service_account: Some(account.into()),
            revision: convert::revision(self.auth.revision().await),
        }))
    }

    async fn set_quota_override(
        &self,
        request: Request<SetQuotaOverrideRequest>,
    ) -> Result<Response<SetQuotaOverrideResponse>, Status> {
        let now = Utc::now();
        let (id, new, reason) = only(|fields| quota::new_override(fields, request.get_ref(), now))?;
        let origin = origin_of(&request);
        let set = self.usage.set_override(id, &new, reason, &origin, now);
        Ok(Response::new(SetQuotaOverrideResponse {
            quota: Some((&set.await?).into()),
        }))
    }

    async fn clear_quota_override(
        &self,
        request: Request<ClearQuotaOverrideRequest>,
    ) -> Result<Response<ClearQuotaOverrideResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let id = fields.parse("user_id", &message.user_id);
        let reason = fields.take("reason", reason(&message.reason));
        let (id, reason) = fields.finish(id.zip(reason))?;
        let origin = origin_of(&request);
        let cleared = self.usage.clear_override(id, reason, &origin, Utc::now());
        Ok(Response::new(ClearQuotaOverrideResponse {
            quota: Some((&cleared.await?).into()),
        }))
    }

    async fn grant_credits(
        &self,
        request: Request<GrantCreditsRequest>,
    ) -> Result<Response<GrantCreditsResponse>, Status> {
        let now = Utc::now();
        let read = |after| only(|fields| quota::new_credit(fields, request.get_ref(), after, now));
        let credit = match read(now) {
            Ok(new) => self.usage.grant_credits(&new, &origin_of(&request)).await?,
            // What was granted in time and has expired since is answered all the same.
            Err(refused) => match read(DateTime::UNIX_EPOCH) {
                Ok(granted) => self.usage.granted_credits(&granted, now).await?,
                Err(_) => None,
            }
            .ok_or(refused)?,
        };
        Ok(Response::new(GrantCreditsResponse {
            credit: Some(credit.into()),
        }))
    }

    async fn list_credits(
        &self,
        request: Request<ListCreditsRequest>,
    ) -> Result<Response<ListCreditsResponse>, Status> {
        let request = request.into_inner();
        let mut fields = Fields::default();
        let user_id: Option<UserId> = fields.parse("user_id", &request.user_id);
        let list = format!("credits {user_id:?}");
        let page = fields.page(request.page_size, &request.page_token, &list);
        let (user_id, page) = fields.finish(user_id.zip(page))?;
        let credits = self.usage.credits(user_id, &page, Utc::now()).await?;
        let page = credits.map(Into::into);
        Ok(Response::new(ListCreditsResponse {
            credits: page.items,
            next_page_token: page.next_token.unwrap_or_default(),
        }))
    }

    async fn void_credits(
        &self,
        request: Request<VoidCreditsRequest>,
    ) -> Result<Response<VoidCreditsResponse>, Status> {
        let message = request.get_ref();
        let mut fields = Fields::default();
        let id = fields.parse("credit_id", &message.credit_id);
        let reason = fields.take("reason", reason(&message.reason));
        let (id, reason) = fields.finish(id.zip(reason))?;
        let credit = self
            .usage
            .void_credits(id, reason, &origin_of(&request))
            .await?;
        Ok(Response::new(VoidCreditsResponse {
            credit: Some(credit.into()),
        }))
    }
}
