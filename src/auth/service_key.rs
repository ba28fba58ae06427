//! Keys of service accounts: `tks_`, 256 random bits, a checksum that scanners for leaks can test.

use aws_lc_rs::digest;

use super::random::{ALPHABET, random_alphanumeric};
use crate::error::Result;

const PREFIX: &str = "tks_";
/// 43 × log2(62) = 256 bits.
const SECRET_CHARS: usize = 43;
const CHECKSUM_CHARS: usize = 6;

/// Makes a new key.
///
/// # Errors
/// `Internal` when the random source fails.
pub(super) fn generate() -> Result<String> {
    let mut key = format!("{PREFIX}{}", random_alphanumeric(SECRET_CHARS)?);
    let checksum = checksum(&key);
    key.push_str(&checksum);
    Ok(key)
}

/// Whether a credential is of this kind rather than an access token.
pub(super) fn is_service_key(credential: &str) -> bool {
    credential.starts_with(PREFIX)
}

/// What is stored of a key, SHA-256: 256 random bits cannot be guessed, so no slow hash is needed.
/// `None` for what is no key: a wrong checksum costs no look-up.
pub(super) fn hash(key: &str) -> Option<Vec<u8>> {
    let body_len = PREFIX.len() + SECRET_CHARS;
    let well_formed = key.len() == body_len + CHECKSUM_CHARS
        && key.is_ascii()
        && is_service_key(key)
        && key[body_len..] == checksum(&key[..body_len]);
    well_formed.then(|| {
        digest::digest(&digest::SHA256, key.as_bytes())
            .as_ref()
            .to_vec()
    })
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

    #[test]
    fn keys_are_distinct_and_well_formed() {
        let (a, b) = (generate().expect("random"), generate().expect("random"));
        assert_ne!(a, b);
        assert_eq!(a.len(), 53);
        assert_ne!(
            hash(&a).expect("well formed"),
            hash(&b).expect("well formed")
        );
    }

    proptest! {
        #[test]
        fn a_changed_key_is_refused(at in 4_usize..53, to in 0_usize..62) {
            let key = generate().expect("random");
            let mut changed = key.clone().into_bytes();
            changed[at] = ALPHABET[to];
            let changed = String::from_utf8(changed).expect("ASCII");
            prop_assert_eq!(hash(&changed).is_some(), changed == key);
        }

        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            let prefixed = format!("tks_{text}");
            prop_assert!(hash(&text).is_none() && hash(&prefixed).is_none());
        }
    }
}
