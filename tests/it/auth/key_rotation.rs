use futures_util::future::join_all;
use prost_types::Duration as Overlap;
use tollkeeper::proto::tollkeeper::admin::v1::{
    DisableServiceAccountRequest, ListUsersRequest, RotateServiceKeyRequest,
    RotateServiceKeyResponse,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::assert_refused;
use crate::harness::{TestApp, eventually, reason, validate_through};

const DAY: i64 = 24 * 60 * 60;

async fn rotate(
    app: &TestApp,
    id: &str,
    overlap_secs: Option<i64>,
) -> Result<RotateServiceKeyResponse, Status> {
    let request = RotateServiceKeyRequest {
        service_account_id: id.to_owned(),
        overlap: overlap_secs.map(|seconds| Overlap { seconds, nanos: 0 }),
    };
    let answer = app
        .admin(&app.service_key)
        .rotate_service_key(request)
        .await?;
    Ok(answer.into_inner())
}

/// Seconds that each live key of an account has left, oldest key first.
async fn left(app: &TestApp, id: &str) -> Vec<Option<i64>> {
    let statement = format!(
        "SELECT round(extract(epoch FROM expires_at - now()))::bigint FROM service_keys
         WHERE service_account_id = '{id}' AND revoked_at IS NULL
             AND (expires_at IS NULL OR expires_at > now()) ORDER BY created_at"
    );
    let rows = app.sql(&statement).await;
    rows.iter().map(|row| row.get(0)).collect()
}

fn about(got: Option<i64>, wanted: i64) {
    let got = got.expect("it expires");
    assert!((wanted - 20..=wanted).contains(&got), "{got} of {wanted}");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_and_new_keys_work_for_a_day() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (id, old) = app.service("gateway", &["tokens.validate"]).await;
    let rotated = rotate(&app, &id, None).await.unwrap();
    assert_eq!(rotated.service_account.unwrap().id, id);
    assert!(rotated.key.starts_with("tks_") && rotated.key != old);
    let ends = rotated.old_keys_end_at.unwrap().seconds - chrono::Utc::now().timestamp();
    about(Some(ends), DAY);
    let left = left(&app, &id).await;
    about(left[0], DAY);
    assert_eq!(left[1..], [None]);
    for key in [&old, &rotated.key] {
        validate_through(&app.channel, key, &token).await.unwrap();
    }
    let hashes = app
        .sql("SELECT row_to_json(e)::text FROM audit_events e")
        .await;
    assert!(
        hashes
            .iter()
            .all(|row| !row.get::<_, &str>(0).contains(&rotated.key[4..]))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_overlap_ends_only_the_new_key_works_on_every_replica() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (id, old) = app.service("gateway", &["tokens.validate"]).await;
    let channels = [app.channel.clone(), replica.channel()];
    for channel in &channels {
        validate_through(channel, &old, &token).await.unwrap();
    }
    let new = rotate(&app, &id, Some(2)).await.unwrap().key;
    for channel in &channels {
        validate_through(channel, &old, &token).await.unwrap();
        validate_through(channel, &new, &token).await.unwrap();
    }
    for channel in &channels {
        eventually("the old key ends", async || {
            let answer = validate_through(channel, &old, &token).await;
            answer.is_err_and(|refused| reason(&refused) == "CREDENTIAL_EXPIRED")
        })
        .await;
        validate_through(channel, &new, &token).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_overlap_the_old_keys_end_at_once() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (id, first) = app.service("gateway", &["tokens.validate"]).await;
    let second = rotate(&app, &id, None).await.unwrap().key;
    for key in [&first, &second] {
        validate_through(&replica.channel(), key, &token)
            .await
            .unwrap();
    }
    let third = rotate(&app, &id, Some(0)).await.unwrap().key;
    for key in [&first, &second] {
        let refused = validate_through(&app.channel, key, &token).await;
        assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
        eventually("the replica hears of it", async || {
            let answer = validate_through(&replica.channel(), key, &token).await;
            answer.is_err()
        })
        .await;
    }
    validate_through(&app.channel, &third, &token)
        .await
        .unwrap();
    assert_eq!(left(&app, &id).await, [None]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rotating_again_prolongs_no_old_key() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (id, _) = app.service("gateway", &["tokens.validate"]).await;
    // As after an answer that was lost.
    let lost = rotate(&app, &id, Some(3600)).await.unwrap().key;
    let kept = rotate(&app, &id, Some(DAY)).await.unwrap().key;
    let left = left(&app, &id).await;
    about(left[0], 3600);
    about(left[1], DAY);
    assert_eq!(left[2..], [None]);
    for key in [&lost, &kept] {
        validate_through(&app.channel, key, &token).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_rotations_leave_ten_live_keys_and_one_without_overlap_a_single_one() {
    let app = TestApp::spawn().await;
    let (id, _) = app.service("gateway", &["quota"]).await;
    let outcomes = join_all((0..20).map(|_| rotate(&app, &id, None))).await;
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (9, 11), "one was there before");
    for refused in refused {
        let refused = assert_refused(refused, Code::FailedPrecondition, "TOO_MANY_KEYS");
        let info = refused.get_details_error_info().unwrap();
        assert_eq!(info.metadata["limit"], "10");
    }
    let left_with_overlap = left(&app, &id).await;
    assert_eq!(left_with_overlap.len(), 10);
    let unlimited = left_with_overlap.iter().filter(|left| left.is_none());
    assert_eq!(unlimited.count(), 1, "the newest");
    rotate(&app, &id, Some(0)).await.unwrap();
    assert_eq!(left(&app, &id).await, [None]);
    rotate(&app, &id, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_may_rotate_its_own_key() {
    let app = TestApp::spawn().await;
    let (id, old) = app.service("operator", &["admin"]).await;
    let request = RotateServiceKeyRequest {
        service_account_id: id,
        overlap: Some(Overlap::default()),
    };
    let rotated = app.admin(&old).rotate_service_key(request).await;
    let new = rotated.unwrap().into_inner().key;
    let list = ListUsersRequest::default;
    app.admin(&new).list_users(list()).await.unwrap();
    let refused = app.admin(&old).list_users(list()).await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_is_off_or_does_not_exist_gets_no_key() {
    let app = TestApp::spawn().await;
    let (service_account_id, _) = app.service("gateway", &["quota"]).await;
    let off = DisableServiceAccountRequest { service_account_id };
    let mut admin = app.admin(&app.service_key);
    admin.disable_service_account(off.clone()).await.unwrap();
    let refused = rotate(&app, &off.service_account_id, None).await;
    assert_refused(refused, Code::PermissionDenied, "ACCOUNT_DISABLED");
    let user = app.user().create().await;
    for id in ["01890000-0000-7000-8000-000000000000", &user.id] {
        let refused = rotate(&app, id, None).await;
        assert_refused(refused, Code::NotFound, "SERVICE_ACCOUNT_NOT_FOUND");
    }
    let keys = app.count("SELECT count(*) FROM service_keys").await;
    assert_eq!(keys, 2, "the gateway's first and the test's own");
}
