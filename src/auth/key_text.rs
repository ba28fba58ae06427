//! The text of keys: a prefix of their kind, 256 random bits, a checksum that scanners for leaks can
//! test.

use aws_lc_rs::digest;

use super::random::{ALPHABET, random_alphanumeric};
use crate::error::Result;

/// 43 × log2(62) = 256 bits.
const SECRET_CHARS: usize = 43;
const CHECKSUM_CHARS: usize = 6;

/// Keys that begin alike; access tokens begin with `ey`.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyKind {
    prefix: &'static str,
}

/// Of service accounts.
pub(super) const SERVICE_KEY: KeyKind = KeyKind { prefix: "tks_" };

/// Of users.
pub(super) const API_KEY: KeyKind = KeyKind { prefix: "tka_" };

impl KeyKind {
    /// Makes a new key.
    ///
    /// # Errors
    /// `Internal` when the random source fails.
    pub(super) fn generate(self) -> Result<String> {
        let mut key = format!("{}{}", self.prefix, random_alphanumeric(SECRET_CHARS)?);
        let checksum = checksum(&key);
        key.push_str(&checksum);
        Ok(key)
    }

    /// Whether a credential is of this kind.
    pub(super) fn matches(self, credential: &str) -> bool {
        credential.starts_with(self.prefix)
    }

    /// What is stored of a key, SHA-256: 256 random bits cannot be guessed, so no slow hash is
    /// needed. `None` for what is no key: a wrong checksum costs no look-up.
    pub(super) fn hash(self, key: &str) -> Option<Vec<u8>> {
        let body_len = self.prefix.len() + SECRET_CHARS;
        let well_formed = key.len() == body_len + CHECKSUM_CHARS
            && key.is_ascii()
            && self.matches(key)
            && key[body_len..] == checksum(&key[..body_len]);
        well_formed.then(|| {
            digest::digest(&digest::SHA256, key.as_bytes())
                .as_ref()
                .to_vec()
        })
    }
}

/// CRC-32 in base 62, most significant digit first.
fn checksum(body: &str) -> String {
    let mut rest = crc32fast::hash(body.as_bytes());
    let mut digits = [b'0'; CHECKSUM_CHARS];
    for digit in digits.iter_mut().rev() {
        *digit = ALPHABET[(rest % 62) as usize];
        rest /= 62;
    }
    digits.iter().copied().map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KINDS: [KeyKind; 2] = [SERVICE_KEY, API_KEY];

    #[test]
    fn keys_are_distinct_and_well_formed() {
        for kind in KINDS {
            let [a, b] = [(); 2].map(|()| kind.generate().expect("random"));
            assert_ne!(a, b);
            assert_eq!(a.len(), 53);
            let [a, b] = [a, b].map(|key| kind.hash(&key).expect("well formed"));
            assert_ne!(a, b);
        }
    }

    #[test]
    fn a_key_of_one_kind_is_none_of_another() {
        let key = SERVICE_KEY.generate().expect("random");
        assert!(SERVICE_KEY.matches(&key) && !API_KEY.matches(&key));
        assert!(API_KEY.hash(&key).is_none());
        // Nor by another prefix: the checksum covers it.
        assert!(API_KEY.hash(&key.replacen("tks", "tka", 1)).is_none());
    }

    proptest! {
        #[test]
        fn a_changed_key_is_refused(at in 4_usize..53, to in 0_usize..62) {
            for kind in KINDS {
                let key = kind.generate().expect("random");
                let mut changed = key.clone().into_bytes();
                changed[at] = ALPHABET[to];
                let changed = String::from_utf8(changed).expect("ASCII");
                prop_assert_eq!(kind.hash(&changed).is_some(), changed == key);
            }
        }

        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            for kind in KINDS {
                let prefixed = format!("{}{text}", kind.prefix);
                prop_assert!(kind.hash(&text).is_none() && kind.hash(&prefixed).is_none());
            }
        }
    }
}
