//! Settings: one struct per subsystem, and where each value came from.
//!
//! Flags over environment over file over defaults. Key `auth.access_ttl` is
//! `TOLLKEEPER_AUTH_ACCESS_TTL` in the environment and `access_ttl` under `[auth]` in the TOML file.
//! An unknown key is an error.

mod costs;
pub(crate) mod duration;
mod layers;
mod mail;
mod networks;
mod throttle;
mod tls;
mod validate;
mod webhook;

use std::{fmt, net::SocketAddr, path::PathBuf, thread::available_parallelism, time::Duration};

use serde::{Deserialize, Serialize};

pub use costs::{
    MAX_ARGON2_ITERATIONS, MAX_ARGON2_MEMORY_KIB, MAX_BCRYPT_COST, argon2_is_too_costly,
};
pub use layers::{Loaded, Origin, SettingsError, load};
pub use mail::{MailSettings, MailTls};
pub use networks::Networks;
pub use throttle::ThrottleSettings;
pub use tls::{TlsSettings, is_uri};
pub use webhook::WebhookSettings;

/// All settings, checked: see [`load`].
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Makes the keys that are missing; weak ones are refused all the same. On without a database URL.
    pub dev: bool,
    /// Where the private Postgres and the keys of dev mode live.
    pub data_dir: PathBuf,
    pub server: ServerSettings,
    pub tls: TlsSettings,
    pub database: DatabaseSettings,
    pub auth: AuthSettings,
    pub password: PasswordSettings,
    pub throttle: ThrottleSettings,
    pub audit: AuditSettings,
    pub usage: UsageSettings,
    pub quota: QuotaSettings,
    pub gateway: GatewaySettings,
    pub webhook: WebhookSettings,
    pub mail: MailSettings,
    pub log: LogSettings,
    pub ops: OpsSettings,
}

/// The gRPC listener and its bounds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ServerSettings {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Whether anyone may read the protos by server reflection.
    pub reflection: bool,
    /// Networks of proxies that say by `x-forwarded-for` whom they speak for, such as `10.0.0.0/8`.
    pub trusted_proxies: Networks,
    /// Largest request, bytes.
    pub max_request_bytes: usize,
    /// Concurrent calls on one connection.
    pub max_streams: u32,
    /// Connections at once; more wait to be accepted.
    pub max_connections: usize,
    /// Threads that serve, each with its share of the connections; 0 means one per core.
    pub threads: usize,
    /// Longest a call may take; a shorter deadline of the client holds.
    #[serde(with = "duration")]
    pub max_deadline: Duration,
    /// Between "not serving" and the end of accepting connections, so that load balancers notice.
    #[serde(with = "duration")]
    pub drain_delay: Duration,
    /// Longest wait for calls in flight at shutdown.
    #[serde(with = "duration")]
    pub drain_deadline: Duration,
}

/// Postgres.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DatabaseSettings {
    /// `postgresql://…`. Empty: a private Postgres in `data_dir`. Also read from `DATABASE_URL`.
    pub url: Secret,
    /// Connections of this process.
    pub pool_size: usize,
    /// Longest wait for a connection.
    #[serde(with = "duration")]
    pub acquire_timeout: Duration,
    /// Longest a statement may run.
    #[serde(with = "duration")]
    pub statement_timeout: Duration,
}

/// Tokens, sessions and keys.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuthSettings {
    /// `iss` of access tokens.
    pub issuer: String,
    /// `aud` of access tokens.
    pub audience: String,
    /// Algorithm that signs: `EdDSA`, ES256, RS256 or HS256.
    pub algorithm: SigningAlgorithm,
    /// Lifetime of access tokens.
    #[serde(with = "duration")]
    pub access_ttl: Duration,
    /// A session lapses when its refresh token is not used for this long.
    #[serde(with = "duration")]
    pub refresh_idle_ttl: Duration,
    /// A session ends after this long however much it is used.
    #[serde(with = "duration")]
    pub refresh_absolute_ttl: Duration,
    /// How long after a refresh the previous token still answers with the same successor.
    #[serde(with = "duration")]
    pub refresh_retry_window: Duration,
    /// Clock difference forgiven when a token's times are checked.
    #[serde(with = "duration")]
    pub leeway: Duration,
    /// How long a revocation on another replica may stay unknown; past it the database is asked.
    #[serde(with = "duration")]
    pub staleness_bound: Duration,
    /// How long answers from memory may be given while the database is away as well.
    #[serde(with = "duration")]
    pub max_stale: Duration,
    /// Memory for what is known of credentials, bytes.
    pub cache_bytes: u64,
    /// Live API keys that a user may have.
    pub api_keys_per_user: u32,
    /// Longest lifetime of an API key that expires; one may also never expire.
    #[serde(with = "duration")]
    pub api_key_max_ttl: Duration,
    /// What authenticator apps call this service.
    pub mfa_issuer: String,
    /// How long a login waits for its second factor.
    #[serde(with = "duration")]
    pub mfa_challenge_ttl: Duration,
    /// Whether an address has to be verified before its user may log in.
    pub require_verified_email: bool,
    /// Between two mails to one account for the same; doubles for whoever asks on, up to half an hour.
    #[serde(with = "duration")]
    pub mail_interval: Duration,
    /// How long the mail that verifies an address is good.
    #[serde(with = "duration")]
    pub verification_ttl: Duration,
    /// How long the mail that sets a password is good.
    #[serde(with = "duration")]
    pub reset_ttl: Duration,
    /// Folder of PEM keys. Empty in dev mode: `keys` in `data_dir`.
    pub key_dir: PathBuf,
    /// Secret of HS256, at least 256 bits.
    pub jwt_secret: Secret,
    /// Secret that refresh tokens are derived from and second factors are sealed with, at least 256 bits.
    pub master_key: Secret,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SigningAlgorithm {
    #[serde(rename = "EdDSA")]
    EdDsa,
    #[serde(rename = "ES256")]
    Es256,
    #[serde(rename = "RS256")]
    Rs256,
    #[serde(rename = "HS256")]
    Hs256,
}

/// How passwords are hashed and how much of the machine that may take.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PasswordSettings {
    /// Scheme of new hashes: argon2id or bcrypt.
    pub scheme: PasswordScheme,
    /// Shortest password, characters; 8 is the floor.
    pub min_length: usize,
    /// How hard a new password must be to guess, 0 to 4 as zxcvbn scores; 0 asks for its length only.
    pub min_strength: u8,
    /// Memory of an argon2id hash, KiB.
    pub argon2_memory_kib: u32,
    /// Passes of an argon2id hash.
    pub argon2_iterations: u32,
    /// Cost of a bcrypt hash: 2^cost rounds.
    pub bcrypt_cost: u32,
    /// Hashes computed at once; 0 means one per core.
    pub threads: usize,
    /// Hashes waiting beyond those; more are refused at once.
    pub queue: usize,
    /// Longest wait for a turn.
    #[serde(with = "duration")]
    pub queue_timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PasswordScheme {
    Argon2id,
    Bcrypt,
}

/// Tiers and the ledger.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UsageSettings {
    /// TOML file of the tiers. Empty: the built-in ones.
    pub tiers_file: PathBuf,
    /// Connections that usage is written over, beside `database.pool_size`: small batches at a time.
    pub writers: usize,
    /// Events of a batch, about: the events of one call stay together. Two are written at a time when many
    /// wait, and one that takes them all leaves nothing for the other.
    pub batch_events: usize,
    /// Events that may wait to be written; more are refused at once.
    pub queue_events: usize,
    /// Full months that usage records are kept, beside the running one; sums outlive them. At least
    /// 3, since events may come late; 0 keeps all.
    pub retention_months: u32,
}

/// The audit trail.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AuditSettings {
    /// Full months that the trail is kept, beside the running one; 0 keeps all.
    pub retention_months: u32,
}

/// What servers hold ready of users' quota.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuotaSettings {
    /// A server that the database has not heard of for so long holds nothing more of what it has ready.
    #[serde(with = "duration")]
    pub replica_ttl: Duration,
    /// Reservations up to this long are made without asking the database. What a server that died
    /// had ready is unusable for as long, and `replica_ttl` at least.
    #[serde(with = "duration")]
    pub hold_horizon: Duration,
    /// How long others are asked for what they do not use before anybody is refused.
    #[serde(with = "duration")]
    pub recall_bound: Duration,
}

/// Gateways that ask before they let a request pass.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewaySettings {
    /// Whether a gateway on the same machine may ask without a service key. So may everybody else
    /// there, and whoever can send through a proxy there.
    pub trust_loopback: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    pub format: LogFormat,
    /// What to log, as `tracing_subscriber::EnvFilter` reads it.
    pub filter: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Human in dev mode, else JSON.
    Auto,
    /// One JSON object a line.
    Json,
    /// For reading at a terminal.
    Human,
}

/// For machines that watch.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OpsSettings {
    /// Address and port of metrics and probes over HTTP; empty: none.
    #[serde(with = "address")]
    pub listen: Option<SocketAddr>,
}

/// A value that is never printed. Empty means unset.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }

    pub fn is_set(&self) -> bool {
        !self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_set() { "(hidden)" } else { "(unset)" })
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            dev: false,
            data_dir: default_data_dir(),
            server: ServerSettings::default(),
            tls: TlsSettings::default(),
            database: DatabaseSettings::default(),
            auth: AuthSettings::default(),
            password: PasswordSettings::default(),
            throttle: ThrottleSettings::default(),
            audit: AuditSettings::default(),
            usage: UsageSettings::default(),
            quota: QuotaSettings::default(),
            gateway: GatewaySettings::default(),
            webhook: WebhookSettings::default(),
            mail: MailSettings::default(),
            log: LogSettings::default(),
            ops: OpsSettings::default(),
        }
    }
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            reflection: true,
            trusted_proxies: Networks::default(),
            max_request_bytes: 1 << 20,
            max_streams: 256,
            max_connections: 10_000,
            threads: 0,
            max_deadline: Duration::from_secs(30),
            drain_delay: Duration::ZERO,
            drain_deadline: Duration::from_secs(20),
        }
    }
}

impl Default for DatabaseSettings {
    fn default() -> Self {
        Self {
            url: Secret::default(),
            pool_size: 16,
            acquire_timeout: Duration::from_secs(3),
            statement_timeout: Duration::from_secs(10),
        }
    }
}

impl Default for AuthSettings {
    fn default() -> Self {
        Self {
            issuer: "tollkeeper".to_owned(),
            audience: "tollkeeper".to_owned(),
            algorithm: SigningAlgorithm::EdDsa,
            access_ttl: Duration::from_mins(30),
            refresh_idle_ttl: Duration::from_hours(7 * 24),
            refresh_absolute_ttl: Duration::from_hours(30 * 24),
            refresh_retry_window: Duration::from_mins(2),
            leeway: Duration::from_secs(5),
            staleness_bound: Duration::from_secs(2),
            max_stale: Duration::from_secs(30),
            cache_bytes: 288 << 20,
            api_keys_per_user: 50,
            api_key_max_ttl: Duration::from_hours(365 * 24),
            mfa_issuer: "Tollkeeper".to_owned(),
            mfa_challenge_ttl: Duration::from_mins(5),
            require_verified_email: false,
            mail_interval: Duration::from_mins(1),
            verification_ttl: Duration::from_hours(24),
            reset_ttl: Duration::from_hours(1),
            key_dir: PathBuf::new(),
            jwt_secret: Secret::default(),
            master_key: Secret::default(),
        }
    }
}

impl Default for PasswordSettings {
    /// OWASP Password Storage Cheat Sheet: argon2id with 19 MiB, two passes, one lane.
    fn default() -> Self {
        Self {
            scheme: PasswordScheme::Argon2id,
            min_length: 12,
            min_strength: 3,
            argon2_memory_kib: 19 * 1024,
            argon2_iterations: 2,
            bcrypt_cost: 12,
            threads: 0,
            queue: 256,
            queue_timeout: Duration::from_secs(2),
        }
    }
}

impl Default for UsageSettings {
    fn default() -> Self {
        Self {
            tiers_file: PathBuf::new(),
            writers: 16,
            batch_events: 500,
            queue_events: 20_000,
            retention_months: 0,
        }
    }
}

impl Default for QuotaSettings {
    fn default() -> Self {
        Self {
            replica_ttl: Duration::from_secs(10),
            hold_horizon: Duration::from_mins(2),
            recall_bound: Duration::from_millis(250),
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            format: LogFormat::Auto,
            filter: "info".to_owned(),
        }
    }
}

impl Default for OpsSettings {
    fn default() -> Self {
        Self {
            listen: Some(SocketAddr::from(([127, 0, 0, 1], 9464))),
        }
    }
}

/// A number of threads as configured; 0 means one per core.
pub(crate) fn or_cores(threads: usize) -> usize {
    match threads {
        0 => available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
}

/// The usual place for a service's data: of the machine for root, of the user for anybody else.
fn default_data_dir() -> PathBuf {
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/var/lib/tollkeeper");
    }
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/share"));
    std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(home)
        .unwrap_or_else(std::env::temp_dir)
        .join("tollkeeper")
}

/// An address, or none as an empty text.
mod address {
    use std::net::SocketAddr;

    use serde::{Deserialize as _, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(
        value: &Option<SocketAddr>,
        out: S,
    ) -> Result<S::Ok, S::Error> {
        let text = value.map(|address| address.to_string());
        out.serialize_str(&text.unwrap_or_default())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<SocketAddr>, D::Error> {
        let text = String::deserialize(from)?;
        if text.is_empty() {
            return Ok(None);
        }
        let parsed = text.parse().map(Some);
        parsed.map_err(|_| de::Error::custom("not an address such as 127.0.0.1:9464, or empty"))
    }
}
