//! What people do with what is mailed to them: they prove addresses and set passwords, once.

use futures_util::future::join_all;
use tollkeeper::{
    config::Settings,
    proto::tollkeeper::{
        admin::v1::DeleteUserRequest,
        auth::v1::{
            ChangePasswordRequest, GetCurrentUserRequest, RegisterRequest,
            RequestPasswordResetRequest, ResetPasswordRequest, ResetPasswordResponse,
            SendEmailVerificationRequest, User, VerifyEmailRequest,
            auth_service_client::AuthServiceClient,
        },
    },
};
use tonic::{Code, Status, transport::Channel};

use super::{assert_invalid, assert_refused, refresh};
use crate::harness::{Mailbox, PASSWORD, TestApp, TestUser, eventually, reason, validate_through};

pub(super) const NEW: &str = "a staple for the next battery";
pub(super) const TOKENS: &str = "SELECT count(*) FROM one_time_tokens";
pub(super) const PENDING: &str = "SELECT count(*) FROM outbox WHERE delivered_at IS NULL";

/// A server that mails to a folder.
pub(super) async fn mailing(change: impl FnOnce(&mut Settings)) -> (TestApp, Mailbox) {
    let mailbox = Mailbox::new();
    let app = TestApp::spawn_with(|settings| {
        mailbox.take(settings);
        change(settings);
    })
    .await;
    (app, mailbox)
}

pub(super) async fn register(app: &TestApp, name: &str) -> Result<User, Status> {
    register_through(&app.channel, name, &format!("{name}@example.com")).await
}

pub(super) async fn register_through(
    channel: &Channel,
    name: &str,
    email: &str,
) -> Result<User, Status> {
    let request = RegisterRequest {
        email: email.to_owned(),
        username: name.to_owned(),
        full_name: "A Person".to_owned(),
        password: PASSWORD.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    Ok(auth
        .register(request)
        .await?
        .into_inner()
        .user
        .expect("a user"))
}

pub(super) async fn verify(app: &TestApp, token: &str) -> Result<(), Status> {
    verify_through(&app.channel, token).await
}

async fn verify_through(channel: &Channel, token: &str) -> Result<(), Status> {
    let token = token.to_owned();
    let mut auth = AuthServiceClient::new(channel.clone());
    auth.verify_email(VerifyEmailRequest { token })
        .await
        .map(drop)
}

pub(super) async fn ask_reset(app: &TestApp, email: &str) -> Result<(), Status> {
    let email = email.to_owned();
    let request = RequestPasswordResetRequest { email };
    app.auth("").request_password_reset(request).await.map(drop)
}

pub(super) async fn reset(
    app: &TestApp,
    token: &str,
    new: &str,
) -> Result<ResetPasswordResponse, Status> {
    reset_through(&app.channel, token, new).await
}

async fn reset_through(
    channel: &Channel,
    token: &str,
    new: &str,
) -> Result<ResetPasswordResponse, Status> {
    let request = ResetPasswordRequest {
        token: token.to_owned(),
        new_password: new.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    Ok(auth.reset_password(request).await?.into_inner())
}

pub(super) async fn send(app: &TestApp, token: &str) -> Result<bool, Status> {
    let request = SendEmailVerificationRequest {};
    let answer = app.auth(token).send_email_verification(request).await?;
    Ok(answer.into_inner().already_verified)
}

pub(super) async fn me(app: &TestApp, token: &str) -> User {
    let mut auth = app.auth(token);
    let me = auth.get_current_user(GetCurrentUserRequest {}).await;
    me.unwrap().into_inner().user.unwrap()
}

/// Lets everybody ask for another mail.
pub(super) async fn forget_intervals(app: &TestApp) {
    app.sql("DELETE FROM login_throttle WHERE subject LIKE 'mail %'")
        .await;
}

/// Says that users have proven their addresses.
pub(super) async fn proven(app: &TestApp) {
    app.sql("UPDATE users SET email_verified_at = now()").await;
}

pub(super) async fn reset_token(app: &TestApp, mailbox: &Mailbox, user: &TestUser) -> String {
    let before = mailbox.to(&user.email).len();
    ask_reset(app, &user.email).await.unwrap();
    mailbox.nth(&user.email, before + 1).await.token()
}

async fn trail(app: &TestApp, action: &str) -> i64 {
    let statement = format!("SELECT count(*) FROM audit_events WHERE action = '{action}'");
    app.count(&statement).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_registers_is_mailed_and_verifies_the_address_once() {
    let (app, mailbox) = mailing(|_| {}).await;
    register(&app, "ada").await.unwrap();
    let letter = mailbox.nth("ada@example.com", 1).await;
    assert_eq!(letter.subject, "Verify your e-mail address");
    let tokens = app.login_as("ada", PASSWORD).await.unwrap();
    assert!(
        me(&app, &tokens.access_token)
            .await
            .email_verified_at
            .is_none()
    );
    verify(&app, &letter.token()).await.unwrap();
    assert!(
        me(&app, &tokens.access_token)
            .await
            .email_verified_at
            .is_some()
    );
    let again = verify(&app, &letter.token()).await;
    assert_refused(again, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
    assert!(send(&app, &tokens.access_token).await.unwrap());
    assert_eq!(app.count(TOKENS).await, 0);
    assert_eq!(trail(&app, "email.verified").await, 1);
    assert_eq!(mailbox.all().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_sets_the_password_ends_all_sessions_everywhere_and_opens_none() {
    let (app, mailbox) = mailing(|_| {}).await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    proven(&app).await;
    let sessions = [app.login(&user).await, app.login(&user).await];
    let api_key = app.api_key(&user, &[]).await;
    let key = &app.service_key;
    for session in &sessions {
        let asked = validate_through(&replica.channel(), key, &session.access_token).await;
        asked.unwrap();
    }
    // In any case, and to the address as the account has it.
    ask_reset(&app, &user.email.to_uppercase()).await.unwrap();
    let letter = mailbox.nth(&user.email, 1).await;
    assert_eq!(letter.subject, "Set a new password");
    let sessions_before = app.count("SELECT count(*) FROM sessions").await;
    let done = reset_through(&replica.channel(), &letter.token(), NEW).await;
    // One more was opened to make the key.
    assert_eq!(done.unwrap().revoked_count, 3);
    assert_eq!(
        app.count("SELECT count(*) FROM sessions").await,
        sessions_before
    );
    for session in &sessions {
        for channel in [app.channel.clone(), replica.channel()] {
            eventually("it has ended", async || {
                let asked = validate_through(&channel, key, &session.access_token).await;
                asked.is_err_and(|refused| reason(&refused) == "SESSION_ENDED")
            })
            .await;
        }
        let refused = refresh(&app, &session.refresh_token).await;
        assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    }
    app.validate(&api_key.text).await.unwrap();
    let refused = app.login_as(&user.email, PASSWORD).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    let tokens = app.login_as(&user.email, NEW).await.unwrap();
    me(&app, &tokens.access_token).await;
    let notice = mailbox.nth(&user.email, 2).await;
    assert_eq!(notice.subject, "Your password was changed");
    assert!(notice.text.contains(&user.username));
    let details = "SELECT details::text FROM audit_events WHERE action = 'password.reset'";
    let rows = app.sql(details).await;
    let details: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    assert_eq!(details, [r#"{"sessions_ended": 3}"#]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_twenty_who_use_a_token_at_once_one_does() {
    let (app, mailbox) = mailing(|_| {}).await;
    let replica = app.replica().await;
    let channels = [app.channel.clone(), replica.channel()];
    let user = app.user().create().await;
    let token = reset_token(&app, &mailbox, &user).await;
    let passwords: Vec<String> = (0..20).map(|n| format!("{NEW} number {n}")).collect();
    let calls = passwords.iter().zip(channels.iter().cycle());
    let outcomes = join_all(calls.map(|(new, on)| reset_through(on, &token, new))).await;
    let won = outcomes.iter().position(Result::is_ok).expect("one wins");
    for (number, outcome) in outcomes.into_iter().enumerate() {
        if number != won {
            assert_refused(outcome, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
        }
    }
    app.login_as(&user.email, &passwords[won]).await.unwrap();
    assert_eq!(trail(&app, "password.reset").await, 1);

    register(&app, "ada").await.unwrap();
    let token = mailbox.nth("ada@example.com", 1).await.token();
    let calls = (0..20).zip(channels.iter().cycle());
    let outcomes = join_all(calls.map(|(_, on)| verify_through(on, &token))).await;
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    assert_eq!(trail(&app, "email.verified").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_not_good_is_refused_for_one_reason_whatever_is_wrong() {
    let (app, mailbox) = mailing(|_| {}).await;
    let refused = async |outcome: Result<(), Status>| {
        let status = assert_refused(outcome, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
        assert_eq!(status.message(), "the token is not valid");
    };
    let both = async |token: &str| {
        refused(verify(&app, token).await).await;
        refused(reset(&app, token, NEW).await.map(drop)).await;
    };
    let user = app.user().create().await;
    let first = reset_token(&app, &mailbox, &user).await;
    both("tko_").await;
    both("no token of ours").await;
    both(&first[..67]).await;
    both(&format!("{first}A")).await;
    both(&first.replacen("tko_", "tkr_", 1)).await;
    // For something else.
    refused(verify(&app, &first).await).await;
    register(&app, "ada").await.unwrap();
    let proof = mailbox.nth("ada@example.com", 1).await.token();
    refused(reset(&app, &proof, NEW).await.map(drop)).await;
    // A newer one takes its place.
    forget_intervals(&app).await;
    let second = reset_token(&app, &mailbox, &user).await;
    assert_ne!(first, second);
    both(&first).await;
    // Past its time.
    app.sql("UPDATE one_time_tokens SET expires_at = now()")
        .await;
    both(&second).await;
    refused(verify(&app, &proof).await).await;
    // Of an account that is turned off meanwhile.
    forget_intervals(&app).await;
    let third = reset_token(&app, &mailbox, &user).await;
    app.disable(&user.id).await;
    both(&third).await;
    app.enable(&user.id).await;
    both(&third).await;
    forget_intervals(&app).await;
    let third = reset_token(&app, &mailbox, &user).await;
    // To an address that is the user's no more.
    let moved = format!(
        "UPDATE users SET email = 'other@example.com' WHERE id = '{}'",
        user.id
    );
    app.sql(&moved).await;
    both(&third).await;
    app.sql(&format!(
        "UPDATE users SET email = '{}' WHERE id = '{}'",
        user.email, user.id
    ))
    .await;
    app.login(&user).await;
    reset(&app, &third, NEW).await.unwrap();
    both(&third).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_may_not_be_set_leaves_the_token_good() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().username("countess1815").create().await;
    let token = reset_token(&app, &mailbox, &user).await;
    for weak in ["short", "password1234", "countess1815"] {
        assert_invalid(reset(&app, &token, weak).await, &["new_password"]);
    }
    reset(&app, &token, NEW).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_password_ends_the_reset_that_somebody_asked_for_before() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    proven(&app).await;
    let token = reset_token(&app, &mailbox, &user).await;
    let session = app.login(&user).await.access_token;
    let request = ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: NEW.to_owned(),
        keep_other_sessions: false,
    };
    app.auth(&session).change_password(request).await.unwrap();
    let refused = reset(&app, &token, PASSWORD).await;
    assert_refused(refused, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
    let notice = mailbox.nth(&user.email, 2).await;
    assert_eq!(notice.subject, "Your password was changed");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_mailed_who_is_disabled_or_has_no_password_or_no_account() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    app.disable(&user.id).await;
    let other = app.user().create().await;
    app.sql(&format!(
        "UPDATE users SET password_hash = NULL WHERE id = '{}'",
        other.id
    ))
    .await;
    for email in [&*user.email, &*other.email, "nobody@example.com"] {
        ask_reset(&app, email).await.unwrap();
    }
    // What was written for nobody is taken away again.
    eventually("none waits", async || {
        app.count("SELECT count(*) FROM outbox").await == 0
    })
    .await;
    assert!(mailbox.all().is_empty());
    let theirs = "SELECT count(*) FROM one_time_tokens JOIN users ON users.id = user_id";
    assert_eq!(app.count(theirs).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_addresses_must_be_verified_nobody_logs_in_before() {
    let (app, mailbox) = mailing(|s| s.auth.require_verified_email = true).await;
    register(&app, "ada").await.unwrap();
    mailbox.nth("ada@example.com", 1).await;
    forget_intervals(&app).await;
    let refused = app.login_as("ada", "not the password").await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    let refused = app.login_as("ada", PASSWORD).await;
    assert_refused(refused, Code::FailedPrecondition, "EMAIL_UNVERIFIED");
    // Who has the password has another mail, one in a while.
    let letter = mailbox.nth("ada@example.com", 2).await;
    for _ in 0..3 {
        let refused = app.login_as("ada", PASSWORD).await;
        assert_refused(refused, Code::FailedPrecondition, "EMAIL_UNVERIFIED");
    }
    verify(&app, &letter.token()).await.unwrap();
    let tokens = app.login_as("ada", PASSWORD).await.unwrap();
    eventually("no mail waits", async || app.count(PENDING).await == 0).await;
    assert_eq!(mailbox.all().len(), 2);

    // An address that somebody else gave them.
    app.sql("UPDATE users SET email_verified_at = NULL").await;
    forget_intervals(&app).await;
    let refused = app.login_as("ada", PASSWORD).await;
    assert_refused(refused, Code::FailedPrecondition, "EMAIL_UNVERIFIED");
    let letter = mailbox.nth("ada@example.com", 3).await;
    // What clients do by themselves neither mails nor ends the link.
    for _ in 0..2 {
        forget_intervals(&app).await;
        let refused = refresh(&app, &tokens.refresh_token).await;
        assert_refused(refused, Code::FailedPrecondition, "EMAIL_UNVERIFIED");
    }
    assert_eq!(app.count(PENDING).await, 0);
    assert_eq!(mailbox.all().len(), 3);
    verify(&app, &letter.token()).await.unwrap();
    // The token was not used up.
    refresh(&app, &tokens.refresh_token).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_mails_are_sent_what_needs_them_says_so_whoever_asks() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let session = app.login(&user).await.access_token;
    let refused = |outcome: Result<(), Status>| {
        assert_refused(outcome, Code::FailedPrecondition, "MAIL_NOT_CONFIGURED");
    };
    refused(send(&app, &session).await.map(drop));
    refused(ask_reset(&app, &user.email).await);
    refused(ask_reset(&app, "nobody@example.com").await);
    register(&app, "ada").await.unwrap();
    assert_eq!(app.count("SELECT count(*) FROM outbox").await, 0);
    assert_eq!(app.count(TOKENS).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leaked_database_makes_no_token() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    let token = reset_token(&app, &mailbox, &user).await;
    let rows = app
        .sql(
            "SELECT row_to_json(t)::text FROM one_time_tokens t
             UNION ALL SELECT row_to_json(t)::text FROM outbox t
             UNION ALL SELECT row_to_json(t)::text FROM audit_events t
             UNION ALL SELECT row_to_json(t)::text FROM login_throttle t",
        )
        .await;
    assert!(rows.len() > 3);
    for row in &rows {
        let text: &str = row.get(0);
        // Of the token, of its random part, and of the address where none belongs.
        assert!(
            !text.contains(&token[4..]) && !text.contains(&token[30..]),
            "{text}"
        );
        assert!(!text.contains("payload") || !text.contains('@'), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_deleted_leaves_no_token_and_no_mail() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    let other = app.user().create().await;
    reset_token(&app, &mailbox, &other).await;
    let token = reset_token(&app, &mailbox, &user).await;
    let insert = "INSERT INTO outbox (id, kind, payload, available_at)
         SELECT gen_random_uuid(), 'mail', jsonb_build_object('user_id', id), now() + interval '1 h'
         FROM users";
    app.sql(insert).await;
    let request = DeleteUserRequest {
        user_id: user.id.clone(),
        reason: String::new(),
    };
    let mut admin = app.admin(&app.service_key);
    admin.delete_user(request).await.unwrap();
    let refused = reset(&app, &token, NEW).await;
    assert_refused(refused, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
    for table in ["one_time_tokens", "outbox", "login_throttle"] {
        let left = format!(
            "SELECT count(*) FROM {table} t WHERE t::text LIKE '%{}%'",
            user.id
        );
        assert_eq!(app.count(&left).await, 0, "{table}");
        let left = format!(
            "SELECT count(*) FROM {table} t WHERE t::text LIKE '%{}%'",
            other.id
        );
        assert!(
            table == "login_throttle" || app.count(&left).await > 0,
            "{table}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_past_their_time_are_swept() {
    let app = TestApp::spawn().await;
    app.sql(
        "INSERT INTO one_time_tokens (id, user_id, purpose, token_hash, email, expires_at)
         SELECT gen_random_uuid(), gen_random_uuid(), 'reset_password', sha256(n::text::bytea),
             'a@example.com', now() + (n - 10) * interval '1 minute' FROM generate_series(1, 20) n",
    )
    .await;
    let _replica = app.replica().await;
    eventually("swept", async || app.count(TOKENS).await == 10).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_from_elsewhere_is_told_where_that_is_wanted() {
    let (app, mailbox) = mailing(|s| s.mail.notify_logins = true).await;
    let user = app.user().create().await;
    proven(&app).await;
    // The first of all, and one like it.
    for _ in 0..2 {
        app.login(&user).await;
    }
    let elsewhere = app.running().channel_from([127, 0, 0, 9]);
    crate::harness::login_through(&elsewhere, &user.email, PASSWORD)
        .await
        .unwrap();
    let letter = mailbox.nth(&user.email, 1).await;
    assert_eq!(letter.subject, "New login");
    assert!(
        letter.text.contains("Address: 127.0.0.9"),
        "{}",
        letter.text
    );
    crate::harness::login_through(&elsewhere, &user.email, PASSWORD)
        .await
        .unwrap();
    eventually("no mail waits", async || app.count(PENDING).await == 0).await;
    assert_eq!(mailbox.all().len(), 1);
}
