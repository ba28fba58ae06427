use std::time::Duration;

use aws_lc_rs::digest;
use futures_util::future::join_all;
use prost_types::Timestamp;
use tollkeeper::{
    config::{DatabaseSettings, Secret},
    model::{Change, UserId},
    proto::tollkeeper::{
        admin::v1::ListUsersRequest,
        auth::v1::{
            ApiKey, CreateApiKeyRequest, CreateApiKeyResponse, GetCurrentUserRequest,
            ListApiKeysRequest, ListApiKeysResponse, LogoutRequest, RevokeApiKeyRequest, Role,
            auth_service_client::AuthServiceClient,
        },
        usage::v1::{GetMonthlyUsageRequest, ListTiersRequest},
    },
    store::{Notification, Store},
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{assert_refused, credential};
use crate::harness::{TestApp, eventually, reason, validate_through, with_bearer};

fn request(name: &str) -> CreateApiKeyRequest {
    CreateApiKeyRequest {
        name: name.to_owned(),
        ..CreateApiKeyRequest::default()
    }
}

async fn create(
    app: &TestApp,
    token: &str,
    request: CreateApiKeyRequest,
) -> Result<CreateApiKeyResponse, Status> {
    Ok(app.auth(token).create_api_key(request).await?.into_inner())
}

async fn revoke(app: &TestApp, token: &str, id: &str) -> Result<ApiKey, Status> {
    let request = RevokeApiKeyRequest {
        api_key_id: id.to_owned(),
    };
    let answer = app.auth(token).revoke_api_key(request).await?;
    Ok(answer.into_inner().api_key.expect("a key"))
}

async fn page(app: &TestApp, token: &str, request: ListApiKeysRequest) -> ListApiKeysResponse {
    let answer = app.auth(token).list_api_keys(request).await;
    answer.unwrap().into_inner()
}

/// All keys of a user, the ended ones too.
async fn list(app: &TestApp, token: &str) -> Vec<ApiKey> {
    let request = ListApiKeysRequest {
        show_ended: true,
        ..ListApiKeysRequest::default()
    };
    page(app, token, request).await.api_keys
}

/// Version of a key's row, and its last use in microseconds since 1970, as the database has them.
async fn stored_use(app: &TestApp, id: &str) -> (String, Option<i64>) {
    let statement = format!(
        "SELECT xmin::text, (extract(epoch FROM last_used_at) * 1000000)::bigint
         FROM api_keys WHERE id = '{id}'"
    );
    let rows = app.sql(&statement).await;
    (rows[0].get(0), rows[0].get(1))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_shown_once_and_stored_as_a_hash_only() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let mut wanted = request("my laptop");
    wanted.scopes = ["write", "read", "read"].map(str::to_owned).to_vec();
    let made = create(&app, &token, wanted).await.unwrap();
    let (key, text) = (made.api_key.unwrap(), made.key);
    assert!(text.starts_with("tka_"));
    assert_eq!((&*key.name, key.scopes.len()), ("my laptop", 2));
    assert_eq!(key.scopes, ["read", "write"]);
    assert!(key.created_at.is_some() && key.expires_at.is_none());
    assert_eq!(key.id.parse::<uuid::Uuid>().unwrap().get_version_num(), 7);
    let hash: Vec<u8> = digest::digest(&digest::SHA256, text.as_bytes())
        .as_ref()
        .to_vec();
    let rows = app.sql("SELECT key_hash FROM api_keys").await;
    assert_eq!(rows[0].get::<_, Vec<u8>>(0), hash);
    let everything = app
        .sql(
            "SELECT row_to_json(k)::text FROM api_keys k \
             UNION ALL SELECT row_to_json(e)::text FROM audit_events e",
        )
        .await;
    for row in everything {
        assert!(!row.get::<_, &str>(0).contains(&text[4..]));
    }
    let listed = list(&app, &token).await;
    assert_eq!(listed, [key]);
    assert!(!format!("{listed:?}").contains(&text[4..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_told_whose_key_it_is_and_what_it_is_for() {
    let app = TestApp::spawn().await;
    let user = app.user().tier("starter").create().await;
    let token = app.login(&user).await.access_token;
    let expires_at = Timestamp {
        seconds: chrono::Utc::now().timestamp() + 3600,
        nanos: 0,
    };
    let limited = CreateApiKeyRequest {
        expires_at: Some(expires_at),
        scopes: vec!["chat".to_owned(), "admin".to_owned()],
        ..request("limited")
    };
    let made = create(&app, &token, limited).await.unwrap();
    let key = made.api_key.unwrap();
    let valid = app.validate(&made.key).await.unwrap();
    assert_eq!(
        (&valid.user_id, &valid.username),
        (&user.id, &user.username)
    );
    assert_eq!((&*valid.tier, valid.role()), ("starter", Role::User));
    assert_eq!((&valid.api_key_id, &*valid.session_id), (&key.id, ""));
    assert_eq!(valid.scopes, ["admin", "chat"]);
    assert_eq!(valid.issued_at, key.created_at);
    assert_eq!(valid.expires_at, Some(expires_at));

    let forever = create(&app, &token, request("forever")).await.unwrap();
    let valid = app.validate(&forever.key).await.unwrap();
    assert_eq!((valid.expires_at, valid.scopes), (None, vec![]));

    let valid = app.validate(&token).await.unwrap();
    assert_eq!((&*valid.api_key_id, valid.scopes), ("", vec![]));
    assert_ne!(valid.session_id, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_acts_for_its_user_where_no_session_is_asked_for() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let key = app.api_key(&user, &[]).await;
    let me = app
        .auth(&key.text)
        .get_current_user(GetCurrentUserRequest {})
        .await;
    assert_eq!(me.unwrap().into_inner().user.unwrap().id, user.id);
    let month = GetMonthlyUsageRequest::default();
    let month = app.usage(&key.text).get_monthly_usage(month).await;
    assert_eq!(month.unwrap().into_inner().user_id, user.id);

    let mut auth = app.auth(&key.text);
    let revocation = RevokeApiKeyRequest {
        api_key_id: key.id.clone(),
    };
    for refused in [
        auth.logout(LogoutRequest {}).await.map(drop),
        auth.create_api_key(request("another")).await.map(drop),
        auth.list_api_keys(ListApiKeysRequest::default())
            .await
            .map(drop),
        auth.revoke_api_key(revocation).await.map(drop),
    ] {
        assert_refused(refused, Code::PermissionDenied, "SESSION_REQUIRED");
    }
    app.validate(&key.text).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrators_key_is_an_ordinary_users() {
    let app = TestApp::spawn().await;
    let admin = app.user().admin().create().await;
    let key = app.api_key(&admin, &["admin"]).await.text;
    let refused = app
        .admin(&key)
        .list_users(ListUsersRequest::default())
        .await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
    assert_eq!(app.validate(&key).await.unwrap().role(), Role::User);
    let token = app.login(&admin).await.access_token;
    assert_eq!(app.validate(&token).await.unwrap().role(), Role::Admin);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_from_the_next_call_on() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let (key, other) = (app.api_key(&user, &[]).await, app.api_key(&user, &[]).await);
    app.validate(&key.text).await.unwrap();
    let revoked = revoke(&app, &token, &key.id).await.unwrap();
    assert!(revoked.revoked_at.is_some());
    let refused = app.validate(&key.text).await;
    let refused = assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
    assert_eq!(credential(&refused), "token");
    let me = app
        .auth(&key.text)
        .get_current_user(GetCurrentUserRequest {})
        .await;
    let refused = assert_refused(me, Code::Unauthenticated, "CREDENTIAL_INVALID");
    assert_eq!(credential(&refused), "authorization");
    let again = revoke(&app, &token, &key.id).await.unwrap();
    assert_eq!(again, revoked, "repeating it changes nothing");
    app.validate(&other.text).await.unwrap();
    app.validate(&token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_somebody_else_is_not_found() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let key = app.api_key(&user, &[]).await;
    let theirs = app.login(&other).await.access_token;
    for id in [&*key.id, &user.id, "01890000-0000-7000-8000-000000000000"] {
        let refused = revoke(&app, &theirs, id).await;
        assert_refused(refused, Code::NotFound, "API_KEY_NOT_FOUND");
    }
    app.validate(&key.text).await.unwrap();
    assert_eq!(list(&app, &theirs).await, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_outlives_its_users_session_and_obeys_the_kill_switch() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let key = create(&app, &token, request("a key")).await.unwrap().key;
    app.logout(&token).await;
    app.validate(&key).await.unwrap();
    app.disable(&user.id).await;
    let refused = app.validate(&key).await;
    assert_refused(refused, Code::Unauthenticated, "ACCOUNT_DISABLED");
    app.enable(&user.id).await;
    app.validate(&key).await.unwrap();
    app.set_tier(&user.id, "builder").await;
    assert_eq!(app.validate(&key).await.unwrap().tier, "builder");
    app.sql(&format!("DELETE FROM users WHERE id = '{}'", user.id))
        .await;
    eventually("the key has gone with its user", async || {
        let answer = app.validate(&key).await;
        answer.is_err_and(|refused| reason(&refused) == "CREDENTIAL_INVALID")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_expires_by_itself_also_in_memory() {
    let app = TestApp::spawn().await;
    let token = app.login(&app.user().create().await).await.access_token;
    let at = chrono::Utc::now() + Duration::from_millis(1500);
    let short = CreateApiKeyRequest {
        expires_at: Some(Timestamp {
            seconds: at.timestamp(),
            nanos: at.timestamp_subsec_nanos().cast_signed(),
        }),
        ..request("short")
    };
    let key = create(&app, &token, short).await.unwrap().key;
    app.validate(&key).await.unwrap();
    eventually("it expires", async || {
        let answer = app.validate(&key).await;
        answer.is_err_and(|refused| reason(&refused) == "CREDENTIAL_EXPIRED")
    })
    .await;
    assert!(chrono::Utc::now() >= at);
}

#[tokio::test(flavor = "multi_thread")]
async fn warm_calls_and_wrong_checksums_need_no_database() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.auth.staleness_bound = Duration::from_secs(60);
        settings.auth.max_stale = Duration::from_secs(60);
    })
    .await;
    let key = app.api_key(&app.user().create().await, &[]).await.text;
    // Well formed, and nobody's: a key whose row is gone.
    let gone = app.api_key(&app.user().create().await, &[]).await;
    app.sql(&format!("DELETE FROM api_keys WHERE id = '{}'", gone.id))
        .await;
    eventually("memory is trusted", async || {
        proxy.cut();
        let warm = app.validate(&key).await.is_ok()
            && app.validate(&gone.text).await.unwrap_err().code() == Code::Unauthenticated;
        proxy.resume();
        let _ = app.validate(&key).await;
        let _ = app.validate(&gone.text).await;
        warm
    })
    .await;
    proxy.cut();
    for _ in 0..2000 {
        app.validate(&key).await.unwrap();
    }
    for _ in 0..100 {
        app.usage(&key)
            .list_tiers(ListTiersRequest {})
            .await
            .unwrap();
    }
    let refused = app.validate(&gone.text).await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
    for at in [4, 20, 46, 47, 52] {
        let mut typo = key.clone();
        let other = if &key[at..=at] == "x" { "y" } else { "x" };
        typo.replace_range(at..=at, other);
        let refused = app.validate(&typo).await;
        assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
    }
    let cut_off = app.validate(&key[..52]).await;
    assert_refused(cut_off, Code::Unauthenticated, "CREDENTIAL_INVALID");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_no_key_is_one_once_it_is_there() {
    let app = TestApp::spawn().await;
    let key = app.api_key(&app.user().create().await, &[]).await;
    app.sql("CREATE TABLE kept AS SELECT * FROM api_keys").await;
    app.sql("DELETE FROM api_keys").await;
    eventually("it is unknown", async || {
        app.validate(&key.text).await.is_err()
    })
    .await;
    app.validate(&key.text).await.unwrap_err();
    app.sql("INSERT INTO api_keys SELECT * FROM kept").await;
    eventually("it is known again", async || {
        app.validate(&key.text).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_use_is_written_later_and_not_by_the_call() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channel = replica.channel();
    let user = app.user().create().await;
    let key = app.api_key(&user, &[]).await;
    let unused = app.api_key(&user, &[]).await;
    let before = stored_use(&app, &key.id).await;
    let begun = chrono::Utc::now().timestamp_micros();
    for _ in 0..300 {
        validate_through(&channel, &app.service_key, &key.text)
            .await
            .unwrap();
    }
    assert_eq!(stored_use(&app, &key.id).await, before, "no call writes");
    assert_eq!(before.1, None);

    replica.auth.write_api_key_uses().await.unwrap();
    let written = stored_use(&app, &key.id).await;
    let at = written.1.expect("written");
    assert!((begun..=chrono::Utc::now().timestamp_micros()).contains(&at));
    assert_eq!(stored_use(&app, &unused.id).await.1, None);
    replica.auth.write_api_key_uses().await.unwrap();
    assert_eq!(
        stored_use(&app, &key.id).await,
        written,
        "nothing new to write"
    );

    let token = app.login(&user).await.access_token;
    let shown = list(&app, &token).await;
    let shown: Vec<bool> = shown.iter().map(|key| key.last_used_at.is_some()).collect();
    assert_eq!(shown, [false, true], "newest first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_use_that_another_replica_wrote_stands() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let key = app.api_key(&app.user().create().await, &[]).await;
    validate_through(&replica.channel(), &app.service_key, &key.text)
        .await
        .unwrap();
    app.sql("UPDATE api_keys SET last_used_at = now() + interval '1 hour'")
        .await;
    let before = stored_use(&app, &key.id).await;
    replica.auth.write_api_key_uses().await.unwrap();
    assert_eq!(stored_use(&app, &key.id).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_use_that_could_not_be_written_is_written_later() {
    let (app, proxy) = TestApp::spawn_behind_proxy(|settings| {
        settings.database.acquire_timeout = Duration::from_millis(200);
    })
    .await;
    let replica = app.replica().await;
    let key = app.api_key(&app.user().create().await, &[]).await;
    validate_through(&replica.channel(), &app.service_key, &key.text)
        .await
        .unwrap();
    proxy.cut();
    replica.auth.write_api_key_uses().await.unwrap_err();
    proxy.resume();
    assert_eq!(stored_use(&app, &key.id).await.1, None);
    eventually("it is written", async || {
        replica.auth.write_api_key_uses().await.is_ok()
    })
    .await;
    assert!(stored_use(&app, &key.id).await.1.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_uses_are_written_at_shutdown() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let key = app.api_key(&app.user().create().await, &[]).await;
    validate_through(&replica.channel(), &app.service_key, &key.text)
        .await
        .unwrap();
    assert_eq!(stored_use(&app, &key.id).await.1, None);
    replica.stop().await.unwrap();
    assert!(stored_use(&app, &key.id).await.1.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_change_of_a_key_is_told_but_its_last_use() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    app.api_key(&user, &[]).await;
    let settings = DatabaseSettings {
        url: Secret::new(app.database_url.clone()),
        ..DatabaseSettings::default()
    };
    let mut changes = Store::new(&settings).unwrap().changes().await.unwrap();
    let id: UserId = user.id.parse().unwrap();
    let of_user = Some(Change::User(id));
    let live = "INSERT INTO api_keys SELECT * FROM kept";
    app.sql("CREATE TABLE kept AS SELECT * FROM api_keys").await;
    for (statement, told) in [
        ("UPDATE api_keys SET last_used_at = now()", None),
        ("UPDATE api_keys SET scopes = '{more}'", of_user),
        (
            "UPDATE api_keys SET expires_at = now() + interval '1 day'",
            of_user,
        ),
        ("UPDATE api_keys SET revoked_at = now()", of_user),
        ("DELETE FROM api_keys", None),
        (live, Some(Change::NewApiKey)),
        ("DELETE FROM api_keys", of_user),
        (live, Some(Change::NewApiKey)),
        ("TRUNCATE api_keys", Some(Change::All)),
    ] {
        app.sql(statement).await;
        // What is told after it: changes come in the order of their commits.
        app.sql("UPDATE service_accounts SET name = name").await;
        let mut heard = Vec::new();
        loop {
            match changes.next().await.unwrap() {
                Notification::Changed(Change::Services) => break,
                Notification::Changed(change) => heard.push(change),
                Notification::Heartbeat(..) => {}
            }
        }
        assert_eq!(heard, told.into_iter().collect::<Vec<_>>(), "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn racing_creations_do_not_exceed_the_limit() {
    const LIMIT: u32 = 5;
    let app = TestApp::spawn_with(|settings| settings.auth.api_keys_per_user = LIMIT).await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let channels = [app.channel.clone(), replica.channel()];
    let outcomes = join_all((0..20).map(|n| {
        let mut auth = AuthServiceClient::new(channels[n % 2].clone());
        let request = with_bearer(request(&format!("key {n}")), &token);
        async move { auth.create_api_key(request).await }
    }))
    .await;
    let (made, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
    assert_eq!((made.len(), refused.len()), (5, 15));
    for refused in refused {
        let status = assert_refused(refused, Code::FailedPrecondition, "TOO_MANY_KEYS");
        assert_eq!(limit_of(&status), "5");
    }
    assert_eq!(app.count("SELECT count(*) FROM api_keys").await, 5);
    // Another user is not concerned.
    app.api_key(&app.user().create().await, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_have_ended_do_not_count() {
    let app = TestApp::spawn_with(|settings| settings.auth.api_keys_per_user = 2).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let (first, second) = (app.api_key(&user, &[]).await, app.api_key(&user, &[]).await);
    let full = create(&app, &token, request("third")).await;
    assert_refused(full, Code::FailedPrecondition, "TOO_MANY_KEYS");
    revoke(&app, &token, &first.id).await.unwrap();
    app.sql(&format!(
        "UPDATE api_keys SET expires_at = now() WHERE id = '{}'",
        second.id
    ))
    .await;
    for name in ["third", "fourth"] {
        create(&app, &token, request(name)).await.unwrap();
    }
    let full = create(&app, &token, request("fifth")).await;
    assert_refused(full, Code::FailedPrecondition, "TOO_MANY_KEYS");
}

#[tokio::test(flavor = "multi_thread")]
async fn live_keys_are_listed_newest_first_over_pages_and_ended_ones_on_demand() {
    let app = TestApp::spawn().await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let token = app.login(&user).await.access_token;
    let mut made = Vec::new();
    for _ in 0..5 {
        made.push(app.api_key(&user, &[]).await.id);
    }
    app.api_key(&other, &[]).await;
    revoke(&app, &token, &made[1]).await.unwrap();
    app.sql(&format!(
        "UPDATE api_keys SET expires_at = now() WHERE id = '{}'",
        made[3]
    ))
    .await;
    made.reverse();
    let live: Vec<String> = [0, 2, 4].map(|n| made[n].clone()).to_vec();
    for (show_ended, wanted) in [(false, live), (true, made)] {
        let (mut listed, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = ListApiKeysRequest {
                page_size: 2,
                page_token,
                show_ended,
            };
            let page = page(&app, &token, request).await;
            assert!(page.api_keys.len() <= 2);
            listed.extend(page.api_keys.into_iter().map(|key| key.id));
            page_token = page.next_page_token;
            if page_token.is_empty() || listed.len() > 10 {
                break;
            }
        }
        assert_eq!(listed, wanted, "{show_ended}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_long_ended_are_swept() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let mut keys = Vec::new();
    for _ in 0..4 {
        keys.push(app.api_key(&user, &[]).await.id);
    }
    for (key, ended) in [
        (&keys[0], "revoked_at = now() - interval '91 days'"),
        (&keys[1], "expires_at = now() - interval '91 days'"),
        (&keys[2], "revoked_at = now() - interval '89 days'"),
    ] {
        app.sql(&format!("UPDATE api_keys SET {ended} WHERE id = '{key}'"))
            .await;
    }
    // A server sweeps when it starts.
    let _replica = app.replica().await;
    eventually("two are left", async || {
        app.count("SELECT count(*) FROM api_keys").await == 2
    })
    .await;
    let token = app.login(&user).await.access_token;
    let left: Vec<String> = list(&app, &token)
        .await
        .into_iter()
        .map(|key| key.id)
        .collect();
    assert_eq!(left, [keys[3].clone(), keys[2].clone()]);
}

fn limit_of(status: &Status) -> String {
    let mut info = status.get_details_error_info().expect("an ErrorInfo");
    info.metadata.remove("limit").unwrap_or_default()
}
