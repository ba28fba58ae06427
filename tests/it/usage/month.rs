use tollkeeper::proto::tollkeeper::usage::v1::{GetMonthlyUsageRequest, UsageTotals};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use uuid::Uuid;

use super::event;
use crate::harness::{TestApp, reason};

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_names_nobody_reads_their_own_month() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    app.record(&event(&user.id)).await.unwrap();
    for _ in 0..2 {
        app.record(&event(&other.id)).await.unwrap();
    }
    let token = app.login(&user).await.access_token;
    let own = read(&app, &token, "").await.unwrap();
    assert_eq!(own.request_count, 1);
    let named = read(&app, &token, &user.id).await.unwrap();
    assert_eq!(named, own);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_may_not_read_the_month_of_another() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let token = app.login(&user).await.access_token;
    // Whether the other exists is not told either.
    for named in [other.id, Uuid::now_v7().to_string()] {
        let refused = read(&app, &token, &named).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert_eq!(reason(&refused), "CALLER_NOT_ALLOWED");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_reads_the_month_of_anybody() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.record(&event(&user.id)).await.unwrap();
    let token = app.admin_token().await;
    let totals = read(&app, &token, &user.id).await.unwrap();
    assert_eq!(totals.request_count, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_has_to_name_a_user() {
    let app = TestApp::spawn().await;
    let refused = read(&app, &app.service_key, "").await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let fields = refused.get_details_bad_request().unwrap().field_violations;
    assert_eq!(fields[0].field, "user_id");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_month_of_an_unknown_user_is_not_found() {
    let app = TestApp::spawn().await;
    let unknown = Uuid::now_v7().to_string();
    let refused = read(&app, &app.service_key, &unknown).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
    assert_eq!(reason(&refused), "USER_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_month_without_usage_is_all_zeroes() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let month = app.month(&user.id, "2001-02").await;
    assert_eq!((&*month.user_id, &*month.month), (&*user.id, "2001-02"));
    assert_eq!(month.models, []);
    let totals = month.totals.unwrap();
    assert_eq!(totals.tokens, Some(Default::default()));
    assert_eq!((totals.total_tokens, totals.request_count), (0, 0));
}

async fn read(app: &TestApp, credential: &str, user_id: &str) -> Result<UsageTotals, Status> {
    let request = GetMonthlyUsageRequest {
        user_id: user_id.to_owned(),
        month: String::new(),
    };
    let month = app.usage(credential).get_monthly_usage(request).await?;
    Ok(month.into_inner().totals.expect("totals"))
}
