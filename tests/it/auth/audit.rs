use std::collections::HashMap;

use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        CreateServiceAccountRequest, DeleteUserRequest, DisableServiceAccountRequest,
        DisableUserRequest, EnableUserRequest, RevokeUserSessionsRequest, RotateServiceKeyRequest,
        SetUserTierRequest, UpdateUserRequest,
    },
    auth::v1::{
        ChangePasswordRequest, CreateApiKeyRequest, LoginRequest, LogoutRequest,
        RefreshTokensRequest, RegisterRequest, RevokeAllSessionsRequest, RevokeApiKeyRequest,
        RevokeSessionRequest, Role, UpdateCurrentUserRequest, User,
    },
};
use tonic::{Code, Request};

use super::{assert_refused, refresh, refreshed};
use crate::harness::{PASSWORD, TestApp, TestUser};

/// A row of the trail.
#[derive(Debug, PartialEq)]
struct Event {
    actor: (String, Option<String>),
    target: String,
    address: Option<String>,
    user_agent: String,
    details: serde_json::Value,
}

/// What was written under a request id, by action. A request acts once in each way.
async fn events(app: &TestApp, request_id: &str) -> HashMap<String, Event> {
    let rows = app
        .sql(&format!(
            "SELECT action, actor_kind, actor_id::text, target_id::text, address, user_agent, \
             details::text FROM audit_events WHERE request_id = '{request_id}'"
        ))
        .await;
    let count = rows.len();
    let events: HashMap<String, Event> = rows
        .into_iter()
        .map(|row| {
            let event = Event {
                actor: (row.get(1), row.get(2)),
                target: row.get(3),
                address: row.get(4),
                user_agent: row.get(5),
                details: serde_json::from_str(row.get(6)).expect("JSON"),
            };
            (row.get(0), event)
        })
        .collect();
    assert_eq!(events.len(), count);
    events
}

/// The one event written under a request id.
async fn event(app: &TestApp, request_id: &str, action: &str) -> Event {
    let mut events = events(app, request_id).await;
    assert_eq!(events.len(), 1, "{events:?}");
    events.remove(action).expect(action)
}

fn with_id<T>(request_id: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let id = request_id.parse().expect("ASCII");
    request.metadata_mut().insert("x-request-id", id);
    request
}

fn anonymous() -> (String, Option<String>) {
    ("anonymous".to_owned(), None)
}

fn login_of(user: &TestUser, password: &str) -> LoginRequest {
    LoginRequest {
        identifier: user.email.clone(),
        password: password.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_is_written_with_where_it_came_from() {
    let app = TestApp::spawn().await;
    let message = RegisterRequest {
        email: "ada@example.com".to_owned(),
        username: "ada".to_owned(),
        full_name: String::new(),
        password: PASSWORD.to_owned(),
    };
    let answer = app.auth("").register(with_id("req-1", message)).await;
    let user = answer.unwrap().into_inner().user.unwrap();
    let event = event(&app, "req-1", "user.created").await;
    assert_eq!((event.actor, event.target), (anonymous(), user.id));
    assert_eq!(event.address.as_deref(), Some("127.0.0.1"));
    assert!(
        event.user_agent.starts_with("tonic/"),
        "{}",
        event.user_agent
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_is_written_with_its_session_and_its_user() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let message = login_of(&user, PASSWORD);
    let answer = app.auth("").login(with_id("req-1", message)).await.unwrap();
    let session = answer.into_inner().tokens.unwrap().session_id;
    let event = event(&app, "req-1", "session.opened").await;
    assert_eq!(event.target, session);
    // Sessions are swept one day, the trail stays: the event itself has to say whose it was.
    assert_eq!(event.details["user_id"], user.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_login_opens_nothing() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let message = login_of(&user, "not the password");
    app.auth("")
        .login(with_id("req-1", message))
        .await
        .unwrap_err();
    app.disable(&user.id).await;
    let message = login_of(&user, PASSWORD);
    app.auth("")
        .login(with_id("req-1", message))
        .await
        .unwrap_err();
    assert!(events(&app, "req-1").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_is_written_as_the_users_own_act() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    let request = with_id("req-1", LogoutRequest {});
    app.auth(&tokens.access_token)
        .logout(request)
        .await
        .unwrap();
    let event = event(&app, "req-1", "session.ended").await;
    assert_eq!(event.actor, ("user".to_owned(), Some(user.id)));
    assert_eq!(event.target, tokens.session_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn reuse_of_a_refresh_token_is_written_with_its_session_and_its_user() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let first = app.login(&user).await;
    let second = refreshed(&app, &first.refresh_token).await;
    refresh(&app, &second.refresh_token).await.unwrap();
    let message = RefreshTokensRequest {
        refresh_token: first.refresh_token,
    };
    app.auth("")
        .refresh_tokens(with_id("req-1", message))
        .await
        .unwrap_err();
    let event = event(&app, "req-1", "session.refresh_token_reused").await;
    assert_eq!((event.actor, event.target), (anonymous(), first.session_id));
    assert_eq!(event.details["user_id"], user.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_administrator_does_is_written_in_their_name() {
    let app = TestApp::spawn().await;
    let operator = app.user().admin().create().await;
    let token = app.login(&operator).await.access_token;
    let mut admin = app.admin(&token);
    let user_id = app.user().create().await.id;
    let tier = "starter".to_owned();
    let request = SetUserTierRequest {
        user_id: user_id.clone(),
        tier,
    };
    admin.set_user_tier(with_id("tier", request)).await.unwrap();
    let reason = "chargeback".to_owned();
    let request = DisableUserRequest {
        user_id: user_id.clone(),
        reason,
    };
    admin.disable_user(with_id("off", request)).await.unwrap();
    let request = EnableUserRequest {
        user_id: user_id.clone(),
    };
    admin.enable_user(with_id("on", request)).await.unwrap();
    let actor = ("user".to_owned(), Some(operator.id));
    for (request_id, action, detail) in [
        ("tier", "user.tier_set", Some(("tier", "starter"))),
        ("off", "user.disabled", Some(("reason", "chargeback"))),
        ("on", "user.enabled", None),
    ] {
        let event = event(&app, request_id, action).await;
        assert_eq!(
            (&event.actor, &event.target),
            (&actor, &user_id),
            "{action}"
        );
        if let Some((name, value)) = detail {
            assert_eq!(event.details[name], value);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_service_does_is_written_in_its_name() {
    let app = TestApp::spawn().await;
    let (operator, key) = app.service("operator", &["admin"]).await;
    let actor = ("service".to_owned(), Some(operator));
    let message = CreateServiceAccountRequest {
        name: "gateway".to_owned(),
        scopes: vec!["quota".to_owned()],
    };
    let made = app
        .admin(&key)
        .create_service_account(with_id("make", message))
        .await;
    let service_account_id = made.unwrap().into_inner().service_account.unwrap().id;
    let event_of = event(&app, "make", "service_account.created").await;
    assert_eq!(
        (&event_of.actor, &event_of.target),
        (&actor, &service_account_id)
    );
    assert_eq!(event_of.details["scopes"], serde_json::json!(["quota"]));
    let message = RotateServiceKeyRequest {
        service_account_id: service_account_id.clone(),
        overlap: None,
    };
    app.admin(&key)
        .rotate_service_key(with_id("rotate", message))
        .await
        .unwrap();
    let event_of = event(&app, "rotate", "service_account.key_rotated").await;
    assert_eq!(
        (&event_of.actor, &event_of.target),
        (&actor, &service_account_id)
    );
    assert_eq!(
        event_of.details["overlap_secs"],
        serde_json::json!(24 * 3600)
    );
    let message = DisableServiceAccountRequest { service_account_id };
    app.admin(&key)
        .disable_service_account(with_id("off", message.clone()))
        .await
        .unwrap();
    let event_of = event(&app, "off", "service_account.disabled").await;
    assert_eq!(
        (event_of.actor, event_of.target),
        (actor, message.service_account_id)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_making_and_the_end_of_an_api_key_are_written_as_the_users_own_acts() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let message = CreateApiKeyRequest {
        name: "my laptop".to_owned(),
        scopes: vec!["read".to_owned()],
        expires_at: None,
    };
    let mut auth = app.auth(&token);
    let answer = auth.create_api_key(with_id("made", message)).await;
    let key = answer.unwrap().into_inner().api_key.unwrap();
    let api_key_id = key.id.clone();
    for _ in 0..2 {
        let message = RevokeApiKeyRequest {
            api_key_id: api_key_id.clone(),
        };
        let answer = auth.revoke_api_key(with_id("ended", message)).await;
        answer.unwrap();
    }
    let actor = ("user".to_owned(), Some(user.id.clone()));
    let made = event(&app, "made", "api_key.created").await;
    assert_eq!((&made.actor, made.target), (&actor, key.id.clone()));
    assert_eq!(made.details["scopes"], serde_json::json!(["read"]));
    let ended = event(&app, "ended", "api_key.revoked").await;
    assert_eq!((&ended.actor, ended.target), (&actor, key.id));
    for details in [made.details, ended.details] {
        assert_eq!(details["user_id"], serde_json::json!(user.id));
        assert_eq!(details["name"], serde_json::json!("my laptop"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_act_that_changes_nothing_is_not_written() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (service_account_id, _) = app.service("gateway", &["quota"]).await;
    let message = DisableServiceAccountRequest { service_account_id };
    app.admin(&app.service_key)
        .disable_service_account(message.clone())
        .await
        .unwrap();
    app.disable(&user.id).await;
    let before = app.count("SELECT count(*) FROM audit_events").await;
    app.disable(&user.id).await;
    app.set_tier(&user.id, "free").await;
    app.admin(&app.service_key)
        .disable_service_account(message)
        .await
        .unwrap();
    assert_eq!(app.count("SELECT count(*) FROM audit_events").await, before);
    app.enable(&user.id).await;
    assert_eq!(
        app.count("SELECT count(*) FROM audit_events").await,
        before + 1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_act_is_done_that_cannot_be_written() {
    const STATE: &str = "SELECT md5(concat( \
        (SELECT json_agg(u ORDER BY id) FROM users u), \
        (SELECT json_agg(s ORDER BY id) FROM sessions s), \
        (SELECT json_agg(k ORDER BY id) FROM api_keys k), \
        (SELECT json_agg(a ORDER BY id) FROM service_accounts a), \
        (SELECT json_agg(k ORDER BY id) FROM service_keys k)))";
    let app = TestApp::spawn().await;
    let (user, off) = (app.user().create().await, app.user().create().await);
    app.disable(&off.id).await;
    let (service_account_id, _) = app.service("gateway", &["quota"]).await;
    let first = app.login(&user).await;
    let api_key_id = app.api_key(&user, &[]).await.id;
    let second = refreshed(&app, &first.refresh_token).await;
    refresh(&app, &second.refresh_token).await.unwrap();
    app.sql("ALTER TABLE audit_events ADD CONSTRAINT full_trail CHECK (false) NOT VALID")
        .await;
    let before: String = app.sql(STATE).await[0].get(0);

    let mut admin = app.admin(&app.service_key);
    let mut auth = app.auth(&first.access_token);
    let (user_id, reason) = (user.id.clone(), String::new());
    let register = RegisterRequest {
        email: "ada@example.com".to_owned(),
        username: "ada".to_owned(),
        full_name: String::new(),
        password: PASSWORD.to_owned(),
    };
    let service = CreateServiceAccountRequest {
        name: "another".to_owned(),
        scopes: vec!["quota".to_owned()],
    };
    let old = RefreshTokensRequest {
        refresh_token: first.refresh_token,
    };
    let profile = User {
        id: user_id.clone(),
        full_name: "Another Name".to_owned(),
        role: Role::Admin.into(),
        ..User::default()
    };
    let own = UpdateCurrentUserRequest {
        user: Some(profile.clone()),
        update_mask: None,
        current_password: String::new(),
    };
    let update = UpdateUserRequest {
        user: Some(profile),
        update_mask: None,
    };
    let delete = DeleteUserRequest {
        user_id: user_id.clone(),
        reason: String::new(),
    };
    let password = ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: "a staple for the next battery".to_owned(),
        keep_other_sessions: false,
    };
    let one = RevokeSessionRequest {
        session_id: first.session_id,
    };
    let all = RevokeUserSessionsRequest {
        user_id: user_id.clone(),
        ..RevokeUserSessionsRequest::default()
    };
    let tier = SetUserTierRequest {
        user_id: user_id.clone(),
        tier: "starter".to_owned(),
    };
    let key = CreateApiKeyRequest {
        name: "another".to_owned(),
        ..CreateApiKeyRequest::default()
    };
    let rotation = RotateServiceKeyRequest {
        service_account_id: service_account_id.clone(),
        overlap: None,
    };
    let outcomes = [
        admin.rotate_service_key(rotation).await.map(drop),
        auth.create_api_key(key).await.map(drop),
        auth.revoke_api_key(RevokeApiKeyRequest { api_key_id })
            .await
            .map(drop),
        auth.register(register).await.map(drop),
        auth.login(login_of(&user, PASSWORD)).await.map(drop),
        auth.logout(LogoutRequest {}).await.map(drop),
        auth.revoke_session(one).await.map(drop),
        auth.revoke_all_sessions(RevokeAllSessionsRequest::default())
            .await
            .map(drop),
        admin.revoke_user_sessions(all).await.map(drop),
        auth.update_current_user(own).await.map(drop),
        auth.change_password(password).await.map(drop),
        admin.update_user(update).await.map(drop),
        admin.delete_user(delete).await.map(drop),
        auth.refresh_tokens(old).await.map(drop),
        admin.set_user_tier(tier).await.map(drop),
        admin
            .disable_user(DisableUserRequest { user_id, reason })
            .await
            .map(drop),
        admin
            .enable_user(EnableUserRequest { user_id: off.id })
            .await
            .map(drop),
        admin.create_service_account(service).await.map(drop),
        admin
            .disable_service_account(DisableServiceAccountRequest { service_account_id })
            .await
            .map(drop),
    ];
    for outcome in outcomes {
        let refused = assert_refused(outcome, Code::Internal, "INTERNAL");
        // The driver's words stay inside.
        assert_eq!(refused.message(), "internal error");
        assert!(!String::from_utf8_lossy(refused.details()).contains("full_trail"));
    }
    assert_eq!(app.sql(STATE).await[0].get::<_, String>(0), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_trail_holds_no_secret_and_no_address() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (_, key) = app.service("gateway", &["quota"]).await;
    let api_key = app.api_key(&user, &[]).await;
    app.revoke_api_key(&user, &api_key.id).await;
    let first = app.login(&user).await;
    let second = refreshed(&app, &first.refresh_token).await;
    refresh(&app, &second.refresh_token).await.unwrap();
    refresh(&app, &first.refresh_token).await.unwrap_err();
    app.set_tier(&user.id, "starter").await;
    app.disable(&user.id).await;
    let rows = app
        .sql("SELECT row_to_json(e)::text FROM audit_events e")
        .await;
    assert!(rows.len() >= 7);
    for row in rows {
        let row: &str = row.get(0);
        for secret in [
            "@",
            "$argon2",
            "tks_",
            "tka_",
            &api_key.text[4..40],
            "tkr_",
            "eyJ",
            PASSWORD,
            &*user.username,
            &key[4..40],
            &first.refresh_token[4..40],
        ] {
            assert!(!row.contains(secret), "{secret} in {row}");
        }
    }
}
