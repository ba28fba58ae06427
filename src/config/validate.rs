//! Which settings are refused. In production weak or missing secrets are; in dev mode the service
//! makes its own.

use std::time::Duration;

use super::{AuthSettings, PasswordScheme, Secret, Settings, SigningAlgorithm};

/// Bits that a secret needs at least: RFC 7518 §3.2 for HS256, the same for the master key.
const MIN_SECRET_BITS: usize = 256;

/// Refuses what cannot work: the key and why.
pub(super) fn bounds(settings: &Settings) -> Result<(), (&'static str, String)> {
    let Settings {
        server,
        database,
        auth,
        password,
        ..
    } = settings;
    let day = Duration::from_hours(24);
    let second = Duration::from_secs(1);
    within(
        "server.max_request_bytes",
        server.max_request_bytes,
        4 << 10,
        64 << 20,
    )?;
    within("server.max_streams", server.max_streams, 1, 100_000)?;
    within(
        "server.max_connections",
        server.max_connections,
        1,
        1_000_000,
    )?;
    within("server.threads", server.threads, 0, 1024)?;
    lasts("server.max_deadline", server.max_deadline, second, day)?;
    lasts(
        "server.drain_delay",
        server.drain_delay,
        Duration::ZERO,
        Duration::from_mins(10),
    )?;
    lasts(
        "server.drain_deadline",
        server.drain_deadline,
        Duration::ZERO,
        Duration::from_hours(1),
    )?;
    within("database.pool_size", database.pool_size, 2, 1000)?;
    lasts(
        "database.acquire_timeout",
        database.acquire_timeout,
        second / 100,
        day,
    )?;
    lasts(
        "database.statement_timeout",
        database.statement_timeout,
        second / 100,
        day,
    )?;
    lasts("auth.access_ttl", auth.access_ttl, second, day)?;
    lasts(
        "auth.refresh_idle_ttl",
        auth.refresh_idle_ttl,
        second,
        400 * day,
    )?;
    lasts(
        "auth.refresh_absolute_ttl",
        auth.refresh_absolute_ttl,
        auth.refresh_idle_ttl,
        4000 * day,
    )?;
    lasts(
        "auth.refresh_retry_window",
        auth.refresh_retry_window,
        Duration::ZERO,
        auth.refresh_idle_ttl,
    )?;
    lasts(
        "auth.leeway",
        auth.leeway,
        Duration::ZERO,
        Duration::from_mins(5),
    )?;
    lasts(
        "auth.staleness_bound",
        auth.staleness_bound,
        second / 10,
        Duration::from_mins(1),
    )?;
    lasts("auth.max_stale", auth.max_stale, auth.staleness_bound, day)?;
    within("auth.cache_bytes", auth.cache_bytes, 1 << 20, 1 << 40)?;
    for (key, value) in [
        ("auth.issuer", &auth.issuer),
        ("auth.audience", &auth.audience),
    ] {
        if value.is_empty() || value.len() > 255 {
            return Err((key, "must be 1 to 255 bytes".to_owned()));
        }
    }
    within("password.min_length", password.min_length, 8, 64)?;
    within(
        "password.argon2_memory_kib",
        password.argon2_memory_kib,
        7 * 1024,
        1 << 20,
    )?;
    within(
        "password.argon2_iterations",
        password.argon2_iterations,
        1,
        20,
    )?;
    within("password.bcrypt_cost", password.bcrypt_cost, 10, 16)?;
    within("password.threads", password.threads, 0, 1024)?;
    within("password.queue", password.queue, 0, 100_000)?;
    lasts(
        "password.queue_timeout",
        password.queue_timeout,
        second / 100,
        Duration::from_mins(1),
    )?;
    if password.scheme == PasswordScheme::Bcrypt && password.min_length > 18 {
        // 72 bytes hold 18 characters of four bytes each.
        return Err((
            "password.min_length",
            "must be at most 18 with bcrypt".to_owned(),
        ));
    }
    Ok(())
}

/// Refuses secrets that are weak or, in production, missing: the key and why.
pub(super) fn secrets(settings: &Settings) -> Result<(), (&'static str, String)> {
    let AuthSettings {
        algorithm,
        key_dir,
        jwt_secret,
        master_key,
        ..
    } = &settings.auth;
    let production = !settings.dev;
    let hs256 = *algorithm == SigningAlgorithm::Hs256;
    strength("auth.master_key", master_key, production)?;
    strength("auth.jwt_secret", jwt_secret, production && hs256)?;
    if hs256 && !jwt_secret.is_set() {
        return Err((
            "auth.jwt_secret",
            "must be set when auth.algorithm is HS256".to_owned(),
        ));
    }
    if !hs256 && jwt_secret.is_set() {
        return Err((
            "auth.jwt_secret",
            "is for auth.algorithm HS256 only".to_owned(),
        ));
    }
    if production && !hs256 && key_dir.as_os_str().is_empty() {
        return Err((
            "auth.key_dir",
            "must name a folder of PEM keys in production; `tollkeeper keys generate` makes one"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Refuses a secret that is missing where it is required, too short, or plainly a placeholder.
fn strength(
    key: &'static str,
    secret: &Secret,
    required: bool,
) -> Result<(), (&'static str, String)> {
    let text = secret.expose();
    if text.is_empty() {
        let missing = format!("must be set in production, to at least {MIN_SECRET_BITS} bits");
        return if required {
            Err((key, missing))
        } else {
            Ok(())
        };
    }
    if text.len() * 8 < MIN_SECRET_BITS {
        let bits = text.len() * 8;
        return Err((
            key,
            format!("holds {bits} bits, at least {MIN_SECRET_BITS} are needed"),
        ));
    }
    let lower = text.to_ascii_lowercase();
    let placeholder = ["secret-key", "change", "example", "placeholder", "password"]
        .iter()
        .any(|word| lower.contains(word));
    let mut distinct = text.as_bytes().to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    if placeholder || distinct.len() < 8 {
        return Err((
            key,
            "looks like a placeholder; use random bytes: openssl rand -hex 32".to_owned(),
        ));
    }
    Ok(())
}

fn within<T: PartialOrd + std::fmt::Display>(
    key: &'static str,
    value: T,
    min: T,
    max: T,
) -> Result<(), (&'static str, String)> {
    if value < min || value > max {
        return Err((key, format!("must be {min} to {max}, not {value}")));
    }
    Ok(())
}

fn lasts(
    key: &'static str,
    value: Duration,
    min: Duration,
    max: Duration,
) -> Result<(), (&'static str, String)> {
    let show = humantime::format_duration;
    if value < min || value > max {
        return Err((
            key,
            format!(
                "must be {} to {}, not {}",
                show(min),
                show(max),
                show(value)
            ),
        ));
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
