//! Passwords: which may be set, how they are hashed, and which hashes of other systems count.

use std::str::FromStr;

use argon2::{
    Algorithm, Argon2, Params, PasswordHasher as _, PasswordVerifier as _, Version,
    password_hash::phc::PasswordHash,
};
use aws_lc_rs::rand;
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use pwhash::bcrypt::{BcryptSetup, BcryptVariant};

use super::{
    hash_pool::HashPool,
    password_policy::{BCRYPT_MAX_BYTES, check_length, check_strength, names_of},
};
use crate::{
    config::{
        MAX_ARGON2_ITERATIONS, MAX_ARGON2_MEMORY_KIB, MAX_BCRYPT_COST, PasswordScheme,
        PasswordSettings, argon2_is_too_costly,
    },
    error::{Error, Result},
    model::{Person, Violation},
};

/// Beyond this, as beyond the costs that may be set, one login would take a core for seconds.
const MAX_ARGON2_LANES: u32 = 16;
const MAX_SHA_CRYPT_ROUNDS: u32 = 1_000_000;

/// Hashes and checks passwords on a bounded pool. Cheap to clone.
#[derive(Clone)]
pub(super) struct Passwords {
    settings: PasswordSettings,
    pool: HashPool,
    /// What an unknown account's password is checked against, at the same cost as a known one's.
    dummy: String,
}

/// The answer for a password and the hash it was checked against.
pub(super) struct Verdict {
    pub(super) matches: bool,
    /// A hash of the configured scheme and cost, when the old one is weaker.
    pub(super) rehashed: Option<String>,
}

/// A password to check. Of any length up to 1024 bytes: other systems had other rules.
pub struct LoginPassword(String);

impl FromStr for LoginPassword {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        match text.len() {
            0 => Err("must not be empty".into()),
            1..=1024 => Ok(Self(text.to_owned())),
            _ => Err("must be at most 1024 bytes".into()),
        }
    }
}

/// A hash made by another system, of a scheme and a cost that a login can check.
pub struct ImportedHash(String);

impl ImportedHash {
    pub(super) fn into_string(self) -> String {
        self.0
    }
}

impl FromStr for ImportedHash {
    type Err = Violation;

    fn from_str(text: &str) -> Result<Self, Violation> {
        match Scheme::of(text) {
            None => Err("must be a bcrypt, argon2 or SHA-crypt hash".into()),
            Some(scheme) if scheme.is_too_costly() => {
                Err("must not cost more than a login may spend".into())
            }
            Some(_) => Ok(Self(text.to_owned())),
        }
    }
}

impl Passwords {
    pub(super) fn new(settings: &PasswordSettings) -> Result<Self> {
        let dummy = hash(settings, "a password that nobody has")?;
        Ok(Self {
            settings: settings.clone(),
            pool: HashPool::new(settings)?,
            dummy,
        })
    }

    /// Whether a password has a length that may be set.
    pub(super) fn check_length(&self, password: &str) -> Result<(), Violation> {
        check_length(password, &self.settings)
    }

    /// Hashes a password that a person is to have from now on.
    ///
    /// # Errors
    /// `Invalid` naming `field`: its length, or too easy to guess for who knows the person ·
    /// `Overloaded` · `Internal`
    pub(super) async fn hash_new(
        &self,
        field: &'static str,
        password: String,
        person: &Person,
    ) -> Result<String> {
        let settings = self.settings.clone();
        let names = names_of(person);
        self.pool
            .run(move || {
                check_length(&password, &settings)
                    .and_then(|()| check_strength(&password, &names, &settings))
                    .map_err(|violation| Error::invalid(field, violation))?;
                hash(&settings, &password)
            })
            .await?
    }

    /// Checks a password against a hash, or against nothing at the same cost.
    ///
    /// # Errors
    /// `Overloaded` · `Internal`
    pub(super) async fn verify(
        &self,
        password: LoginPassword,
        known: Option<String>,
    ) -> Result<Verdict> {
        let settings = self.settings.clone();
        let is_known = known.is_some();
        let checked = known.unwrap_or_else(|| self.dummy.clone());
        self.pool
            .run(move || {
                let matches = verify(&password.0, &checked) && is_known;
                let outdated =
                    matches && Scheme::of(&checked).is_none_or(|s| s.is_outdated(&settings));
                // With bcrypt a longer password than it can hash stays under its old hash.
                let fits = settings.scheme != PasswordScheme::Bcrypt
                    || password.0.len() <= BCRYPT_MAX_BYTES;
                let rehashed = (outdated && fits)
                    .then(|| hash(&settings, &password.0))
                    .transpose()?;
                Ok(Verdict { matches, rehashed })
            })
            .await?
    }
}

/// A stored hash's scheme and cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scheme {
    Argon2 {
        id: bool,
        memory_kib: u32,
        iterations: u32,
        lanes: u32,
    },
    Bcrypt {
        cost: u32,
    },
    ShaCrypt {
        rounds: u32,
    },
}

impl Scheme {
    /// `None` when the text is not a whole hash of a scheme that can be checked.
    fn of(hash: &str) -> Option<Self> {
        if hash.starts_with("$argon2") {
            let parsed = PasswordHash::new(hash).ok()?;
            let algorithm = Algorithm::try_from(parsed.algorithm.as_str()).ok()?;
            let params = Params::try_from(&parsed).ok()?;
            parsed.salt?;
            parsed.hash?;
            return Some(Self::Argon2 {
                id: algorithm == Algorithm::Argon2id,
                memory_kib: params.m_cost(),
                iterations: params.t_cost(),
                lanes: params.p_cost(),
            });
        }
        let crypt64 = |text: &str, len: usize| {
            text.len() == len
                && text
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'.' || b == b'/')
        };
        if let Some(rest) = ["$2a$", "$2b$", "$2y$"]
            .iter()
            .find_map(|p| hash.strip_prefix(p))
        {
            let (cost, digest) = rest.split_once('$')?;
            let cost = cost
                .parse()
                .ok()
                .filter(|cost| cost_is_two_digits(rest) && (4..=31).contains(cost))?;
            return crypt64(digest, 53).then_some(Self::Bcrypt { cost });
        }
        let (rest, digest_len) = match (hash.strip_prefix("$5$"), hash.strip_prefix("$6$")) {
            (Some(rest), _) => (rest, 43),
            (_, Some(rest)) => (rest, 86),
            _ => return None,
        };
        let (rounds, rest) = match rest.strip_prefix("rounds=") {
            Some(rest) => {
                let (rounds, rest) = rest.split_once('$')?;
                (rounds.parse().ok()?, rest)
            }
            None => (5000, rest),
        };
        let (salt, digest) = rest.split_once('$')?;
        (crypt64(salt, salt.len().min(16)) && crypt64(digest, digest_len))
            .then_some(Self::ShaCrypt { rounds })
    }

    fn is_too_costly(self) -> bool {
        match self {
            Self::Argon2 {
                memory_kib,
                iterations,
                lanes,
                ..
            } => {
                memory_kib > MAX_ARGON2_MEMORY_KIB
                    || iterations > MAX_ARGON2_ITERATIONS
                    || lanes > MAX_ARGON2_LANES
                    || argon2_is_too_costly(memory_kib, iterations)
            }
            Self::Bcrypt { cost } => cost > MAX_BCRYPT_COST,
            Self::ShaCrypt { rounds } => rounds > MAX_SHA_CRYPT_ROUNDS,
        }
    }

    /// Whether a new hash would be of another scheme or a higher cost.
    fn is_outdated(self, settings: &PasswordSettings) -> bool {
        match (settings.scheme, self) {
            (
                PasswordScheme::Argon2id,
                Self::Argon2 {
                    id,
                    memory_kib,
                    iterations,
                    ..
                },
            ) => {
                !id || memory_kib < settings.argon2_memory_kib
                    || iterations < settings.argon2_iterations
            }
            (PasswordScheme::Bcrypt, Self::Bcrypt { cost }) => cost < settings.bcrypt_cost,
            _ => true,
        }
    }
}

fn cost_is_two_digits(rest: &str) -> bool {
    matches!(rest.as_bytes(), [tens, ones, b'$', ..] if tens.is_ascii_digit() && ones.is_ascii_digit())
}

fn hash(settings: &PasswordSettings, password: &str) -> Result<String> {
    let mut salt = [0_u8; 16];
    rand::fill(&mut salt).map_err(|_| Error::internal("the random source failed"))?;
    match settings.scheme {
        PasswordScheme::Argon2id => {
            let params = Params::new(
                settings.argon2_memory_kib,
                settings.argon2_iterations,
                1,
                None,
            )
            .map_err(|error| Error::internal(error.to_string()))?;
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
                .hash_password_with_salt(password.as_bytes(), &salt)
                .map(|hash| hash.to_string())
                .map_err(|error| Error::internal(error.to_string()))
        }
        PasswordScheme::Bcrypt => {
            let salt = bcrypt_base64(&salt);
            let setup = BcryptSetup {
                salt: Some(&salt),
                cost: Some(settings.bcrypt_cost),
                variant: Some(BcryptVariant::V2b),
            };
            pwhash::bcrypt::hash_with(setup, password)
                .map_err(|error| Error::internal(error.to_string()))
        }
    }
}

/// Checks a password against a stored hash of any scheme; a malformed hash matches nothing.
fn verify(password: &str, hash: &str) -> bool {
    if password.contains('\0') {
        return false;
    }
    match Scheme::of(hash) {
        Some(scheme) if scheme.is_too_costly() => false,
        Some(Scheme::Argon2 { .. }) => Argon2::default()
            .verify_password(password.as_bytes(), hash)
            .is_ok(),
        // bcrypt would read the first 72 bytes only and let any tail pass.
        Some(Scheme::Bcrypt { .. }) => {
            password.len() <= BCRYPT_MAX_BYTES && pwhash::bcrypt::verify(password, hash)
        }
        Some(Scheme::ShaCrypt { .. }) => pwhash::unix::verify(password, hash),
        None => false,
    }
}

/// bcrypt's own alphabet.
fn bcrypt_base64(salt: &[u8; 16]) -> String {
    const STANDARD: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const BCRYPT: &[u8; 64] = b"./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    STANDARD_NO_PAD
        .encode(salt)
        .bytes()
        .filter_map(|b| STANDARD.iter().position(|s| *s == b))
        .map(|at| char::from(BCRYPT[at]))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cheap(scheme: PasswordScheme) -> PasswordSettings {
        PasswordSettings {
            scheme,
            argon2_memory_kib: 8,
            argon2_iterations: 1,
            bcrypt_cost: 4,
            ..Default::default()
        }
    }

    #[test]
    fn both_schemes_verify_their_own_hashes() {
        for scheme in [PasswordScheme::Argon2id, PasswordScheme::Bcrypt] {
            let hashed = hash(&cheap(scheme), "correct horse").expect("hashed");
            assert!(verify("correct horse", &hashed), "{hashed}");
            assert!(!verify("correct horsf", &hashed));
            assert!(
                !Scheme::of(&hashed)
                    .expect("known")
                    .is_outdated(&cheap(scheme))
            );
            assert_ne!(
                hashed,
                hash(&cheap(scheme), "correct horse").expect("hashed")
            );
        }
    }

    /// Made by Python, with bcrypt 4.0, argon2-cffi 25.1 and passlib 1.7.
    #[test]
    fn hashes_of_other_systems_are_imported_verified_and_outdated() {
        for foreign in [
            "$2b$04$9dBEZ2HpoiKFWz3mlWUcLe23YxjQgfL1O4O1s1FHCWYV9mBzYoKgK",
            "$2a$04$xYDZ8euaeIyC62eqL9vrIe4EhpKiqsGphez6tr7fV3eACClF5NRSO",
            "$2y$04$pUrKzu/aDDlI46Q0VF1avOH3s44r2uTJufw4T3EPcea1o4CQhUMn.",
            "$argon2id$v=19$m=32,t=1,p=2$bONNoctdk4DDHLrPTL7itQ$xGJkCqdz/PsZMY236mIZFfD8V0xE4bArg1jcIMnK4Zc",
            "$argon2i$v=19$m=32,t=1,p=2$HWKMNEoYWN0AaDl7l1DwOw$857nPYpnT4DBs33ds/2UTXGosPdj68K5Kow7bkJImls",
            "$argon2d$v=19$m=32,t=1,p=2$a0biISOr/YgRi/nmQG3xNw$PUIHevdZCDXZX/YZFclWQi/L5HSb2ZZi4Qpd+nvYeDo",
            "$5$rounds=1000$yGMREI97klsu7HfK$g9.IXGiJF9Pa/sd5rdD.NgbAS//M5IyfkcMjiRlUsn7",
            "$6$rounds=1000$jKWrP5bFLocK66er$rwT5cCIU/pSCrHoL84NUuZWVAbU812lsa./haYOgzSf/GjjSpfLjoGLCAz7mJE5vB3SPDkSF3WyHKabGAVJeH0",
            "$6$uirfD9kY9r.voz6y$9Z3DRNkjGybUWPvDjBbyPGRUXmDnAaUfRJSaJleFepbPbKgq8cBvUV2IoGAARK7omBE.YXiw9IzaOSjxpjogn.",
        ] {
            assert!(foreign.parse::<ImportedHash>().is_ok(), "{foreign}");
            assert!(verify("correct horse", foreign), "{foreign}");
            assert!(!verify("correct horsf", foreign), "{foreign}");
            let settings = PasswordSettings::default();
            let scheme = Scheme::of(foreign).expect("known");
            assert!(scheme.is_outdated(&settings), "{foreign}");
        }
    }

    #[test]
    fn weaker_hashes_and_those_of_another_scheme_are_outdated() {
        let argon2id = cheap(PasswordScheme::Argon2id);
        let bcrypt = cheap(PasswordScheme::Bcrypt);
        let weak = hash(&argon2id, "x").expect("hashed");
        let stronger = PasswordSettings {
            argon2_iterations: 2,
            ..argon2id.clone()
        };
        assert!(Scheme::of(&weak).expect("known").is_outdated(&stronger));
        assert!(Scheme::of(&weak).expect("known").is_outdated(&bcrypt));
        let crypted = hash(&bcrypt, "x").expect("hashed");
        assert!(Scheme::of(&crypted).expect("known").is_outdated(&argon2id));
        assert!(!Scheme::of(&crypted).expect("known").is_outdated(&bcrypt));
    }

    #[test]
    fn bcrypt_never_truncates() {
        let hashed = hash(&cheap(PasswordScheme::Bcrypt), &"a".repeat(72)).expect("hashed");
        assert!(verify(&"a".repeat(72), &hashed));
        assert!(!verify(&"a".repeat(73), &hashed));
        assert!(!verify(&format!("{}\0", "a".repeat(71)), &hashed));
    }

    #[test]
    fn only_whole_and_affordable_hashes_are_imported() {
        let bcrypt = hash(&cheap(PasswordScheme::Bcrypt), "x").expect("hashed");
        let argon2 = hash(&cheap(PasswordScheme::Argon2id), "x").expect("hashed");
        for good in [
            &bcrypt,
            &bcrypt.replacen("2b", "2y", 1),
            &argon2,
            // As much in all as may be.
            &argon2.replacen("m=8,t=1", "m=262144,t=4", 1),
            &argon2.replacen("m=8,t=1", "m=52428,t=20", 1),
        ] {
            assert!(good.parse::<ImportedHash>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "plain",
            "$2b$04$short",
            "$1$salt$0123456789012345678901",
            &bcrypt.replacen("$04$", "$4$", 1),
            &bcrypt.replacen("$04$", "$15$", 1),
            &bcrypt.replacen("$04$", "$31$", 1),
            &argon2.replacen("m=8", "m=4194304", 1),
            &argon2.replacen("t=1", "t=1000", 1),
            &argon2.replacen("m=8,t=1", "m=262144,t=5", 1),
            &argon2.replacen("m=8,t=1", "m=52429,t=20", 1),
            "$argon2id$v=19$m=8,t=1,p=1",
            "$6$rounds=999999999$salt$x",
        ] {
            assert!(bad.parse::<ImportedHash>().is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in any::<String>(), tail in "[$a-z0-9=,./]{0,80}") {
            for hash in [text, format!("$2b${tail}"), format!("$argon2id${tail}"), format!("$6${tail}")] {
                prop_assume!(Scheme::of(&hash).is_none());
                prop_assert!(!verify("x", &hash));
            }
        }
    }
}
