//! The door for the fuzzer: what must hold of whatever is presented as a credential.

use std::{path::Path, sync::LazyLock};

use chrono::{DateTime, TimeDelta, Utc};

use super::{
    KeyRing, MasterKey,
    access_token::AccessTokens,
    generate_key_file,
    key_text::{API_KEY, SERVICE_KEY},
    refresh_token::RefreshTokens,
};
use crate::{
    config::{AuthSettings, Secret, SigningAlgorithm},
    model::{
        Email, FullName, Identifier, Role, Session, SessionId, SessionStanding, TierName, User,
        UserId, Username,
    },
};

/// Issuers of each kind, each with a token that it issued.
static ISSUED: LazyLock<Vec<(AccessTokens, String)>> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("tollkeeper-fuzz-{}", std::process::id()));
    let rings = [
        KeyRing::from_secret(&Secret::new("5f1d3c0e9a7b48261fe0d4c3b2a19087")),
        ring(&folder.join("a"), SigningAlgorithm::EdDsa),
        ring(&folder.join("b"), SigningAlgorithm::Es256),
    ];
    let issue = |ring: Result<KeyRing, _>| {
        let ring = ring.expect("keys can be made");
        let tokens = AccessTokens::new(ring, &AuthSettings::default());
        let (token, _) = tokens.issue(&standing(), now()).expect("signed");
        (tokens, token)
    };
    rings.into_iter().map(issue).collect()
});

static REFRESH: LazyLock<(RefreshTokens, String)> = LazyLock::new(|| {
    let tokens = RefreshTokens::new(&MasterKey::new(&[7; 32]));
    let token = tokens.derive(SessionId::new(), 3);
    (tokens, token)
});

static KEYS: LazyLock<[String; 2]> =
    LazyLock::new(|| [API_KEY, SERVICE_KEY].map(|kind| kind.generate().expect("random")));

/// # Panics
/// When a text that was not issued is accepted, or a value read does not stay the same.
pub fn credential(data: &[u8]) {
    let raw = String::from_utf8_lossy(data);
    let (refresh_tokens, refresh_token) = &*REFRESH;
    for (tokens, issued) in &*ISSUED {
        for text in [raw.to_string(), edited(issued, data)] {
            let accepted = tokens.verify(&text, now()).is_ok();
            assert_eq!(accepted, text == *issued, "{text}");
        }
    }
    for text in [raw.to_string(), edited(refresh_token, data)] {
        if let Some((session, counter)) = refresh_tokens.read(&text) {
            assert_eq!(refresh_tokens.derive(session, counter), text);
        }
    }
    for (kind, key) in [API_KEY, SERVICE_KEY].into_iter().zip(&*KEYS) {
        for text in [raw.to_string(), edited(key, data)] {
            let known = kind.hash(&text);
            assert!(known.is_none() || text.len() == key.len());
            assert!(text != *key || known.is_some());
        }
    }
    same_again::<Email>(&raw);
    same_again::<Username>(&raw);
    same_again::<FullName>(&raw);
    let _ = raw.parse::<Identifier>();
}

/// A good text, changed as `data` says: pairs of place and byte; past the end adds a byte.
fn edited(good: &str, data: &[u8]) -> String {
    let mut bytes = good.as_bytes().to_vec();
    for edit in data.chunks_exact(3) {
        let at = usize::from(u16::from_be_bytes([edit[0], edit[1]])) % (good.len() + 2);
        match (bytes.get_mut(at), edit[2]) {
            (Some(_), 0) => drop(bytes.remove(at)),
            (Some(byte), to) => *byte = to,
            (None, to) => bytes.push(to),
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What was read prints so that it reads the same.
fn same_again<T: std::str::FromStr + ToString + PartialEq + std::fmt::Debug>(text: &str) {
    if let Ok(read) = text.parse::<T>() {
        assert_eq!(read.to_string().parse::<T>().ok(), Some(read));
    }
}

fn now() -> DateTime<Utc> {
    DateTime::from_timestamp(1_800_000_000, 0).expect("a time")
}

fn ring(folder: &Path, algorithm: SigningAlgorithm) -> Result<KeyRing, super::KeyError> {
    generate_key_file(folder, algorithm, false, now())?;
    KeyRing::from_folder(folder, algorithm)
}

fn standing() -> SessionStanding {
    let (id, user_id, later) = (SessionId::new(), UserId::new(), now() + TimeDelta::days(1));
    let session = Session {
        id,
        user_id,
        counter: 1,
        rotated_at: now(),
        idle_expires_at: later,
        absolute_expires_at: later,
        revoked_at: None,
        mfa: false,
    };
    let tier: TierName = "free".parse().expect("valid");
    let user = User {
        id: user_id,
        email: "a@example.com".parse().expect("valid"),
        username: "somebody".parse().expect("valid"),
        full_name: "".parse().expect("valid"),
        role: Role::User,
        tier,
        tier_updated_at: now(),
        is_active: true,
        auth_epoch: 0,
        email_verified_at: None,
        created_at: now(),
        updated_at: now(),
        last_login_at: None,
        mfa_enabled: false,
    };
    SessionStanding { session, user }
}
