//! What is stored, and who keeps whom out.

use tonic::Code;

use super::{
    super::assert_refused, audited, challenge, complete, confirm, enroll, login, login_with,
    user_with_mfa,
};
use crate::harness::{PASSWORD, TestApp};

#[tokio::test(flavor = "multi_thread")]
async fn nothing_stored_tells_a_secret_or_a_code() {
    let app = TestApp::spawn().await;
    let user = app.user().create().await;
    let token = app.login(&user).await.access_token;
    let enrolled = enroll(&app, &token, PASSWORD).await.unwrap();
    let mut phone = super::Authenticator::enrolled(&enrolled.secret);
    let first = phone.code();
    phone.recovery_codes = confirm(&app, &token, &first).await.unwrap().recovery_codes;
    super::let_time_pass(&app).await;
    let challenge = challenge(&app, &user).await.challenge;
    let wrong = phone.wrong_code();
    complete(&app, &challenge, &wrong).await.unwrap_err();
    complete(&app, &challenge, &phone.code()).await.unwrap();
    login_with(&app, &user, &phone.recovery_codes[0])
        .await
        .unwrap();
    let hex: String = phone.secret.iter().map(|b| format!("{b:02x}")).collect();
    let mut secrets = vec![enrolled.secret, hex, challenge, PASSWORD.to_owned()];
    for code in &phone.recovery_codes {
        secrets.extend([code.clone(), code.replace('-', "")]);
        secrets.push(code.bytes().map(|b| format!("{b:02x}")).collect());
    }
    let mut seen = 0;
    for table in [
        "audit_events",
        "totp_credentials",
        "recovery_codes",
        "sessions",
        "login_throttle",
        "users",
        "outbox",
    ] {
        let rows = app
            .sql(&format!("SELECT row_to_json(t)::text FROM {table} t"))
            .await;
        for row in rows {
            let row: &str = row.get(0);
            seen += 1;
            for secret in &secrets {
                assert!(!row.contains(&**secret), "{table}: {secret} in {row}");
            }
            if table == "audit_events" {
                let details = format!("\"{wrong}\"");
                assert!(!row.contains(&details), "{row}");
            }
        }
    }
    assert!(seen > 15, "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_in_another_users_row_is_of_no_use() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let (_, thief, _) = user_with_mfa(&app).await;
    // Also with the enrolment's id.
    app.sql(&format!(
        "UPDATE totp_credentials AS mine SET sealed_secret = other.sealed_secret, id = other.id
         FROM totp_credentials AS other
         WHERE mine.user_id = '{0}' AND other.user_id <> '{0}'",
        user.id
    ))
    .await;
    for code in [thief.code(), phone.code()] {
        let refused = login_with(&app, &user, &code).await;
        let refused = assert_refused(refused, Code::Internal, "INTERNAL");
        assert_eq!(refused.message(), "internal error");
    }
    // What cannot be read is nobody's failure, and recovery codes need no key.
    assert_eq!(audited(&app, &user, "mfa.code_refused").await, 0);
    login_with(&app, &user, &phone.recovery_codes[0])
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_factor_that_is_gone_from_the_table_lets_nobody_in() {
    let app = TestApp::spawn().await;
    let (user, ..) = user_with_mfa(&app).await;
    app.sql("DELETE FROM totp_credentials").await;
    let refused = login(&app, &user, PASSWORD).await;
    assert_refused(refused, Code::Internal, "INTERNAL");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_itself_opens_no_session_by_password_alone() {
    let app = TestApp::spawn().await;
    let (user, phone, _) = user_with_mfa(&app).await;
    let other = app.user().create().await;
    // As replicas of the version before do it.
    let open = |id: &str| {
        format!(
            "WITH known AS (UPDATE users SET last_login_at = now() WHERE id = '{id}')
             INSERT INTO sessions (id, user_id, rotated_at, created_at, last_used_at,
                 idle_expires_at, absolute_expires_at)
             VALUES (gen_random_uuid(), '{id}', now(), now(), now(), now(), now())"
        )
    };
    app.sql(&open(&other.id)).await;
    let client = crate::harness::cluster::connect(&app.database_url).await;
    let refused = client.execute(&open(&user.id), &[]).await.unwrap_err();
    let refused = refused.as_db_error().unwrap();
    assert_eq!(refused.constraint(), Some("sessions_mfa_required"));
    login_with(&app, &user, &phone.code()).await.unwrap();
}
