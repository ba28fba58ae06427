use std::str::FromStr;

use chrono::{DateTime, Utc};

use super::{FactorId, User, UserId, Violation};

/// A proof beside the password, by its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Factor {
    Totp,
    RecoveryCode,
}

impl Factor {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Totp => "totp",
            Self::RecoveryCode => "recovery_code",
        }
    }
}

/// A code that somebody typed in. Not `Debug`, as nothing that may let anybody in.
#[derive(Clone, PartialEq, Eq)]
pub enum MfaCode {
    Totp(TotpCode),
    Recovery(RecoveryCode),
}

impl FromStr for MfaCode {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        let totp = text.parse().map(Self::Totp);
        let code = totp.or_else(|_| text.parse().map(Self::Recovery));
        code.map_err(|_| "must be six digits or a recovery code".into())
    }
}

/// What an authenticator app shows.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct TotpCode(pub [u8; TotpCode::DIGITS]);

impl TotpCode {
    pub const DIGITS: usize = 6;
}

impl FromStr for TotpCode {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        let digits = typed(text);
        match <[u8; Self::DIGITS]>::try_from(&*digits) {
            Ok(digits) if digits.iter().all(u8::is_ascii_digit) => Ok(Self(digits)),
            _ => Err("must be six digits".into()),
        }
    }
}

/// A recovery code in the one spelling that counts.
#[derive(Clone, PartialEq, Eq)]
pub struct RecoveryCode([u8; RecoveryCode::CHARS]);

impl RecoveryCode {
    /// Five bits each. 112 are enough for a fast hash (ASVS 5.0, 6.5.2).
    pub const CHARS: usize = 24;
    const GROUP: usize = 4;
    /// Crockford's base 32: nothing in it looks like something else in it.
    const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

    /// The code of these random bytes.
    pub fn from_random(bytes: [u8; Self::CHARS]) -> Self {
        Self(bytes.map(|byte| Self::ALPHABET[usize::from(byte % 32)]))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// In groups, for people.
    pub fn grouped(&self) -> String {
        let groups = self.0.chunks(Self::GROUP);
        let groups: Vec<_> = groups.map(String::from_utf8_lossy).collect();
        groups.join("-")
    }
}

impl FromStr for RecoveryCode {
    type Err = Violation;

    /// As people type it: in any case, with hyphens and spaces anywhere, O for 0, I and L for 1.
    fn from_str(text: &str) -> Result<Self, Violation> {
        let chars = typed(text)
            .into_iter()
            .map(|c| match c.to_ascii_uppercase() {
                b'O' => b'0',
                b'I' | b'L' => b'1',
                c => c,
            });
        let chars: Vec<u8> = chars.collect();
        match <[u8; Self::CHARS]>::try_from(chars) {
            Ok(chars) if chars.iter().all(|c| Self::ALPHABET.contains(c)) => Ok(Self(chars)),
            _ => Err("must be a recovery code".into()),
        }
    }
}

/// What was typed without what groups it; of a text that is much too long only as much as shows that.
fn typed(text: &str) -> Vec<u8> {
    let groups = |byte: &u8| matches!(byte, b' ' | b'-');
    text.bytes()
        .take(100)
        .filter(|byte| !groups(byte))
        .collect()
}

/// What an authenticator app was given. Not `Debug`.
#[derive(Clone)]
pub struct TotpCredential {
    pub id: FactorId,
    pub sealed_secret: Vec<u8>,
    /// Until it is confirmed it counts for nothing.
    pub is_confirmed: bool,
    /// Codes of this time step and before count no more.
    pub last_step: i64,
}

/// A user and all that they are asked for, from one moment. Not `Debug`.
pub struct MfaStanding {
    pub user: User,
    pub password_hash: Option<String>,
    pub totp: Option<TotpCredential>,
    pub recovery_codes_left: i64,
    /// When that was so, by the clock of the database: the one that all replicas share.
    pub at: DateTime<Utc>,
}

impl MfaStanding {
    /// The second factor in force.
    pub fn confirmed(&self) -> Option<&TotpCredential> {
        self.totp.as_ref().filter(|totp| totp.is_confirmed)
    }
}

/// A code that was right, to be used up with what it is used for.
pub struct UsedCode {
    pub user_id: UserId,
    /// The enrolment that it was checked against.
    pub credential: FactorId,
    pub what: UsedFactor,
}

pub enum UsedFactor {
    /// Of this time step.
    Totp(i64),
    /// The stored hash of a recovery code.
    RecoveryCode(Vec<u8>),
}

impl UsedFactor {
    pub fn factor(&self) -> Factor {
        match self {
            Self::Totp(_) => Factor::Totp,
            Self::RecoveryCode(_) => Factor::RecoveryCode,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn codes_are_read_as_people_type_them() {
        for text in ["123456", "123 456", " 123-456 "] {
            let code = text.parse::<TotpCode>().map(|code| code.0);
            assert_eq!(code.as_ref(), Ok(b"123456"), "{text}");
            assert!(matches!(text.parse(), Ok(MfaCode::Totp(_))));
        }
        for text in ["", "12345", "1234567", "12345a", "١٢٣٤٥٦", "------"] {
            assert!(text.parse::<TotpCode>().is_err(), "{text}");
            assert!(text.parse::<MfaCode>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_recovery_code_is_found_in_any_spelling(
            bytes in any::<[u8; RecoveryCode::CHARS]>(), style in 0..5_usize
        ) {
            let code = RecoveryCode::from_random(bytes);
            let grouped = code.grouped();
            prop_assert_eq!(grouped.len(), 29);
            let typed = match style {
                0 => grouped,
                1 => grouped.to_lowercase(),
                2 => grouped.replace('-', ""),
                3 => grouped.replace('-', " ").replace('0', "o"),
                _ => grouped.replace('1', "l"),
            };
            prop_assert!(typed.parse::<RecoveryCode>().is_ok_and(|read| read == code));
            let is_recovery = matches!(typed.parse(), Ok(MfaCode::Recovery(read)) if read == code);
            prop_assert!(is_recovery);
        }

        #[test]
        fn any_text_is_read_without_panic(text in any::<String>()) {
            let _ = text.parse::<MfaCode>();
        }
    }
}
