use std::{collections::HashSet, path::Path, time::Duration};

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tollkeeper::{
    auth::{KeyRing, generate_key_file, list_key_files},
    config::{Secret, SigningAlgorithm},
    proto::tollkeeper::auth::v1::{
        GetJwksRequest, GetJwksResponse, auth_service_client::AuthServiceClient,
    },
};
use tonic::{Code, transport::Channel};

use super::{assert_refused, credential, python::python};
use crate::harness::{TestApp, validate_through};

async fn spawn(algorithm: SigningAlgorithm) -> TestApp {
    TestApp::spawn_with(|settings| {
        settings.auth.algorithm = algorithm;
        settings.auth.jwt_secret = Secret::new("a secret of the tests of thirty-two bytes or more");
    })
    .await
}

async fn jwks_over(channel: Channel) -> GetJwksResponse {
    let answer = AuthServiceClient::new(channel)
        .get_jwks(GetJwksRequest {})
        .await;
    answer.unwrap().into_inner()
}

async fn access_token(app: &TestApp) -> String {
    app.login(&app.user().create().await).await.access_token
}

/// One of the three parts of a JWT.
fn part(token: &str, index: usize) -> Value {
    let part = token.split('.').nth(index).expect("three parts");
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).expect("base64url")).expect("JSON")
}

/// RFC 7638 §3: the required members only, in lexicographic order, without space.
fn thumbprint(jwk: &Value) -> String {
    let members: &[&str] = match jwk["kty"].as_str().unwrap() {
        "OKP" => &["crv", "kty", "x"],
        "EC" => &["crv", "kty", "x", "y"],
        "RSA" => &["e", "kty", "n"],
        other => panic!("{other}"),
    };
    let members: Vec<String> = members
        .iter()
        .map(|name| format!("\"{name}\":{}", jwk[name]))
        .collect();
    let text = format!("{{{}}}", members.join(","));
    URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, text.as_bytes()))
}

/// Verifies a token by the published keys alone, with `PyJWT`; returns its claims.
fn verified_by_python(token: &str, jwks: &GetJwksResponse) -> Value {
    const VERIFY: &str = r#"
import json, sys
import jwt
given = json.load(sys.stdin)
header = jwt.get_unverified_header(given["token"])
key = jwt.PyJWKSet.from_dict(given["jwks"])[header["kid"]]
claims = jwt.decode(
    given["token"], key, algorithms=[header["alg"]], audience="tollkeeper", issuer="tollkeeper",
    options={"require": ["iss", "sub", "aud", "exp", "iat", "jti", "sid", "epoch"]})
json.dump(claims, sys.stdout)
"#;
    let jwks: Value = serde_json::from_str(&jwks.json).expect("JSON");
    python(VERIFY, &json!({"token": token, "jwks": jwks}))
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_each_public_algorithm_are_accepted_here_and_elsewhere() {
    use SigningAlgorithm::{EdDsa, Es256, Rs256};
    for (algorithm, alg, kty) in [
        (EdDsa, "EdDSA", "OKP"),
        (Es256, "ES256", "EC"),
        (Rs256, "RS256", "RSA"),
    ] {
        let app = spawn(algorithm).await;
        let user = app.user().create().await;
        let tokens = app.login(&user).await;
        app.validate(&tokens.access_token).await.expect(alg);
        let jwks = jwks_over(app.channel.clone()).await;
        let key = &jwks.keys[0];
        assert_eq!((&*key.kty, &*key.alg, &*key.r#use), (kty, alg, "sig"));
        let header = part(&tokens.access_token, 0);
        assert_eq!(header, json!({"typ": "at+jwt", "alg": alg, "kid": key.kid}));
        let claims = verified_by_python(&tokens.access_token, &jwks);
        assert_eq!(claims["sub"], json!(user.id));
        assert_eq!(claims["sid"], json!(tokens.session_id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_is_named_by_its_thumbprint_and_published_without_its_secret() {
    use SigningAlgorithm::{EdDsa, Es256, Rs256};
    for algorithm in [EdDsa, Es256, Rs256] {
        let app = spawn(algorithm).await;
        let jwks = jwks_over(app.channel.clone()).await;
        let document: Value = serde_json::from_str(&jwks.json).unwrap();
        let [jwk] = document["keys"].as_array().unwrap().as_slice() else {
            panic!("{document}");
        };
        assert_eq!(jwk["kid"], json!(thumbprint(jwk)));
        // RFC 7518 §6 and RFC 8037 §2: the members that hold private parts.
        for secret in ["d", "p", "q", "dp", "dq", "qi", "oth", "k"] {
            assert!(jwk.get(secret).is_none(), "{secret}");
        }
        let key = &jwks.keys[0];
        let listed = json!([key.kty, key.kid, key.alg, key.r#use]);
        assert_eq!(
            listed,
            json!([jwk["kty"], jwk["kid"], jwk["alg"], jwk["use"]])
        );
        let text = |name: &str| jwk[name].as_str().unwrap_or_default();
        assert_eq!(
            [&*key.crv, &*key.x, &*key.y, &*key.n, &*key.e],
            ["crv", "x", "y", "n", "e"].map(text)
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn hs256_tokens_are_accepted_and_its_secret_is_not_published() {
    let app = spawn(SigningAlgorithm::Hs256).await;
    let token = access_token(&app).await;
    app.validate(&token).await.unwrap();
    assert_eq!(part(&token, 0)["alg"], json!("HS256"));
    let jwks = jwks_over(app.channel.clone()).await;
    assert!(jwks.keys.is_empty());
    assert_eq!(jwks.json, r#"{"keys":[]}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_name_the_session_and_hold_nothing_that_changes() {
    let app = TestApp::spawn().await;
    let user = app.user().tier("starter").create().await;
    let claims = part(&app.login(&user).await.access_token, 1);
    let names: HashSet<&str> = claims.as_object().unwrap().keys().map(|k| &**k).collect();
    // Tier, role and state are resolved live; names and addresses are nobody's business.
    let wanted = ["iss", "sub", "aud", "exp", "iat", "jti", "sid", "epoch"];
    assert_eq!(names, HashSet::from(wanted));
}

fn time(seconds: i64) -> DateTime<Utc> {
    DateTime::from_timestamp(1_700_000_000 + seconds, 0).expect("valid")
}

fn generate(folder: &Path, algorithm: SigningAlgorithm, seconds: i64) -> String {
    let path = generate_key_file(folder, algorithm, false, time(seconds)).expect("made");
    let keys = list_key_files(folder).expect("listed");
    let key = keys.into_iter().find(|key| key.path == path);
    key.expect("made").kid
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_key_signs_and_older_ones_still_verify() {
    let folder = tempfile::tempdir().unwrap();
    let old_kid = generate(folder.path(), SigningAlgorithm::EdDsa, 0);
    let app = TestApp::spawn_with(|s| folder.path().clone_into(&mut s.auth.key_dir)).await;
    let user = app.user().create().await;
    let old = app.login(&user).await.access_token;
    assert_eq!(part(&old, 0)["kid"], json!(old_kid));

    let new_kid = generate(folder.path(), SigningAlgorithm::EdDsa, 60);
    let restarted = app.replica().await;
    let request = tollkeeper::proto::tollkeeper::auth::v1::LoginRequest {
        identifier: user.email,
        password: crate::harness::PASSWORD.to_owned(),
    };
    let login = AuthServiceClient::new(restarted.channel())
        .login(request)
        .await;
    let new = login.unwrap().into_inner().tokens.unwrap().access_token;
    assert_eq!(part(&new, 0)["kid"], json!(new_kid));
    let jwks = jwks_over(restarted.channel()).await;
    let listed: HashSet<&str> = jwks.keys.iter().map(|key| &*key.kid).collect();
    assert_eq!(listed, HashSet::from([&*old_kid, &*new_kid]));
    for token in [&old, &new] {
        validate_through(&restarted.channel(), &app.service_key, token)
            .await
            .unwrap();
        verified_by_python(token, &jwks);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_another_algorithm_verifies_and_does_not_sign() {
    let folder = tempfile::tempdir().unwrap();
    let signing = generate(folder.path(), SigningAlgorithm::Es256, 0);
    let other = generate(folder.path(), SigningAlgorithm::EdDsa, 60);
    let app = TestApp::spawn_with(|settings| {
        settings.auth.algorithm = SigningAlgorithm::Es256;
        folder.path().clone_into(&mut settings.auth.key_dir);
    })
    .await;
    let token = access_token(&app).await;
    assert_eq!(part(&token, 0)["kid"], json!(signing));
    let jwks = jwks_over(app.channel.clone()).await;
    let listed: HashSet<&str> = jwks.keys.iter().map(|key| &*key.kid).collect();
    assert_eq!(listed, HashSet::from([&*signing, &*other]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_a_removed_key_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    generate(folder.path(), SigningAlgorithm::EdDsa, 0);
    let app = TestApp::spawn_with(|s| folder.path().clone_into(&mut s.auth.key_dir)).await;
    let token = access_token(&app).await;
    let [removed] = &list_key_files(folder.path()).unwrap()[..] else {
        panic!("one key was made");
    };
    std::fs::remove_file(&removed.path).unwrap();
    generate(folder.path(), SigningAlgorithm::EdDsa, 60);
    let replica = app.replica().await;
    let refused = validate_through(&replica.channel(), &app.service_key, &token).await;
    let refused = assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
    assert_eq!(credential(&refused), "token");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_replaced_under_way_sign_and_refuse_from_then_on() {
    let folder = tempfile::tempdir().unwrap();
    let ring = || KeyRing::from_folder(folder.path(), SigningAlgorithm::EdDsa).unwrap();
    let old_kid = generate(folder.path(), SigningAlgorithm::EdDsa, 0);
    let app = TestApp::spawn_with(|s| folder.path().clone_into(&mut s.auth.key_dir)).await;
    let replica = app.replica().await;
    let accepted = async |token: &str| {
        let mut answers = Vec::new();
        // Twice: the second answer may come from memory.
        for channel in [
            &app.channel,
            &app.channel,
            &replica.channel(),
            &replica.channel(),
        ] {
            answers.push(validate_through(channel, &app.service_key, token).await);
        }
        answers
    };
    let old = access_token(&app).await;
    assert!(accepted(&old).await.iter().all(Result::is_ok));

    // Known everywhere before it signs anywhere.
    let later = generate_key_file(folder.path(), SigningAlgorithm::EdDsa, true, time(60)).unwrap();
    app.running().auth.replace_keys(ring());
    replica.auth.replace_keys(ring());
    assert_eq!(part(&access_token(&app).await, 0)["kid"], json!(old_kid));
    let signing = later.to_string_lossy().replace(".next.pem", ".pem");
    std::fs::rename(&later, signing).unwrap();
    app.running().auth.replace_keys(ring());
    let new = access_token(&app).await;
    assert_ne!(part(&new, 0)["kid"], json!(old_kid));
    assert!(
        accepted(&new).await.iter().all(Result::is_ok),
        "also where the old one signs"
    );
    assert!(accepted(&old).await.iter().all(Result::is_ok));

    let keys = list_key_files(folder.path()).unwrap();
    let removed = keys.iter().find(|key| key.kid == old_kid).unwrap();
    std::fs::remove_file(&removed.path).unwrap();
    app.running().auth.replace_keys(ring());
    replica.auth.replace_keys(ring());
    for answer in accepted(&old).await {
        assert_refused(answer, Code::Unauthenticated, "CREDENTIAL_INVALID");
    }
    assert!(accepted(&new).await.iter().all(Result::is_ok));
    let jwks = jwks_over(replica.channel()).await;
    assert!(jwks.keys.iter().all(|key| key.kid != old_kid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_forged_from_what_is_public_is_refused() {
    let app = spawn(SigningAlgorithm::Rs256).await;
    let token = access_token(&app).await;
    let jwks = jwks_over(app.channel.clone()).await;
    let jwk = serde_json::from_str::<Value>(&jwks.json).unwrap()["keys"][0].clone();
    let (header, claims) = (part(&token, 0), token.split('.').nth(1).unwrap());
    let forge = |change: Value, key: &[u8]| {
        let mut header = header.clone();
        for (name, value) in change.as_object().unwrap() {
            header[name] = value.clone();
        }
        let head = format!("{}.{claims}", URL_SAFE_NO_PAD.encode(header.to_string()));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, key);
        let mac = aws_lc_rs::hmac::sign(&key, head.as_bytes());
        format!("{head}.{}", URL_SAFE_NO_PAD.encode(mac))
    };
    let modulus = URL_SAFE_NO_PAD.decode(jwk["n"].as_str().unwrap()).unwrap();
    let unsigned = forge(json!({"alg": "none"}), b"");
    let head = unsigned.rsplit_once('.').unwrap().0;
    for (what, forged) in [
        ("no algorithm", format!("{head}.")),
        (
            "public key as a secret",
            forge(json!({"alg": "HS256"}), &modulus),
        ),
        (
            "public document as a secret",
            forge(json!({"alg": "HS256"}), jwks.json.as_bytes()),
        ),
        (
            "a key in the header",
            forge(
                json!({"alg": "HS256", "jwk": {"kty": "oct", "k": "AAAA"}}),
                &[0; 3],
            ),
        ),
        (
            "a key elsewhere",
            forge(json!({"jku": "http://127.0.0.1:9/keys"}), b"x"),
        ),
        (
            "a path as its name",
            forge(json!({"alg": "HS256", "kid": "../../dev/null"}), b""),
        ),
    ] {
        let refused = app.validate(&forged).await;
        let refused = assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
        assert_eq!(credential(&refused), "token", "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_another_audience_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    generate(folder.path(), SigningAlgorithm::EdDsa, 0);
    let key_dir = folder.path();
    let app = TestApp::spawn_with(|s| key_dir.clone_into(&mut s.auth.key_dir)).await;
    let other = TestApp::spawn_with(|settings| {
        key_dir.clone_into(&mut settings.auth.key_dir);
        settings.auth.audience = "another".to_owned();
        settings.auth.access_ttl = Duration::from_secs(60);
    })
    .await;
    let refused = app.validate(&access_token(&other).await).await;
    assert_refused(refused, Code::Unauthenticated, "CREDENTIAL_INVALID");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_was_copied_rather_than_renamed_is_published_once() {
    let folder = tempfile::tempdir().unwrap();
    let next = generate_key_file(folder.path(), SigningAlgorithm::EdDsa, true, time(0)).unwrap();
    std::fs::copy(&next, next.to_string_lossy().replace(".next.pem", ".pem")).unwrap();
    let app = TestApp::spawn_with(|s| folder.path().clone_into(&mut s.auth.key_dir)).await;
    let kid = part(&access_token(&app).await, 0)["kid"].clone();
    let jwks = jwks_over(app.channel.clone()).await;
    let published: Vec<_> = jwks.keys.iter().map(|key| json!(key.kid)).collect();
    assert_eq!(published, [kid]);
}
