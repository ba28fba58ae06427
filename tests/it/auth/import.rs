//! Users who come from another system.

use std::collections::HashSet;

use prost_types::Timestamp;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tollkeeper::proto::tollkeeper::{
    admin::v1::{
        DeleteUserRequest, GetUserRequest, ImportUsersRequest, ImportUsersResponse, ImportUsersRow,
        UpdateUserRequest, admin_service_client::AdminServiceClient,
    },
    auth::v1::{RegisterRequest, Role, User, auth_service_client::AuthServiceClient},
};
use tonic::{Code, Status, Streaming, transport::Channel};
use uuid::Uuid;

use super::{assert_refused, stored_hash};
use crate::harness::{PASSWORD, TestApp, TestUser, eventually, reason, with_bearer};

const BCRYPT: &str = "$2b$04$9dBEZ2HpoiKFWz3mlWUcLe23YxjQgfL1O4O1s1FHCWYV9mBzYoKgK";
/// Of version 4, as most systems have.
const FOREIGN_ID: u128 = 0x3f2c_8a10_9b1d_4e5f_8a7b_1c2d_3e4f_5061;
const BCRYPT_PASSWORD: &str = "correct horse";

fn row(number: i64) -> ImportUsersRow {
    ImportUsersRow {
        row: number,
        email: format!("person-{number}@example.com"),
        username: format!("person-{number}"),
        ..ImportUsersRow::default()
    }
}

fn batch(rows: Vec<ImportUsersRow>) -> ImportUsersRequest {
    ImportUsersRequest {
        source: "legacy".to_owned(),
        rows,
        ..ImportUsersRequest::default()
    }
}

/// An import under way.
struct Stream {
    requests: mpsc::Sender<ImportUsersRequest>,
    answers: Streaming<ImportUsersResponse>,
}

impl Stream {
    async fn open(channel: &Channel, credential: &str) -> Self {
        let (requests, sent) = mpsc::channel(4);
        let request = with_bearer(ReceiverStream::new(sent), credential);
        let mut admin = AdminServiceClient::new(channel.clone());
        let answers = admin.import_users(request).await.expect("opened");
        Self {
            requests,
            answers: answers.into_inner(),
        }
    }

    async fn send(&mut self, batch: ImportUsersRequest) -> Result<ImportUsersResponse, Status> {
        self.requests.send(batch).await.expect("reads");
        let answer = self.answers.message().await?;
        Ok(answer.expect("an answer to each batch"))
    }
}

/// Imports one batch by a stream of its own.
async fn import(app: &TestApp, batch: ImportUsersRequest) -> ImportUsersResponse {
    let mut stream = Stream::open(&app.channel, &app.service_key).await;
    stream.send(batch).await.expect("answered")
}

/// Row, reason and fields.
fn refused(answer: &ImportUsersResponse) -> Vec<(i64, &str, Vec<&str>)> {
    answer
        .failures
        .iter()
        .map(|failure| {
            let fields = failure.fields.iter().map(|field| &*field.field).collect();
            (failure.row, &*failure.reason, fields)
        })
        .collect()
}

fn counts(answer: &ImportUsersResponse) -> (i64, i64, usize) {
    (answer.imported, answer.already_there, answer.failures.len())
}

async fn user(app: &TestApp, user_id: &str) -> User {
    let request = GetUserRequest {
        user_id: user_id.to_owned(),
    };
    let answer = app.admin(&app.service_key).get_user(request).await;
    answer.expect("found").into_inner().user.expect("a user")
}

async fn id_of(app: &TestApp, username: &str) -> String {
    let statement = format!("SELECT id::text FROM users WHERE username = '{username}'");
    app.sql(&statement).await[0].get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn imported_users_are_what_the_rows_say_and_log_in_with_their_passwords() {
    let app = TestApp::spawn().await;
    let (id, seconds) = (Uuid::from_u128(FOREIGN_ID).to_string(), 1_600_000_000);
    let at = |seconds| Some(Timestamp { seconds, nanos: 0 });
    let whole = ImportUsersRow {
        user_id: id.clone(),
        email: "Ada@Example.com".to_owned(),
        username: "Ada".to_owned(),
        full_name: "Ada Lovelace".to_owned(),
        password_hash: BCRYPT.to_owned(),
        tier: "builder".to_owned(),
        role: Role::User.into(),
        is_active: Some(true),
        email_verified_at: at(seconds + 1),
        created_at: at(seconds),
        last_login_at: at(seconds + 2),
        ..row(1)
    };
    let disabled = ImportUsersRow {
        is_active: Some(false),
        password_hash: BCRYPT.to_owned(),
        ..row(3)
    };
    let answer = import(&app, batch(vec![whole, row(2), disabled])).await;
    assert_eq!((counts(&answer), answer.settled), ((3, 0, 0), 3));

    let ada = user(&app, &id).await;
    assert_eq!((&*ada.email, &*ada.username), ("Ada@Example.com", "Ada"));
    assert_eq!((&*ada.full_name, &*ada.tier), ("Ada Lovelace", "builder"));
    assert_eq!(ada.created_at, at(seconds));
    assert_eq!(ada.email_verified_at, at(seconds + 1));
    assert_eq!(ada.last_login_at, at(seconds + 2));
    app.login_as("ada", BCRYPT_PASSWORD).await.unwrap();
    let ada = TestUser {
        id,
        email: ada.email,
        username: ada.username,
    };
    assert!(stored_hash(&app, &ada).await.starts_with("$argon2id$"));

    let plain = user(&app, &id_of(&app, "person-2").await).await;
    assert_eq!((&*plain.tier, plain.is_active), ("free", true));
    assert_eq!(plain.created_at, plain.updated_at);
    let error = app.login_as("person-2", PASSWORD).await.unwrap_err();
    assert_eq!(reason(&error), "INVALID_CREDENTIALS");
    let error = app.login_as("person-3", BCRYPT_PASSWORD).await.unwrap_err();
    assert_eq!(reason(&error), "ACCOUNT_DISABLED");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_repeated_imports_nobody_twice() {
    let app = TestApp::spawn().await;
    let given = ImportUsersRow {
        user_id: Uuid::from_u128(FOREIGN_ID).to_string(),
        ..row(1)
    };
    let rows = || vec![given.clone(), row(2), row(3)];
    assert_eq!(counts(&import(&app, batch(rows())).await), (3, 0, 0));
    assert_eq!(counts(&import(&app, batch(rows())).await), (0, 3, 0));
    // The file was mended: others come before, and a time is another one.
    let moved = ImportUsersRow {
        row: 1,
        created_at: Some(Timestamp {
            seconds: 1,
            nanos: 0,
        }),
        ..row(3)
    };
    let answer = import(&app, batch(vec![moved, row(4), given.clone()])).await;
    assert_eq!(counts(&answer), (1, 2, 0));

    // From another system the same address is somebody else.
    let other = ImportUsersRequest {
        source: "other".to_owned(),
        ..batch(vec![row(2)])
    };
    let answer = import(&app, other).await;
    let fields = vec!["email", "username"];
    assert_eq!(refused(&answer), [(2, "ACCOUNT_EXISTS", fields)]);
    assert_eq!(app.count("SELECT count(*) FROM users").await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_user_who_was_changed_since_is_left_alone() {
    let app = TestApp::spawn().await;
    import(&app, batch(vec![row(1), row(2)])).await;
    let change = async |id: String, email: &str, username: &str| {
        let request = UpdateUserRequest {
            user: Some(User {
                id,
                email: email.to_owned(),
                username: username.to_owned(),
                ..User::default()
            }),
            update_mask: None,
        };
        app.admin(&app.service_key)
            .update_user(request)
            .await
            .unwrap();
    };
    change(id_of(&app, "person-1").await, "new@example.com", "").await;
    change(
        id_of(&app, "person-2").await,
        "newer@example.com",
        "renamed",
    )
    .await;
    let answer = import(&app, batch(vec![row(1), row(2)])).await;
    assert_eq!(answer.already_there, 1);
    assert_eq!(refused(&answer), [(2, "IMPORT_CONFLICT", vec!["user_id"])]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_user_does_not_come_back() {
    let app = TestApp::spawn().await;
    import(&app, batch(vec![row(1)])).await;
    let request = DeleteUserRequest {
        user_id: id_of(&app, "person-1").await,
        reason: String::new(),
    };
    app.admin(&app.service_key)
        .delete_user(request)
        .await
        .unwrap();
    // Now the file says when the account was made, which the id tells too.
    let moved = ImportUsersRow {
        created_at: Some(Timestamp {
            seconds: 1_600_000_000,
            nanos: 0,
        }),
        ..row(1)
    };
    for again in [row(1), moved] {
        let answer = import(&app, batch(vec![again])).await;
        assert_eq!(refused(&answer), [(1, "USER_ERASED", vec![])]);
    }
    assert_eq!(app.count("SELECT count(*) FROM users").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_rows_are_named_by_field_and_leave_the_others_alone() {
    let app = TestApp::spawn().await;
    app.user()
        .email("taken@example.com")
        .username("taken")
        .create()
        .await;
    let with = |number, change: fn(&mut ImportUsersRow)| {
        let mut row = row(number);
        change(&mut row);
        row
    };
    let ahead = || {
        Some(Timestamp {
            seconds: chrono::Utc::now().timestamp() + 3600,
            nanos: 0,
        })
    };
    let mut late = row(10);
    late.created_at = ahead();
    late.last_login_at = ahead();
    late.email_verified_at = ahead();
    let rows = vec![
        row(0),
        with(1, |row| row.email = "nobody".to_owned()),
        with(2, |row| row.username = "a b".to_owned()),
        with(3, |row| row.full_name = "a\nb".to_owned()),
        with(4, |row| row.user_id = "7".to_owned()),
        with(5, |row| {
            row.password_hash =
                "$2b$31$9dBEZ2HpoiKFWz3mlWUcLe23YxjQgfL1O4O1s1FHCWYV9mBzYoKgK".to_owned()
        }),
        with(6, |row| row.password_hash = "hunter2".to_owned()),
        with(7, |row| row.tier = "gold".to_owned()),
        with(8, |row| row.role = Role::Admin.into()),
        with(9, |row| row.role = 77),
        late,
        with(11, |row| row.email = "TAKEN@example.com".to_owned()),
        with(12, |row| row.username = "Taken".to_owned()),
        // Its address is free: the row that would have had it first was broken.
        with(13, |row| row.email = "person-2@example.com".to_owned()),
        with(14, |row| row.email = "PERSON-0@example.com".to_owned()),
        with(15, |row| row.username = "Person-0".to_owned()),
    ];
    for dry_run in [true, false] {
        let request = ImportUsersRequest {
            dry_run,
            ..batch(rows.clone())
        };
        let answer = import(&app, request).await;
        let invalid = |row, field| (row, "INVALID_FIELD", vec![field]);
        let times = vec!["email_verified_at", "created_at", "last_login_at"];
        assert_eq!(
            refused(&answer),
            [
                invalid(1, "email"),
                invalid(2, "username"),
                invalid(3, "full_name"),
                invalid(4, "user_id"),
                invalid(5, "password_hash"),
                invalid(6, "password_hash"),
                invalid(7, "tier"),
                invalid(8, "role"),
                invalid(9, "role"),
                (10, "INVALID_FIELD", times),
                (11, "ACCOUNT_EXISTS", vec!["email"]),
                (12, "ACCOUNT_EXISTS", vec!["username"]),
                (14, "DUPLICATE_ROW", vec!["email"]),
                (15, "DUPLICATE_ROW", vec!["username"]),
            ]
        );
        assert_eq!((answer.imported, answer.settled), (2, 16));
        let texts = format!("{answer:?}").to_lowercase();
        for value in ["person-0", "taken@", "hunter2", "$2b$", "gold"] {
            assert!(!texts.contains(value), "{value}: {texts}");
        }
        let users = app.count("SELECT count(*) FROM users").await;
        assert_eq!(users, if dry_run { 2 } else { 4 });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_different_batches_are_compared_by_a_dry_run_too() {
    let app = TestApp::spawn().await;
    let id = Uuid::from_u128(FOREIGN_ID).to_string();
    let first = ImportUsersRow {
        user_id: id.clone(),
        ..row(1)
    };
    let again = ImportUsersRow { row: 2, ..row(1) };
    let same_id = ImportUsersRow {
        user_id: id,
        ..row(3)
    };
    for dry_run in [true, false] {
        let mut stream = Stream::open(&app.channel, &app.service_key).await;
        let request = |row: &ImportUsersRow| ImportUsersRequest {
            dry_run,
            ..batch(vec![row.clone()])
        };
        assert_eq!(stream.send(request(&first)).await.unwrap().imported, 1);
        let answer = stream.send(request(&again)).await.unwrap();
        let names = vec!["email", "username"];
        assert_eq!(refused(&answer), [(2, "DUPLICATE_ROW", names)]);
        let answer = stream.send(request(&same_id)).await.unwrap();
        assert_eq!(refused(&answer), [(3, "DUPLICATE_ROW", vec!["user_id"])]);
        assert_eq!(answer.settled, 3);
    }
    assert_eq!(app.count("SELECT count(*) FROM users").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_was_made_is_not_that_of_another_row_too() {
    let app = TestApp::spawn().await;
    import(&app, batch(vec![row(1)])).await;
    let id = id_of(&app, "person-1").await;
    app.sql(&format!("DELETE FROM users WHERE id = '{id}'"))
        .await;
    let other = ImportUsersRow {
        user_id: id,
        ..row(2)
    };
    let answer = import(&app, batch(vec![row(1), other])).await;
    assert_eq!(refused(&answer), [(2, "DUPLICATE_ROW", vec!["user_id"])]);
    assert_eq!(answer.imported, 1);
    assert_eq!(app.count("SELECT count(*) FROM users").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_overtaken_holds_no_names() {
    let app = TestApp::spawn().await;
    // Somebody takes the username between the look and the insert.
    app.sql(
        "CREATE FUNCTION overtake() RETURNS trigger LANGUAGE plpgsql AS $$
         BEGIN
             INSERT INTO users (id, email, username, tier)
             VALUES (gen_random_uuid(), 'faster@example.com', 'PERSON-1', 'free');
             RETURN NEW;
         END $$",
    )
    .await;
    app.sql(
        "CREATE TRIGGER overtake BEFORE INSERT ON users FOR EACH ROW
         WHEN (NEW.username = 'person-1') EXECUTE FUNCTION overtake()",
    )
    .await;
    let mut stream = Stream::open(&app.channel, &app.service_key).await;
    let answer = stream.send(batch(vec![row(1)])).await.unwrap();
    assert_eq!(refused(&answer), [(1, "ACCOUNT_EXISTS", vec!["username"])]);
    let mended = ImportUsersRow {
        username: "renamed".to_owned(),
        ..row(1)
    };
    let answer = stream.send(batch(vec![mended])).await.unwrap();
    assert_eq!(counts(&answer), (1, 0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn administrators_are_imported_only_when_that_is_allowed() {
    let app = TestApp::spawn().await;
    let admin = ImportUsersRow {
        role: Role::Admin.into(),
        ..row(1)
    };
    let answer = import(&app, batch(vec![admin.clone()])).await;
    assert_eq!(refused(&answer), [(1, "INVALID_FIELD", vec!["role"])]);
    let request = ImportUsersRequest {
        allow_admins: true,
        ..batch(vec![admin])
    };
    assert_eq!(import(&app, request).await.imported, 1);
    let id = id_of(&app, "person-1").await;
    assert_eq!(user(&app, &id).await.role(), Role::Admin);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_is_found_in_the_trail_of_each_user_without_their_names() {
    let app = TestApp::spawn().await;
    import(&app, batch(vec![row(1), row(2)])).await;
    // What was there already is no act.
    import(&app, batch(vec![row(1)])).await;
    let id = id_of(&app, "person-1").await;
    let events = app
        .sql(&format!(
            "SELECT details::text, actor_kind, target_id = user_id, request_id FROM audit_events \
             WHERE action = 'user.imported' AND user_id = '{id}'"
        ))
        .await;
    let [event] = &events[..] else {
        panic!("{} events", events.len());
    };
    assert_eq!(
        event.get::<_, &str>(0),
        r#"{"role": "user", "tier": "free", "source": "legacy"}"#
    );
    assert_eq!((event.get::<_, &str>(1), event.get(2)), ("service", true));
    assert_eq!(event.get::<_, &str>(3).len(), 32);
    let all = "SELECT count(*) FROM audit_events WHERE action = 'user.imported'";
    assert_eq!(app.count(all).await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_wrong_itself_ends_the_stream() {
    let app = TestApp::spawn().await;
    let many = |count| batch((0..count).map(row).collect());
    let wrong_source = ImportUsersRequest {
        source: "a b".to_owned(),
        ..batch(vec![row(1)])
    };
    for (request, field) in [
        (wrong_source, "source"),
        (batch(vec![]), "rows"),
        (many(501), "rows"),
    ] {
        let mut stream = Stream::open(&app.channel, &app.service_key).await;
        super::assert_invalid(stream.send(request).await, &[field]);
    }
    let other = |change: fn(&mut ImportUsersRequest)| {
        let mut request = batch(vec![row(2)]);
        change(&mut request);
        request
    };
    for (request, field) in [
        (other(|r| r.source = "other".to_owned()), "source"),
        (other(|r| r.dry_run = true), "dry_run"),
        (other(|r| r.allow_admins = true), "allow_admins"),
    ] {
        let mut stream = Stream::open(&app.channel, &app.service_key).await;
        stream.send(batch(vec![row(1)])).await.unwrap();
        super::assert_invalid(stream.send(request).await, &[field]);
    }
    assert_eq!(import(&app, many(500)).await.settled, 500);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_ends_an_import_between_batches() {
    let app = TestApp::spawn().await;
    let mut stream = Stream::open(&app.channel, &app.service_key).await;
    stream.send(batch(vec![row(1)])).await.unwrap();
    let stopping = tokio::spawn(app.stop());
    let ended = stream.answers.message().await;
    assert_refused(ended, Code::Unavailable, "SHUTTING_DOWN");
    stopping.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_administer_no_more_cannot_go_on() {
    let app = TestApp::spawn().await;
    let admin = app.user().admin().create().await;
    let token = app.login(&admin).await.access_token;
    let mut stream = Stream::open(&app.channel, &token).await;
    assert_eq!(stream.send(batch(vec![row(1)])).await.unwrap().imported, 1);
    app.sql(&format!(
        "UPDATE users SET role = 'user' WHERE id = '{}'",
        admin.id
    ))
    .await;
    eventually("the change is heard of", async || {
        let request = GetUserRequest {
            user_id: admin.id.clone(),
        };
        app.admin(&token).get_user(request).await.is_err()
    })
    .await;
    let refused = stream.send(batch(vec![row(2)])).await;
    assert_refused(refused, Code::PermissionDenied, "CALLER_NOT_ALLOWED");
    assert_eq!(app.count("SELECT count(*) FROM users").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn imports_beside_each_other_and_people_who_register_share_no_name() {
    const ROWS: i64 = 300;
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    // The same people from both sides and from two systems, in different orders, and a few who come
    // by themselves.
    let imports = (0..4).map(|number| {
        let (channel, key) = (channels[number % 2].clone(), app.service_key.clone());
        let mut rows: Vec<_> = (0..ROWS).map(row).collect();
        if number % 2 == 1 {
            rows.reverse();
            // Crosses names with the others.
            for row in &mut rows {
                row.username = format!("person-{}", (row.row + 7) % ROWS);
            }
        }
        tokio::spawn(async move {
            let mut stream = Stream::open(&channel, &key).await;
            let (mut imported, mut others) = (0, 0);
            for rows in rows.chunks(60) {
                let request = ImportUsersRequest {
                    source: format!("system-{}", number % 2),
                    ..batch(rows.to_vec())
                };
                let answer = stream.send(request).await.expect("answered");
                imported += answer.imported;
                others += answer.already_there + answer.failures.len() as i64;
            }
            (imported, others)
        })
    });
    let imports: Vec<_> = imports.collect();
    let registered = (0..20).map(|number| {
        let mut auth = AuthServiceClient::new(app.channel.clone());
        tokio::spawn(async move {
            let request = RegisterRequest {
                email: row(number * 10).email,
                username: format!("came-{number}"),
                password: PASSWORD.to_owned(),
                ..RegisterRequest::default()
            };
            auth.register(request).await.is_ok()
        })
    });
    let registered: Vec<_> = registered.collect();
    let mut made = 1;
    for import in imports {
        let (imported, others) = import.await.unwrap();
        assert_eq!(imported + others, ROWS);
        made += imported;
    }
    for registered in registered {
        made += i64::from(registered.await.unwrap());
    }
    assert_eq!(app.count("SELECT count(*) FROM users").await, made);
    let events = app.count(
        "SELECT count(*) FROM audit_events WHERE action IN ('user.imported', 'user.created')",
    );
    assert_eq!(events.await, made);
    let emails = app.sql("SELECT lower(email) FROM users").await;
    let distinct: HashSet<String> = emails.iter().map(|row| row.get(0)).collect();
    assert_eq!(distinct.len() as i64, made);
}
