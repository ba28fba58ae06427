use std::time::Duration;

use tollkeeper::proto::tollkeeper::{
    admin::v1::GetUserRequest,
    auth::v1::{ChangePasswordRequest, ListSessionsRequest, MfaFactor},
};
use tonic::Code;

use super::{
    super::{assert_refused, refresh, refreshed, stored_hash},
    audited, challenge, complete, enable_in, let_time_pass, login, login_with, user_with_mfa,
};
use crate::harness::{PASSWORD, TestApp, TestUser};

/// What changes when somebody is let in.
async fn traces(app: &TestApp, user: &TestUser) -> (i64, i64, bool) {
    let sessions = format!(
        "SELECT count(*) FROM sessions WHERE user_id = '{}'",
        user.id
    );
    let request = GetUserRequest {
        user_id: user.id.clone(),
    };
    let got = app.admin(&app.service_key).get_user(request).await.unwrap();
    let logged_in = got.into_inner().user.unwrap().last_login_at.is_some();
    (
        app.count(&sessions).await,
        audited(app, user, "session.opened").await,
        logged_in,
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn the_password_alone_opens_no_session_and_a_code_completes_it() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    app.sql("UPDATE users SET last_login_at = NULL").await;
    let before = traces(&app, &user).await;
    let challenge = challenge(&app, &user).await;
    assert_eq!(traces(&app, &user).await, before);
    let factors = [MfaFactor::Totp, MfaFactor::RecoveryCode].map(i32::from);
    assert_eq!(challenge.factors, factors);
    let expires_at = challenge.expires_at.unwrap().seconds;
    let left = expires_at - chrono::Utc::now().timestamp();
    assert!((290..=301).contains(&left), "{left}");

    let done = complete(&app, &challenge.challenge, &phone.code())
        .await
        .unwrap();
    assert_eq!(done.recovery_codes_left, 10);
    let me = done.user.unwrap();
    assert!(me.id == user.id && me.mfa_enabled && me.last_login_at.is_some());
    let after = traces(&app, &user).await;
    assert_eq!(after, (before.0 + 1, before.1 + 1, true));
    let details = format!(
        "SELECT details ->> 'mfa' FROM audit_events WHERE action = 'session.opened' \
         AND user_id = '{}' ORDER BY occurred_at DESC LIMIT 1",
        user.id
    );
    assert_eq!(app.sql(&details).await[0].get::<_, &str>(0), "totp");
    let tokens = done.tokens.unwrap();
    app.validate(&tokens.access_token).await.unwrap();
    refreshed(&app, &tokens.refresh_token).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_and_people_are_told_by_what_a_session_was_opened() {
    let app = TestApp::spawn().await;
    let (user, phone, first) = user_with_mfa(&app).await;
    let done = login_with(&app, &user, &phone.code()).await.unwrap();
    let tokens = done.tokens.unwrap();
    let amr = async |token: &str| app.validate(token).await.unwrap().amr;
    assert_eq!(amr(&first).await, ["pwd"]);
    assert_eq!(amr(&tokens.access_token).await, ["pwd", "otp"]);
    let next = refreshed(&app, &tokens.refresh_token).await.access_token;
    assert_eq!(amr(&next).await, ["pwd", "otp"]);
    let other = app.user().create().await;
    let key = app.api_key(&other, &[]).await.text;
    assert!(amr(&key).await.is_empty());
    let mut auth = app.auth(&next);
    let listed = auth.list_sessions(ListSessionsRequest::default());
    let listed = listed.await.unwrap().into_inner().sessions;
    let mfa: Vec<bool> = listed.iter().map(|session| session.mfa).collect();
    assert_eq!(mfa, [true, false], "newest first");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_code_is_good_a_step_before_and_after_its_own_and_once() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    // Begun late in a step, the far ends would be a step further away.
    let into_step = chrono::Utc::now().timestamp_millis() % 30_000;
    if into_step > 20_000 {
        tokio::time::sleep(Duration::from_millis(30_050 - into_step.unsigned_abs())).await;
    }
    for steps in [-2, 2] {
        let refused = login_with(&app, &user, &phone.code_in(steps)).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
    for steps in [-1, 0, 1] {
        app.sql("DELETE FROM login_throttle").await;
        login_with(&app, &user, &phone.code_in(steps))
            .await
            .unwrap();
        let refused = login_with(&app, &user, &phone.code_in(steps)).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
    app.sql("DELETE FROM login_throttle").await;
    // Those before the newest that was used are over with it.
    for steps in [-1, 0] {
        let refused = login_with(&app, &user, &phone.code_in(steps)).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_code_is_good_once_in_any_spelling() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let codes = &phone.recovery_codes;
    let spellings = [
        codes[0].clone(),
        codes[1].to_lowercase(),
        codes[2].replace('-', ""),
        codes[3].replace('-', " ").replace('0', "O"),
        format!(" {} ", codes[4].replace('1', "l")),
    ];
    for (used, code) in (1..).zip(&spellings) {
        let done = login_with(&app, &user, code).await.unwrap();
        assert_eq!(done.recovery_codes_left, 10 - used);
        assert_eq!(
            audited(&app, &user, "mfa.recovery_code_used").await,
            i64::from(used)
        );
    }
    for code in &codes[..5] {
        let refused = login_with(&app, &user, code).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_recovery_codes_none_is_asked_for_and_those_of_others_are_none() {
    let app = TestApp::spawn().await;
    let (user, _, _) = user_with_mfa(&app).await;
    let (_, other, _) = user_with_mfa(&app).await;
    let refused = login_with(&app, &user, &other.recovery_codes[0]).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    let refused = login_with(&app, &user, &other.code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    app.sql(&format!(
        "DELETE FROM recovery_codes WHERE user_id = '{}'",
        user.id
    ))
    .await;
    let challenge = challenge(&app, &user).await;
    assert_eq!(challenge.factors, [i32::from(MfaFactor::Totp)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_opens_one_session_whatever_the_code() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let used = challenge(&app, &user).await.challenge;
    let open = challenge(&app, &user).await.challenge;
    complete(&app, &used, &phone.code()).await.unwrap();
    let_time_pass(&app).await;
    for code in [
        phone.code(),
        phone.recovery_codes[0].clone(),
        phone.wrong_code(),
    ] {
        let refused = complete(&app, &used, &code).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
    }
    assert_eq!(
        audited(&app, &user, "mfa.code_refused").await,
        0,
        "not looked at"
    );
    // A login begun beside it goes on; and nothing was used up.
    let done = complete(&app, &open, &phone.recovery_codes[0])
        .await
        .unwrap();
    assert_eq!(done.recovery_codes_left, 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_code_leaves_the_challenge_as_it_is() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    let refused = complete(&app, &challenge, &phone.wrong_code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CODE_INVALID");
    complete(&app, &challenge, &phone.code()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_challenge_of_ours_is_refused() {
    let app = TestApp::spawn().await;
    let (user, phone, token) = user_with_mfa(&app).await;
    let good = challenge(&app, &user).await.challenge;
    let middle = good.len() / 2;
    let turned = if &good[middle..=middle] == "A" {
        "B"
    } else {
        "A"
    };
    let changed = format!("{}{turned}{}", &good[..middle], &good[middle + 1..]);
    let mut cut = good.clone();
    cut.pop();
    for text in ["garbage", "tkm_", &changed, &cut, &token, &app.service_key] {
        let refused = complete(&app, text, &phone.code()).await;
        assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
    }
    // Nor is it anything else.
    let refused = app.validate(&good).await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
    let refused = refresh(&app, &good).await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_expires() {
    let app = TestApp::spawn_with(|s| s.auth.mfa_challenge_ttl = Duration::ZERO).await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    let refused = complete(&app, &challenge, &phone.code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_replica_completes_it_too() {
    let app = TestApp::spawn().await;
    let replica = app.replica().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    super::complete_through(&replica.channel(), &challenge, &phone.code())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_challenge_ends_with_the_password_and_waits_while_the_account_is_disabled() {
    let app = TestApp::spawn().await;
    let (user, phone, token) = user_with_mfa(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    app.disable(&user.id).await;
    let refused = complete(&app, &challenge, &phone.code()).await;
    assert_refused(refused, Code::PermissionDenied, "ACCOUNT_DISABLED");
    let refused = login(&app, &user, PASSWORD).await;
    assert_refused(refused, Code::PermissionDenied, "ACCOUNT_DISABLED");
    app.enable(&user.id).await;
    let change = ChangePasswordRequest {
        current_password: PASSWORD.to_owned(),
        new_password: "a staple for the next battery".to_owned(),
        keep_other_sessions: true,
    };
    app.auth(&token).change_password(change).await.unwrap();
    let refused = complete(&app, &challenge, &phone.code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_epoch_ends_a_challenge() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    app.sql("UPDATE users SET auth_epoch = auth_epoch + 1")
        .await;
    let refused = complete(&app, &challenge, &phone.code()).await;
    assert_refused(refused, Code::Unauthenticated, "MFA_CHALLENGE_INVALID");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_weak_hash_is_replaced_though_the_login_asks_for_a_code() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let phone = enable_in(&app, &token).await;
    let weak = {
        let weaker = TestApp::spawn_with(|s| s.password.argon2_memory_kib = 32).await;
        stored_hash(&weaker, &weaker.user().create().await).await
    };
    app.sql(&format!(
        "UPDATE users SET password_hash = '{weak}' WHERE id = '{}'",
        user.id
    ))
    .await;
    login_with(&app, &user, &phone.code()).await.unwrap();
    let upgraded = stored_hash(&app, &user).await;
    assert!(upgraded.contains("m=64,"), "{upgraded}");
    assert_eq!(audited(&app, &user, "password.rehashed").await, 1);
    login(&app, &user, PASSWORD).await.unwrap();
    assert_eq!(stored_hash(&app, &user).await, upgraded);
}
