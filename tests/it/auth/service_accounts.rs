use aws_lc_rs::digest;
use tollkeeper::proto::tollkeeper::admin::v1::{
    CreateServiceAccountRequest, CreateServiceAccountResponse, DisableServiceAccountRequest,
    ListServiceAccountsRequest, ListUsersRequest, ServiceAccount,
};
use tonic::{Code, Status};

use super::{assert_invalid, assert_refused, credential};
use crate::harness::{TestApp, eventually, reason, validate_through};

async fn create(
    app: &TestApp,
    name: &str,
    scopes: &[&str],
) -> Result<CreateServiceAccountResponse, Status> {
    let request = CreateServiceAccountRequest {
        name: name.to_owned(),
        scopes: scopes.iter().map(|&scope| scope.to_owned()).collect(),
    };
    let response = app
        .admin(&app.service_key)
        .create_service_account(request)
        .await?;
    Ok(response.into_inner())
}

async fn disable(app: &TestApp, id: &str) -> Result<ServiceAccount, Status> {
    let service_account_id = id.to_owned();
    let request = DisableServiceAccountRequest { service_account_id };
    let response = app
        .admin(&app.service_key)
        .disable_service_account(request)
        .await?;
    Ok(response.into_inner().service_account.expect("an account"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_service_account_has_the_name_and_scopes_it_was_given() {
    let app = TestApp::spawn().await;
    let made = create(&app, "Gateway.eu-1", &["quota", "tokens.validate", "quota"])
        .await
        .unwrap();
    let account = made.service_account.unwrap();
    assert_eq!(account.name, "Gateway.eu-1");
    assert_eq!(account.scopes, ["tokens.validate", "quota"]);
    assert!(account.is_active && account.created_at.is_some());
    assert_eq!(
        account.id.parse::<uuid::Uuid>().unwrap().get_version_num(),
        7
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_shown_once_and_stored_as_a_hash_only() {
    let app = TestApp::spawn().await;
    let key = create(&app, "gateway", &["quota"]).await.unwrap().key;
    assert!(key.starts_with("tks_"));
    let hash: Vec<u8> = digest::digest(&digest::SHA256, key.as_bytes())
        .as_ref()
        .to_vec();
    let rows = app
        .sql("SELECT key_hash FROM service_keys ORDER BY id DESC")
        .await;
    assert_eq!(rows[0].get::<_, Vec<u8>>(0), hash);
    let everything = app
        .sql(
            "SELECT row_to_json(a)::text FROM service_accounts a \
             UNION ALL SELECT row_to_json(k)::text FROM service_keys k \
             UNION ALL SELECT row_to_json(e)::text FROM audit_events e",
        )
        .await;
    for row in everything {
        assert!(!row.get::<_, &str>(0).contains(&key[4..]));
    }
    let request = ListServiceAccountsRequest::default();
    let listed = app
        .admin(&app.service_key)
        .list_service_accounts(request)
        .await;
    assert!(!format!("{:?}", listed.unwrap()).contains(&key[4..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_opens_what_its_scopes_name_and_nothing_else() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (_, validator) = app.service("validator", &["tokens.validate"]).await;
    let (_, operator) = app.service("operator", &["admin"]).await;
    let list = ListUsersRequest::default;
    validate_through(&app.channel, &validator, &token)
        .await
        .unwrap();
    let refused = app.admin(&validator).list_users(list()).await;
    assert_refused(refused, Code::PermissionDenied, "SCOPE_MISSING");
    app.admin(&operator).list_users(list()).await.unwrap();
    let refused = validate_through(&app.channel, &operator, &token).await;
    assert_refused(refused, Code::PermissionDenied, "SCOPE_MISSING");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_service_is_refused_from_the_next_call_on() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (id, key) = app.service("gateway", &["tokens.validate"]).await;
    validate_through(&app.channel, &key, &token).await.unwrap();
    let disabled = disable(&app, &id).await.unwrap();
    assert!(!disabled.is_active);
    let refused = validate_through(&app.channel, &key, &token).await;
    let refused = assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
    assert_eq!(credential(&refused), "authorization");
    assert_eq!(
        disable(&app, &id).await.unwrap(),
        disabled,
        "repeating it changes nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_and_expired_keys_are_refused() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let (id, key) = app.service("gateway", &["tokens.validate"]).await;
    let set = |change: &str| {
        format!("UPDATE service_keys SET {change} WHERE service_account_id = '{id}'")
    };
    for (change, why) in [
        ("expires_at = now()", "CREDENTIAL_EXPIRED"),
        ("revoked_at = now()", "CREDENTIAL_INVALID"),
    ] {
        app.sql(&set(change)).await;
        eventually(why, async || {
            let answer = validate_through(&app.channel, &key, &token).await;
            answer.is_err_and(|refused| reason(&refused) == why)
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_name_is_refused_in_any_case_and_for_good() {
    let app = TestApp::spawn().await;
    let (id, _) = app.service("gateway", &["quota"]).await;
    disable(&app, &id).await.unwrap();
    for name in ["gateway", "GATEWAY"] {
        let refused = create(&app, name, &["quota"]).await;
        assert_refused(refused, Code::AlreadyExists, "SERVICE_ACCOUNT_EXISTS");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_fields_of_a_service_account_are_named() {
    let app = TestApp::spawn().await;
    assert_invalid(create(&app, "", &[]).await, &["name", "scopes"]);
    for name in ["ab", "-gateway", "gate way", "gateway\0", &"x".repeat(65)] {
        assert_invalid(create(&app, name, &["quota"]).await, &["name"]);
    }
    for scopes in [&["everything"][..], &["quota", ""], &["Quota"], &["quota "]] {
        assert_invalid(create(&app, "gateway", scopes).await, &["scopes"]);
    }
    for id in ["", "gateway"] {
        assert_invalid(disable(&app, id).await, &["service_account_id"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_account_that_does_not_exist_is_not_found() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    // The id of a user is none of a service account.
    for id in ["01890000-0000-7000-8000-000000000000", &user.id] {
        let refused = disable(&app, id).await;
        assert_refused(refused, Code::NotFound, "SERVICE_ACCOUNT_NOT_FOUND");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_service_account_is_listed_once_newest_first_over_pages() {
    let app = TestApp::spawn().await;
    let mut made = Vec::new();
    for n in 0..4 {
        made.push(app.service(&format!("service-{n}"), &["quota"]).await.0);
    }
    disable(&app, &made[1]).await.unwrap();
    let (mut listed, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListServiceAccountsRequest {
            page_size: 2,
            page_token,
        };
        let page = app
            .admin(&app.service_key)
            .list_service_accounts(request)
            .await;
        let page = page.unwrap().into_inner();
        assert!(page.service_accounts.len() <= 2);
        listed.extend(page.service_accounts);
        page_token = page.next_page_token;
        if page_token.is_empty() || listed.len() > 10 {
            break;
        }
    }
    assert_eq!(listed.len(), 5, "with the service account of the test");
    let wanted: Vec<(&str, bool)> = made
        .iter()
        .rev()
        .map(|id| (&**id, *id != made[1]))
        .collect();
    let listed: Vec<(&str, bool)> = listed.iter().map(|a| (&*a.id, a.is_active)).collect();
    assert_eq!(listed[..4], wanted);
}
