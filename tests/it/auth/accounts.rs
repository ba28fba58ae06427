//! Creating accounts and finding them.

use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        CreateUserRequest, GetUserRequest, LookupUserRequest, create_user_request::Credential,
        lookup_user_request::By,
    },
    auth::v1::{Role, User},
};
use tonic::{Code, Status};

use super::{assert_invalid, assert_refused, visible};
use crate::harness::{PASSWORD, TestApp};

fn request(username: &str) -> CreateUserRequest {
    CreateUserRequest {
        email: format!("{username}@example.com"),
        username: username.to_owned(),
        credential: Some(Credential::Password(PASSWORD.to_owned())),
        ..CreateUserRequest::default()
    }
}

async fn create(app: &TestApp, request: CreateUserRequest) -> Result<User, Status> {
    let response = app.admin(&app.service_key).create_user(request).await?;
    Ok(response.into_inner().user.expect("a user"))
}

async fn lookup(app: &TestApp, by: Option<By>) -> Result<User, Status> {
    let request = LookupUserRequest { by };
    let response = app.admin(&app.service_key).lookup_user(request).await?;
    Ok(response.into_inner().user.expect("a user"))
}

async fn by_id(app: &TestApp, user_id: &str) -> Result<User, Status> {
    let user_id = user_id.to_owned();
    let request = GetUserRequest { user_id };
    let response = app.admin(&app.service_key).get_user(request).await?;
    Ok(response.into_inner().user.expect("a user"))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_out_of_a_new_account_has_a_default() {
    let app = TestApp::spawn().await;
    let user = create(&app, request("ada")).await.unwrap();
    assert_eq!((&*user.tier, user.role()), ("free", Role::User));
    assert!(user.is_active && user.full_name.is_empty());
    app.login_as("ada", PASSWORD).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_account_has_the_tier_and_role_it_was_given() {
    let app = TestApp::spawn().await;
    let wanted = CreateUserRequest {
        tier: "builder".to_owned(),
        role: Role::Admin.into(),
        ..request("ada")
    };
    let user = create(&app, wanted).await.unwrap();
    assert_eq!((&*user.tier, user.role()), ("builder", Role::Admin));
    let token = app.login_as("ada", PASSWORD).await.unwrap().access_token;
    assert_eq!(app.validate(&token).await.unwrap().tier, "builder");
    let by = Some(By::Username("admin".to_owned()));
    app.admin(&token)
        .lookup_user(LookupUserRequest { by })
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_without_a_credential_cannot_log_in() {
    let app = TestApp::spawn().await;
    let without = CreateUserRequest {
        credential: None,
        ..request("ada")
    };
    create(&app, without).await.unwrap();
    for password in [PASSWORD, "null", "a password that nobody has"] {
        let refused = app.login_as("ada", password).await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn taken_names_are_refused_alike_in_any_case() {
    let app = TestApp::spawn().await;
    create(&app, request("ada")).await.unwrap();
    let mut refusals = Vec::new();
    for (email, username) in [
        ("ADA@example.com", "other"),
        ("other@example.com", "Ada"),
        ("ada@example.com", "ada"),
    ] {
        let taken = CreateUserRequest {
            email: email.to_owned(),
            ..request(username)
        };
        let refused = create(&app, taken).await;
        refusals.push(assert_refused(
            refused,
            Code::AlreadyExists,
            "ACCOUNT_EXISTS",
        ));
    }
    for refusal in &refusals {
        assert_eq!(visible(refusal), visible(&refusals[0]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_of_a_new_account_are_named() {
    let app = TestApp::spawn().await;
    let wrong = CreateUserRequest {
        email: "a@".to_owned(),
        username: "x".to_owned(),
        full_name: "\u{7}".to_owned(),
        credential: Some(Credential::PasswordHash("plain".to_owned())),
        tier: "platinum".to_owned(),
        role: 99,
    };
    let fields = [
        "email",
        "username",
        "full_name",
        "password_hash",
        "tier",
        "role",
    ];
    assert_invalid(create(&app, wrong).await, &fields);
    let short = CreateUserRequest {
        credential: Some(Credential::Password("short".to_owned())),
        ..request("ada")
    };
    assert_invalid(create(&app, short).await, &["password"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn hashes_that_no_login_could_check_are_refused() {
    let app = TestApp::spawn().await;
    let bcrypt = "N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy";
    for hash in [
        "",
        "correct horse battery staple",
        // Kinds that are too weak to keep.
        "5f4dcc3b5aa765d61d8327deb882cf99",
        "$1$saltsalt$qjXMvbEw8oaL.CzflDtaK/",
        // Cut off, or more than one login may cost.
        &format!("$2b$10${}", &bcrypt[1..]),
        &format!("$2b$15${bcrypt}"),
        &format!("$2b$31${bcrypt}"),
        "$argon2id$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ",
        "$argon2id$v=19$m=4194304,t=3,p=4$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaA",
        "$argon2id$v=19$m=64,t=4294967295,p=1$c2FsdHNhbHRzYWx0$aGFzaGhhc2hoYXNoaGFzaA",
        &format!("$6$rounds=999999999$saltsalt${}", "a".repeat(86)),
    ] {
        let wrong = CreateUserRequest {
            credential: Some(Credential::PasswordHash(hash.to_owned())),
            ..request("ada")
        };
        assert_invalid(create(&app, wrong).await, &["password_hash"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_found_by_id_address_and_username_in_any_case() {
    let app = TestApp::spawn().await;
    let user = create(&app, request("Ada")).await.unwrap();
    create(&app, request("other")).await.unwrap();
    assert_eq!(by_id(&app, &user.id).await.unwrap(), user);
    assert_eq!(by_id(&app, &user.id.to_uppercase()).await.unwrap(), user);
    for by in [
        By::Email("Ada@example.com".to_owned()),
        By::Email("ADA@EXAMPLE.COM".to_owned()),
        By::Username("Ada".to_owned()),
        By::Username("aDA".to_owned()),
    ] {
        assert_eq!(lookup(&app, Some(by)).await.unwrap(), user);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_that_does_not_exist_is_not_found() {
    let app = TestApp::spawn().await;
    let nobody = by_id(&app, "01890000-0000-7000-8000-000000000000").await;
    assert_refused(nobody, Code::NotFound, "USER_NOT_FOUND");
    for by in [
        By::Email("nobody@example.com".to_owned()),
        By::Email("%@example.com".to_owned()),
        By::Username("nobody".to_owned()),
        By::Username("a_min".to_owned()),
    ] {
        let nobody = lookup(&app, Some(by)).await;
        assert_refused(nobody, Code::NotFound, "USER_NOT_FOUND");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_of_a_look_up_are_named() {
    let app = TestApp::spawn().await;
    assert_invalid(lookup(&app, None).await, &["by"]);
    assert_invalid(
        lookup(&app, Some(By::Email("admin".to_owned()))).await,
        &["email"],
    );
    let address = By::Username("admin@example.com".to_owned());
    assert_invalid(lookup(&app, Some(address)).await, &["username"]);
    for id in [
        "",
        "admin",
        "01890000-0000-7000-8000-00000000000",
        "' OR true",
    ] {
        assert_invalid(by_id(&app, id).await, &["user_id"]);
    }
}
