//! What is done to a second factor that is in force.

use tollkeeper::proto::tollkeeper::auth::v1::{
    DisableTotpRequest, GetCurrentUserRequest, RegenerateRecoveryCodesRequest,
};
use tonic::{Code, Status};

use super::{
    super::{assert_refused, without_session},
    WRONG_PASSWORD, audited, challenge, complete, enable_in, let_time_pass, login, login_with,
    user_with_mfa,
};
use crate::harness::{PASSWORD, TestApp};

pub(super) async fn disable(
    app: &TestApp,
    token: &str,
    password: &str,
    code: &str,
) -> Result<i32, Status> {
    let request = DisableTotpRequest {
        current_password: password.to_owned(),
        code: code.to_owned(),
        keep_other_sessions: false,
    };
    let answer = app.auth(token).disable_totp(request).await?;
    Ok(answer.into_inner().revoked_count)
}

async fn regenerate(
    app: &TestApp,
    token: &str,
    password: &str,
    code: &str,
) -> Result<Vec<String>, Status> {
    let request = RegenerateRecoveryCodesRequest {
        current_password: password.to_owned(),
        code: code.to_owned(),
    };
    let answer = app.auth(token).regenerate_recovery_codes(request).await?;
    Ok(answer.into_inner().recovery_codes)
}

#[tokio::test(flavor = "multi_thread")]
async fn disabling_asks_for_password_and_code_and_leaves_nothing() {
    let app = TestApp::spawn().await;
    for by_recovery_code in [false, true] {
        let (user, phone, token) = user_with_mfa(&app).await;
        let other = login_with(&app, &user, &phone.recovery_codes[1]).await;
        let other = other.unwrap().tokens.unwrap().access_token;
        let challenge = challenge(&app, &user).await.challenge;
        let code = match by_recovery_code {
            true => phone.recovery_codes[0].to_lowercase(),
            false => phone.code(),
        };
        let refused = disable(&app, &token, WRONG_PASSWORD, &code).await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
        let refused = disable(&app, &token, PASSWORD, &phone.wrong_code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
        let used = &phone.recovery_codes[1];
        let refused = disable(&app, &token, PASSWORD, used).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
        assert_eq!(disable(&app, &token, PASSWORD, &code).await.unwrap(), 1);

        app.validate(&token).await.unwrap();
        assert_refused(
            app.validate(&other).await,
            Code::Unauthenticated,
            "SESSION_ENDED",
        );
        let refused = complete(&app, &challenge, &phone.code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
        assert!(login(&app, &user, PASSWORD).await.unwrap().tokens.is_some());
        for table in ["totp_credentials", "recovery_codes"] {
            assert_eq!(app.count(&format!("SELECT count(*) FROM {table}")).await, 0);
        }
        let mut auth = app.auth(&token);
        let me = auth.get_current_user(GetCurrentUserRequest {});
        assert!(!me.await.unwrap().into_inner().user.unwrap().mfa_enabled);
        assert_eq!(audited(&app, &user, "mfa.disabled").await, 1);
        let refused = disable(&app, &token, PASSWORD, &code).await;
        assert_refused(refused, Code::FailedPrecondition, "MFA_NOT_ENABLED");
        // A challenge of one enrolment is not ended with another.
        enable_in(&app, &token).await;
        let refused = complete(&app, &challenge, &phone.code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
        app.sql("DELETE FROM users WHERE mfa_enabled").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_sessions_stay_if_asked_for() {
    let app = TestApp::spawn().await;
    let (user, phone, token) = user_with_mfa(&app).await;
    let other = login_with(&app, &user, &phone.recovery_codes[0]).await;
    let request = DisableTotpRequest {
        current_password: PASSWORD.to_owned(),
        code: phone.code(),
        keep_other_sessions: true,
    };
    let answer = app.auth(&token).disable_totp(request).await.unwrap();
    assert_eq!(answer.into_inner().revoked_count, 0);
    let other = other.unwrap().tokens.unwrap().access_token;
    app.validate(&other).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn new_recovery_codes_end_the_old_ones() {
    let app = TestApp::spawn().await;
    let (user, phone, token) = user_with_mfa(&app).await;
    let old = &phone.recovery_codes;
    let refused = regenerate(&app, &token, WRONG_PASSWORD, &phone.code()).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    let refused = regenerate(&app, &token, PASSWORD, &phone.wrong_code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    // One that was asked for later might be the next one.
    let code = phone.code();
    let new = regenerate(&app, &token, PASSWORD, &code).await.unwrap();
    // The code was used up with it.
    let refused = login_with(&app, &user, &code).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    let newest = regenerate(&app, &token, PASSWORD, &new[0]).await.unwrap();
    for code in [&old[0], &new[0], &new[1]] {
        let refused = login_with(&app, &user, code).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
    let done = login_with(&app, &user, &newest[9]).await.unwrap();
    assert_eq!(done.recovery_codes_left, 9);
    let action = "mfa.recovery_codes_regenerated";
    assert_eq!(audited(&app, &user, action).await, 2);
    app.validate(&token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_enabled_is_neither_disabled_nor_recovered() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for enrolled in [false, true] {
        if enrolled {
            super::enroll(&app, &token, PASSWORD).await.unwrap();
        }
        let refused = disable(&app, &token, PASSWORD, "123456").await;
        assert_refused(refused, Code::FailedPrecondition, "MFA_NOT_ENABLED");
        let refused = regenerate(&app, &token, PASSWORD, "123456").await;
        assert_refused(refused, Code::FailedPrecondition, "MFA_NOT_ENABLED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_people_with_a_session_change_it() {
    let app = TestApp::spawn().await;
    let key = app.api_key(&app.user().create().await, &[]).await.text;
    for (credential, code, reason) in without_session(&app, &key) {
        let refused = disable(&app, credential, PASSWORD, "123456").await;
        assert_refused(refused, code, reason);
        let refused = regenerate(&app, credential, PASSWORD, "123456").await;
        assert_refused(refused, code, reason);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_cannot_be_audited_uses_no_code_up() {
    let app = TestApp::spawn().await;
    let (user, phone, token) = user_with_mfa(&app).await;
    let code = phone.code();
    let challenge = challenge(&app, &user).await.challenge;
    app.sql("ALTER TABLE audit_events ADD CONSTRAINT full_trail CHECK (false) NOT VALID")
        .await;
    for outcome in [
        disable(&app, &token, PASSWORD, &code).await.map(drop),
        regenerate(&app, &token, PASSWORD, &code).await.map(drop),
        complete(&app, &challenge, &code).await.map(drop),
        complete(&app, &challenge, &phone.recovery_codes[0])
            .await
            .map(drop),
    ] {
        assert_refused(outcome, Code::Internal, "INTERNAL");
    }
    app.sql("ALTER TABLE audit_events DROP CONSTRAINT full_trail")
        .await;
    let done = complete(&app, &challenge, &code).await.unwrap();
    assert_eq!(done.recovery_codes_left, 10);
    let_time_pass(&app).await;
}
