//! Tokens that are not what they seem. Those that a thief of the signing key could make are here, too:
//! parsing must not depend on the signature having been checked before.

use std::{path::Path, time::Duration};

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD},
};
use chrono::Utc;
use serde_json::{Value, json};
use tollkeeper::{
    auth::{generate_key_file, list_key_files},
    config::SigningAlgorithm,
    proto::tollkeeper::auth::v1::GetCurrentUserRequest,
};
use tonic::{Code, Status};
use uuid::Uuid;

use super::{assert_refused, credential};
use crate::harness::{TestApp, eventually};

const INVALID: &str = "CREDENTIAL_INVALID";
const EXPIRED: &str = "CREDENTIAL_EXPIRED";

/// A server, its signing key, and what a good token of it says.
struct Target {
    app: TestApp,
    key: Ed25519KeyPair,
    good: String,
    header: Value,
    claims: Value,
}

impl Target {
    async fn spawn() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path =
            generate_key_file(folder.path(), SigningAlgorithm::EdDsa, false, Utc::now()).unwrap();
        let key = key_in(&path);
        let app = TestApp::spawn_with(|settings| {
            folder.path().clone_into(&mut settings.auth.key_dir);
            // Whatever the machine does, memory is trusted.
            settings.auth.staleness_bound = Duration::from_secs(600);
        })
        .await;
        let good = app.login(&app.user().create().await).await.access_token;
        let part = |index| {
            let text: &str = good.split('.').nth(index).unwrap();
            serde_json::from_slice::<Value>(&URL_SAFE_NO_PAD.decode(text).unwrap()).unwrap()
        };
        let (header, claims) = (part(0), part(1));
        let kids: Vec<_> = list_key_files(folder.path()).unwrap();
        assert_eq!(header["kid"], json!(kids[0].kid));
        Self {
            app,
            key,
            good,
            header,
            claims,
        }
    }

    /// Signed by the server's own key, whatever it says.
    fn sign(&self, header: &str, claims: &str) -> String {
        signed_by(&self.key, header, claims)
    }

    fn with_header(&self, name: &str, to: Value) -> String {
        self.sign(&with(&self.header, name, to), &self.claims.to_string())
    }

    fn with_claim(&self, name: &str, to: Value) -> String {
        self.sign(&self.header.to_string(), &with(&self.claims, name, to))
    }

    /// With a member twice; `text` is the other one.
    fn with_claim_twice(&self, text: &str) -> [String; 2] {
        let claims = self.claims.to_string();
        let inner = &claims[1..claims.len() - 1];
        [format!("{{{text},{inner}}}"), format!("{{{inner},{text}}}")]
            .map(|claims| self.sign(&self.header.to_string(), &claims))
    }

    fn with_header_twice(&self, text: &str) -> [String; 2] {
        let header = self.header.to_string();
        let inner = &header[1..header.len() - 1];
        [format!("{{{text},{inner}}}"), format!("{{{inner},{text}}}")]
            .map(|header| self.sign(&header, &self.claims.to_string()))
    }

    /// What it is refused with: alike as a token asked about and as a credential of a caller.
    async fn refusal(&self, what: &str, token: &str) -> Status {
        let me = self
            .app
            .auth(token)
            .get_current_user(GetCurrentUserRequest {})
            .await;
        let asked = self.app.validate(token).await.expect_err(what);
        let me = me.expect_err(what);
        assert_eq!(
            (me.code(), me.message().is_empty(), &*credential(&me)),
            (asked.code(), false, "authorization"),
            "{what}"
        );
        assert_eq!(credential(&asked), "token", "{what}");
        asked
    }

    /// Tries them all, and a good token after each.
    async fn assert_all_refused(&self, attacks: Vec<(&str, String, &str)>) {
        let auth = &self.app.running().auth;
        eventually("memory is trusted", async || {
            let hits = auth.counters().hits.get();
            self.app.validate(&self.good).await.unwrap();
            auth.counters().hits.get() > hits
        })
        .await;
        let (reads, entries) = (auth.counters().reads.get(), auth.memory().entries);
        for (what, token, why) in attacks {
            let refused = self.refusal(what, &token).await;
            assert_refused(Err::<(), _>(refused), Code::Unauthenticated, why);
            self.app.validate(&self.good).await.expect(what);
        }
        assert_eq!(
            auth.counters().reads.get(),
            reads,
            "none reached the database"
        );
        assert_eq!(auth.memory().entries, entries, "none is remembered");
    }
}

fn key_in(path: &Path) -> Ed25519KeyPair {
    let pem = pem::parse(std::fs::read(path).unwrap()).unwrap();
    Ed25519KeyPair::from_pkcs8(pem.contents()).unwrap()
}

fn signed_by(key: &Ed25519KeyPair, header: &str, claims: &str) -> String {
    let [header, claims] = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part));
    let body = format!("{header}.{claims}");
    let signature = URL_SAFE_NO_PAD.encode(key.sign(body.as_bytes()));
    format!("{body}.{signature}")
}

fn with(object: &Value, name: &str, to: Value) -> String {
    let mut object = object.clone();
    object[name] = to;
    object.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn algorithms_and_keys_that_the_token_chooses_are_not_used() {
    let target = Target::spawn().await;
    let stranger = Ed25519KeyPair::generate().unwrap();
    let (x, public) = (
        URL_SAFE_NO_PAD.encode(stranger.public_key()),
        target.key.public_key().as_ref().to_vec(),
    );
    let jwk = json!({"kty": "OKP", "crv": "Ed25519", "x": x, "use": "sig"});
    let claims = target.claims.to_string();
    let by_stranger =
        |name: &str, to: Value| signed_by(&stranger, &with(&target.header, name, to), &claims);
    let hmac = |alg: &str, key: &[u8]| {
        let header = with(&target.header, "alg", json!(alg));
        let body = [&header, &claims].map(|part| URL_SAFE_NO_PAD.encode(part));
        let body = body.join(".");
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, key);
        let mac = aws_lc_rs::hmac::sign(&key, body.as_bytes());
        format!("{body}.{}", URL_SAFE_NO_PAD.encode(mac))
    };
    let mut attacks = vec![
        (
            "another's signature",
            signed_by(&stranger, &target.header.to_string(), &claims),
            INVALID,
        ),
        ("a key within", by_stranger("jwk", jwk.clone()), INVALID),
        (
            "a key within, named",
            by_stranger("kid", jwk["x"].clone()),
            INVALID,
        ),
        (
            "a key elsewhere",
            by_stranger("jku", json!("http://127.0.0.1:9/jwks.json")),
            INVALID,
        ),
        (
            "a certificate within",
            by_stranger("x5c", json!(["MIIB"])),
            INVALID,
        ),
        (
            "a certificate elsewhere",
            by_stranger("x5u", json!("http://127.0.0.1:9/x.pem")),
            INVALID,
        ),
        (
            "the public key as a secret",
            hmac("HS256", &public),
            INVALID,
        ),
        (
            "the public key as text as a secret",
            hmac("HS256", x.as_bytes()),
            INVALID,
        ),
    ];
    for alg in [
        "none", "None", "nOnE", "", "HS256", "RS256", "ES256", "ES384", "Ed448", "eddsa",
    ] {
        attacks.push((
            "another algorithm",
            target.with_header("alg", json!(alg)),
            INVALID,
        ));
        let unsigned = target.with_header("alg", json!(alg));
        let (body, _) = unsigned.rsplit_once('.').unwrap();
        attacks.push(("another algorithm, unsigned", format!("{body}."), INVALID));
    }
    for kid in [
        json!(""),
        json!("x"),
        json!("../../../../dev/null"),
        json!("' OR '1'='1"),
        json!("\0"),
        json!(0),
        json!(null),
        json!(["x"]),
        json!("x".repeat(4000)),
    ] {
        attacks.push(("another kid", target.with_header("kid", kid), INVALID));
    }
    target.assert_all_refused(attacks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_are_not_understood_are_refused() {
    let target = Target::spawn().await;
    let mut attacks = vec![];
    for crit in [json!(["exp"]), json!(["b64"]), json!([]), json!(["x", "x"])] {
        attacks.push(("crit", target.with_header("crit", crit), INVALID));
    }
    for typ in ["JWT", "jwt", "", "at+jwt ", "application/jose", "dpop+jwt"] {
        attacks.push((
            "another type",
            target.with_header("typ", json!(typ)),
            INVALID,
        ));
    }
    for twice in [
        "\"alg\":\"none\"",
        "\"kid\":\"x\"",
        "\"typ\":\"JWT\"",
        "\"crit\":[\"x\"]",
    ] {
        for token in target.with_header_twice(twice) {
            attacks.push(("a member of the header twice, or crit", token, INVALID));
        }
    }
    let claims = target.claims.to_string();
    let deep = "[".repeat(3000) + &"]".repeat(3000);
    for header in [
        "",
        "null",
        "[]",
        "{}",
        "\"alg\"",
        "{\"alg\":\"EdDSA\"",
        &deep,
        "\u{feff}{}",
    ] {
        attacks.push(("no header", target.sign(header, &claims), INVALID));
    }
    target.assert_all_refused(attacks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn claims_that_are_not_as_we_make_them_are_refused() {
    let target = Target::spawn().await;
    let now = Utc::now().timestamp();
    let mut attacks = vec![
        (
            "expired",
            target.with_claim("exp", json!(now - 600)),
            EXPIRED,
        ),
        (
            "expired at the epoch",
            target.with_claim("exp", json!(0)),
            EXPIRED,
        ),
        (
            "expired before time",
            target.with_claim("exp", json!(i64::MIN)),
            INVALID,
        ),
        (
            "issued in the future",
            target.with_claim("iat", json!(now + 600)),
            INVALID,
        ),
        (
            "issued at the end of time",
            target.with_claim("iat", json!(i64::MAX)),
            INVALID,
        ),
    ];
    for number in [
        json!("9999999999"),
        json!(1.5),
        json!(1e30),
        json!(u64::MAX),
        json!(null),
    ] {
        for claim in ["exp", "iat", "epoch"] {
            let token = target.with_claim(claim, number.clone());
            attacks.push(("no whole number", token, INVALID));
        }
    }
    for text in [
        "1e999",
        "-1e999",
        "1".repeat(400).as_str(),
        "0x7f",
        "NaN",
        "01",
        "+1",
    ] {
        let claims = target.claims.to_string();
        let exp = format!("\"exp\":{}", target.claims["exp"]);
        let changed = claims.replace(&exp, &format!("\"exp\":{text}"));
        assert_ne!(changed, claims);
        attacks.push((
            "no number",
            target.sign(&target.header.to_string(), &changed),
            INVALID,
        ));
    }
    let other = Uuid::now_v7();
    for twice in [
        "\"exp\":9999999999".to_owned(),
        format!("\"sub\":\"{other}\""),
        format!("\"sid\":\"{other}\""),
        "\"iss\":\"tollkeeper\"".to_owned(),
        "\"aud\":\"tollkeeper\"".to_owned(),
        "\"epoch\":0".to_owned(),
    ] {
        for token in target.with_claim_twice(&twice) {
            attacks.push(("a claim twice", token, INVALID));
        }
    }
    for (claim, value) in [
        ("iss", json!("another")),
        ("iss", json!(["tollkeeper"])),
        ("iss", json!(null)),
        ("aud", json!("another")),
        ("aud", json!(["tollkeeper", "another"])),
        ("aud", json!([])),
        ("sub", json!("ada")),
        ("sub", json!("")),
        ("sub", json!(7)),
        ("sid", json!("x")),
        ("sid", json!(null)),
        ("jti", json!(1)),
        ("epoch", json!(-1.0)),
    ] {
        attacks.push(("another value", target.with_claim(claim, value), INVALID));
    }
    let deep = "[".repeat(3000) + &"]".repeat(3000);
    for claims in [
        "",
        "null",
        "[]",
        "{}",
        "\"x\"",
        &deep,
        "{\"exp\":9999999999}",
    ] {
        let token = target.sign(&target.header.to_string(), claims);
        attacks.push(("no claims", token, INVALID));
    }
    target.assert_all_refused(attacks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_has_one_spelling() {
    let target = Target::spawn().await;
    let good = &target.good;
    let parts: Vec<&str> = good.split('.').collect();
    let [header, claims, signature] = parts[..] else {
        panic!("three parts");
    };
    // The last character of 64 bytes holds four bits that mean nothing: fifteen other spellings.
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let (cut, last) = signature.split_at(signature.len() - 1);
    let others = alphabet.chars().filter(|c| !last.starts_with(*c));
    let mut attacks: Vec<_> = others
        .map(|c| {
            (
                "the last character",
                format!("{header}.{claims}.{cut}{c}"),
                INVALID,
            )
        })
        .collect();
    let bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let respelled = |text: String| format!("{header}.{claims}.{text}");
    attacks.extend([
        ("padding", respelled(URL_SAFE.encode(&bytes)), INVALID),
        (
            "padding of another part",
            format!("{header}=.{claims}.{signature}"),
            INVALID,
        ),
        (
            "more bytes",
            respelled(URL_SAFE_NO_PAD.encode([&bytes[..], b"\0"].concat())),
            INVALID,
        ),
        (
            "fewer bytes",
            respelled(URL_SAFE_NO_PAD.encode(&bytes[..63])),
            INVALID,
        ),
        (
            "hexadecimal",
            respelled(bytes.iter().map(|b| format!("{b:02x}")).collect()),
            INVALID,
        ),
        ("upper case", good.to_uppercase(), INVALID),
        (
            "five parts",
            format!("{good}.{claims}.{signature}"),
            INVALID,
        ),
        ("no dots", good.replace('.', ""), INVALID),
        ("twice", format!("{good}{good}"), INVALID),
        ("a scheme before it", format!("Bearer {good}"), INVALID),
        ("oversized", format!("{good}{}", "A".repeat(8192)), INVALID),
    ]);
    let standard = STANDARD_NO_PAD.encode(&bytes);
    if standard != signature {
        attacks.push(("the standard alphabet", respelled(standard), INVALID));
    }
    for at in (1..good.len()).step_by(7) {
        attacks.push(("cut short", good[..at].to_owned(), INVALID));
        let (before, after) = good.split_at(at);
        attacks.push(("white space within", format!("{before} {after}"), INVALID));
    }
    target.assert_all_refused(attacks).await;
}
