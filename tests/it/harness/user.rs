use std::sync::atomic::{AtomicU32, Ordering};

use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        CreateServiceAccountRequest, CreateUserRequest, DisableUserRequest, EnableUserRequest,
        SetUserTierRequest, create_user_request::Credential,
    },
    auth::v1::{
        ApiKey, CreateApiKeyRequest, LogoutRequest, RevokeApiKeyRequest, Role, Tokens, User,
    },
};

use super::{TestApp, login_through};

/// Password of every user that the harness makes.
pub(crate) const PASSWORD: &str = "correct horse battery staple";

/// A user to create; everything has a default.
pub(crate) struct UserBuilder<'a> {
    app: &'a TestApp,
    request: CreateUserRequest,
}

/// A user that was created.
#[derive(Clone, Debug)]
pub(crate) struct TestUser {
    pub(crate) id: String,
    pub(crate) email: String,
    pub(crate) username: String,
}

/// An API key that was created.
#[derive(Clone, Debug)]
pub(crate) struct TestApiKey {
    pub(crate) id: String,
    pub(crate) text: String,
}

impl TestApp {
    pub(crate) fn user(&self) -> UserBuilder<'_> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("user-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let request = CreateUserRequest {
            email: format!("{name}@example.com"),
            username: name,
            full_name: "A Test User".to_owned(),
            credential: Some(Credential::Password(PASSWORD.to_owned())),
            tier: String::new(),
            role: 0,
        };
        UserBuilder { app: self, request }
    }

    /// Opens a session with [`PASSWORD`].
    pub(crate) async fn login(&self, user: &TestUser) -> Tokens {
        self.login_as(&user.email, PASSWORD)
            .await
            .expect("logged in")
    }

    pub(crate) async fn login_as(
        &self,
        identifier: &str,
        password: &str,
    ) -> Result<Tokens, tonic::Status> {
        login_through(&self.channel, identifier, password).await
    }

    pub(crate) async fn logout(&self, access_token: &str) {
        self.auth(access_token)
            .logout(LogoutRequest {})
            .await
            .expect("logged out");
    }

    /// Turns the kill switch on a user.
    pub(crate) async fn disable(&self, user_id: &str) -> User {
        let request = DisableUserRequest {
            user_id: user_id.to_owned(),
            reason: "a test".to_owned(),
        };
        let answer = self.admin(&self.service_key).disable_user(request).await;
        answer.expect("disabled").into_inner().user.expect("a user")
    }

    /// As [`Self::disable`]; answers the revision.
    pub(crate) async fn disable_for_revision(&self, user_id: &str) -> String {
        let request = DisableUserRequest {
            user_id: user_id.to_owned(),
            reason: String::new(),
        };
        let answer = self.admin(&self.service_key).disable_user(request).await;
        answer.expect("disabled").into_inner().revision
    }

    pub(crate) async fn enable(&self, user_id: &str) -> User {
        let request = EnableUserRequest {
            user_id: user_id.to_owned(),
        };
        let answer = self.admin(&self.service_key).enable_user(request).await;
        answer.expect("enabled").into_inner().user.expect("a user")
    }

    pub(crate) async fn set_tier(&self, user_id: &str, tier: &str) -> User {
        let request = SetUserTierRequest {
            user_id: user_id.to_owned(),
            tier: tier.to_owned(),
        };
        let answer = self.admin(&self.service_key).set_user_tier(request).await;
        answer.expect("set").into_inner().user.expect("a user")
    }

    /// A new API key that never expires.
    pub(crate) async fn api_key(&self, user: &TestUser, scopes: &[&str]) -> TestApiKey {
        let token = self.login(user).await.access_token;
        let request = CreateApiKeyRequest {
            name: "of a test".to_owned(),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
            expires_at: None,
        };
        let created = self.auth(&token).create_api_key(request).await;
        let created = created.expect("created").into_inner();
        TestApiKey {
            id: created.api_key.expect("a key").id,
            text: created.key,
        }
    }

    pub(crate) async fn revoke_api_key(&self, user: &TestUser, id: &str) -> ApiKey {
        let token = self.login(user).await.access_token;
        let api_key_id = id.to_owned();
        let request = RevokeApiKeyRequest { api_key_id };
        let answer = self.auth(&token).revoke_api_key(request).await;
        let key = answer.expect("revoked").into_inner().api_key;
        key.expect("a key")
    }

    /// An access token of the administrator.
    pub(crate) async fn admin_token(&self) -> String {
        self.login_as(&self.admin_email, PASSWORD)
            .await
            .expect("logged in")
            .access_token
    }

    /// The id and a key of a new service account with these scopes.
    pub(crate) async fn service(&self, name: &str, scopes: &[&str]) -> (String, String) {
        let request = CreateServiceAccountRequest {
            name: name.to_owned(),
            scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
        };
        let created = self
            .admin(&self.service_key)
            .create_service_account(request)
            .await;
        let created = created.expect("created").into_inner();
        (created.service_account.expect("an account").id, created.key)
    }
}

impl UserBuilder<'_> {
    pub(crate) fn tier(mut self, tier: &str) -> Self {
        tier.clone_into(&mut self.request.tier);
        self
    }

    pub(crate) fn admin(mut self) -> Self {
        self.request.role = Role::Admin.into();
        self
    }

    pub(crate) fn username(mut self, username: &str) -> Self {
        username.clone_into(&mut self.request.username);
        self
    }

    pub(crate) fn email(mut self, email: &str) -> Self {
        email.clone_into(&mut self.request.email);
        self
    }

    pub(crate) fn password_hash(mut self, hash: &str) -> Self {
        self.request.credential = Some(Credential::PasswordHash(hash.to_owned()));
        self
    }

    pub(crate) async fn create(self) -> TestUser {
        let created = self
            .app
            .admin(&self.app.service_key)
            .create_user(self.request)
            .await;
        let user: User = created.expect("created").into_inner().user.expect("a user");
        TestUser {
            id: user.id,
            email: user.email,
            username: user.username,
        }
    }
}
