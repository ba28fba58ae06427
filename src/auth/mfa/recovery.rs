//! Recovery codes: for whoever has lost the authenticator app.

use aws_lc_rs::{digest, rand};

use crate::{
    error::{Error, Result},
    model::{RecoveryCode, UserId},
};

/// As many as are made at once.
pub(super) const COUNT: usize = 10;

/// New codes of a user, and what is stored of them.
///
/// # Errors
/// `Internal` when the random source fails.
pub(super) fn generate(user: UserId) -> Result<(Vec<RecoveryCode>, Vec<Vec<u8>>)> {
    let codes: Vec<RecoveryCode> = (0..COUNT).map(|_| random()).collect::<Result<_>>()?;
    let hashes = codes.iter().map(|code| hash(user, code)).collect();
    Ok((codes, hashes))
}

fn random() -> Result<RecoveryCode> {
    let mut bytes = [0; RecoveryCode::CHARS];
    rand::fill(&mut bytes).map_err(|_| Error::internal("the random source failed"))?;
    Ok(RecoveryCode::from_random(bytes))
}

/// SHA-256, of 120 random bits (ASVS 5.0, 6.5.2), without the master key: whoever lost the app does not
/// depend on it.
pub(super) fn hash(user: UserId, code: &RecoveryCode) -> Vec<u8> {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(b"recovery-code/v1");
    context.update(user.0.as_bytes());
    context.update(code.as_bytes());
    context.finish().as_ref().to_vec()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn codes_are_distinct_and_hashed_for_their_user() {
        let (one, other) = (UserId::new(), UserId::new());
        let (codes, hashes) = generate(one).expect("random");
        assert_eq!(codes.len(), COUNT);
        let distinct: BTreeSet<_> = hashes.iter().collect();
        assert_eq!(distinct.len(), COUNT);
        for (code, stored) in codes.iter().zip(&hashes) {
            let typed = code.grouped().to_lowercase().parse().expect("a code");
            assert_eq!(&hash(one, &typed), stored);
            assert_ne!(&hash(other, &typed), stored);
        }
    }
}
