//! Which settings are refused. Weak secrets are, and in production missing ones; in dev mode the
//! service makes its own.

use std::time::Duration;

use super::{
    AuthSettings, MAX_ARGON2_ITERATIONS, MAX_ARGON2_MEMORY_KIB, MAX_BCRYPT_COST, PasswordScheme,
    Secret, Settings, SigningAlgorithm, argon2_is_too_costly, duration,
};

/// Bits that a secret needs at least: RFC 7518 §3.2 for HS256, the same for the master key.
const MIN_SECRET_BITS: usize = 256;

/// A setting that is refused: its key and why.
type Refusal = (&'static str, String);

/// Holds settings to ranges, a line each: `section.key: from, to;`.
macro_rules! hold {
    ($check:ident, $settings:ident, $($section:ident.$key:ident: $min:expr, $max:expr;)*) => {
        $($check(
            concat!(stringify!($section), ".", stringify!($key)),
            $settings.$section.$key,
            $min,
            $max,
        )?;)*
    };
}

/// Refuses what cannot work.
pub(super) fn bounds(settings: &Settings) -> Result<(), Refusal> {
    let Settings { auth, password, .. } = settings;
    let (second, minute) = (Duration::from_secs(1), Duration::from_mins(1));
    let (tick, hour, day) = (second / 100, 60 * minute, 24 * 60 * minute);
    hold! { within, settings,
        server.max_request_bytes: 4 << 10, 64 << 20;
        server.max_streams: 1, 100_000;
        server.max_connections: 1, 1_000_000;
        server.threads: 0, 1024;
        database.pool_size: 2, 1000;
        auth.cache_bytes: 1 << 20, 1 << 40;
        auth.api_keys_per_user: 1, 10_000;
        password.min_length: 8, 64;
        password.min_strength: 0, 4;
        password.argon2_memory_kib: 7 * 1024, MAX_ARGON2_MEMORY_KIB;
        password.argon2_iterations: 1, MAX_ARGON2_ITERATIONS;
        password.bcrypt_cost: 10, MAX_BCRYPT_COST;
        password.threads: 0, 1024;
        password.queue: 0, 100_000;
        throttle.account_failures: 0, 100;
        throttle.address_failures: 0, 1_000_000;
        audit.retention_months: 0, 1200;
        usage.writers: 1, 64;
        usage.batch_events: 1, 10_000;
        usage.queue_events: 1000, 10_000_000;
    }
    hold! { lasts, settings,
        server.max_deadline: second, day;
        server.drain_delay: Duration::ZERO, 10 * minute;
        server.drain_deadline: Duration::ZERO, hour;
        database.acquire_timeout: tick, day;
        database.statement_timeout: tick, day;
        auth.access_ttl: second, day;
        auth.refresh_idle_ttl: second, 400 * day;
        auth.refresh_absolute_ttl: auth.refresh_idle_ttl, 4000 * day;
        auth.refresh_retry_window: Duration::ZERO, auth.refresh_idle_ttl;
        auth.leeway: Duration::ZERO, 5 * minute;
        auth.staleness_bound: 10 * tick, minute;
        auth.max_stale: auth.staleness_bound, day;
        auth.api_key_max_ttl: hour, 4000 * day;
        auth.mfa_challenge_ttl: 30 * second, hour;
        auth.mail_interval: second, hour;
        auth.verification_ttl: minute, 30 * day;
        auth.reset_ttl: minute, day;
        mail.deadline: second, 5 * minute;
        mail.reply_deadline: second, hour;
        password.queue_timeout: tick, minute;
        throttle.max_delay: second, hour;
        quota.replica_ttl: second, 5 * minute;
        quota.hold_horizon: second, hour;
        quota.recall_bound: tick, 10 * second;
    }
    for (key, value) in [
        ("auth.issuer", &auth.issuer),
        ("auth.audience", &auth.audience),
    ] {
        if value.is_empty() || value.len() > 255 {
            return Err((key, "must be 1 to 255 bytes".to_owned()));
        }
    }
    let issuer = &auth.mfa_issuer;
    let is_fine = |c: char| c != ':' && !c.is_control();
    if !(1..=64).contains(&issuer.len()) || !issuer.chars().all(is_fine) {
        let message = "must be 1 to 64 bytes, without colons and control characters";
        return Err(("auth.mfa_issuer", message.to_owned()));
    }
    settings.tls.check()?;
    if let Err(message) = settings.webhook.target() {
        return Err(("webhook.url", message.to_owned()));
    }
    settings.mail.check(settings.dev)?;
    if auth.require_verified_email && !settings.dev && !settings.mail.is_configured() {
        let message = "needs mail.server: nobody could verify an address";
        return Err(("auth.require_verified_email", message.to_owned()));
    }
    if !matches!(settings.usage.retention_months, 0 | 3..=1200) {
        let message = "must be 0 (keep all) or 3 to 1200, for events may come 35 days late";
        return Err(("usage.retention_months", message.to_owned()));
    }
    if argon2_is_too_costly(password.argon2_memory_kib, password.argon2_iterations) {
        let message = "times password.argon2_memory_kib must be at most 1048576";
        return Err(("password.argon2_iterations", message.to_owned()));
    }
    if password.scheme == PasswordScheme::Bcrypt && password.min_length > 18 {
        // 72 bytes hold 18 characters of four bytes each.
        let message = "must be at most 18 with bcrypt";
        return Err(("password.min_length", message.to_owned()));
    }
    Ok(())
}

/// Refuses secrets that are weak or, in production, missing.
pub(super) fn secrets(settings: &Settings) -> Result<(), Refusal> {
    let AuthSettings {
        algorithm,
        key_dir,
        jwt_secret,
        master_key,
        ..
    } = &settings.auth;
    let production = !settings.dev;
    let refused = |key, message: &str| Err((key, message.to_owned()));
    let hs256 = *algorithm == SigningAlgorithm::Hs256;
    strength("auth.master_key", master_key, production)?;
    strength("auth.jwt_secret", jwt_secret, production && hs256)?;
    if !settings.webhook.url.is_empty()
        && let Err(message) = settings.webhook.key()
    {
        return refused("webhook.secret", message);
    }
    if hs256 && !jwt_secret.is_set() {
        let message = "must be set when auth.algorithm is HS256";
        return refused("auth.jwt_secret", message);
    }
    if !hs256 && jwt_secret.is_set() {
        return refused("auth.jwt_secret", "is for auth.algorithm HS256 only");
    }
    if production && !hs256 && key_dir.as_os_str().is_empty() {
        let message =
            "must name a folder of PEM keys in production; `tollkeeper keys generate` makes one";
        return refused("auth.key_dir", message);
    }
    Ok(())
}

/// Refuses a secret that is missing where it is required, too short, or plainly a placeholder.
fn strength(key: &'static str, secret: &Secret, required: bool) -> Result<(), Refusal> {
    let refused = |message: String| Err((key, message));
    let text = secret.expose();
    match text.len() * 8 {
        0 if !required => return Ok(()),
        0 => {
            let message = format!("must be set in production, to at least {MIN_SECRET_BITS} bits");
            return refused(message);
        }
        bits @ ..MIN_SECRET_BITS => {
            let message = format!("holds {bits} bits, at least {MIN_SECRET_BITS} are needed");
            return refused(message);
        }
        _ => {}
    }
    let lower = text.to_ascii_lowercase();
    let placeholder = ["secret-key", "change", "example", "placeholder", "password"]
        .iter()
        .any(|word| lower.contains(word));
    let mut distinct = text.as_bytes().to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    if placeholder || distinct.len() < 8 {
        let message = "looks like a placeholder; use random bytes: openssl rand -hex 32";
        return refused(message.to_owned());
    }
    Ok(())
}

fn within<T: PartialOrd + std::fmt::Display>(
    key: &'static str,
    value: T,
    min: T,
    max: T,
) -> Result<(), Refusal> {
    if value < min || value > max {
        return Err((key, format!("must be {min} to {max}, not {value}")));
    }
    Ok(())
}

fn lasts(key: &'static str, value: Duration, min: Duration, max: Duration) -> Result<(), Refusal> {
    if value < min || value > max {
        let [min, max, value] = [min, max, value].map(duration::text);
        return Err((key, format!("must be {min} to {max}, not {value}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRONG: &str = "b1946ac92492d2347c6235b4d2611184aabbccddeeff00112233445566778899";

    fn production() -> Settings {
        let mut settings = Settings::default();
        settings.database.url = Secret::new("postgresql://db/tollkeeper");
        settings.auth.master_key = Secret::new(STRONG);
        settings.auth.key_dir = "/etc/tollkeeper/keys".into();
        settings
    }

    fn refused(change: impl FnOnce(&mut Settings)) -> &'static str {
        let mut settings = production();
        change(&mut settings);
        secrets(&settings).expect_err("refused").0
    }

    #[test]
    fn production_wants_strong_secrets_by_name() {
        assert_eq!(secrets(&production()), Ok(()));
        assert_eq!(
            refused(|s| s.auth.master_key = Secret::default()),
            "auth.master_key"
        );
        assert_eq!(
            refused(|s| s.auth.master_key = Secret::new("short")),
            "auth.master_key"
        );
        assert_eq!(
            refused(|s| s.auth.master_key = Secret::new("a".repeat(64))),
            "auth.master_key"
        );
        assert_eq!(refused(|s| s.auth.key_dir = "".into()), "auth.key_dir");
        assert_eq!(
            refused(|s| s.webhook.url = "http://notices.internal".to_owned()),
            "webhook.secret"
        );
        assert_eq!(
            refused(|s| s.auth.algorithm = SigningAlgorithm::Hs256),
            "auth.jwt_secret"
        );
        assert_eq!(
            refused(|s| {
                s.auth.algorithm = SigningAlgorithm::Hs256;
                s.auth.jwt_secret = Secret::new("your-secret-key-change-in-production");
            }),
            "auth.jwt_secret"
        );
        assert_eq!(
            refused(|s| {
                s.auth.algorithm = SigningAlgorithm::Hs256;
                s.auth.jwt_secret = Secret::new(&STRONG[..31]);
            }),
            "auth.jwt_secret"
        );
    }

    #[test]
    fn a_hash_that_could_not_be_checked_is_not_made() {
        type Change = fn(&mut Settings);
        let cases: [(Change, &str); 3] = [
            (|s| s.password.bcrypt_cost = 15, "password.bcrypt_cost"),
            (
                |s| s.password.argon2_memory_kib = 262_145,
                "password.argon2_memory_kib",
            ),
            (
                |s| (s.password.argon2_memory_kib, s.password.argon2_iterations) = (262_144, 5),
                "password.argon2_iterations",
            ),
        ];
        for (change, key) in cases {
            let mut settings = production();
            change(&mut settings);
            assert_eq!(bounds(&settings).expect_err(key).0, key);
        }
        let mut dearest = production();
        dearest.password.argon2_memory_kib = 262_144;
        dearest.password.argon2_iterations = 4;
        assert!(bounds(&dearest).is_ok());
    }

    #[test]
    fn records_are_kept_for_as_long_as_events_may_come_or_for_ever() {
        let mut settings = production();
        for (months, is_refused) in [(0, false), (1, true), (2, true), (3, false), (1201, true)] {
            settings.usage.retention_months = months;
            let refused = bounds(&settings).err().map(|(key, _)| key);
            assert_eq!(refused, is_refused.then_some("usage.retention_months"));
        }
    }

    #[test]
    fn authenticator_apps_can_show_the_issuer_and_challenges_end_in_time() {
        let refused = |change: fn(&mut Settings)| {
            let mut settings = production();
            change(&mut settings);
            bounds(&settings).err().map(|(key, _)| key)
        };
        assert_eq!(
            refused(|s| s.auth.mfa_issuer = "Acme & Söhne".to_owned()),
            None
        );
        let issuers: [fn(&mut Settings); 4] = [
            |s| s.auth.mfa_issuer = String::new(),
            |s| s.auth.mfa_issuer = "acme:auth".to_owned(),
            |s| s.auth.mfa_issuer = "acme\n".to_owned(),
            |s| s.auth.mfa_issuer = "x".repeat(65),
        ];
        for change in issuers {
            assert_eq!(refused(change), Some("auth.mfa_issuer"));
        }
        let ttl = |s: &mut Settings| s.auth.mfa_challenge_ttl = Duration::from_hours(2);
        assert_eq!(refused(ttl), Some("auth.mfa_challenge_ttl"));
    }

    #[test]
    fn dev_mode_needs_no_secret_and_still_refuses_a_short_one() {
        let mut settings = Settings {
            dev: true,
            ..Settings::default()
        };
        assert_eq!(secrets(&settings), Ok(()));
        settings.auth.master_key = Secret::new("short");
        assert!(secrets(&settings).is_err());
    }
}
