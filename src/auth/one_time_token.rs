//! Tokens that are mailed: derived from their ids, never stored.

use aws_lc_rs::{digest, hmac};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use uuid::Uuid;

use super::MasterKey;
use crate::model::OneTimeTokenId;

const PREFIX: &str = "tko_";
const ID_BYTES: usize = 16;

/// Makes and reads mailed tokens: `tko_` and base64url of an id and its HMAC, 256 bits that nobody guesses
/// who has not the master key. A leaked database holds their ids and hashes, and neither makes one.
pub(super) struct OneTimeTokens {
    key: hmac::Key,
}

impl OneTimeTokens {
    pub(super) fn new(master_key: &MasterKey) -> Self {
        Self {
            key: master_key.mac_key("one-time-token/v1"),
        }
    }

    /// The one token of this id: deriving it again gives the same.
    pub(super) fn derive(&self, id: OneTimeTokenId) -> String {
        let mut bytes = id.0.as_bytes().to_vec();
        let mac = hmac::sign(&self.key, &bytes);
        bytes.extend(mac.as_ref());
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }

    /// The id of a token of ours; `None` for anything else, which costs no look-up.
    pub(super) fn read(&self, token: &str) -> Option<OneTimeTokenId> {
        let bytes = URL_SAFE_NO_PAD.decode(token.strip_prefix(PREFIX)?).ok()?;
        let (id, mac) = bytes.split_at_checked(ID_BYTES)?;
        hmac::verify(&self.key, id, mac).ok()?;
        Some(OneTimeTokenId(Uuid::from_slice(id).ok()?))
    }

    /// What is stored of a token: SHA-256, as 256 random bits need no slow hash.
    pub(super) fn hash(&self, id: OneTimeTokenId) -> Vec<u8> {
        let token = self.derive(id);
        let hash = digest::digest(&digest::SHA256, token.as_bytes());
        hash.as_ref().to_vec()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn only_our_own_tokens_are_read(at in 4_usize..68, noise in any::<String>()) {
            let tokens = OneTimeTokens::new(&MasterKey::new(&[7; 32]));
            let id = OneTimeTokenId::new();
            let token = tokens.derive(id);
            prop_assert_eq!(token.len(), 68);
            prop_assert_eq!(tokens.read(&token), Some(id));
            let mut altered = token.clone().into_bytes();
            altered[at] = if altered[at] == b'A' { b'B' } else { b'A' };
            let altered = String::from_utf8(altered).expect("ASCII");
            prop_assert_eq!(tokens.read(&altered), None);
            prop_assert_eq!(tokens.read(&noise), None);
            prop_assert_eq!(tokens.read(&format!("tko_{noise}")), None);
            let others = OneTimeTokens::new(&MasterKey::new(&[8; 32]));
            prop_assert_eq!(others.read(&token), None);
        }
    }

    #[test]
    fn a_token_is_no_refresh_token_and_none_of_another_kind() {
        let tokens = OneTimeTokens::new(&MasterKey::new(&[7; 32]));
        let token = tokens.derive(OneTimeTokenId::new());
        assert_eq!(tokens.read(&token.replacen("tko_", "tkr_", 1)), None);
        assert_eq!(tokens.hash(OneTimeTokenId::new()).len(), 32);
    }
}
