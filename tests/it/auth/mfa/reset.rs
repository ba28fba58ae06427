//! Users who have lost both, and the end of users.

use tollkeeper::proto::tollkeeper::admin::v1::{
    DeleteUserRequest, ResetUserMfaRequest, ResetUserMfaResponse,
};
use tonic::{Code, Status};

use super::{
    super::assert_refused, audited, challenge, complete, enable_in, enroll, login, login_with,
    user_with_mfa,
};
use crate::harness::{PASSWORD, TestApp};

async fn reset(
    app: &TestApp,
    credential: &str,
    user_id: &str,
) -> Result<ResetUserMfaResponse, Status> {
    let request = ResetUserMfaRequest {
        user_id: user_id.to_owned(),
        reason: "lost the phone".to_owned(),
    };
    let answer = app.admin(credential).reset_user_mfa(request).await?;
    Ok(answer.into_inner())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_lets_a_user_in_who_has_lost_both() {
    let app = TestApp::spawn().await;
    let (user, phone, token) = user_with_mfa(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    for _ in 0..6 {
        let _ = login_with(&app, &user, &phone.wrong_code()).await;
    }
    let done = reset(&app, &app.service_key, &user.id).await.unwrap();
    assert!(done.was_enabled && !done.revision.is_empty());
    assert_eq!(done.revoked_count, 1);
    assert!(!done.user.unwrap().mfa_enabled);
    assert_refused(
        app.validate(&token).await,
        Code::Unauthenticated,
        "SESSION_ENDED",
    );
    let refused = complete(&app, &challenge, &phone.code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
    assert_eq!(app.count("SELECT count(*) FROM login_throttle").await, 0);
    let reason = format!(
        "SELECT count(*) FROM audit_events WHERE action = 'mfa.reset' AND user_id = '{}' \
         AND details ->> 'reason' = 'lost the phone'",
        user.id
    );
    assert_eq!(app.count(&reason).await, 1);

    let token = login(&app, &user, PASSWORD).await.unwrap().tokens.unwrap();
    // Again: nothing more.
    let again = reset(&app, &app.service_key, &user.id).await.unwrap();
    assert!(!again.was_enabled && again.revoked_count == 0);
    app.validate(&token.access_token).await.unwrap();
    assert_eq!(app.count(&reason).await, 1);
    let phone = enable_in(&app, &token.access_token).await;
    login_with(&app, &user, &phone.code()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_resets_their_own_and_nobody_but_administrators_another() {
    let app = TestApp::spawn().await;
    let token = app.admin_token().await;
    let admin = app
        .sql("SELECT id::text FROM users WHERE role = 'admin'")
        .await;
    enable_in(&app, &token).await;
    let refused = reset(&app, &token, admin[0].get(0)).await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
    let (user, _, own) = user_with_mfa(&app).await;
    let refused = reset(&app, &own, &user.id).await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
    reset(&app, &token, &user.id).await.unwrap();
    let nobody = "01890a5d-ac96-774b-bcce-b302099a8057";
    let refused = reset(&app, &token, nobody).await;
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_forgets_what_was_enrolled_and_not_confirmed() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    enroll(&app, &token, PASSWORD).await.unwrap();
    let done = reset(&app, &app.service_key, &user.id).await.unwrap();
    assert!(!done.was_enabled);
    let rows = app.count("SELECT count(*) FROM totp_credentials").await;
    assert_eq!(rows, 0);
    app.validate(&token).await.unwrap();
    assert_eq!(audited(&app, &user, "mfa.reset").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_deleted_user_no_secret_stays() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let (_other, ..) = user_with_mfa(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    let _ = complete(&app, &challenge, &phone.wrong_code()).await;
    let request = DeleteUserRequest {
        user_id: user.id.clone(),
        reason: String::new(),
    };
    app.admin(&app.service_key)
        .delete_user(request)
        .await
        .unwrap();
    for (table, left) in [
        ("totp_credentials", 1),
        ("recovery_codes", 10),
        ("login_throttle", 0),
    ] {
        let rows = app.count(&format!("SELECT count(*) FROM {table}")).await;
        assert_eq!(rows, left, "{table}");
    }
    let refused = complete(&app, &challenge, &phone.code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
}
