//! Who may ask as a gateway.

use tollkeeper::proto::envoy::service::{
    auth::v3::authorization_client::AuthorizationClient,
    ratelimit::v3::{RateLimitRequest, rate_limit_service_client::RateLimitServiceClient},
};
use tonic::Code;

use super::{asking, refused};
use crate::harness::{TestApp, reason, with_bearer};

#[tokio::test(flavor = "multi_thread")]
async fn without_a_key_a_gateway_on_the_same_machine_is_refused_unless_the_setting_says_so() {
    for trusts in [false, true] {
        let app = TestApp::spawn_with(|settings| settings.gateway.trust_loopback = trusts).await;
        let mut client = AuthorizationClient::new(app.channel.clone());
        let answer = client.check(asking(&[], &[])).await;
        let limits = RateLimitServiceClient::new(app.channel.clone())
            .should_rate_limit(RateLimitRequest::default())
            .await
            .unwrap_err();
        if trusts {
            assert_eq!(refused(answer.unwrap().into_inner()).0, 401);
            assert_eq!(limits.code(), Code::InvalidArgument);
        } else {
            assert_eq!(reason(&answer.unwrap_err()), "CREDENTIAL_MISSING");
            assert_eq!(reason(&limits), "CREDENTIAL_MISSING");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn trust_is_for_gateways_alone_and_a_key_that_is_shown_is_looked_at() {
    let app = TestApp::spawn_with(|settings| settings.gateway.trust_loopback = true).await;
    let validated = app.validate("garbage").await.unwrap_err();
    assert_eq!(reason(&validated), "CREDENTIAL_INVALID");
    let mut usage = app.usage("");
    let quota =
        usage.check_quota(tollkeeper::proto::tollkeeper::usage::v1::CheckQuotaRequest::default());
    assert_eq!(reason(&quota.await.unwrap_err()), "CREDENTIAL_MISSING");
    let (_, other) = app.service("other", &["tokens.validate", "quota"]).await;
    for (key, why) in [("garbage", "CREDENTIAL_INVALID"), (&other, "SCOPE_MISSING")] {
        let mut client = AuthorizationClient::new(app.channel.clone());
        let answer = client.check(with_bearer(asking(&[], &[]), key)).await;
        assert_eq!(reason(&answer.unwrap_err()), why);
    }
}
