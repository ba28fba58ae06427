//! Hashes of systems written in Python, made by the libraries that those systems use.

use serde_json::{Value, json};
use tollkeeper::config::PasswordScheme;
use tonic::Code;

use super::{assert_refused, python::python, stored_hash};
use crate::harness::{TestApp, TestUser};

/// Each kind of hash, of a cost below what the tests configure, and the default of argon2-cffi.
const MAKE: &str = r#"
import json, sys
import argon2, bcrypt
from passlib.hash import bcrypt as passlib_bcrypt, sha256_crypt, sha512_crypt

password = json.load(sys.stdin)["password"]
argon2_of = lambda type: argon2.PasswordHasher(
    time_cost=1, memory_cost=32, parallelism=2, type=type).hash(password)
json.dump({
    "bcrypt 2b": bcrypt.hashpw(password.encode(), bcrypt.gensalt(4)).decode(),
    "bcrypt 2a": bcrypt.hashpw(password.encode(), bcrypt.gensalt(4, prefix=b"2a")).decode(),
    "passlib bcrypt 2b": passlib_bcrypt.using(rounds=4).hash(password),
    "passlib bcrypt 2a": passlib_bcrypt.using(rounds=4, ident="2a").hash(password),
    "passlib bcrypt 2y": passlib_bcrypt.using(rounds=4, ident="2y").hash(password),
    "passlib sha512_crypt": sha512_crypt.using(rounds=1000).hash(password),
    "passlib sha512_crypt of 5000 rounds": sha512_crypt.using(rounds=5000).hash(password),
    "passlib sha512_crypt of a short salt": sha512_crypt.using(rounds=1000, salt="ab").hash(password),
    "passlib sha256_crypt": sha256_crypt.using(rounds=1000).hash(password),
    "argon2id": argon2_of(argon2.Type.ID),
    "argon2i": argon2_of(argon2.Type.I),
    "argon2d": argon2_of(argon2.Type.D),
    "argon2id by default": argon2.PasswordHasher().hash(password),
}, sys.stdout)
"#;

const KINDS: usize = 13;

/// Hashes of the password by kind.
fn hashes(password: &str) -> Vec<(String, String)> {
    let Value::Object(made) = python(MAKE, &json!({"password": password})) else {
        panic!("not an object");
    };
    assert_eq!(made.len(), KINDS);
    made.into_iter()
        .map(|(kind, hash)| (kind, hash.as_str().expect("text").to_owned()))
        .collect()
}

/// Logs in with an imported hash and returns the one stored after that, with which a further login
/// works as well.
async fn hash_after_login(app: &TestApp, kind: &str, hash: &str, password: &str) -> String {
    let user: TestUser = app.user().password_hash(hash).create().await;
    assert_eq!(stored_hash(app, &user).await, hash, "{kind}");
    let wrong = app.login_as(&user.email, "not the password").await;
    assert_refused(wrong, Code::Unauthenticated, "INVALID_CREDENTIALS");
    assert_eq!(stored_hash(app, &user).await, hash, "{kind}");
    app.login_as(&user.email, password).await.expect(kind);
    let after = stored_hash(app, &user).await;
    app.login_as(&user.email, password).await.expect(kind);
    assert_eq!(
        stored_hash(app, &user).await,
        after,
        "{kind} is upgraded once"
    );
    let wrong = app.login_as(&user.email, "not the password").await;
    assert_refused(wrong, Code::Unauthenticated, "INVALID_CREDENTIALS");
    after
}

#[tokio::test(flavor = "multi_thread")]
async fn hashes_made_by_python_are_accepted_and_upgraded_to_argon2id() {
    let app = TestApp::spawn().await;
    let password = "correct horse battery staple";
    for (kind, hash) in hashes(password) {
        let after = hash_after_login(&app, &kind, &hash, password).await;
        if kind == "argon2id by default" {
            // Stronger than configured: an upgrade would weaken it.
            assert_eq!(after, hash);
        } else {
            let upgraded = after.starts_with("$argon2id$v=19$m=64,t=1,p=1$");
            assert!(upgraded, "{kind}: {after}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hashes_made_by_python_are_accepted_and_upgraded_to_bcrypt() {
    let app = TestApp::spawn_with(|settings| {
        settings.password.scheme = PasswordScheme::Bcrypt;
        settings.password.bcrypt_cost = 5;
    })
    .await;
    let password = "pässwörd ☃ 密码";
    for (kind, hash) in hashes(password) {
        let after = hash_after_login(&app, &kind, &hash, password).await;
        assert!(after.starts_with("$2b$05$"), "{kind}: {after}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_is_one_audited_act() {
    let app = TestApp::spawn().await;
    let password = "correct horse battery staple";
    let (_, hash) = hashes(password).swap_remove(0);
    let user = app.user().password_hash(&hash).create().await;
    for _ in 0..3 {
        app.login_as(&user.email, password).await.unwrap();
    }
    let rehashed = format!(
        "SELECT count(*) FROM audit_events \
         WHERE action = 'password.rehashed' AND target_id = '{}'",
        user.id
    );
    assert_eq!(app.count(&rehashed).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn hashes_made_here_are_accepted_by_python() {
    const VERIFY: &str = r#"
import json, sys
import argon2, bcrypt
given = json.load(sys.stdin)
password = given["password"]
argon2.PasswordHasher().verify(given["argon2id"], password)
json.dump(bcrypt.checkpw(password.encode(), given["bcrypt"].encode()), sys.stdout)
"#;
    let password = crate::harness::PASSWORD;
    let argon2id = TestApp::spawn().await;
    let bcrypt = TestApp::spawn_with(|s| s.password.scheme = PasswordScheme::Bcrypt).await;
    let given = json!({
        "password": password,
        "argon2id": stored_hash(&argon2id, &argon2id.user().create().await).await,
        "bcrypt": stored_hash(&bcrypt, &bcrypt.user().create().await).await,
    });
    assert_eq!(python(VERIFY, &given), json!(true));
}
