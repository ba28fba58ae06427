//! Lists of users, their tier and their kill switch.

use tollkeeper::proto::tollkeeper::admin::v1::{
    DisableUserRequest, EnableUserRequest, ListServiceAccountsRequest, ListUsersRequest,
    ListUsersResponse, SetUserTierRequest,
};
use tonic::{Code, Status};

use super::{assert_invalid, assert_refused};
use crate::harness::{TestApp, TestUser};

const NOBODY: &str = "01890000-0000-7000-8000-000000000000";

async fn list(app: &TestApp, request: ListUsersRequest) -> Result<ListUsersResponse, Status> {
    let response = app.admin(&app.service_key).list_users(request).await?;
    Ok(response.into_inner())
}

/// The ids of all pages.
async fn walk(app: &TestApp, mut request: ListUsersRequest) -> Vec<String> {
    let mut ids = Vec::new();
    for _ in 0..20 {
        let page = list(app, request.clone()).await.unwrap();
        assert!(page.users.len() <= usize::try_from(request.page_size).unwrap());
        ids.extend(page.users.into_iter().map(|user| user.id));
        if page.next_page_token.is_empty() {
            return ids;
        }
        request.page_token = page.next_page_token;
    }
    panic!("the list does not end: {ids:?}");
}

/// Ids of the users that a test made, newest first.
fn newest_first(users: &[TestUser]) -> Vec<String> {
    users.iter().rev().map(|user| user.id.clone()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_user_is_listed_once_newest_first_over_pages() {
    let app = TestApp::spawn().await;
    let mut users = Vec::new();
    for _ in 0..7 {
        users.push(app.user().create().await);
    }
    for page_size in [1, 3, 4, 8, 100] {
        let ids = walk(
            &app,
            ListUsersRequest {
                page_size,
                ..Default::default()
            },
        )
        .await;
        assert_eq!(ids.len(), 8, "with the administrator of the test");
        assert_eq!(ids[..7], newest_first(&users));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_hold_on_every_page() {
    let app = TestApp::spawn().await;
    let (mut on, mut off) = (Vec::new(), Vec::new());
    for n in 0..9 {
        let tier = if n % 3 == 0 { "builder" } else { "starter" };
        let user = app.user().tier(tier).create().await;
        if n % 2 == 0 {
            app.disable(&user.id).await;
            off.push((tier, user));
        } else {
            on.push((tier, user));
        }
    }
    let of = |users: &[(&str, TestUser)], tier: &str| -> Vec<String> {
        let users = users.iter().rev().filter(|(of, _)| *of == tier);
        users.map(|(_, user)| user.id.clone()).collect()
    };
    for (tier, is_active, wanted) in [
        ("starter", Some(true), of(&on, "starter")),
        ("starter", Some(false), of(&off, "starter")),
        ("builder", Some(true), of(&on, "builder")),
        ("builder", Some(false), of(&off, "builder")),
        ("advanced", None, Vec::new()),
    ] {
        let request = ListUsersRequest {
            page_size: 2,
            tier: tier.to_owned(),
            is_active,
            ..Default::default()
        };
        assert_eq!(walk(&app, request).await, wanted, "{tier} {is_active:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_made_while_pages_are_read_moves_no_other() {
    let app = TestApp::spawn().await;
    let mut users = Vec::new();
    for _ in 0..3 {
        users.push(app.user().create().await);
    }
    let first = ListUsersRequest {
        page_size: 2,
        ..Default::default()
    };
    let page = list(&app, first.clone()).await.unwrap();
    app.user().create().await;
    let rest = ListUsersRequest {
        page_token: page.next_page_token,
        ..first
    };
    let rest = walk(&app, rest).await;
    assert_eq!(rest[0], users[0].id);
    assert_eq!(rest.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_token_of_another_list_is_refused() {
    let app = TestApp::spawn().await;
    for _ in 0..2 {
        app.user().create().await;
    }
    app.service("another", &["quota"]).await;
    let one = ListUsersRequest {
        page_size: 1,
        ..Default::default()
    };
    let users = list(&app, one.clone()).await.unwrap().next_page_token;
    let request = ListServiceAccountsRequest {
        page_size: 1,
        ..Default::default()
    };
    let services = app
        .admin(&app.service_key)
        .list_service_accounts(request)
        .await;
    let services = services.unwrap().into_inner().next_page_token;
    assert!(!users.is_empty() && !services.is_empty());
    for (page_token, tier, is_active) in [
        (&*users, "free", None),
        (&*users, "", Some(true)),
        (&*services, "", None),
        ("garbage", "", None),
        ("AAAAAAAAAAAAAAAAAAAAAAAAAAA", "", None),
        (&users[..users.len() - 2], "", None),
    ] {
        let request = ListUsersRequest {
            page_size: 1,
            page_token: page_token.to_owned(),
            tier: tier.to_owned(),
            is_active,
            ..ListUsersRequest::default()
        };
        assert_invalid(list(&app, request).await, &["page_token"]);
    }
    let request = ListServiceAccountsRequest {
        page_size: 1,
        page_token: users,
    };
    let refused = app
        .admin(&app.service_key)
        .list_service_accounts(request)
        .await;
    assert_invalid(refused, &["page_token"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn page_sizes_have_a_default_and_a_limit() {
    let app = TestApp::spawn().await;
    app.sql(
        "INSERT INTO users (id, email, username, tier) \
         SELECT gen_random_uuid(), n || '@example.com', 'bulk-' || n, 'free' \
         FROM generate_series(1, 1004) n",
    )
    .await;
    for (page_size, listed) in [(0, 50), (999, 999), (1000, 1000), (i32::MAX, 1000)] {
        let request = ListUsersRequest {
            page_size,
            ..Default::default()
        };
        let page = list(&app, request).await.unwrap();
        assert_eq!(page.users.len(), listed);
        assert!(!page.next_page_token.is_empty());
    }
    let negative = ListUsersRequest {
        page_size: -1,
        ..Default::default()
    };
    assert_invalid(list(&app, negative).await, &["page_size"]);
    let wrong = ListUsersRequest {
        page_size: i32::MIN,
        page_token: "!".to_owned(),
        tier: "No Tier".to_owned(),
        email_prefix: "two words".to_owned(),
        role: 9,
        ..ListUsersRequest::default()
    };
    assert_invalid(
        list(&app, wrong).await,
        &["tier", "email_prefix", "role", "page_size", "page_token"],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tier_updated_at_moves_only_when_the_tier_does() {
    let app = TestApp::spawn().await;
    let user = app.user().tier("free").create().await;
    let first = app.set_tier(&user.id, "free").await;
    assert_eq!(first.tier_updated_at, first.created_at);
    assert_eq!(first.updated_at, first.created_at);
    let second = app.set_tier(&user.id, "starter").await;
    assert_eq!(second.tier, "starter");
    assert_ne!(second.tier_updated_at, first.tier_updated_at);
    assert_eq!(second.updated_at, second.tier_updated_at);
    assert_eq!(app.set_tier(&user.id, "starter").await, second);
    let disabled = app.disable(&user.id).await;
    assert_eq!(disabled.tier_updated_at, second.tier_updated_at);
    assert_ne!(disabled.updated_at, second.updated_at);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_kill_switch_may_be_pressed_twice() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let enabled = app.enable(&user.id).await;
    assert!(enabled.is_active);
    assert_eq!(enabled.updated_at, enabled.created_at);
    let disabled = app.disable(&user.id).await;
    assert!(!disabled.is_active);
    assert_eq!(app.disable(&user.id).await, disabled);
    assert!(app.enable(&user.id).await.is_active);
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_moved_enabled_or_disabled_who_does_not_exist() {
    let app = TestApp::spawn().await;
    let user_id = NOBODY.to_owned();
    let mut admin = app.admin(&app.service_key);
    let tier = "starter".to_owned();
    let refused = admin
        .set_user_tier(SetUserTierRequest {
            user_id: user_id.clone(),
            tier,
        })
        .await;
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
    let refused = admin
        .enable_user(EnableUserRequest {
            user_id: user_id.clone(),
        })
        .await;
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
    let reason = String::new();
    let refused = admin
        .disable_user(DisableUserRequest { user_id, reason })
        .await;
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_of_a_change_are_named() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let mut admin = app.admin(&app.service_key);
    let nobody = || "nobody".to_owned();
    let wrong = SetUserTierRequest {
        user_id: nobody(),
        tier: "platinum".to_owned(),
    };
    assert_invalid(admin.set_user_tier(wrong).await, &["user_id", "tier"]);
    let empty = SetUserTierRequest {
        user_id: user.id,
        tier: String::new(),
    };
    assert_invalid(admin.set_user_tier(empty).await, &["tier"]);
    let wrong = EnableUserRequest { user_id: nobody() };
    assert_invalid(admin.enable_user(wrong).await, &["user_id"]);
    for reason in ["x".repeat(501), "\0".to_owned()] {
        let wrong = DisableUserRequest {
            user_id: nobody(),
            reason,
        };
        assert_invalid(admin.disable_user(wrong).await, &["user_id", "reason"]);
    }
}
