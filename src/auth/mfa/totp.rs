//! Time-based codes (RFC 6238 on RFC 4226), as all authenticator apps make them.

use aws_lc_rs::{constant_time::verify_slices_are_equal, hmac, rand};
use chrono::{DateTime, Utc};

use crate::{
    error::{Error, Result},
    model::TotpCode,
};

/// 160 bits: as many as the hash has (RFC 4226 §4, R6).
pub(super) const SECRET_BYTES: usize = 20;

/// As apps expect it, whatever the URI says.
pub(super) const STEP_SECS: i64 = 30;

/// Steps before and after the present one whose codes count: clocks of phones are not exact, and people
/// take time to type (RFC 6238 §5.2 and §6).
const DRIFT_STEPS: i64 = 1;

/// What an app and this service share. Not `Debug`.
#[derive(Clone)]
pub(super) struct TotpSecret(pub(super) [u8; SECRET_BYTES]);

impl TotpSecret {
    /// Makes a new one.
    ///
    /// # Errors
    /// `Internal` when the random source fails.
    pub(super) fn generate() -> Result<Self> {
        let mut secret = [0; SECRET_BYTES];
        rand::fill(&mut secret).map_err(|_| Error::internal("the random source failed"))?;
        Ok(Self(secret))
    }

    /// The code of a time step.
    fn code(&self, step: i64) -> TotpCode {
        let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &self.0);
        let mac = hmac::sign(&key, &step.to_be_bytes());
        let mac = mac.as_ref();
        // RFC 4226 §5.3: the last four bits say where to read 31.
        let at = usize::from(mac[mac.len() - 1] & 0xf);
        let read = [mac[at], mac[at + 1], mac[at + 2], mac[at + 3]];
        let mut rest = u32::from_be_bytes(read) & 0x7fff_ffff;
        let mut digits = [b'0'; TotpCode::DIGITS];
        for digit in digits.iter_mut().rev() {
            *digit += u8::try_from(rest % 10).expect("a digit");
            rest /= 10;
        }
        TotpCode(digits)
    }

    /// The time step that a code is of, if it counts at this time and none after `last_step` was used.
    /// Takes as long for a wrong code as for a right one.
    pub(super) fn step_of(
        &self,
        code: &TotpCode,
        last_step: i64,
        at: DateTime<Utc>,
    ) -> Option<i64> {
        let now = step_at(at);
        let steps = now - DRIFT_STEPS..=now + DRIFT_STEPS;
        steps.fold(None, |found, step| {
            let is_right = verify_slices_are_equal(&self.code(step).0, &code.0).is_ok();
            found.or((is_right && step > last_step).then_some(step))
        })
    }

    /// As apps take it: base 32 (RFC 4648 §6) without padding.
    pub(super) fn base32(&self) -> String {
        const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        let chunks = self.0.chunks(5).flat_map(|chunk| {
            let bits = chunk
                .iter()
                .fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
            (0..8)
                .rev()
                .map(move |at| ALPHABET[(bits >> (5 * at) & 31) as usize])
        });
        chunks.map(char::from).collect()
    }
}

fn step_at(at: DateTime<Utc>) -> i64 {
    at.timestamp().div_euclid(STEP_SECS)
}

#[cfg(test)]
mod tests {
    use std::{
        env,
        io::Write as _,
        path::PathBuf,
        process::{Command, Stdio},
    };

    use proptest::prelude::*;

    use super::*;

    /// RFC 6238, appendix B, for SHA-1; of its eight digits the last six.
    #[test]
    fn the_codes_are_those_of_the_rfc() {
        let secret = TotpSecret(*b"12345678901234567890");
        for (secs, code) in [
            (59, b"287082"),
            (1_111_111_109, b"081804"),
            (1_111_111_111, b"050471"),
            (1_234_567_890, b"005924"),
            (2_000_000_000, b"279037"),
            (20_000_000_000, b"353130"),
        ] {
            let at = DateTime::from_timestamp(secs, 0).expect("valid");
            assert_eq!(&secret.code(step_at(at)).0, code, "{secs}");
            assert_eq!(secret.step_of(&TotpCode(*code), 0, at), Some(secs / 30));
        }
    }

    /// RFC 4226, appendix D.
    #[test]
    fn the_codes_of_counters_are_those_of_the_rfc() {
        let secret = TotpSecret(*b"12345678901234567890");
        for (counter, code) in (0..).zip([
            b"755224", b"287082", b"359152", b"969429", b"338314", b"254676", b"287922", b"162583",
            b"399871", b"520489",
        ]) {
            assert_eq!(&secret.code(counter).0, code, "{counter}");
        }
    }

    #[test]
    fn base_32_is_that_of_the_rfc() {
        assert_eq!(
            TotpSecret(*b"12345678901234567890").base32(),
            "GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ"
        );
    }

    /// Another's implementation, for as many secrets and times as are quick.
    #[test]
    fn the_codes_are_those_of_python() {
        const CODES: &str = "import json, sys, pyotp\n\
            given = json.load(sys.stdin)\n\
            json.dump([pyotp.TOTP(secret).at(at) for secret, at in given], sys.stdout)";
        let mut random = [0_u8; 8];
        let given: Vec<(String, TotpSecret, i64)> = (0..5000)
            .map(|_| {
                rand::fill(&mut random).expect("random");
                let at = i64::from_be_bytes(random).rem_euclid(1 << 35);
                let secret = TotpSecret::generate().expect("random");
                (secret.base32(), secret, at)
            })
            .collect();
        let input: Vec<_> = given.iter().map(|(text, _, at)| (text, at)).collect();
        let input = serde_json::to_string(&input).expect("JSON");
        let codes: Vec<String> = serde_json::from_str(&python(CODES, &input)).expect("JSON");
        assert_eq!(codes.len(), given.len());
        for ((text, secret, at), code) in given.iter().zip(codes) {
            let at = DateTime::from_timestamp(*at, 0).expect("valid");
            let ours = secret.code(step_at(at)).0;
            assert_eq!(ours, code.as_bytes(), "{text} at {at}");
        }
    }

    /// As `tests/it/auth/python.rs` does it.
    fn python(script: &str, input: &str) -> String {
        let python = env::var_os("TOLLKEEPER_TEST_PYTHON").map_or_else(
            || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin/python"),
            PathBuf::from,
        );
        let mut child = Command::new(python)
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("scripts/test makes a Python, or TOLLKEEPER_TEST_PYTHON names one");
        let mut stdin = child.stdin.take().expect("piped");
        stdin.write_all(input.as_bytes()).expect("it reads");
        drop(stdin);
        let output = child.wait_with_output().expect("ended");
        assert!(
            output.status.success(),
            "the packages of scripts/requirements.txt"
        );
        String::from_utf8(output.stdout).expect("JSON")
    }

    proptest! {
        #[test]
        fn a_code_counts_a_step_before_and_after_and_once(
            secret in any::<[u8; SECRET_BYTES]>(), secs in 0_i64..1 << 40, off in -3_i64..=3
        ) {
            let secret = TotpSecret(secret);
            let at = DateTime::from_timestamp(secs, 0).expect("valid");
            let step = step_at(at) + off;
            let code = secret.code(step);
            let found = secret.step_of(&code, -10, at);
            if off.abs() <= 1 {
                // Unless two steps have the same code, which happens.
                let found = found.expect("in the window");
                prop_assert!(secret.code(found).0 == code.0);
                prop_assert!(secret.step_of(&code, step_at(at) + 1, at).is_none());
                prop_assert!(secret.step_of(&code, found, at).is_none_or(|next| next > found));
            } else if let Some(found) = found {
                prop_assert!(found != step && secret.code(found).0 == code.0);
            }
        }
    }
}
