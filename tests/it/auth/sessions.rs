//! A user's sessions: listed, and ended one by one or together.

use tollkeeper::proto::tollkeeper::{
    admin::v1::{ListUserSessionsRequest, RevokeUserSessionsRequest},
    auth::v1::{
        GetCurrentUserRequest, ListSessionsRequest, LoginRequest, RevokeAllSessionsRequest,
        RevokeSessionRequest, Session, auth_service_client::AuthServiceClient,
    },
};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

use super::{assert_invalid, assert_refused, refresh, refreshed, without_session};
use crate::harness::{PASSWORD, TestApp, TestUser, eventually, reason, validate_through};

const NOBODY: &str = "01890a5d-ac96-774b-bcce-b302099a8057";

async fn list(app: &TestApp, token: &str) -> Vec<Session> {
    let request = ListSessionsRequest::default();
    let answer = app.auth(token).list_sessions(request).await;
    answer.expect("listed").into_inner().sessions
}

async fn revoke(app: &TestApp, token: &str, id: &str) -> Result<Session, tonic::Status> {
    let request = RevokeSessionRequest {
        session_id: id.to_owned(),
    };
    let answer = app.auth(token).revoke_session(request).await?.into_inner();
    Ok(answer.session.expect("a session"))
}

async fn revoke_all(app: &TestApp, token: &str, keep_current: bool) -> i32 {
    let request = RevokeAllSessionsRequest { keep_current };
    let answer = app.auth(token).revoke_all_sessions(request).await;
    answer.expect("revoked").into_inner().revoked_count
}

/// A connection of a client that gives itself a name.
fn calling_itself(app: &TestApp, name: &str) -> Channel {
    Endpoint::from_shared(format!("http://{}", app.address))
        .and_then(|endpoint| endpoint.user_agent(name))
        .unwrap()
        .connect_lazy()
}

async fn assert_ended(app: &TestApp, access_token: &str) {
    let refused = app.validate(access_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
}

/// Number of events of an action about a target, and the details of the last.
async fn audited(app: &TestApp, action: &str, target: &str) -> (usize, serde_json::Value) {
    let rows = app
        .sql(&format!(
            "SELECT details::text FROM audit_events
             WHERE action = '{action}' AND target_id = '{target}' ORDER BY occurred_at"
        ))
        .await;
    let last = rows.last().map_or("null", |row| row.get(0));
    (rows.len(), serde_json::from_str(last).expect("JSON"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_sees_each_session_with_device_address_and_times() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let other = app.login(&app.user().create().await).await;
    let request = LoginRequest {
        identifier: user.username.clone(),
        password: PASSWORD.to_owned(),
    };
    let mut laptop = AuthServiceClient::new(calling_itself(&app, "laptop/1.0"));
    let first = laptop.login(request).await.unwrap().into_inner();
    let first = first.tokens.unwrap();
    let second = app.login(&user).await;
    let listed = list(&app, &second.access_token).await;
    let ids: Vec<&str> = listed.iter().map(|session| &*session.id).collect();
    assert_eq!(ids, [&*second.session_id, &*first.session_id]);
    assert_eq!([true, false], [listed[0].is_current, listed[1].is_current]);
    assert!(listed[1].user_agent.starts_with("laptop/1.0"));
    assert!(!listed[0].user_agent.starts_with("laptop"));
    for session in &listed {
        assert_eq!(session.address, "127.0.0.1");
        assert_eq!(session.last_used_at, session.created_at);
        assert_eq!(session.revoked_at, None);
    }
    assert_eq!(listed[0].expires_at, second.refresh_token_expires_at);
    let days =
        |session: &Session| session.ends_at.unwrap().seconds - session.created_at.unwrap().seconds;
    assert_eq!(days(&listed[0]), 30 * 24 * 3600);

    refreshed(&app, &first.refresh_token).await;
    let listed = list(&app, &second.access_token).await;
    let used = |session: &Session| {
        let time = session.last_used_at.unwrap();
        (time.seconds, time.nanos)
    };
    assert!(used(&listed[1]) > used(&listed[0]), "{listed:?}");
    assert_eq!(list(&app, &other.access_token).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_cannot_be_refreshed_are_not_listed() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let (lapsed, revoked) = (app.login(&user).await, app.login(&user).await);
    let current = app.login(&user).await;
    app.sql(&format!(
        "UPDATE sessions SET idle_expires_at = now() - interval '1 s' WHERE id = '{}'",
        lapsed.session_id
    ))
    .await;
    app.logout(&revoked.access_token).await;
    let listed = list(&app, &current.access_token).await;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].id, current.session_id);
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_come_in_pages() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let mut expected = Vec::new();
    let mut token = String::new();
    for _ in 0..5 {
        let tokens = app.login(&user).await;
        expected.insert(0, tokens.session_id);
        token = tokens.access_token;
    }
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListSessionsRequest {
            page_size: 2,
            page_token,
        };
        let page = app.auth(&token).list_sessions(request).await.unwrap();
        let page = page.into_inner();
        assert!(page.sessions.len() <= 2);
        found.extend(page.sessions.into_iter().map(|session| session.id));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(found, expected);

    let first = ListSessionsRequest {
        page_size: 2,
        page_token: String::new(),
    };
    let first = app.auth(&token).list_sessions(first).await.unwrap();
    let other = app.login(&app.user().create().await).await.access_token;
    let stolen = ListSessionsRequest {
        page_size: 2,
        page_token: first.into_inner().next_page_token,
    };
    let refused = app.auth(&other).list_sessions(stolen).await;
    assert_invalid(refused, &["page_token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_session_is_refused_on_every_replica_and_the_others_stay() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let (lost, mine) = (app.login(&user).await, app.login(&user).await);
    let key = &app.service_key;
    let asked = validate_through(&replica.channel(), key, &lost.access_token).await;
    asked.unwrap();
    let revoked = revoke(&app, &mine.access_token, &lost.session_id).await;
    let revoked = revoked.unwrap();
    assert_eq!(revoked.id, lost.session_id);
    assert!(revoked.revoked_at.is_some() && !revoked.is_current);
    assert_ended(&app, &lost.access_token).await;
    let refused = refresh(&app, &lost.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    eventually("the other replica refuses it", async || {
        let answer = validate_through(&replica.channel(), key, &lost.access_token).await;
        answer.is_err_and(|refused| reason(&refused) == "SESSION_ENDED")
    })
    .await;
    app.validate(&mine.access_token).await.unwrap();
    refreshed(&app, &mine.refresh_token).await;

    // Again: nothing changes, and nothing more is written.
    let again = revoke(&app, &mine.access_token, &lost.session_id).await;
    assert_eq!(again.unwrap(), revoked);
    let (events, details) = audited(&app, "session.ended", &lost.session_id).await;
    assert_eq!((events, &details["user_id"]), (1, &user.id.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_present_session_may_be_revoked_as_any_other() {
    let app = TestApp::spawn().await;
    let tokens = app.login(&app.user().create().await).await;
    let revoked = revoke(&app, &tokens.access_token, &tokens.session_id).await;
    assert!(revoked.unwrap().is_current);
    assert_ended(&app, &tokens.access_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_revokes_the_session_of_another() {
    let app = TestApp::spawn().await;
    let (mine, other) = (
        app.login(&app.user().create().await).await,
        app.login(&app.user().admin().create().await).await,
    );
    for (token, id) in [
        (&mine.access_token, &other.session_id),
        (&other.access_token, &mine.session_id),
        (&mine.access_token, &NOBODY.to_owned()),
    ] {
        let refused = revoke(&app, token, id).await;
        assert_refused(refused, Code::NotFound, "SESSION_NOT_FOUND");
    }
    app.validate(&other.access_token).await.unwrap();
    app.validate(&mine.access_token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn all_sessions_end_together_but_for_the_one_that_is_kept() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let bystander = app.login(&app.user().create().await).await;
    let api_key = app.api_key(&user, &[]).await;
    let others = [app.login(&user).await, app.login(&user).await];
    let mine = app.login(&user).await;
    let key = &app.service_key;
    for tokens in &others {
        let asked = validate_through(&replica.channel(), key, &tokens.access_token).await;
        asked.unwrap();
    }
    // One more: the session that made the key.
    assert_eq!(revoke_all(&app, &mine.access_token, true).await, 3);
    for tokens in &others {
        assert_ended(&app, &tokens.access_token).await;
        eventually("the other replica refuses it", async || {
            let answer = validate_through(&replica.channel(), key, &tokens.access_token).await;
            answer.is_err()
        })
        .await;
    }
    app.validate(&mine.access_token).await.unwrap();
    assert_eq!(revoke_all(&app, &mine.access_token, true).await, 0);
    let (events, details) = audited(&app, "user.sessions_ended", &user.id).await;
    assert_eq!(events, 1);
    assert_eq!(details["count"], 3);
    assert_eq!(details["kept"], serde_json::json!(mine.session_id));

    assert_eq!(revoke_all(&app, &mine.access_token, false).await, 1);
    assert_ended(&app, &mine.access_token).await;
    let again = app
        .auth(&mine.access_token)
        .revoke_all_sessions(RevokeAllSessionsRequest::default())
        .await;
    assert_refused(again, Code::Unauthenticated, "SESSION_ENDED");
    app.validate(&api_key.text).await.unwrap();
    app.validate(&bystander.access_token).await.unwrap();
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_that_races_the_end_of_all_sessions_does_not_survive_it() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for _ in 0..10 {
        let (tokens, mine) = (app.login(&user).await, app.login(&user).await);
        let (answer, other, _) = tokio::join!(
            refresh(&app, &tokens.refresh_token),
            revoke_all(&app, &mine.access_token, true),
            revoke_all(&app, &mine.access_token, true),
        );
        assert!(other <= 2);
        let newest = match answer {
            Ok(answer) => answer.tokens.unwrap(),
            refused => {
                assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
                tokens
            }
        };
        assert_ended(&app, &newest.access_token).await;
        let refused = refresh(&app, &newest.refresh_token).await;
        assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_key_and_a_program_have_no_sessions() {
    let app = TestApp::spawn().await;
    let key = app.api_key(&app.user().create().await, &[]).await.text;
    for (credential, code, why) in without_session(&app, &key) {
        let mut auth = app.auth(credential);
        let refused = auth.list_sessions(ListSessionsRequest::default()).await;
        assert_refused(refused, code, why);
        let refused = revoke(&app, credential, NOBODY).await;
        assert_refused(refused, code, why);
        let all = RevokeAllSessionsRequest::default();
        assert_refused(auth.revoke_all_sessions(all).await, code, why);
    }
}

async fn of_user(app: &TestApp, user: &TestUser) -> Vec<Session> {
    let request = ListUserSessionsRequest {
        user_id: user.id.clone(),
        ..ListUserSessionsRequest::default()
    };
    let answer = app
        .admin(&app.service_key)
        .list_user_sessions(request)
        .await;
    answer.expect("listed").into_inner().sessions
}

fn end(user_id: &str, session_id: &str) -> RevokeUserSessionsRequest {
    RevokeUserSessionsRequest {
        user_id: user_id.to_owned(),
        session_id: session_id.to_owned(),
        reason: "stolen laptop".to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_over_anyway_is_not_counted_as_ended() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    for column in ["absolute_expires_at", "idle_expires_at"] {
        let session_id = app.login(&user).await.session_id;
        app.sql(&format!(
            "UPDATE sessions SET {column} = now() - interval '1 second' WHERE id = '{session_id}'"
        ))
        .await;
        for session_id in ["", &session_id] {
            let mut admin = app.admin(&app.service_key);
            let answer = admin.revoke_user_sessions(end(&user.id, session_id)).await;
            assert_eq!(answer.unwrap().into_inner().revoked_count, 0, "{column}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_sees_and_ends_the_sessions_of_a_user() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let sessions = [
        app.login(&user).await,
        app.login(&user).await,
        app.login(&user).await,
    ];
    let listed = of_user(&app, &user).await;
    assert_eq!(listed.len(), 3);
    assert_eq!(listed[2].id, sessions[0].session_id);
    assert!(!listed.iter().any(|session| session.is_current));

    let mut admin = app.admin(&app.service_key);
    let one = end(&user.id, &sessions[1].session_id);
    for count in [1, 0] {
        let answer = admin.revoke_user_sessions(one.clone()).await.unwrap();
        assert_eq!(answer.into_inner().revoked_count, count);
    }
    assert_ended(&app, &sessions[1].access_token).await;
    app.validate(&sessions[0].access_token).await.unwrap();
    let (events, details) = audited(&app, "session.ended", &sessions[1].session_id).await;
    assert_eq!((events, &details["reason"]), (1, &"stolen laptop".into()));

    let answer = admin.revoke_user_sessions(end(&user.id, "")).await.unwrap();
    assert_eq!(answer.into_inner().revoked_count, 2);
    for tokens in &sessions {
        assert_ended(&app, &tokens.access_token).await;
    }
    assert_eq!(of_user(&app, &user).await, []);
    let (events, details) = audited(&app, "user.sessions_ended", &user.id).await;
    assert_eq!((events, &details["reason"]), (1, &"stolen laptop".into()));
    app.login(&user).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_is_told_of_an_unknown_user_or_session() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let other = app.login(&app.user().create().await).await;
    let mut admin = app.admin(&app.service_key);
    let list = ListUserSessionsRequest {
        user_id: NOBODY.to_owned(),
        ..ListUserSessionsRequest::default()
    };
    let refused = admin.list_user_sessions(list).await;
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
    for session_id in ["", NOBODY] {
        let refused = admin.revoke_user_sessions(end(NOBODY, session_id)).await;
        assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
    }
    for session_id in [NOBODY, &*other.session_id] {
        let refused = admin.revoke_user_sessions(end(&user.id, session_id)).await;
        assert_refused(refused, Code::NotFound, "SESSION_NOT_FOUND");
    }
    app.validate(&other.access_token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_user_does_not_end_the_sessions_of_others() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let token = app.login(&other).await.access_token;
    let mut admin = app.admin(&token);
    let refused = admin.revoke_user_sessions(end(&user.id, "")).await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
    let list = ListUserSessionsRequest {
        user_id: user.id,
        ..ListUserSessionsRequest::default()
    };
    let refused = admin.list_user_sessions(list).await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
    let mut auth = app.auth(&token);
    auth.get_current_user(GetCurrentUserRequest {})
        .await
        .unwrap();
}
