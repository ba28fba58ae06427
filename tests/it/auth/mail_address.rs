//! Another e-mail address: it counts once it is proven, and not before.

use prost_types::FieldMask;
use tollkeeper::proto::tollkeeper::{
    admin::v1::UpdateUserRequest,
    auth::v1::{ChangePasswordRequest, RevokeAllSessionsRequest, UpdateCurrentUserRequest, User},
};
use tonic::{Code, Status};

use super::{
    assert_invalid, assert_refused,
    mail::{
        NEW, PENDING, TOKENS, ask_reset, forget_intervals, mailing, me, proven, register_through,
        reset, verify,
    },
};
use crate::harness::{PASSWORD, TestApp, TestUser, eventually};

async fn wish_with(
    app: &TestApp,
    token: &str,
    email: &str,
    password: &str,
) -> Result<User, Status> {
    let request = UpdateCurrentUserRequest {
        user: Some(User {
            email: email.to_owned(),
            ..User::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["email".to_owned()],
        }),
        current_password: password.to_owned(),
    };
    let answer = app.auth(token).update_current_user(request).await?;
    Ok(answer.into_inner().user.expect("a user"))
}

async fn wish(app: &TestApp, token: &str, email: &str) -> Result<User, Status> {
    wish_with(app, token, email, PASSWORD).await
}

#[tokio::test(flavor = "multi_thread")]
async fn another_address_counts_once_it_is_proven_and_the_old_one_is_told() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    proven(&app).await;
    let token = app.login(&user).await.access_token;
    let answer = wish(&app, &token, "New@example.com").await.unwrap();
    assert_eq!(answer.email, user.email);
    let letter = mailbox.nth("New@example.com", 1).await;
    assert_eq!(letter.subject, "Verify your new e-mail address");
    assert!(
        !letter.text.contains(&user.username),
        "a stranger may read it"
    );
    let warning = mailbox.nth(&user.email, 1).await;
    assert_eq!(warning.subject, "Another e-mail address was asked for");
    assert!(!warning.text.to_lowercase().contains("new@example.com"));
    app.login(&user).await;
    let refused = app.login_as("new@example.com", PASSWORD).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    // What was to be mailed to the old address is good no more.
    ask_reset(&app, &user.email).await.unwrap();
    mailbox.nth(&user.email, 2).await;

    verify(&app, &letter.token()).await.unwrap();
    let now = me(&app, &token).await;
    assert_eq!(now.email, "New@example.com");
    assert!(now.email_verified_at.is_some());
    app.login_as("new@example.com", PASSWORD).await.unwrap();
    let refused = app.login_as(&user.email, PASSWORD).await;
    assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    assert_eq!(app.count(TOKENS).await, 0);
    let notice = mailbox.nth(&user.email, 3).await;
    assert_eq!(notice.subject, "Your e-mail address was changed");
    let rows = app
        .sql(
            "SELECT action, details::text FROM audit_events WHERE action LIKE 'email.%'
             ORDER BY occurred_at",
        )
        .await;
    let rows: Vec<(&str, &str)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(
        rows,
        [("email.change_requested", "{}"), ("email.changed", "{}")]
    );
    // The old address is nowhere, also not where the notice waited.
    eventually("all are sent", async || app.count(PENDING).await == 0).await;
    let left = format!(
        "SELECT count(*) FROM outbox WHERE payload::text LIKE '%{}%'",
        user.email
    );
    assert_eq!(app.count(&left).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_know_the_password_gets_no_other_address() {
    let (app, mailbox) = mailing(|s| s.throttle.account_failures = 1).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    for _ in 0..2 {
        let refused = wish_with(&app, &token, "new@example.com", "not the password").await;
        assert_refused(refused, Code::Unauthenticated, "INVALID_CREDENTIALS");
    }
    let refused = wish(&app, &token, "new@example.com").await;
    assert_refused(refused, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    let refused = wish_with(&app, &token, "new", "").await;
    assert_invalid(refused, &["user.email", "current_password"]);
    assert!(mailbox.all().is_empty());
    assert_eq!(app.count(TOKENS).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_wish_replaces_the_older_and_the_present_address_takes_it_back() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    wish(&app, &token, "one@example.com").await.unwrap();
    let first = mailbox.nth("one@example.com", 1).await.token();
    let refused = wish(&app, &token, "two@example.com").await;
    assert_refused(refused, Code::ResourceExhausted, "MAIL_TOO_SOON");
    forget_intervals(&app).await;
    wish(&app, &token, "two@example.com").await.unwrap();
    let second = mailbox.nth("two@example.com", 1).await.token();
    let refused = verify(&app, &first).await;
    assert_refused(refused, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
    wish(&app, &token, &user.email).await.unwrap();
    let refused = verify(&app, &second).await;
    assert_refused(refused, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
    assert_eq!(me(&app, &token).await.email, user.email);
    // There is nothing more to take back.
    wish(&app, &token, &user.email).await.unwrap();
    let cancelled = "SELECT count(*) FROM audit_events WHERE action = 'email.change_cancelled'";
    assert_eq!(app.count(cancelled).await, 1);
    // An address that nobody has proven may be a stranger's: nothing was told there.
    assert!(mailbox.to(&user.email).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_of_somebody_else_is_not_told_to_be_theirs() {
    let (app, mailbox) = mailing(|_| {}).await;
    let (user, other) = (app.user().create().await, app.user().create().await);
    let token = app.login(&user).await.access_token;
    let taken = wish(&app, &token, &other.email.to_uppercase())
        .await
        .unwrap();
    forget_intervals(&app).await;
    let free = wish(&app, &token, "free@example.com").await.unwrap();
    assert_eq!(taken, free);
    let letter = mailbox.nth("free@example.com", 1).await;
    assert_eq!(mailbox.all().len(), 1);
    // Somebody takes it in between.
    register_through(&app.channel, "quicker", "FREE@example.com")
        .await
        .unwrap();
    for _ in 0..2 {
        let refused = verify(&app, &letter.token()).await;
        assert_refused(refused, Code::AlreadyExists, "ACCOUNT_EXISTS");
    }
    assert_eq!(me(&app, &token).await.email, user.email);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_spelling_of_ones_own_address_is_not_somebody_elses() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let spelt = user.email.to_uppercase();
    wish(&app, &token, &spelt).await.unwrap();
    let letter = mailbox.nth(&spelt, 1).await;
    verify(&app, &letter.token()).await.unwrap();
    assert_eq!(me(&app, &token).await.email, spelt);
}

async fn change_password(app: &TestApp, token: &str, keep_other_sessions: bool) {
    let request = ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: NEW.to_owned(),
        keep_other_sessions,
    };
    app.auth(token).change_password(request).await.unwrap();
}

async fn set_address(app: &TestApp, user: &TestUser, email: &str) {
    let named = User {
        id: user.id.clone(),
        email: email.to_owned(),
        ..User::default()
    };
    let request = UpdateUserRequest {
        user: Some(named),
        update_mask: Some(FieldMask {
            paths: vec!["email".to_owned()],
        }),
    };
    let mut admin = app.admin(&app.service_key);
    admin.update_user(request).await.unwrap();
}

/// Who had the password for a while asked for an address of theirs. Whatever keeps them out keeps that out.
#[tokio::test(flavor = "multi_thread")]
async fn a_wish_does_not_outlive_what_is_done_against_who_made_it() {
    let (app, mailbox) = mailing(|_| {}).await;
    for deed in 0..8 {
        let user = app.user().create().await;
        proven(&app).await;
        let token = app.login(&user).await.access_token;
        let evil = format!("mallory{deed}@example.org");
        wish(&app, &token, &evil).await.unwrap();
        let planted = mailbox.nth(&evil, 1).await.token();
        let mut email = user.email.clone();
        match deed {
            0 => change_password(&app, &token, true).await,
            1 => change_password(&app, &token, false).await,
            2 => {
                ask_reset(&app, &user.email).await.unwrap();
                let letter = mailbox.nth(&user.email, 2).await;
                reset(&app, &letter.token(), NEW).await.unwrap();
            }
            3 => {
                email = "corrected@example.com".to_owned();
                set_address(&app, &user, &email).await;
            }
            4 => set_address(&app, &user, &user.email).await,
            5 => {
                app.disable(&user.id).await;
                app.enable(&user.id).await;
            }
            _ => {
                let keep_current = deed == 6;
                let request = RevokeAllSessionsRequest { keep_current };
                let mut auth = app.auth(&token);
                auth.revoke_all_sessions(request).await.unwrap();
            }
        }
        let refused = verify(&app, &planted).await;
        assert_refused(refused, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
        let now = format!("SELECT count(*) FROM users WHERE email = '{email}'");
        assert_eq!(app.count(&now).await, 1, "deed {deed}");
        assert_eq!(app.count(TOKENS).await, 0, "deed {deed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_does_not_outlive_what_an_administrator_does() {
    let (app, mailbox) = mailing(|_| {}).await;
    for moves in [false, true] {
        let user = app.user().create().await;
        ask_reset(&app, &user.email).await.unwrap();
        let planted = mailbox.nth(&user.email, 1).await.token();
        if moves {
            let other = format!("other-{}", user.email);
            set_address(&app, &user, &other).await;
            set_address(&app, &user, &user.email).await;
        } else {
            app.disable(&user.id).await;
            app.enable(&user.id).await;
        }
        let refused = reset(&app, &planted, NEW).await;
        assert_refused(refused, Code::InvalidArgument, "ONE_TIME_TOKEN_INVALID");
    }
}
