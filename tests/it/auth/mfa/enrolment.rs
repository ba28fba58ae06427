use tollkeeper::proto::tollkeeper::{
    admin::v1::{GetUserRequest, ListUsersRequest},
    auth::v1::{ConfirmTotpRequest, EnrollTotpRequest, GetCurrentUserRequest},
};
use tonic::Code;

use super::{
    super::{assert_refused, without_session},
    Authenticator, WRONG_PASSWORD, audited, challenge, confirm, enable_in, enroll, let_time_pass,
    login, user_with_mfa,
};
use crate::harness::{PASSWORD, TestApp};

#[tokio::test(flavor = "multi_thread")]
async fn a_second_factor_counts_once_a_code_of_it_was_given() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
    let phone = Authenticator::enrolled(&enrolled.secret);
    assert_eq!(phone.secret.len(), 20, "160 bits");
    let me = async || {
        let mut auth = app.auth(&token);
        let me = auth.get_current_user(GetCurrentUserRequest {});
        me.await.unwrap().into_inner().user.unwrap()
    };
    assert!(!me().await.mfa_enabled);
    assert!(login(&app, &user, PASSWORD).await.unwrap().tokens.is_some());

    let refused = confirm(&app, &token, &phone.wrong_code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    assert!(login(&app, &user, PASSWORD).await.unwrap().tokens.is_some());

    let confirmed = confirm(&app, &token, &phone.code()).await.unwrap();
    assert_eq!(confirmed.recovery_codes.len(), 10);
    assert!(!confirmed.revision.is_empty());
    assert!(me().await.mfa_enabled);
    challenge(&app, &user).await;
    for (action, times) in [
        ("mfa.enrolled", 1),
        ("mfa.enabled", 1),
        ("mfa.code_refused", 1),
    ] {
        assert_eq!(audited(&app, &user, action).await, times, "{action}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_see_who_has_a_second_factor() {
    let app = TestApp::spawn().await;
    let (user, ..) = user_with_mfa(&app).await;
    let other = app.user().create().await;
    let mut admin = app.admin(&app.service_key);
    for (id, enabled) in [(&user.id, true), (&other.id, false)] {
        let user_id = id.clone();
        let got = admin.get_user(GetUserRequest { user_id }).await.unwrap();
        assert_eq!(got.into_inner().user.unwrap().mfa_enabled, enabled);
    }
    let listed = admin.list_users(ListUsersRequest::default()).await.unwrap();
    let listed = listed.into_inner().users;
    let enabled = listed.iter().filter(|user| user.mfa_enabled);
    assert!(enabled.map(|user| &user.id).eq([&user.id]));
}

#[tokio::test(flavor = "multi_thread")]
async fn enrolling_asks_for_the_password() {
    let app = TestApp::spawn_with(|settings| settings.throttle.account_failures = 2).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for _ in 0..3 {
        let refused = enroll(&app, &token, WRONG_PASSWORD).await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    }
    let refused = enroll(&app, &token, PASSWORD).await;
    assert_refused(refused, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    let rows = app.count("SELECT count(*) FROM totp_credentials").await;
    assert_eq!(rows, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn enrolling_again_replaces_what_was_not_confirmed() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let mut phones = Vec::new();
    for _ in 0..2 {
        let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
        phones.push(Authenticator::enrolled(&enrolled.secret));
    }
    assert_ne!(phones[0].secret, phones[1].secret);
    let refused = confirm(&app, &token, &phones[0].code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    confirm(&app, &token, &phones[1].code()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_enabled_is_neither_enrolled_nor_confirmed_again() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let refused = confirm(&app, &token, "123456").await;
    assert_refused(refused, Code::FailedPrecondition, "MFA_NOT_ENABLED");
    let phone = enable_in(&app, &token).await;
    let refused = enroll(&app, &token, PASSWORD).await;
    assert_refused(refused, Code::FailedPrecondition, "MFA_ALREADY_ENABLED");
    let refused = confirm(&app, &token, &phone.code()).await;
    assert_refused(refused, Code::FailedPrecondition, "MFA_ALREADY_ENABLED");
}

#[tokio::test(flavor = "multi_thread")]
async fn enabling_ends_the_other_sessions_unless_told_otherwise() {
    let app = TestApp::spawn().await;
    for keep_other_sessions in [false, true] {
        let user = app.user().create().await;
        let (own, other) = (app.login(&user).await, app.login(&user).await);
        let token = &own.access_token;
        let enrolled = enroll(&app, token, PASSWORD).await.unwrap();
        let request = ConfirmTotpRequest {
            code: Authenticator::enrolled(&enrolled.secret).code(),
            keep_other_sessions,
        };
        let confirmed = app.auth(token).confirm_totp(request).await.unwrap();
        let ended = i32::from(!keep_other_sessions);
        assert_eq!(confirmed.into_inner().revoked_count, ended);
        app.validate(token).await.unwrap();
        let validated = app.validate(&other.access_token).await;
        assert_eq!(validated.is_ok(), keep_other_sessions);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_code_that_confirmed_opens_no_session() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
    let phone = Authenticator::enrolled(&enrolled.secret);
    let code = phone.code();
    confirm(&app, &token, &code).await.unwrap();
    let refused = super::login_with(&app, &user, &code).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    let_time_pass(&app).await;
    super::login_with(&app, &user, &phone.code()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn only_people_with_a_session_have_a_second_factor() {
    let app = TestApp::spawn().await;
    let key = app.api_key(&app.user().create().await, &[]).await.text;
    for (credential, code, reason) in without_session(&app, &key) {
        let enroll = EnrollTotpRequest {
            current_password: PASSWORD.to_owned(),
        };
        let refused = app.auth(credential).enroll_totp(enroll).await;
        assert_refused(refused, code, reason);
        let confirm = ConfirmTotpRequest {
            code: "123456".to_owned(),
            keep_other_sessions: false,
        };
        let refused = app.auth(credential).confirm_totp(confirm).await;
        assert_refused(refused, code, reason);
    }
}
