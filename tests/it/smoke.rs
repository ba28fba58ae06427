use tollkeeper::proto::tollkeeper::auth::v1::{GetCurrentUserRequest, ValidateTokenRequest};

use crate::harness::TestApp;

#[tokio::test(flavor = "multi_thread")]
async fn a_logged_in_user_is_known_to_services() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let tokens = app.login(&user).await;
    let me = app
        .auth(&tokens.access_token)
        .get_current_user(GetCurrentUserRequest {})
        .await;
    assert_eq!(me.unwrap().into_inner().user.unwrap().email, user.email);
    let request = ValidateTokenRequest {
        token: tokens.access_token,
        include_quota: true,
    };
    let valid = app
        .auth(&app.service_key)
        .validate_token(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(valid.user_id, user.id);
    assert_eq!(valid.quota.unwrap().remaining_tokens, 100_000);
    app.stop().await.unwrap();
}
