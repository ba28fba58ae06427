//! What administrators change of accounts: profile and role, deletion; and how they find users.

use prost_types::FieldMask;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{DeleteUserRequest, GetUserRequest, ListUsersRequest, UpdateUserRequest},
    auth::v1::{RegisterRequest, Role, User},
};
use tonic::{Code, Status};

use super::{assert_invalid, assert_refused, refresh};
use crate::{
    harness::{PASSWORD, TestApp, TestUser, eventually, reason, validate_through},
    usage::event,
};

const NOBODY: &str = "01890a5d-ac96-774b-bcce-b302099a8057";

async fn update(app: &TestApp, user: User, paths: &[&str]) -> Result<User, Status> {
    let paths = paths.iter().map(|&path| path.to_owned()).collect();
    let request = UpdateUserRequest {
        user: Some(user),
        update_mask: Some(FieldMask { paths }),
    };
    let answer = app.admin(&app.service_key).update_user(request).await?;
    Ok(answer.into_inner().user.expect("a user"))
}

fn blank(user: &TestUser) -> User {
    User {
        id: user.id.clone(),
        ..User::default()
    }
}

async fn delete(app: &TestApp, id: &str) -> Result<(), Status> {
    let request = DeleteUserRequest {
        user_id: id.to_owned(),
        reason: "asked for".to_owned(),
    };
    let answer = app.admin(&app.service_key).delete_user(request).await?;
    assert!(!answer.into_inner().revision.is_empty());
    Ok(())
}

async fn list(app: &TestApp, request: ListUsersRequest) -> Vec<String> {
    let answer = app.admin(&app.service_key).list_users(request).await;
    let users = answer.expect("listed").into_inner().users;
    users.into_iter().map(|user| user.username).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrator_changes_what_the_mask_names() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let prove = format!(
        "UPDATE users SET email_verified_at = now() WHERE id = '{}'",
        user.id
    );
    app.sql(&prove).await;
    let wanted = User {
        email: "Countess@example.com".to_owned(),
        username: "countess".to_owned(),
        full_name: "Ada Lovelace".to_owned(),
        role: Role::Admin.into(),
        tier: "advanced".to_owned(),
        is_active: false,
        ..blank(&user)
    };
    let after = update(&app, wanted.clone(), &["full_name"]).await.unwrap();
    assert_eq!(after.full_name, "Ada Lovelace");
    assert_eq!(
        (&after.email, &after.username),
        (&user.email, &user.username)
    );
    assert!(after.email_verified_at.is_some());

    let after = update(&app, wanted.clone(), &["*"]).await.unwrap();
    assert_eq!(
        (&*after.email, &*after.username, after.role()),
        ("Countess@example.com", "countess", Role::Admin)
    );
    assert_eq!((&*after.tier, after.is_active), ("free", true));
    assert_eq!(after.email_verified_at, None, "nobody has proven this one");
    assert_eq!(update(&app, wanted, &["*"]).await.unwrap(), after);
    app.login_as("countess@EXAMPLE.com", PASSWORD)
        .await
        .unwrap();

    // Another case is the same address.
    app.sql(&prove).await;
    let same = User {
        email: "countess@example.com".to_owned(),
        ..blank(&user)
    };
    let after = update(&app, same, &[]).await.unwrap();
    assert_eq!(after.email, "countess@example.com");
    assert!(after.email_verified_at.is_some());

    let rows = app
        .sql(
            "SELECT action, details::text FROM audit_events WHERE user_id IS NOT NULL \
              AND action IN ('user.updated', 'user.role_set') ORDER BY id",
        )
        .await;
    let written: Vec<(&str, &str)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(
        written,
        [
            ("user.updated", r#"{"fields": ["full_name"]}"#),
            ("user.updated", r#"{"fields": ["email", "username"]}"#),
            ("user.role_set", r#"{"role": "admin"}"#),
            ("user.updated", r#"{"fields": ["email"]}"#),
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_is_taken_back_at_once_on_every_replica() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().admin().create().await;
    let token = app.login(&user).await.access_token;
    let users = ListUsersRequest::default();
    app.admin(&token).list_users(users.clone()).await.unwrap();
    let asked = validate_through(&replica.channel(), &app.service_key, &token).await;
    assert_eq!(asked.unwrap().role(), Role::Admin);
    let plain = User {
        role: Role::User.into(),
        ..blank(&user)
    };
    update(&app, plain, &["role"]).await.unwrap();
    let refused = app.admin(&token).list_users(users).await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
    eventually("the other replica knows", async || {
        let asked = validate_through(&replica.channel(), &app.service_key, &token).await;
        asked.unwrap().role() == Role::User
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_of_nobody_or_to_a_name_that_is_taken_is_refused() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let nobody = User {
        id: NOBODY.to_owned(),
        full_name: "Nobody".to_owned(),
        ..User::default()
    };
    assert_refused(
        update(&app, nobody, &[]).await,
        Code::NotFound,
        "USER_NOT_FOUND",
    );
    for wanted in [
        User {
            email: other.email.to_uppercase(),
            ..blank(&user)
        },
        User {
            username: other.username.to_uppercase(),
            ..blank(&user)
        },
    ] {
        let refused = update(&app, wanted, &[]).await;
        assert_refused(refused, Code::AlreadyExists, "ACCOUNT_EXISTS");
    }
    let wrong = User {
        id: "nobody".to_owned(),
        role: 7,
        ..User::default()
    };
    assert_invalid(
        update(&app, wrong, &["role"]).await,
        &["user.id", "user.role"],
    );
    let refused = update(&app, blank(&user), &["tier"]).await;
    assert_invalid(refused, &["update_mask"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_user_is_gone_everywhere_and_the_names_are_free() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let user = app.user().username("countess").create().await;
    let tokens = app.login(&user).await;
    let api_key = app.api_key(&user, &[]).await.text;
    let key = &app.service_key;
    for credential in [&tokens.access_token, &api_key] {
        let asked = validate_through(&replica.channel(), key, credential).await;
        asked.unwrap();
    }
    delete(&app, &user.id).await.unwrap();
    let gone = [
        (&tokens.access_token, "SESSION_ENDED"),
        (&api_key, "CREDENTIAL_INVALID"),
    ];
    for (credential, why) in gone {
        let refused = app.validate(credential).await;
        assert_refused(refused, Code::Unauthenticated, why);
        eventually("the other replica refuses it", async || {
            let asked = validate_through(&replica.channel(), key, credential).await;
            asked.is_err_and(|refused| reason(&refused) == why)
        })
        .await;
    }
    let refused = refresh(&app, &tokens.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    let refused = app.login_as(&user.email, PASSWORD).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    let get = GetUserRequest {
        user_id: user.id.clone(),
    };
    let refused = app.admin(key).get_user(get).await;
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
    let refused = app.record(&event(&user.id)).await;
    assert_refused(refused, Code::NotFound, "USER_NOT_FOUND");
    let again = delete(&app, &user.id).await;
    assert_refused(again, Code::NotFound, "USER_NOT_FOUND");

    let request = RegisterRequest {
        email: user.email.clone(),
        username: user.username.clone(),
        full_name: String::new(),
        password: PASSWORD.to_owned(),
    };
    let anew = app.auth("").register(request).await.unwrap().into_inner();
    assert_ne!(anew.user.unwrap().id, user.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_found_by_how_their_names_begin() {
    let app = TestApp::spawn().await;
    for (email, username) in [
        ("Ada@example.com", "a_da"),
        ("adam@example.com", "Adam"),
        ("bea@example.com", "adab"),
        ("a.da@example.com", "axda"),
    ] {
        app.user().email(email).username(username).create().await;
    }
    let by_email = async |prefix: &str| {
        let request = ListUsersRequest {
            email_prefix: prefix.to_owned(),
            ..ListUsersRequest::default()
        };
        list(&app, request).await
    };
    let by_username = async |prefix: &str| {
        let request = ListUsersRequest {
            username_prefix: prefix.to_owned(),
            ..ListUsersRequest::default()
        };
        list(&app, request).await
    };
    assert_eq!(by_email("ADA").await, ["Adam", "a_da"]);
    assert_eq!(by_email("ada@").await, ["a_da"]);
    assert_eq!(by_email("a.d").await, ["axda"]);
    assert_eq!(by_email("adam@example.com").await, ["Adam"]);
    assert_eq!(by_email("a%").await, [] as [&str; 0]);
    assert_eq!(by_email("~").await, [] as [&str; 0]);
    assert_eq!(by_username("ada").await, ["adab", "Adam"]);
    // No wildcard.
    assert_eq!(by_username("a_").await, ["a_da"]);
    let both = ListUsersRequest {
        email_prefix: "ada".to_owned(),
        username_prefix: "ada".to_owned(),
        ..ListUsersRequest::default()
    };
    assert_eq!(list(&app, both).await, ["Adam"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn filters_go_together_and_hold_on_every_page() {
    let app = TestApp::spawn().await;
    let mut expected = Vec::new();
    for n in 0..9 {
        let name = format!("bulk-{n}");
        let user = app.user().username(&name).tier("starter").create().await;
        if n % 2 == 0 {
            app.disable(&user.id).await;
            expected.insert(0, name);
        }
    }
    app.user().username("other").tier("starter").create().await;
    let filter = ListUsersRequest {
        page_size: 2,
        tier: "starter".to_owned(),
        is_active: Some(false),
        username_prefix: "bulk-".to_owned(),
        role: Role::User.into(),
        ..ListUsersRequest::default()
    };
    let (mut found, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListUsersRequest {
            page_token,
            ..filter.clone()
        };
        let page = app.admin(&app.service_key).list_users(request).await;
        let page = page.unwrap().into_inner();
        found.extend(page.users.into_iter().map(|user| user.username));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
        // Of the same list only.
        let other = ListUsersRequest {
            page_token: page_token.clone(),
            username_prefix: "b".to_owned(),
            ..filter.clone()
        };
        let refused = app.admin(&app.service_key).list_users(other).await;
        assert_invalid(refused, &["page_token"]);
    }
    assert_eq!(found, expected);
    let admins = ListUsersRequest {
        role: Role::Admin.into(),
        ..ListUsersRequest::default()
    };
    assert_eq!(list(&app, admins).await, ["admin"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn prefixes_are_looked_up_in_an_index_among_many_users() {
    let app = TestApp::spawn().await;
    app.sql(
        "INSERT INTO users (id, email, username, tier) \
         SELECT gen_random_uuid(), md5(n::text || 'x') || '@example.com', 'bulk-' || n, 'free' \
         FROM generate_series(1, 20000) n",
    )
    .await;
    app.sql(
        "INSERT INTO login_throttle (subject, failures, last_failed_at, blocked_until) \
         SELECT 'name ' || n, 1, now(), now() FROM generate_series(1, 20000) n",
    )
    .await;
    app.sql("ANALYZE users").await;
    app.sql("ANALYZE login_throttle").await;
    let by_email = ListUsersRequest {
        email_prefix: "abcd".to_owned(),
        ..ListUsersRequest::default()
    };
    let by_username = ListUsersRequest {
        username_prefix: "abcd".to_owned(),
        ..ListUsersRequest::default()
    };
    for (request, column) in [(by_email, "email"), (by_username, "username")] {
        let list = async || assert_eq!(list(&app, request.clone()).await.len(), 0);
        let marks = [&*format!("lower({column}"), "ORDER BY"];
        let values = ["'abcd'", "'abce'", "51"];
        let plan = app.plan(&marks, &values, list).await;
        assert!(
            plan.contains(&format!("users_{column}_lower_key")),
            "{plan}"
        );
    }
    let log_in = async || {
        app.login_as("nobody@example.com", PASSWORD)
            .await
            .unwrap_err();
    };
    let subjects = [
        "'user '",
        "'name x'",
        "'user '",
        "' from 192.0.2.1'",
        "'from 192.0.2.1'",
    ];
    let values = [&subjects[..], &["'x'"]].concat();
    let plan = app
        .plan(&["lower(email", "AS subjects"], &values, log_in)
        .await;
    for index in ["users_email_lower_key", "login_throttle_pkey"] {
        assert!(plan.contains(index), "{plan}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_else_changes_or_deletes_users() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let token = app.login(&other).await.access_token;
    let (_, reader) = app.service("reader", &["usage.read"]).await;
    let key = app.api_key(&app.user().admin().create().await, &[]).await;
    for (credential, why) in [
        (&token, "CALLER_NOT_ALLOWED"),
        (&key.text, "CALLER_NOT_ALLOWED"),
        (&reader, "SCOPE_MISSING"),
    ] {
        let mut admin = app.admin(credential);
        let request = UpdateUserRequest {
            user: Some(blank(&user)),
            update_mask: None,
        };
        let refused = admin.update_user(request).await;
        assert_refused(refused, Code::PermissionDenied, why);
        let request = DeleteUserRequest {
            user_id: user.id.clone(),
            reason: String::new(),
        };
        let refused = admin.delete_user(request).await;
        assert_refused(refused, Code::PermissionDenied, why);
    }
    app.login(&user).await;
}
