//! Names in a database whose locale has letters of its own.

use tollkeeper::{
    config::Secret,
    proto::tollkeeper::{admin::v1::ListUsersRequest, auth::v1::RegisterRequest},
};
use tonic::Code;

use super::assert_refused;
use crate::harness::{PASSWORD, TestApp, cluster};

/// A database in which lower('I') is another letter than i.
async fn turkish_database() -> String {
    let url = cluster::empty_database().await;
    let name = url.rsplit('/').next().unwrap().to_owned();
    let client = cluster::connect(&cluster::url("postgres")).await;
    let drop = format!("DROP DATABASE {name}");
    client.batch_execute(&drop).await.unwrap();
    let create = format!(
        "CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8' LOCALE 'C.UTF-8'
             LOCALE_PROVIDER icu ICU_LOCALE 'tr'"
    );
    client.batch_execute(&create).await.unwrap();
    url
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_compared_as_ascii_whatever_the_locale_of_the_database() {
    let url = turkish_database().await;
    let app = TestApp::spawn_with(|settings| settings.database.url = Secret::new(url)).await;
    let lower = app.sql("SELECT lower('INFO')").await;
    assert_ne!(lower[0].get::<_, &str>(0), "info", "another alphabet");
    app.user()
        .email("INFO@EXAMPLE.COM")
        .username("IRIS")
        .create()
        .await;
    for name in ["info@example.com", "INFO@example.com", "iris", "Iris"] {
        app.login_as(name, PASSWORD).await.expect(name);
    }
    for (email, username) in [("info@example.com", "other"), ("other@example.com", "iris")] {
        let request = RegisterRequest {
            email: email.to_owned(),
            username: username.to_owned(),
            full_name: String::new(),
            password: PASSWORD.to_owned(),
        };
        let refused = app.auth("").register(request).await;
        assert_refused(refused, Code::AlreadyExists, "ACCOUNT_EXISTS");
    }
    for prefix in ["info", "INFO", "Inf"] {
        let request = ListUsersRequest {
            email_prefix: prefix.to_owned(),
            username_prefix: "Iri".to_owned(),
            ..ListUsersRequest::default()
        };
        let answer = app.admin(&app.service_key).list_users(request).await;
        assert_eq!(answer.unwrap().into_inner().users.len(), 1, "{prefix}");
    }
    app.service("indexer", &["usage.read"]).await;
    let request = tollkeeper::proto::tollkeeper::admin::v1::CreateServiceAccountRequest {
        name: "INDEXER".to_owned(),
        scopes: vec!["usage.read".to_owned()],
    };
    let refused = app
        .admin(&app.service_key)
        .create_service_account(request)
        .await;
    assert_eq!(refused.unwrap_err().code(), Code::AlreadyExists);
}
