//! Handles of reservations: what is held, described and signed, so that every replica can settle it.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

use aws_lc_rs::digest;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use bytes::BufMut as _;
use chrono::{DateTime, Utc};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use siphasher::sip128::{Hasher128 as _, SipHasher13};
use uuid::{Builder, Uuid};

use super::lease::RequestKey;
use crate::model::{EventId, HoldId, HoldName, ModelName, ReplicaId, RequestId, Tokens, UserId};

/// What a handle says. Times are the database's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Handle {
    pub(super) hold: HoldName,
    pub(super) user_id: UserId,
    pub(super) model: ModelName,
    pub(super) request_id: RequestId,
    pub(super) tokens: Tokens,
    /// When the tokens were held; its month is charged.
    pub(super) created_at: DateTime<Utc>,
    pub(super) expires_at: DateTime<Utc>,
    /// The tier's policy lets a commit be booked later, while the database is away.
    pub(super) may_wait: bool,
}

/// Of the layout; a handle of another one is not read.
const VERSION: u8 = 1;

/// Enough that none is ever guessed (RFC 2104 §5: at least half of the hash).
const TAG_BYTES: usize = 16;

/// Of one with the longest names.
const MAX_BYTES: usize = 2 + 16 + 8 + 16 + 8 + 2 * 8 + 2 * (1 + 128) + TAG_BYTES;

/// Longer text is no handle.
const MAX_CHARS: usize = 1024;

/// Signs handles, by HMAC-SHA256 (RFC 2104). As it is once the key is in, for the next one to begin with.
#[derive(Clone)]
pub struct HandleKey(Hmac<Sha256>);

impl HandleKey {
    pub fn new(secret: &[u8; 32]) -> Self {
        Self(Hmac::new_from_slice(secret).expect("a key of any length will do"))
    }

    fn tag(&self, said: &[u8]) -> Hmac<Sha256> {
        let mut mac = self.0.clone();
        mac.update(said);
        mac
    }
}

impl Handle {
    /// Writes it down, as ASCII.
    pub(super) fn sign(&self, key: &HandleKey) -> String {
        let mut bytes = [0; MAX_BYTES];
        let mut rest = &mut bytes[..];
        rest.put_slice(&[VERSION, u8::from(self.may_wait)]);
        rest.put_slice(self.hold.owner.0.as_bytes());
        rest.put_u64(self.hold.hold.0);
        rest.put_slice(self.user_id.0.as_bytes());
        rest.put_i64(self.tokens);
        for time in [self.created_at, self.expires_at] {
            rest.put_i64(time.timestamp_micros());
        }
        // Names are short: their types see to it.
        for text in [self.model.as_str(), self.request_id.as_str()] {
            rest.put_u8(u8::try_from(text.len()).expect("a name is shorter"));
            rest.put_slice(text.as_bytes());
        }
        let said = MAX_BYTES - rest.len();
        let (whole, tag) = (said + TAG_BYTES, key.tag(&bytes[..said]).finalize());
        bytes[said..whole].copy_from_slice(&tag.into_bytes()[..TAG_BYTES]);
        BASE64_URL_SAFE_NO_PAD.encode(&bytes[..whole])
    }

    /// Reads what [`Handle::sign`] wrote with the same key; `None` for all else.
    pub(super) fn read(text: &str, key: &HandleKey) -> Option<Self> {
        if text.len() > MAX_CHARS {
            return None;
        }
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        let (said, tag) = bytes.split_at_checked(bytes.len().checked_sub(TAG_BYTES)?)?;
        // In a time that does not depend on where they differ.
        key.tag(said).verify_truncated_left(tag).ok()?;
        let mut rest = Rest(said);
        if rest.array()? != [VERSION] {
            return None;
        }
        let may_wait = rest.array()? == [1];
        let owner = ReplicaId(Uuid::from_bytes(rest.array()?));
        let hold = HoldId(u64::from_be_bytes(rest.array()?));
        let handle = Self {
            may_wait,
            hold: HoldName { owner, hold },
            user_id: UserId(Uuid::from_bytes(rest.array()?)),
            tokens: i64::from_be_bytes(rest.array()?),
            created_at: rest.time()?,
            expires_at: rest.time()?,
            model: rest.text()?.parse().ok()?,
            request_id: rest.text()?.parse().ok()?,
        };
        rest.0.is_empty().then_some(handle)
    }

    /// The usage event that a commit books.
    pub(super) fn event_id(&self) -> EventId {
        event_id(self.user_id, &self.request_id)
    }
}

/// The same on every replica: version 8 (RFC 9562 §5.8) of a hash of user and request.
pub(super) fn event_id(user_id: UserId, request_id: &RequestId) -> EventId {
    let mut hash = digest::Context::new(&digest::SHA256);
    hash.update(b"tollkeeper reservation");
    spell(user_id, request_id, |bytes| hash.update(bytes));
    let hash = hash.finish();
    let bytes = hash.as_ref()[..16].try_into().expect("it is longer");
    EventId(Builder::from_custom_bytes(bytes).into_uuid())
}

/// Names requests in this process: by a hash with a key that nobody knows, for whom two requests of
/// one name cannot be found.
#[derive(Clone)]
pub(super) struct RequestKeys(SipHasher13);

impl RequestKeys {
    pub(super) fn new() -> Self {
        let random = || RandomState::new().hash_one(());
        Self(SipHasher13::new_with_keys(random(), random()))
    }

    /// What makes a repeated request the same: of another model it is another one, for that has limits
    /// of its own.
    pub(super) fn key(
        &self,
        user_id: UserId,
        request_id: &RequestId,
        model: &ModelName,
    ) -> RequestKey {
        let mut hash = self.0;
        spell(user_id, request_id, |bytes| hash.write(bytes));
        hash.write(model.as_str().as_bytes());
        RequestKey(hash.finish128().as_u128())
    }
}

/// A request of a user, so that nothing else reads like it, whatever follows.
fn spell(user_id: UserId, request_id: &RequestId, mut write: impl FnMut(&[u8])) {
    let request_id = request_id.as_str().as_bytes();
    write(user_id.0.as_bytes());
    write(&[u8::try_from(request_id.len()).expect("a name is shorter")]);
    write(request_id);
}

/// Bytes that are still to be read.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    fn time(&mut self) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp_micros(i64::from_be_bytes(self.array()?))
    }

    fn text(&mut self) -> Option<&'a str> {
        let [len] = self.array()?;
        let (text, rest) = self.0.split_at_checked(len.into())?;
        self.0 = rest;
        std::str::from_utf8(text).ok()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(secret: u8) -> HandleKey {
        HandleKey::new(&[secret; 32])
    }

    fn handle(model: &str, request: &str, tokens: i64, micros: i64) -> Handle {
        let time = |micros| DateTime::from_timestamp_micros(micros).expect("in range");
        Handle {
            hold: HoldName {
                owner: ReplicaId::new(),
                hold: HoldId(7 << 32 | 9),
            },
            user_id: UserId::new(),
            model: model.parse().expect("valid"),
            request_id: request.parse().expect("valid"),
            tokens,
            created_at: time(micros),
            expires_at: time(micros + 120_000_000),
            may_wait: tokens % 2 == 0,
        }
    }

    proptest! {
        #[test]
        fn what_was_signed_is_read(
            model in "[!-~]{1,128}", request in "[!-~]{1,128}",
            tokens in 0..i64::MAX, micros in 0..4_000_000_000_000_000_i64,
        ) {
            let (key, handle) = (key(1), handle(&model, &request, tokens, micros));
            let text = handle.sign(&key);
            prop_assert!(text.len() <= MAX_CHARS);
            prop_assert_eq!(Handle::read(&text, &key), Some(handle));
        }

        #[test]
        fn nothing_else_is(text in "[A-Za-z0-9_-]{0,300}") {
            prop_assert_eq!(Handle::read(&text, &key(1)), None);
        }
    }

    #[test]
    fn what_was_altered_is_not_read() {
        let key_here = key(1);
        let text = handle("model", "request", 5, 0).sign(&key_here);
        assert_eq!(Handle::read(&text, &key(2)), None);
        for (at, _) in text.char_indices() {
            let mut other = text.clone().into_bytes();
            other[at] = if other[at] == b'A' { b'B' } else { b'A' };
            let other = String::from_utf8(other).expect("ASCII");
            // The last character has bits that no byte takes.
            let read = Handle::read(&other, &key_here);
            assert!(read.is_none(), "{at}");
            assert_eq!(Handle::read(&text[..at], &key_here), None);
        }
    }

    #[test]
    fn a_request_is_one_event_wherever_it_is_reserved() {
        let (one, mut other) = (handle("m", "r", 1, 0), handle("m", "r", 2, 9));
        assert_ne!(one.event_id(), other.event_id());
        other.user_id = one.user_id;
        assert_eq!(one.event_id(), other.event_id());
        other.request_id = "s".parse().expect("valid");
        assert_ne!(one.event_id(), other.event_id());
        assert_eq!(one.event_id().0.get_version_num(), 8);
    }
}
