use tollkeeper::proto::tollkeeper::auth::v1::{GetCurrentUserRequest, LogoutRequest};
use tonic::Code;

use super::{assert_refused, credential, refresh, refreshed};
use crate::harness::TestApp;

#[tokio::test(flavor = "multi_thread")]
async fn a_user_sees_their_own_account_as_it_is_now() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.user().create().await;
    let tokens = app.login(&user).await;
    app.set_tier(&user.id, "starter").await;
    let me = app
        .auth(&tokens.access_token)
        .get_current_user(GetCurrentUserRequest {})
        .await
        .unwrap();
    let me = me.into_inner().user.unwrap();
    assert_eq!((me.id, &*me.tier), (user.id, "starter"));
    assert!(me.last_login_at.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_user_is_refused_everywhere_until_enabled() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    let mut client = app.auth(&tokens.access_token);
    app.disable(&user.id).await;
    let refused = client.get_current_user(GetCurrentUserRequest {}).await;
    let refused = assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
    assert_eq!(credential(&refused), "authorization");
    let refused = client.logout(LogoutRequest {}).await;
    assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
    app.enable(&user.id).await;
    client
        .get_current_user(GetCurrentUserRequest {})
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn logout_ends_both_tokens_of_the_session() {
    let app = TestApp::spawn().await;
    let tokens = app.login(&app.user().create().await).await;
    app.logout(&tokens.access_token).await;
    let refused = app.validate(&tokens.access_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    let refused = refresh(&app, &tokens.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_logout_says_that_the_session_has_ended() {
    let app = TestApp::spawn().await;
    let tokens = app.login(&app.user().create().await).await;
    app.logout(&tokens.access_token).await;
    let again = app
        .auth(&tokens.access_token)
        .logout(LogoutRequest {})
        .await;
    let refused = assert_refused(again, Code::Unauthenticated, "SESSION_ENDED");
    assert_eq!(credential(&refused), "authorization");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_with_an_older_access_token_ends_the_refreshed_session_too() {
    let app = TestApp::spawn().await;
    let tokens = app.login(&app.user().create().await).await;
    let next = refreshed(&app, &tokens.refresh_token).await;
    app.logout(&tokens.access_token).await;
    app.validate(&next.access_token).await.unwrap_err();
    refresh(&app, &next.refresh_token).await.unwrap_err();
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_and_strangers_have_no_account_to_see() {
    let app = TestApp::spawn().await;
    for (key, code, reason) in [
        ("", Code::Unauthenticated, "CREDENTIAL_MISSING"),
        ("garbage", Code::Unauthenticated, "CREDENTIAL_INVALID"),
        (
            &app.service_key,
            Code::PermissionDenied,
            "CALLER_NOT_ALLOWED",
        ),
    ] {
        let refused = app
            .auth(key)
            .get_current_user(GetCurrentUserRequest {})
            .await;
        assert_refused(refused, code, reason);
        let refused = app.auth(key).logout(LogoutRequest {}).await;
        assert_refused(refused, code, reason);
    }
}
