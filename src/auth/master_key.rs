use aws_lc_rs::{hkdf, hmac};

/// The secret that others are derived from, one for each purpose (RFC 5869).
pub struct MasterKey(hkdf::Prk);

impl MasterKey {
    /// Takes the configured secret as it is; its strength was checked with the settings.
    pub fn new(secret: &[u8]) -> Self {
        Self(hkdf::Salt::new(hkdf::HKDF_SHA256, b"tollkeeper").extract(secret))
    }

    /// A key for `purpose` alone: what leaks there tells nothing elsewhere.
    pub fn mac_key(&self, purpose: &str) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.secret(purpose))
    }

    /// The bytes of a key for `purpose` alone.
    pub fn secret(&self, purpose: &str) -> [u8; 32] {
        let mut secret = [0; 32];
        let info = [purpose.as_bytes()];
        let expanded = self.0.expand(&info, hkdf::HKDF_SHA256);
        let filled = expanded.and_then(|okm| okm.fill(&mut secret));
        filled.expect("one block is within the limit of the expansion");
        secret
    }
}
