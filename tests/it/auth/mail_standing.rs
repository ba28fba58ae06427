//! Who mailed tokens let in, and where else they are refused.

use prost_types::FieldMask;
use tollkeeper::proto::tollkeeper::auth::v1::{
    ChangePasswordRequest, LoginRequest, UpdateCurrentUserRequest, User,
};
use tonic::Code;

use super::{
    assert_refused,
    mail::{NEW, mailing, me, proven, reset, reset_token, verify},
    mfa::{enable_through, enroll},
    refresh,
};
use crate::harness::{PASSWORD, login_through};

/// Whoever registers with the address of somebody else waits for them to come.
#[tokio::test(flavor = "multi_thread")]
async fn who_sets_the_password_of_an_account_made_for_them_is_alone_in_it() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    let session = app.login(&user).await;
    let key = app.api_key(&user, &[]).await;
    let wish = UpdateCurrentUserRequest {
        user: Some(User {
            email: "mallory@example.com".to_owned(),
            ..User::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["email".to_owned()],
        }),
        current_password: PASSWORD.to_owned(),
    };
    let mut auth = app.auth(&session.access_token);
    auth.update_current_user(wish).await.unwrap();
    let planted = mailbox.nth("mallory@example.com", 1).await.token();

    let token = reset_token(&app, &mailbox, &user).await;
    reset(&app, &token, NEW).await.unwrap();
    let refused = verify(&app, &planted).await;
    assert_refused(refused, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
    let refused = refresh(&app, &session.refresh_token).await;
    assert_refused(refused, Code::Unauthenticated, "SESSION_ENDED");
    let refused = app.validate(&key.text).await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
    let tokens = app.login_as(&user.email, NEW).await.unwrap();
    // It was mailed there, so it is theirs.
    let me = me(&app, &tokens.access_token).await;
    assert!(me.email == user.email && me.email_verified_at.is_some());
    let details = "SELECT details ->> 'api_keys_revoked' FROM audit_events
         WHERE action = 'password.reset'";
    assert_eq!(app.sql(details).await[0].get::<_, &str>(0), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_to_verify_the_address_is_told_so_before_a_second_factor_is_asked_for() {
    let (app, _mailbox) = mailing(|s| s.auth.require_verified_email = true).await;
    let user = app.user().create().await;
    proven(&app).await;
    let token = app.login(&user).await.access_token;
    enable_through(&app.channel, &token, PASSWORD).await;
    let request = LoginRequest {
        identifier: user.email.clone(),
        password: PASSWORD.to_owned(),
    };
    let answer = app.auth("").login(request.clone()).await.unwrap();
    assert!(answer.into_inner().mfa_challenge.is_some());
    app.sql("UPDATE users SET email_verified_at = NULL").await;
    let refused = app.auth("").login(request).await;
    assert_refused(refused, Code::FailedPrecondition, "EMAIL_UNVERIFIED");
}

/// Nobody could let the first administrator in.
#[tokio::test(flavor = "multi_thread")]
async fn an_account_that_an_operator_makes_may_log_in_where_addresses_must_be_verified() {
    let (app, mailbox) = mailing(|s| s.auth.require_verified_email = true).await;
    app.login_as(&app.admin_email, PASSWORD).await.unwrap();
    // What an administrator makes is no operator's.
    let user = app.user().create().await;
    let refused = app.login_as(&user.email, PASSWORD).await;
    assert_refused(refused, Code::FailedPrecondition, "EMAIL_UNVERIFIED");
    mailbox.nth(&user.email, 1).await;
    assert_eq!(mailbox.all().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notice_goes_to_who_had_the_address_when_it_happened() {
    let (app, mailbox) = mailing(|s| s.mail.notify_logins = true).await;
    let user = app.user().create().await;
    let token = reset_token(&app, &mailbox, &user).await;
    let hold = "ALTER TABLE outbox ALTER available_at SET DEFAULT now() + interval '1 h'";
    app.sql(hold).await;
    reset(&app, &token, NEW).await.unwrap();
    app.login_as(&user.email, NEW).await.unwrap();
    let elsewhere = app.running().channel_from([127, 0, 0, 9]);
    login_through(&elsewhere, &user.email, NEW).await.unwrap();
    let moved = format!(
        "UPDATE users SET email = 'other@example.com' WHERE id = '{}'",
        user.id
    );
    app.sql(&moved).await;
    app.sql("UPDATE outbox SET available_at = now()").await;
    // Whichever goes first.
    mailbox.nth(&user.email, 3).await;
    let told = mailbox.to(&user.email);
    let subjects: Vec<_> = told[1..].iter().map(|letter| &*letter.subject).collect();
    assert_eq!(subjects, ["Your password was changed", "New login"]);
    assert!(mailbox.to("other@example.com").is_empty());
}

/// Confirming asks for no password: somebody who knew the old one must not come back by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_factor_that_nobody_confirmed_ends_with_the_password() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    proven(&app).await;
    let enrolled = async || app.count("SELECT count(*) FROM totp_credentials").await;
    let token = app.login(&user).await.access_token;
    enroll(&app, &token, PASSWORD).await.unwrap();
    assert_eq!(enrolled().await, 1);
    let reset_by = reset_token(&app, &mailbox, &user).await;
    reset(&app, &reset_by, NEW).await.unwrap();
    assert_eq!(enrolled().await, 0);
    let tokens = app.login_as(&user.email, NEW).await.unwrap();
    let token = tokens.access_token;
    enroll(&app, &token, NEW).await.unwrap();
    let request = ChangePasswordRequest {
        current_password: NEW.to_owned(),
        new_password: PASSWORD.to_owned(),
        keep_other_sessions: true,
    };
    app.auth(&token).change_password(request).await.unwrap();
    assert_eq!(enrolled().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_leaves_the_second_factor_and_the_login_asks_for_it() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    proven(&app).await;
    let token = app.login(&user).await.access_token;
    enable_through(&app.channel, &token, PASSWORD).await;
    let token = reset_token(&app, &mailbox, &user).await;
    reset(&app, &token, NEW).await.unwrap();
    let request = LoginRequest {
        identifier: user.email.clone(),
        password: NEW.to_owned(),
    };
    let answer = app.auth("").login(request).await.unwrap().into_inner();
    assert!(answer.tokens.is_none() && answer.mfa_challenge.is_some());
}
