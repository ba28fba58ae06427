//! Access tokens: signed JWTs (RFC 9068) that name a session, checked as RFC 8725 asks.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use chrono::{DateTime, Utc};
use jsonwebtoken::{Header, Validation, decode, decode_header, encode};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::KeyRing;
use crate::{
    config::AuthSettings,
    error::{Error, Fault, Result},
    model::{SessionId, SessionStanding, UserId},
};

/// Longer tokens are refused unread.
pub(super) const MAX_TOKEN_BYTES: usize = 8192;

/// `typ` of access tokens: no other JWT passes for one (RFC 9068 §2.1).
const TYPE: &str = "at+jwt";

/// The content of a token (RFC 9068 §2.2). Tier and state are not in it: they are resolved live.
#[derive(Debug, Serialize, Deserialize)]
struct Payload {
    iss: String,
    sub: Uuid,
    aud: String,
    exp: i64,
    iat: i64,
    jti: Uuid,
    sid: Uuid,
    /// The user's `auth_epoch` when it was issued.
    epoch: i64,
}

/// What is kept of a token that was checked: what differs between tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Claims {
    sub: Uuid,
    exp: i64,
    iat: i64,
    sid: Uuid,
    epoch: i64,
    /// See [`AccessTokens::is_current`].
    generation: u64,
}

impl From<&Payload> for Claims {
    fn from(payload: &Payload) -> Self {
        Self {
            sub: payload.sub,
            exp: payload.exp,
            iat: payload.iat,
            sid: payload.sid,
            epoch: payload.epoch,
            generation: 0,
        }
    }
}

impl Claims {
    pub(super) fn user_id(&self) -> UserId {
        UserId(self.sub)
    }

    pub(super) fn session_id(&self) -> SessionId {
        SessionId(self.sid)
    }

    pub(super) fn epoch(&self) -> i64 {
        self.epoch
    }

    pub(super) fn issued_at(&self) -> DateTime<Utc> {
        DateTime::from_timestamp(self.iat, 0).unwrap_or_default()
    }

    pub(super) fn expires_at(&self) -> DateTime<Utc> {
        DateTime::from_timestamp(self.exp, 0).unwrap_or_default()
    }
}

/// Issues and verifies access tokens.
pub(super) struct AccessTokens {
    keys: RwLock<Arc<KeyRing>>,
    /// Advanced when the keys are replaced: what was verified before has to be verified again.
    generation: AtomicU64,
    issuer: String,
    audience: String,
    ttl: Duration,
    leeway: Duration,
}

impl AccessTokens {
    pub(super) fn new(keys: KeyRing, settings: &AuthSettings) -> Self {
        Self {
            keys: RwLock::new(Arc::new(keys)),
            generation: AtomicU64::new(0),
            issuer: settings.issuer.clone(),
            audience: settings.audience.clone(),
            ttl: settings.access_ttl,
            leeway: settings.leeway,
        }
    }

    pub(super) fn keys(&self) -> Arc<KeyRing> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.clone()
    }

    /// Signs and verifies with these keys from now on.
    pub(super) fn replace_keys(&self, keys: KeyRing) {
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(keys);
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether claims were verified with the keys that are in use.
    pub(super) fn is_current(&self, claims: &Claims) -> bool {
        claims.generation == self.generation.load(Ordering::Acquire)
    }

    /// Signs a token for a session; it does not outlive the session. Returns it and its expiry.
    ///
    /// # Errors
    /// `Internal` when signing fails.
    pub(super) fn issue(
        &self,
        standing: &SessionStanding,
        now: DateTime<Utc>,
    ) -> Result<(String, DateTime<Utc>)> {
        let expires_at = (now + self.ttl).min(standing.session.absolute_expires_at);
        let payload = Payload {
            iss: self.issuer.clone(),
            sub: standing.user.id.0,
            aud: self.audience.clone(),
            exp: expires_at.timestamp(),
            iat: now.timestamp(),
            jti: Uuid::now_v7(),
            sid: standing.session.id.0,
            epoch: standing.user.auth_epoch,
        };
        let keys = self.keys();
        let mut header = Header::new(keys.signing.algorithm);
        header.typ = Some(TYPE.to_owned());
        header.kid = Some(keys.signing.kid.clone());
        let token = encode(&header, &payload, &keys.signing.key).map_err(Error::internal)?;
        Ok((token, Claims::from(&payload).expires_at()))
    }

    /// Checks everything that can be checked of a token by itself.
    ///
    /// # Errors
    /// `Invalid` or `Expired`; never says more, so that an attacker learns nothing.
    pub(super) fn verify(&self, token: &str, now: DateTime<Utc>) -> Result<Claims, Fault> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Fault::Invalid);
        }
        let header = decode_header(token).map_err(|_| Fault::Invalid)?;
        let typed = header
            .typ
            .as_deref()
            .is_some_and(|typ| typ.eq_ignore_ascii_case(TYPE));
        // `jku`, `jwk`, `x5u` and `x5c` are ignored: only our own keys count. What `crit` names must
        // be understood, and we understand none (RFC 7515 §4.1.11).
        if !typed || header.crit.is_some() {
            return Err(Fault::Invalid);
        }
        let kid = header.kid.ok_or(Fault::Invalid)?;
        // Before the keys are read: should they be replaced meanwhile, it counts as verified by the
        // ones before.
        let generation = self.generation.load(Ordering::Acquire);
        let keys = self.keys();
        let verifying = keys.verifying.get(&kid).ok_or(Fault::Invalid)?;
        let mut validation = Validation::new(verifying.algorithm);
        validation.set_issuer(&[&self.issuer]);
        validation.set_audience(&[&self.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        // Times are checked below, against the caller's clock.
        validation.validate_exp = false;
        let decoded = decode::<Payload>(token, &verifying.key, &validation);
        let payload = decoded.map_err(|_| Fault::Invalid)?.claims;
        let claims = Claims {
            generation,
            ..Claims::from(&payload)
        };
        let leeway = self.leeway.as_secs().cast_signed();
        if claims.iat > now.timestamp().saturating_add(leeway) {
            return Err(Fault::Invalid);
        }
        self.check_expiry(&claims, now)?;
        Ok(claims)
    }

    /// Checks what changes by time alone.
    ///
    /// # Errors
    /// `Expired`
    pub(super) fn check_expiry(&self, claims: &Claims, now: DateTime<Utc>) -> Result<(), Fault> {
        if self.expiry(claims) <= now.timestamp() {
            return Err(Fault::Expired);
        }
        Ok(())
    }

    /// From when a token is refused, in seconds since the epoch: its `exp` and the leeway.
    pub(super) fn expiry(&self, claims: &Claims) -> i64 {
        claims
            .exp
            .saturating_add(self.leeway.as_secs().cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
    use jsonwebtoken::{Algorithm, EncodingKey};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::config::Secret;

    const SECRET: &str = "5f1d3c0e9a7b48261fe0d4c3b2a19087";

    fn tokens() -> AccessTokens {
        let keys = KeyRing::from_secret(&Secret::new(SECRET)).expect("valid");
        AccessTokens::new(keys, &AuthSettings::default())
    }

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).expect("valid")
    }

    fn good_header(tokens: &AccessTokens) -> Value {
        json!({"typ": "at+jwt", "alg": "HS256", "kid": tokens.keys().signing.kid})
    }

    fn good_claims() -> Value {
        let now = now().timestamp();
        json!({
            "iss": "tollkeeper", "aud": "tollkeeper", "sub": Uuid::now_v7(), "sid": Uuid::now_v7(),
            "jti": Uuid::now_v7(), "iat": now, "exp": now + 60, "epoch": 0,
        })
    }

    /// Signs any header and claims with our own key.
    fn sign(header: &Value, claims: &Value) -> String {
        sign_text(&header.to_string(), &claims.to_string())
    }

    fn sign_text(header: &str, claims: &str) -> String {
        let body = format!(
            "{}.{}",
            URL_SAFE_NO_PAD.encode(header),
            URL_SAFE_NO_PAD.encode(claims)
        );
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, SECRET.as_bytes());
        let mac = aws_lc_rs::hmac::sign(&key, body.as_bytes());
        format!("{body}.{}", URL_SAFE_NO_PAD.encode(mac))
    }

    fn with(mut value: Value, key: &str, to: Value) -> Value {
        value[key] = to;
        value
    }

    fn without(mut value: Value, key: &str) -> Value {
        value.as_object_mut().expect("an object").remove(key);
        value
    }

    #[test]
    fn what_is_issued_is_accepted_until_it_expires() {
        let tokens = tokens();
        let token = sign(&good_header(&tokens), &good_claims());
        assert!(tokens.verify(&token, now()).is_ok());
        let leeway = AuthSettings::default().leeway;
        let end = now() + Duration::from_secs(60) + leeway;
        assert!(tokens.verify(&token, end - Duration::from_secs(1)).is_ok());
        assert_eq!(
            tokens.verify(&token, end).expect_err("expired"),
            Fault::Expired
        );
        let early = now() - leeway - Duration::from_secs(1);
        assert_eq!(
            tokens.verify(&token, early).expect_err("of the future"),
            Fault::Invalid
        );
    }

    #[test]
    fn every_required_claim_and_header_is_required() {
        let tokens = tokens();
        for claim in ["iss", "aud", "sub", "sid", "jti", "iat", "exp", "epoch"] {
            let token = sign(&good_header(&tokens), &without(good_claims(), claim));
            assert_eq!(
                tokens.verify(&token, now()).expect_err(claim),
                Fault::Invalid,
                "{claim}"
            );
        }
        for field in ["typ", "kid", "alg"] {
            let token = sign(&without(good_header(&tokens), field), &good_claims());
            assert_eq!(
                tokens.verify(&token, now()).expect_err(field),
                Fault::Invalid,
                "{field}"
            );
        }
    }

    #[test]
    fn foreign_and_forged_tokens_are_refused() {
        let tokens = tokens();
        let header = good_header(&tokens);
        let claims = good_claims();
        let good = sign(&header, &claims);
        let (body, _) = good.rsplit_once('.').expect("three parts");
        let duplicate = claims.to_string().replacen('{', "{\"exp\":9999999999,", 1);
        let ed25519 = {
            use aws_lc_rs::encoding::AsDer as _;
            let der: aws_lc_rs::encoding::Pkcs8V1Der<'_> =
                aws_lc_rs::signature::Ed25519KeyPair::generate()
                    .expect("random")
                    .as_der()
                    .expect("der");
            let mut header = Header::new(Algorithm::EdDSA);
            header.typ = Some(TYPE.to_owned());
            header.kid = Some(tokens.keys().signing.kid.clone());
            encode(&header, &claims, &EncodingKey::from_ed_der(der.as_ref())).expect("signed")
        };
        for (what, token) in [
            ("empty", String::new()),
            ("garbage", "garbage".to_owned()),
            ("no signature", format!("{body}.")),
            ("two parts", body.to_owned()),
            ("four parts", format!("{good}.x")),
            ("padded", format!("{good}=")),
            ("white space", format!(" {good}")),
            (
                "alg none",
                sign(&with(header.clone(), "alg", json!("none")), &claims),
            ),
            (
                "another algorithm",
                sign(&with(header.clone(), "alg", json!("HS384")), &claims),
            ),
            ("another family under our kid", ed25519),
            (
                "unknown kid",
                sign(&with(header.clone(), "kid", json!("x")), &claims),
            ),
            (
                "another type",
                sign(&with(header.clone(), "typ", json!("JWT")), &claims),
            ),
            (
                "crit",
                sign(&with(header.clone(), "crit", json!(["exp"])), &claims),
            ),
            (
                "another issuer",
                sign(&header, &with(claims.clone(), "iss", json!("x"))),
            ),
            (
                "another audience",
                sign(&header, &with(claims.clone(), "aud", json!("x"))),
            ),
            (
                "two audiences",
                sign(
                    &header,
                    &with(claims.clone(), "aud", json!(["tollkeeper", "x"])),
                ),
            ),
            (
                "exp as text",
                sign(&header, &with(claims.clone(), "exp", json!("9999999999"))),
            ),
            (
                "exp too large",
                sign(&header, &with(claims.clone(), "exp", json!(1e30))),
            ),
            (
                "duplicate claim",
                sign_text(&header.to_string(), &duplicate),
            ),
            (
                "oversized",
                sign(&header, &with(claims.clone(), "x", json!("x".repeat(9000)))),
            ),
        ] {
            assert_eq!(
                tokens.verify(&token, now()).expect_err(what),
                Fault::Invalid,
                "{what}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_change_of_a_token_is_accepted(at in 0_usize..400, to in any::<u8>()) {
            let tokens = tokens();
            let token = sign(&good_header(&tokens), &good_claims());
            let mut changed = token.clone().into_bytes();
            let at = at % changed.len();
            changed[at] = to;
            if let Ok(changed) = String::from_utf8(changed) {
                prop_assert_eq!(tokens.verify(&changed, now()).is_ok(), changed == token);
            }
        }

        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            prop_assert!(tokens().verify(&text, now()).is_err());
        }
    }
}
