//! Secrets of authenticator apps as they are stored: only who has the master key reads them.

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};

use super::totp::TotpSecret;
use crate::{
    auth::MasterKey,
    error::{Error, Result},
    model::{FactorId, UserId},
};

/// Seals and opens: AES-256-GCM under random nonces, of which there are enough for 2^32 enrolments
/// (NIST SP 800-38D §8.3).
pub(super) struct Sealing {
    key: RandomizedNonceKey,
}

impl Sealing {
    pub(super) fn new(master_key: &MasterKey) -> Self {
        let key = master_key.secret("totp-secret/v1");
        Self {
            key: RandomizedNonceKey::new(&AES_256_GCM, &key).expect("256 bits"),
        }
    }

    /// Nonce, ciphertext and tag. Opens for this user and enrolment alone, so that no row's secret is of
    /// use in another row.
    ///
    /// # Errors
    /// `Internal` when the random source fails.
    pub(super) fn seal(&self, secret: &TotpSecret, user: UserId, id: FactorId) -> Result<Vec<u8>> {
        let mut text = secret.0.to_vec();
        let nonce = self
            .key
            .seal_in_place_append_tag(bound_to(user, id), &mut text)
            .map_err(|_| Error::internal("a secret could not be sealed"))?;
        Ok([&nonce.as_ref()[..], &text].concat())
    }

    /// # Errors
    /// `Internal`: the master key is another one, or somebody changed the row. The cause says what to do.
    pub(super) fn open(&self, sealed: &[u8], user: UserId, id: FactorId) -> Result<TotpSecret> {
        let opened = sealed.split_first_chunk::<NONCE_LEN>().and_then(|parts| {
            let (nonce, mut text) = (Nonce::from(parts.0), parts.1.to_vec());
            let opened = self.key.open_in_place(nonce, bound_to(user, id), &mut text);
            TryInto::try_into(&*opened.ok()?).ok().map(TotpSecret)
        });
        opened.ok_or_else(|| {
            Error::internal(format!(
                "the TOTP secret of user {user} cannot be read: auth.master_key is not the one that \
                 it was sealed with, or its row was changed; restore the key, or `tollkeeper users \
                 reset-mfa` the user; recovery codes still work"
            ))
        })
    }
}

fn bound_to(user: UserId, id: FactorId) -> Aad<[u8; 32]> {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(user.0.as_bytes());
    bytes[16..].copy_from_slice(id.0.as_bytes());
    Aad::from(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_opens_for_its_user_and_enrolment_and_under_its_key_alone() {
        let (sealing, other) = (
            Sealing::new(&MasterKey::new(b"one")),
            Sealing::new(&MasterKey::new(b"another")),
        );
        let (user, id) = (UserId::new(), FactorId::new());
        let secret = TotpSecret::generate().expect("random");
        let sealed = sealing.seal(&secret, user, id).expect("sealed");
        assert_eq!(sealed.len(), 12 + 20 + 16);
        assert!(!sealed.windows(20).any(|window| window == secret.0));
        assert!(sealing.open(&sealed, user, id).expect("opened").0 == secret.0);
        assert!(sealing.open(&sealed, UserId::new(), id).is_err());
        assert!(sealing.open(&sealed, user, FactorId::new()).is_err());
        assert!(other.open(&sealed, user, id).is_err());
        // The same secret is never sealed alike.
        assert_ne!(sealing.seal(&secret, user, id).expect("sealed"), sealed);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(sealing.open(&changed, user, id).is_err(), "{at}");
            assert!(sealing.open(&sealed[..at], user, id).is_err(), "{at}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_to_operators_alone() {
        let sealing = Sealing::new(&MasterKey::new(b"one"));
        let Err(error) = sealing.open(&[7; 48], UserId::new(), FactorId::new()) else {
            panic!("opened");
        };
        assert_eq!(error.to_string(), "internal error");
        let Error::Internal(cause) = error else {
            panic!("{error}");
        };
        assert!(cause.to_string().contains("auth.master_key"), "{cause}");
    }
}
