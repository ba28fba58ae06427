//! How often mails go, and what those who ask can tell by it.

use std::time::Duration;

use futures_util::future::join_all;
use prost_types::FieldMask;
use tollkeeper::proto::tollkeeper::auth::v1::{
    ChangePasswordRequest, RequestPasswordResetRequest, UpdateCurrentUserRequest, User,
    auth_service_client::AuthServiceClient,
};
use tonic::{Code, Status, transport::Channel};
use tonic_types::StatusExt as _;

use super::{
    assert_refused,
    mail::{NEW, PENDING, TOKENS, ask_reset, mailing, proven, register, register_through, send},
};
use crate::harness::{PASSWORD, TestApp, eventually, login_through, with_bearer};

/// Says that so much time has passed for all who wait to mail.
async fn pass(app: &TestApp, time: &str) {
    app.sql(&format!(
        "UPDATE login_throttle SET blocked_until = blocked_until - interval '{time}',
             last_failed_at = last_failed_at - interval '{time}' WHERE subject LIKE 'mail %'"
    ))
    .await;
}

async fn ask_through(channel: &Channel, email: &str) -> Result<(), Status> {
    let email = email.to_owned();
    let request = RequestPasswordResetRequest { email };
    let mut auth = AuthServiceClient::new(channel.clone());
    auth.request_password_reset(request).await.map(drop)
}

async fn wish_through(channel: &Channel, token: &str, email: &str) -> Result<(), Status> {
    let request = UpdateCurrentUserRequest {
        user: Some(User {
            email: email.to_owned(),
            ..User::default()
        }),
        update_mask: Some(FieldMask {
            paths: vec!["email".to_owned()],
        }),
        current_password: PASSWORD.to_owned(),
    };
    let mut auth = AuthServiceClient::new(channel.clone());
    let request = with_bearer(request, token);
    auth.update_current_user(request).await.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_asks_again_waits_for_longer_each_time() {
    waits_for_longer(24, [1, 2, 4, 8, 16, 30, 30, 30]).await;
}

/// Who lost a mail is not kept waiting until it would have been good for nothing.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_longer_than_half_of_what_a_link_is_good_for() {
    waits_for_longer(0, [1, 2, 4, 5, 5, 5, 5, 5]).await;
}

async fn waits_for_longer(hours: u64, expected: [u64; 8]) {
    let ttl = Duration::from_hours(hours).max(Duration::from_mins(10));
    let (app, mailbox) = mailing(|s| s.auth.verification_ttl = ttl).await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let mut waits = Vec::new();
    for mails in 1..=8 {
        assert!(!send(&app, &token).await.unwrap());
        mailbox.nth(&user.email, mails).await;
        let refused = send(&app, &token).await;
        let status = assert_refused(refused, Code::ResourceExhausted, "MAIL_TOO_SOON");
        let wait = status
            .get_details_retry_info()
            .unwrap()
            .retry_delay
            .unwrap();
        waits.push(wait.as_secs().div_ceil(60));
        let passed = format!("{} s", wait.as_secs() + 1);
        pass(&app, &passed).await;
    }
    assert_eq!(waits, expected);
    // Who has not asked for long begins anew.
    pass(&app, "2 days").await;
    send(&app, &token).await.unwrap();
    let status = send(&app, &token).await.unwrap_err();
    let wait = status.get_details_retry_info().unwrap().retry_delay;
    assert!(wait.unwrap() <= Duration::from_secs(60));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_resets_is_one_mail_and_all_are_answered_alike() {
    let (app, mailbox) = mailing(|_| {}).await;
    let replica = app.replica().await;
    let user = app.user().create().await;
    let channels = [app.channel.clone(), replica.channel()];
    let calls = (0..20).zip(channels.iter().cycle());
    let answers = join_all(calls.map(|(_, on)| ask_through(on, &user.email))).await;
    assert!(answers.iter().all(Result::is_ok));
    mailbox.nth(&user.email, 1).await;
    eventually("no mail waits", async || app.count(PENDING).await == 0).await;
    assert_eq!(mailbox.all().len(), 1);
    pass(&app, "61 s").await;
    ask_reset(&app, &user.email).await.unwrap();
    mailbox.nth(&user.email, 2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_nobody_has_leaves_the_same_rows() {
    // Nobody sends: all that was written stays.
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    let hold = "ALTER TABLE outbox ALTER available_at SET DEFAULT now() + interval '1 h'";
    app.sql(hold).await;
    let mut before = (0, 0, 0);
    for (round, email) in [&*user.email, "nobody@example.com"].into_iter().enumerate() {
        for _ in 0..2 {
            ask_reset(&app, email).await.unwrap();
        }
        let after = (
            app.count(TOKENS).await,
            app.count("SELECT count(*) FROM outbox WHERE kind = 'mail'")
                .await,
            app.count("SELECT count(*) FROM login_throttle WHERE subject LIKE 'mail reset %'")
                .await,
        );
        let grown = (after.0 - before.0, after.1 - before.1, after.2 - before.2);
        assert_eq!(grown, (1, 1, 1), "round {round}");
        before = after;
    }
    let sizes = "SELECT count(DISTINCT (length(payload::text), kind)) FROM outbox";
    assert_eq!(app.count(sizes).await, 1);
    assert!(mailbox.all().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn throwaway_accounts_neither_flood_an_address_nor_keep_its_own_mails_back() {
    let (app, mailbox) = mailing(|_| {}).await;
    let victim = "victim@example.com";
    let elsewhere = app.running().channel_from([127, 0, 0, 9]);
    let mut asked = 0;
    for number in 0..6 {
        let name = format!("throwaway{number}");
        let email = format!("{name}@example.com");
        register_through(&elsewhere, &name, &email).await.unwrap();
        let tokens = login_through(&elsewhere, &name, PASSWORD).await.unwrap();
        match wish_through(&elsewhere, &tokens.access_token, victim).await {
            Ok(()) => asked += 1,
            refused => {
                assert_refused(refused, Code::ResourceExhausted, "MAIL_TOO_SOON");
            }
        }
    }
    assert_eq!(asked, 1);
    mailbox.nth(victim, 1).await;
    // From where they live all is as if nobody had asked.
    register_through(&app.channel, "victim", victim)
        .await
        .unwrap();
    let letter = mailbox.nth(victim, 2).await;
    assert_eq!(letter.subject, "Verify your e-mail address");
    ask_reset(&app, victim).await.unwrap();
    assert_eq!(mailbox.nth(victim, 3).await.subject, "Set a new password");
    // And what strangers wish for is not mailed any more: it is somebody's.
    pass(&app, "1 h").await;
    register_through(&elsewhere, "throwaway9", "throwaway9@example.com")
        .await
        .unwrap();
    let tokens = login_through(&elsewhere, "throwaway9", PASSWORD).await;
    let token = tokens.unwrap().access_token;
    wish_through(&elsewhere, &token, victim).await.unwrap();
    eventually("no mail waits", async || app.count(PENDING).await == 0).await;
    assert_eq!(mailbox.to(victim).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_many_resets_is_slowed_down_whoever_they_are_for() {
    let (app, mailbox) = mailing(|s| s.throttle.address_failures = 3).await;
    for number in 0..4 {
        ask_reset(&app, &format!("nobody{number}@example.com"))
            .await
            .unwrap();
    }
    let refused = ask_reset(&app, "nobody@example.com").await;
    assert_refused(refused, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    // Others may, and this one may still log in and register.
    let elsewhere = app.running().channel_from([127, 0, 0, 9]);
    ask_through(&elsewhere, "nobody@example.com").await.unwrap();
    register(&app, "ada").await.unwrap();
    app.login_as("ada", PASSWORD).await.unwrap();
    mailbox.nth("ada@example.com", 1).await;
}

/// All from one network, as behind one proxy.
#[tokio::test(flavor = "multi_thread")]
async fn what_neighbours_wish_for_keeps_nobodys_verification_back() {
    let (app, mailbox) = mailing(|_| {}).await;
    for name in ["mallory", "malvina"] {
        register(&app, name).await.unwrap();
    }
    let mallory = app
        .login_as("mallory", PASSWORD)
        .await
        .unwrap()
        .access_token;
    let malvina = app
        .login_as("malvina", PASSWORD)
        .await
        .unwrap()
        .access_token;
    wish_through(&app.channel, &mallory, "ada@example.com")
        .await
        .unwrap();
    mailbox.nth("ada@example.com", 1).await;
    register(&app, "ada").await.unwrap();
    let letter = mailbox.nth("ada@example.com", 2).await;
    assert_eq!(letter.subject, "Verify your e-mail address");
    pass(&app, "61 s").await;
    wish_through(&app.channel, &malvina, "ada@example.com")
        .await
        .unwrap();
    let ada = app.login_as("ada", PASSWORD).await.unwrap().access_token;
    send(&app, &ada).await.unwrap();
    let letter = mailbox.nth("ada@example.com", 3).await;
    assert_eq!(letter.subject, "Verify your e-mail address");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_changes_a_password_on_and_on_is_slowed_down_and_so_are_the_mails() {
    let (app, mailbox) = mailing(|_| {}).await;
    let user = app.user().create().await;
    proven(&app).await;
    let token = app.login(&user).await.access_token;
    let password = |number: u32| match number {
        0 => PASSWORD.to_owned(),
        number => format!("{NEW} number {number}"),
    };
    let change = async |number: u32| {
        let request = ChangePasswordRequest {
            current_password: password(number),
            new_password: password(number + 1),
            keep_other_sessions: true,
        };
        app.auth(&token).change_password(request).await
    };
    for number in 0..6 {
        change(number).await.unwrap();
    }
    // From here on a reset that its user asks for has time to arrive.
    ask_reset(&app, &user.email).await.unwrap();
    let refused = change(6).await;
    assert_refused(refused, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    assert_eq!(app.count(TOKENS).await, 1);
    mailbox.nth(&user.email, 7).await;
    pass(&app, "61 s").await;
    change(6).await.unwrap();
    let refused = change(7).await;
    assert_refused(refused, Code::ResourceExhausted, "TOO_MANY_ATTEMPTS");
    app.login_as(&user.email, &password(7)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn logins_from_everywhere_are_told_a_few_times() {
    let (app, mailbox) = mailing(|s| s.mail.notify_logins = true).await;
    let user = app.user().create().await;
    proven(&app).await;
    app.login(&user).await;
    for number in 1..=10 {
        let elsewhere = app.running().channel_from([127, 0, 9, number]);
        login_through(&elsewhere, &user.email, PASSWORD)
            .await
            .unwrap();
    }
    mailbox.nth(&user.email, 6).await;
    eventually("no mail waits", async || app.count(PENDING).await == 0).await;
    assert_eq!(mailbox.all().len(), 6);
}
