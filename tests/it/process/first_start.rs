use std::{fs, os::unix::fs::PermissionsExt as _};

use nix::sys::signal::Signal;
use tollkeeper::proto::tollkeeper::auth::v1::{
    RefreshTokensRequest, auth_service_client::AuthServiceClient,
};

use super::home::Home;
use crate::harness::{login_through, validate_through};

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_prints_credentials_that_work() {
    let home = Home::new();
    let mut service = home.serve();
    let channel = service.serving().await;
    let [email, password, key] =
        ["admin_email", "admin_password", "service_key"].map(|name| home.first_run(name));
    let printed = service.output();
    let address = service.address();
    for needed in [&email, &password, &key, &address, "first-run.txt"] {
        assert!(printed.contains(needed), "{needed}: {printed}");
    }
    for secret in [&password, &key] {
        assert!(!service.log().contains(secret.as_str()));
    }

    let tokens = login_through(&channel, &email, &password).await.unwrap();
    let validated = validate_through(&channel, &key, &tokens.access_token)
        .await
        .unwrap();
    assert_eq!(validated.username, "admin");
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_on_disk_are_for_the_owner_only() {
    let home = Home::new();
    let mut service = home.serve();
    service.serving().await;
    let mode = |path: &str| {
        let found = fs::metadata(home.data_dir().join(path)).expect(path);
        found.permissions().mode() & 0o777
    };
    assert_eq!(mode("first-run.txt"), 0o600);
    assert_eq!(mode("keys"), 0o700);
    assert_eq!(mode("postgres"), 0o700);
    assert_eq!(mode("run"), 0o700);
    for file in fs::read_dir(home.data_dir().join("keys")).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        if name != ".lock" {
            assert_eq!(mode(&format!("keys/{name}")), 0o600, "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_users_and_keys_and_prints_no_credentials() {
    let home = Home::new();
    let mut service = home.serve();
    let channel = service.serving().await;
    let [email, password, key] =
        ["admin_email", "admin_password", "service_key"].map(|name| home.first_run(name));
    let tokens = login_through(&channel, &email, &password).await.unwrap();
    assert_eq!(service.stop(Signal::SIGTERM).code(), Some(0));

    let mut service = home.serve();
    let channel = service.serving().await;
    assert_eq!(service.output(), "");
    validate_through(&channel, &key, &tokens.access_token)
        .await
        .unwrap();
    // Derived from the master key, which must be the same too.
    AuthServiceClient::new(channel.clone())
        .refresh_tokens(RefreshTokensRequest {
            refresh_token: tokens.refresh_token,
        })
        .await
        .unwrap();
    login_through(&channel, &email, &password).await.unwrap();
    assert_eq!(home.first_run("admin_password"), password);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_service_in_the_same_folder_is_refused() {
    let home = Home::new();
    let mut service = home.serve();
    service.serving().await;
    let refused = home.run(&["serve"]);
    assert_eq!(refused.code, Some(1));
    let data_dir = home.data_dir();
    let expected = format!(
        "tollkeeper: another tollkeeper is using the data folder {}: \
         stop it or choose another data folder\n",
        data_dir.display()
    );
    assert!(refused.stderr.ends_with(&expected), "{}", refused.stderr);
    service.serving().await;
}

#[test]
fn a_folder_postgres_cannot_enter_is_named() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let home = Home::new();
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let refused = home.run(&["serve"]);
    assert_eq!(refused.code, Some(1));
    let blocked = format!("cannot enter {}", home.path().display());
    assert!(refused.stderr.contains(&blocked), "{}", refused.stderr);
}

#[test]
fn a_taken_address_is_named() {
    let home = Home::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let refused = home.run(&["serve", "--listen", &address]);
    assert_eq!(refused.code, Some(1));
    let message = format!("tollkeeper: cannot listen on {address}: ");
    assert!(refused.stderr.contains(&message), "{}", refused.stderr);
    assert!(home.postgres_gone());
}
