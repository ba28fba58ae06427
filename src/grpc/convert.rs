//! Between messages and the model. Reading a message collects what is wrong with every field.

use std::{fmt, time::Duration};

use chrono::{DateTime, Utc};
use prost_types::Timestamp;

use super::{people, status};
use crate::{
    auth::{IssuedTokens, PublicKey, UserCredential, Validated},
    error::{Error, FieldViolation, Result, Violations},
    model::{
        ApiKey, Cursor, EventId, Identifier, KeyOverlap, Labels, MinFreshness, MonthlyUsage,
        OnOutage, PageRequest, Person, Revision, Role, ServiceAccount, TierLimits, TierName, Tiers,
        TokenCounts, UsageEvent, UsageRecord, UsageTotals, User, UserId, Violation,
    },
    proto::tollkeeper::{admin, auth, usage},
    usage::{Recorded, check_occurred_at},
};

/// Reads the fields of a message and collects what is wrong with them.
#[derive(Default)]
pub(super) struct Fields {
    violations: Vec<FieldViolation>,
}

impl Fields {
    /// Takes a field's value, or notes what is wrong with it.
    pub(super) fn take<T>(
        &mut self,
        field: impl fmt::Display,
        value: std::result::Result<T, Violation>,
    ) -> Option<T> {
        value
            .map_err(|description| {
                self.violations.push(FieldViolation {
                    field: field.to_string(),
                    description,
                });
            })
            .ok()
    }

    /// Parses a field.
    pub(super) fn parse<T: std::str::FromStr<Err = Violation>>(
        &mut self,
        field: impl fmt::Display,
        text: &str,
    ) -> Option<T> {
        self.take(field, text.parse())
    }

    /// Parses a field that may be left empty.
    pub(super) fn parse_optional<T: std::str::FromStr<Err = Violation>>(
        &mut self,
        field: &str,
        text: &str,
    ) -> Option<Option<T>> {
        if text.is_empty() {
            Some(None)
        } else {
            self.parse(field, text).map(Some)
        }
    }

    /// Reads the name of a configured tier; empty means the default one.
    pub(super) fn tier(&mut self, field: &str, text: &str, tiers: &Tiers) -> Option<TierName> {
        self.take(field, tiers.named_or_default(text))
    }

    /// Reads the name of a configured tier.
    pub(super) fn known_tier(
        &mut self,
        field: &str,
        text: &str,
        tiers: &Tiers,
    ) -> Option<TierName> {
        self.take(field, tiers.named(text))
    }

    /// Reads `page_size` and `page_token`. `list` names the list and all that it was asked for.
    pub(super) fn page<C: Cursor>(
        &mut self,
        page_size: i32,
        page_token: &str,
        list: &str,
    ) -> Option<PageRequest<C>> {
        let size = self.take("page_size", PageRequest::<C>::size(page_size));
        let after = self.take("page_token", PageRequest::after(page_token, list));
        Some(PageRequest::new(size?, after?, list))
    }

    /// The values read, if every field was right.
    ///
    /// # Errors
    /// `Invalid`, naming every wrong field.
    pub(super) fn finish<T>(self, values: Option<T>) -> Result<T> {
        match values {
            Some(values) if self.violations.is_empty() => Ok(values),
            _ => Err(Error::Invalid(Violations(self.violations))),
        }
    }
}

/// Reads one field of a message that has no other to read.
pub(super) fn only<T>(read: impl FnOnce(&mut Fields) -> Option<T>) -> Result<T> {
    let mut fields = Fields::default();
    let value = read(&mut fields);
    fields.finish(value)
}

/// Reads a time, 1970 to 9999, to the microsecond: the database keeps no more.
pub(super) fn timestamp(value: Option<Timestamp>) -> std::result::Result<DateTime<Utc>, Violation> {
    let value = value.ok_or("must be set")?;
    let nanos = u32::try_from(value.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000);
    nanos
        .map(|nanos| nanos - nanos % 1000)
        .filter(|_| (0..253_402_300_800).contains(&value.seconds))
        .and_then(|nanos| DateTime::from_timestamp(value.seconds, nanos))
        .ok_or_else(|| "must be a time from 1970 to 9999".into())
}

/// Reads how long old keys are to overlap with a new one; unset means the default.
pub(super) fn key_overlap(
    value: Option<prost_types::Duration>,
) -> std::result::Result<KeyOverlap, Violation> {
    let Some(value) = value else {
        return Ok(KeyOverlap::DEFAULT);
    };
    let seconds = u64::try_from(value.seconds).ok();
    let nanos = u32::try_from(value.nanos)
        .ok()
        .filter(|nanos| *nanos < 1_000_000_000);
    let overlap = seconds
        .zip(nanos)
        .map(|(seconds, nanos)| Duration::new(seconds, nanos));
    // What is no such time is as wrong as one that is too long.
    overlap.unwrap_or(Duration::MAX).try_into()
}

/// Reads a usage event; `path` is what its fields' names begin with in the request.
pub(super) fn usage_event(
    fields: &mut Fields,
    path: &str,
    event: usage::v1::UsageEvent,
    now: DateTime<Utc>,
) -> Option<UsageEvent> {
    // Named only when something is wrong with it: a call may bring a thousand events.
    let path = |name| Path(path, name);
    let event_id: Option<EventId> = fields.parse(path("event_id"), &event.event_id);
    let occurred_at =
        timestamp(event.occurred_at).and_then(|at| check_occurred_at(at, now).map(|()| at));
    let occurred_at = fields.take(path("occurred_at"), occurred_at);
    let user_id: Option<UserId> = fields.parse(path("user_id"), &event.user_id);
    let model = fields.parse(path("model"), &event.model);
    let tokens = token_counts(fields, path("tokens"), event.tokens);
    let request_id = fields.take(path("request_id"), request_id(event.request_id));
    let labels = fields.take(path("labels"), labels(event.labels.into_iter().collect()));
    Some(UsageEvent {
        event_id: event_id?,
        occurred_at: occurred_at?,
        user_id: user_id?,
        model: model?,
        tokens: tokens?,
        request_id: request_id?,
        labels: labels?,
    })
}

/// A field's name behind what it begins with.
#[derive(Clone, Copy)]
struct Path<'a>(&'a str, &'a str);

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(path, name) = self;
        write!(f, "{path}{name}")
    }
}

pub(super) fn token_counts(
    fields: &mut Fields,
    field: impl fmt::Display + Copy,
    counts: Option<usage::v1::TokenCounts>,
) -> Option<TokenCounts> {
    let counts = counts.unwrap_or_default();
    let mut count =
        |name: &str, value: i64| fields.take(format_args!("{field}.{name}"), token_count(value));
    let (input, output) = (count("input", counts.input), count("output", counts.output));
    let cached_input = count("cached_input", counts.cached_input);
    let cache_write = count("cache_write", counts.cache_write);
    let reasoning = count("reasoning", counts.reasoning);
    let counts = TokenCounts {
        input: input?,
        output: output?,
        cached_input: cached_input?,
        cache_write: cache_write?,
        reasoning: reasoning?,
    };
    let some = if counts.total() > 0 {
        Ok(counts)
    } else {
        Err("must count at least one token".into())
    };
    fields.take(field, some)
}

/// Reads a number of tokens.
pub(super) fn token_count(value: i64) -> std::result::Result<i64, Violation> {
    if (0..=TokenCounts::MAX).contains(&value) {
        Ok(value)
    } else {
        Err(format!("must be 0 to {}", TokenCounts::MAX).into())
    }
}

fn request_id(text: String) -> std::result::Result<String, Violation> {
    if text.len() <= 128 && text.bytes().all(|b| b.is_ascii_graphic()) {
        Ok(text)
    } else {
        Err("must be at most 128 visible ASCII characters".into())
    }
}

pub(super) fn labels(labels: Labels) -> std::result::Result<Labels, Violation> {
    let fits = |(key, value): (&String, &String)| {
        (1..=64).contains(&key.len())
            && value.len() <= 256
            // Postgres keeps no NUL in text.
            && !key.contains('\0')
            && !value.contains('\0')
    };
    if labels.len() <= 16 && labels.iter().all(fits) {
        Ok(labels)
    } else {
        Err(
            "must be at most 16, keys of 1 to 64 and values of at most 256 bytes, without NUL"
                .into(),
        )
    }
}

/// Reads who a new account is for.
pub(super) fn person(
    fields: &mut Fields,
    email: &str,
    username: &str,
    full_name: &str,
) -> Option<Person> {
    let email = fields.parse("email", email);
    let username = fields.parse("username", username);
    let full_name = fields.parse("full_name", full_name);
    Some(Person {
        email: email?,
        username: username?,
        full_name: full_name?,
    })
}

/// Reads the role of a user to create; unspecified means an ordinary one.
pub(super) fn role(value: i32) -> std::result::Result<Role, Violation> {
    match value {
        0 => Ok(Role::User),
        value => people::role(value),
    }
}

/// Reads by what to look a user up.
pub(super) fn lookup(
    fields: &mut Fields,
    by: Option<admin::v1::lookup_user_request::By>,
) -> Option<Identifier> {
    use admin::v1::lookup_user_request::By;
    match by {
        Some(By::Email(email)) => fields.parse("email", &email).map(Identifier::Email),
        Some(By::Username(name)) => fields.parse("username", &name).map(Identifier::Username),
        None => fields.take("by", Err("must hold email or username".into())),
    }
}

impl From<User> for auth::v1::User {
    fn from(user: User) -> Self {
        Self {
            id: user.id.to_string(),
            email: user.email.into_string(),
            username: user.username.into_string(),
            full_name: user.full_name.into_string(),
            tier: user.tier.into_string(),
            tier_updated_at: Some(time(user.tier_updated_at)),
            role: auth::v1::Role::from(user.role).into(),
            is_active: user.is_active,
            email_verified_at: user.email_verified_at.map(time),
            created_at: Some(time(user.created_at)),
            updated_at: Some(time(user.updated_at)),
            last_login_at: user.last_login_at.map(time),
            mfa_enabled: user.mfa_enabled,
        }
    }
}

impl From<ApiKey> for auth::v1::ApiKey {
    fn from(key: ApiKey) -> Self {
        Self {
            id: key.id.to_string(),
            name: key.name.into_string(),
            scopes: key.scopes.names(),
            created_at: Some(time(key.created_at)),
            expires_at: key.expires_at.map(time),
            revoked_at: key.revoked_at.map(time),
            last_used_at: key.last_used_at.map(time),
        }
    }
}

impl From<Role> for auth::v1::Role {
    fn from(role: Role) -> Self {
        match role {
            Role::User => Self::User,
            Role::Admin => Self::Admin,
        }
    }
}

/// How fresh an answer is to be.
pub(super) fn min_freshness(
    fields: &mut Fields,
    wanted: Option<auth::v1::MinFreshness>,
) -> Option<MinFreshness> {
    use auth::v1::min_freshness::AtLeast;
    match wanted.and_then(|wanted| wanted.at_least) {
        None => Some(MinFreshness::Cached),
        Some(AtLeast::AtLeastRevision(revision)) => fields
            .parse("min_freshness.at_least_revision", &revision)
            .map(MinFreshness::AtLeast),
        Some(AtLeast::FromDatabase(())) => Some(MinFreshness::FromDatabase),
    }
}

/// Empty when it could not be told.
pub(super) fn revision(revision: Option<Revision>) -> String {
    revision
        .map(|revision| revision.to_string())
        .unwrap_or_default()
}

/// What became of one event of many; an error that is not the event's fails the whole call.
pub(super) fn usage_result(recorded: Result<Recorded>) -> Result<usage::v1::UsageResult> {
    use usage::v1::usage_result::Result as Worth;
    let worth = match recorded {
        Ok(recorded) => Worth::Outcome(outcome(recorded).into()),
        Err(error) => Worth::Failure(usage_failure(error)?),
    };
    Ok(usage::v1::UsageResult {
        result: Some(worth),
    })
}

/// Why an event is refused for good.
///
/// # Errors
/// The error itself, when it is not for good.
pub(super) fn usage_failure(error: Error) -> Result<usage::v1::UsageFailure> {
    let (reason, message) = (status::event_reason(&error), error.to_string());
    let fields = match (reason, error) {
        (None, error) => return Err(error),
        (_, Error::Invalid(Violations(violations))) => violations,
        _ => Vec::new(),
    };
    let field = |FieldViolation { field, description }| usage::v1::FieldFailure {
        field,
        description: description.to_string(),
    };
    Ok(usage::v1::UsageFailure {
        reason: reason.unwrap_or_default().to_owned(),
        message,
        fields: fields.into_iter().map(field).collect(),
    })
}

impl From<Recorded> for usage::v1::RecordUsageResponse {
    fn from(recorded: Recorded) -> Self {
        Self {
            outcome: outcome(recorded).into(),
        }
    }
}

fn outcome(recorded: Recorded) -> usage::v1::record_usage_response::Outcome {
    use usage::v1::record_usage_response::Outcome;
    match recorded {
        Recorded::Now => Outcome::Recorded,
        Recorded::Before => Outcome::Duplicate,
    }
}

/// What one token of many is worth; an error that is not the token's fails the whole call.
pub(super) fn token_result(answer: Result<Validated>) -> Result<auth::v1::TokenResult> {
    use auth::v1::token_result::Result as Worth;
    let worth = match answer {
        Ok(validated) => Worth::Valid((&validated).into()),
        Err(error @ Error::Refused { fault, .. }) => Worth::Refused(auth::v1::TokenRefusal {
            reason: status::reason_name(fault).to_owned(),
            message: error.to_string(),
        }),
        Err(error) => return Err(error),
    };
    Ok(auth::v1::TokenResult {
        result: Some(worth),
    })
}

/// Without quota, which is not part of what a token says.
impl From<&Validated> for auth::v1::ValidateTokenResponse {
    fn from(validated: &Validated) -> Self {
        let (user, key) = (validated.user(), validated.api_key());
        Self {
            user_id: user.id.to_string(),
            username: user.username.to_string(),
            tier: user.tier.to_string(),
            role: auth::v1::Role::from(validated.role()).into(),
            session_id: match validated.credential() {
                UserCredential::Session(id) => id.to_string(),
                UserCredential::ApiKey(_) => String::new(),
            },
            issued_at: Some(time(validated.issued_at())),
            expires_at: validated.expires_at().map(time),
            cache_for: prost_types::Duration::try_from(validated.cache_for()).ok(),
            quota: None,
            scopes: key.map(|key| key.scopes.names()).unwrap_or_default(),
            api_key_id: key.map(|key| key.id.to_string()).unwrap_or_default(),
            amr: validated
                .methods()
                .iter()
                .map(|&method| method.to_owned())
                .collect(),
        }
    }
}

impl From<IssuedTokens> for auth::v1::Tokens {
    fn from(tokens: IssuedTokens) -> Self {
        Self {
            access_token: tokens.access_token,
            access_token_expires_at: Some(time(tokens.access_token_expires_at)),
            refresh_token: tokens.refresh_token,
            refresh_token_expires_at: Some(time(tokens.refresh_token_expires_at)),
            session_id: tokens.session_id.to_string(),
        }
    }
}

impl From<&PublicKey> for auth::v1::Jwk {
    fn from(key: &PublicKey) -> Self {
        Self {
            kty: key.kty.to_owned(),
            kid: key.kid.clone(),
            alg: key.alg.to_owned(),
            r#use: key.usage.to_owned(),
            crv: key.crv.unwrap_or_default().to_owned(),
            x: key.x.clone().unwrap_or_default(),
            y: key.y.clone().unwrap_or_default(),
            n: key.n.clone().unwrap_or_default(),
            e: key.e.clone().unwrap_or_default(),
        }
    }
}

impl From<ServiceAccount> for admin::v1::ServiceAccount {
    fn from(account: ServiceAccount) -> Self {
        Self {
            id: account.id.to_string(),
            name: account.name.into_string(),
            scopes: account.scopes.names(),
            is_active: account.is_active,
            created_at: Some(time(account.created_at)),
        }
    }
}

impl From<MonthlyUsage> for usage::v1::GetMonthlyUsageResponse {
    fn from(month: MonthlyUsage) -> Self {
        let model = |model: crate::model::ModelUsage| usage::v1::ModelUsage {
            model: model.model.into_string(),
            totals: Some(model.totals.into()),
        };
        Self {
            user_id: month.user_id.to_string(),
            month: month.period.to_string(),
            totals: Some(month.totals.into()),
            models: month.models.into_iter().map(model).collect(),
        }
    }
}

impl From<UsageTotals> for usage::v1::UsageTotals {
    fn from(totals: UsageTotals) -> Self {
        Self {
            tokens: Some(totals.tokens.into()),
            total_tokens: totals.tokens.total(),
            request_count: totals.request_count,
        }
    }
}

impl From<TokenCounts> for usage::v1::TokenCounts {
    fn from(counts: TokenCounts) -> Self {
        let TokenCounts {
            input,
            output,
            cached_input,
            cache_write,
            reasoning,
        } = counts;
        Self {
            input,
            output,
            cached_input,
            cache_write,
            reasoning,
        }
    }
}

impl From<UsageRecord> for usage::v1::UsageRecord {
    fn from(record: UsageRecord) -> Self {
        let event = record.event;
        Self {
            event: Some(usage::v1::UsageEvent {
                event_id: event.event_id.to_string(),
                occurred_at: Some(time(event.occurred_at)),
                user_id: event.user_id.to_string(),
                model: event.model.into_string(),
                tokens: Some(event.tokens.into()),
                request_id: event.request_id,
                labels: event.labels.into_iter().collect(),
            }),
            recorded_at: Some(time(record.recorded_at)),
        }
    }
}

/// A tier as listed.
pub(super) fn tier(limits: &TierLimits, is_default: bool) -> usage::v1::Tier {
    use usage::v1::tier::OnOutage as Policy;
    let (on_outage, open_tokens) = match limits.on_outage {
        OnOutage::Closed => (Policy::Closed, 0),
        OnOutage::Open { open_tokens } => (Policy::Open, open_tokens),
    };
    usage::v1::Tier {
        name: limits.name.to_string(),
        monthly_tokens: limits.monthly_tokens,
        max_request_tokens: limits.max_request_tokens,
        is_default,
        model_limits: limits
            .models
            .iter()
            .map(|(model, limit)| usage::v1::ModelLimit {
                model: model.to_string(),
                monthly_tokens: *limit,
            })
            .collect(),
        requests_per_minute: limits.requests_per_minute,
        on_outage: on_outage.into(),
        open_tokens,
        thresholds: limits
            .thresholds
            .iter()
            .map(|one| u32::from(*one))
            .collect(),
    }
}

/// Writes a time.
pub(super) fn time(instant: DateTime<Utc>) -> Timestamp {
    Timestamp {
        seconds: instant.timestamp(),
        nanos: i32::try_from(instant.timestamp_subsec_nanos().min(999_999_999)).unwrap_or(0),
    }
}
