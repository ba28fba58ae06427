//! What a login hands out when the password was right and a second factor is asked: a signed text, no row.

use std::time::Duration;

use aws_lc_rs::{constant_time::verify_slices_are_equal, hmac};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::{
    auth::MasterKey,
    model::{FactorId, SessionId, User, UserId},
};

const PREFIX: &str = "tkm_";
const BINDING_BYTES: usize = 32;
const PAYLOAD_BYTES: usize = 16 + 16 + 8 + BINDING_BYTES;
const MAC_BYTES: usize = 32;

/// Makes and reads challenges: `tkm_` and base64url of session, user, expiry, what it is bound to, and the
/// HMAC of that.
pub(super) struct Challenges {
    key: hmac::Key,
    binding_key: hmac::Key,
    ttl: Duration,
}

/// A challenge of ours. To be held against what is so now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    /// The session that it opens. There is only one of an id: so it opens none twice.
    pub(super) session_id: SessionId,
    pub(super) user_id: UserId,
    expires_at: i64,
    binding: [u8; BINDING_BYTES],
}

impl Challenges {
    pub(super) fn new(master_key: &MasterKey, ttl: Duration) -> Self {
        Self {
            key: master_key.mac_key("mfa-challenge/v1"),
            binding_key: master_key.mac_key("mfa-challenge-binding/v1"),
            ttl,
        }
    }

    /// A challenge for a user whose password matched this hash, and until when it is good.
    pub(super) fn issue(
        &self,
        user: &User,
        password_hash: &str,
        credential: FactorId,
        at: DateTime<Utc>,
    ) -> (String, DateTime<Utc>) {
        let expires_at = at + self.ttl;
        let mut bytes = Vec::with_capacity(PAYLOAD_BYTES + MAC_BYTES);
        bytes.extend(SessionId::new().0.as_bytes());
        bytes.extend(user.id.0.as_bytes());
        bytes.extend(expires_at.timestamp().to_be_bytes());
        bytes.extend(self.binding(user, password_hash, credential));
        let mac = hmac::sign(&self.key, &bytes);
        bytes.extend(mac.as_ref());
        let text = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes));
        (text, expires_at)
    }

    /// Reads a challenge of ours; `None` for anything else.
    pub(super) fn read(&self, text: &str) -> Option<Challenge> {
        let bytes = URL_SAFE_NO_PAD.decode(text.strip_prefix(PREFIX)?).ok()?;
        let (payload, mac) = bytes.split_at_checked(PAYLOAD_BYTES)?;
        hmac::verify(&self.key, payload, mac).ok()?;
        let (session, rest) = payload.split_first_chunk::<16>()?;
        let (user, rest) = rest.split_first_chunk::<16>()?;
        let (expires_at, binding) = rest.split_first_chunk::<8>()?;
        Some(Challenge {
            session_id: SessionId(Uuid::from_bytes(*session)),
            user_id: UserId(Uuid::from_bytes(*user)),
            expires_at: i64::from_be_bytes(*expires_at),
            binding: binding.try_into().ok()?,
        })
    }

    /// Whether it is still good: nothing that it rests on has changed, and it is not over.
    pub(super) fn holds(
        &self,
        challenge: &Challenge,
        user: &User,
        password_hash: &str,
        credential: FactorId,
        at: DateTime<Utc>,
    ) -> bool {
        let binding = self.binding(user, password_hash, credential);
        verify_slices_are_equal(&challenge.binding, &binding).is_ok()
            && at.timestamp() < challenge.expires_at
    }

    /// All that ends a challenge when it changes: the password, the epoch, the enrolment.
    fn binding(
        &self,
        user: &User,
        password_hash: &str,
        credential: FactorId,
    ) -> [u8; BINDING_BYTES] {
        let mut context = hmac::Context::with_key(&self.binding_key);
        // Of fixed length, all but the last.
        context.update(user.id.0.as_bytes());
        context.update(&user.auth_epoch.to_be_bytes());
        context.update(credential.0.as_bytes());
        context.update(password_hash.as_bytes());
        let tag = context.sign();
        tag.as_ref().try_into().expect("SHA-256")
    }
}

#[cfg(test)]
mod tests {
    use chrono::TimeDelta;
    use proptest::prelude::*;

    use super::*;
    use crate::model::Role;

    const TTL: Duration = Duration::from_mins(5);

    fn challenges() -> Challenges {
        Challenges::new(&MasterKey::new(b"a master key"), TTL)
    }

    fn start() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 0).expect("valid")
    }

    fn user() -> User {
        User {
            id: UserId::new(),
            email: "a@example.com".parse().expect("valid"),
            username: "somebody".parse().expect("valid"),
            full_name: "".parse().expect("valid"),
            role: Role::User,
            tier: "free".parse().expect("valid"),
            tier_updated_at: start(),
            is_active: true,
            auth_epoch: 0,
            email_verified_at: None,
            created_at: start(),
            updated_at: start(),
            last_login_at: None,
            mfa_enabled: true,
        }
    }

    #[test]
    fn a_challenge_holds_until_it_expires_or_anything_that_it_rests_on_changes() {
        let (challenges, user, factor) = (challenges(), user(), FactorId::new());
        let (text, expires_at) = challenges.issue(&user, "hash", factor, start());
        assert_eq!(expires_at, start() + TTL);
        let read = challenges.read(&text).expect("ours");
        assert_eq!(read.user_id, user.id);
        let holds = |user: &User, hash: &str, factor, secs| {
            let at = start() + TimeDelta::seconds(secs);
            challenges.holds(&read, user, hash, factor, at)
        };
        assert!(holds(&user, "hash", factor, 0) && holds(&user, "hash", factor, 299));
        assert!(!holds(&user, "hash", factor, 300));
        assert!(!holds(&user, "another hash", factor, 0));
        assert!(!holds(&user, "hash", FactorId::new(), 0));
        let later = User {
            auth_epoch: 1,
            ..user.clone()
        };
        assert!(!holds(&later, "hash", factor, 0));
        let renamed = User {
            username: "else".parse().expect("valid"),
            ..user
        };
        assert!(holds(&renamed, "hash", factor, 0));
    }

    #[test]
    fn each_opens_another_session_and_none_is_of_another_key() {
        let (user, factor) = (user(), FactorId::new());
        let [one, other] = [(); 2].map(|()| challenges().issue(&user, "hash", factor, start()).0);
        let session = |text: &str| challenges().read(text).expect("ours").session_id;
        assert_ne!(session(&one), session(&other));
        let foreign = Challenges::new(&MasterKey::new(b"another"), TTL);
        assert_eq!(foreign.read(&one), None);
    }

    proptest! {
        #[test]
        fn a_changed_challenge_is_none(at in 0_usize..139, to in any::<u8>()) {
            let (text, _) = challenges().issue(&user(), "hash", FactorId::new(), start());
            prop_assert!(text.len() >= 139);
            let mut changed = text.clone().into_bytes();
            changed[at] = to & 0x7f;
            let changed = String::from_utf8(changed).expect("ASCII");
            prop_assert_eq!(challenges().read(&changed).is_some(), changed == text);
        }

        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            prop_assert!(challenges().read(&text).is_none());
            let prefixed = format!("{PREFIX}{text}");
            prop_assert!(challenges().read(&prefixed).is_none());
        }
    }
}
